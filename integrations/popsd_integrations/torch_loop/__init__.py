"""The whole method as one readable loop over a Hugging Face causal LM, with exact resume."""

from popsd_integrations.runs.held_out import HeldOut
from popsd_integrations.torch_loop.config import TrainConfig
from popsd_integrations.torch_loop.loop import TrainResult, train

__all__ = ["HeldOut", "TrainConfig", "TrainResult", "train"]
