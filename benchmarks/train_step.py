"""One training step by part: three frozen forwards, student forward, loss, backward, optimiser; no generation.

    python benchmarks/train_step.py                                    # tiny, on CPU
    python benchmarks/train_step.py --device cuda --model qwen3-1.7b --json out.json
    python benchmarks/train_step.py --device cuda --model qwen3-8b --largest-micro-batch

The weights are random, of Qwen3's shapes, under LoRA; the calls are the trainer's own, ``frozen_states`` and ``student_loss``.
Variants: ``purified`` and ``opsd`` by popsd, and ``opsd eager``, the same loss from logits over the whole vocabulary. Rounds
are interleaved and each starts with another variant; ratios are of the medians, beside those of the fastest steps. Needs
torch, transformers and peft.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3Config

import popsd
from popsd_integrations.huggingface.frozen import AdapterOff, frozen_states
from popsd_integrations.huggingface.heads import head_from_model, hidden_states
from popsd_integrations.huggingface.objective import loss_function, needed_contexts, student_loss
from popsd_integrations.huggingface.packing import Packed, pack_contexts
from popsd_integrations.huggingface.prompts import Prompts

SHAPES = {  # hidden, MLP, layers, heads, key-value heads, head width, vocabulary, tied
    "tiny": (64, 192, 2, 4, 2, 16, 4096, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
}
VARIANTS = ("purified", "opsd", "opsd eager")
PARTS = ("frozen", "student", "loss", "backward", "optimiser")


def make_config(shape: tuple[Any, ...], **more: Any) -> Qwen3Config:
    hidden, mlp, layers, heads, key_value_heads, head_dim, vocab, tied = shape
    return Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        bos_token_id=None,
        **more,
    )


def make_model(name: str, rank: int, device: str, dtype: torch.dtype, checkpointing: bool) -> Any:
    config = make_config(SHAPES[name])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():  # B is zero at the start; then student and base agree, and no gradient reaches A
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def eager_opsd(model: nn.Module, packed: Packed, frozen: Any, items: int, beta: float) -> Callable[[], torch.Tensor]:
    """Runs the student; returns what then computes the loss towards the teacher from materialised float32 logits."""
    states = packed.predicting(hidden_states(model, packed.input_ids, packed.attention_mask, packed.position_ids))

    def loss() -> torch.Tensor:
        kept = packed.completion_mask
        weight = head_from_model(model).weight
        log_p = F.log_softmax(F.linear(states[kept].to(weight.dtype), weight).float(), -1)
        with torch.no_grad():
            log_q = F.log_softmax(F.linear(frozen.teacher[kept].to(weight.dtype), frozen.head.weight).float(), -1)
        weights = torch.tensor([1 - beta, beta], device=log_p.device).log()
        log_m = torch.logsumexp(torch.stack([log_p + weights[0], log_q + weights[1]]), dim=0)
        to_target = F.kl_div(log_m, log_q, reduction="sum", log_target=True)
        to_student = F.kl_div(log_m, log_p, reduction="sum", log_target=True)
        return (beta * to_target + (1 - beta) * to_student) / items

    return loss


class Clock:
    """Seconds between calls, the device waited for."""

    def __init__(self, device: str) -> None:
        self.device, self.parts = device, dict.fromkeys(PARTS, 0.0)
        self.last = self._now()

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def stop(self, part: str) -> None:
        now = self._now()
        self.parts[part] += now - self.last
        self.last = now


class Step:
    """One model and optimiser; ``run`` is one step of a variant on random tokens. All variants take the same tokens."""

    def __init__(self, options: argparse.Namespace, rows: int) -> None:
        self.options = options
        dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        self.model = make_model(options.model, options.rank, options.device, dtype, options.checkpointing)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)  # every step is then the same step
        self.set_rows(rows)

    def set_rows(self, rows: int) -> None:
        self.rows, options = rows, self.options
        generator = torch.Generator().manual_seed(1)

        def tokens(count: int) -> list[int]:
            return torch.randint(SHAPES[options.model][6], (count,), generator=generator).tolist()

        prompt, new = options.prompt, options.completion
        self.prompts = [Prompts(tokens(prompt), tokens(prompt), tokens(prompt)) for _ in range(rows)]
        self.completions = [tokens(new) for _ in range(rows)]

    def run(self, variant: str) -> tuple[dict[str, float], float]:
        """Seconds by part, and the loss."""
        target: Any = variant.split()[0]
        clock = Clock(self.options.device)
        batches = pack_contexts(self.prompts, self.completions, pad_token_id=0, device=self.options.device)
        packed = batches["base"]
        frozen = frozen_states(AdapterOff(self.model), batches, needed_contexts(target, decompose=False))
        clock.stop("frozen")
        items = self.rows * self.options.completion
        if variant == "opsd eager":
            eager = eager_opsd(self.model, packed, frozen, items, beta=0.5)
            clock.stop("student")
            loss = eager()
        else:
            loss_fn = loss_function(target, workspace_mib=self.options.workspace_mib)
            # student_loss is one call; the loss begins where its module is entered
            entered = loss_fn.register_forward_pre_hook(lambda *_: clock.stop("student"))
            loss, _ = student_loss(self.model, loss_fn, packed, frozen, num_items=items)
            entered.remove()
        clock.stop("loss")
        loss.backward()
        clock.stop("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.stop("optimiser")
        return clock.parts, loss.item()

    def attempt(self, variant: str) -> dict[str, Any] | None:
        """Loss and peak memory of the second step of two, or None where the memory does not suffice."""
        found = None
        try:
            self.run(variant)
            reset_peak(self.options.device)
            found = {"loss": self.run(variant)[1], "peak_gib": peak_gib(self.options.device), "rounds": []}
        except torch.OutOfMemoryError:
            pass
        if found is None:  # out here, where the exception no longer holds the step's tensors
            self.optimizer.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
        return found


def measure(options: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Medians by part and variant, peak memory, losses; ``write`` is called as soon as a variant is known to fit."""
    step = Step(options, options.micro_batch)
    result: dict[str, Any] = {"about": about(options), "variants": {}}
    for variant in options.variants:  # also the warm-up
        result["variants"][variant] = step.attempt(variant) or {"out_of_memory": True}
        write(result)
    alive = [name for name, found in result["variants"].items() if "rounds" in found]
    if {"opsd", "opsd eager"} <= set(alive):
        a, b = (result["variants"][name]["loss"] for name in ("opsd", "opsd eager"))
        if not abs(a - b) <= (5e-2 if options.device == "cuda" else 1e-4) * abs(b):
            raise SystemExit(f"Wrong: popsd's OPSD loss is {a:.6g}, the eager one {b:.6g}. No speed.")
    for round_ in range(options.rounds):
        turn = round_ % max(len(alive), 1)
        for variant in alive[turn:] + alive[:turn]:
            result["variants"][variant]["rounds"].append(step.run(variant)[0])
        write(result)
    for found in result["variants"].values():
        if "rounds" in found:
            totals = [sum(parts.values()) for parts in found["rounds"]]
            found["median"] = {part: statistics.median(x[part] for x in found["rounds"]) for part in PARTS}
            found["median"]["step"] = statistics.median(totals)
    result["ratios"] = {
        f"{name} / opsd": ratio(result["variants"][name], result["variants"]["opsd"])
        for name in alive
        if name != "opsd" and "opsd" in alive
    }
    write(result)
    return result


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    fastest = (min(sum(parts.values()) for parts in found["rounds"]) for found in (ours, theirs))
    return {"step": ours["median"]["step"] / theirs["median"]["step"], "fastest": next(fastest) / next(fastest)}


