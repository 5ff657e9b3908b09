"""No storage of about N·V elements is ever allocated, whatever is asked for, and nothing grows from call to call.

Every operation's outputs are looked at, those inside popsd's operators too. The workspace is set to a sixteenth of N·V.
"""

import gc
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from gkd_helpers import distillation, gkd
from loop_helpers import CONFIG, PROMPTS, fixed_generate, run
from tiny_models import tiny_qwen3
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from trl_helpers import ROWS, FixedTrainer, build

import popsd
import popsd_integrations
from popsd import DivergenceConfig, Head, HiddenStates, MaskConfig, PurifiedConfig
from popsd.engine import operator, workspace
from popsd_integrations.diagnose import measure
from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer

V, D, ROWS_OF_COMPLETIONS, LENGTH = 2051, 32, 8, 17
N = ROWS_OF_COMPLETIONS * LENGTH
LIMIT = N * V // 2
"""The largest that is allowed is the head's gradient, V·D elements: a quarter of this."""
SIXTEENTH_MIB = 4 * N * V / 16 / 2**20


def tensors_in(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Allocations(TorchDispatchMode):
    """The operations that allocate a storage of at least LIMIT elements, and the largest storage allocated."""

    def __init__(self):
        super().__init__()
        self.largest, self.over = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (
            func is torch.ops.popsd.divergence.default
        ):  # this mode is off inside, so call what the operator runs with the mode on
            with self:
                output = operator._forward(*args)
        else:
            output = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tensors_in((args, kwargs))}
        for tensor in tensors_in(output):
            if tensor.untyped_storage().data_ptr() not in known:  # no view, and nothing written in place
                elements = tensor.untyped_storage().nbytes() // tensor.itemsize
                self.largest = max(self.largest, elements)
                if elements >= LIMIT:
                    self.over.append(f"{func}: {tuple(tensor.shape)}")
        return output


