"""popsd: the loss of Purified On-Policy Self-Distillation (arXiv 2607.02234) without full-vocabulary logits."""

from popsd import oracle, presets
from popsd.config import DivergenceConfig, Impl, MaskConfig, Method, PurifiedConfig, Strategy, TargetConfig
from popsd.engine.chunks.registry import register_target
from popsd.engine.tokens.masks import token_weights
from popsd.functional import jsd, linear_jsd, linear_purified_jsd, linear_sparse_jsd, purified_jsd
from popsd.head import Head
from popsd.inspection import decompose, gram_matrix, head_logits, purified_target_logits
from popsd.modules import PurifiedOPSDLoss
from popsd.outputs import Decomposition, HiddenStates, LossOutput, Purification, SparseTarget

__version__ = "0.1.0"

__all__ = [
    "Decomposition",
    "DivergenceConfig",
    "Head",
    "HiddenStates",
    "Impl",
    "LossOutput",
    "MaskConfig",
    "Method",
    "Purification",
    "PurifiedConfig",
    "PurifiedOPSDLoss",
    "SparseTarget",
    "Strategy",
    "TargetConfig",
    "decompose",
    "gram_matrix",
    "head_logits",
    "jsd",
    "linear_jsd",
    "linear_purified_jsd",
    "linear_sparse_jsd",
    "oracle",
    "presets",
    "purified_jsd",
    "purified_target_logits",
    "register_target",
    "token_weights",
]
