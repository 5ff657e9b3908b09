import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from transformers import TrainerCallback
from trl_helpers import LORA, ROWS, TEMPLATES, FixedTrainer, build, completion_of, config, logs, tiny, trl_loss

import popsd
from popsd.testing import relative_l2
from popsd_integrations.huggingface.heads import hidden_states
from popsd_integrations.huggingface.prompts import ContextBuilder, ContextConfig, Problem
from popsd_integrations.miniature.tokenizer import build_tokenizer
from popsd_integrations.torch_loop import TrainConfig, train
from popsd_integrations.trl_trainer import trainer as trainer_module
from popsd_integrations.trl_trainer.compat import rows_of_data
from popsd_integrations.trl_trainer.trainer import PurifiedOPSDTrainer

LOSS = popsd.PurifiedConfig(beta=0.3)
BATCHINGS = [{"batched_frozen": True}, {"frozen_batch_size": 3}, {"batched_frozen": True, "frozen_batch_size": 5}]


class Gradients(TrainerCallback):
    """The trained parameters' gradients of every step, before clipping touches them (max_grad_norm is 1)."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def problems(rows=ROWS):
    return [Problem(row["prompt"], row["privileged_context"]) for row in rows]


def prompts(rows=ROWS):
    builder = ContextBuilder(build_tokenizer(), ContextConfig(**TEMPLATES), text_as_chat=False)
    return builder.build_all(problems(rows))


def oracle_losses(student, frozen, target, rows=ROWS, skip=0):
    """Per-token losses of all rows, float64, from the models' own logits; differentiable in the student."""
    losses = []
    for row in prompts(rows):
        completion = completion_of(row.question)

        def logits(model, context, completion=completion):
            full = model(input_ids=torch.tensor([context + completion])).logits[0]
            return full[len(context) - 1 + skip : -1]

        with torch.no_grad():
            base, teacher, reference = (logits(frozen, x) for x in (row.question, row.teacher, row.reference))
        own = logits(student, row.question)
        if target == "purified":
            losses.append(popsd.oracle.purified_jsd(own, base, teacher, reference, LOSS))
        else:
            losses.append(popsd.oracle.jsd(own, teacher, LOSS))
    return torch.cat(losses)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("target", ["purified", "opsd"])
