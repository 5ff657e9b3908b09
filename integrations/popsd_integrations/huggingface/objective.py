"""What a run trains towards, and its loss on one micro-batch. The plain loop and the TRL trainer share both.

| loss_target | target | frozen forwards | defaults |
|---|---|---|---|
| purified | arXiv 2607.02234, Eq. 12-17 | base, teacher, reference | ``PurifiedConfig()`` |
| opsd | the teacher itself | teacher | ``PurifiedConfig()``; OPSD's own are ``popsd.presets.opsd`` |
| beta_opsd | ∝ π_0^(1−1/β)·π_T^(1/β), arXiv 2607.28582 | base, teacher | ``popsd.presets.beta_opsd`` |
| contrastive_hints | ∝ π_0·(π_right/π_wrong)^(1/β) | base, right hint, wrong hint | ``popsd.presets.contrastive_hints`` |
| arithmetic_mix | (1 − share)·π_0 + share·π_T | base, teacher | ``popsd.presets.arithmetic_mix`` |
| alpha_mix | ∝ π_0^(1−α)·π_T^α | base, teacher | ``popsd.presets.alpha_mix`` |
| any other given to ``popsd.register_target`` | its function's | its ``contexts`` | a ``popsd.TargetConfig`` |

β is ``pmi_beta``; share, α and the numbers of one's own are ``target_parameters``. ``module:name`` imports the module, and is
what it registers as ``name``, or its function or its ``popsd.TargetConfig`` of that name.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from torch import nn

from popsd import DivergenceConfig, HiddenStates, MaskConfig, PurifiedConfig, PurifiedOPSDLoss, TargetConfig
from popsd.engine.chunks.registry import (
    checked_target,
    imported,
    known_targets,
    numbers_of,
    register_target,
    target_named,
)
from popsd_integrations.huggingface.forwards import completion_states
from popsd_integrations.huggingface.frozen import FrozenStates
from popsd_integrations.huggingface.heads import for_loss, local_head, same_head
from popsd_integrations.huggingface.packing import Packed
from popsd_integrations.own_code import code_fingerprint, is_own

_DIVERGENCE = {field.name for field in fields(DivergenceConfig)}
_PURIFIED = {field.name for field in fields(PurifiedConfig)}


def target_config(
    loss_target: str, parameters: Mapping[str, float] | None = None, **changes: Any
) -> PurifiedConfig | TargetConfig:
    """The configuration of a target: its own defaults, with ``parameters``, its numbers by name, and ``changes``, fields of
    `popsd.PurifiedConfig`; of `popsd.DivergenceConfig` alone where the target is no purified one.

    Raises ValueError for an unknown target, a number or a field that it does not read, and what the configuration raises.
    """
    name, found = _resolved(loss_target)
    target = target_named(name, "loss_target")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ValueError(f"target_parameters: expected a dictionary of numbers; got {parameters!r}.")
    numbers = () if found is None else found.numbers
    given = dict(zip(target.parameters or (), numbers, strict=False)) | dict(parameters or {})
    said = {} if found is None else {field: getattr(found, field) for field in _DIVERGENCE}
    for field, value in said.items():
        if changes.get(field, value) != value != getattr(DivergenceConfig(), field):
            raise ValueError(
                f"{field}: expected {value}, as the configuration {loss_target!r} says; got {changes[field]}. Leave one of "
                "the two out."
            )
    changes = said | changes
    numbers = numbers_of(name, numbers, given)
    purified = takes_purified_options(loss_target)
    readable = (_PURIFIED if purified else _DIVERGENCE) - given.keys()
    for field in sorted(changes.keys() - readable):
        raise ValueError(
            f"{field}: expected none with loss_target={loss_target!r} and target_parameters={given}, which leave "
            f"{sorted(readable)}; got {changes[field]!r}."
        )
    if purified or target.is_teacher:
        return cast(PurifiedConfig, target.config(**given, **changes))
    return checked_target(TargetConfig(target=name, numbers=numbers, **changes))


def takes_purified_options(loss_target: str) -> bool:
    """Whether a target is configured by `popsd.PurifiedConfig` alone, whose fields its numbers are."""
    target = target_named(_resolved(loss_target)[0], "loss_target")
    fits = target.parameters is not None and target.parameters.keys() <= _PURIFIED and not target.is_teacher
    return fits and isinstance(target.config(), PurifiedConfig)


def loss_function(
    loss_target: str,
    config: PurifiedConfig | TargetConfig | None = None,
    *,
    masks: MaskConfig | None = None,
    **options: Any,
) -> PurifiedOPSDLoss:
    """The loss towards a target. config: None is `target_config`'s. options: of `popsd.PurifiedOPSDLoss`.

    Raises ValueError for a configuration of another target, and for masks that read Eq. 4 where no reference-only teacher
    is run.
    """
    name, _ = _resolved(loss_target)
    target, config = target_named(name, "loss_target"), config or target_config(loss_target)
    expected = PurifiedConfig if target.is_teacher or takes_purified_options(loss_target) else TargetConfig
    if not isinstance(config, expected) or getattr(config, "target", name) != name:
        raise ValueError(
            f"loss: expected a popsd.{expected.__name__} of the target {name!r}, which is loss_target={loss_target!r}; got "
            f"{config}."
        )
    if masks is not None and masks.reads_decomposition and "reference" not in target.contexts:
        raise ValueError(
            "masks: max_reference_fraction and min_cos_transferable need the reference-only teacher; got "
            f"loss_target={loss_target!r}, which runs none. Use the entropy rules, or another target."
        )
    form: Any = "opsd" if target.is_teacher else "purified"
    return PurifiedOPSDLoss(config, loss_target=form, masks=masks, **options)


def needed_contexts(loss_target: str, decompose: bool) -> list[str]:
    """The frozen contexts that a target is built of. OPSD needs the reference only to measure Eq. 4 (``decompose``)."""
    target = target_named(_resolved(loss_target)[0], "loss_target")
    return [*target.contexts, *(["reference"] if target.is_teacher and decompose else [])]


def measures_decomposition(loss_target: str) -> bool:
    """Whether Eq. 4 can be logged. Not where no reference-only teacher is run, as in β-OPSD: the base is in its place."""
    target = target_named(_resolved(loss_target)[0], "loss_target")
    return target.is_teacher or "reference" in target.contexts


def target_code(loss_target: str) -> dict[str, str]:
    """What a run must share with the one that it resumes beside the target's name: the fingerprint of its functions, and the
    configuration that a module holds. Empty for the targets of popsd.
    """
    name, found = _resolved(loss_target)
    target = target_named(name)
    device_function = target.device_function
    if is_own(target.function) and isinstance(device_function, str):
        with contextlib.suppress(ImportError):  # without Triton its name has to do
            device_function = imported(device_function)
    own = [x for x in (target.function, device_function, target.config) if is_own(x)]
    held = [] if found is None else [repr(found)]
    return {f"code of loss_target {loss_target!r}": code_fingerprint(*own, *held)} if own or held else {}


def _resolved(loss_target: str) -> tuple[str, TargetConfig | None]:
    """The registered name of ``loss_target`` and, where that names a module's configuration, this one. Imports the module."""
    module_name, colon, name = loss_target.partition(":")
    if not colon:
        return loss_target, None
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"loss_target: expected 'module:name' of a module on the path; got {loss_target!r} ({error}). Put its folder on "
            "PYTHONPATH."
        ) from error
    found, own = getattr(module, name, None), f"{module_name}.{name}"
    if isinstance(found, TargetConfig):
        return found.target, found
    if name in known_targets() and target_named(name).function.__module__ == module.__name__:
        return name, None
    if own not in known_targets():
        if not callable(found):
            raise ValueError(
                f"loss_target: expected {module_name!r} to register a target {name!r}, or to hold a function or a "
                f"popsd.TargetConfig of that name; got {found!r}."
            )
        register_target(own, found)
    return own, None


