import json
import random
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
from evaluate_files import OPTIONS, SCORER, arguments, change, save_all

from popsd_integrations.cli import main

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The folder of a finished evaluation."""
    output = tmp_path_factory.mktemp("finished")
    assert main(arguments(files, output)) == 0
    return output


@pytest.fixture
def without_plots(monkeypatch):
    """Plots take a second each."""
    from popsd_integrations.evaluate import report

    def missing(*_):
        raise ImportError

    monkeypatch.setattr(report, "_plot", missing)


def lines(folder):
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]


def test_every_checkpoint_answers_every_problem_beside_the_base(files, finished):
    rows = lines(finished)
    labels = ["base", "lora/checkpoint-2", "lora/checkpoint-10", str(files / "whole")]
    assert list(dict.fromkeys(row["model"] for row in rows)) == labels
    assert len(rows) == 4 * (4 + 2) * 3
    texts = {label: [row["text"] for row in rows if row["model"] == label] for label in labels}
    assert len(set(map(tuple, texts.values()))) == 4, "four models, four sets of completions"
    for row in rows:
        assert row["tokens"] <= 12 and (row["finish"] == "length" or row["tokens"] >= 1)
        assert row["finish"] in ("stop", "length") and isinstance(row["correct"], bool)


def test_adapters_are_those_that_peft_applies(files):
    """And the base is the base again behind an adapter, and behind another whole model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from popsd_integrations.evaluate.checkpoints import resolve
    from popsd_integrations.evaluate.engines import Request, Transformers
    from popsd_integrations.evaluate.settings import SamplingConfig
    from popsd_integrations.huggingface.sampling import hf_generate
    from popsd_integrations.miniature.tokenizer import TOKEN_ID, build_tokenizer

    settings = {"temperature": 1.0, "top_p": 0.9, "top_k": 12}
    config = SamplingConfig(model=str(files / "base"), max_completion_length=12, **settings)
    base, first, second, whole = resolve(config.model, [str(files / "run"), str(files / "whole")])
    engine = Transformers(config, build_tokenizer(), {})
    prompt = [11, 3, 8, 1, 6, 20, 4, 13]
    order = (base, first, second, base, whole, base, first)
    texts = [engine.generate(x, [Request(prompt, 2, 0)], 3)[0][0].text for x in order]
    assert texts[0] == texts[3] == texts[5] and texts[1] == texts[6] and len(set(texts)) == 4
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), second.path).eval()
    torch.manual_seed(3)
    settings |= {"eos_token_id": [TOKEN_ID["EOS"]], "pad_token_id": TOKEN_ID["PAD"], "max_new_tokens": 12}
    ids = hf_generate(model, [prompt] * 2, **settings)
    assert build_tokenizer().decode(ids[0], skip_special_tokens=True) == texts[2]


def test_what_is_written(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["samples"] == 3 and results["benchmarks"] == {"a": 4, "b": 2}
    assert results["selected"]["lora"]["of"] == 2 and "gain_by_selection" in results["selected"]["lora"]
    scores = results["models"]["lora/checkpoint-2"]["mean"]
    assert set(scores["difference"]) == {"accuracy", "markers", "length"} and list(scores["pass_at"]) == ["1", "2", "3"]
    assert {path.name for path in finished.iterdir()} >= {"report.html", "settings.json", "accuracy.png", "markers.png"}


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.addresses = set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]


