"""Named tasks in several processes, which compile their kernels side by side; one that dies costs its own task alone."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Result = dict[str, Any]


def run_all(run: Callable[[str], Result], names: Iterable[str], processes: int) -> Iterator[tuple[str, Result]]:
    """(name, run(name)) as they get ready. ``run`` is pickled; its result's "exception" says what it raised, if anything."""
    context = multiprocessing.get_context("spawn")
    manager = context.Manager()  # whose queues a process has filled when put returns: a dying one takes nothing along
    todo, done = manager.Queue(), manager.Queue()
    waiting = list(names)
    for name in waiting:
        todo.put(name)
    workers: list[Any] = []
    while waiting:
        workers = [worker for worker in workers if worker.is_alive()]
        while len(workers) < min(processes, len(waiting)) and not todo.empty():
            workers.append(context.Process(target=_work, args=(run, todo, done), daemon=True))
            workers[-1].start()
        try:
            name, result = done.get(timeout=1.0)
        except queue.Empty:
            if workers or not todo.empty():
                continue
            name, result = waiting[0], {"exception": "its process died"}
        waiting.remove(name)
        yield name, result


def _work(run: Callable[[str], Result], todo: Any, done: Any) -> None:
    while True:
        try:
            name = todo.get(timeout=1.0)
        except queue.Empty:
            return
        result = run(name)
        done.put((name, result))
        if "CUDA error" in str(result.get("exception")):  # every later call in this process would fail of it
            return
