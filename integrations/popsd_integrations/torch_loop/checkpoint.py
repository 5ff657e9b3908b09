"""Checkpoints of a training run: exact resume, atomic writes, and refusal of another run's file before any work."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def seed_everything(seed: int) -> None:
    """Seed the generators that ``random_state`` saves."""
    random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """States of the global generators: Python's, PyTorch's, and those of all CUDA devices."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of ``random_state``."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def run_fingerprint(
    options: Mapping[str, Any], model: nn.Module, prompts: Sequence[Sequence[list[int]]]
) -> dict[str, Any]:
    """What identifies a run: its options, and hashes of its data and of its initial weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:256].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode() + values.tobytes())
    data = hashlib.sha256(json.dumps([list(row) for row in prompts]).encode()).hexdigest()
    # Written and read as JSON, because a checkpoint returns it so: tuples become lists.
    fingerprint: dict[str, Any] = json.loads(
        json.dumps({**options, "prompts": data, "initial weights": digest.hexdigest()}, default=str)
    )
    return fingerprint


def save_checkpoint(
    path: Path,
    fingerprint: dict[str, Any],
    step: int,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write to a temporary file, then rename it. A run killed at any moment leaves a whole file, old or new."""
    content = {
        "popsd": 1,
        "fingerprint": fingerprint,
        "step": step,
        "parameters": {name: parameter.detach() for name, parameter in trained.items()},
        "optimizer": optimizer.state_dict(),
        "random": random_state(),
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "wb") as file:
        torch.save(content, file)
    os.replace(temporary, path)


def read_checkpoint(path: Path, fingerprint: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The checkpoint's content, or None where there is none yet.

    Raises ValueError: there is one but ``resume`` is False, it does not load, or it is of another run.
    """
    if not path.exists():
        return None
    if not resume:
        raise ValueError(
            f"output_dir: expected no checkpoint, since resume is False; got {path}. Pass resume=True to continue "
            "that run, or another output_dir."
        )
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        known = content["fingerprint"] if content["popsd"] == 1 else None
    except Exception as error:
        raise ValueError(
            f"output_dir: expected a readable popsd checkpoint in {path}; got a file that does not load "
            f"({type(error).__name__}). "
            "Delete the file to start afresh, or pass another output_dir."
        ) from error
    if known != fingerprint:
        different = sorted(
            name for name in {*(known or {}), *fingerprint} if (known or {}).get(name) != fingerprint.get(name)
        )
        raise ValueError(
            f"output_dir: expected a checkpoint of this very run in {path}; got one that differs in "
            f"{', '.join(different)}. Restore those options, data and initial model, or pass another output_dir."
        )
    return content


def restore(checkpoint: dict[str, Any], trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Put parameters, optimiser and random states back, and return the number of steps taken."""
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(checkpoint["parameters"][name])
    optimizer.load_state_dict(checkpoint["optimizer"])
    set_random_state(checkpoint["random"])
    step: int = checkpoint["step"]
    return step
