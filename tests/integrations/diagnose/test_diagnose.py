"""The pre-flight check: its numbers against the oracle, its files, its command line and what it refuses."""

import argparse
import copy
import csv
import dataclasses
import html
import json
import weakref
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from popsd import Head, MaskConfig, PurifiedConfig, TargetConfig, oracle
from popsd.markers import EpistemicMarkers
from popsd_integrations import cli
from popsd_integrations.diagnose import command, measure, report
from popsd_integrations.diagnose.measure import DiagnoseConfig, diagnose
from popsd_integrations.diagnose.plots import SCALE, colour
from popsd_integrations.diagnose.summary import CANNOT_TELL, CONTEXTS, Diagnosis, needed, verdict
from popsd_integrations.diagnose.watched import Watched
from popsd_integrations.estimates import Interval
from popsd_integrations.huggingface.heads import head_from_model
from popsd_integrations.huggingface.prompts import ContextBuilder
from popsd_integrations.miniature import warmup
from popsd_integrations.miniature.sampler import sample
from popsd_integrations.miniature.task import MINIATURE_CONTEXTS, draw_puzzles
from popsd_integrations.miniature.tokenizer import TOKEN_ID, build_tokenizer

MARKERS = EpistemicMarkers(("maybe", "check", "wait"))
TOKENIZER = build_tokenizer()
PROBLEMS = [puzzle.problem for puzzle in draw_puzzles(6, "test", seed=0)]
PROMPTS = ContextBuilder(TOKENIZER, MINIATURE_CONTEXTS).build_all(PROBLEMS)


def tiny():
    torch.manual_seed(0)
    return warmup.build_model(warmup.WarmupConfig(hidden_size=16, layers=1, heads=2, mlp_size=16, init_std=0.3)).eval()


def run(**options) -> Diagnosis:
    config = DiagnoseConfig(**({"batch_size": 4, "max_new_tokens": 7, "markers": MARKERS} | options))
    return diagnose(tiny(), TOKENIZER, PROMPTS, config, generate=sample, progress=False)


@pytest.fixture(scope="module")
def diagnosis():
    return run()


@pytest.mark.parametrize("loss", [PurifiedConfig(), PurifiedConfig(temperature=1.3, plausibility=0.2)])
def test_every_row_is_what_the_oracle_says(loss):
    found, model = run(loss=loss), tiny()
    assert {row["completion"] for row in found.tokens} == set(range(6))
    rows = [row for row in found.tokens if row["completion"] == 4]
    completion = [row["token"] for row in rows]
    assert [row["position"] for row in rows] == list(range(len(rows)))
    states = []
    for prompt in (PROMPTS[4].question, PROMPTS[4].teacher, PROMPTS[4].reference):
        hidden = model.model(input_ids=torch.tensor([prompt + completion])).last_hidden_state[0]
        states.append(oracle.head_logits(hidden[len(prompt) - 1 : -1], head_from_model(model)).detach())
    target = torch.log_softmax(oracle.purified_target_logits(*states, loss), -1)
    parts = oracle.decompose(states[0], *states[1:], loss)
    for context, log_p in zip(CONTEXTS, (*(oracle.log_probs(x, loss) for x in states), target), strict=True):
        for place, row in enumerate(rows):
            assert row[f"{context}/token"] == pytest.approx(log_p[place, row["token"]].exp().item(), rel=1e-3)
            assert row[f"{context}/wait"] == pytest.approx(log_p[place, TOKEN_ID["WAIT"]].exp().item(), rel=1e-3)
    for place, row in enumerate(rows):
        assert row["reference_fraction"] == pytest.approx(parts.reference_fraction[place].item(), rel=1e-3)
        moved = 0.5 * (target[place].exp() - oracle.log_probs(states[0], loss)[place].exp()).abs().sum()
        assert row["mass_moved"] == pytest.approx(moved.item(), rel=1e-3)


def test_padding_goes_where_the_model_does_not_see_it(diagnosis, monkeypatch):
    sides, real = [], measure.pack_contexts
    monkeypatch.setattr(measure, "check_model", lambda *arguments, **options: "right")
    monkeypatch.setattr(
        measure, "pack_contexts", lambda *a, **options: sides.append(options["side"]) or real(*a, **options)
    )
    means = {name: found.mean for name, found in diagnosis.means.items()}
    assert {name: found.mean for name, found in run().means.items()} == pytest.approx(means, rel=1e-4, abs=1e-6)
    assert sides == ["right", "right"]


