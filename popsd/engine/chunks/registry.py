"""Targets by name: each is a function from the logits of base, teacher and reference to those of the target."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch

from popsd.config import DivergenceConfig, TargetConfig
from popsd.engine.chunks.decomposition import DIAGNOSTIC_ELEMENTS
from popsd.engine.problem import Problem
from popsd.engine.torch_backend.targets import tempered_logits
from popsd.engine.vocabulary.reduce import Vocabulary
from popsd.engine.workspace import slices
from popsd.outputs import HiddenStates
from popsd_kernels.rows import Composed, Rows

CONTEXTS = ("base", "teacher", "reference")
"""The frozen streams, in the order of a function's arguments."""


class Target(NamedTuple):
    """What `register_target` was given. parameters: the function's numbers by name with their defaults, None where it must be
    given; None in all where the signature has no names."""

    function: Callable[..., torch.Tensor]
    device_function: Any
    contexts: tuple[str, ...]
    config: Callable[..., DivergenceConfig]
    parameters: dict[str, float | None] | None

    @property
    def is_teacher(self) -> bool:
        """Whether the target is the teacher itself, so that the loss is one of two distributions."""
        return self.contexts == ("teacher",)


_targets: dict[str, Target] = {}


def register_target(
    name: str,
    function: Callable[..., torch.Tensor],
    device_function: Any = None,
    *,
    contexts: Sequence[str] = CONTEXTS,
    config: Callable[..., DivergenceConfig] | None = None,
) -> None:
    """Offer a target to every loss as ``config=popsd.TargetConfig(target=name, numbers=...)``, and to trainers and the command
    line as ``loss_target: name``, until the process ends.

    Args:
        name: not yet taken.
        function: function(base, teacher, reference, *numbers). Each of the three is [n, V] float32, tempered log-probabilities
            of n tokens over the vocabulary in use, -1e30 or so where a token is impossible. It returns the target's logits,
            [n, V] float32, of any normaliser and with -inf for impossible tokens, and changes nothing in place. It sees a few
            tokens at a time, in any number, and only in forward: the target receives no gradient. Under torch.compile it
            stays outside the graph.
        device_function: the same for one block of a row, decorated with ``triton.jit``, or "module:name" of one, imported when
            first used. It works entry by entry, and the sums over a row that a formula needs are in the log-probabilities. The
            Triton backend calls it inside its sweeps, where ``function`` costs some readings and writings of every matrix; the
            other backends never do. What it returns is not looked at: a NaN reaches the loss.
        contexts: what it reads of base, teacher and reference. ``function`` gets None for the others, and trainers run no
            forward for them. Base and teacher are always among them. But ("teacher",) says that the teacher is the target,
            and needs a ``config``.
        config: config(*numbers, **fields) returns a configuration with these fields of `DivergenceConfig`, and raises
            ValueError for numbers out of range. None: a `TargetConfig`. A `PurifiedConfig` names a structure: the same target
            is then composed as that one is, with the base as reference where ``contexts`` has none, which costs a matmul less
            and no pass over logits. It is taken wherever hidden states are given and nothing else reads the streams.

    Without a structure a target costs one more matmul than the purified one. On ``function``'s way come three float32 matrices
    of those few tokens and what it makes itself.

    >>> import torch, popsd
    >>> def halfway(base, teacher, reference, power=0.5):
    ...     return (1.0 - power) * base + power * teacher
    >>> popsd.register_target("halfway", halfway, contexts=("base", "teacher"))
    >>> streams = [torch.randn(5, 8) for _ in range(4)]
    >>> config = popsd.TargetConfig(target="halfway", numbers=(0.3,))
    >>> popsd.linear_purified_jsd(popsd.HiddenStates(*streams), popsd.Head(torch.randn(33, 8)), config=config).loss.shape
    torch.Size([5])

    Raises TypeError for what is no string, no function or no device function, ValueError for a name that is taken and for
    contexts that there are not.
    """
    if not isinstance(name, str) or not name or ":" in name:
        raise TypeError(f"name: expected a non-empty string without ':'; got {name!r}.")
    if not callable(function):
        raise TypeError(f"function: expected a function of base, teacher and reference; got {type(function).__name__}.")
    if name in _targets:
        raise ValueError(f"name: expected one that is not taken; got {name!r}. Choose another.")
    if not (device_function is None or isinstance(device_function, str) or hasattr(device_function, "fn")):
        raise TypeError(
            "device_function: expected a function decorated with triton.jit, or 'module:name' of one; got "
            f"{type(device_function).__name__}."
        )
    known = (CONTEXTS, ("base", "teacher"), ("teacher",))
    if tuple(contexts) not in known:
        raise ValueError(f"contexts: expected one of {known}; got {tuple(contexts)!r}.")
    if tuple(contexts) == ("teacher",) and config is None:
        raise ValueError("contexts: expected base and teacher where no config is given; got ('teacher',).")

    def plain(*numbers: float, **named: Any) -> TargetConfig:
        changes = {key: named.pop(key) for key in _DIVERGENCE if key in named}
        return TargetConfig(target=name, numbers=numbers_of(name, numbers, named), **changes)

    _targets[name] = Target(function, device_function, tuple(contexts), config or plain, _parameters(function))


