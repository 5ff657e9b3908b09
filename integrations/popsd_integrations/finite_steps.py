"""Optimiser steps on a gradient that is not finite. One of them would turn every trained weight into NaN."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

PATIENCE = 3


class FiniteSteps:
    """Refuses steps whose gradient is not finite, and ends a run that gets nothing else.

    patience: steps refused in a row after which the run ends. Chance does not give three, bad weights do.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self.patience = patience
        self._in_a_row = 0

    def refuses(self, norm: float, step: int, look: Callable[[], Sequence[str]]) -> bool:
        """Whether the step numbered ``step`` must not be taken, for ``norm`` of its gradient.

        look: names the rows of the step that are not finite by themselves. It is called for a refused step only.
        Raises FloatingPointError once ``patience`` steps in a row are refused.
        """
        if math.isfinite(norm):
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        rows = "; ".join(look()) or "none by itself, so it is their sum or the backward pass that overflows"
        found = f"the gradient's norm is {norm} at step {step}. Rows that are not finite: {rows}"
        if self._in_a_row >= self.patience:
            raise FloatingPointError(
                f"loss: expected a finite gradient; got {self._in_a_row} steps in a row without one, all refused: {found}. "
                "The last checkpoint is whole. Remove those rows, lower the learning rate, or look for the cause with "
                "check_finite=True in the loss's configuration."
            )
        logger.warning(f"Step refused, weights unchanged: {found}.")
        return True
