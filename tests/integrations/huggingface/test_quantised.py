"""Quantised bases under LoRA: the frozen distributions are the quantised base's own, and its bits stay."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from peft import LoraConfig, get_peft_model
from quantised_models import QUANTISED, base_bits, differing, load
from tiny_models import tiny_qwen3

import popsd
from popsd import HiddenStates, oracle
from popsd.testing import relative_l2
from popsd_integrations.huggingface import (
    Prompts,
    check_model,
    frozen_states,
    frozen_weights,
    head_from_model,
    hidden_states,
    pack_contexts,
)
from popsd_integrations.huggingface.frozen import FrozenChecksum

PROMPTS = [Prompts([1, 2, 3], [1, 2, 3, 4, 5], [4, 5]), Prompts([6, 7], [6, 7, 8, 9, 10], [8, 9])]
COMPLETIONS = [[7, 8, 9], [11, 12]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_qwen3(64, tie_word_embeddings=False, initializer_range=0.2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=QUANTISED)
def name(request):
    return request.param


@pytest.fixture
def student(folder, name):
    """Under an adapter that has been trained: its second factor is not zero."""
    model = get_peft_model(load(folder, name), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.eval()


def move(model):
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)


def own_logits(model, batch):
    """What the model's own forward gives for the completion's tokens, [B, T, V]."""
    with torch.no_grad():
        out = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
    return batch.predicting(out)


@pytest.mark.parametrize("training", [True, False], ids=["train mode", "eval mode"])
def test_the_frozen_logits_are_the_quantised_base_s_own(folder, name, student, training):
    """On a CPU those of an 8-bit base depend on its mode, which is then the student's."""
    side = check_model(student.train(training), PROMPTS, frozen_weights(student), pad_token_id=0)
    assert side == "left"
    move(student)
    packed = pack_contexts(PROMPTS, COMPLETIONS, pad_token_id=0, side=side)
    frozen, base = frozen_states(frozen_weights(student), packed), load(folder, name).train(training)
    mask = packed["base"].completion_mask
    logits = [own_logits(base, packed[context]) for context in ("base", "teacher", "reference")]
    for states, expected in zip(frozen[:3], logits, strict=True):
        assert relative_l2(popsd.head_logits(states[mask], frozen.head), expected[mask]) < 1e-6
    assert student.training == training
    moved = own_logits(student, packed["base"])
    assert relative_l2(moved[mask], logits[0][mask]) > 1e-2, "the adapter is off where it must be"
    student_packed = packed["base"]
    states = hidden_states(
        student, student_packed.input_ids, student_packed.attention_mask, student_packed.position_ids
    )
    output = popsd.linear_purified_jsd(
        HiddenStates(student_packed.predicting(states), *frozen[:3]), head_from_model(student), frozen.head
    )
    expected = oracle.purified_jsd(moved, *logits, popsd.PurifiedConfig())
    assert relative_l2(output.loss[mask], expected[mask]) < 1e-4


def test_the_base_s_bits_stay_and_the_checksum_sees_them(name, student):
    source, before = frozen_weights(student), base_bits(student)
    checksum, packed = FrozenChecksum(source), pack_contexts(PROMPTS, COMPLETIONS, pad_token_id=0)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        frozen, batch = frozen_states(source, packed), packed["base"]
        states = hidden_states(student.train(), batch.input_ids, batch.attention_mask, batch.position_ids)
        loss, _ = popsd.PurifiedOPSDLoss()(
            HiddenStates(batch.predicting(states), *frozen[:3]),
            head_from_model(student),
            frozen.head,
            mask=batch.completion_mask,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not differing(before, base_bits(student))
    checksum.check()
    for touched in ("weight", "scales"):
        checksum = FrozenChecksum(source)
        with torch.no_grad():
            _touch(student, name, touched)
        with pytest.raises(RuntimeError, match=r"frozen weights: expected those of the start; 1 of \d+"):
            checksum.check()


def _touch(student, name, what):
    layer = student.get_base_model().model.layers[0].mlp.up_proj.base_layer
    if what == "weight":
        layer.weight.view(torch.uint8)[0] ^= 1
    elif name.startswith("4 bits"):
        layer.weight.quant_state.absmax.view(torch.uint8)[0] ^= 1
    else:
        layer.state.SCB[0] *= 2


@pytest.mark.parametrize("name", ["8 bits"], indirect=True)
def test_outliers_of_a_batch_are_no_padding(folder, name):
    """With a threshold a row's logits depend on the batch by 1 % of the largest, whatever the side."""
    model = get_peft_model(
        load(folder, name, llm_int8_threshold=6.0),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert check_model(model, [Prompts([1, 2], [1, 2, 3, 4], [3, 4])], frozen_weights(model)) == "left"
