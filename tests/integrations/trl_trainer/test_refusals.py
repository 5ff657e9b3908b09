"""Options that would do nothing or train on the wrong tokens, and runs that would take no step."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl_helpers import EOS, LORA, PAD, ROWS, FixedTrainer, build, config, logs, tiny

from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer
from popsd_integrations.trl_trainer import compat
from popsd_integrations.trl_trainer.dataset import fingerprint
from popsd_integrations.trl_trainer.trainer import PurifiedOPSDTrainer, problem_of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_kwargs": {"n": 2}}, r"generation_kwargs: expected no 'n'; got 2\. num_generations samples"),
        (
            {"generation_kwargs": '{"num_return_sequences": 2}'},
            r"generation_kwargs: expected no 'num_return_sequences'",
        ),
        ({"generation_kwargs": {"eos_token_id": 3}}, r"generation_kwargs: expected no 'eos_token_id'; got 3"),
        (
            {"generation_kwargs": {"max_tokens": 3}},
            r"generation_kwargs: expected no 'max_tokens'; got 3\. Set max_comp",
        ),
        ({"generation_kwargs": {"stop_strings": ["."]}}, r"generation_kwargs: expected no 'stop_strings'"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor: expected 0\.0; got 0\.1\. The loss compares"),
        ({"train_sampling_strategy": "sequential"}, r"train_sampling_strategy: expected 'random'; got 'sequential'"),
        ({"teacher_model_name_or_path": "x"}, r"teacher_model_name_or_path: expected None; got 'x'\. The teacher is"),
        ({"max_tool_calling_iterations": 3}, r"max_tool_calling_iterations: expected None; got 3"),
    ],
)
def test_options_that_do_harm_or_nothing_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "options", [{"teacher_model_init_kwargs": {"dtype": "float32"}}, {"teacher_model_revision": "x"}]
)
def test_options_of_a_teacher_that_is_not_loaded_are_refused(tmp_path, options, lora):
    (name,) = options
    with pytest.raises(ValueError, match=rf"{name}: expected None; got .*a teacher_model given by its path"):
        build(tmp_path, lora=lora, **options)


def saved(folder):
    tiny().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def test_options_of_a_teacher_given_by_its_path_apply(tmp_path):
    args = config(tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"})
    trainer = FixedTrainer(
        model=tiny(),
        teacher_model=saved(tmp_path / "teacher"),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=build_tokenizer(),
    )
    assert trainer.teacher_model.dtype == torch.bfloat16


def test_the_same_options_build_another_trainer(tmp_path):
    path = saved(tmp_path / "model")
    args = config(tmp_path, model_init_kwargs={"dtype": torch.float32})
    before = copy.deepcopy(vars(args))
    losses = []
    for _ in range(2):
        trainer = FixedTrainer(model=path, args=args, train_dataset=Dataset.from_list(ROWS))
        trainer.train()
        losses.append(logs(trainer)[0]["loss"])
        assert vars(args)["teacher_model_init_kwargs"] is None
        assert vars(args)["model_init_kwargs"] == before["model_init_kwargs"]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize(
    "options", [pytest.param({"max_steps": 5}, marks=pytest.mark.slow), {"max_steps": -1, "num_train_epochs": 2}]
)
def test_fewer_rows_than_a_step_needs_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=r"train_dataset: expected at least the 4 rows of one step .*; got 3"):
        build(tmp_path, rows=ROWS[:3], **options).train()
    with pytest.raises(ValueError, match=r"train_dataset: expected at least the 16 rows of one step .*; got 8"):
        build(tmp_path, gradient_accumulation_steps=4, **options).train()
    assert build(tmp_path, rows=ROWS[:4]).train().global_step == 1


def test_a_stream_that_gives_no_step_is_an_error(tmp_path):
    def trainer(length):
        return FixedTrainer(
            model=tiny(),
            args=config(tmp_path, max_prompt_length=length, on_overflow="drop"),
            train_dataset=Dataset.from_list(ROWS).to_iterable_dataset(),
            processing_class=build_tokenizer(),
        )

    with pytest.raises(ValueError, match=r"train_dataset: expected rows for at least one step; got a run without one"):
        trainer(2).train()
    assert trainer(20).train().global_step == 1


def test_completions_are_the_students_whatever_its_checkpoint_recommends(tmp_path):
    """Greedy, so that they can be computed here; the settings would shorten, repeat or forbid tokens."""
    hostile = {
        "suppress_tokens": [1, 2, 3, 4],
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 6,
        "sequence_bias": [[[4], 10.0]],
        "num_return_sequences": 2,
        "guidance_scale": 3.0,
    }
    model = tiny()
    for name, value in hostile.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    options = {"generation_kwargs": {"do_sample": False}, "max_completion_length": 6}
    trainer = build(tmp_path, model=model, cls=PurifiedOPSDTrainer, **options)
    trainer.model.eval()
    batch = trainer._generate_and_score_completions(ROWS[:4])
    assert trainer.model.generation_config is own, "it is saved with the model"
    for row, ids, mask in zip(ROWS, batch["completion_ids"], batch["completion_mask"], strict=False):
        prompt = trainer._prompts(problem_of(row)).question
        expected = list(prompt)
        while len(expected) < len(prompt) + 6 and (expected == prompt or expected[-1] != EOS):
            with torch.no_grad():
                expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
        assert ids[mask.bool()].tolist() == expected[len(prompt) :]
    assert (batch["completion_ids"][batch["completion_mask"] == 0] == PAD).all()


def test_tokens_that_the_loss_has_not_are_not_sampled(tmp_path):
    """The loss uses four rows of the head; the likeliest tokens are among the others."""
    options = {"vocab_size": 4, "generation_kwargs": {"suppress_tokens": [2]}, "max_completion_length": 6}
    with pytest.raises(ValueError, match=r"vocab_size: expected more than an end-of-sequence token"):
        build(tmp_path, **options)
    model = tiny()
    model.generation_config.eos_token_id = [EOS, 1]
    trainer = build(tmp_path, model=model, cls=PurifiedOPSDTrainer, **options)
    batch = trainer._generate_and_score_completions(ROWS)
    sampled = set(batch["completion_ids"][batch["completion_mask"] == 1].tolist())
    assert sampled <= {0, 1, 3} and len(sampled) > 1
    vllm = trainer.vllm_generation = SimpleNamespace(generation_kwargs={"seed": 1})
    trainer.use_vllm = True
    compat.suppress_unused_tokens(trainer, 4)
    assert vllm.generation_kwargs == {"seed": 1, "allowed_token_ids": [0, 1, 2, 3]}
    vllm.generation_kwargs = {"allowed_token_ids": [3, 9]}
    compat.suppress_unused_tokens(trainer, 4)
    assert vllm.generation_kwargs == {"allowed_token_ids": [3]}
    with pytest.raises(ValueError, match=r"generate: expected tokens below vocab_size=4; got 19 in completion"):
        build(tmp_path, model=model, vocab_size=4).train()  # a generation that knows nothing of it


def test_a_checkpoint_of_a_run_with_other_options_is_not_resumed(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    build(tmp_path, **saving, seed=3).train()
    other = build(tmp_path, **saving, seed=3, max_steps=2, loss_target="opsd", teacher_template="{question} {solution}")
    for resume in (True, None):  # None would write over the other run's checkpoints
        with pytest.raises(
            ValueError, match=r"output_dir: .*loss_target 'purified' \(now 'opsd'\), .*teacher_template '"
        ) as raised:
            other.train(resume_from_checkpoint=resume)
        assert "seed" not in str(raised.value)
    same = build(tmp_path, **saving, seed=3, max_steps=2, diagnostics_steps=0, impl="torch")
    assert same.train(resume_from_checkpoint=True).global_step == 2


def test_a_run_with_other_data_or_another_adapter_is_another_run(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "protect_markers": True}
    build(tmp_path, **saving, lora=True).train()
    again = {
        r"train_dataset '8 rows, \w+' \(now '8 rows, ": {"rows": [*ROWS[:-1], ROWS[0]]},
        r"max_grad_norm 1\.0 \(now 0\.5\)": {"max_grad_norm": 0.5},
        r"markers \[.*\(now \['OK'\]\)": {"markers": ["OK"]},
        r"output_dir: .* to start at step 0 in; got .*checkpoint-1.*resume_from_checkpoint=True": {},
    }
    for message, options in again.items():
        with pytest.raises(ValueError, match=message):
            build(tmp_path, **saving, lora=True, **options).train()
    adapter = copy.deepcopy(LORA)
    adapter.lora_alpha, adapter.target_modules = 16, ["q_proj"]
    data = {"train_dataset": Dataset.from_list(ROWS), "processing_class": build_tokenizer()}
    other = FixedTrainer(model=tiny(), args=config(tmp_path, **saving, max_steps=2), peft_config=adapter, **data)
    with pytest.raises(ValueError, match=r"\['default'\]\.lora_alpha 8 \(now 16\), trained tensors '28"):
        other.train(resume_from_checkpoint=True)


def test_a_vocabulary_larger_than_the_head_is_refused_at_construction(tmp_path):
    with pytest.raises(ValueError, match=rf"vocab_size: expected at most {len(VOCABULARY)}, the rows of the .*Leave"):
        build(tmp_path, vocab_size=151669)


def test_data_is_told_by_a_part_of_it():
    rows = [{"prompt": str(row), "solution": "x"} for row in range(1000)]
    known = fingerprint(Dataset.from_list(rows))
    assert known.startswith("1000 rows, ") and known == fingerprint(Dataset.from_list(rows).add_column("n", rows))
    assert known != fingerprint(Dataset.from_list([*rows[:-1], {"prompt": "999", "solution": "y"}]))
    stream = Dataset.from_list(rows).to_iterable_dataset()
    assert fingerprint(stream) == "a stream with the columns ['prompt', 'solution']"