def test_other_targets_are_composed_as_training_composes_them():
    """The columns of the target, of the loss and of what is moved; the reference is not part of the last three."""
    mix = TargetConfig(target="arithmetic_mix", numbers=(0.3,))
    for name, loss in (
        ("opsd", PurifiedConfig()),
        ("beta_opsd", PurifiedConfig(pmi_beta=2.0)),
        ("arithmetic_mix", mix),
    ):
        row = run(loss_target=name, loss=loss).tokens[5]
        base, teacher = row["base/wait"], row["teacher/wait"]
        if name == "opsd":
            assert row["target/wait"] == pytest.approx(teacher, rel=1e-5)
            assert row["target_base_kl"] == pytest.approx(row["teacher_base_kl"], rel=1e-5)
        elif name == "arithmetic_mix":
            assert row["target/wait"] == pytest.approx(0.7 * base + 0.3 * teacher, rel=1e-4)
        else:
            assert min(base, teacher) < row["target/wait"] < max(base, teacher)
        assert row["divergence"] > 0 and row["reference_norm"] > 0
    with pytest.raises(ValueError, match=r"loss: expected a popsd.PurifiedConfig of the target 'opsd'"):
        DiagnoseConfig(loss_target="opsd", loss=mix)


def test_measures_of_others(diagnosis):
    """overlap and overlap_advantage as verl's compute_forward_kl_topk has them; every term is at most 0.1."""
    for row in diagnosis.tokens:
        assert 0 < row["overlap"] <= 1 and abs(row["overlap_advantage"]) < 0.1
        assert 0 <= row["teacher_base_kl"] < 10 and -1 <= row["mass_moved"] <= 1
    base, teacher = torch.tensor([[0.0, 1.0, 5.0, 2.0]]), torch.tensor([[3.0, 1.0, 5.0, -9.0]])
    found = measure._compared(base.repeat(2, 1), teacher.repeat(2, 1), base.repeat(2, 1))
    log_p, log_q = teacher.log_softmax(-1), base.log_softmax(-1)
    assert found["teacher_base_kl"][1] == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-5)
    assert found["overlap"][0] == 1 and found["mass_moved"][0] == found["target_base_kl"][0] == 0
    assert found["overlap_advantage"][0] == pytest.approx(-found["teacher_base_kl"][0].item() / 4, rel=1e-5)


def test_tokens_that_the_loss_leaves_out_count_nowhere():
    """As training weighs them: the function of the mask first, then the rules."""
    later = {"token_weights": lambda mask: mask & (torch.arange(mask.shape[1]) >= 2)}
    config = DiagnoseConfig(batch_size=6, max_new_tokens=7, markers=MARKERS, masks=MaskConfig(top_student_entropy=0.5))
    found = diagnose(tiny(), TOKENIZER, PROMPTS, config, generate=sample, progress=False, **later)
    rows = [row for row in found.tokens if row["weight"] > 0]
    late = [row for row in found.tokens if row["position"] >= 2]
    assert {row["position"] for row in rows} <= set(range(2, 7)) and len(rows) == pytest.approx(len(late) / 2, abs=1)
    total = sum(row["target/wait"] for row in rows) / len(rows)
    assert found.markers["wait"]["target"] == pytest.approx(total)
    with pytest.raises(ValueError, match=r"expected a token that counts"):
        diagnose(tiny(), TOKENIZER, PROMPTS, config, generate=sample, progress=False, token_weights=torch.zeros_like)


def test_summaries_are_means_of_the_rows(diagnosis):
    rows = diagnosis.tokens
    for context in CONTEXTS:
        mean = sum(row[f"{context}/maybe"] for row in rows) / len(rows)
        assert diagnosis.markers["maybe"][context] == pytest.approx(mean)
        words = sum(diagnosis.markers[word][context] for word in MARKERS.words)
        assert diagnosis.markers["all"][context] == pytest.approx(words)
        curve = sum(point[f"{context}/markers"].mean * point["tokens"] for point in diagnosis.positions) / len(rows)
        assert curve == pytest.approx(words)
    assert diagnosis.means["tokens"].mean == len(rows) == sum(point["tokens"] for point in diagnosis.positions)
    assert diagnosis.positions[0]["completions"] == 6 == len(diagnosis.completions)
    assert len(run(bins=3).positions) == 3