def test_nothing_of_the_page_is_loaded_or_run(files, tmp_path):
    """Problems and completions may hold anything."""
    evil = "<script>alert(1)</script><img src=http://a.b/c>"
    (tmp_path / "e&vil.jsonl").write_text(json.dumps({"question": evil, "answer": "1 2"}) + "\n")
    output = tmp_path / "out"
    options = [*OPTIONS, "--question_template", "Q {question} <i> A", "--num_generations", "1"]
    benchmark = f"<b>={tmp_path / 'e&vil.jsonl'}"
    assert (
        main(
            [
                "evaluate",
                "--model_name_or_path",
                str(files / "base"),
                "--benchmarks",
                benchmark,
                "--output_dir",
                str(output),
                *options,
            ]
        )
        == 0
    )
    rows = lines(output)
    rows[0]["text"] = evil
    (output / "generations.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert main(["evaluate", "--from", str(output / "generations.jsonl"), "--eval_scorer", SCORER]) == 0
    page, parser = (output / "report.html").read_text(), Tags()
    parser.feed(page)
    assert "script" not in parser.tags and "i" not in parser.tags and "b" not in parser.tags and evil not in page
    assert page.count("&lt;script&gt;") >= 2
    assert all(address.startswith("data:image/png") for address in parser.addresses)


def test_a_cut_off_file_ends_the_same(files, finished, tmp_path, without_plots):
    """Wherever a kill cuts the file, the same command goes on to the same bytes, and makes only what is missing."""
    whole, rng = (finished / "generations.jsonl").read_bytes(), random.Random(0)
    for cut in (len(whole), *(rng.randrange(len(whole)) for _ in range(2))):
        output = tmp_path / str(cut)
        output.mkdir()
        (output / "settings.json").write_bytes((finished / "settings.json").read_bytes())
        (output / "generations.jsonl").write_bytes(whole[:cut])
        assert main(arguments(files, output)) == 0
        assert (output / "generations.jsonl").read_bytes() == whole


def test_more_samples_and_checkpoints_are_added(files, finished, tmp_path, without_plots):
    output, some = tmp_path / "out", ["--num_generations", "4", "--adapters", str(files / "whole")]
    short = arguments(files, output)
    assert main([*short, "--adapters", str(files / "whole"), "--num_generations", "2"]) == 0
    before = lines(output)
    assert main([*short, *some]) == 0
    after = lines(output)
    assert len(after) == 2 * 6 * 4 and {row["sample"] for row in after} == {0, 1, 2, 3}
    assert main(short) == 0  # fewer samples again, and the other checkpoints
    results = json.loads((output / "results.json").read_text())
    assert results["samples"] == 3 and len(results["models"]) == 4
    assert [row["text"] for row in before][:1] == [row["text"] for row in after][:1]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_file(files, finished, tmp_path):
    """A kill in each tenth of the file, a random time after it was reached."""
    output, rng = tmp_path / "killed", random.Random(7)
    command = [sys.executable, "-m", "popsd_integrations.cli", *arguments(files, output)]
    whole, path, killed = (finished / "generations.jsonl").read_bytes(), output / "generations.jsonl", 0
    for tenth in range(10):
        wanted = len(whole) * (tenth + rng.random()) / 10
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while (path.stat().st_size if path.exists() else 0) < wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 1, "the last ones may find it finished, on a fast machine"
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert path.read_bytes() == whole


def test_judging_again(files, finished, tmp_path, capsys, monkeypatch, without_plots):
    (tmp_path / "always_right.py").write_text("def f(text, answer): return True\n")
    monkeypatch.syspath_prepend(tmp_path)
    again = ["evaluate", "--from", str(finished / "generations.jsonl"), "--output_dir", str(tmp_path / "again")]
    assert main([*again, "--eval_scorer", "always_right:f"]) == 0
    rows, old = lines(tmp_path / "again"), lines(finished)
    assert all(row["correct"] for row in rows) and [row["text"] for row in rows] == [row["text"] for row in old]
    results = json.loads((tmp_path / "again" / "results.json").read_text())
    assert results["models"]["base"]["mean"]["accuracy"]["mean"] == 1 and results["about"]["scorer"] == "always_right:f"
    assert results["models"]["base"]["mean"]["majority"] is None  # that scorer says no answers
    capsys.readouterr()
    assert main([*arguments(files, tmp_path / "again")]) == 2
    assert "eval_scorer: expected 'always_right:f'" in capsys.readouterr().err
    same = [*arguments(files, tmp_path / "again"), "--eval_scorer", "always_right:f"]
    assert main(same) == 0
    monkeypatch.setattr(sys.modules["always_right"], "f", lambda text, answer: len(text) < 3)
    assert main(same) == 2
    assert "it was edited. Judge them again: --from" in capsys.readouterr().err


def test_a_part_is_not_judged_as_the_whole(finished, tmp_path, capsys, without_plots):
    """Of a run that was killed between two checkpoints."""
    folder = copy(finished, tmp_path / "part")
    rows = [row for row in lines(folder) if row["model"] in ("base", "lora/checkpoint-2")]
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["evaluate", "--from", str(folder / "generations.jsonl"), "--eval_scorer", SCORER]) == 0
    text = "Missing are 36 of 72 completions: 12 of lora/checkpoint-10 on a, 6 of lora/checkpoint-10 on b, 12 of "
    assert text in capsys.readouterr().out and text in (folder / "report.html").read_text()


def test_another_evaluation_is_not_overwritten(finished, tmp_path, capsys):
    there = copy(finished, tmp_path / "there")
    (there / "generations.jsonl").write_text("mine\n")
    again = ["evaluate", "--from", str(finished / "generations.jsonl"), "--eval_scorer", SCORER]
    assert main([*again, "--output_dir", str(there)]) == 2
    assert "output_dir: expected a folder without another evaluation" in capsys.readouterr().err
    assert (there / "generations.jsonl").read_text() == "mine\n"


