"""The warm-up: one small model, trained from scratch on all three contexts. Every distillation run starts from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from popsd_integrations.huggingface.packing import pack
from popsd_integrations.miniature import task
from popsd_integrations.miniature.evaluate import accuracy, complete
from popsd_integrations.miniature.tokenizer import TOKEN_ID, VOCABULARY


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """Model and supervised training. The learning rate runs in cycles, each a linear rise and a cosine fall.

    After each cycle the accuracy on the validation split is measured. At ``accuracy`` or above the warm-up is over, below
    it another cycle runs. A fixed number of steps is not enough: some seeds are still at chance after 500.
    init_std: of the weights. At Qwen3's own 0.02 one 500-step cycle ends at chance (.15, seed 0). At 0.06 it passes .38
    by step 300 (seeds 0 and 1), which saves a second cycle.
    """

    seed: int = 0
    hidden_size: int = 64
    layers: int = 3
    heads: int = 4
    mlp_size: int = 192
    batch_size: int = 64
    learning_rate: float = 4e-3
    rise_steps: int = 50
    cycle_steps: int = 500
    final_fraction: float = 0.05
    max_steps: int = 2000
    init_std: float = 0.06
    accuracy: float = 0.40
    validation_puzzles: int = 256

    def __post_init__(self) -> None:
        for name in ("batch_size", "cycle_steps", "max_steps", "validation_puzzles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}.")
        if not 0 < self.accuracy < 1:
            raise ValueError(f"accuracy: expected a share in (0, 1); got {self.accuracy}.")

    @property
    def fingerprint(self) -> str:
        """Hash of everything the result depends on, the task's styles included. It names the cache file."""
        content = {"warm-up": dataclasses.asdict(self), "styles": task.STYLES, "vocabulary": VOCABULARY, "version": 1}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def build_model(config: WarmupConfig) -> Any:
    """A randomly initialised Qwen3 of 162k parameters (the default), float32, tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            head_dim=config.hidden_size // config.heads,
            intermediate_size=config.mlp_size,
            tie_word_embeddings=True,
            pad_token_id=TOKEN_ID["PAD"],
            eos_token_id=TOKEN_ID["EOS"],
            bos_token_id=None,
            max_position_embeddings=128,
            initializer_range=config.init_std,
        )
    )


def warm_up(config: WarmupConfig, cache_dir: Path, progress: Callable[[int, float], None] | None = None) -> Any:
    """The warmed-up model in eval mode, from the cache file of this very configuration where there is one.

    progress: called with (step, loss) after each step. Raises RuntimeError where max_steps pass below the accuracy
        asked for.
    """
    path = Path(cache_dir) / f"warmup-{config.fingerprint}.pt"
    model = build_model(config)
    if path.exists():
        try:
            model.load_state_dict(torch.load(path, weights_only=True))
        except Exception as error:
            raise ValueError(
                f"cache_dir: expected a warm-up checkpoint in {path}; got a file that does not load "
                f"({type(error).__name__}). Delete it."
            ) from error
        return model.eval()
    torch.manual_seed(config.seed)
    model = build_model(config)
    _train(model, config, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    torch.save(model.state_dict(), temporary)
    os.replace(temporary, path)
    return model.eval()


def _train(model: Any, config: WarmupConfig, progress: Callable[[int, float], None] | None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    validation = task.draw_puzzles(config.validation_puzzles, "validation", config.seed)
    batches = task.warmup_batches(config.batch_size, config.seed)
    reached = 0.0
    for step in range(config.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate(step % config.cycle_steps, config)
        loss = _loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, loss.item())
        if (step + 1) % config.cycle_steps == 0:
            model.eval()
            reached = accuracy(validation, complete(model, validation, temperature=1.0))
            model.train()
            if reached >= config.accuracy:
                return
    raise RuntimeError(
        f"max_steps: expected a validation accuracy of {config.accuracy} within {config.max_steps} steps; "
        f"got {reached:.3f}. Raise max_steps or try another seed."
    )


def _rate(step: int, config: WarmupConfig) -> float:
    if step < config.rise_steps:
        return (step + 1) / config.rise_steps
    done = (step - config.rise_steps) / max(config.cycle_steps - config.rise_steps, 1)
    return config.final_fraction + (1 - config.final_fraction) * (1 + math.cos(math.pi * done)) / 2


def _loss(model: Any, batch: dict[str, tuple[list[list[int]], list[list[int]]]]) -> torch.Tensor:
    """Mean cross-entropy over the completion tokens of all contexts, which run as one right-padded batch."""
    prompts = [ids for context_prompts, _ in batch.values() for ids in context_prompts]
    completions = [ids for _, context_completions in batch.values() for ids in context_completions]
    packed = pack(prompts, completions, pad_token_id=TOKEN_ID["PAD"], side="right")
    columns = torch.arange(packed.input_ids.shape[1])
    spans = packed.spans[:, :, None]
    labels = packed.input_ids.masked_fill((columns < spans[:, 0]) | (columns >= spans[:, 1]), -100)
    logits = model(input_ids=packed.input_ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