def student_loss(
    model: nn.Module,
    loss_fn: PurifiedOPSDLoss,
    packed: Packed,
    frozen: FrozenStates,
    *,
    mask: torch.Tensor | None = None,
    num_items: float | torch.Tensor | None = None,
    decompose: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward of the student with gradient, then the loss: results and errors of ``popsd.PurifiedOPSDLoss``.

    packed: questions and completions, as the base has them. frozen: states of the same completions. Where the reference
        was not run, the base takes its place, which makes the purified target β-OPSD's. mask: [B, T] bool or float
        weights, None for all tokens.
    With ``decompose`` the metrics have kl_base too, KL(student‖base), where the base was run.
    Where student and frozen weights have the same untrained head, one head serves all four streams, which saves a
    matmul. Ranks of a tensor-parallel plan pass the same tokens and keep their own rows of the head.
    """
    states = completion_states(model, packed)
    head = local_head(model)
    frozen_head = None
    if head.weight.requires_grad or not same_head(head, frozen.head):
        with torch.no_grad():
            frozen_head = for_loss(model, frozen.head, states.dtype)
    reference = frozen.base if frozen.reference is None else frozen.reference
    student_head = for_loss(model, head, states.dtype)
    mask = packed.completion_mask if mask is None else mask
    loss, metrics = loss_fn(
        HiddenStates(states, frozen.base, frozen.teacher, reference),
        student_head=student_head,
        frozen_head=frozen_head,
        mask=mask,
        num_items=num_items,
        token_ids=packed.completion_ids,
        decompose=decompose,
    )
    if decompose and frozen.base is not None:
        shared = {name: getattr(loss_fn.config, name) for name in ("temperature", "vocab_size", "check_finite")}
        divergence = PurifiedConfig(beta=1.0, **shared)
        drift = PurifiedOPSDLoss(divergence, loss_target="opsd", impl=loss_fn.impl, workspace_mib=loss_fn.workspace_mib)
        with torch.no_grad():
            _, drifted = drift(HiddenStates(states, None, frozen.base, None), student_head, frozen_head, mask=mask)
        metrics["kl_base"] = drifted["divergence"]
    return loss, metrics
