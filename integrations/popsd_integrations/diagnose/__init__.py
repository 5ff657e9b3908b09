"""The pre-flight check: which way a target would move the epistemic markers, before any training."""

from __future__ import annotations

from typing import Any

__all__ = ["DiagnoseConfig", "Diagnosis", "diagnose"]


def __getattr__(name: str) -> Any:
    """The measuring module imports torch, which the command line can do without until it runs."""
    if name in __all__:
        from popsd_integrations.diagnose import measure

        return getattr(measure, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
