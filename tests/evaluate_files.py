"""Models, adapters and problems of the miniature as files, which is what ``popsd evaluate`` reads."""

import json

import torch

from popsd_integrations.miniature import warmup
from popsd_integrations.miniature.task import draw_puzzles
from popsd_integrations.miniature.tokenizer import build_tokenizer

WIDE = warmup.WarmupConfig(hidden_size=128, layers=2, heads=4, mlp_size=128)  # heads of 32, which vLLM has kernels for
TINY = warmup.WarmupConfig(hidden_size=16, layers=1, heads=2, mlp_size=16)
SCORER = "popsd_integrations.miniature.task:verdict"
OPTIONS = ["--question_template", "Q {question} A", "--max_completion_length", "12", "--eval_scorer", SCORER]
OPTIONS += ["--temperature", "1", "--top_p", "1", "--top_k", "0"]


def save_model(folder, model=None, seed=0, wide=False):
    """A model with its tokenizer; by default a tiny one with random weights."""
    if model is None:
        torch.manual_seed(seed)
        model = warmup.build_model(WIDE if wide else TINY).eval()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder, base, seed=0, **options):
    """A LoRA adapter of the model in the folder ``base``, with random weights large enough to be seen."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options})
    adapted = get_peft_model(model, lora)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(folder)
    return folder


def save_puzzles(path, count, split="test"):
    """Puzzles as lines with question and answer."""
    rows = [
        {"question": p.problem.question, "answer": f"{p.pair[0]} {p.pair[1]}"} for p in draw_puzzles(count, split, 0)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_all(folder):
    """A base model, a run with two adapters, a whole model, and two benchmarks."""
    base = save_model(folder / "base")
    save_adapter(folder / "run" / "checkpoint-2", base, seed=1)
    save_adapter(folder / "run" / "checkpoint-10", base, seed=2)
    save_model(folder / "whole", seed=5)
    save_puzzles(folder / "a.jsonl", 4)
    save_puzzles(folder / "b.jsonl", 2, "validation")
    return folder


def arguments(files, output, *more):
    inputs = ["--model_name_or_path", files / "base", "--adapters", f"lora={files / 'run'}", files / "whole"]
    inputs += ["--benchmarks", files / "a.jsonl", files / "b.jsonl", "--output_dir", output]
    inputs += ["--num_generations", "3", "--per_device_eval_batch_size", "4"]
    return ["evaluate", *map(str, inputs), *OPTIONS, *more]


def change(name, value):
    def changed(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return changed
