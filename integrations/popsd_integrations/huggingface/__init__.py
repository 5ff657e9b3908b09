"""Hugging Face causal LMs: heads and hidden states, prompts and their packing, frozen weights, sampling, several
processes. Needs no TRL.

A training step of one row, from the prompts to the gradient. The examples of this package's functions use this model.

>>> import popsd, torch
>>> from transformers import Qwen3Config, Qwen3ForCausalLM
>>> sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
>>> seed, config = torch.manual_seed(0), Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2)
>>> model = Qwen3ForCausalLM(config).eval()

>>> source = frozen_weights(model)  # a copy, or the adapter off under LoRA: the weights before training
>>> prompts = [Prompts(question=[1, 2], teacher=[1, 2, 3, 4], reference=[3, 4])]
>>> side = check_model(model, prompts, source)  # where padding does not change this architecture's logits
>>> completions = hf_generate(
...     model, [[1, 2]], max_new_tokens=3, temperature=1.0, eos_token_id=[49], pad_token_id=0
... )
>>> packed = pack_contexts(prompts, completions, pad_token_id=0, side=side)
>>> frozen, student = frozen_states(source, packed), packed["base"]
>>> loss, metrics = popsd.PurifiedOPSDLoss()(
...     popsd.HiddenStates(completion_states(model, student), frozen.base, frozen.teacher, frozen.reference),
...     head_from_model(model),
...     frozen_head=frozen.head,
...     mask=student.completion_mask,
... )
>>> loss.backward()
>>> bool(model.lm_head.weight.grad.norm() > 0)
True
"""

from popsd_integrations.huggingface.distributed import agreed, global_num_items, join_processes, run_in_forward
from popsd_integrations.huggingface.forwards import completion_states, counting, exact_layout
from popsd_integrations.huggingface.frozen import (
    EMA,
    AdapterOff,
    FrozenChecksum,
    FrozenCopy,
    FrozenModel,
    FrozenStates,
    frozen_states,
    frozen_weights,
)
from popsd_integrations.huggingface.groups import prompts_run_once
from popsd_integrations.huggingface.heads import eval_mode, gathered, head_from_model, hidden_states, use_head
from popsd_integrations.huggingface.invariants import check_model
from popsd_integrations.huggingface.packing import (
    Packed,
    check_same_completions,
    pack,
    pack_contexts,
    pack_padded,
    padded,
    unpad,
)
from popsd_integrations.huggingface.prompts import ContextBuilder, ContextConfig, Problem, Prompts
from popsd_integrations.huggingface.sampling import (
    Sampler,
    check_positions,
    hf_generate,
    only_given_settings,
    position_limit,
    special_tokens,
)

__all__ = [
    "EMA",
    "AdapterOff",
    "ContextBuilder",
    "ContextConfig",
    "FrozenChecksum",
    "FrozenCopy",
    "FrozenModel",
    "FrozenStates",
    "Packed",
    "Problem",
    "Prompts",
    "Sampler",
    "agreed",
    "check_model",
    "check_positions",
    "check_same_completions",
    "completion_states",
    "counting",
    "eval_mode",
    "exact_layout",
    "frozen_states",
    "frozen_weights",
    "gathered",
    "global_num_items",
    "head_from_model",
    "hf_generate",
    "hidden_states",
    "join_processes",
    "only_given_settings",
    "pack",
    "pack_contexts",
    "pack_padded",
    "padded",
    "position_limit",
    "prompts_run_once",
    "run_in_forward",
    "special_tokens",
    "unpad",
    "use_head",
]
