import pytest
import torch
from tiny_models import tiny_qwen3

from popsd_integrations.huggingface.frozen import EMA, AdapterOff, FrozenCopy, frozen_states, frozen_weights
from popsd_integrations.huggingface.heads import eval_mode, head_from_model, hidden_states
from popsd_integrations.huggingface.packing import pack, pack_contexts
from popsd_integrations.huggingface.prompts import Prompts

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

PROMPTS = [Prompts([3, 4, 5], [3, 4, 5, 9, 8, 7], [9, 8, 7]), Prompts([6], [6, 11, 12], [11, 12])]
COMPLETIONS = [[10, 20], [30, 31, 32]]
PACKED = pack_contexts(PROMPTS, COMPLETIONS, pad_token_id=0)


def tiny(dropout=0.0):
    return tiny_qwen3(40, attention_dropout=dropout, initializer_range=0.3).eval()


def lora(model, **options):
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"], **options)
    return peft.get_peft_model(model, config).eval()


def alone(model, prompt, completion):
    """States that predict the completion of a single row, without any padding."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        return hidden_states(model, ids)[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", ["adapter", "copy"])
def test_states_are_those_of_each_row_alone_under_the_frozen_weights(kind, batched):
    base = tiny()
    expected = {
        (name, row): alone(base, getattr(PROMPTS[row], context), COMPLETIONS[row])
        for name, context in (("base", "question"), ("teacher", "teacher"), ("reference", "reference"))
        for row in range(2)
    }
    weight = base.lm_head.weight.detach().clone()
    model = lora(base, modules_to_save=["lm_head"]) if kind == "adapter" else base
    source = frozen_weights(model)
    assert isinstance(source, AdapterOff if kind == "adapter" else FrozenCopy)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    states = frozen_states(source, PACKED, batched=batched)
    for (name, row), value in expected.items():
        found = getattr(states, name)
        assert found.shape == (2, 3, 32)
        assert not found.requires_grad
        torch.testing.assert_close(found[row, : len(value)], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.head.weight, weight)
    assert not torch.equal(head_from_model(model).weight, weight)
    moved = alone(model, PROMPTS[0].question, COMPLETIONS[0])
    assert (moved - expected["base", 0]).abs().max() > 1e-2


def test_only_the_contexts_asked_for_are_run():
    states = frozen_states(FrozenCopy(tiny()), PACKED, ["teacher"])
    assert states.base is None and states.reference is None and states.teacher.shape == (2, 3, 32)
    for wrong in (["base"], ["teacher", "student"], []):
        with pytest.raises(ValueError, match=r"contexts: expected the teacher and others of"):
            frozen_states(FrozenCopy(tiny()), PACKED, wrong)


def test_contexts_that_cannot_hold_the_same_completions_are_refused():
    short = {"base": pack([[3], [6]], [[10, 20], [30, 31]], pad_token_id=0)}
    fewer = {"base": pack([[3]], [[30, 31, 32]], pad_token_id=0)}
    for other in (short, fewer):
        with pytest.raises(ValueError, match=r"packed: expected the same completions in every context; got .*'base'"):
            frozen_states(FrozenCopy(tiny()), PACKED | other)
    with pytest.raises(ValueError, match=r"contexts: expected the teacher and others of \['base'\], which are packed"):
        frozen_states(FrozenCopy(tiny()), short)


def test_adapter_off_restores_flags_and_modes():
    model = lora(tiny(dropout=0.5))
    model.train()
    layers = model.get_base_model().model.layers
    layers[0].eval()
    chosen = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    chosen.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    source = AdapterOff(model)
    first = frozen_states(source, PACKED).teacher
    second = frozen_states(source, PACKED).teacher
    assert torch.equal(first, second)  # dropout is off inside
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert modes["base_model.model.model.layers.1"] and not modes["base_model.model.model.layers.0"]


def test_everything_is_restored_after_an_error_inside():
    model = lora(tiny()).train()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    on = alone(model, [3, 4], [5])

    def fail():
        with AdapterOff(model).weights() as inside:
            assert not inside.training
            raise KeyError("inside")

    with pytest.raises(KeyError, match=r"inside"):
        fail()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.training
    torch.testing.assert_close(alone(model, [3, 4], [5]), on)


def test_frozen_copy_is_apart_from_the_model():
    model = tiny().train()
    source = FrozenCopy(model)
    with source.weights() as frozen:
        assert not frozen.training and not any(parameter.requires_grad for parameter in frozen.parameters())
        assert frozen.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_the_wrong_source_is_refused():
    with pytest.raises(ValueError, match=r"model: expected a PEFT model.*Use FrozenCopy"):
        AdapterOff(tiny())
    with pytest.raises(ValueError, match=r"model: expected a model without adapters.*AdapterOff"):
        FrozenCopy(lora(tiny()))


def test_eval_mode_returns_each_module_to_its_own():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout()).train()
    model[0].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [model.training, model[0].training, model[1].training] == [True, False, True]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_forwards_can_be_split(batched, batch_size):
    source = FrozenCopy(tiny())
    whole = frozen_states(source, PACKED)
    split = frozen_states(source, PACKED, batched=batched, batch_size=batch_size)
    for name in ("base", "teacher", "reference"):
        for row, completion in enumerate(COMPLETIONS):
            found, expected = (getattr(states, name)[row, : len(completion)] for states in (split, whole))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"batch_size: expected at least 1, or None; got 0"):
        frozen_states(source, PACKED, batch_size=0)


def test_the_average_goes_from_the_old_weights_to_the_new():
    model = tiny()
    old = model.lm_head.weight.detach().clone()
    kept, followed, averaged = EMA(model, 1.0), EMA(model, 0.0), EMA(model, 0.9)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    for ema in (kept, followed, averaged):
        ema.update()
    for ema, step in ((kept, 0.0), (followed, 1.0), (averaged, 0.1)):
        with ema.weights() as frozen:
            assert frozen is not model and not frozen.training
            torch.testing.assert_close(frozen.lm_head.weight, old + step)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_average_moves_in_bfloat16_too():
    """A step of 1e-3 is below what bfloat16 resolves; a hundred of them are not."""
    model = tiny().bfloat16()
    ema = EMA(model, 0.999)
    old = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    for _ in range(100):
        ema.update()
    with ema.weights() as frozen:
        moved = (frozen.lm_head.weight - old).float().mean().item()
        assert frozen.lm_head.weight.dtype == torch.bfloat16
    assert moved == pytest.approx(1 - 0.999**100, rel=0.05)


def test_the_average_of_an_adapter_shares_the_base():
    model = lora(tiny())
    ema = EMA(model, 0.5)
    names = set(ema.state_dict())
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with ema.weights() as frozen:
        for name, parameter in frozen.named_parameters():
            assert (parameter is dict(model.named_parameters())[name]) == (name not in names)


def test_an_average_comes_back_from_its_state():
    model, ema = tiny(), EMA(tiny(), 0.5)
    ema.load_state_dict({name: average + 1 for name, average in EMA(model, 0.5).state_dict().items()})
    with ema.weights() as frozen:
        torch.testing.assert_close(frozen.lm_head.weight, model.lm_head.weight + 1)
    with pytest.raises(ValueError, match=r"state: expected averages of this model's trained parameters"):
        ema.load_state_dict({})
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\]"):
        EMA(model, 1.1)