def test_every_marker_and_mean_has_an_interval_over_completions(diagnosis):
    """A marker's change is the ratio of sums; without any one completion it lies within the interval, or nearly so."""
    for word, row in diagnosis.markers.items():
        assert row["change"].mean == pytest.approx(row["target"] / row["base"])
        assert row["change"].low < row["change"].mean < row["change"].high, word
        assert row["verdict"] == verdict(row["change"], 0.02)
    wide = diagnosis.markers["wait"]["change"]
    for left_out in range(6):
        rest = [row for row in diagnosis.tokens if row["completion"] != left_out]
        assert wide.low < sum(row["target/wait"] for row in rest) / sum(row["base/wait"] for row in rest) < wide.high
    moved = diagnosis.means["mass_moved"]
    assert moved.low < moved.mean < moved.high and diagnosis.positions[0]["mass_moved"].low is not None
    for point in diagnosis.positions:
        for name, least in (("cos_total_reference", -1), ("target/markers", 0), ("mass_moved", 0)):
            assert point[name].low is None or least <= point[name].low <= point[name].high <= 1
    alone = diagnose(tiny(), TOKENIZER, PROMPTS[:1], DiagnoseConfig(max_new_tokens=7, markers=MARKERS), progress=False)
    assert alone.direction == CANNOT_TELL and "cannot be told from 1 completion:" in alone.sentence


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Interval(1.5, 1.1, 1.9), "raise"),
        (Interval(0.5, 0.4, 0.97), "lower"),
        (Interval(1.0, 0.99, 1.01), "keep"),
        (Interval(1.5, 1.01, 2.0), CANNOT_TELL),
        (Interval(1.0, 0.9, 1.01), CANNOT_TELL),
        (Interval(3.0, None, None), CANNOT_TELL),
        (None, CANNOT_TELL),
    ],
)
def test_a_verdict_needs_the_whole_interval(change, expected):
    assert verdict(change, 0.02) == expected


def test_how_many_completions_would_tell():
    assert needed(Interval(1.1, 0.9, 1.3), 0.02, 24) == 150  # 24 · (0.2 / 0.08)²
    assert needed(Interval(1.02, 0.9, 1.1), 0.02, 24) == 100_000 and needed(None, 0.02, 24) is None


def moves(base, target, change, direction):
    row = {"base": base, "teacher": 0.1, "reference": 0.1, "target": target, "verdict": direction}
    return {"all": row | {"change": change, "teacher_change": None}}


@pytest.mark.parametrize(
    ("change", "direction", "words"),
    [
        (Interval(1.5, 1.2, 1.8), "raise", "would raise the epistemic markers: 0.3000"),
        (Interval(0.5, 0.4, 0.6), "lower", "would lower"),
        (Interval(1.005, 0.99, 1.01), "keep", "would leave as they are"),
        (Interval(1.1, 0.9, 1.3), CANNOT_TELL, "cannot be told from 24 completions: "),
    ],
)
def test_the_sentence_says_where_the_markers_go(change, direction, words):
    means = {"mass_moved": Interval(0.1, 0.0, 0.2), "reference_fraction": Interval(1.5, 1.0, 2.0)}
    config = {"margin": 0.02, "loss_target": "mine", "contexts": ["base", "teacher"]}
    found = Diagnosis([], moves(0.2, 0.3, change, direction), [], means, [{}] * 24, config)
    assert found.direction == direction and words in found.sentence and "mine target" in found.sentence
    assert f"({change.mean:.3f} times, 95 % interval {change.low:.3f} to {change.high:.3f})" in found.sentence
    assert ("about 150 completions would tell" in found.sentence) == (direction == CANNOT_TELL)