def largest_micro_batch(step: Step, variant: str) -> int:
    """The largest number of rows whose step fits the GPU: doubled until it does not, then halved between."""

    def fits(rows: int) -> bool:
        step.set_rows(rows)
        return step.attempt(variant) is not None

    low, high = 0, 1
    while high <= step.options.most_rows and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle <= step.options.most_rows and fits(middle) else (low, middle)
    return low


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to the present size


def peak_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmHWM"].split()[0]) / 2**20


def about(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu"
    versions = {x.__name__: x.__version__ for x in (popsd, torch, transformers, peft)}
    given = {name: value for name, value in vars(options).items() if name != "json"}
    return {"device": device, "threads": torch.get_num_threads(), "versions": versions, "options": given}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(SHAPES), help="default: tiny on CPU, qwen3-1.7b on a GPU")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows")
    parser.add_argument("--prompt", type=int, help="tokens of every prompt; default 1024, 64 on CPU")
    parser.add_argument("--completion", type=int, help="tokens; default as --prompt")
    parser.add_argument("--rank", type=int, default=64, help="of LoRA")
    parser.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="recompute activations; default on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workspace-mib", type=float, help="popsd's workspace; its default if not given")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--largest-micro-batch", action="store_true", help="find it for every variant, instead of time")
    parser.add_argument("--most-rows", type=int, default=256, help="where that search ends")
    parser.add_argument("--json", type=Path, help="write everything measured here, after every variant and round")
    options = parser.parse_args(arguments)
    usual = 1024 if options.device == "cuda" else 64
    options.model = options.model or ("qwen3-1.7b" if options.device == "cuda" else "tiny")
    options.prompt = options.prompt or usual
    options.completion = options.completion or options.prompt
    options.checkpointing = options.device == "cuda" if options.checkpointing is None else options.checkpointing
    if options.largest_micro_batch and options.device != "cuda":
        parser.error("--largest-micro-batch: expected --device cuda; got cpu, which swaps before it runs out.")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)

    def write(result: dict[str, Any]) -> None:
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    if options.largest_micro_batch:
        step = Step(options, 1)
        result = {"about": about(options), "largest_micro_batch": {}}
        for variant in options.variants:
            result["largest_micro_batch"][variant] = largest_micro_batch(step, variant)
            write(result)
        print(json.dumps(result, indent=1))
        return 0
    result = measure(options, write)
    print(json.dumps(result["about"]))
    print(f"{'median seconds':12}  " + "  ".join(f"{part:>9}" for part in (*PARTS, "step")) + "   peak GiB")
    for name, found in result["variants"].items():
        if "median" in found:
            print(
                f"{name:14}  "
                + "  ".join(f"{x:9.4f}" for x in found["median"].values())
                + f"  {found['peak_gib']:9.3f}"
            )
        else:
            print(f"{name:14}  out of memory")
    for name, found in result["ratios"].items():
        print(f"{name}: {found['step']:.3f} (of the fastest steps {found['fastest']:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
