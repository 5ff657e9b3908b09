"""A loop of one's own with accelerate: LoRA on as many processes as it is launched with, with accumulation.

    accelerate launch --num_processes 8 accelerate_loop.py --model Qwen/Qwen3-1.7B --data train.jsonl --output runs/accelerate

train.jsonl has a problem a line: {"prompt": "What is 2 + 2?", "solution": "Two and two make four."}
On a CPU start it with torchrun: ``accelerate launch --cpu --num_processes 2`` silently runs one process.
Left out: checkpoints (accelerator.save_state), evaluation, a schedule.
"""

import argparse
import json
import random
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
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
    pack_contexts,
    run_in_forward,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="Qwen/Qwen3-1.7B")
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch_size", type=int, default=32, help="questions per step, of all processes together")
parser.add_argument("--micro_batches", type=int, default=2, help="forwards of a process per step")
parser.add_argument("--max_new_tokens", type=int, default=1024)
parser.add_argument("--temperature", type=float, default=1.0)
parser.add_argument("--learning_rate", type=float, default=5e-6)
args = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=args.micro_batches)
rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
tokenizer = AutoTokenizer.from_pretrained(args.model)
torch.manual_seed(0)  # the same adapter on every process
dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
lora = LoraConfig(r=64, lora_alpha=128, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
peft = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device), lora)
torch.manual_seed(rank)  # other samples on every process

rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
contexts = ContextBuilder(tokenizer, ContextConfig(max_prompt_length=4096, on_overflow="drop"))
prompts = contexts.build_all([Problem(row["prompt"], row["solution"]) for row in rows])
sampler = Sampler(peft, tokenizer, max_new_tokens=args.max_new_tokens, temperature=args.temperature)
source = frozen_weights(peft)  # the adapter off
side = check_model(peft, prompts, source, pad_token_id=sampler.pad_token_id)
loss_fn = popsd.PurifiedOPSDLoss()
trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
model, optimizer = accelerator.prepare(peft, torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0))


def loss_of(batch, items):
    """Loss and metrics of a micro-batch, inside the wrapper's forward."""
    with accelerator.autocast():
        student, frozen = batch["base"], frozen_states(source, batch)
        states = hidden_states(model, student.input_ids, student.attention_mask, student.position_ids)
        streams = popsd.HiddenStates(student.predicting(states), frozen.base, frozen.teacher, frozen.reference)
        return loss_fn(streams, head_from_model(model), mask=student.completion_mask, num_items=items)


for step in range(args.steps):
    chosen = random.Random(step).choices(prompts, k=args.batch_size)[rank::world]  # the same draw on every process
    completions = sampler(peft, chosen)
    options = {"pad_token_id": sampler.pad_token_id, "side": side, "device": device}
    parts = [slice(number, None, args.micro_batches) for number in range(args.micro_batches)]
    batches = [pack_contexts(chosen[part], completions[part], **options) for part in parts]
    items = global_num_items(*(batch["base"].completion_mask for batch in batches))

    total = torch.zeros((), device=device)
    for batch in batches:
        with accelerator.accumulate(model):  # reduces the gradients and steps with the last micro-batch
            loss, metrics = run_in_forward(model, partial(loss_of, batch, items))
            # accelerate divides by the number of micro-batches, and num_items counts the tokens of all of them
            accelerator.backward(loss * args.micro_batches)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach()

    row = {"step": step + 1, "loss": accelerator.reduce(total, "mean").item(), "grad_norm": float(norm)}
    if accelerator.is_main_process:
        args.output.mkdir(parents=True, exist_ok=True)
        with open(args.output / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        print(row, flush=True)

if accelerator.is_main_process:
    peft.save_pretrained(args.output / "model")
