"""popsd inside training frameworks: models, prompts and frozen weights, a plain loop, a TRL trainer, the command line."""

from __future__ import annotations

__all__ = ["patch_trl", "unpatch_trl"]


def patch_trl() -> None:
    """Make popsd's two-distribution loss that of TRL's ``DistillationTrainer`` and ``GKDTrainer``, before one is built.

    Loss, gradients and what is logged are TRL's own, to float32's rounding: beta, temperature, masks and the division by the
    tokens of the batch among them. The trainers' other options, data and generation stay as they are. ``GKDTrainer`` then
    computes no logits: TRL's takes those of all tokens, prompts included, of both models.

    One call does it for the process; another does nothing, and `unpatch_trl` ends it. Trainers that are built already, or
    whose classes were imported before, take part as well. Subclasses do where they take TRL's loss.

    Raises ImportError for a TRL outside 1.12 to 1.16. A trainer that is built afterwards raises ValueError for an option that
    the loss would not read, naming it: ``label_smoothing_factor`` in both. In ``GKDTrainer`` also ``compute_metrics``,
    ``preprocess_logits_for_metrics``, ``loss_type="dft"``, ``router_aux_loss_coef``, Liger's own JSD, a
    ``generalized_jsd_loss`` of one's own, FSDP and DeepSpeed; and a model whose logits popsd cannot compute exactly.

    >>> import popsd_integrations
    >>> popsd_integrations.patch_trl()
    >>> from trl import DistillationTrainer  # then build it as ever
    >>> popsd_integrations.unpatch_trl()
    """
    from popsd_integrations.trl_trainer import fast_jsd

    fast_jsd.patch()


def unpatch_trl() -> None:
    """Give TRL's trainers their own loss back. Nothing happens where `patch_trl` was not called."""
    from popsd_integrations.trl_trainer import fast_jsd

    fast_jsd.unpatch()
