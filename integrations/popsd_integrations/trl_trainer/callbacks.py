"""Callbacks of ``PurifiedOPSDTrainer``: the moving average, the plot at the end, and the refusal of a run without steps.
And what tells one run from another.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from popsd_integrations.huggingface.frozen import EMA
from popsd_integrations.plotting import BLUE, VERMILLION, figure, legend, save, style
from popsd_integrations.run_folder import checkpoints, write_whole
from popsd_integrations.runs import held_out, report

logger = logging.getLogger(__name__)

RUN_FILE = "popsd_run.json"
EMA_FILE = "popsd_ema.pt"


class EMACallback(TrainerCallback):
    """Updates the average after every optimiser step, and loads it with a checkpoint. The trainer calls ``save``."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ema.update()

    def save(self, checkpoint: Path) -> None:
        """Write the average into a checkpoint's folder."""
        write_whole(checkpoint / EMA_FILE, lambda file: torch.save(self.ema.state_dict(), file))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            return
        path = _checkpoint(args, state) / EMA_FILE
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint: expected the moving average in {path}; got a checkpoint without it. Resume "
                "from one in this run's output_dir that has the file."
            )
        self.ema.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))


class SameRun:
    """Keeps what a run depends on in its output_dir: its options, and what else ``identity`` names."""

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self._identity = identity

    def check(self, args: Any, resumed: bool, writes: bool) -> None:
        """Raise ValueError where a checkpoint of another run would be continued, or checkpoints written over, those of
        this run among them. Called before transformers loads the optimiser's state, which fits the same run alone.
        """
        path = Path(args.output_dir) / RUN_FILE
        now = json.loads(json.dumps({**args.run_options(), **self._identity}, default=str))
        then = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if then is None and resumed:
            logger.warning(f"Whether the checkpoint is of a run with these options cannot be told: no {path}.")
        if then not in (None, now) and (resumed or any(path.parent.glob("checkpoint-*"))):
            names = sorted({*then, *now})
            other = [
                f"{name} {then.get(name)!r} (now {now.get(name)!r})"
                for name in names
                if then.get(name) != now.get(name)
            ]
            raise ValueError(
                f"output_dir: expected checkpoints of this run in {path.parent}; got those of one with {', '.join(other)}. "
                "Pass the options, data and adapter that it began with, or another output_dir."
            )
        newest = newest_whole_checkpoint(path.parent)
        if newest is not None and not resumed:
            raise ValueError(
                f"output_dir: expected a folder without checkpoints to start at step 0 in; got {newest}, which would be "
                "written over. Pass resume_from_checkpoint=True to go on from it, or another output_dir."
            )
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: file.write(json.dumps(now, indent=1).encode()))


_ADAPTER = ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "init_lora_weights", "rank_pattern", "alpha_pattern")


def trained_part(model: Any) -> dict[str, Any]:
    """What identifies the trained part of a model: numbers of its adapters, and the names of all that is trained.

    The names stand for target_modules and modules_to_save, which PEFT rewrites.
    """
    trained = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    digest = hashlib.sha256("\n".join(trained).encode()).hexdigest()[:16]
    options = {
        f"peft_config[{adapter!r}].{name}": getattr(config, name)
        for adapter, config in getattr(model, "peft_config", {}).items()
        for name in _ADAPTER
        if hasattr(config, name)
    }
    return options | {"trained tensors": f"{len(trained)}, names {digest}"}


class NothingTrained(TrainerCallback):
    """Raises ValueError at the end of a run that trained on nothing, which transformers would report as finished.

    tokens: those that had a part in the loss; the trainer counts them.
    """

    def __init__(self) -> None:
        self.tokens, self._start = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens, self._start = 0.0, state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            raise ValueError(
                "train_dataset: expected rows for at least one step; got a run without one, and nothing was trained. Of a "
                "stream with on_overflow 'drop' too many rows may be longer than max_prompt_length; max_steps and "
                "num_train_epochs may be 0."
            )
        steps = state.global_step - self._start
        if steps > 0 and self.tokens == 0:
            raise ValueError(
                f"skip_first_tokens, masks: expected a completion token in the loss; got none in {steps} steps, and nothing "
                "was trained. Leave fewer tokens out, or look at the completions (log_completions)."
            )


class PlotMetrics(TrainerCallback):
    """Writes ``metrics.png`` to output_dir when training ends: one panel for each metric, train and eval."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            plot_history(state.log_history, Path(args.output_dir) / "metrics.png")
        except ImportError:
            logger.warning("No metrics.png: matplotlib is missing (pip install 'popsd[plots]').")


def plot_history(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot a trainer's ``state.log_history``. Raises ImportError without matplotlib."""
    columns = 4
    panels = {title: lines for title, names in report.CURVES.items() if (lines := report.lines_of(history, names))}
    drawn, axes = figure(max(1, -(-len(panels) // columns)), columns)
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for name, points in lines.items():
            marker = "." if name == "eval" or len(points) == 1 else ""
            colour = {"train": BLUE, "eval": VERMILLION}[name]
            axis.plot(*zip(*points.items(), strict=True), color=colour, marker=marker, label=name)
        style(axis, title, "step")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    legend(axes[0])
    save(drawn, path)


class RunFiles(TrainerCallback):
    """Keeps metrics.jsonl and popsd_config.json in output_dir, and writes report.html at checkpoints and at the end.

    A resumed run goes on with the metrics and the held-out completions of its checkpoint, and drops those of later steps.
    base: name of the initial model. data: what is known of the data. evaluate: see `report.write_config`.
    """

    def __init__(self, base: str, data: dict[str, Any], evaluate: Sequence[str]) -> None:
        self._about: dict[str, Any] = {"base": base, "data": data, "evaluate": evaluate}
        self._began = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder, done = Path(args.output_dir), state.global_step
        options = {option.name: getattr(args, option.name) for option in fields(args)}  # to_dict changes what they hold
        report.write_config(folder, options=options, **self._about)
        held_out.keep(folder / held_out.FILE, lambda record: 0 < record["step"] <= done)
        lines = "".join(json.dumps(row, default=str) + "\n" for row in state.log_history)
        write_whole(folder / report.METRICS, lambda file: file.write(lines.encode()))
        self._began = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._began:  # an evaluation before any training is of no run
            with open(Path(args.output_dir) / report.METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1], default=str) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._began:
            report.write_page(Path(args.output_dir))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_save(args, state, control)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def newest_whole_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint with the most steps in ``folder`` that was written to its end, or None.

    A run killed while it saved leaves a folder without trainer_state.json, which is written last.
    """
    return next((str(path) for path in reversed(checkpoints(folder)) if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    try:
        return bool(json.loads((path / "trainer_state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False
