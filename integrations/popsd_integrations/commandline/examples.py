"""``popsd examples``: what the examples folder holds, line by line, and a copy of one of them.

In a clone it is the folder of the repository; a wheel has it within this package.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_ROW = re.compile(r"^\| `([^`]+)` \| (.*) \|$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="the example to copy; without one they are listed")
    parser.add_argument("--output_dir", type=Path, default=Path(), help="where to copy it (the present folder)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """List the examples, or copy one. Raises ValueError for an unknown name, and where there is something already."""
    known = listed()
    if options.name is None:
        width = max(map(len, known))
        print("\n".join(f"{name:<{width}}  {what}" for name, what in known.items()))
        print("\npopsd examples NAME copies one into this folder.")
        return 0
    name = options.name.rstrip("/")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"name: expected one of {', '.join(known)}; got {options.name!r}.{meant}")
    place = options.output_dir / name
    if place.exists():
        raise ValueError(
            f"output_dir: expected a folder without {name}, which would be written over; got {options.output_dir}. "
            "Move it away, or pass another --output_dir."
        )
    source = folder() / name
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, place)
    except OSError as error:
        raise ValueError(
            f"output_dir: expected a folder to write to; got {options.output_dir} ({error.strerror})."
        ) from error
    print(f"{place}: {known[name]}")
    return 0


def folder() -> Path:
    """Where the examples are."""
    installed = _PACKAGE / "examples"
    return installed if installed.is_dir() else _PACKAGE.parents[1] / "examples"


def listed() -> dict[str, str]:
    """Each example with what it is, from the table at the top of the folder's README."""
    text = (folder() / "README.md").read_text(encoding="utf-8")
    return {name.rstrip("/"): _LINK.sub(r"\1", what).replace("`", "") for name, what in _ROW.findall(text)}