_DIVERGENCE = tuple(field.name for field in fields(DivergenceConfig))


def known_targets() -> list[str]:
    return sorted(_targets)


def target_named(name: str, argument: str = "config.target") -> Target:
    """What is registered as ``name``. Raises ValueError for anything else."""
    if name not in _targets:
        raise ValueError(
            f"{argument}: expected one of {known_targets()}; got {name!r}. Register it with popsd.register_target."
        )
    return _targets[name]


def numbers_of(name: str, numbers: Sequence[float] = (), named: dict[str, Any] | None = None) -> tuple[float, ...]:
    """All the numbers that the function of target ``name`` takes, defaults filled in. Raises ValueError for others."""
    parameters = target_named(name).parameters
    if parameters is None:
        if named:
            raise ValueError(f"target {name!r}: expected a function whose signature names its numbers; got {named}.")
        return tuple(numbers)
    found = {**parameters, **dict(zip(parameters, numbers, strict=False)), **(named or {})}
    if None in found.values() or len(found) > len(parameters) or len(numbers) > len(parameters):
        known = [x if default is None else f"{x}={default:g}" for x, default in parameters.items()]
        raise ValueError(f"target {name!r}: expected its numbers ({', '.join(known)}); got {named or tuple(numbers)}.")
    return tuple(x for x in found.values() if x is not None)


def checked_target(config: TargetConfig) -> TargetConfig:
    """The same with all its numbers. Raises ValueError for a name that is not registered and numbers that it does not take."""
    numbers = numbers_of(config.target, config.numbers)
    target_named(config.target).config(*numbers)
    return replace(config, numbers=numbers)


def structured(streams: HiddenStates, config: TargetConfig) -> tuple[HiddenStates, DivergenceConfig]:
    """Streams and configuration of the special structure that a target names; as they came where it names none.

    streams: hidden states, whose one head gives base and teacher the same support. A purified target keeps the base's logit
    where the teacher's is impossible, which a mix does not.
    """
    target = target_named(config.target)
    made = target.config(*config.numbers, **{key: getattr(config, key) for key in _DIVERGENCE})
    if isinstance(made, TargetConfig):
        return streams, config
    if target.is_teacher:
        return streams._replace(base=None, reference=None), made
    return streams if "reference" in target.contexts else streams._replace(reference=streams.base), made


