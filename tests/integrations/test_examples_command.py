"""``popsd examples``."""

from pathlib import Path

import pytest

from popsd_integrations.cli import main
from popsd_integrations.commandline import examples

ROOT = Path(__file__).parents[2]


def test_every_example_is_listed_in_one_line(capsys):
    assert main(["examples"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    here = {path.name for path in (ROOT / "examples").iterdir()} - {"README.md", "__pycache__"}
    assert {line.split()[0] for line in lines} == here == examples.listed().keys()
    assert all(len(line.split(None, 1)[1]) > 20 and "](" not in line for line in lines)


@pytest.mark.parametrize("name", ["qwen3_lora.yaml", "reproduce/"])
def test_an_example_is_copied_once(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["examples", name]) == 0
    source, copied = (ROOT / "examples" / name), tmp_path / name
    files = (
        [source] if source.is_file() else [x for x in source.rglob("*") if x.is_file() and "__pycache__" not in x.parts]
    )
    for path in files:
        assert (copied / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert main(["examples", name]) == 2
    assert f"expected a folder without {name.rstrip('/')}, which would be written over" in capsys.readouterr().err
    assert main(["examples", name, "--output-dir", "sub/folder"]) == 0 and (tmp_path / "sub/folder" / name).exists()


def test_bad_input_is_one_line(tmp_path, capsys):
    assert main(["examples", "qwen_lora.yaml"]) == 2
    assert "name: expected one of" in (error := capsys.readouterr().err) and "Did you mean qwen3_lora.yaml?" in error
    (tmp_path / "file").touch()
    assert main(["examples", "loops", "--output_dir", str(tmp_path / "file" / "x")]) == 2
    assert "output_dir: expected a folder to write to" in capsys.readouterr().err
