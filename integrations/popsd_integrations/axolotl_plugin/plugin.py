"""What Axolotl loads: ``plugins: [popsd_integrations.axolotl_plugin.plugin.PopsdPlugin]``."""

from __future__ import annotations

import math
from typing import Any

from axolotl.common.datasets import TrainDatasetMeta
from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.data.shared import load_dataset_with_config
from datasets import Dataset, concatenate_datasets
from pydantic import BaseModel, Field

from popsd_integrations.axolotl_plugin.options import check_config, trainer_config
from popsd_integrations.trl_trainer import PurifiedOPSDTrainer

_FOR_ITS_OWN = {"data_collator", "eval_data_collator", "bench_data_collator", "dataset_tags"}
"""Of Axolotl's arguments of a trainer, those that are about batches which it has tokenised itself."""


class PopsdArgs(BaseModel):
    """What the plugin adds to Axolotl's YAML: ``popsd:``, with options of `PurifiedOPSDConfig`."""

    popsd: dict[str, Any] = Field(default_factory=dict)


class AxolotlTrainer(PurifiedOPSDTrainer):
    """popsd's trainer, built from what Axolotl builds a trainer from. Raises as it does, and as `trainer_config` does."""

    def __init__(
        self,
        model: Any,
        args: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        **further: Any,
    ) -> None:
        if ignored := sorted(further.keys() - _FOR_ITS_OWN):
            raise ValueError(
                f"{ignored[0]}: expected none with popsd's plugin, whose trainer does not read it; got {ignored}."
            )
        super().__init__(
            model=model,
            args=trainer_config(args, PluginManager.get_instance().cfg.popsd or {}),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )

    def create_model_card(self, *args: Any, dataset_tags: list[str] | None = None, **kwargs: Any) -> None:
        """TRL's, which names one dataset where Axolotl may have several."""
        super().create_model_card(*args, **{"dataset_name": ", ".join(dataset_tags or []) or None} | kwargs)


class PopsdPlugin(BasePlugin):
    """Brings the data as it is, with its columns, and the trainer."""

    def get_input_args(self) -> str:
        return f"{__name__}.PopsdArgs"

    def register(self, cfg: Any) -> None:
        check_config(cfg)

    def get_trainer_cls(self, cfg: Any) -> type[AxolotlTrainer]:
        return AxolotlTrainer

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> TrainDatasetMeta:
        train, held_out = _rows(cfg.datasets), _rows(cfg.test_datasets) if cfg.test_datasets else None
        if held_out is None and cfg.val_set_size:
            parts = train.train_test_split(cfg.val_set_size, seed=cfg.seed or 42)
            train, held_out = parts["train"], parts["test"]
        per_step = cfg.micro_batch_size * cfg.gradient_accumulation_steps * (cfg.world_size or 1)
        steps = cfg.max_steps or math.ceil(len(train) / per_step * cfg.num_epochs)
        return TrainDatasetMeta(train_dataset=train, eval_dataset=held_out, total_num_steps=steps)


def _rows(entries: Any) -> Dataset:
    return concatenate_datasets([load_dataset_with_config(entry, use_auth_token=False) for entry in entries])
