"""Pages that load nothing: their style, tables of escaped text, and texts cut to a readable length. Tables for a terminal."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN_CHARACTERS = 20_000


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of text in columns, the first one to the left."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]


def html_table(rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """Rows as a table; the first is the header. Every cell is escaped."""
    head, *body = ([html.escape(cell) for cell in row] for row in rows)
    header = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(
        f'<tr class="{classes[place] if place < len(classes) else ""}"><th>{row[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for place, row in enumerate(body)
    )
    return f"<div><table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table></div>"


def page(title: str, body: str) -> str:
    """A whole page. title and body are HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{CSS}</style></head>'
        f"<body><h1>{title}</h1>{body}</body></html>\n"
    )


def side_by_side(title: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Completions of one problem beside one another, folded under ``title``.

    columns: under each heading a record with question, text, correct, tokens, and finish ("length" where it was truncated).
    """
    cells = "".join(
        f"<section><h4>{html.escape(heading)}: {'right' if record['correct'] else 'wrong'}, {record['tokens']:,} tokens"
        f"{', truncated' if record['finish'] == 'length' else ''}</h4><pre>{html.escape(record['text'])}</pre></section>"
        for heading, record in columns.items()
    )
    question = next(iter(columns.values()))["question"]
    return (
        f"<details><summary>{html.escape(title)}</summary><p>{html.escape(question)}</p>"
        f'<div class="beside">{cells}</div></details>'
    )


def cut(text: str) -> str:
    """A text of at most SHOWN_CHARACTERS: its beginning and its end."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"


CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
div:has(> table) { overflow-x: auto; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } tr.selected { background: #eef5fb; font-weight: 600; }
img { max-width: 100%; } pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .6rem; }
.beside { display: flex; gap: 1rem; overflow-x: auto; } .beside section { flex: 1 0 20rem; }
"""
