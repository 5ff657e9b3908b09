"""The loops of examples/loops, on a tiny model, by two ranks and by one process. Each check returns its metrics."""

import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist
from loop_helpers import build_tokenizer, tiny

LOOPS = Path(__file__).resolve().parents[3] / "examples" / "loops"
OPTIONS = {"--steps": 2, "--batch_size": 4, "--max_new_tokens": 5, "--temperature": 0.0, "--learning_rate": 1e-3}
OWN = {"plain": {"--micro_batch_size": 1}, "torchrun": {"--micro_batch_size": 1}, "accelerate": {"--micro_batches": 2}}


def inputs(folder):
    """A tiny model and problems in a folder of this rank's own."""
    place = folder / f"inputs-{os.environ.get('RANK', 0)}"
    model, tokenizer = tiny(), build_tokenizer()
    for saved in (model, tokenizer):
        saved.save_pretrained(place)
    rows = [{"prompt": f"Q {a} {b} A", "solution": f"{b} WAIT {a} OK"} for a in range(4) for b in range(2)]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def example(name, folder):
    place, output = inputs(folder), folder / "run"
    options = {"--model": place, "--data": place / "train.jsonl", "--output": output} | OPTIONS | OWN[name]
    sys.argv = [name, *(str(word) for option in options.items() for word in option)]
    os.environ["ACCELERATE_USE_CPU"] = "1"
    runpy.run_path(str(LOOPS / f"{name}_loop.py"), run_name="__main__")
    if dist.is_initialized():
        dist.barrier()  # the first one has written
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("loss", "grad_norm")} for row in rows]


def named(name, suffix=""):
    check = partial(example, name)
    check.__name__ = f"{name}_example{suffix}"
    return check


CHECKS = [(named(name, suffix), {"size": size}) for name in OWN for suffix, size in (("", 2), ("_alone", 1))]