def test_judging_again_waits_for_no_run_at_work(finished, tmp_path, monkeypatch, capsys):
    """It is refused before it reads, or what the other run adds would be lost."""
    from popsd_integrations.evaluate import generations
    from popsd_integrations.run_folder import exclusive

    folder = copy(finished, tmp_path / "out")
    monkeypatch.setattr(generations, "read", lambda path: pytest.fail("read without the lock"))
    with exclusive(folder):
        assert main(["evaluate", "--from", str(folder / "generations.jsonl"), "--eval_scorer", SCORER]) == 2
    assert "expected a folder that no other run writes to" in capsys.readouterr().err


def test_an_adapter_of_another_scale_is_another_checkpoint(files, tmp_path):
    from popsd_integrations.evaluate.checkpoints import weights_hash

    folder = tmp_path / "adapter"
    shutil.copytree(files / "run" / "checkpoint-2", folder)
    known = weights_hash(folder)
    change("base_model_name_or_path", "moved")(folder / "adapter_config.json")
    assert weights_hash(folder) == known
    change("lora_alpha", 99)(folder / "adapter_config.json")
    assert weights_hash(folder) != known


def copy(finished, folder):
    folder.mkdir()
    for name in ("settings.json", "generations.jsonl"):
        (folder / name).write_bytes((finished / name).read_bytes())
    return folder


MIXED = {
    "another dtype": (
        ["--model_init_kwargs", '{"dtype": "bfloat16"}'],
        "different are model_init_kwargs ({} there, {'dtype': 'bfloat16'} here)",
    ),
    "another temperature": (["--temperature", "0.5"], "different are temperature (1.0 there, 0.5 here)"),
    "other problems": (["--benchmarks", "a={files}/b.jsonl"], "problem 0 in"),
    "another checkpoint": (["--adapters", "lora/checkpoint-2={files}/whole"], "got those of other weights"),
}


@pytest.mark.parametrize("case", MIXED)
def test_two_settings_never_mix_in_one_folder(case, files, finished, tmp_path, monkeypatch, capsys):
    from popsd_integrations.evaluate import engines

    monkeypatch.setattr(engines, "make_engine", lambda *_: pytest.fail("an engine was made"))
    options, message = MIXED[case]
    folder = copy(finished, tmp_path / "out")
    before = (folder / "generations.jsonl").read_bytes()
    assert main(arguments(files, folder, *(x.replace("{files}", str(files)) for x in options))) == 2
    assert message in capsys.readouterr().err
    assert (folder / "generations.jsonl").read_bytes() == before


FROM = {
    "another setting": (["--temperature", "0.5"], None, "different are temperature"),
    "another model": (["--model_name_or_path", "other"], None, "different are model"),
    "adapters": (["--adapters", "x", "--answer_column", "y"], None, "--from: expected no adapters, answer_column"),
    "no settings": (
        [],
        lambda folder: (folder / "settings.json").unlink(),
        "expected the settings they were made with",
    ),
    "half of it": (
        [],
        lambda folder: (folder / "generations.jsonl").write_text(
            "".join((folder / "generations.jsonl").read_text().splitlines(keepends=True)[:-5])
        ),
        "expected the same problems and numbers of samples of every checkpoint",
    ),
    "a broken line": (
        [],
        lambda folder: (folder / "generations.jsonl").write_text("{}\n" + (folder / "generations.jsonl").read_text()),
        "expected a completion in line 1",
    ),
}


@pytest.mark.parametrize("case", FROM)
def test_bad_input_of_judging_again_is_named(case, finished, tmp_path, capsys):
    options, spoil, message = FROM[case]
    folder = copy(finished, tmp_path / "out")
    if spoil:
        spoil(folder)
    before = (folder / "generations.jsonl").read_bytes()
    assert main(["evaluate", "--from", str(folder / "generations.jsonl"), "--eval_scorer", SCORER, *options]) == 2
    assert message in capsys.readouterr().err
    assert (folder / "generations.jsonl").read_bytes() == before and not (folder / "results.json").exists()


def test_the_sampling_options_reach_the_model(files, tmp_path, without_plots):
    """At top_k 1 every sample is the greedy completion."""
    output = tmp_path / "out"
    assert main(arguments(files, output, "--top_k", "1", "--benchmarks", str(files / "b.jsonl"))) == 0
    texts = {}
    for row in lines(output):
        texts.setdefault((row["model"], row["problem"]), set()).add(row["text"])
    assert all(len(found) == 1 for found in texts.values())
