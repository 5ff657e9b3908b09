"""Models, data and folders by name: what is a path, and whether something is there. Hub names are looked up later."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Files of rows by their ending, and what `datasets` calls their kind."""


def is_path(name: str) -> bool:
    """Whether a name can be no name on the Hub."""
    return str(name).startswith(("/", "./", "../", "~"))


def check_model(name: str) -> None:
    """Raise ValueError for a path to no folder, and for a file."""
    if (is_path(name) or Path(name).is_file()) and not Path(name).is_dir():
        raise ValueError(
            f"model_name_or_path: expected a name on the Hub or a local folder of a model; there is no folder {name!r}."
        )


def check_data(name: str) -> None:
    """Raise ValueError for a path to nothing, an empty file, and one of another kind."""
    path = Path(name)
    if (is_path(name) or path.suffix in DATA_FILES) and not path.exists():
        raise ValueError(no_data(name, "there is no such file"))
    if path.is_file() and path.suffix not in DATA_FILES:
        raise ValueError(no_data(name, "a file of another kind"))
    if path.is_file() and not path.stat().st_size:
        raise ValueError(no_data(name, "an empty file"))


def check_folder(option: str, path: str | Path) -> None:
    """Raise ValueError where a folder cannot be made or written to. Makes nothing."""
    there = Path(path)
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{option}: expected a folder that can be written to; got {str(path)!r}.")


@contextmanager
def loading(model: str | None) -> Iterator[None]:
    """Inside, what is wrong with the files of a model, or with the arguments that it is made with, is a ValueError."""
    try:
        yield
    except Exception as error:
        unknown = isinstance(error, TypeError) and "unexpected keyword argument" in str(error)
        if unknown or (isinstance(error, AttributeError) and "module 'torch'" in str(error)):  # a dtype
            raise ValueError(f"model_init_kwargs: expected what {model} can be made with; got {error}.") from error
        about_files = isinstance(error, OSError) and error.filename is None  # others are of paths that options name
        if about_files or type(error).__name__ == "SafetensorError":
            raise ValueError(
                f"model_name_or_path: expected a name on the Hub or a local folder of a model; got {model!r} ({error})."
            ) from error
        raise


def no_data(name: str, reason: str) -> str:
    """The error for a dataset that cannot be loaded."""
    files = ", ".join(DATA_FILES)
    return f"dataset_name: expected a name on the Hub, a folder or a file of rows ({files}); got {name!r} ({reason})."
