"""What a run's folder survives: a kill, a full disk, a second run in it, and the request to end.

One run at a time writes to a folder. A file in it is the old or the new one at any moment, also after a power failure.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

ADAPTER, WHOLE = "adapter_config.json", "config.json"
"""The file that a folder with a saved adapter has, and one with a whole model."""
LOCK_FILE = ".popsd.lock"
_UNFINISHED = ".popsd-tmp"
_locks: set[int] = set()


@contextlib.contextmanager
def exclusive(folder: str | Path) -> Iterator[Path]:
    """Create ``folder``, keep other runs out of it while inside, and remove files that a killed run left unfinished.

    The lock goes with the process, however that ends. It holds between machines where the file system passes ``flock`` on.
    Raises ValueError where the folder cannot be written to, or another run is in it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(
            f"output_dir: expected a folder that can be written to; got {folder} ({error.strerror}). "
            "Pass another output_dir."
        ) from error
    _locks.add(lock)
    try:
        _lock(lock, folder)
        for unfinished in folder.glob(f"*{_UNFINISHED}"):
            unfinished.unlink()
        yield folder
    finally:
        if lock in _locks:  # not in a forked child, which has closed it
            _locks.remove(lock)
            os.close(lock)


def _lock(lock: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "unknown"
        raise ValueError(
            f"output_dir: expected a folder that no other run writes to; got {folder}, where one is at work "
            f"({holder}). Wait for it or end it, or pass another output_dir."
        ) from error
    except OSError as error:
        logger.warning(f"{folder} has no lock ({error.strerror}): do not start a second run in it.")
        return
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _let_go() -> None:
    """A forked worker shares the lock, and would hold it after the run was killed."""
    for lock in _locks:
        os.close(lock)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Put what ``write`` writes in the place of ``path``, on the disk and in one step.

    Raises OSError where it cannot be written, such as on a full disk. ``path`` is then as before, and nothing is left.
    """
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        with writing(path), open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in errors of the system. torch.save hides a full disk behind a RuntimeError of its own."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(
            cause.errno,
            f"output_dir: expected to write {path}; the system says: {cause.strerror}. What was saved before is "
            "untouched. Make room, and resume the run",
        ) from error


@contextlib.contextmanager
def finishing_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM asks the run to save and end instead of ending it amid a step. Yields whether it was asked.

    On leaving, the handler there was before is back. After a SIGTERM it is called, and SystemExit with 143 raised, as a
    shell reports that signal. Python allows handlers in the main thread alone, so elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        yield lambda: False
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    if asked:
        logger.warning("SIGTERM: the run is saved and can be resumed.")
        if callable(before):
            before(signal.SIGTERM, None)
        raise SystemExit(128 + signal.SIGTERM)


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders checkpoint-<step> of a run, by step; whether they are whole is another question."""
    found = {path: path.name.removeprefix("checkpoint-") for path in Path(folder).glob("checkpoint-*")}
    return sorted((path for path, step in found.items() if step.isdecimal()), key=lambda path: int(found[path]))


def saved_as(folder: Path) -> str | None:
    """What is saved in a folder: `ADAPTER`, `WHOLE`, or None for neither."""
    return next((name for name in (ADAPTER, WHOLE) if (folder / name).is_file()), None)
