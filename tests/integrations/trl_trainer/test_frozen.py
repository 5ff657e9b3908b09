"""The frozen weights are the initial ones: at the start, after a resume, and while training goes on."""

import json

import pytest
import torch
import transformers

pytest.importorskip("trl")

from peft import LoraConfig
from trl_helpers import EOS, LORA, PAD, VOCABULARY, build, logs, tiny

from popsd_integrations.huggingface import forwards
from popsd_integrations.huggingface.frozen import AdapterOff
from popsd_integrations.miniature.tokenizer import build_tokenizer
from popsd_integrations.runs.frozen_weights import FROZEN_FILE
from popsd_integrations.trl_trainer import frozen
from popsd_integrations.trl_trainer.compat import generating
from popsd_integrations.trl_trainer.guards import GuardedTrainer


def saved(folder, model):
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("given", [None, "bfloat16"])
def test_a_bfloat16_checkpoint_gives_student_and_copy_one_dtype(tmp_path, given):
    """TRL loads a student in float32 where no dtype is given, and a teacher as the checkpoint is."""
    path = saved(tmp_path / "model", tiny().bfloat16())
    kwargs = {} if given is None else {"model_init_kwargs": {"dtype": given}}
    trainer = build(tmp_path, model=path, **kwargs)
    expected = torch.float32 if given is None else torch.bfloat16
    assert trainer.model.dtype == trainer.teacher_model.dtype == expected
    same = zip(trainer.model.parameters(), trainer.teacher_model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in same)


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_resumes_from_its_initial_model_only(tmp_path, lora):
    initial = saved(tmp_path / "initial", tiny())
    options = {"lora": lora, "save_strategy": "steps", "save_steps": 1}
    build(tmp_path / "run", model=initial, max_steps=1, **options).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    sums = json.loads((checkpoint / FROZEN_FILE).read_text())
    assert len(sums) == len(list(tiny().parameters())) and all(isinstance(value, int) for value in sums.values())
    wrong = saved(tmp_path / "wrong", tiny(seed=1)) if lora else str(checkpoint)
    with pytest.raises(
        ValueError, match=r"model: expected the initial weights of the run in .*checkpoint-1; got others"
    ):
        build(tmp_path / "run", model=wrong, max_steps=2, **options).train(resume_from_checkpoint=str(checkpoint))
    again = build(tmp_path / "run", model=initial, max_steps=2, **options)
    assert again.train(resume_from_checkpoint=str(checkpoint)).global_step == 2


@pytest.mark.parametrize(
    ("lora", "save"),
    [
        (False, "no"),
        (True, "steps"),
        pytest.param(False, "steps", marks=pytest.mark.slow),
        pytest.param(True, "no", marks=pytest.mark.slow),
    ],
)
def test_frozen_weights_that_move_stop_the_run(tmp_path, lora, save):
    trainer = build(tmp_path, lora=lora, max_steps=3, save_strategy=save, save_steps=2)

    class Mover(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            frozen = trainer.teacher_model or trainer.model
            name = "layers.1.mlp.down_proj" + (".base_layer.weight" if lora else ".weight")
            with torch.no_grad():
                next(p for key, p in frozen.named_parameters() if key.endswith(name))[0, 0] += 1e-3

    trainer.add_callback(Mover())
    with pytest.raises(RuntimeError, match=r"frozen weights: expected those of the start; 1 of \d+ .*down_proj"):
        trainer.train()
    assert trainer.state.global_step == (2 if save == "steps" else 3)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_adapter_put_on_by_transformers_trains(tmp_path):
    model = tiny()
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    trainer = build(tmp_path, model=model, max_steps=2)
    assert trainer.teacher_model is None
    assert isinstance(trainer._frozen_source(), AdapterOff)
    trainer.train()
    assert [row["loss"] > 0 for row in logs(trainer)] == [True, True]


def test_what_check_model_refuses_is_refused_before_training(tmp_path):
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match=r"frozen: expected .* a divergence of 0; .*init_lora_weights='pissa'"):
        build(tmp_path, model=model)
    path = tmp_path / "adapter"
    peft.get_peft_model(tiny(), LORA).save_pretrained(path)
    with pytest.raises(ValueError, match=r"model: expected parameters that require grad; got none.*is_trainable=True"):
        build(tmp_path, model=peft.PeftModel.from_pretrained(tiny(), path))
    assert build(tmp_path, model=tiny(), teacher=tiny(seed=1)).train().global_step == 1, "another teacher may diverge"


def test_the_trainer_pads_where_check_model_says(tmp_path):
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    sizes |= {"intermediate_size": 24, "lru_width": 16, "pad_token_id": PAD, "eos_token_id": EOS}
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(vocab_size=len(VOCABULARY), initializer_range=0.3, **sizes)
    trainer = build(tmp_path, model=transformers.AutoModelForCausalLM.from_config(config), batched_frozen=True)
    trainer._zero3 = True
    with pytest.raises(ValueError, match=r"FSDP and ZeRO-3; RecurrentGemmaForCausalLM must sample prompts by length"):
        trainer._checked_model({"train_dataset": trainer.train_dataset})
    trainer._zero3 = False
    seen, real = [], trainer._packed

    def packed(inputs, context):
        seen.append(real(inputs, context))
        return seen[-1]

    trainer._packed = packed
    trainer.train()
    assert len(seen) == 3 and {batch.side for batch in seen} == {"right"}
    assert all(batch.attention_mask[:, 0].all() for batch in seen)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 8, 7]]
    with generating(trainer, greedy=True):
        found = GuardedTrainer._generate_single_turn(trainer, prompts, None, {})
    for prompt, ids in zip(prompts, found, strict=True):
        own = trainer.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert own.tolist() == ids


def test_a_step_does_not_depend_on_how_its_rows_are_run(tmp_path, monkeypatch):
    monkeypatch.setattr(forwards, "_OF_A_FORWARD", 2)
    found = {}
    for padding_free in (False, True, None):
        trainer = build(tmp_path, lora=True, max_steps=2, padding_free=padding_free, per_device_train_batch_size=8)
        trainer.train()
        found[trainer._layout] = logs(trainer)
    shares = {layout: rows[0].pop("forwards/padding_share") for layout, rows in found.items()}
    assert shares["padded"] > 0.15 and max(shares["packed"], shares["by length"]) < 0.6 * shares["padded"]
    for step, expected in enumerate(found["padded"]):
        assert expected["forwards/tokens_per_second"] > 0
        for name in ("loss", "grad_norm", "target_entropy", "decomposition/cos_total_reference"):
            for layout in ("packed", "by length"):
                assert found[layout][step][name] == pytest.approx(expected[name], rel=2e-4), (layout, name)


def test_weights_that_are_sharded_are_said_not_to_be_checked(tmp_path, monkeypatch, caplog):
    trainer = build(tmp_path, lora=True)
    monkeypatch.setattr(frozen, "is_sharded", lambda parameter: True)
    assert trainer._checked_model({}, False) == ("left", "together", "padded")
    assert "weights of PeftModelForCausalLM are sharded" in caplog.text and "are not checked" in caplog.text
    trainer.args.padding_free = True
    with pytest.raises(ValueError, match=r"padding_free: expected None or False with weights that are sharded already"):
        trainer._checked_model({})
