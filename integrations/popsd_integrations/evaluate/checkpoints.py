"""The base model and what was trained from it, checked before any of it is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from popsd_integrations import run_folder
from popsd_integrations.evaluate.settings import labelled
from popsd_integrations.run_folder import ADAPTER, WHOLE

BASE = "base"
_WEIGHTS = ("*.safetensors", "*.bin")
_BLOCK = 1 << 20


class Checkpoint(NamedTuple):
    """label: its name in tables. run: the run that it belongs to, whose best checkpoint is marked.

    path: a local folder, or what --model_name_or_path said for the base. weights: hash by `weights_hash`; None for a
    name on the Hub. adapter: its adapter_config.json; None for whole models.
    """

    label: str
    run: str
    path: str
    weights: str | None
    adapter: dict[str, Any] | None = None


def resolve(model: str, adapters: Sequence[str]) -> list[Checkpoint]:
    """The base model, then every checkpoint, in order.

    adapters: folders or names on the Hub, each ``path`` or ``label=path``. A folder with checkpoint-… in it stands for all
    of these, by step. A checkpoint is a LoRA adapter, or a whole model of the base model's architecture and sizes.
    Raises ValueError where there is no checkpoint, two have one label, or one is of another base model.
    """
    config = base_config(model)
    found = [Checkpoint(BASE, BASE, model, weights_hash(Path(model)) if Path(model).is_dir() else None)]
    for name in adapters:
        run, path = labelled(name, name.rstrip("/"))
        folder = _folder(path)
        steps = [x for x in run_folder.checkpoints(folder) if run_folder.saved_as(x)]
        if not steps and not _is_checkpoint(folder):
            raise ValueError(
                f"adapters: expected a folder with {ADAPTER}, {WHOLE} or checkpoint-… in it; got {path!r}. Save the "
                "trained model with save_pretrained."
            )
        for step in steps or [folder]:
            found.append(_checkpoint(f"{run}/{step.name}" if steps else run, run, step))
    for checkpoint in found[1:]:
        if [other.label for other in found].count(checkpoint.label) > 1:
            raise ValueError(f"adapters: expected each label once; got {checkpoint.label!r} again. Write label=path.")
        if checkpoint.adapter is None:
            _check_model(checkpoint, config)
        else:
            _check_adapter(checkpoint, model, config)
    return found


def weights_hash(folder: Path) -> str:
    """Names, sizes, first and last MiB of the files with weights, which training changes everywhere; an adapter's settings.

    The settings count because lora_alpha scales the weights. The base model's place does not, which a move changes.
    """
    digest = hashlib.sha256()
    if (folder / ADAPTER).is_file():
        adapter = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        adapter.pop("base_model_name_or_path", None)
        digest.update(json.dumps(adapter, sort_keys=True).encode())
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            digest.update(file.read(_BLOCK))
            file.seek(max(size - _BLOCK, 0))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _is_checkpoint(folder: Path) -> bool:
    is_step = re.fullmatch(r"checkpoint-\d+", folder.name) or "checkpoint-" not in folder.name
    return bool(is_step) and run_folder.saved_as(folder) is not None


def _folder(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path))
    except Exception as error:  # of the name, of the network, of access rights
        raise ValueError(
            f"adapters: expected a local folder or a name on the Hub; got {path!r} ({type(error).__name__})."
        ) from error


def _checkpoint(label: str, run: str, folder: Path) -> Checkpoint:
    adapter = json.loads((folder / ADAPTER).read_text(encoding="utf-8")) if (folder / ADAPTER).is_file() else None
    return Checkpoint(label, run, str(folder), weights_hash(folder), adapter)


def base_config(model: str) -> Any:
    """The configuration of a model. Raises ValueError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path: expected a name on the Hub or a local folder; got {model!r} ({error})."
        ) from error


def _check_model(checkpoint: Checkpoint, base: Any) -> None:
    own = base_config(checkpoint.path)
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        ours, theirs = (getattr(config.get_text_config(), name, None) for config in (own, base))
        if ours != theirs:
            raise ValueError(
                f"adapters: expected a model like --model_name_or_path, with {name} {theirs}; got {ours} in "
                f"{checkpoint.path}. Pass the model that it was trained from as --model_name_or_path."
            )


def _check_adapter(checkpoint: Checkpoint, model: str, config: Any) -> None:
    """By the base model's name where the adapter tells it, and by the sizes of its matrices."""
    assert checkpoint.adapter is not None
    named = checkpoint.adapter.get("base_model_name_or_path") or ""
    if named and Path(named).name.lower() != Path(model).name.lower() and not _same_folder(named, model):
        raise ValueError(
            f"adapters: expected an adapter of {model}; {checkpoint.path} is one of {named}. Pass that as "
            f"--model_name_or_path, or, if it is the same model elsewhere, write the new place into {ADAPTER}."
        )
    weights = Path(checkpoint.path) / "adapter_model.safetensors"
    if not weights.is_file():
        return
    from safetensors import safe_open

    from popsd_integrations.huggingface.heads import without_weights

    modules = dict(without_weights(config).named_modules())
    with safe_open(weights, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a mapping)
            place = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", key)
            if place is None:
                continue
            module, shape = modules.get(place[1]), file.get_slice(key).get_shape()
            size, expected = (
                (shape[1], getattr(module, "in_features", None))
                if place[2] == "A"
                else (shape[0], getattr(module, "out_features", None))
            )
            if module is None or size != expected:
                raise ValueError(
                    f"adapters: expected an adapter of {model}, whose {place[1]} has {expected} "
                    f"{'inputs' if place[2] == 'A' else 'outputs'}; got {size} in {checkpoint.path}. Pass the model that "
                    "it was trained from as --model_name_or_path."
                )


def _same_folder(one: str, other: str) -> bool:
    return Path(one).is_dir() and Path(other).is_dir() and Path(one).resolve() == Path(other).resolve()
