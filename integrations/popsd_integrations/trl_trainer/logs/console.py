"""The trainer's console: a line of at most eight figures, where transformers prints all that is logged."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from popsd_integrations.runs.line import lines


class StepLines(ProgressCallback):
    """transformers' progress bar, with `lines` above it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            for line in lines(logs or {}, state.global_step, state.max_steps):
                self.training_bar.write(line)


class PrintedStepLines(PrinterCallback):
    """The same without a bar, under ``disable_tqdm``."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for line in lines(logs or {}, state.global_step, state.max_steps):
                print(line, flush=True)


_OURS = {ProgressCallback: StepLines, PrinterCallback: PrintedStepLines}


def show_lines(trainer: Any) -> None:
    """Put these in the place of transformers' own. A notebook's table, and a callback of the user's, stay."""
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [_OURS[type(one)]() if type(one) in _OURS else one for one in callbacks]
