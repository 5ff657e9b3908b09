"""A tiny student, prompts and runs of the plain loop: everything on CPU, nothing from the Hub."""

from tiny_models import tiny_qwen3

import popsd
from popsd_integrations.huggingface.prompts import Prompts
from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer
from popsd_integrations.torch_loop import TrainConfig, train

EOS = VOCABULARY.index("EOS")
PROMPTS = [Prompts([11, a, 13], [11, a, 20, b, 17, 13], [12, b, 17, 13]) for a in range(5) for b in range(2)]
CONFIG = TrainConfig(
    steps=6,
    batch_size=4,
    learning_rate=1e-2,
    lora_rank=None,
    max_new_tokens=6,
    decompose_every=2,
    checkpoint_every=2,
    loss=popsd.PurifiedConfig(beta=0.3),
)


def tiny(seed=0, **options):
    special = {"eos_token_id": EOS, "pad_token_id": 10, "bos_token_id": None, "tie_word_embeddings": True}
    return tiny_qwen3(len(VOCABULARY), seed, **{"initializer_range": 0.2} | special | options).eval()


def run(folder, config=CONFIG, model=None, prompts=PROMPTS, **options):
    options = {"output_dir": folder, "progress": False, **options}
    return train(model or tiny(), build_tokenizer(), prompts, config, **options)


def deterministic(metrics):
    """What does not depend on the clock, nor on which rows are run together."""
    return [{k: x for k, x in row.items() if not k.startswith(("seconds/", "forwards/"))} for row in metrics]


def fixed_generate(model, prompts, **options):
    """Completions that depend on the question alone."""
    return [[prompt[1], 14, 3, EOS][: 2 + prompt[1] % 3] for prompt in prompts]


def no_work(model, prompts, **options):
    raise AssertionError("work was begun")
