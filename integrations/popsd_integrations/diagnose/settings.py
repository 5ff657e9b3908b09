"""What a diagnosis is made of, whoever reads the options: the command line's miniature or a training configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from popsd_integrations.diagnose.measure import DiagnoseConfig, TokenWeights
from popsd_integrations.huggingface.prompts import Prompts
from popsd_integrations.huggingface.sampling import Generate


class Setting(NamedTuple):
    """Arguments of `diagnose`, where its files go, and what its page says of model and data."""

    model: Any
    tokenizer: Any
    prompts: list[Prompts]
    config: DiagnoseConfig
    folder: Path
    about: Mapping[str, str]
    generate: Generate | None = None
    token_weights: TokenWeights | None = None
