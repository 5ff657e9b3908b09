"""popsd's own loop, on one process or several. Every process runs this script, and they share the questions of each step.

    python plain_loop.py --model Qwen/Qwen3-1.7B --data train.jsonl --output runs/plain
    torchrun --nproc_per_node 8 plain_loop.py --model Qwen/Qwen3-1.7B --data train.jsonl --output runs/plain

train.jsonl has a problem a line: {"prompt": "What is 2 + 2?", "solution": "Two and two make four."}
The same command goes on from the last checkpoint.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from popsd_integrations.huggingface import ContextBuilder, ContextConfig, Problem
from popsd_integrations.torch_loop import TrainConfig, train

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="Qwen/Qwen3-1.7B")
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch_size", type=int, default=32, help="questions per step, of all processes together")
parser.add_argument("--micro_batch_size", type=int, default=4)
parser.add_argument("--max_new_tokens", type=int, default=1024)
parser.add_argument("--temperature", type=float, default=1.0)
parser.add_argument("--learning_rate", type=float, default=5e-6)
args = parser.parse_args()

device, dtype = "cpu", torch.float32
if torch.cuda.is_available():
    device, dtype = f"cuda:{os.environ.get('LOCAL_RANK', 0)}", torch.bfloat16
    torch.cuda.set_device(device)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)

rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
contexts = ContextBuilder(tokenizer, ContextConfig(max_prompt_length=4096, on_overflow="drop"))
prompts = contexts.build_all([Problem(row["prompt"], row["solution"]) for row in rows])

config = TrainConfig(
    steps=args.steps,
    batch_size=args.batch_size,
    micro_batch_size=args.micro_batch_size,
    max_new_tokens=args.max_new_tokens,
    temperature=args.temperature,
    learning_rate=args.learning_rate,
)
train(model, tokenizer, prompts, config, output_dir=args.output, resume=True)
