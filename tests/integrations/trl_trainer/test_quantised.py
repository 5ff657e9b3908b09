"""The trainer on a base in 4 or 8 bits: from its path and loaded beforehand, its bits, its resume, its refusals."""

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("bitsandbytes")

from datasets import Dataset
from quantised_models import QUANTISED, base_bits, differing, load, quantisation
from trl_helpers import LORA, ROWS, TEMPLATES, FixedTrainer, completion_of, config, logs, tiny

import popsd
from popsd_integrations.huggingface.prompts import ContextBuilder, ContextConfig, Problem
from popsd_integrations.miniature.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny(tied=False).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def build(output, model, **more):
    options = {name: more.pop(name) for name in ("peft_config", "quantization_config") if name in more}
    return FixedTrainer(
        model=model,
        args=config(output, **more),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=build_tokenizer(),
        **({"peft_config": LORA} | options),
    )


def own_losses(base):
    """Per-token losses of all rows on the first step, where the student is the base, from the quantised model's own logits."""
    builder, losses = ContextBuilder(build_tokenizer(), ContextConfig(**TEMPLATES), text_as_chat=False), []
    for row in ROWS:
        prompts = builder.build_all([Problem(row["prompt"], row["privileged_context"])])[0]
        completion = completion_of(prompts.question)
        with torch.no_grad():
            contexts = (prompts.question, prompts.question, prompts.teacher, prompts.reference)
            logits = (base(torch.tensor([x + completion])).logits[0, len(x) - 1 : -1] for x in contexts)
            losses.append(popsd.oracle.purified_jsd(*logits, popsd.PurifiedConfig(beta=0.3)))
    return torch.cat(losses)


def adapter(trainer):
    return {name: x for name, x in trainer.model.named_parameters() if "lora_" in name}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTISED)
def test_it_trains_and_resumes_and_the_base_s_bits_stay(tmp_path, folder, name):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 8}
    given = quantisation(name)
    trainer = build(tmp_path / "a", str(folder), quantization_config=given, **options)
    before, start = base_bits(trainer.model), {n: x.clone() for n, x in adapter(trainer).items()}
    assert trainer.model.is_quantized
    trainer.train()
    assert not differing(before, base_bits(trainer.model))
    assert not differing(before, base_bits(load(folder, name)))
    losses = [row["loss"] for row in logs(trainer)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert losses[0] == pytest.approx(own_losses(load(folder, name).train()).mean().item(), rel=1e-3)
    assert all(not torch.equal(x, start[n]) for n, x in adapter(trainer).items())
    resumed = build(tmp_path / "a", str(folder), quantization_config=given, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert {x.dtype for x in adapter(trainer).values()} == {torch.float32}
    assert not differing(adapter(trainer), adapter(resumed))
    assert logs(resumed)[-1]["loss"] == losses[-1]
    preloaded = build(tmp_path / "b", load(folder, name), **options)
    preloaded.train()
    assert [row["loss"] for row in logs(preloaded)] == losses


def test_options_that_would_do_nothing_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"quantization_config: expected None with a model that is loaded already"):
        build(tmp_path, tiny(), quantization_config=quantisation("4 bits"))
    with pytest.raises(ValueError, match=r"fine-tuning on purely quantized models"):
        build(tmp_path, str(folder), quantization_config=quantisation("4 bits"), peft_config=None)
