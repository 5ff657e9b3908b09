"""The loss as an `nn.Module`: which target, which tokens count, and how they are averaged."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist

from popsd.config import Impl, MaskConfig, Method, PurifiedConfig, Strategy, TargetConfig
from popsd.engine import validation
from popsd.engine.tokens import checks
from popsd.functional import linear_jsd, linear_purified_jsd
from popsd.head import Head
from popsd.inspection import decompose
from popsd.outputs import HiddenStates, LossOutput
from popsd_kernels.rows import RowLoss

LossTarget = Literal["purified", "opsd"]
Averaging = Literal["token_mean", "sequence_mean"]


class PurifiedOPSDLoss(torch.nn.Module):
    """Scalar training loss over completion tokens, and its metrics.

    Args:
        config: of the divergence and the purified target; None is the paper's setting with beta = 0.5.
        loss_target: "purified" (arXiv 2607.02234), or "opsd": the teacher itself (arXiv 2601.18734), for which
            ``hidden.base`` and ``hidden.reference`` may be None.
        reduction: "token_mean" divides the sum over tokens by ``num_items``; "sequence_mean" averages each row of [B, T]
            over its own tokens and divides the sum over rows by ``num_items``, the number of rows with a token.
        masks: which of the counted tokens the loss keeps, see `MaskConfig`. They weigh tokens down and renormalise nothing:
            the divisor stays ``num_items``, so that the split into micro-batches matters to a top share alone.
        impl, workspace_mib, strategy: see `popsd.linear_purified_jsd`.
    """

    def __init__(
        self,
        config: PurifiedConfig | TargetConfig | None = None,
        *,
        loss_target: LossTarget = "purified",
        reduction: Averaging = "token_mean",
        masks: MaskConfig | None = None,
        impl: Impl | str = Impl.AUTO,
        workspace_mib: float | None = None,
        strategy: Strategy | str = Strategy.CHUNKED,
    ) -> None:
        super().__init__()
        for name, value, valid in (
            ("loss_target", loss_target, ("purified", "opsd")),
            ("reduction", reduction, ("token_mean", "sequence_mean")),
        ):
            if value not in valid:
                raise ValueError(f"{name}: expected one of {list(valid)}; got {value!r}.")
        self.config = PurifiedConfig() if config is None else config
        if loss_target == "opsd":
            validation.two_distributions_config(config)
        else:
            validation.target_config(config)
        self.loss_target, self.reduction, self.masks = loss_target, reduction, masks
        self.impl, self.workspace_mib, self.strategy = impl, workspace_mib, strategy

    def forward(
        self,
        hidden: HiddenStates,
        student_head: Head,
        frozen_head: Head | None = None,
        *,
        mask: torch.Tensor | None = None,
        num_items: int | float | torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        beta: torch.Tensor | None = None,
        decompose: bool | Method | str = False,
        gram: torch.Tensor | None = None,
        telemetry: bool = False,
        vocab_group: dist.ProcessGroup | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss over the tokens of ``mask``.

        Args:
            hidden: streams [B, T, D] or [N, D], at the positions that predict each completion token.
            student_head, frozen_head, token_ids, beta, decompose, gram, telemetry, vocab_group: see
                `popsd.linear_purified_jsd`.
            mask: [B, T] or [N], where a token counts: bool, 0 and 1, or weights of at least 0; None: everywhere. Masked tokens
                are dropped before any projection, at the price of a host synchronisation, and one more where the mask is not
                bool. Under torch.compile they are projected too and get weight 0, since a graph has one shape.
            num_items: what to divide by; by default the sum of the mask. Under gradient accumulation or data
                parallelism pass the global count, and the sum over micro-batches does not depend on the split. A tensor may
                be 0, where nothing counts in any process: the loss is then 0.

        Returns: the scalar loss, and a dict of detached 0-dim tensors. Means over the counted tokens of this call:
        divergence, student_kl, target_kl, student_entropy, target_entropy, clip_fraction, token_clipped,
        argmax_agreement, and with ``decompose`` decomposition/<field> (a reference_fraction counts as at most 10),
        with ``telemetry`` purification/<field>; ``tokens`` is their number. With ``token_ids`` also token_logprob and
        target_logprob, with masks kept_share: the share of weight they keep.

        Raises: ValueError, TypeError as `popsd.linear_purified_jsd`; ValueError for "sequence_mean" without [B, T].
        """
        named = validation.named_streams(validation.checked_hidden_type(hidden), validation.HIDDEN)
        shape, device = validation.check_streams(named), hidden.student.device
        if mask is None:
            weights = torch.ones(shape, dtype=torch.float32, device=device)
        else:
            weights = checks.checked_completion_mask(mask, shape, device)
        checks.check_num_items(num_items)
        if token_ids is not None:
            checks.check_token_ids(token_ids, shape, device)
        if self.reduction == "sequence_mean":
            if weights.ndim != 2:
                raise ValueError(
                    f"hidden: expected [B, T, D] for reduction='sequence_mean'; got {list(hidden.student.shape)}. "
                    "Flat tokens do not tell where a sequence ends."
                )
            lengths = weights.sum(dim=1, keepdim=True)
            weights = weights / torch.where(lengths > 0, lengths, 1.0)
            items = (lengths > 0).sum()
        else:
            items = weights.sum()
        beta = None if beta is None else checks.spread_betas(beta, shape, device)
        positions = None if self.masks is None or weights.ndim != 2 else (weights != 0).long().cumsum(dim=1) - 1
        if mask is not None and not torch.compiler.is_compiling():
            index = weights.flatten().nonzero()[:, 0]
            hidden = HiddenStates(*(None if x is None else x.flatten(0, -2)[index] for x in hidden))  # type: ignore[arg-type]
            weights = weights.flatten()[index]
            token_ids = None if token_ids is None else token_ids.flatten()[index]
            positions = None if positions is None else positions.flatten()[index]
            beta = None if beta is None else beta.flatten()[index]
        common: dict[str, Any] = {"weights": weights, "token_ids": token_ids, "positions": positions, "beta": beta}
        common["vocab_group"] = vocab_group
        output = self._divergence(hidden, student_head, frozen_head, common, decompose, gram, telemetry)
        divisor = items if num_items is None else num_items
        if isinstance(divisor, torch.Tensor):
            divisor = _nonzero(divisor.detach().to(device).reshape(()))
        metrics = _metrics(output, weights.flatten())
        if self.masks is not None:
            metrics["kept_share"] = output.weights.sum() / _nonzero(weights.sum())
        return output.loss / divisor, metrics

    def _divergence(
        self,
        hidden: HiddenStates,
        student_head: Head,
        frozen_head: Head | None,
        common: dict[str, Any],
        method: bool | Method | str,
        gram: torch.Tensor | None,
        telemetry: bool,
    ) -> LossOutput:
        common |= {
            "config": self.config,
            "masks": self.masks,
            "reduction": "sum",
            "impl": self.impl,
            "workspace_mib": self.workspace_mib,
            "strategy": self.strategy,
        }
        if self.loss_target == "purified":
            return linear_purified_jsd(
                hidden, student_head, frozen_head, decompose=method, gram=gram, telemetry=telemetry, **common
            )
        if telemetry:
            raise ValueError("telemetry: expected False for loss_target='opsd', whose target is the teacher; got True.")
        if gram is not None and not method:
            raise ValueError("gram: expected None unless decompose is 'gram'; got a tensor. Leave it out.")
        output = linear_jsd(hidden.student, student_head, hidden.teacher, frozen_head, **common)
        if not method:
            return output
        parts = decompose(
            hidden,
            student_head,
            frozen_head,
            config=self.config,
            method=Method.LOGITS if method is True else method,
            gram=gram,
            impl=self.impl,
            workspace_mib=self.workspace_mib,
            vocab_group=common["vocab_group"],
        )
        return output._replace(decomposition=parts)


