"""Random causal language models small enough for a test; transformers is imported when the first is built."""

import torch


def tiny_qwen3(vocab_size, seed=0, **options):
    """Two layers of width 32 unless ``options`` say otherwise, in training mode."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    return AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=vocab_size, **(sizes | options)))
