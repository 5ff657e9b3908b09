"""The loss as an `nn.Module`: which target, which tokens count, and how they are averaged."""

from __future__ import annotations

from typing import Any, Literal

import torch

from popsd.config import Impl, MaskConfig, Method, PurifiedConfig, Strategy, TargetConfig
from popsd.engine import validation
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
        decompose: bool | Method | str = False,
        gram: torch.Tensor | None = None,
        telemetry: bool = False,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss over the tokens of ``mask``.

        Args:
            hidden: streams [B, T, D] or [N, D], at the positions that predict each completion token.
            student_head, frozen_head, token_ids, decompose, gram, telemetry: see `popsd.linear_purified_jsd`.
            mask: [B, T] or [N], true (or a weight > 0) where a token counts; None: everywhere. Masked tokens are dropped
                before any projection, at the price of one host synchronisation.
            num_items: what to divide by; the count of this call by default. Under gradient accumulation or data
                parallelism pass the global count, and the sum over micro-batches does not depend on the split.

        Returns: the scalar loss, and a dict of detached 0-dim tensors. Means over the counted tokens of this call:
        divergence, student_kl, target_kl, student_entropy, target_entropy, clip_fraction, token_clipped,
        argmax_agreement, and with ``decompose`` decomposition/<field>, with ``telemetry`` purification/<field>; ``tokens``
        is their number. With ``token_ids`` also token_logprob, with masks kept_share: the share of weight they keep.

        Raises: ValueError, TypeError as `popsd.linear_purified_jsd`; ValueError for "sequence_mean" without [B, T].
        """
        shape = hidden.student.shape[:-1]
        kept = torch.ones(shape, dtype=torch.bool, device=hidden.student.device) if mask is None else mask
        if kept.shape != shape:
            raise ValueError(f"mask: expected shape {list(shape)}, one entry per token; got {list(kept.shape)}.")
        if num_items is not None and not isinstance(num_items, torch.Tensor) and num_items <= 0:
            raise ValueError(f"num_items: expected a positive count; got {num_items}.")
        weights = kept.float()
        if self.reduction == "sequence_mean":
            if weights.ndim != 2:
                raise ValueError(
                    f"hidden: expected [B, T, D] for reduction='sequence_mean'; got {list(hidden.student.shape)}. "
                    "Flat tokens do not tell where a sequence ends."
                )
            lengths = weights.sum(dim=1, keepdim=True)
            weights = weights / lengths.clamp_min(1e-9)
            items = (lengths > 0).sum()
        else:
            items = weights.sum()
        positions = None if self.masks is None or weights.ndim != 2 else (weights != 0).long().cumsum(dim=1) - 1
        if mask is not None:
            index = weights.flatten().nonzero()[:, 0]
            hidden = HiddenStates(*(None if x is None else x.flatten(0, -2)[index] for x in hidden))  # type: ignore[arg-type]
            weights = weights.flatten()[index]
            token_ids = None if token_ids is None else token_ids.flatten()[index]
            positions = None if positions is None else positions.flatten()[index]
        common: dict[str, Any] = {"weights": weights, "token_ids": token_ids, "positions": positions}
        output = self._divergence(hidden, student_head, frozen_head, common, decompose, gram, telemetry)
        divisor = items if num_items is None else num_items
        if isinstance(divisor, torch.Tensor):
            divisor = divisor.to(output.loss.device).clamp_min(1)
        metrics = _metrics(output, weights)
        if self.masks is not None:
            metrics["kept_share"] = output.weights.sum() / weights.sum().clamp_min(1e-9)
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
        )
        return output._replace(decomposition=parts)


def _metrics(output: LossOutput, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over the tokens of positive weight, masked ones included, without a host synchronisation."""
    counted = (weights != 0).float()
    tokens = counted.sum()
    fields = {name: getattr(output, name) for name in RowLoss._fields if getattr(output, name) is not None}
    for group, parts in (("decomposition", output.decomposition), ("purification", output.purification)):
        if parts is not None:
            fields |= {f"{group}/{name}": x for name, x in parts._asdict().items() if x is not None}
    metrics = {name: (x * counted).sum() / tokens.clamp_min(1.0) for name, x in fields.items()}
    return metrics | {"tokens": tokens}
