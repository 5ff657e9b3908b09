"""One training step of the TRL trainer by part: frozen forwards, student forward, loss, backward, optimiser.

    python benchmarks/train_step.py                                    # tiny, on CPU
    python benchmarks/train_step.py --device cuda --model qwen3-1.7b --json out.json

A trainer per variant: ``purified`` and ``opsd``, popsd's loss towards the purified target and towards the teacher itself. The
weights are random, of Qwen3's shapes, under LoRA. Completions are given, for generation is the same in both. Rounds are
interleaved and each starts with another variant; ratios are of the medians, beside those of the fastest steps.
"""

from __future__ import annotations

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

from popsd_benchmarks import memory, provenance
from popsd_benchmarks.measure import in_turns
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

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.stop("optimiser")


class TimedTrainer(PurifiedOPSDTrainer):
    def __init__(self, clock: Clock, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, callbacks=[clock], **named)
        self.clock = clock
        self.remove_callback(PrinterCallback)
        self._loss_fn.register_forward_pre_hook(lambda *_: clock.stop("student"))
        self._loss_fn.register_forward_hook(lambda *_: clock.stop("loss"))

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return [[i % len(DIGITS) for i in range(self.args.max_completion_length)] for _ in prompt_ids]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        self.clock.stop(None)
        return batch

    def _frozen_states(self, *arguments: Any, **named: Any) -> Any:
        states = super()._frozen_states(*arguments, **named)
        self.clock.stop("frozen")
        return states

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        loss = super().training_step(*arguments, **named)
        self.clock.stop("backward")
        return loss


def make_model(options: argparse.Namespace) -> Any:
    config = Qwen3Config(bos_token_id=None, **dict(zip(SIZES, SHAPES[options.model], strict=True)))
    torch.manual_seed(0)
    with torch.device(options.device):
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    rank = options.rank
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():  # B is zero at the start; then student and base agree, and no gradient reaches A
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    return model


def make_trainer(options: argparse.Namespace, variant: str, folder: str) -> TimedTrainer:
    """Its learning rate is 0: every step is the same step."""
    words = " ".join(DIGITS[i % 10] for i in range(options.prompt - 2))
    data = Dataset.from_list([{"prompt": f"Q {words} A", "solution": "OK"}] * options.micro_batch)
    config = PurifiedOPSDConfig(
        folder, loss_target=variant, per_device_train_batch_size=options.micro_batch, learning_rate=0.0, max_steps=1,
        max_completion_length=options.completion, gradient_checkpointing=options.checkpointing,
        bf16=options.device == "cuda", use_cpu=options.device == "cpu", save_strategy="no", logging_strategy="no",
        report_to="none", disable_tqdm=True, plot_metrics=False, diagnostics_steps=0,
        workspace_mib=options.workspace_mib, teacher_template="{question} {solution} A",
        reference_template=f"R {words} {{solution}} A",
    )  # fmt: skip
    clock = Clock(options.device)
    return TimedTrainer(clock, make_model(options), config, data, processing_class=build_tokenizer())


def measure(options: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Medians by part and variant, peak memory, losses; ``write`` is called as soon as anything is known."""
    given = {name: value for name, value in vars(options).items() if name != "json"}
    variants: dict[str, Any] = {}
    result = {"about": provenance.describe(options.device) | {"options": given}, "variants": variants}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make_trainer(options, name, folder) for name in options.variants}
        for name, trainer in trainers.items():
            trainer.train()  # compiles
            memory.reset_peak(options.device)
            loss = trainer.train().training_loss
            variants[name] = {"loss": loss, "peak_gib": memory.peak(options.device) / 1024, "rounds": []}
            write(result)
        for _, name in in_turns(options.variants, options.rounds - 1):
            trainers[name].train()
            variants[name]["rounds"].append(dict(trainers[name].clock.parts))
            write(result)
    for found in variants.values():
        totals = [sum(parts.values()) for parts in found["rounds"]]
        found["median"] = {part: statistics.median(x[part] for x in found["rounds"]) for part in found["rounds"][0]}
        found |= {"step": statistics.median(totals), "fastest": min(totals)}
    if set(VARIANTS) <= set(variants):
        ours, theirs = (variants[name] for name in VARIANTS)
        result["ratios"] = {name: ours[name] / theirs[name] for name in ("step", "fastest")}
    write(result)
    return result


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--model", choices=list(SHAPES), help="default: tiny on CPU, qwen3-1.7b on a GPU")
    add("--micro-batch", type=int, default=4, help="rows")
    add("--prompt", type=int, help="tokens of every prompt; default 1024, 64 on CPU")
    add("--completion", type=int, help="tokens; default as --prompt")
    add("--rank", type=int, default=64, help="of LoRA")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="recompute activations; default on a GPU")
    add("--rounds", type=int, default=7)
    add("--workspace-mib", type=float, help="popsd's workspace; its default if not given")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--json", type=Path, help="write everything measured here, after every variant and round")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.model = options.model or ("qwen3-1.7b" if gpu else "tiny")
    options.prompt = options.prompt or (1024 if gpu else 64)
    options.completion = options.completion or options.prompt
    options.checkpointing = gpu if options.checkpointing is None else options.checkpointing
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)

    def write(result: dict[str, Any]) -> None:
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    result = measure(options, write)
    print(json.dumps(result["about"]))
    for name, found in result["variants"].items():
        parts = [f"{part} {seconds:.4f} s" for part, seconds in found["median"].items()]
        print(f"{name:8}", *parts, f"step {found['step']:.4f} s", f"peak {found['peak_gib']:.3f} GiB", sep="  ")
    if "ratios" in result:
        print("purified / opsd: {step:.3f} (of the fastest steps {fastest:.3f})".format(**result["ratios"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
