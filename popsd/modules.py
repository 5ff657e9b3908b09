"""The loss as an `nn.Module`: which target, which tokens count, and how they are averaged."""

from __future__ import annotations

from typing import Any, Literal

import torch

from popsd.config import Impl, PurifiedConfig, Strategy
from popsd.functional import decompose, linear_jsd, linear_purified_jsd
from popsd.types import Head, HiddenStates, LossOutput

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
        impl, workspace_mib, strategy: see `popsd.linear_purified_jsd`.
    """

    def __init__(
        self,
        config: PurifiedConfig | None = None,
        *,
        loss_target: LossTarget = "purified",
        reduction: Averaging = "token_mean",
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
        self.loss_target, self.reduction = loss_target, reduction
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
        decompose: bool = False,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss over the tokens of ``mask``.

        Args:
            hidden: streams [B, T, D] or [N, D], at the positions that predict each completion token.
            student_head, frozen_head, token_ids, decompose: see `popsd.linear_purified_jsd`.
            mask: [B, T] or [N], true (or a weight > 0) where a token counts; None: everywhere. Masked tokens are dropped
                before any projection, at the price of one host synchronisation.
            num_items: what to divide by; the count of this call by default. Under gradient accumulation or data
                parallelism pass the global count, and the sum over micro-batches does not depend on the split.

        Returns: the scalar loss, and a dict of detached 0-dim tensors. Means over the counted tokens of this call:
        divergence, student_kl, target_kl, student_entropy, target_entropy, clip_fraction, token_clipped,
        argmax_agreement, and with ``decompose`` decomposition/<field>; ``tokens`` is their number. With ``token_ids``
        also token_logprob.

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
        if mask is not None:
            index = weights.flatten().nonzero()[:, 0]
            hidden = HiddenStates(*(None if x is None else x.flatten(0, -2)[index] for x in hidden))  # type: ignore[arg-type]
            weights = weights.flatten()[index]
            token_ids = None if token_ids is None else token_ids.flatten()[index]
        output = self._divergence(hidden, student_head, frozen_head, weights, token_ids, decompose)
        divisor = items if num_items is None else num_items
        if isinstance(divisor, torch.Tensor):
            divisor = divisor.to(output.loss.device).clamp_min(1)
        return output.loss / divisor, _metrics(output)

    def _divergence(
        self,
        hidden: HiddenStates,
        student_head: Head,
        frozen_head: Head | None,
        weights: torch.Tensor,
        token_ids: torch.Tensor | None,
        with_decomposition: bool,
    ) -> LossOutput:
        common: dict[str, Any] = {
            "config": self.config,
            "weights": weights,
            "token_ids": token_ids,
            "reduction": "sum",
            "impl": self.impl,
            "workspace_mib": self.workspace_mib,
            "strategy": self.strategy,
        }
        if self.loss_target == "purified":
            return linear_purified_jsd(hidden, student_head, frozen_head, decompose=with_decomposition, **common)
        output = linear_jsd(hidden.student, student_head, hidden.teacher, frozen_head, **common)
        if not with_decomposition:
            return output
        parts = decompose(
            hidden, student_head, frozen_head, config=self.config, impl=self.impl, workspace_mib=self.workspace_mib
        )
        return output._replace(decomposition=parts)


def _metrics(output: LossOutput) -> dict[str, torch.Tensor]:
    """Means over the tokens of positive weight, without a host synchronisation."""
    counted = (output.weights != 0).float()
    tokens = counted.sum()
    fields = {name: getattr(output, name) for name in _AVERAGED if getattr(output, name) is not None}
    if output.decomposition is not None:
        fields |= {f"decomposition/{name}": x for name, x in output.decomposition._asdict().items()}
    metrics = {name: (x * counted).sum() / tokens.clamp_min(1.0) for name, x in fields.items()}
    return metrics | {"tokens": tokens}


_AVERAGED = (
    "divergence",
    "student_kl",
    "target_kl",
    "student_entropy",
    "target_entropy",
    "clip_fraction",
    "token_clipped",
    "argmax_agreement",
    "token_logprob",
)
