"""A YAML file with comments, an option a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]


class Page:
    """Lines of YAML with comments."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        """A comment."""
        self.lines.append(f"# {_one_line(text)}")

    def section(self, title: str, text: str) -> None:
        """A heading."""
        self.lines += ["", f"# {title}: {_one_line(text)}"]

    def line(self, name: str, value: Any, why: str = "") -> None:
        """An option, and why it is what it is."""
        text = f"{name}: {_scalar(value)}"
        self.lines.append(f"{text:<46}  # {_one_line(why)}" if why else text)

    def lines_of(self, options: Mapping[str, Any]) -> None:
        """Options that speak for themselves."""
        for name, value in options.items():
            self.line(name, value)

    def ideas(self, options: Mapping[str, Any]) -> None:
        """Options that are not set."""
        self.lines += [f"#{name}: {_scalar(value)}" for name, value in options.items()]

    def facts(self, text: str | None) -> None:
        """What the dry run says."""
        self.lines += [f"#   {_one_line(line)}" for line in (text or "").removeprefix("=== ").splitlines()]

    def text(self) -> str:
        """The file."""
        return "\n".join(self.lines) + "\n"


def _scalar(value: Any) -> str:
    """A value as YAML has it on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return str(text).removesuffix("...\n").strip()


def _one_line(text: str) -> str:
    """Text for a comment: what would end the line, or act on a terminal, is left out."""
    return "".join(character if character.isprintable() else " " for character in text)
