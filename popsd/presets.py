"""The method family by name: configurations, targets as one hidden state, and token weights.

| method | how |
|---|---|
| purified OPSD, arXiv 2607.02234 | ``PurifiedConfig()``, the default |
| OPSD, arXiv 2601.18734 | `opsd` with ``popsd.linear_jsd`` on the teacher |
| β-OPSD, arXiv 2607.28582 | `beta_opsd` with ``reference=hidden.base`` |
| contrastive hints (RLCSD, arXiv 2606.11709) | `contrastive_hints`, the right hint as teacher, the wrong one as reference |
| its return-to-go along each completion | `return_to_go` of the sampled tokens' log-probabilities in `LossOutput` |
| any geometric mix, DemoPSD (arXiv 2607.02502) among them | `geometric_mix` with ``popsd.linear_jsd`` |
| forward KL on right, reverse on wrong completions (OG-OPSD, arXiv 2610.05070) | ``beta=`` of a loss, 0 or 1 for each |
| forward Rényi of order .9 to .95 (SR-OPSD, arXiv 2608.09745) | ``renyi_alpha`` of a configuration, with beta 0 |
| controls: another problem's solution (OP²SD, arXiv 2608.09228), no reference (arXiv 2609.20612) | contexts: any target |
| position weights (PW-OPSD, arXiv 2605.21606) | `position_weights` as ``weights=`` |
| arithmetic mix of base and teacher (AD-OPSD, arXiv 2607.10805; RP-OPSD, arXiv 2608.06347) | `arithmetic_mix` |
| geometric mix of base and teacher with the teacher's share α (β-OPSD at β = 1/α) | `alpha_mix` |

Each of these targets is registered here by name, see `popsd.register_target`: ``purified``, ``opsd``, ``beta_opsd``,
``contrastive_hints``, ``arithmetic_mix`` and ``alpha_mix`` are what a trainer's ``loss_target`` takes.
The controls are ``teacher_reference`` of `popsd_integrations.huggingface.ContextConfig`.
Not here: top-k targets (SDPO, arXiv 2601.20802) need no full vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from popsd.config import DivergenceConfig, PurifiedConfig, TargetConfig
from popsd.engine.chunks.registry import register_target
from popsd.engine.tokens.checks import may_look
from popsd.engine.torch_backend.targets import logit_difference, purified_shift
from popsd.head import Head
from popsd.outputs import LossOutput
from popsd_kernels.rows import RowOptions, Rows


def opsd(**changes: Any) -> DivergenceConfig:
    """Standard OPSD, arXiv 2601.18734: the teacher is the target; JSD 0.5, each entry capped at 0.05, temperature 1.1.

    changes: fields of `DivergenceConfig` to set otherwise (the paper also uses forward KL, beta = 0, and a cap of 0.06).
    """
    return DivergenceConfig(**({"beta": 0.5, "entry_clip": 0.05, "temperature": 1.1} | changes))


def beta_opsd(strength: float, **changes: Any) -> PurifiedConfig:
    """β-OPSD, arXiv 2607.28582: target ∝ π_0^(1−1/β)·π_T^(1/β), β = ``strength`` > 0; 1 is the teacher, ∞ the base.

    It is the purified target without a tanh and with the base as reference: pass
    ``HiddenStates(student, base=h_0, teacher=h_T, reference=h_0)``. changes: fields of `PurifiedConfig` to set otherwise.
    """
    return PurifiedConfig(**({"pmi_beta": strength, "pmi_clip": None} | changes))


def contrastive_hints(strength: float = 1.0, **changes: Any) -> PurifiedConfig:
    """Contrast of two hints: target ∝ π_0·(π_right/π_wrong)^(1/β), β = ``strength`` > 0, without a tanh.

    Pass the context with the right hint as ``teacher`` and the one with the wrong hint as ``reference``. It is RLCSD's contrast
    (arXiv 2606.11709) at α = 1 with the base as prior; their floor under the wrong hint is ``tail_floor`` here, which
    caps instead. changes: fields of `PurifiedConfig` to set otherwise.
    """
    return PurifiedConfig(**({"pmi_beta": strength, "pmi_clip": None} | changes))


def arithmetic_mix(share: float, **changes: Any) -> TargetConfig:
    """Target (1 − share)·π_0 + share·π_T, share in [0, 1]. changes: fields of `DivergenceConfig` to set otherwise.

    It is no geometric mix, hence no single hidden state, but takes the logits of base and teacher.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share: expected a number in [0, 1]; got {share}.")
    return TargetConfig(target="arithmetic_mix", numbers=(share,), **changes)


