"""Forwards without padding: what the padded batch gives, by every layout; and which layout a model is given."""

import itertools
import logging

import pytest
import torch
from tiny_models import tiny_qwen3
from torch.utils.flop_counter import FlopCounterMode

import popsd
from popsd_integrations.huggingface import forwards
from popsd_integrations.huggingface.forwards import completion_states, counting, exact_layout
from popsd_integrations.huggingface.frozen import frozen_states, frozen_weights
from popsd_integrations.huggingface.objective import student_loss
from popsd_integrations.huggingface.packing import BY_LENGTH, PACKED, PADDED, pack, pack_contexts
from popsd_integrations.huggingface.prompts import Prompts

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
masking_utils = pytest.importorskip("transformers.masking_utils")
MASKS, ATTENTIONS = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS

LENGTHS = [(3, 5), (9, 1), (2, 4), (7, 8), (5, 2), (4, 3), (1, 1)]
SMALL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}


def sampled(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(1, 40, (count,), generator=generator).tolist()

    prompts = [Prompts(ids(prompt), ids(prompt + 6 - index % 3), ids(4)) for index, (prompt, _) in enumerate(LENGTHS)]
    return prompts, [ids(completion) for _, completion in LENGTHS]


def rows(layout=PADDED, side="left"):
    prompts, completions = sampled()
    return pack([row.question for row in prompts], completions, pad_token_id=0, side=side, layout=layout)


@pytest.fixture
def narrow_groups(monkeypatch):
    """A forward so cheap that rows of these few tokens are worth more than one."""
    monkeypatch.setattr(forwards, "_OF_A_FORWARD", 2)


@pytest.fixture(scope="module", autouse=True)
def told_where_rows_end():
    """An attention that is called as flash attention is, and computes it by SDPA, row by row. ``leak`` is a fault."""

    def attention(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **further):
        assert (
            further["cu_seq_lens_k"] is cu_seq_lens_q if cu_seq_lens_q is not None else mask is None or mask.ndim == 2
        )
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        ends = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
        assert cu_seq_lens_q is None or (
            len(query) == 1 and max_length_q == max(b - a for a, b in itertools.pairwise(ends))
        )
        kept = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
        kept = (
            kept if mask is None else kept & (mask[:, None, None].bool() | torch.eye(query.shape[2], dtype=torch.bool))
        )
        parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
        found = [
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, x], key[:, :, x], value[:, :, x], kept[..., x, x], scale=scaling
            )
            for x in parts
        ]
        mixed = torch.cat(found, dim=2)
        if cu_seq_lens_q is not None:
            mixed = mixed + attention.leak * mixed.roll(ends[1], dims=2)
        return mixed.transpose(1, 2).contiguous(), None

    attention.leak = 0.0
    for functions, function in ((ATTENTIONS, attention), (MASKS, masking_utils.flash_attention_mask)):
        functions.register("flash_by_sdpa", function)
    yield attention
    for functions in (ATTENTIONS, MASKS):
        functions._global_mapping.pop("flash_by_sdpa")


def tiny(attention="sdpa", **options):
    model = tiny_qwen3(40, initializer_range=0.3, **options).eval()
    model.config._attn_implementation = attention
    return model


def step(model, layout, side="left", **options):
    """Loss, metrics and gradients of a purified step, and what its four forwards ran."""
    prompts, completions = sampled()
    packed = pack_contexts(prompts, completions, pad_token_id=0, side=side, layout=layout)
    loss_fn = popsd.PurifiedOPSDLoss(popsd.PurifiedConfig(beta=0.3))
    with counting() as work:
        frozen = frozen_states(frozen_weights(model), packed, **options)
        loss, metrics = student_loss(model, loss_fn, packed["base"], frozen, decompose=True)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), metrics, gradients, work