def registered_logits(problem: Problem, rows: Rows, out: torch.Tensor) -> torch.Tensor:
    """The registered target's finished logits [n, V], in ``out``, which may be the teacher's place."""
    options, name = problem.row_options, problem.options.target
    assert name is not None and rows.base is not None and rows.teacher is not None and rows.reference is not None
    target, over = target_named(name), problem.vocabulary
    step = max(1, DIAGNOSTIC_ELEMENTS // problem.planned_vocab_size)
    for piece in slices(slice(0, out.shape[0]), step):
        streams = [
            _log_probabilities(tempered_logits(raw[piece], rows.frozen_bias, options.target, options), over)
            if context in target.contexts
            else None
            for context, raw in zip(CONTEXTS, (rows.base, rows.teacher, rows.reference), strict=True)
        ]
        out[piece] = _checked(name, target.function(*streams, *problem.options.numbers), out[piece], over)
    return out


def check_entrywise(config: DivergenceConfig) -> None:
    """Raises ValueError for a registered target whose function may need whole rows, where a rank has its shard of them."""
    if isinstance(config, TargetConfig) and target_named(config.target).device_function is None:
        raise ValueError(
            f"vocab_group: expected a target that works entry by entry, which one with a device_function or a structure does; "
            f"got {config.target!r}, whose function may need the whole vocabulary. Register it with either, or gather the head."
        )


def _log_probabilities(logits: torch.Tensor, over: Vocabulary) -> torch.Tensor:
    if over.group is None:
        return torch.log_softmax(logits, dim=1)
    return logits - over.logsumexp(torch.logsumexp(logits, dim=1))[:, None]


def composed_rows(problem: Problem, rows: Rows, place: torch.Tensor) -> Rows | None:
    """The rows with the target's device function, for the kernels to call; None where it has none.

    place: [n, V] float32, where the kernels may put the target's logits.
    """
    name = problem.options.target
    assert name is not None
    target = target_named(name)
    if target.device_function is None:
        return None
    normalisers = _log_normalisers(problem, rows, "reference" in target.contexts)
    return rows._replace(
        composed=Composed(imported(target.device_function), problem.options.numbers, normalisers, place)
    )


def _log_normalisers(problem: Problem, rows: Rows, of_reference: bool) -> torch.Tensor:
    """[n, 3] float32: of base, teacher and, on request, reference."""
    from popsd_kernels import row_statistics

    assert rows.base is not None and rows.reference is not None
    options, bias = replace(problem.row_options, student=problem.row_options.target), rows.frozen_bias
    found = torch.zeros(rows.base.shape[0], 3, dtype=torch.float32, device=rows.base.device)
    pair = Rows(rows.base, target=rows.teacher, student_bias=bias, frozen_bias=bias)
    base = row_statistics(pair, options)
    found[:, 0], found[:, 1] = base.student_max + base.student_logsum, base.target_max + base.target_logsum
    if of_reference:
        reference = row_statistics(pair._replace(student=rows.reference), options)
        found[:, 2] = reference.student_max + reference.student_logsum
    return problem.vocabulary.logsumexp(found)


def imported(function: Any) -> Any:
    """A device function, or what "module:name" of one names."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _parameters(function: Callable[..., Any]) -> dict[str, float | None] | None:
    """The arguments after the three streams, see `Target`."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except ValueError:  # a function in C
        return None
    positional = [x for x in found if x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)]
    if len(positional) < len(found):
        return None
    given = {x.name: None if x.default is x.empty else x.default for x in positional[len(CONTEXTS) :]}
    wrong = [name for name, default in given.items() if not (default is None or isinstance(default, int | float))]
    if len(positional) < len(CONTEXTS) or wrong:
        raise TypeError(
            "function: expected function(base, teacher, reference, *numbers), whose defaults are numbers; got "
            f"{inspect.signature(function)}."
        )
    return {name: None if default is None else float(default) for name, default in given.items()}


def _checked(name: str, target: torch.Tensor, like: torch.Tensor, over: Vocabulary) -> torch.Tensor:
    if not isinstance(target, torch.Tensor):
        raise TypeError(
            f"target {name!r}: expected its function to return a torch.Tensor; got {type(target).__name__}."
        )
    if target.dtype != torch.float32:
        raise TypeError(f"target {name!r}: expected its function to return float32; got {target.dtype}. Convert it.")
    if target.shape != like.shape or target.device != like.device:
        raise ValueError(
            f"target {name!r}: expected its function to return shape {list(like.shape)} on {like.device}, that of each "
            f"argument; got {list(target.shape)} on {target.device}."
        )
    if target.device.type == "cpu" and not (target < torch.inf).all():  # on a GPU the host would have to wait
        raise ValueError(f"target {name!r}: expected its function to return logits; got NaN or +inf.")
    if target.device.type == "cpu" and (over.max(target.amax(1)) == -torch.inf).any():
        raise ValueError(f"target {name!r}: expected a possible token in every row; got -inf in all entries of one.")
    return target
