"""What ``PurifiedOPSDTrainer`` adds to TRL's trainer so that no run is lost: whole checkpoints, one run in a folder, an
orderly end on SIGTERM, no step on a gradient that is not finite, and no completions that padding has changed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from popsd_integrations.finite_steps import PATIENCE, FiniteSteps
from popsd_integrations.huggingface.distributed import run_in_forward
from popsd_integrations.huggingface.groups import prompts_run_once
from popsd_integrations.huggingface.heads import is_sharded
from popsd_integrations.huggingface.packing import unpad
from popsd_integrations.huggingface.sampling import TOGETHER, grouped
from popsd_integrations.run_folder import exclusive, finishing_on_sigterm
from popsd_integrations.trl_trainer.callbacks import EMACallback, SameRun, newest_whole_checkpoint
from popsd_integrations.trl_trainer.compat import DistillationTrainer, record

_FP16_PATIENCE = 32
"""A gradient scaler starts at 2^16 and halves at every step that it refuses, until nothing overflows."""


class GuardedTrainer(DistillationTrainer):
    """TRL's trainer with the guards. Its subclass has ``_loss``, which names rows that are not finite, ``_same_run``, and
    ``_grouping`` and ``_shares``, of the prompts that are sampled together and of those that are run once.
    """

    _same_run: SameRun
    _grouping: str
    _shares: bool
    pad_to_multiple_of: int | None

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """``transformers.Trainer.train``, alone in ``output_dir``.

        resume_from_checkpoint: True is the newest whole checkpoint; one that a kill cut short is passed over.
        After a SIGTERM the step is finished and saved, and SystemExit(143) raised; ``enable_jit_checkpoint`` leaves that
        to transformers.
        Raises ValueError where another run works in ``output_dir`` or left its checkpoints there, where a start at step 0
        would write over some, or True finds none; FloatingPointError after
        three steps in a row without a finite gradient, all refused, and for parameters that are not finite.
        """
        jit = getattr(self.args, "enable_jit_checkpoint", False)
        with contextlib.ExitStack() as stack:
            if self.accelerator.is_main_process:
                stack.enter_context(exclusive(self.args.output_dir))
            if resume_from_checkpoint is True:
                resume_from_checkpoint = newest_whole_checkpoint(self.args.output_dir)
                if resume_from_checkpoint is None:
                    raise ValueError(
                        f"resume_from_checkpoint: expected a whole checkpoint in {self.args.output_dir}; got none. "
                        "Leave it out to start from step 0."
                    )
            self._same_run.check(self.args, bool(resume_from_checkpoint), self.is_world_process_zero())
            asked_to_end = (lambda: False) if jit else stack.enter_context(finishing_on_sigterm())
            guards = [FiniteGradient(self), EndWhenAsked(self, asked_to_end)]
            for guard in guards:
                self.add_callback(guard)
                stack.callback(self.remove_callback, guard)
            self._inputs_of_step: list[dict[str, Any]] = []
            return super().train(resume_from_checkpoint, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model, and in a checkpoint first the moving average.

        transformers writes trainer_state.json after this and removes older checkpoints last. So a folder with that file
        has the average too, and no older one goes before.
        """
        bad = [name for name, p in self.model.named_parameters() if p.requires_grad and not _finite(p)]
        if bad:
            raise FloatingPointError(
                f"parameters: expected finite numbers to save at step {self.state.global_step}; got others in "
                f"{', '.join(bad[:3])} ({len(bad)} tensors). The last checkpoint stays. Lower the learning rate."
            )
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, EMACallback):
                    callback.save(Path(output_dir or self.args.output_dir))

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training:
            self._inputs_of_step.append(inputs)
        return inputs

    def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **options: Any) -> Any:
        """TRL's, of as many prompts at a time as the model completes as it does each alone."""

        def generate(prompts: list[Any]) -> Any:
            with prompts_run_once(self.model) if self._shares else contextlib.nullcontext():
                return super(GuardedTrainer, self)._generate_single_turn(prompts, *rest, **options)

        if self._grouping == TOGETHER:
            return generate(prompt_ids)
        multiple, self.pad_to_multiple_of = self.pad_to_multiple_of, None
        try:
            return grouped(prompt_ids, self._grouping, generate)
        finally:
            self.pad_to_multiple_of = multiple

    def rows_not_finite(self) -> list[str]:
        """The questions, shortened, of this process's rows of the step whose loss by itself is not finite."""
        names = []
        student = self.accelerator.unwrap_model(self.model_wrapped)
        for inputs in self._inputs_of_step:
            questions = unpad(inputs["prompt_ids"], inputs["prompt_mask"])
            for index, question in enumerate(questions):
                row = {name: _row(value, index, len(questions)) for name, value in inputs.items()}
                with torch.no_grad():
                    loss, _ = run_in_forward(self.model_wrapped, partial(self._loss, student, row, None, False))
                if not loss.isfinite():
                    names.append(repr(self.processing_class.decode(question)[:80]))
        return names


class FiniteGradient(TrainerCallback):
    """Takes the gradient away from a step where it is not finite, so that the optimiser has nothing to do.

    Logged as ``step_refused``, a share of the steps. Under fp16 the gradient scaler refuses them by itself, and this counts.
    DeepSpeed has stepped already when it can be asked, so there the run ends at the first.
    """

    def __init__(self, trainer: GuardedTrainer) -> None:
        self._trainer = trainer
        self._steps = FiniteSteps(_FP16_PATIENCE if trainer.args.fp16 else PATIENCE)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, step = self._trainer, state.global_step + 1
        refused = self._steps.refuses(self._norm(step), step, trainer.rows_not_finite)
        record(trainer, {"step_refused": float(refused)})
        if refused and not args.fp16:
            for parameter in trainer.model.parameters():
                parameter.grad = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._inputs_of_step.clear()

    def _norm(self, step: int) -> float:
        """The gradient's norm; of sharded ones something that is finite where it is, and the same on all processes."""
        trainer = self._trainer
        engine = trainer.model_wrapped
        if hasattr(engine, "get_global_grad_norm"):
            taken = float(engine.get_global_grad_norm() or 0.0)
            if not math.isfinite(taken) and not trainer.args.fp16:
                raise FloatingPointError(
                    f"loss: expected a finite gradient; got norm {taken} at step {step}, which DeepSpeed has taken. The last "
                    "checkpoint is whole. Resume from it without the row, or at a lower learning rate."
                )
            return taken
        gradients = [_local(p.grad) for p in trainer.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if trainer.accelerator.num_processes > 1:
            norm = trainer.accelerator.reduce(norm.to(trainer.accelerator.device), "sum")
        return float(norm.item())


class EndWhenAsked(TrainerCallback):
    """Saves and ends the run after the step in which any process was asked to."""

    def __init__(self, trainer: GuardedTrainer, asked: Callable[[], bool]) -> None:
        self._trainer, self._asked = trainer, asked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked, accelerator = self._asked(), self._trainer.accelerator
        if accelerator.num_processes > 1:  # signals reach them at different steps
            asked = accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum").item() > 0
        if asked:
            control.should_save = control.should_training_stop = True


def _row(value: Any, index: int, rows: int) -> Any:
    is_per_row = isinstance(value, list) or (isinstance(value, torch.Tensor) and value.ndim > 0)
    return value[index : index + 1] if is_per_row and len(value) == rows else value


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if is_sharded(tensor) and hasattr(tensor, "to_local") else tensor


def _finite(parameter: torch.Tensor) -> bool:
    return bool(torch.isfinite(_local(parameter)).all())
