"""popsd: the loss of Purified On-Policy Self-Distillation (arXiv 2607.02234) without full-vocabulary logits."""

from popsd import oracle
from popsd.config import DivergenceConfig, Impl, PurifiedConfig, Strategy
from popsd.functional import (
    decompose,
    jsd,
    linear_jsd,
    linear_purified_jsd,
    purified_jsd,
    purified_target_logits,
)
from popsd.modules import PurifiedOPSDLoss
from popsd.types import Decomposition, Head, HiddenStates, LossOutput

__version__ = "0.1.0"

__all__ = [
    "Decomposition",
    "DivergenceConfig",
    "Head",
    "HiddenStates",
    "Impl",
    "LossOutput",
    "PurifiedConfig",
    "PurifiedOPSDLoss",
    "Strategy",
    "decompose",
    "jsd",
    "linear_jsd",
    "linear_purified_jsd",
    "oracle",
    "purified_jsd",
    "purified_target_logits",
]
