"""A fingerprint of a function that a run calls but does not ship, so that a resumed run notices that it was edited."""

from __future__ import annotations

import functools
import hashlib
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

_OURS = ("popsd", "popsd_kernels", "popsd_integrations", "popsd_benchmarks")
_LIBRARIES = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}


def code_fingerprint(*values: Any) -> str:
    """A digest of what functions compute, with the Python version whose bytecode it is of.

    Counted are their bytecode and constants, their defaults, what their closures hold, and what they read of their module
    and of other modules of one's own: functions, numbers, text, tensors and collections of these, step by step. Comments,
    docstrings and names of local variables are not. Installed packages count by name, and any other object by its type.
    """
    digest = hashlib.sha256()
    for part in _parts(values, set()):
        digest.update(f"{len(part)}:{part};".encode())
    return f"{digest.hexdigest()[:16]} (Python {sys.version_info[0]}.{sys.version_info[1]})"


def is_own(function: Any) -> bool:
    """Whether a function, or an object that is called, is neither popsd's nor of an installed package."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", getattr(function, "fn", function))  # of a method, and of triton.jit
    if not hasattr(function, "__code__"):
        function = getattr(type(function), "__call__", None)  # noqa: B004  (not whether it is there, but what it is)
    code = getattr(function, "__code__", None)
    return code is not None and not _is_library(function.__module__, code.co_filename)


def _is_library(module: str | None, file: str | None) -> bool:
    if file is None or (module or "").partition(".")[0] in _OURS:
        return True
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(installed) or file.startswith("<frozen") or any(path.is_relative_to(x) for x in _LIBRARIES)


def _parts(value: Any, seen: set[int]) -> Iterator[str]:
    if isinstance(value, str | bytes | int | float | complex | bool | None):
        yield repr(value)
    elif isinstance(value, tuple | list | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        yield f"{type(value).__name__} of {len(value)}"
        for item in items:
            yield from _parts(item, seen)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield repr(name)
            yield from _parts(item, seen)
    elif type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta:
        octets = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        yield f"{value.dtype}{tuple(value.shape)}{zlib.crc32(octets.data)}"
    elif isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), seen)
    elif isinstance(value, MethodType):
        yield from _parts(value.__func__, seen)
    elif isinstance(value, FunctionType):
        yield value.__qualname__
        if is_own(value) and id(value) not in seen:
            seen.add(id(value))
            yield from _of_function(value, seen)
    elif isinstance(getattr(value, "fn", None), FunctionType):  # triton.jit
        yield from _parts(value.fn, seen)
    elif is_own(value):
        yield from _parts((type(value).__call__, vars(value)), seen)
    else:
        yield type(value).__qualname__


def _of_function(function: FunctionType, seen: set[int]) -> Iterator[str]:
    codes = list(_codes(function.__code__))
    for code in codes:
        constants = [x for x in code.co_consts if not isinstance(x, CodeType) and x != function.__doc__]
        yield f"{code.co_code.hex()} {code.co_names} {code.co_freevars}"
        yield from _parts(constants, seen)
    yield from _parts((function.__defaults__, function.__kwdefaults__), seen)
    for cell in function.__closure__ or ():
        try:
            yield from _parts(cell.cell_contents, seen)
        except ValueError:  # not assigned yet
            yield "empty"
    names = {name for code in codes for name in code.co_names}
    found = {name: function.__globals__[name] for name in names & function.__globals__.keys()}
    for module in [x for x in found.values() if isinstance(x, ModuleType)]:
        if not _is_library(module.__name__, getattr(module, "__file__", None)):
            found |= {f"{module.__name__}.{name}": vars(module)[name] for name in names & vars(module).keys()}
    for name in sorted(found):
        yield name
        yield from _parts(found[name], seen)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
