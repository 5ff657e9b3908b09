"""Every Python block of the documents runs, every option in a command exists, and the site builds without a warning."""

import functools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
from tiny_models import tiny_qwen3
from trl.experimental import gkd

import popsd_integrations
from popsd.engine.chunks import registry
from popsd_integrations import cli, trl_trainer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(
    r"^(?:    )?popsd (init|train|diagnose|evaluate|examples|compare|demo|bench|doctor)\b((?:[^\n\\]|\\\n)*)",
    re.MULTILINE,
)
WITH_CODE = [name for name, text in TEXT.items() if PYTHON.search(text)]


CONFIGS = [
    (trl_trainer, "PurifiedOPSDConfig", "max_completion_length"),
    (gkd, "GKDConfig", "max_new_tokens"),
]


def configured(config, defaults, always, **options):
    return config(**(defaults | options | always))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, a tokenizer and data as files, in place of what would come from the Hub."""
    folder = tmp_path_factory.mktemp("files")
    runpy.run_path(str(ROOT / "examples/reproduce/tiny.py"))["main"](folder)
    (folder / "rows").mkdir()
    rows = [{"prompt": [{"role": "user", "content": f"{n} + 2?"}], "solution": f"{n + 2}"} for n in range(8)]
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("name", WITH_CODE)
def test_python_blocks_run(name, files, tmp_path, monkeypatch, request):
    """In the order of the page, in one namespace. The README leaves a model and logits to the reader."""
    if "popsd_kernels" in TEXT[name]:
        request.getfixturevalue("interpreter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    given = {"model": tiny_qwen3(50), "gradient": torch.empty(3, 40)}
    given |= {f"{kind}_logits": torch.randn(3, 40) for kind in ("student", "teacher")}
    small = {"max_steps": 1, "report_to": "none"}
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))  # pages may register targets of the same name
    cpu = {"use_cpu": True, "bf16": False}
    request.addfinalizer(popsd_integrations.unpatch_trl)
    for module, config, length in CONFIGS:
        smaller = functools.partial(configured, getattr(module, config), small | {length: 8}, cpu)
        monkeypatch.setattr(module, config, smaller)
    for block in PYTHON.findall(TEXT[name]):
        block = re.sub(r"Qwen/Qwen3-[\w.]+B", str(files / "model"), block).replace("path/or/name", str(files / "rows"))
        exec(compile(block, name, "exec"), given)


@pytest.mark.parametrize("name", [name for name, text in TEXT.items() if COMMAND.search(text)])
def test_options_of_commands_exist(name, capsys):
    for command, rest in COMMAND.findall(TEXT[name]):
        asked = ("diagnose", "train") if command == "diagnose" else (command,)  # which takes all of train's
        for one in asked:
            if one == "train":
                assert cli.main(["train", "--help-all"]) == 0
                continue
            with pytest.raises(SystemExit, match="0"):
                cli.main([one, "--help"])
        known = {"--config", "--help_all", *options(capsys.readouterr().out)}
        assert options(re.sub(r"\s#.*|'[^']*'", "", rest)) <= known, (command, rest)


def options(text):
    return {f"--{option.replace('-', '_')}" for option in re.findall(r"--(\w[\w-]*)", text)}


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    made = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "linear_purified_jsd" in (tmp_path / "api" / "losses.html").read_text()