@pytest.fixture
def small_workspace(monkeypatch):
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_MIB", SIXTEENTH_MIB)
    monkeypatch.setattr(measure, "_BLOCK_ELEMENTS", N * V // 16)
    MODES["plain"]()  # allocates what the backend keeps for good: blocks of rows that no shape makes larger


def states(grad=True, count=N, width=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, *frozen = (torch.randn(count, width, generator=generator) for _ in range(4))
    return HiddenStates(student.requires_grad_(grad), *frozen)


def head(trained=False, vocab=V, width=D, seed=1):
    weight = torch.randn(vocab, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    return Head(weight.requires_grad_(trained), torch.zeros(vocab))


def loss(config=None, trained=False, two_heads=False, **options):
    """Forward and backward of the module, all tokens but a few."""

    def call():
        mask = torch.ones(N, dtype=torch.bool)
        mask[3] = False
        own = head(trained)
        masks = options.get("masks")
        module = popsd.PurifiedOPSDLoss(config, masks=masks, loss_target=options.get("loss_target", "purified"))
        asked = {name: value for name, value in options.items() if name in ("decompose", "telemetry", "gram")}
        hidden = states()
        result, _ = module(
            hidden, own, head(seed=2) if two_heads else None, mask=mask, token_ids=torch.arange(N), **asked
        )
        result.backward()
        assert hidden.student.grad.norm() > 0

    return call


def sparse(trained=False):
    def call():
        ids = torch.arange(N * 4).view(N, 4) % V
        target = popsd.SparseTarget(ids, torch.full((N, 4), -2.0))
        popsd.linear_sparse_jsd(states().student, head(trained), target, reduction="sum").loss.backward()

    return call


MODES = {
    "plain": loss(),
    "telemetry": loss(telemetry=True),
    "decomposition": loss(decompose=True),
    "gram": loss(decompose="gram"),
    "all of it": loss(decompose=True, telemetry=True, trained=True, two_heads=True),
    "trained head": loss(trained=True),
    "two heads": loss(two_heads=True),
    "uncentred": loss(PurifiedConfig(center=False, pmi_clip=None)),
    "entry masks": loss(PurifiedConfig(plausibility=0.1, tail_floor=1e-3, tail_cap=1.0), telemetry=True),
    "clips": loss(PurifiedConfig(beta=0.3, entry_clip=0.05, token_clip=1.0, temperature=1.3)),
    "forward KL": loss(PurifiedConfig(beta=0.0), trained=True),
    "opsd": loss(loss_target="opsd", config=PurifiedConfig(beta=1.0)),
    "token masks": loss(masks=MaskConfig(max_reference_fraction=1.0, top_target_entropy=0.5), trained=True),
    "centred masks": loss(masks=MaskConfig(max_reference_fraction=1.0, signal="centred")),
    "vocabulary in use": loss(PurifiedConfig(vocab_size=V - 3), telemetry=True),
    "sparse teacher": sparse(),
    "sparse teacher, trained head": sparse(trained=True),
    "two distributions": lambda: popsd.linear_jsd(
        states().student, head(), states(seed=3).teacher, config=DivergenceConfig(beta=0.5), reduction="sum"
    ).loss.backward(),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_allocates_no_logits_of_all_tokens(mode, small_workspace):
    with Allocations() as seen:
        MODES[mode]()
    assert not seen.over
    assert seen.largest >= N * V // 64, "chunks of logits must have been seen"


def test_what_is_forbidden_is_seen(monkeypatch):
    """With room for all tokens at once, one chunk is that large, inside the operator."""
    monkeypatch.setattr(workspace, "CPU_WORKSPACE_MIB", 64 * SIXTEENTH_MIB * 16)
    with Allocations() as seen:
        MODES["plain"]()
    assert seen.over and seen.largest >= N * V
    with Allocations() as seen:
        torch.ones(N, D) @ torch.ones(V, D).T
    assert len(seen.over) == 1


def student():
    special = {"eos_token_id": VOCABULARY.index("EOS"), "pad_token_id": VOCABULARY.index("PAD"), "bos_token_id": None}
    return tiny_qwen3(V, tie_word_embeddings=True, initializer_range=0.2, **special)


def long_completions(model, prompts, **options):
    return [[3, 14] * (LENGTH // 2) + [5] for _ in prompts]


class LongTrainer(FixedTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return long_completions(self.model, prompt_ids)


@pytest.mark.parametrize(
    "options",
    [
        {"eval_rows": ROWS, "eval_strategy": "steps", "eval_steps": 1},
        {"lora": True, "masks": {"top_target_entropy": 0.5}, "batched_frozen": True, "loss_target": "opsd"},
        pytest.param(
            {"frozen_weights": "ema", "gradient_checkpointing": True, "workspace_mib": SIXTEENTH_MIB},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_trainer_allocates_no_logits_of_all_tokens(tmp_path, small_workspace, options):
    trainer = build(
        tmp_path,
        model=student(),
        cls=LongTrainer,
        per_device_train_batch_size=ROWS_OF_COMPLETIONS,
        per_device_eval_batch_size=ROWS_OF_COMPLETIONS,
        max_completion_length=LENGTH,
        **options,
    )
    with Allocations() as seen:
        trainer.train()
    assert not seen.over and seen.largest >= N * V // 64


@pytest.mark.parametrize("name", ["gkd", pytest.param("distillation", marks=pytest.mark.slow)])
def test_trls_trainers_with_the_patch_allocate_no_logits_of_all_tokens(tmp_path, small_workspace, name):
    sizes = {"length": LENGTH, "per_device_train_batch_size": ROWS_OF_COMPLETIONS, "gradient_accumulation_steps": 1}
    popsd_integrations.patch_trl()
    try:
        if name == "gkd":
            trainer = gkd(tmp_path, max_steps=1, student=student(), teacher=student(), **sizes)
        else:
            trainer = distillation(tmp_path, student(), student(), long_completions)
        with Allocations() as seen:
            trainer.train()
    finally:
        popsd_integrations.unpatch_trl()
    assert not seen.over and seen.largest >= N * V // 64
    if name == "gkd":
        with Allocations() as seen, torch.no_grad():
            trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        assert len(seen.over) > 4 and seen.largest >= N * V, "what TRL's own loss allocates"


def test_the_loop_allocates_no_logits_of_all_tokens(tmp_path, small_workspace):
    """Sampling included: ``generate`` keeps the logits of one token."""
    config = replace(CONFIG, steps=1, batch_size=ROWS_OF_COMPLETIONS, max_new_tokens=LENGTH, decompose_every=1)
    model = student().eval()
    model.generation_config.eos_token_id = V - 1  # so that most completions are full
    with Allocations() as seen:
        run(tmp_path, config, model=model)
        run(tmp_path / "long", config, model=student().eval(), generate=long_completions)
    assert not seen.over and seen.largest >= N * V // 64


def test_diagnose_allocates_no_logits_of_all_tokens(small_workspace):
    config = measure.DiagnoseConfig(
        completions=ROWS_OF_COMPLETIONS, batch_size=ROWS_OF_COMPLETIONS, max_new_tokens=LENGTH
    )
    with Allocations() as seen:
        found = measure.diagnose(
            student(), build_tokenizer(), PROMPTS, config, generate=long_completions, progress=False
        )
    assert len(found.tokens) == N and not seen.over and seen.largest >= N * V // 64


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def tensors():
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_nothing_grows_over_200_calls():
    """One stream of hidden states that stayed each time would be 4 MiB in the end."""
    own, hidden, count = head(True, 129, 256), states(count=32, width=256), []
    for call in range(200):
        module = popsd.PurifiedOPSDLoss(masks=MaskConfig(min_target_entropy=0.1))
        module(hidden, own, decompose=call % 2 == 0, telemetry=call % 10 == 0)[0].backward()
        own.weight.grad = hidden.student.grad = None
        if call in (60, 190):
            count.append((tensors(), resident()))
    assert count[0][0] == count[1][0]
    assert count[1][1] - count[0][1] < 2 * 2**20


def test_nothing_grows_over_50_steps_of_the_loop(tmp_path):
    count = []

    def generate(model, prompts, **options):
        count.append((tensors(), resident()) if len(count) in (12, 48) else None)
        return fixed_generate(model, prompts)

    run(tmp_path, replace(CONFIG, steps=50, batch_size=2, checkpoint_every=6), generate=generate)
    first, last = count[12], count[48]
    assert first[0] == last[0]
    assert last[1] - first[1] < 4 * 2**20


@pytest.mark.slow
def test_nothing_grows_over_50_steps_of_the_trainer(tmp_path):
    count = []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            count.append((tensors(), resident()) if state.global_step in (12, 48) else None)

    trainer = build(tmp_path, lora=True, max_steps=50, save_strategy="steps", save_steps=12, save_total_limit=1)
    trainer.add_callback(Count())
    trainer.train()
    first, last = count[12], count[48]
    assert first[0] == last[0]
    assert last[1] - first[1] < 4 * 2**20
