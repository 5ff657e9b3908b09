"""The pre-flight check: its numbers against the oracle, its files, its command line and what it refuses."""

import argparse
import csv
import json
import weakref
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from popsd import Head, PurifiedConfig, oracle
from popsd.markers import EpistemicMarkers
from popsd_integrations import cli
from popsd_integrations.diagnose import command, measure, report
from popsd_integrations.diagnose.measure import CONTEXTS, DiagnoseConfig, Diagnosis, diagnose
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
    assert run().means == pytest.approx(diagnosis.means, rel=1e-4)
    assert sides == ["right", "right"]


def test_summaries_are_means_of_the_rows(diagnosis):
    rows = diagnosis.tokens
    for context in CONTEXTS:
        mean = sum(row[f"{context}/maybe"] for row in rows) / len(rows)
        assert diagnosis.markers["maybe"][context] == pytest.approx(mean)
        words = sum(diagnosis.markers[word][context] for word in MARKERS.words)
        assert diagnosis.markers["all"][context] == pytest.approx(words)
        curve = sum(point[f"{context}/markers"] * point["tokens"] for point in diagnosis.positions) / len(rows)
        assert curve == pytest.approx(words)
    assert diagnosis.means["tokens"] == len(rows) == sum(point["tokens"] for point in diagnosis.positions)
    assert len(run(bins=3).positions) == 3


@pytest.mark.parametrize(
    ("base", "target", "direction", "words"),
    [(0.2, 0.3, "raise", "would raise"), (0.2, 0.1, "lower", "would lower"), (0.2, 0.201, "keep", "leave as they are")],
)
def test_the_sentence_says_where_the_markers_go(base, target, direction, words):
    table = {"all": {"base": base, "teacher": 0.1, "reference": 0.1, "target": target}}
    found = Diagnosis([], table, [], {"mass_moved": 0.1, "reference_fraction": 1.5}, {"margin": 0.02})
    assert found.direction == direction and words in found.sentence and f"({target / base:.2f} times)" in found.sentence


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
    for row, text in zip(diagnosis.tokens, hostile, strict=False):
        row["text"] = text
    diagnosis.markers["<i>wait"] = diagnosis.markers["wait"]
    paths = report.write(diagnosis, tmp_path / "out")
    assert [path.name for path in paths] == ["diagnosis.json", "tokens.csv", "report.html", "curves.png", "heatmap.png"]
    content = json.loads(paths[0].read_text())
    assert content["sentence"] == diagnosis.sentence and content["markers"] == diagnosis.markers
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
    assert page.spans == sum(map(len, shown)) and "<b>&$" not in text
    assert page.sources and all(source.startswith("data:") for source in page.sources), "self-contained"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[3:])


def test_the_command_on_the_miniature(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(warmup, "warm_up", lambda config, cache_dir: tiny())
    arguments = ["diagnose", "--completions", "3", "--max-new-tokens", "5", "--output-dir", str(tmp_path / "out")]
    assert cli.main([*arguments, "--cache-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "The purified target would" in printed and "maybe" in printed and "report.html" in printed


def test_the_command_on_a_local_model_and_file(tmp_path, monkeypatch, capsys):
    tiny().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    rows = [{"question": f"Q {p.question} A", "answer": p.solution} for p in PROBLEMS]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["diagnose", "--model", str(tmp_path / "model"), "--dataset", str(data), "--max-new-tokens", "4"]
    arguments += ["--output-dir", str(tmp_path / "out"), "--completions", "2", "--markers", "wait", "maybe"]
    assert cli.main(arguments) == 2
    assert (
        "--question-column: expected one of the columns ['answer', 'question']; got 'prompt'" in capsys.readouterr().err
    )
    arguments += ["--question-column", "question", "--solution-column", "answer"]
    assert cli.main(arguments) == 0
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text())["means"]["tokens"] <= 8
    assert cli.main([*arguments, "--markers", "zebra"]) == 2
    assert "words: expected a marker that is one token" in capsys.readouterr().err
    assert cli.main(["diagnose", "--model", str(tmp_path / "model")]) == 2
    assert "--dataset: expected with the other" in capsys.readouterr().err
    data.write_text("{broken\n")
    assert cli.main(arguments) == 2
    assert "--dataset: expected JSON rows" in capsys.readouterr().err
    data.write_text("")
    assert cli.main(arguments) == 2
    assert "--dataset: expected at least one row" in capsys.readouterr().err


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
        measure._probabilities(hidden, head, torch.zeros(tokens, dtype=torch.long), {"wait": (1, 2)}, PurifiedConfig())
    assert 4 * block < live.peak < 10 * block <= 160 * 2**20


def rows_of(path, *rows, text=None):
    path.write_text(text or "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return command._rows(str(path), "train", 10)


def test_json_lines_end_at_newlines_alone_and_may_begin_with_a_mark(tmp_path):
    rows = [{"prompt": "a\u2028b\x85c"}, {"prompt": "d"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    assert rows_of(tmp_path / "rows.jsonl", text="\ufeff" + lines + "\n") == rows
    assert rows_of(tmp_path / "rows.json", text="\ufeff" + json.dumps(rows)) == rows
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"--dataset: expected JSON rows in .*latin.jsonl; got .*in UTF-8"):
        command._rows(str(tmp_path / "latin.jsonl"), "train", 10)


def test_a_poisoned_row_is_named_before_the_weights_are_loaded(tmp_path, capsys):
    TOKENIZER.save_pretrained(tmp_path / "model")  # no weights: loading them would be another error
    arguments = ["diagnose", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl")]
    arguments += ["--output-dir", str(tmp_path / "out")]
    good = {"prompt": "Q 1 A", "solution": "1"}
    for question, message in (
        (None, "problems[6]: question: expected text or a list of messages; got None"),
        (
            "Q " + "1 " * 50_000,
            "problems[6]: max_prompt_length: expected prompts of at most 8192 tokens; got question 50001",
        ),
        ("Q EOS", "problems[6]: question: expected text without the tokenizer's control tokens; got 'EOS'"),
    ):
        rows_of(tmp_path / "rows.jsonl", *[good] * 6, {**good, "prompt": question}, *[good] * 3)
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_code_of_a_checkpoint_is_not_run(tmp_path, capsys, monkeypatch):
    """Nor is it asked for on the terminal, which is what transformers does where nobody said no."""
    tiny().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    content |= {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    rows_of(tmp_path / "rows.jsonl", {"prompt": "Q 1 A", "solution": "1"})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    arguments = ["diagnose", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl")]
    assert cli.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 2
    assert "trust_remote_code" in capsys.readouterr().err and not (tmp_path / "ran").exists()


def test_options_are_read_without_torch():
    """`popsd --help` answers at once: nothing heavy is imported to describe the options."""
    import subprocess
    import sys

    code = "import sys; from popsd_integrations import cli\ntry: cli.main(['diagnose', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    command.add_arguments(argparse.ArgumentParser())