def alpha_mix(alpha: float, **changes: Any) -> TargetConfig:
    """Target ∝ π_0^(1−α)·π_T^α, α = ``alpha`` in (0, 1]. changes: fields of `DivergenceConfig` to set otherwise.

    ``beta_opsd(1 / alpha)`` without its demand on ``reference``, which is not looked at. A token that is impossible to the
    teacher is impossible, where β-OPSD keeps the base's logit.
    """
    _checked_alpha(alpha)
    return TargetConfig(target="alpha_mix", numbers=(alpha,), **changes)


def _checked_alpha(alpha: float) -> float:
    if not 0.0 < alpha <= 1.0:
        raise ValueError(f"alpha: expected a number in (0, 1]; got {alpha}.")
    return alpha


Logits = torch.Tensor
"""[n, V] float32, log-probabilities of a target's arguments, see `popsd.register_target`."""


def _purified_logits(
    base: Logits, teacher: Logits, reference: Logits, pmi_beta: float = 1.0, pmi_clip: float | None = 10.0
) -> Logits:
    options, out = RowOptions(pmi_beta=pmi_beta, pmi_clip=pmi_clip), torch.empty_like(base)
    offset = logit_difference(Rows(base, teacher=teacher, reference=reference), options, center=True, out=out)
    return base + purified_shift(out, offset, options, out=out)


def _contrast_logits(base: Logits, teacher: Logits, reference: Logits, pmi_beta: float = 1.0) -> Logits:
    return _purified_logits(base, teacher, reference, pmi_beta, None)


def _beta_logits(base: Logits, teacher: Logits, reference: None, pmi_beta: float = 1.0) -> Logits:
    return _purified_logits(base, teacher, base, pmi_beta, None)


def _teacher_logits(base: None, teacher: Logits, reference: None) -> Logits:
    return teacher


def _arithmetic_logits(base: Logits, teacher: Logits, reference: None, share: float) -> Logits:
    weights = [math.log(x) if x else -math.inf for x in (1.0 - share, share)]
    return torch.logaddexp(base + weights[0], teacher + weights[1])


def _alpha_logits(base: Logits, teacher: Logits, reference: None, alpha: float) -> Logits:
    return torch.lerp(base, teacher, alpha)


register_target(
    "purified",
    _purified_logits,
    config=lambda pmi_beta=1.0, pmi_clip=10.0, **fields: PurifiedConfig(pmi_beta=pmi_beta, pmi_clip=pmi_clip, **fields),
)
register_target("opsd", _teacher_logits, contexts=("teacher",), config=PurifiedConfig)
register_target(
    "beta_opsd",
    _beta_logits,
    contexts=("base", "teacher"),
    config=lambda pmi_beta=1.0, **fields: beta_opsd(pmi_beta, **fields),
)
register_target(
    "contrastive_hints", _contrast_logits, config=lambda pmi_beta=1.0, **fields: contrastive_hints(pmi_beta, **fields)
)
register_target(
    "arithmetic_mix",
    _arithmetic_logits,
    "popsd_kernels.device.targets:arithmetic_mix_logit",
    contexts=("base", "teacher"),
    config=arithmetic_mix,
)
register_target(
    "alpha_mix",
    _alpha_logits,
    contexts=("base", "teacher"),
    config=lambda alpha, **fields: PurifiedConfig(pmi_beta=1.0 / _checked_alpha(alpha), pmi_clip=None, **fields),
)


