"""Models and data by name: what is a path, and whether something is there. Hub names are looked up later."""

from __future__ import annotations

from pathlib import Path

DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Files of rows by their ending, and what `datasets` calls their kind."""


def is_path(name: str) -> bool:
    """Whether a name can be no name on the Hub."""
    return str(name).startswith(("/", "./", "../", "~"))


def check_model(name: str) -> None:
    """Raise ValueError for a path to no folder."""
    if is_path(name) and not Path(name).is_dir():
        raise ValueError(
            f"model_name_or_path: expected a name on the Hub or a local folder of a model; there is no folder {name!r}."
        )


def check_data(name: str) -> None:
    """Raise ValueError for a path to nothing, and for a file of rows that is not there."""
    if (is_path(name) or Path(name).suffix in DATA_FILES) and not Path(name).exists():
        raise ValueError(no_data(name, "there is no such file"))


def no_data(name: str, reason: str) -> str:
    """The error for a dataset that cannot be loaded."""
    files = ", ".join(DATA_FILES)
    return f"dataset_name: expected a name on the Hub, a folder or a file of rows ({files}); got {name!r} ({reason})."
