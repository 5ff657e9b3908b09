"""That the frozen weights of a run stay what they are, for every trainer that takes a ``TrainerCallback``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from popsd_integrations.huggingface.frozen import AdapterOff, FrozenChecksum, FrozenModel
from popsd_integrations.run_folder import write_whole

FROZEN_FILE = "popsd_frozen.json"


class FrozenWeightsCallback(TrainerCallback):
    """Compares the frozen weights' checksum before every checkpoint and at the end, and keeps it in the checkpoints.

    A resumed run must have the same. ``source``: returns the frozen weights as they are when training begins.
    Raises RuntimeError where they changed, ValueError where a run resumes from other ones.
    """

    def __init__(self, source: Callable[[], AdapterOff | FrozenModel]) -> None:
        self.source = source
        self.checksum: FrozenChecksum | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.checksum = FrozenChecksum(self.source())
        given = getattr(args, "resume_from_checkpoint", None)  # it may lie in another run's folder
        path = Path(given) / FROZEN_FILE if isinstance(given, str) else _path(args, state)
        if state.global_step > 0 and path.exists():
            began = json.loads(path.read_text(encoding="utf-8"))
            if began != self.checksum.values:
                raise ValueError(
                    f"model: expected the initial weights of the run in {path.parent}; got others, and they would become "
                    "base, teacher and reference. Build the trainer from the model that the run began with, not from a "
                    "checkpoint; resume_from_checkpoint loads the trained weights."
                )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save and self.checksum is not None:  # decided already, by a callback that comes first
            self.checksum.check()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.checksum is not None:
            values = self.checksum.values
            write_whole(_path(args, state), lambda file: file.write(json.dumps(values).encode()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.checksum is not None:
            self.checksum.check()


def _path(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / FROZEN_FILE
