"""What test_tensor_parallel.py starts: two processes that hold a model by transformers' own tensor-parallel plan, over gloo."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from forked import fork_ranks
from tiny_models import tiny_qwen3
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from popsd import PurifiedConfig, PurifiedOPSDLoss
from popsd.testing import relative_l2
from popsd_integrations.huggingface import FrozenModel, Prompts, frozen_states, heads, pack_contexts
from popsd_integrations.huggingface.frozen import FrozenCopy
from popsd_integrations.huggingface.objective import student_loss

PROMPTS = [Prompts([3, 4, 5], [6, 3, 4, 5], [6, 7]), Prompts([3, 8], [9, 3, 8], [9])]
COMPLETIONS = [[10, 11, 12], [13, 14, 15, 16]]


def step(student, frozen):
    packed = pack_contexts(PROMPTS, COMPLETIONS, pad_token_id=0)
    loss_fn = PurifiedOPSDLoss(PurifiedConfig(beta=0.3))
    loss, metrics = student_loss(
        student, loss_fn, packed["base"], frozen_states(FrozenModel(frozen), packed), num_items=7
    )
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    return loss.detach(), metrics, {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in gradients.items()}


def run(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=240))
    expected = step(*(AutoModelForCausalLM.from_pretrained(f"{folder}/{name}") for name in ("student", "frozen")))
    student, frozen = (
        AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", tp_plan="auto") for name in ("student", "frozen")
    )
    assert student.lm_head.weight.to_local().shape == (26 if rank == 0 else 25, 32), "nothing is shared out"
    heads._full = None  # no head is gathered
    loss, metrics, gradients = step(student, frozen)
    found = {"loss": relative_l2(loss, expected[0])}
    found |= {f"metrics/{name}": abs(float(x - expected[1][name])) for name, x in metrics.items()}
    found |= {name: relative_l2(x, expected[2][name]) for name, x in gradients.items()}
    try:
        FrozenCopy(student)
    except ValueError as error:
        found["refusal"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def main(folder):
    for name, seed in (("student", 0), ("frozen", 1)):
        tiny_qwen3(51, seed=seed, tie_word_embeddings=False).save_pretrained(f"{folder}/{name}")
    sys.exit(fork_ranks(run, 2, folder))


if __name__ == "__main__":
    main(sys.argv[1])
