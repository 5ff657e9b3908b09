"""Hugging Face causal LMs: heads and hidden states, prompts and their packing, frozen weights, sampling. Needs no TRL."""

from popsd_integrations.huggingface.frozen import (
    EMA,
    AdapterOff,
    FrozenCopy,
    FrozenModel,
    FrozenStates,
    frozen_states,
    frozen_weights,
)
from popsd_integrations.huggingface.heads import check_head, head_from_model, hidden_states
from popsd_integrations.huggingface.packing import Packed, check_same_completions, pack, unpad
from popsd_integrations.huggingface.prompts import ContextBuilder, ContextConfig, Problem, Prompts
from popsd_integrations.huggingface.sampling import hf_generate, special_tokens

__all__ = [
    "EMA",
    "AdapterOff",
    "ContextBuilder",
    "ContextConfig",
    "FrozenCopy",
    "FrozenModel",
    "FrozenStates",
    "Packed",
    "Problem",
    "Prompts",
    "check_head",
    "check_same_completions",
    "frozen_states",
    "frozen_weights",
    "head_from_model",
    "hf_generate",
    "hidden_states",
    "pack",
    "special_tokens",
    "unpad",
]