def test_sampling_leaves_the_callers_random_state_and_modes_alone():
    model = tiny().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = diagnose(model, TOKENIZER, PROMPTS, DiagnoseConfig(max_new_tokens=5, markers=MARKERS), progress=False)
    assert torch.equal(torch.rand(3), expected) and model.training  # hf_generate, the default
    again = diagnose(model, TOKENIZER, PROMPTS, DiagnoseConfig(max_new_tokens=5, markers=MARKERS), progress=False)
    assert first.tokens == again.tokens


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.spans, self.sources = 0, []

    def handle_starttag(self, tag, attrs):
        self.spans += tag == "span"
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_files(diagnosis, tmp_path):
    pytest.importorskip("matplotlib")
    hostile = ["<b>&$x$", "=HYPERLINK(1)", "+1", "-1", "@x", "ſ\u2028\n"]
    diagnosis = copy.deepcopy(diagnosis)
    for row, text in zip(diagnosis.tokens, hostile, strict=False):
        row["text"] = text
    diagnosis.markers["<i>wait"] = diagnosis.markers["wait"]
    for texts in diagnosis.completions:
        texts["question"] += "<i>&"
    diagnosis.about.update({"Model <i>": "<i>a", "Data": "b & <i>", "Command": "popsd <i>", "Date": "today"})
    diagnosis = dataclasses.replace(diagnosis, note="<i>note")
    paths = report.write(diagnosis, tmp_path / "out")
    assert [path.name for path in paths] == ["diagnosis.json", "tokens.csv", "report.html", "curves.png", "heatmap.png"]
    content = json.loads(paths[0].read_text())
    assert content["sentence"] == diagnosis.sentence and content["markers"].keys() == diagnosis.markers.keys()
    assert content["change"] == list(diagnosis.change) and content["about"] == diagnosis.about
    with open(paths[1], newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["text"].startswith('"') for row in rows), "a spreadsheet would run some of them"
    assert [json.loads(row["text"]) for row in rows[: len(hostile)]] == hostile
    assert len(rows) == len(diagnosis.tokens) and float(rows[3]["mass_moved"]) == diagnosis.tokens[3]["mass_moved"]
    page = Page()
    text = paths[2].read_text(encoding="utf-8")
    page.feed(text)
    assert "<i>" not in text
    shown = report.ranked(diagnosis)[: report.SHOWN_IN_HTML]
    assert page.spans == sum(map(len, shown)) + len(SCALE) and "<b>&$" not in text
    for said in (
        "<i>a",
        "b & <i>",
        "popsd <i>",
        "today",
        "<i>note",
        *diagnosis.completions[shown[0][0]["completion"]].values(),
    ):
        assert html.escape(said) in text
    assert "+0.50" in text and "95 % interval" in text, "a scale for the colours, and intervals"
    assert page.sources and all(source.startswith("data:") for source in page.sources), "self-contained"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[3:])


def test_a_small_change_can_be_seen():
    assert colour(0.0) == (255, 255, 255) and colour(0.5) == colour(0.9) != colour(-0.5)
    assert max(255 - x for x in colour(0.02)) > 30


def test_the_command_on_the_miniature(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warmup, "warm_up", lambda config, cache_dir: tiny())
    arguments = ["diagnose", "--diagnose_problems", "3", "--diagnose_dir", str(tmp_path / "out")]
    assert cli.main([*arguments, "--cache_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "purified target would" in printed and "maybe" in printed and "report.html" in printed
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "the miniature of popsd demo" in page and "--diagnose_problems" not in page.split("Command")[0]
    assert cli.main([*arguments[:1], "--diagnose_problems", "0"]) == 2
    assert "diagnose_problems: expected at least 1; got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"completions": 0}, r"completions: expected at least 1"),
        ({"margin": -1.0}, r"margin: expected a finite number"),
        ({"temperature": float("inf")}, r"temperature: expected a finite number"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DiagnoseConfig(**options)


def test_nothing_to_diagnose_is_named():
    with pytest.raises(ValueError, match=r"prompts: expected at least one problem"):
        diagnose(tiny(), TOKENIZER, [])
    with pytest.raises(ValueError, match=r"prompts: expected completions of at least one token"):
        diagnose(
            tiny(),
            TOKENIZER,
            PROMPTS,
            DiagnoseConfig(markers=MARKERS, max_new_tokens=5),
            generate=lambda *a, **k: [[]] * 6,
            progress=False,
        )


class Live(TorchDispatchMode):
    """The bytes of the tensors that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self._seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._seen:
                self._seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key, size):
        self._seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("tokens", [1024, 2048])
def test_the_target_takes_ten_blocks_of_logits_however_many_tokens_there_are(tokens):
    vocabulary, block = 4096, 4 * measure._BLOCK_ELEMENTS
    torch.manual_seed(0)
    head, hidden = Head(torch.randn(vocabulary, 8)), [torch.randn(tokens, 8) for _ in range(3)]
    with Live() as live, torch.no_grad():
        measure._probabilities(
            hidden, head, torch.zeros(tokens, dtype=torch.long), Watched({"wait": (1, 2)}, {}, []), DiagnoseConfig()
        )
    assert 4 * block < live.peak < 10 * block <= 160 * 2**20


def test_options_are_read_without_torch():
    """`popsd --help` answers at once: nothing heavy is imported to describe the options."""
    import subprocess
    import sys

    code = "import sys; from popsd_integrations import cli\ntry: cli.main(['diagnose', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    command.add_arguments(argparse.ArgumentParser())
