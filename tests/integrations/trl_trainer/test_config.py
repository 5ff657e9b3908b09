"""What the trainer's configuration and its look at the data refuse, drop and point out."""

import logging

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset
from trl_helpers import CHAT_TEMPLATE, LORA, ROWS, FixedTrainer, build, config, logs, tiny

import popsd
from popsd_integrations.huggingface.prompts import Problem
from popsd_integrations.miniature.tokenizer import build_tokenizer
from popsd_integrations.trl_trainer import PurifiedOPSDConfig, PurifiedOPSDTrainer, dataset


def conversation(question, *history):
    return [*history, {"role": "user", "content": question}]


def test_conversations_take_the_chat_template_with_kwargs_of_their_own(tmp_path, caplog):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    system = {"role": "system", "content": "0"}
    rows = [{"prompt": conversation(f"{a} 5", system), "solution": f"WAIT {a}"} for a in range(4)]
    seen = []

    class Spy(FixedTrainer):
        def _generate_and_score_completions(self, inputs):
            seen.append(super()._generate_and_score_completions(inputs))
            return seen[-1]

    trainer = build(
        tmp_path,
        rows=rows,
        cls=Spy,
        tokenizer=tokenizer,
        chat_template_kwargs={"enable_thinking": True},
        reference_chat_template_kwargs='{"enable_thinking": false}',
    )
    trainer.train()
    texts = [
        tokenizer.decode(seen[0][name][0]) for name in ("prompt_ids", "teacher_prompt_ids", "reference_prompt_ids")
    ]
    assert texts == ["SEP 0 Q 0 5 A CHECK", "SEP 0 Q 0 5 R WAIT 0 OK A A CHECK", "SEP 0 Q R WAIT 0 OK A A"]


def test_prompts_that_end_in_different_thinking_states_are_pointed_out(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(dataset, "thinking_states", lambda *_: {"question": "none", "teacher": "open"})
    with caplog.at_level(logging.WARNING):
        build(tmp_path)
    assert "different thinking states" in caplog.text


LONG = {"prompt": "Q 1 2 A", "privileged_context": "1 2 3 4 5 6 7 8 9"}


def test_prompts_too_long_are_dropped_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = build(tmp_path, rows=[LONG, *ROWS], max_prompt_length=12, on_overflow="drop", max_steps=2)
    assert "of 9 problems 1 are dropped and 0 have their solution cut" in caplog.text
    assert [row["prompt"] for row in trainer.train_dataset] == [row["prompt"] for row in ROWS]
    trainer.train()
    stream = IterableDataset.from_generator(lambda: iter([LONG, *ROWS]))
    trainer = FixedTrainer(
        model=tiny(),
        args=config(tmp_path, max_prompt_length=12, on_overflow="drop", max_steps=2),
        train_dataset=stream,
        processing_class=build_tokenizer(),
    )
    trainer.train()
    assert logs(trainer)[-1]["contexts/dropped"] == 1


def test_truncation_cuts_the_solution_alone(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = build(tmp_path, rows=[LONG] * 4, max_prompt_length=12, on_overflow="truncate")
    assert "4 have their solution cut" in caplog.text
    row = trainer._prompts(Problem(*LONG.values()))
    assert trainer.processing_class.decode(row.teacher) == "Q 1 2 A R 1 2 3 4 5 OK A"
    trainer.train()
    assert logs(trainer)[0]["contexts/truncated"] == 5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "Q 1 A"}], r"train_dataset: expected the columns 'prompt' and one of .*; got \['prompt'\]"),
        ([{"question": "Q", "solution": "1"}], r"train_dataset: expected the columns"),
        (
            [*ROWS, {"prompt": "Q 1 A", "privileged_context": " "}],
            r"train_dataset, row 8: solution: expected non-empty",
        ),
        ([*ROWS, {"prompt": "", "privileged_context": "1"}], r"row 8: question: expected non-empty text"),
        (
            [{"prompt": conversation("1"), "solution": "1"}],
            r"row 0: question: expected text, since .* no chat_template",
        ),
        ([*ROWS, LONG], r"row 8: max_prompt_length: expected prompts of at most 12 tokens"),
    ],
)
def test_bad_data_is_refused_at_construction(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, rows=rows, max_prompt_length=12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 2.0}, "beta"),
        ({"pmi_beta": 0.0}, "pmi_beta: expected a positive"),
        ({"pmi_clip": -1.0}, "pmi_clip: expected a positive"),
        ({"loss_target": "purple"}, "loss_target: expected one of"),
        ({"skip_first_tokens": 6}, "max_completion_length: expected more than skip_first_tokens"),
        ({"skip_first_tokens": -1}, "skip_first_tokens: expected at least 0"),
        ({"frozen_batch_size": 0}, "frozen_batch_size: expected at least 1"),
        ({"frozen_weights": "melted"}, "frozen_weights: expected 'initial' or 'ema'"),
        ({"ema_decay": 1.5}, "ema_decay: expected a number in"),
        ({"teacher_template": "{question}"}, "teacher_template: expected the fields"),
        ({"reference_template": "{question} {solution}"}, "reference_template: expected the fields"),
        ({"on_overflow": "shrug"}, "on_overflow: expected"),
        ({"impl": "fortran"}, "fortran"),
        ({"loss_kwargs": {"purity": 1}}, r"loss_kwargs: expected some of .*'exact_difference'.*; got \['purity'\]"),
        ({"loss_kwargs": {"beta": 1}}, "loss_kwargs: expected some of"),
        ({"pmi_clip": "hard"}, "pmi_clip: expected a number, auto or none; got 'hard'"),
        ({"workspace_mib": -1.0}, "workspace_mib: expected a positive number"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: expected at least 1; got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected at least 1; got 0"),
        ({"learning_rate": -1.0}, "learning_rate: expected at least 0"),
        ({"top_p": 2.0}, r"top_p: expected a number in \(0, 1\]"),
        ({"markers": []}, "words: expected at least one marker"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
    ],
)
def test_bad_options_are_refused_by_the_configuration(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_what_the_trainer_cannot_do_is_refused(tmp_path):
    with pytest.raises(TypeError, match="args: expected a PurifiedOPSDConfig"):
        PurifiedOPSDTrainer(tiny(), args=object())
    with pytest.raises(ValueError, match="teacher_model: expected None with frozen_weights='ema'"):
        PurifiedOPSDTrainer(tiny(), args=config(tmp_path, frozen_weights="ema"), teacher_model=tiny())
    head = LORA.__class__(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="lm_head"):
        FixedTrainer(tiny(), config(tmp_path), Dataset.from_list(ROWS), None, build_tokenizer(), peft_config=head)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("beta", 0.25), ("token_clip", 0.1), ("entry_clip", 0.2), ("vocab_size", 20), ("pmi_beta", 2.0)),
        *(
            ("pmi_clip", 3.0),
            ("plausibility", 0.1),
            ("impl", "torch"),
            ("strategy", "streaming"),
            ("workspace_mib", 8.0),
        ),
    ],
)
def test_an_option_of_the_loss_reaches_it(tmp_path, option, value):
    loss, plain = config(tmp_path, **{option: value}).loss_function(), config(tmp_path).loss_function()
    found, before = (getattr(x if hasattr(x, option) else x.config, option) for x in (loss, plain))
    assert found == value != before


