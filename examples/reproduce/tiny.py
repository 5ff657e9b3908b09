"""A model that knows nothing, data and a benchmark as files: what ``reproduce.sh --dry`` runs on, in seconds on a CPU.

    python tiny.py FOLDER

The tokenizer has a token for each byte, and Qwen3's turns and thinking flag, so that the real prompts are written.
Nothing is downloaded.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def main(folder: Path) -> None:
    """Write FOLDER/model, FOLDER/data/train.jsonl and FOLDER/problems.jsonl."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({character: place for place, character in enumerate(characters)}, []))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 5,  # a head with rows of padding, as Qwen3 has
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=40960,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **sizes,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    problems = [
        {"problem": f"What is {n} + {n}?", "solution": f"It is {2 * n}.", "answer": str(2 * n)} for n in range(8)
    ]
    (folder / "data").mkdir(exist_ok=True)
    for path, rows in ((folder / "data" / "train.jsonl", problems[2:]), (folder / "problems.jsonl", problems[:2])):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
