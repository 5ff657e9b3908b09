"""Every option of the command line has a test that shows its effect or its refusal, named here."""

import ast
import re
from pathlib import Path

import pytest

from popsd_integrations import cli
from popsd_integrations.commandline.options import own_options

TESTS = Path(__file__).parents[1]
TRAINER = "integrations/trl_trainer"
EVALUATE, GIVEN = "integrations/evaluate/test_command.py", "integrations/evaluate/test_given.py"
SHOWN = {
    "train": {
        f"{TRAINER}/test_generations.py::test_a_step_takes_all_completions_of_its_prompts_and_runs_resume": "num_generations",
        f"{TRAINER}/test_frozen.py::test_a_step_does_not_depend_on_how_its_rows_are_run": "padding_free",
        f"{TRAINER}/test_command.py::test_bad_flags_are_an_exit_status_and_a_message": "prompt_column device dry_run",
        f"{TRAINER}/test_command.py::test_a_wrong_hint_comes_from_a_column_and_joins_the_dry_run": "wrong_solution_column",
        f"{TRAINER}/test_command.py::test_answers_come_from_a_column_and_the_end_says_how_to_go_on": "answer_column",
        f"{TRAINER}/test_command.py::test_a_question_given_as_text_is_a_users_message": "text_as_conversation",
        f"{TRAINER}/test_command.py::test_a_target_and_its_numbers_are_flags": "loss_target target_parameters",
        f"{TRAINER}/test_config.py::test_an_option_of_the_loss_reaches_it": "beta token_clip entry_clip vocab_size pmi_beta "
        "pmi_clip plausibility impl strategy workspace_mib",
        f"{TRAINER}/test_config.py::test_caps_weights_and_prompts_are_what_the_options_say": "tail_floor tail_cap "
        "position_weights question_template teacher_template reference_template reference teacher_reference "
        "max_prompt_length on_overflow teacher_chat_template_kwargs reference_chat_template_kwargs",
        f"{TRAINER}/test_config.py::test_defaults_are_the_papers": "learning_rate max_completion_length loss_temperature "
        "loss_kwargs",
        f"{TRAINER}/test_trainer.py::test_skipped_first_tokens_count_nowhere": "skip_first_tokens",
        f"{TRAINER}/test_targets.py::test_protected_markers_are_the_tokenizers": "protect_markers markers masks",
        f"{TRAINER}/test_callbacks.py::test_the_moving_average_follows_the_student": "frozen_weights ema_decay",
        f"{TRAINER}/test_callbacks.py::test_metrics_plot_and_completions_are_written": "plot_metrics",
        f"{TRAINER}/test_frozen.py::test_the_trainer_pads_where_check_model_says": "batched_frozen",
        f"{TRAINER}/test_waits.py::test_a_micro_batch_is_packed_without_a_wait": "frozen_batch_size",
        f"{TRAINER}/test_trainer.py::test_accumulation_does_not_change_a_step": "diagnostics_steps",
        f"{TRAINER}/test_accuracy.py::test_several_sets_have_accuracies_of_their_own": "eval_problems",
        f"{TRAINER}/test_accuracy.py::test_accuracy_is_the_scorers_and_completions_are_logged": "eval_scorer "
        "eval_max_completion_length",
        "integrations/test_init.py::test_the_file_passes_the_dry_run_as_it_is": "solution_column",
    },
    "diagnose": {
        "integrations/diagnose/test_diagnose.py::test_the_command_on_the_miniature": "diagnose_problems diagnose_dir cache_dir",
    },
    "init": {
        "integrations/test_init.py::test_the_file_passes_the_dry_run_as_it_is": "model data output",
        "integrations/test_init.py::test_other_splits_columns_and_devices": "prompt_column solution_column device",
        "integrations/test_init.py::test_data_that_will_not_do_is_refused_and_nothing_is_written": "dataset_config "
        "dataset_train_split",
    },
    "evaluate": {
        f"{EVALUATE}::test_every_checkpoint_answers_every_problem_beside_the_base": "adapters",
        f"{EVALUATE}::test_more_samples_and_checkpoints_are_added": "num_generations",
        f"{GIVEN}::test_prompts_and_problems_are_what_the_options_say": "prompt_column answer_column dataset_test_split "
        "seed question_template system_prompt chat_template_kwargs use_vllm model_name_or_path benchmarks",
        f"{EVALUATE}::test_the_sampling_options_reach_the_model": "top_k",
        f"{GIVEN}::test_bad_input_is_named_before_anything_is_generated": "temperature top_p max_completion_length "
        "per_device_eval_batch_size",
        f"{EVALUATE}::test_two_settings_never_mix_in_one_folder": "model_init_kwargs",
        f"{EVALUATE}::test_judging_again": "from eval_scorer output_dir",
    },
    "doctor": {},
    "examples": {"integrations/test_examples_command.py::test_an_example_is_copied_once": "name output_dir"},
    "compare": {
        "integrations/evaluate/test_compare.py::test_bad_input_is_named": "runs",
        "integrations/evaluate/test_compare.py::test_curves_of_loop_and_trainer_stand_beside_one_another": "output_dir",
    },
    "demo": {
        "integrations/test_cli.py::test_demo_passes_options_on_and_writes_the_report": "output_dir num_seeds use_peft "
        "warmup_seed num_processes",
        "integrations/test_cli.py::test_demo_without_matplotlib_skips_the_plots_and_says_so": "max_steps cache_dir",
    },
}
"""The options that a test shows, of each command. Those of ``popsd bench`` are in tests/benchmarks and test_cli.py."""


def options_of(command):
    if command == "train":
        return set(own_options())
    actions = cli.build_parser()[1][command]._actions
    names = [name for x in actions for name in x.option_strings or [f"--{(x.metavar or x.dest).lower()}"]]
    return {name.removeprefix("--") for name in names if name.startswith("--")} - {"help"}


def texts_of(file):
    """The source of each test, with what stands outside of functions: tables of cases, helpers of one line."""
    source = (TESTS / file).read_text(encoding="utf-8")
    lines, nodes = source.splitlines(), ast.parse(source).body
    tests = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    inside = {n for node in tests for n in range(_first(node), node.end_lineno + 1)}
    outside = "\n".join(line for number, line in enumerate(lines, start=1) if number not in inside)
    return {node.name: outside + "\n".join(lines[_first(node) - 1 : node.end_lineno]) for node in tests}


def _first(node):
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


@pytest.mark.parametrize("command", [name for name in cli.build_parser()[1] if name != "bench"])
def test_every_option_has_a_test(command):
    shown = SHOWN[command]
    named = " ".join(shown.values()).split()
    missing = sorted(options_of(command) - set(named))
    assert not missing, f"popsd {command}: name a test in SHOWN that shows the effect or the refusal of {missing}"
    for test, options in shown.items():
        file, _, name = test.partition("::")
        texts = texts_of(file)
        assert name in texts, f"there is no {test}"
        for option in options.split():
            assert re.search(rf"\b{option.replace('_', '[_-]')}\b", texts[name]), f"{test} does not name {option}"


def test_a_test_that_is_missing_is_seen():
    assert {"dry_run", "beta", "pmi_beta"} <= options_of("train") and "num_generations" in options_of("evaluate")
    assert not options_of("doctor") and "runs" in options_of("compare")
    texts = texts_of("integrations/test_options.py")
    assert "SHOWN = {" in texts["test_every_option_has_a_test"] and set(texts) == {
        "test_every_option_has_a_test",
        "test_a_test_that_is_missing_is_seen",
    }
