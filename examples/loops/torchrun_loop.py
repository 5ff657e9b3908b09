"""A loop of one's own under torchrun: LoRA in DistributedDataParallel, with accumulation. It is short, to be changed.

    torchrun --nproc_per_node 8 torchrun_loop.py --model Qwen/Qwen3-1.7B --data train.jsonl --output runs/torchrun

train.jsonl has a problem a line: {"prompt": "What is 2 + 2?", "solution": "Two and two make four."}
Left out: checkpoints, evaluation, a schedule; popsd's own loop (plain_loop.py) has the first two.
"""

import argparse
import json
import os
import random
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import popsd
from popsd_integrations.huggingface import (
    ContextBuilder,
    ContextConfig,
    Problem,
    Sampler,
    check_model,
    frozen_states,
    frozen_weights,
    global_num_items,
    head_from_model,
    hidden_states,
    join_processes,
    pack_contexts,
    run_in_forward,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="Qwen/Qwen3-1.7B")
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch_size", type=int, default=32, help="questions per step, of all processes together")
parser.add_argument("--micro_batch_size", type=int, default=4, help="questions per forward of a process")
parser.add_argument("--max_new_tokens", type=int, default=1024)
parser.add_argument("--temperature", type=float, default=1.0)
parser.add_argument("--learning_rate", type=float, default=5e-6)
args = parser.parse_args()

join_processes()
several = dist.is_initialized()
rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
device, dtype = "cpu", torch.float32
if torch.cuda.is_available():
    device, dtype = f"cuda:{os.environ.get('LOCAL_RANK', 0)}", torch.bfloat16
    torch.cuda.set_device(device)

tokenizer = AutoTokenizer.from_pretrained(args.model)
torch.manual_seed(0)  # the same adapter on every process
base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
lora = LoraConfig(r=64, lora_alpha=128, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
peft = get_peft_model(base, lora)
torch.manual_seed(rank)  # other samples on every process

rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
contexts = ContextBuilder(tokenizer, ContextConfig(max_prompt_length=4096, on_overflow="drop"))
prompts = contexts.build_all([Problem(row["prompt"], row["solution"]) for row in rows])
sampler = Sampler(peft, tokenizer, max_new_tokens=args.max_new_tokens, temperature=args.temperature)
source = frozen_weights(peft)  # the adapter off
side = check_model(peft, prompts, source, pad_token_id=sampler.pad_token_id)
loss_fn = popsd.PurifiedOPSDLoss()
model = DistributedDataParallel(peft) if several else peft
trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)


def loss_of(batch, items):
    """Loss and metrics of a micro-batch, inside the wrapper's forward."""
    student, frozen = batch["base"], frozen_states(source, batch)
    states = hidden_states(model, student.input_ids, student.attention_mask, student.position_ids)
    streams = popsd.HiddenStates(student.predicting(states), frozen.base, frozen.teacher, frozen.reference)
    return loss_fn(streams, head_from_model(model), mask=student.completion_mask, num_items=items)


for step in range(args.steps):
    chosen = random.Random(step).choices(prompts, k=args.batch_size)[rank::world]  # the same draw on every process
    completions = sampler(peft, chosen)
    parts = [slice(first, first + args.micro_batch_size) for first in range(0, len(chosen), args.micro_batch_size)]
    options = {"pad_token_id": sampler.pad_token_id, "side": side, "device": device}
    batches = [pack_contexts(chosen[part], completions[part], **options) for part in parts]
    items = global_num_items(*(batch["base"].completion_mask for batch in batches))

    total = torch.zeros((), device=device)
    for number, batch in enumerate(batches, start=1):
        last = number == len(batches)  # gradients are reduced once a step
        with nullcontext() if last or not several else model.no_sync():
            loss, metrics = run_in_forward(model, partial(loss_of, batch, items))
            loss.backward()
        total += loss.detach()

    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if several:
        dist.all_reduce(total)
    if rank == 0:
        row = {"step": step + 1, "loss": total.item() / world, "grad_norm": norm.item()}
        args.output.mkdir(parents=True, exist_ok=True)
        with open(args.output / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)

if rank == 0:
    peft.save_pretrained(args.output / "model")