def geometric_mix(streams: Sequence[torch.Tensor], powers: Sequence[float | torch.Tensor], head: Head) -> torch.Tensor:
    """Hidden states [..., D] of target ∝ Π_k π_k^{a_k}: logits are linear in them, so any such mix is one stream.

    With ``popsd.linear_jsd`` it costs two matmuls forward, where separate streams cost one each. DemoPSD (arXiv
    2607.02502) is the mix of teacher and detached student with powers 1 − α and α, α from their divergence per token.

    Args:
        streams: hidden states [..., D] of one width, all of them ``head``'s.
        powers: a_k, a number or a tensor [...] with one per token. They sum to 1 where the head has a bias.
        head: the head they share; without soft cap.

    Returns: float32 [..., D]. Keep it so: rounded to 16 bits the mix would be off by 2⁻⁹ of the logits themselves.

    Raises: ValueError for unequal counts or shapes, a soft cap, or a bias that would not be counted exactly once.
    """
    if len(streams) != len(powers) or not streams:
        raise ValueError(f"powers: expected one per stream and at least one; got {len(powers)} for {len(streams)}.")
    if any(x.shape != streams[0].shape for x in streams):
        raise ValueError(f"streams: expected equal shapes; got {[list(x.shape) for x in streams]}.")
    if head.softcap is not None:
        raise ValueError(
            f"head: expected no soft cap, under which logits are not linear; got softcap={head.softcap}. "
            "Mix the logits and use popsd.jsd."
        )
    if head.bias is not None and not _sum_to_one(powers):
        raise ValueError("powers: expected numbers that sum to 1, for the head has a bias; got others. Normalise them.")
    mix = torch.zeros_like(streams[0], dtype=torch.float32)
    for stream, power in zip(streams, powers, strict=True):
        mix = mix + stream.detach().float() * (power.float()[..., None] if isinstance(power, torch.Tensor) else power)
    return mix


def position_weights(mask: torch.Tensor, *, first: float = 0.0, power: float = 1.0) -> torch.Tensor:
    """Weights that increase along each completion from ``first`` to 1: w = first + (1 − first)·(t/(T−1))^power, [B, T].

    PW-OPSD (arXiv 2605.21606) finds the place in a completion the best predictor of whether a teacher's token can be relied
    on, and weighs later tokens more; this ramp is ours, with the two numbers that set it. mask: [B, T], true where
    there is a completion token; weights are 0 elsewhere, 1 in a completion of one token. Raises ValueError out of range.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask: expected shape [B, T], a row per completion; got {list(mask.shape)}.")
    for name, value in (("first", first), ("power", power)):
        if not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number; got {value!r}.")
    if not 0.0 <= first <= 1.0:
        raise ValueError(f"first: expected a weight in [0, 1]; got {first}.")
    if not 0.0 < power < float("inf"):
        raise ValueError(f"power: expected a positive finite number; got {power}.")
    counted = (mask != 0).float()
    last = counted.sum(dim=1, keepdim=True) - 1
    share = torch.where(last > 0, (counted.cumsum(dim=1) - 1).clamp_min(0) / last.clamp_min(1), 1.0)
    return (first + (1.0 - first) * share**power) * counted


def return_to_go(output: LossOutput, mask: torch.Tensor) -> torch.Tensor:
    """R_t = Σ_{s ≥ t} (log π_θ(y_s) − log target(y_s)) over each completion's own tokens y, detached float32 [B, T].

    The sum that β-OPSD (arXiv 2607.28582) takes with `beta_opsd`'s target; any other target will do. KL(π_θ‖target) of whole
    completions has the gradient E[Σ_t R_t·∇log π_θ(y_t)]: minimise (R·log π_θ).sum() with R as a constant, log π_θ
    differentiable and y sampled from π_θ. A negative number asks for more of its token. As ``weights=`` of a loss it would
    weigh divergences instead, where a negative number drives student and target apart. Not known of the paper, and not done
    here: a baseline, a discount, a scale or clip, and how R is joined to the per-token loss.

    Args:
        output: of a loss with ``token_ids`` over tokens [B, T].
        mask: [B, T], true where there is a completion token; R is 0 elsewhere.

    Raises: ValueError for a loss without ``token_ids``, other shapes, and a counted token whose id is -1.
    """
    student, target = output.token_logprob, output.target_logprob
    if student is None or target is None:
        raise ValueError("output: expected a loss with token_ids; got one without. Pass the sampled tokens to it.")
    if student.ndim != 2 or mask.shape != student.shape:
        raise ValueError(
            f"mask: expected shape [B, T], a row per completion, as the loss has; got {list(mask.shape)} for a loss of "
            f"{list(student.shape)}."
        )
    ratio = torch.where(mask != 0, student - target, 0.0)
    if may_look(ratio) and ratio.isnan().any():
        raise ValueError("mask: expected tokens with ids alone; got one whose log-probability is NaN (id -1). Mask it.")
    return ratio.flip(1).cumsum(dim=1).flip(1) * (mask != 0)


def _sum_to_one(powers: Sequence[float | torch.Tensor]) -> bool:
    total = sum(torch.as_tensor(power, dtype=torch.float64).cpu() for power in powers)
    return bool((torch.as_tensor(total) - 1.0).abs().max() < 1e-6)
