"""Purified on-policy self-distillation as a TRL trainer. Importing this package imports TRL."""

from popsd_integrations.trl_trainer.config import PurifiedOPSDConfig
from popsd_integrations.trl_trainer.trainer import PurifiedOPSDTrainer

__all__ = ["PurifiedOPSDConfig", "PurifiedOPSDTrainer"]