FRACTION_CEILING = 10.0
"""Of ‖Δ_ref‖/‖Δ_total‖ in a mean. On a token where student and teacher agree the denominator is rounding (1.9e6 even in
float64), and a few of those would be all that a mean shows; where the paper measures it, it is 1 to 3."""


def _metrics(output: LossOutput, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over the tokens of positive weight [N], masked ones included, without a host synchronisation."""
    counted = weights != 0
    tokens = counted.sum().float()
    results = (*RowLoss._fields, "target_logprob")
    fields = {name: getattr(output, name) for name in results if getattr(output, name) is not None}
    for group, parts in (("decomposition", output.decomposition), ("purification", output.purification)):
        if parts is not None:
            fields |= {f"{group}/{name}": x for name, x in parts._asdict().items() if x is not None}
    metrics = {}
    for name, x in fields.items():
        kept = torch.where(counted, x.flatten(), 0.0)  # what a token holds that does not count may be NaN
        kept = kept.clamp_max(FRACTION_CEILING) if name.endswith("reference_fraction") else kept
        metrics[name] = kept.sum() / tokens.clamp_min(1.0)
    return metrics | {"tokens": tokens}


def _nonzero(count: torch.Tensor) -> torch.Tensor:
    """A divisor: 1 for 0, where there is nothing to divide. Not the larger of the two, for weights may sum to less than 1."""
    return torch.where(count == 0, torch.ones_like(count), count)
