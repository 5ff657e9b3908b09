"""From Axolotl's training arguments, and the options under ``popsd:`` in its YAML, to those of popsd's trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import TrainingArguments

from popsd_integrations.trl_trainer import PurifiedOPSDConfig

_OF_ITS_DATA = {
    *("model_type", "chat_template", "max_seq_length", "dataset_num_proc", "sample_packing_bin_size"),
    *("sample_packing_group_size", "sample_packing_efficiency", "multipack_real_batches", "eval_sample_packing"),
    *("label_balance_window_optim_steps", "include_tkps", "qlora", "bench_source_max_len"),
    *("dion_rank_fraction", "dion_rank_multiple_of"),
}
"""Fields of Axolotl that it sets by itself and that say how it tokenises and packs, which it does not do here."""
_REFUSED = {
    "rl": "The plugin brings its own trainer.",
    "sample_packing": "Rows are sampled, not packed.",
    "streaming": "Pass a dataset that is loaded.",
    "pretraining_dataset": "The rows need questions and solutions.",
}


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError for options of Axolotl's YAML that would do nothing here."""
    for name, remedy in _REFUSED.items():
        if config.get(name):
            raise ValueError(f"{name}: expected none with popsd's plugin; got {config[name]!r}. {remedy}")
    for part in ("datasets", "test_datasets"):
        for place, entry in enumerate(config.get(part) or []):
            if entry.get("type"):
                raise ValueError(
                    f"{part}[{place}].type: expected none, since popsd writes the prompts from the columns 'prompt' and "
                    f"'solution' by its own templates; got {entry['type']!r}. Leave it out, and rename columns before."
                )


def trainer_config(arguments: TrainingArguments, options: Mapping[str, Any]) -> PurifiedOPSDConfig:
    """The options of popsd's trainer.

    arguments: Axolotl's. What they share with ``TrainingArguments`` is taken over. options: further fields of
    `PurifiedOPSDConfig`. Raises ValueError for fields of Axolotl's own trainer that are set, for options that are Axolotl's,
    and what `PurifiedOPSDConfig` raises.
    """
    shared = {entry.name: entry for entry in fields(TrainingArguments) if entry.init}
    ignored = {
        entry.name: value
        for entry in fields(arguments)
        if entry.init
        and entry.name not in shared.keys() | _OF_ITS_DATA
        and (value := getattr(arguments, entry.name)) not in (None, False, _default(entry))
    }
    if ignored:
        raise ValueError(
            f"{sorted(ignored)[0]}: expected none, since it is read by Axolotl's own trainer; got {ignored}."
        )
    ours = {entry.name: entry for entry in fields(PurifiedOPSDConfig)}
    if unknown := sorted(options.keys() - (ours.keys() - shared.keys())):
        raise ValueError(
            f"popsd: expected options of PurifiedOPSDConfig that Axolotl has not; got {unknown}. learning_rate, num_epochs, "
            "micro_batch_size and the like stand beside it in the YAML."
        )
    given = {name: getattr(arguments, name) for name in shared}
    # TRL's defaults are others than those of transformers, which Axolotl has where it sets nothing.
    given = {name: value for name, value in given.items() if value != _default(ours[name])}
    return PurifiedOPSDConfig(**given | dict(options))


def _default(entry: Field[Any]) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default
