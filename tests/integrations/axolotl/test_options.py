"""From Axolotl's options to those of popsd's trainer. Axolotl itself is not needed."""

from dataclasses import dataclass

import pytest

pytest.importorskip("trl")

from transformers import TrainingArguments

from popsd_integrations.axolotl_plugin.options import check_config, trainer_config


@dataclass
class Arguments(TrainingArguments):
    """As Axolotl's: transformers' own, and fields that its trainer reads."""

    max_seq_length: int = 2048
    curriculum_sampling: bool | None = None


def arguments(folder, **options):
    return Arguments(str(folder), use_cpu=True, report_to="none", **options)


def test_what_both_have_is_taken_over(tmp_path):
    given = arguments(tmp_path, learning_rate=3e-4, gradient_accumulation_steps=8, max_seq_length=128)
    found = trainer_config(given, {"beta": 0.3, "pmi_beta": 2.0, "max_completion_length": 64})
    assert (found.learning_rate, found.gradient_accumulation_steps, found.output_dir) == (3e-4, 8, str(tmp_path))
    assert (found.beta, found.pmi_beta, found.max_completion_length) == (0.3, 2.0, 64)
    # TRL's defaults differ from these, which Axolotl did not change.
    assert (found.bf16, found.gradient_checkpointing, found.logging_steps) == (False, False, 500)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"curriculum_sampling": True}, {}, "curriculum_sampling: expected none"),
        ({}, {"learning_rate": 1e-5}, r"popsd: .*got \['learning_rate'\]"),
        ({}, {"pmi_betta": 1.0}, r"popsd: .*got \['pmi_betta'\]"),
        ({}, {"beta": 2.0}, "beta"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, given, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_config(arguments(tmp_path, **given), options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rl": "dpo"}, "rl: expected none with popsd's plugin; got 'dpo'"),
        ({"sample_packing": True}, "sample_packing: expected none"),
        ({"datasets": [{"path": "a"}, {"path": "b", "type": "alpaca"}]}, r"datasets\[1\].type: .*got 'alpaca'"),
    ],
)
def test_yaml_that_would_be_ignored_is_refused(config, message):
    check_config({"datasets": [{"path": "a"}]})
    with pytest.raises(ValueError, match=message):
        check_config(config)
