"""One training step of the TRL trainer by part: frozen forwards, student forward, loss, backward, optimiser.

    python benchmarks/train_step.py                                    # tiny, on CPU
    python benchmarks/train_step.py --device cuda --model qwen3-1.7b --json out.json

A trainer per variant: ``purified`` and ``opsd``, popsd's loss towards the purified target and towards the teacher itself. The
weights are random, of Qwen3's shapes, under LoRA. Completions are given, for generation is the same in both. Rounds are
interleaved and each starts with another variant; their ratio is that of the medians.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, Qwen3Config, TrainerCallback

from popsd_benchmarks import memory
from popsd_benchmarks.measure import in_turns
from popsd_benchmarks.results import Results, describe
from popsd_integrations.miniature.tokenizer import DIGITS, build_tokenizer
from popsd_integrations.trl_trainer import PurifiedOPSDConfig, PurifiedOPSDTrainer

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size", "tie_word_embeddings")  # fmt: skip
SHAPES = {
    "tiny": (64, 192, 2, 4, 2, 16, 4096, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
}
VARIANTS = ("purified", "opsd")


class Clock(TrainerCallback):
    """Seconds between calls, the device waited for, by part."""

    def __init__(self, device: str) -> None:
        self.device, self.parts, self.last = device, {}, 0.0

    def stop(self, part: str | None) -> None:
        """The time since the last call is that part's, or nobody's."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if part is not None:
            self.parts[part] = now - self.last
        self.last = now

    def after(self, part: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            self.stop(part)
            return result

        return timed

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.stop("optimiser")


def make_model(options: argparse.Namespace) -> Any:
    config = Qwen3Config(bos_token_id=None, **dict(zip(SIZES, SHAPES[options.model], strict=True)))
    lora = peft.LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        return peft.get_peft_model(AutoModelForCausalLM.from_config(config, dtype=dtype), lora)


def make_trainer(options: argparse.Namespace, variant: str, folder: str) -> tuple[PurifiedOPSDTrainer, Clock]:
    """Its learning rate is 0: every step is the same step."""
    words = " ".join(DIGITS[i % 10] for i in range(options.prompt - 2))
    data = Dataset.from_list([{"prompt": f"Q {words} A", "solution": "OK"}] * options.micro_batch)
    config = PurifiedOPSDConfig(
        folder, loss_target=variant, per_device_train_batch_size=options.micro_batch, learning_rate=0.0, max_steps=1,
        max_completion_length=options.prompt, gradient_checkpointing=options.checkpointing,
        bf16=options.device == "cuda", use_cpu=options.device == "cpu", save_strategy="no", logging_strategy="no",
        report_to="none", disable_tqdm=True, plot_metrics=False, diagnostics_steps=0,
        teacher_template="{question} {solution} A", reference_template=f"R {words} {{solution}} A",
    )  # fmt: skip
    model, clock = make_model(options), Clock(options.device)
    trainer = PurifiedOPSDTrainer(model, config, data, processing_class=build_tokenizer(), callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer._loss_fn.register_forward_pre_hook(lambda *_: clock.stop("student"))
    trainer._loss_fn.register_forward_hook(lambda *_: clock.stop("loss"))
    completion = [i % len(DIGITS) for i in range(options.prompt)]
    trainer._generate_single_turn = lambda prompt_ids, *_, **__: [list(completion) for _ in prompt_ids]
    parts = {"_generate_and_score_completions": None, "_frozen_states": "frozen", "training_step": "backward"}
    for method, part in parts.items():
        setattr(trainer, method, clock.after(part, getattr(trainer, method)))
    torch.manual_seed(1)
    for parameter in model.parameters():  # B is zero, as the trainer wants it at first; then no gradient reaches A
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)
    return trainer, clock


def measure(options: argparse.Namespace, record: Callable[..., None]) -> None:
    """Records, as part "step", each variant's medians in seconds, peak memory and loss; "stopped" until all is known."""
    known: dict[str, dict[str, Any]] = {}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}

    def figures(name: str) -> dict[str, float]:
        steps = [sum(parts.values()) for parts in rounds[name]]
        found = {f"{part}_s": statistics.median(x[part] for x in rounds[name]) for part in rounds[name][0]}
        found |= {"step_s": statistics.median(steps), "fastest_s": min(steps)}
        return found | {"loss_share": found["loss_s"] / found["step_s"], **known[name]}

    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(options, name, folder) for name in VARIANTS}
        for name, (trainer, _) in trainers.items():
            trainer.train()  # compiles
            memory.reset_peak(options.device)
            loss = trainer.train().training_loss
            known[name] = {"loss": loss, "peak_gib": memory.peak(options.device) / 1024}
        for _, name in in_turns(VARIANTS, options.rounds - 1):
            trainer, clock = trainers[name]
            trainer.train()
            rounds[name].append(dict(clock.parts))
            record("step", name, status="stopped", **figures(name))
    ours, theirs = map(figures, VARIANTS)
    record("step", "opsd", **theirs)
    record("step", "purified", **ours, over_opsd=ours["step_s"] / theirs["step_s"])  # last: it says that all is there


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--model", choices=list(SHAPES), help="default: tiny on CPU, qwen3-1.7b on a GPU")
    add("--micro-batch", type=int, default=4, help="rows")
    add("--prompt", type=int, help="tokens of every prompt and of every completion; default 1024, 64 on CPU")
    add("--rank", type=int, default=64, help="of LoRA")
    add("--checkpointing", action="store_true", help="recompute activations, which it does on a GPU anyway")
    add("--rounds", type=int, default=7)
    add("--json", type=Path, help="results file, written after every round")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.model = options.model or ("qwen3-1.7b" if gpu else "tiny")
    options.prompt = options.prompt or (1024 if gpu else 64)
    options.checkpointing |= gpu
    return options


def main() -> int:
    options = parse_options()
    given = {name: value for name, value in vars(options).items() if name != "json"}
    results = Results(describe(options.device) | {"options": given})

    def record(*names: str, **figures: Any) -> None:
        results.record(*names, **figures)
        if options.json:
            results.save(options.json)

    measure(options, record)
    print(json.dumps(results.meta))
    for row in results.records:
        print(row["name"], *(f"{name} {x:.4f}" for name, x in row.items() if isinstance(x, float)), sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