def test_caps_weights_and_prompts_are_what_the_options_say(tmp_path):
    made = config(
        tmp_path, tail_floor=0.1, tail_cap=0.5, position_weights={"first": 0.5}, chat_template_kwargs={"a": 1}
    )
    assert (made.loss_function().config.tail_floor, made.loss_function().config.tail_cap) == (0.1, 0.5)
    weights = made.token_weights(torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(weights, popsd.presets.position_weights(torch.ones(1, 3, dtype=torch.bool), first=0.5))
    given = {"question_template": "{question}!", "teacher_template": "{solution}: {question}", "reference": "none"}
    given |= {"reference_template": "{solution}?", "teacher_reference": "other_problem", "max_prompt_length": 9}
    given |= {"on_overflow": "drop"}
    contexts = config(tmp_path, **given).context_config()
    assert {name: getattr(contexts, name) for name in given} == given
    kwargs = {"teacher_chat_template_kwargs": {"b": 2}, "reference_chat_template_kwargs": {"c": 3}}
    contexts = config(tmp_path, chat_template_kwargs={"a": 1}, **kwargs).context_config()
    assert (contexts.student_kwargs, contexts.teacher_kwargs, contexts.reference_kwargs) == (
        {"a": 1},
        {"b": 2},
        {"c": 3},
    )


def test_defaults_are_the_papers(tmp_path):
    options = PurifiedOPSDConfig(str(tmp_path), use_cpu=True, bf16=False)
    loss = options.loss_function()
    assert loss.config == popsd.PurifiedConfig() and loss.loss_target == "purified"
    assert config(tmp_path, loss_kwargs='{"exact_difference": true}').loss_function().config.exact_difference
    assert (options.learning_rate, options.max_completion_length) == (5e-6, 1024)
    assert config(tmp_path, temperature=1.2).loss_function().config.temperature == 1.2
    assert config(tmp_path, temperature=1.2, loss_temperature=1.0).loss_function().config.temperature == 1.0