def test_loss_and_gradient_of_two_steps_are_the_oracles(tmp_path, target, lora):
    """On the second step the student is no longer the base, and under LoRA the adapter no longer zero."""
    trainer = build(
        tmp_path, lora=lora, loss_target=target, per_device_train_batch_size=8, max_steps=2, max_grad_norm=1e9
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    optimizer = trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
    model = trainer.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    optimizer.state.clear()
    frozen = tiny().eval()
    model.eval()
    for step in range(2):
        loss = oracle_losses(model, frozen, target).mean()
        model.zero_grad()
        loss.backward()
        assert logs(trainer)[step]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert logs(trainer)[step]["divergence"] == pytest.approx(loss.item(), rel=1e-4)
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert expected.keys() == gradients.steps[step].keys()
        found = torch.cat([gradients.steps[step][name].flatten() for name in expected])
        assert relative_l2(found, torch.cat([x.flatten() for x in expected.values()])) < 1e-4
        optimizer.step()
    assert loss > 0.01


def test_the_plain_loop_and_the_trainer_take_the_same_steps(tmp_path):
    trainer = build(tmp_path / "trl", per_device_train_batch_size=8, max_steps=3, max_grad_norm=1.0, markers=["wait"])
    trainer.train()
    options = TrainConfig(
        steps=3, batch_size=8, learning_rate=1e-2, lora_rank=None, max_new_tokens=6, loss=LOSS, decompose_every=1
    )
    rows = train(
        tiny().eval(),
        build_tokenizer(),
        prompts(),
        options,
        output_dir=tmp_path / "loop",
        generate=lambda model, prompts, **_: [completion_of(row) for row in prompts],
        progress=False,
    ).metrics
    assert len(rows) == len(logs(trainer)) == 3
    for row, logged in zip(rows, logs(trainer), strict=True):
        row["entropy"] = row.pop("student_entropy")
        for name in ("loss", "grad_norm", "entropy", "target_entropy", "decomposition/cos_total_reference"):
            assert logged[name] == pytest.approx(row[name], rel=1e-4), name
    assert rows[2]["loss"] != pytest.approx(rows[0]["loss"], rel=1e-2)


def comparable(row):
    skipped = ("step_time", "runtime", "per_second", "padding_share", "epoch")
    return {name: value for name, value in row.items() if not any(word in name for word in skipped)}


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_accumulation_does_not_change_a_step(tmp_path, lora):
    runs = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = build(
            tmp_path,
            lora=lora,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            skip_first_tokens=1,
            diagnostics_steps=2,
        )
        trainer.train()
        runs.append((trainer, dict(trainer.model.named_parameters())))
    whole, parameters = runs[0]
    for trainer, others in runs[1:]:
        for row, other in zip(logs(whole), logs(trainer), strict=True):
            assert comparable(row) == pytest.approx(comparable(other), rel=1e-4, abs=1e-6)
        for name, parameter in parameters.items():
            # Adam makes a step of rounding in an entry whose gradient is all but zero, so the update counts as a whole:
            # 1e-4 of what three steps can move this tensor, 3e-6 in the root mean square over its entries
            reach = trainer.args.learning_rate * 3 * parameter.numel() ** 0.5
            assert (others[name] - parameter).norm() < 1e-4 * reach, name


@pytest.mark.parametrize("lora", [False, True])
def test_skipped_first_tokens_count_nowhere(tmp_path, lora):
    trainer = build(tmp_path, lora=lora, per_device_train_batch_size=8, skip_first_tokens=1)
    trainer.train()
    expected = oracle_losses(tiny().eval(), tiny().eval(), "purified", skip=1)
    assert len(expected) == sum(len(completion_of(row.question)) - 1 for row in prompts())
    assert logs(trainer)[0]["loss"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_a_batch_with_no_token_left_has_no_loss_and_a_run_of_such_batches_fails(tmp_path):
    rows = [row for row in ROWS if len(completion_of(prompts([row])[0].question)) == 1]
    trainer = build(tmp_path, rows=rows * 4, skip_first_tokens=1)
    before = trainer.model.lm_head.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"skip_first_tokens, masks: expected a completion token .*got none in 1 steps"
    ):
        trainer.train()
    assert logs(trainer)[0]["loss"] == 0 and logs(trainer)[0]["grad_norm"] == 0
    assert torch.equal(trainer.model.lm_head.weight, before)


@pytest.mark.parametrize(
    ("options", "lora"),
    [  # each batching once, each kind of training once; the other pairs are slow
        pytest.param(options, lora, marks=() if lora == bool(i) else pytest.mark.slow)
        for i, options in enumerate(BATCHINGS)
        for lora in (False, True)
    ],
)
def test_how_frozen_forwards_are_batched_does_not_matter(tmp_path, lora, options):
    plain, other = build(tmp_path, lora=lora), build(tmp_path, lora=lora, **options)
    plain.train()
    other.train()
    assert comparable(logs(plain)[0]) == pytest.approx(comparable(logs(other)[0]), rel=1e-4, abs=1e-6)


def test_two_distributions_are_trls_own_loss(tmp_path, monkeypatch):
    seen, real = [], trainer_module.student_loss

    def spy(model, loss_fn, packed, frozen, **options):
        with torch.no_grad():
            states = hidden_states(model, packed.input_ids, packed.attention_mask, packed.position_ids)
        weight = model.lm_head.weight.detach().clone()
        seen.append((packed.predicting(states), frozen, packed.completion_mask, weight))
        return real(model, loss_fn, packed, frozen, **options)

    monkeypatch.setattr(trainer_module, "student_loss", spy)
    trainer = build(tmp_path, loss_target="opsd", max_steps=2, beta=0.7)
    trainer.train()
    for row, (states, frozen, mask, weight) in zip(logs(trainer), seen, strict=True):
        loss, entropy, tokens = trl_loss(states, frozen.teacher, weight, frozen.head.weight, mask, 0.7)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["entropy"] == pytest.approx((entropy / tokens).item(), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_autocast_is_on_in_every_forward(tmp_path, lora):
    """TRL's own redirection leaves it off; the model is loaded in float32."""
    trainer = build(tmp_path, lora=lora, bf16=True)
    seen = []
    models = [trainer.model] if lora else [trainer.model, trainer.teacher_model]
    for model in models:
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.down_proj"))
        layer.register_forward_hook(lambda module, args, out: seen.append((out.dtype, torch.is_grad_enabled())))
    exact = build(tmp_path, lora=lora)
    trainer.train()
    exact.train()
    assert seen == [(torch.bfloat16, False)] * 3 + [(torch.bfloat16, True)]
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert logs(trainer)[0]["loss"] == pytest.approx(logs(exact)[0]["loss"], rel=0.1)


def test_dropout_is_off_in_frozen_forwards_and_modes_come_back(tmp_path, caplog):
    lora = LORA.__class__(**{**LORA.to_dict(), "lora_dropout": 0.5})
    modes = []
    with caplog.at_level(logging.WARNING):
        trainer = FixedTrainer(
            model=tiny(attention_dropout=0.5),
            args=config(tmp_path, max_steps=2),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=build_tokenizer(),
            peft_config=lora,
        )
    assert "The student has dropout" in caplog.text
    real = trainer._frozen_states

    def twice(*args):
        first, second = real(*args), real(*args)
        assert torch.equal(first.teacher, second.teacher)
        modes.append({module.training for module in trainer.model.modules()})
        return second

    trainer._frozen_states = twice
    trainer.train()
    assert modes == [{True}, {True}]
    assert all("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_evaluation_measures_and_does_not_train(tmp_path):
    trainer = build(tmp_path, eval_rows=ROWS, eval_strategy="steps", eval_steps=1, max_steps=2, diagnostics_steps=2)
    trainer.train()
    rows = logs(trainer, "eval_loss")
    assert len(rows) == 2
    assert {"eval_entropy", "eval_markers/per_completion", "eval_decomposition/cos_total_reference"} <= rows[0].keys()
    assert ["decomposition/total_norm" in row for row in logs(trainer)] == [True, False]
    untouched = build(tmp_path, eval_rows=ROWS, per_device_eval_batch_size=8)
    expected = oracle_losses(tiny().eval(), tiny().eval(), "purified").mean().item()
    assert untouched.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_evaluation_does_not_depend_on_the_size_of_its_batches(tmp_path):
    """Five rows with completions of one to four tokens. The same numbers as means over all tokens, or all completions."""
    trainer = build(tmp_path, eval_rows={"a": ROWS[:5], "b": ROWS[5:]}, skip_first_tokens=1, masks={"floor": 0.3})
    found, skipped = [], ("second", "runtime", "padding_share")
    for size in (5, 4, 2, 1):
        trainer.args.per_device_eval_batch_size = size
        found.append({n: x for n, x in trainer.evaluate().items() if not any(w in n for w in skipped)})
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-6)
    expected = oracle_losses(tiny().eval(), tiny().eval(), "purified", rows=ROWS[:5], skip=1).mean().item()
    assert found[0]["eval_a_loss"] == found[0]["eval_a_divergence"] == pytest.approx(expected, rel=1e-4)
    assert found[0]["eval_a_completions/mean_length"] == 1.8 != found[0]["eval_b_completions/mean_length"]
    assert found[0]["eval_a_masks/kept_share"] == 1.0
    assert (found[0]["eval_a_completions/min_length"], found[0]["eval_a_completions/max_length"]) == (1, 3)
    assert not any(name.startswith("eval_divergence") for name in found[0]), "whose would it be"


def test_rows_that_fill_the_last_batch_of_an_evaluation_count_once(tmp_path):
    """Two processes with two rows each evaluate five: the last batch holds row 4, and rows 0, 1 and 2 again."""
    trainer = build(tmp_path, eval_rows=ROWS)
    trainer.model.eval()
    state = SimpleNamespace(end_of_dataloader=False, remainder=1)
    accelerator = SimpleNamespace(gradient_state=state, process_index=0)
    fake = SimpleNamespace(accelerator=accelerator, model=trainer.model)

    def rows():
        counts = []
        for accelerator.process_index in (0, 1):
            counts.append(rows_of_data(fake, 2))
        return counts

    assert rows() == [2, 2]
    state.end_of_dataloader = True
    assert rows() == [1, 0]
    state.remainder = 3
    assert rows() == [2, 1]
    trainer.model.train()
    assert rows() == [2, 2]


@pytest.mark.parametrize(
    ("step", "options"),
    [  # from a step between two evaluations and from one at its end; the other pairs are slow
        (3, {"lora": True}),
        (2, {"frozen_weights": "ema"}),
        *(
            pytest.param(step, options, marks=pytest.mark.slow)
            for step, options in (
                (2, {"lora": True}),
                (2, {}),
                (3, {}),
                (2, {"frozen_weights": "ema", "lora": True}),
                (3, {"frozen_weights": "ema", "lora": True}),
                (3, {"frozen_weights": "ema"}),
            )
        ),
    ],
)
def test_resumed_run_is_the_unbroken_run(tmp_path, options, step):
    """At the end of an epoch and amid one. Completions are sampled: the random state must come back too."""
    common = {"cls": PurifiedOPSDTrainer, "max_steps": 6, "shuffle_dataset": True, "ema_decay": 0.5}
    common |= {"save_strategy": "steps", "save_steps": 1}
    unbroken = build(tmp_path / "a", **common, **options)
    unbroken.train()
    resumed = build(tmp_path / "a", **common, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    for name, parameter in unbroken.model.named_parameters():
        assert torch.equal(parameter, dict(resumed.model.named_parameters())[name]), name
    last, again = (comparable(logs(trainer)[-1]) for trainer in (unbroken, resumed))
    assert {n: x for n, x in last.items() if n != "num_tokens"} == {n: x for n, x in again.items() if n != "num_tokens"}
    if "frozen_weights" in options:
        for name, average in unbroken._ema.state_dict().items():
            assert torch.equal(average, resumed._ema.state_dict()[name])
        (tmp_path / "a" / f"checkpoint-{step}" / "popsd_ema.pt").unlink()
        with pytest.raises(ValueError, match="expected the moving average in"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))


def test_a_teacher_of_ones_own(tmp_path):
    trainer = FixedTrainer(
        model=tiny(),
        teacher_model=tiny(seed=5),
        args=config(tmp_path, per_device_train_batch_size=8),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=build_tokenizer(),
    )
    trainer.train()
    expected = oracle_losses(tiny().eval(), tiny(seed=5).eval(), "purified").mean().item()
    assert logs(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_model_given_by_its_path_is_loaded_twice(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    trainer = FixedTrainer(
        model=str(tmp_path / "model"),
        args=config(tmp_path, model_init_kwargs={"dtype": torch.bfloat16}, per_device_train_batch_size=8),
        train_dataset=Dataset.from_list(ROWS),
    )
    trainer.train()
    assert trainer.teacher_model.dtype == trainer.model.dtype == torch.bfloat16
    assert not torch.equal(trainer.teacher_model.lm_head.weight, trainer.model.lm_head.weight)
    expected = oracle_losses(tiny().eval(), tiny().eval(), "purified").mean().item()
    assert logs(trainer)[0]["loss"] == pytest.approx(expected, rel=0.1)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    rows = []
    for checkpointing in (False, True):
        trainer = build(tmp_path, lora=True, gradient_checkpointing=checkpointing)
        trainer.train()
        rows.append(comparable(logs(trainer)[0]))
    assert rows[0] == pytest.approx(rows[1], rel=1e-4, abs=1e-6)
