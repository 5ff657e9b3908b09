"""The device under test, and where finished correctness cases are written down.

On CPU the kernels run in Triton's interpreter, for which they are decorated before any test is imported. On a GPU they are
compiled, and only tests that take the `device` fixture run.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Nothing comes from the Hub. huggingface_hub reads this once, whichever test imports it first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

CUDA_FAILED = pytest.StashKey[bool]()
RESULTS = pytest.StashKey["Results"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("popsd")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests with a `device` run (cpu)")
    group.addoption("--results", type=Path, help="append a JSON line per finished correctness case to this file")
    group.addoption("--resume-results", action="store_true", help="skip the cases that passed already in --results")
    group.addoption(
        "--single-read", action="store_true", help="on a GPU also the kernel whose programs wait for one another"
    )
    group.addoption(
        "--case-seconds", type=float, default=60.0, help="limit of a test on a GPU, if pytest-timeout is there"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cuda":
        import torch  # not above: the processes that test this file start sooner without

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    elif hasattr(config, "workerinput") or not config.getoption(
        "numprocesses", None
    ):  # xdist's controller runs no test
        decorate_for_the_interpreter()
    config.stash[RESULTS] = Results(config.getoption("results"), config.getoption("device"))
    if not hasattr(config, "workerinput") and config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(DeadWorkers(config.stash[RESULTS]))
    config.stash[CUDA_FAILED] = False


def patch_once_per_launch() -> None:
    """Triton's interpreter replaces the members of its language again at every call of a device function, for which it looks
    through all of them: two thirds of a small kernel's time (Triton 3.7.1). Once per function and launch does the same.
    """
    from triton.runtime import interpreter

    patched: set[Any] = set()
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in patched:
            patch(self.fn)
            patched.add(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = run
    interpreter.InterpretedFunction.__call__ = call


def has_triton() -> bool:
    """One that the kernels run with."""
    try:
        importlib.import_module("popsd_kernels.device")
    except ImportError:
        return False
    return True


def decorate_for_the_interpreter() -> None:
    """TRITON_INTERPRET counts when a kernel is decorated, so it is set around the imports only."""
    found = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        if not has_triton():
            return
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        with contextlib.suppress(ImportError):  # imported lazily by the first launch, and asserts on the variable
            import triton.experimental.gluon  # noqa: F401
        # whatever imported Triton before this, a plugin say, has decorated tl.sum and its like for a GPU
        for module in (tl.standard, tl):
            for name, member in list(vars(module).items()):
                if isinstance(member, JITFunction):
                    setattr(module, name, InterpretedFunction(member.fn))
        patch_once_per_launch()
        import popsd_kernels

        for name in sorted(set(popsd_kernels._LAUNCHERS.values())):
            importlib.import_module(name)
    finally:
        if found is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("device") == "cpu":
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent / "kernels") or item.path.stem == "test_correctness":
                item.add_marker(
                    pytest.mark.no_cover
                )  # whose trace costs the interpreter as much time as it takes itself
        return
    limited = config.pluginmanager.hasplugin("timeout")
    for item in items:
        if "device" not in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="runs on the CPU only"))
        elif limited:  # a thread, which ends the process: a signal would wait for the kernel that hangs
            item.add_marker(pytest.mark.timeout(config.getoption("case_seconds"), method="thread"))
        if item.get_closest_marker("single_read") and not config.getoption("single_read"):
            item.add_marker(pytest.mark.skip(reason="its programs wait for one another; asked for with --single-read"))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """ "cpu" or "cuda". A test that takes it runs on either."""
    return str(pytestconfig.getoption("device"))


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """``impl="triton"`` on CPU tensors."""
    if not has_triton():
        pytest.skip("the kernels need triton>=3.6")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


class Results:
    """A file of JSON lines that any number of processes append to; a case's last line counts."""

    def __init__(self, path: Path | None, device: str) -> None:
        self.path, self.device = path, device
        self.start = path.stat().st_size if path is not None and path.exists() else 0

    def append(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)

    def lines(self, start: int = 0) -> Iterator[dict[str, Any]]:
        if self.path is None or not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            file.seek(start)
            for line in file:
                with contextlib.suppress(ValueError):  # cut off by a kill
                    yield json.loads(line)

    def passed(self, case: str, impl: str) -> bool:
        key, found = (case, impl, self.device), False
        for line in self.lines():
            if (line["case"], line["impl"], line["device"]) == key:
                found = line["passed"]
        return found


@pytest.fixture
def judged(pytestconfig: pytest.Config) -> Callable[..., None]:
    """judged(case, impl, errors, **more): calls ``errors()``, writes the line, and fails where an error is beyond its bound."""
    results = pytestconfig.stash[RESULTS]

    def judge(case: str, impl: str, measure: Callable[[], dict[str, float]], **more: Any) -> None:
        if pytestconfig.getoption("resume_results") and results.passed(case, impl):
            pytest.skip(f"passed already in {results.path}")
        line: dict[str, Any] = {
            "case": case,
            "impl": impl,
            "device": results.device,
            **more,
            "errors": {},
            "passed": False,
        }
        if results.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            errors = {name: round(error, 4) for name, error in measure().items()}
            line |= {"errors": errors, "passed": bool(errors) and all(error <= 1.0 for error in errors.values())}
        except BaseException as error:
            line["exception"] = f"{type(error).__name__}: {error}"[:500]
            raise
        finally:
            line["seconds"] = round(time.perf_counter() - start, 2)
            line["peak_mib"] = None
            if results.device == "cuda" and "exception" not in line:
                line["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
            results.append(line)
        assert line["passed"], f"beyond their bounds: { {name: x for name, x in errors.items() if not x <= 1.0} }"

    return judge


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws does not depend on those before it. A bias drawn anew each time put, once in 800 times, an entry within
    rounding of a clip, and the share of entries beyond it was off by one entry.
    """
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    error = "" if call.excinfo is None else str(call.excinfo.value)
    if "CUDA error" in error or "Triton Error [CUDA]" in error:
        item.config.stash[CUDA_FAILED] = True
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """A CUDA error stays with its process, and every later test there would fail of it. Reports have been sent by now."""
    result = yield
    if item.config.stash[CUDA_FAILED]:
        if hasattr(item.config, "workerinput"):
            os._exit(70)  # pytest-xdist starts another worker
        item.session.shouldstop = "a CUDA error: no later test in this process could pass. Go on with --resume-results"
    return result


class DeadWorkers:
    """In pytest-xdist's main process: a case whose worker died, of a time limit or a signal, has left no line."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport, sched: Any) -> None:
        test, _, name = crashitem.removesuffix("]").partition("[")
        if "_matches_the_oracle" not in test or any(x["case"] == name for x in self.results.lines(self.results.start)):
            return
        impl = "torch" if "test_torch" in test else "triton"
        line = {
            "case": name,
            "impl": impl,
            "device": self.results.device,
            "errors": {},
            "passed": False,
            "seconds": None,
        }
        self.results.append(line | {"exception": "its process died: a time limit or a signal"})
