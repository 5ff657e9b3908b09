import pytest
import torch

from popsd_integrations.huggingface.packing import (
    check_same_completions,
    joined,
    pack,
    pack_contexts,
    pack_padded,
    padded,
    unpad,
)
from popsd_integrations.huggingface.prompts import Prompts


def test_pack_left():
    packed = pack([[5], [5, 6, 7]], [[8, 9], [4]], pad_token_id=0)
    assert packed.input_ids.tolist() == [[0, 5, 8, 9], [5, 6, 7, 4]]
    assert packed.attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert packed.position_ids.tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert packed.spans.tolist() == [[2, 4], [3, 4]]
    assert packed.completion_mask.tolist() == [[True, True], [True, False]]
    assert packed.completion_ids[packed.completion_mask].tolist() == [8, 9, 4]


def test_pack_right():
    packed = pack([[5], [5, 6, 7]], [[8, 9], [4]], pad_token_id=0, side="right")
    assert packed.input_ids.tolist() == [[5, 8, 9, 0], [5, 6, 7, 4]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2], [0, 1, 2, 3]]
    assert packed.spans.tolist() == [[1, 3], [3, 4]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_predicting_takes_the_position_before_each_token(side):
    packed = pack([[5], [5, 6, 7]], [[8, 9], [4]], pad_token_id=0, side=side)
    columns = torch.arange(4.0)[None, :, None].expand(2, 4, 3)
    predicting = packed.predicting(columns)
    assert predicting.shape == (2, 2, 3)
    starts = packed.spans[:, 0].tolist()
    assert predicting[0, :, 0].tolist() == [starts[0] - 1, starts[0]]
    assert predicting[1, 0, 0] == starts[1] - 1
    with pytest.raises(ValueError, match=r"hidden: expected shape \[2, 4, D\]"):
        packed.predicting(columns[:, 1:])


def test_unpad_inverts_padding():
    packed = pack([[5], [5, 6, 7]], [[8, 9], [4]], pad_token_id=0)
    assert unpad(packed.input_ids, packed.attention_mask) == [[5, 8, 9], [5, 6, 7, 4]]
    with pytest.raises(ValueError, match=r"mask: expected the shape"):
        unpad(packed.input_ids, packed.attention_mask[:1])


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[1], []], [[2], [2]], r"prompts: expected at least one token.*row 1.*in every context"),
        ([[1], [1]], [[], [2]], r"completions: expected at least one token.*row 0"),
        ([[1]], [[2], [2]], r"completions: expected one per prompt.*Repeat a prompt"),
        ([], [], r"completions: expected one per prompt and at least one"),
    ],
)
def test_bad_rows_are_named(prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, completions, pad_token_id=0)


def test_bad_side_is_named():
    with pytest.raises(ValueError, match=r"side: expected 'left' or 'right'"):
        pack([[1]], [[2]], pad_token_id=0, side="centre")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("known", [False, True])
def test_padded_tensors_pack_to_what_their_lists_pack_to(side, known):
    """However they are padded, and with columns that are padding in every row, as after a split into micro-batches."""
    generator = torch.Generator().manual_seed(0)
    for prompt_side, completion_side in (("left", "right"), ("right", "left")):
        lengths = torch.randint(1, 6, (4, 2), generator=generator).tolist()
        rows = [[torch.randint(1, 90, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
        prompts, completions = zip(*rows, strict=True)
        # a longer row at the end, which the micro-batch does not have
        tensors = (
            *padded([*prompts, [1] * 9], 7, side=prompt_side),
            *padded([*completions, [1] * 8], 8, side=completion_side),
        )
        found = pack_padded(
            *(x[:4] for x in tensors),
            pad_token_id=0,
            side=side,
            lengths=list(map(tuple, lengths)) if known else None,
        )
        expected = pack(prompts, completions, pad_token_id=0, side=side)
        assert found.longest == expected.longest
        for name in ("input_ids", "attention_mask", "position_ids", "spans"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_bad_padded_tensors_are_named():
    ids, mask = padded([[1], [2, 3]], 0)
    with pytest.raises(ValueError, match=r"prompt_mask: expected the shape \[2, L\] of its ids; got \[2, 1\]"):
        pack_padded(ids, mask[:, 1:], ids, mask, pad_token_id=0)
    with pytest.raises(ValueError, match=r"completion_mask: expected the shape \[2, L\]"):
        pack_padded(ids, mask, ids[:1], mask[:1], pad_token_id=0)
    with pytest.raises(ValueError, match=r"completions: expected at least one token.*row 0"):
        pack_padded(ids, mask, ids, mask * torch.tensor([[0], [1]]), pad_token_id=0)
    with pytest.raises(ValueError, match=r"side: expected 'left' or 'right'"):
        pack_padded(ids, mask, ids, mask, pad_token_id=0, side="centre")


def test_contexts_are_packed_over_the_same_completions():
    prompts = [Prompts([1, 2], [1, 2, 3], [3]), Prompts([4], [4, 5], [5])]
    packed = pack_contexts(prompts, [[7, 8], [9]], pad_token_id=0)
    check_same_completions(**packed)
    assert packed["base"].input_ids.tolist() == [[1, 2, 7, 8], [0, 0, 4, 9]]
    assert packed["teacher"].input_ids.tolist() == [[1, 2, 3, 7, 8], [0, 0, 4, 5, 9]]
    assert packed["reference"].input_ids.tolist() == [[3, 7, 8], [0, 5, 9]]
    assert list(pack_contexts(prompts, [[7], [8]], pad_token_id=0, contexts=["teacher"])) == ["teacher"]
    with pytest.raises(ValueError, match=r"contexts: expected some of \['base', 'teacher', 'reference'\]"):
        pack_contexts(prompts, [[7], [8]], pad_token_id=0, contexts=["student"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_joined_batches_keep_their_rows(side):
    first = pack([[5], [5, 6, 7]], [[8, 9], [4]], pad_token_id=0, side=side)
    second = pack([[1, 2, 3, 4], [2]], [[8, 9], [4]], pad_token_id=0, side=side)
    both = joined([first, second])
    assert both.input_ids.shape == (4, 6) and both.longest == 2
    assert both.attention_mask[:, -1 if side == "left" else 0].all(), "padding stays on its side"
    for row, (ids, mask, places) in enumerate(zip(both.input_ids, both.attention_mask, both.position_ids, strict=True)):
        part = (first, second)[row // 2]
        kept = part.attention_mask[row % 2].bool()
        assert ids[mask.bool()].tolist() == part.input_ids[row % 2][kept].tolist()
        assert places[mask.bool()].tolist() == list(range(int(kept.sum())))
        start, end = both.spans[row].tolist()
        assert ids[start:end].tolist() == [[8, 9], [4]][row % 2]
    assert torch.equal(both.rows(slice(2, 4)).spans, both.spans[2:])


def test_completions_must_agree():
    student = pack([[5], [6]], [[8, 9], [4]], pad_token_id=0)
    check_same_completions(student=student, teacher=pack([[1, 2, 3], [1]], [[8, 9], [4]], pad_token_id=0, side="right"))
    with pytest.raises(ValueError, match=r"teacher: .*row 1 differs: student has \[4\], teacher has \[3\]. Pack every"):
        check_same_completions(student=student, teacher=pack([[1], [1]], [[8, 9], [3]], pad_token_id=0))
    with pytest.raises(ValueError, match=r"teacher: expected 2 rows as in student; got 1"):
        check_same_completions(student=student, teacher=pack([[1]], [[8, 9]], pad_token_id=0))