def moved(model, scale=0.05):
    """Away from the frozen weights, so that no gradient is zero by itself."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * scale)
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("attention", "layout"),
    [("sdpa", PACKED), ("eager", PACKED), ("flash_by_sdpa", PACKED), ("sdpa", BY_LENGTH), ("flash_by_sdpa", BY_LENGTH)],
)
def test_states_are_those_of_the_padded_batch(narrow_groups, attention, layout, side):
    model, padded = tiny(attention), rows(side=side)
    kept = padded.completion_mask
    with torch.no_grad(), counting() as work:
        found = completion_states(model, rows(layout, side))
        expected = completion_states(tiny(), padded)
    assert found.shape == expected.shape
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=2e-5)
    assert found.isfinite().all()
    assert work.tokens == 2 * sum(map(sum, LENGTHS)) and 0 < work.positions - padded.input_ids.numel() < 80
    if (attention, layout) == ("flash_by_sdpa", PACKED):
        assert 2 * (work.positions - padded.input_ids.numel()) == work.tokens, "not one token of padding"


@pytest.mark.parametrize("kind", ["full", "lora", "checkpointing"])
@pytest.mark.parametrize("layout", [PACKED, BY_LENGTH])
def test_loss_metrics_and_gradients_are_those_of_the_padded_batch(narrow_groups, layout, kind):
    model = tiny()
    if kind == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        moved(model)
    if kind == "checkpointing":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    for options in ({}, {"batched": True}) if kind == "lora" else ({"batch_size": 3},):
        loss, metrics, gradients, padded = step(model, PADDED, "right", **options)
        found, found_metrics, found_gradients, work = step(model, layout, "right", **options)
        assert found.item() == pytest.approx(loss.item(), rel=1e-5) and loss > 1e-3
        assert metrics.keys() == found_metrics.keys() and gradients.keys() == found_gradients.keys()
        for name, value in metrics.items():
            assert found_metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
        largest = max(x.abs().max() for x in gradients.values())
        for name, value in gradients.items():
            torch.testing.assert_close(found_gradients[name], value, rtol=1e-3, atol=2e-5 * largest.item(), msg=name)
        assert largest > 1e-3
        assert work.tokens == padded.tokens and work.positions < 0.9 * padded.positions


@pytest.mark.parametrize(("attention", "layout"), [("eager", PACKED), ("eager", BY_LENGTH), ("flash_by_sdpa", PACKED)])
def test_the_matmuls_that_are_saved_are_the_share_of_padding(attention, layout):
    """Rows as of reasoning: lengths of a lognormal law. What is counted does not depend on the machine."""
    generator = torch.Generator().manual_seed(0)
    counts = (40 * torch.randn(10, generator=generator).mul(0.8).exp()).int().clamp(6, 120).tolist()
    model = tiny_qwen3(40, hidden_size=96, intermediate_size=384, head_dim=48)
    model.config._attn_implementation = attention
    prompts, completions = [[1] * 5 for _ in counts], [[2] * (count - 5) for count in counts]

    def run(layout):
        packed = pack(prompts, completions, pad_token_id=0, layout=layout)
        with torch.no_grad(), FlopCounterMode(display=False) as flops, counting() as work:
            completion_states(model, packed)
        return flops.get_total_flops(), work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forwards, "_OF_A_FORWARD", 13)  # of the longest row what 128 is of 1200 tokens
        (padded, before), (flops, after) = run(PADDED), run(layout)
    assert before.padding_share > 0.3
    assert 1 - after.positions / before.positions == pytest.approx(before.padding_share, rel=0.05)
    assert 1 - flops / padded == pytest.approx(before.padding_share, rel=0.1), "attention grows with the square"


def test_the_layout_of_least_work_is_chosen_where_it_is_exact():
    model = tiny()
    assert exact_layout(model) == BY_LENGTH, "a mask over a line costs its square"
    assert exact_layout(model, padding_free=True) == exact_layout(model, one_forward=True) == PACKED
    assert exact_layout(model, padding_free=False) == PADDED
    flash = tiny("flash_by_sdpa")
    assert exact_layout(flash) == exact_layout(flash, one_forward=True) == PACKED
    prompts = [Prompts([3], [3, 4, 5, 9], [4]), Prompts([6], [6, 11, 12], [11, 12])]
    assert exact_layout(flash, prompts) == exact_layout(flash, prompts[:1]) == PACKED
    assert (
        exact_layout(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])), padding_free=True)
        == PACKED
    )


@pytest.mark.parametrize("kind", ["alibi", "recurrent"])
def test_a_model_that_cannot_take_packed_rows_is_refused_by_name(caplog, kind):
    torch.manual_seed(0)
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, initializer_range=0.3, **SMALL)
    if kind == "recurrent":
        config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, initializer_range=0.3, **SMALL)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    name = type(model).__name__
    with pytest.raises(
        ValueError, match=rf"padding_free: expected .*{name} with eager attention cannot .*Leave padding_free"
    ):
        exact_layout(model, padding_free=True)
    assert exact_layout(model) == BY_LENGTH, "which needs no proof"
    with caplog.at_level(logging.WARNING):
        assert exact_layout(model, one_forward=True) == PADDED
    assert f"{name} with eager attention cannot take rows end to end" in caplog.text and "run padded" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_below_the_rounding_of_16_bits_is_seen(told_where_rows_end, dtype, monkeypatch):
    model = tiny("flash_by_sdpa").to(dtype)
    assert exact_layout(model) == PACKED
    monkeypatch.setattr(told_where_rows_end, "leak", 0.01)
    with pytest.raises(ValueError, match=r"and by .* with other rows"):
        exact_layout(model, padding_free=True)


def test_an_architecture_that_fails_on_a_line_is_not_packed(caplog):
    model = tiny("flash_by_sdpa")
    model.model.forward = lambda input_ids, attention_mask=None, position_ids=None, use_cache=None: 1 / 0
    model.forward = lambda input_ids: transformers.modeling_outputs.CausalLMOutput(
        logits=torch.ones(1, input_ids.shape[1], 40)
    )
    with pytest.raises(ValueError, match=r"it raises TypeError: .*unexpected keyword argument 'cu_seq_lens_q'"):
        exact_layout(model, padding_free=True)
    assert exact_layout(model) == BY_LENGTH


def test_chunked_attention_needs_a_transformers_that_counts_chunks_by_row(monkeypatch):
    model = tiny()
    model.config.attention_chunk_size = 8192
    assert exact_layout(model, padding_free=True) == PACKED
    monkeypatch.delattr(masking_utils, "remap_positions_for_packed_sequence")
    with pytest.raises(ValueError, match="counts the chunks of its attention over all rows"):
        exact_layout(model, padding_free=True)


def test_no_line_is_longer_than_the_models_positions():
    """GPT-Neo keeps its causal mask in a buffer of that size."""
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], **SMALL
    )
    config.max_position_embeddings = 24
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert exact_layout(model, padding_free=True) == PACKED
    counts = [20, 20, 4, 3, 3]
    packed = pack([[1]] * 5, [[2] * (count - 1) for count in counts], pad_token_id=0, layout=PACKED)
    with torch.no_grad(), counting() as work:
        completion_states(model, packed)
    assert (work.tokens, work.positions) == (50, 60), "and not two lines of 27"


def test_lines_and_groups_hold_every_row_once_at_the_least_cost(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(forwards, "_OF_A_FORWARD", 6)
    for number in range(1, 7):
        counts = torch.randint(1, 20, (number,), generator=generator).tolist()
        lines, groups = forwards._lines(counts, 2 * max(counts)), forwards._groups(counts)
        assert sorted(row for part in lines for row in part) == sorted(row for part in groups for row in part)
        width = max(sum(counts[row] for row in line) for line in lines)
        assert max(counts) <= width <= 2 * max(counts) and len(lines) * width <= number * max(counts)
        assert forwards._lines(counts, max(counts)) and sum(len(part) for part in groups) == number

        def cost(ordered, cuts):
            parts = [ordered[a:b] for a, b in itertools.pairwise([0, *cuts, len(ordered)])]
            return sum(len(part) * max(part) + 6 for part in parts)

        ordered = sorted(counts)
        places = range(1, number)
        fewest = min(cost(ordered, cuts) for size in range(number) for cuts in itertools.combinations(places, size))
        assert sum(len(part) * max(counts[row] for row in part) + 6 for part in groups) == fewest


def test_a_bad_layout_is_named():
    with pytest.raises(ValueError, match=r"layout: expected one of \['padded', 'packed', 'by length'\]; got 'dense'"):
        pack([[1]], [[2]], pad_token_id=0, layout="dense")
