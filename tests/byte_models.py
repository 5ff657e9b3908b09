"""A tokenizer of bytes, a tiny model for it, and the oracle's loss on it: for frameworks that have their own environments."""

import json

import torch
from tiny_models import tiny_qwen3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import popsd

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer():
    """One token a byte, and Qwen's special ones."""
    vocabulary = {x: i for i, x in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[2], "additional_special_tokens": [SPECIAL[1]]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save(folder, rows):
    """Write a tiny model, its tokenizer and rows of data; returns the paths of the model and of the data."""
    tokenizer = byte_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    model = tiny_qwen3(len(tokenizer) + 5, tie_word_embeddings=True, initializer_range=0.2, **ends)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder / "model"), str(data)


def oracle_loss(student, frozen, rows, config):
    """Mean over all tokens, from the models' own logits, each row alone. config: a `popsd.PurifiedConfig` if purified.

    rows: (question, teacher, reference, completion), each a list of token ids.
    """
    losses = []
    for *contexts, completion in rows:

        def logits(model, context, completion=completion):
            ids = torch.tensor([context + completion])
            return model(input_ids=ids).logits[0, len(context) - 1 : -1].double()

        with torch.no_grad():
            base, teacher, reference = (logits(frozen, context) for context in contexts)
        own = logits(student, contexts[0])
        purified = isinstance(config, popsd.PurifiedConfig)
        found = popsd.oracle.purified_jsd(own, base, teacher, reference, config) if purified else None
        losses.append(popsd.oracle.jsd(own, teacher, config) if found is None else found)
    return torch.cat(losses).mean()
