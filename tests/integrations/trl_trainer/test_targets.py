"""The family of targets and the masks in the trainer: each against the float64 oracle, and what is refused."""

import dataclasses
import sys

import pytest
import torch

pytest.importorskip("trl")

from trl_helpers import ROWS, TEMPLATES, build, completion_of, config, logs, tiny

import popsd
from popsd import MaskConfig, PurifiedConfig, oracle, presets
from popsd.engine.chunks import registry
from popsd_integrations.huggingface import frozen
from popsd_integrations.huggingface.objective import needed_contexts, target_config
from popsd_integrations.huggingface.prompts import ContextBuilder, ContextConfig, Problem
from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer
from popsd_integrations.torch_loop import TrainConfig, train

WRONG = [row | {"wrong_privileged_context": "9 8 7" if row["privileged_context"][0] != "9" else "1"} for row in ROWS]
WAIT = VOCABULARY.index("WAIT")


def contexts(rows=ROWS, reference="solution_only"):
    problems = [Problem(row["prompt"], row["privileged_context"], row.get("wrong_privileged_context")) for row in rows]
    builder = ContextBuilder(build_tokenizer(), ContextConfig(**TEMPLATES, reference=reference), text_as_chat=False)
    return builder.build_all(problems)


def logits(model, context, completion):
    full = model(input_ids=torch.tensor([context + completion])).logits[0].detach().double()
    return full[len(context) - 1 : -1]


def per_token(loss_of, prompts):
    """Concatenated over the rows: ``loss_of`` the float64 logits of question, teacher and reference."""
    model = tiny().eval()
    rows = []
    for row in prompts:
        completion = completion_of(row.question)
        rows.append(loss_of(*(logits(model, context, completion) for context in row)))
    return rows


@pytest.mark.parametrize(("strength", "lora"), [(2.0, False), pytest.param(0.5, True, marks=pytest.mark.slow)])
def test_beta_opsd_runs_no_reference(tmp_path, monkeypatch, lora, strength):
    seen, real = [], frozen.completion_states
    monkeypatch.setattr(frozen, "completion_states", lambda *args: seen.append(0) or real(*args))
    trainer = build(
        tmp_path, lora=lora, loss_target="beta_opsd", pmi_beta=strength, per_device_train_batch_size=8, max_steps=1
    )
    trainer.train()
    assert len(seen) == 2

    def expected(base, teacher, _):
        target = (1 - 1 / strength) * base.log_softmax(-1) + teacher.log_softmax(-1) / strength
        return oracle.jsd(base, target, popsd.DivergenceConfig(beta=0.3))

    loss = torch.cat(per_token(expected, contexts())).mean().item()
    assert logs(trainer)[0]["loss"] == pytest.approx(loss, rel=1e-4) and loss > 0.01
    assert not any(name.startswith("decomposition") for name in logs(trainer)[0])


@pytest.mark.parametrize("lora", [False, True])
def test_contrastive_hints_subtract_the_wrong_hint(tmp_path, lora):
    trainer = build(tmp_path, rows=WRONG, lora=lora, loss_target="contrastive_hints", per_device_train_batch_size=8)
    trainer.train()
    prompts = contexts(WRONG, "wrong_hint")
    assert build_tokenizer().decode(prompts[0].reference) == "Q 0 0 A R 9 8 7 OK A"

    def expected(base, teacher, wrong):
        target = base.log_softmax(-1) + teacher.log_softmax(-1) - wrong.log_softmax(-1)
        return oracle.jsd(base, target, popsd.DivergenceConfig(beta=0.3))

    loss = torch.cat(per_token(expected, prompts)).mean().item()
    assert logs(trainer)[0]["loss"] == pytest.approx(loss, rel=1e-4) and loss > 0.01
    assert "decomposition/reference_fraction" in logs(trainer)[0]


def test_a_contrast_needs_wrong_hints(tmp_path):
    options = {"loss_target": "contrastive_hints"}
    with pytest.raises(ValueError, match="train_dataset: expected the column 'wrong_privileged_context'"):
        build(tmp_path, **options)
    for text, message in ((" ", "expected non-empty text"), (ROWS[3]["privileged_context"], "expected another text")):
        rows = [*WRONG[:3], WRONG[3] | {"wrong_privileged_context": text}]
        with pytest.raises(ValueError, match=f"train_dataset, row 3: wrong_solution: {message}"):
            build(tmp_path, rows=rows, **options)


def test_too_long_hints_are_cut_alike(tmp_path):
    long = [{"prompt": "Q 1 2 A", "privileged_context": "1 2 3 4 5 6 7", "wrong_privileged_context": "9 8 7 6 5 4 3"}]
    limits = {"max_prompt_length": 12, "on_overflow": "truncate"}
    trainer = build(tmp_path, rows=long * 4, loss_target="contrastive_hints", **limits)
    row = trainer._prompts(Problem(*long[0].values()))
    texts = [trainer.processing_class.decode(ids) for ids in row[1:]]
    assert texts == ["Q 1 2 A R 1 2 3 4 5 OK A", "Q 1 2 A R 9 8 7 6 5 OK A"]


def test_a_target_brings_its_own_clip_and_what_is_said_wins(tmp_path):
    def clip(**options):
        return config(tmp_path, **options).loss_function().config.pmi_clip

    assert clip() == 10.0 and clip(pmi_clip=None) is None and clip(pmi_clip="none") is None and clip(pmi_clip="3") == 3
    for target in ("beta_opsd", "contrastive_hints"):
        assert clip(loss_target=target) is None and clip(loss_target=target, pmi_clip=10.0) == 10.0
        assert TrainConfig(loss_target=target).loss == PurifiedConfig(pmi_clip=None)
        assert TrainConfig(loss_target=target, loss=PurifiedConfig()).loss == PurifiedConfig()
    assert config(tmp_path).pmi_clip == 10.0  # as it will be logged
    loss = config(tmp_path, plausibility=0.1, tail_floor=0.01, tail_cap=1.0).loss_function().config
    assert (loss.plausibility, loss.tail_floor, loss.tail_cap) == (0.1, 0.01, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": {"top_entropy": 1}}, r"masks: expected some of .*'top_student_entropy'.*; got \['top_entropy'\]"),
        ({"masks": {"skip_first": 1}}, "masks: expected some of"),
        ({"masks": "everything"}, "masks: expected some of .*; got 'everything'"),
        ({"masks": {"floor": 2.0}}, "floor: expected a weight"),
        (
            {"masks": {"max_reference_fraction": 1.0}, "loss_target": "opsd"},
            "masks: max_reference_fraction and .*'opsd'",
        ),
        ({"masks": {"min_cos_transferable": 0.0}, "loss_target": "beta_opsd"}, "masks: .*'beta_opsd'"),
        ({"position_weights": {"last": 1.0}}, "position_weights: expected some of"),
        ({"position_weights": '{"first": 2.0}'}, "first: expected a weight"),
        ({"plausibility": 2.0}, "plausibility: expected"),
        ({"tail_cap": 1.0}, "tail_cap: expected with tail_floor"),
        ({"loss_kwargs": {"plausibility": 0.1}}, "loss_kwargs: expected some of"),
        ({"pmi_clip": "-1"}, "pmi_clip: expected a positive"),
    ],
)
def test_bad_options_are_refused_by_the_configuration(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


MASKED = [
    {"masks": '{"min_target_entropy": 2.2, "floor": 0.25}', "protect_markers": True, "markers": ["wait", "2"]},
    {"masks": {"min_target_entropy": 2.2}, "position_weights": {"first": 0.2, "power": 2.0}, "skip_first_tokens": 1},
    {"masks": {"max_reference_fraction": 1.1, "softness": 0.1}, "position_weights": '{"first": 0.0}'},
]


def expected_masked(options):
    """Loss and kept share of the first step, from the oracle's per-token losses and the rules written out."""
    numerator = kept = weight = count = 0.0
    settings = PurifiedConfig(beta=0.3)
    for row in contexts():
        ids = completion_of(row.question)
        base, teacher, reference = (logits(tiny().eval(), context, ids) for context in row)
        loss = oracle.purified_jsd(base, base, teacher, reference, settings)
        target = oracle.purified_target_logits(base, teacher, reference, settings).log_softmax(-1)
        entropy = -(target.exp() * target).sum(-1)
        place = torch.arange(len(ids))
        if options is MASKED[0]:
            rule = torch.where(entropy >= 2.2, 1.0, 0.25)
            rule = rule * torch.tensor([0.25 if x in (WAIT, VOCABULARY.index("2")) else 1.0 for x in ids])
            own = torch.ones(len(ids))
        elif options is MASKED[1]:
            rule, last = (entropy >= 2.2).double(), max(len(ids) - 2, 1)
            own = torch.where(place >= 1, 0.2 + 0.8 * ((place - 1).clamp(0) / last) ** 2, 0.0)
            own = torch.where((place == 1) & (len(ids) == 2), 1.0, own)
        else:
            fraction = oracle.decompose(base, teacher, reference, settings).reference_fraction
            rule = torch.sigmoid((1.1 - fraction) / 0.1)
            own = place / (len(ids) - 1) if len(ids) > 1 else torch.ones(1)
        numerator += float((loss * rule * own).sum())
        kept, weight, count = kept + float((rule * own).sum()), weight + float(own.sum()), count + int((own > 0).sum())
    return numerator / count, kept / weight


@pytest.mark.parametrize("options", [MASKED[0], *(pytest.param(x, marks=pytest.mark.slow) for x in MASKED[1:])])
def test_masks_and_their_kept_share_do_not_depend_on_the_split(tmp_path, options):
    rows = []
    for size, accumulation in ((8, 1), (1, 8), (4, 2)):
        trainer = build(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            lora=True,
            **options,
        )
        trainer.train()
        rows.append([(row["loss"], row["masks/kept_share"], row["grad_norm"]) for row in logs(trainer)])
    for other in rows[1:]:
        assert torch.tensor(other) == pytest.approx(torch.tensor(rows[0]), rel=1e-4, abs=1e-6)
    loss, share = expected_masked(options)
    assert rows[0][0][:2] == pytest.approx((loss, share), rel=1e-4)
    assert 0.05 < share < 0.95 and loss > 0.005


def test_protected_markers_are_the_tokenizers(tmp_path):
    trainer = build(tmp_path, protect_markers=True, markers=["wait", "ok"], masks={"protect_ids": [3]})
    assert trainer._loss_fn.masks == MaskConfig(protect_ids=sorted([3, WAIT, VOCABULARY.index("OK")]))
    assert build(tmp_path)._loss_fn.masks is None
    with pytest.raises(ValueError, match="words: expected a marker that is one token"):
        build(tmp_path, protect_markers=True, markers=["notwithstanding"])


@pytest.mark.parametrize("target", ["beta_opsd", "contrastive_hints"])
def test_the_plain_loop_takes_the_same_steps(tmp_path, target):
    rules = {"min_target_entropy": 2.6}
    trainer = build(
        tmp_path / "trl", rows=WRONG, per_device_train_batch_size=8, max_steps=2, max_grad_norm=1.0, pmi_beta=2.0,
        loss_target=target, masks=rules,
    )  # fmt: skip
    trainer.train()
    options = TrainConfig(
        steps=2,
        batch_size=8,
        micro_batch_size=3,
        learning_rate=1e-2,
        lora_rank=None,
        max_new_tokens=6,
        loss_target=target,
        loss=presets.beta_opsd(2.0, beta=0.3),
        masks=MaskConfig(**rules),
        decompose_every=1,
    )
    rows = train(
        tiny().eval(),
        build_tokenizer(),
        contexts(WRONG, "wrong_hint"),
        options,
        output_dir=tmp_path / "loop",
        generate=lambda model, prompts, **_: [completion_of(row) for row in prompts],
        progress=False,
    ).metrics
    for row, logged in zip(rows, logs(trainer), strict=True):
        row["masks/kept_share"] = row.pop("kept_share")
        for name in ("loss", "grad_norm", "target_entropy", "masks/kept_share"):
            assert logged[name] == pytest.approx(row[name], rel=1e-4), name
    assert 0.05 < rows[0]["masks/kept_share"] < 0.95


def geometric(base, teacher, _):
    return 0.7 * base + 0.3 * teacher


def arithmetic(base, teacher, _):
    return torch.log(0.7 * base.exp() + 0.3 * teacher.exp())


def own(base, teacher, reference):
    return base + 0.3 * (teacher - 2.0 * reference)


MODULE = """
import popsd

def mine(base, teacher, reference, strength=1.0, share=2.0):
    return base + strength * (teacher - share * reference)

some = popsd.TargetConfig(target="registered", numbers=(0.3,))
warm = popsd.TargetConfig(target="registered", numbers=(0.3,), temperature=2.0)
sharp = popsd.TargetConfig(target="purified", numbers=(0.5, 5.0))
popsd.register_target("registered", lambda base, teacher, reference, strength: mine(base, teacher, reference, strength))
popsd.register_target("two", lambda base, teacher, reference: teacher, contexts=("base", "teacher"))
nothing = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))
    monkeypatch.delitem(sys.modules, "popsd_test_module", raising=False)
    (tmp_path / "popsd_test_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "popsd_test_module"


@pytest.mark.parametrize(
    ("target", "parameters", "forwards", "log_target"),
    [
        ("alpha_mix", {"alpha": 0.3}, 2, geometric),
        ("arithmetic_mix", {"share": 0.3}, 2, arithmetic),
        ("popsd_test_module:mine", {"strength": 0.3}, 3, own),
        ("popsd_test_module:some", None, 3, own),
    ],
)
@pytest.mark.usefixtures("module")
def test_registered_targets_in_trainer_and_loop(tmp_path, monkeypatch, target, parameters, forwards, log_target):
    """The loss is the oracle's, no context is run in vain, and both take the same options."""
    seen, real = [], frozen.completion_states
    monkeypatch.setattr(frozen, "completion_states", lambda *args: seen.append(0) or real(*args))
    trainer = build(
        tmp_path / "trl", per_device_train_batch_size=8, max_steps=1, loss_target=target, target_parameters=parameters
    )
    trainer.train()
    assert len(seen) == forwards

    def expected(*streams):
        return oracle.jsd(
            streams[0], log_target(*(x.log_softmax(-1) for x in streams)), popsd.DivergenceConfig(beta=0.3)
        )

    loss = torch.cat(per_token(expected, contexts())).mean().item()
    logged = logs(trainer)[0]
    assert logged["loss"] == pytest.approx(loss, rel=1e-4) and loss > 0.005
    assert ("decomposition/reference_fraction" in logged) == (forwards == 3)
    loop = TrainConfig(
        steps=1, batch_size=8, learning_rate=1e-2, lora_rank=None, max_new_tokens=6, decompose_every=1,
        loss_target=target, loss=target_config(target, parameters, beta=0.3, temperature=1.0),
    )  # fmt: skip
    rows = train(
        tiny().eval(), build_tokenizer(), contexts(), loop, output_dir=tmp_path / "loop", progress=False,
        generate=lambda model, prompts, **_: [completion_of(row) for row in prompts],
    ).metrics  # fmt: skip
    assert rows[0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_what_a_module_holds_under_a_name(module):
    assert target_config(f"{module}:mine") == popsd.TargetConfig(target=f"{module}.mine", numbers=(1.0, 2.0))
    assert target_config(f"{module}:mine", {"share": 3.0}).numbers == (1.0, 3.0)
    assert target_config(f"{module}:registered", {"strength": 2.0}).target == "registered"
    some = popsd.TargetConfig(target="registered", numbers=(0.3,), temperature=2.0)
    assert target_config(f"{module}:warm") == some == TrainConfig(loss_target=f"{module}:warm").loss
    assert target_config(f"{module}:warm", {"strength": 0.5}, beta=0.1) == dataclasses.replace(
        some, numbers=(0.5,), beta=0.1
    )
    assert target_config(f"{module}:sharp", {"pmi_clip": 3.0}) == PurifiedConfig(pmi_beta=0.5, pmi_clip=3.0)
    assert needed_contexts(f"{module}:two", True) == ["base", "teacher"]
    assert target_config("purified", {"pmi_beta": 2.0}, plausibility=0.1) == PurifiedConfig(
        pmi_beta=2.0, plausibility=0.1
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_target": "nowhere:mine"}, "loss_target: expected 'module:name' of a module on the path.*PYTHONPATH"),
        ({"loss_target": "popsd_test_module:nothing"}, "loss_target: expected .*to register a target 'nothing'.*got 3"),
        ({"loss_target": "popsd_test_module:warm"}, r"temperature: expected 2.0, as the configuration .*; got 1.0"),
        ({"loss_target": "arithmetic_mix"}, r"target 'arithmetic_mix': expected its numbers \(share\)"),
        (
            {"target_parameters": {"alpha": 1.0}},
            r"target 'purified': .*\(pmi_beta=1, pmi_clip=10\); got {'alpha': 1.0}",
        ),
        ({"target_parameters": "much"}, "target_parameters: expected a dictionary of numbers; got 'much'"),
        ({"loss_target": "alpha_mix", "target_parameters": {"alpha": 2.0}}, r"alpha: expected a number in \(0, 1\]"),
        (
            {"loss_target": "alpha_mix", "target_parameters": {"alpha": 0.5}, "pmi_beta": 2.0},
            "pmi_beta: expected none with loss_target='alpha_mix'.*got 2.0",
        ),
        (
            {"target_parameters": {"pmi_beta": 1.0}, "pmi_beta": 2.0},
            "pmi_beta: expected none with loss_target='purified'",
        ),
        ({"loss_target": "opsd", "pmi_clip": 5.0}, "pmi_clip: expected none with loss_target='opsd'"),
        ({"loss_target": "opsd", "plausibility": 0.1}, "plausibility: expected none with loss_target='opsd'"),
        ({"loss_target": "opsd", "loss_kwargs": {"exact_difference": True}}, "exact_difference: expected none"),
        (
            {
                "loss_target": "arithmetic_mix",
                "target_parameters": {"share": 0.5},
                "masks": {"max_reference_fraction": 1.0},
            },
            "masks: max_reference_fraction and .*'arithmetic_mix'",
        ),
    ],
)
@pytest.mark.usefixtures("module")
def test_options_that_a_target_does_not_read_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_the_loops_loss_must_be_the_targets():
    for options in (
        {"loss_target": "arithmetic_mix", "loss": PurifiedConfig()},
        {"loss_target": "arithmetic_mix", "loss": presets.alpha_mix(0.5)},
        {"loss": presets.alpha_mix(0.5)},
    ):
        with pytest.raises(
            ValueError, match=r"loss: expected a popsd.\w+Config of the target '(arithmetic_mix|purified)'"
        ):
            TrainConfig(**options)
    options = {"loss_target": "alpha_mix", "target_parameters": {"alpha": 0.5}}
    with pytest.raises(ValueError, match="target_parameters: expected None beside loss"):
        TrainConfig(**options, loss=presets.alpha_mix(0.25))
    assert dataclasses.replace(TrainConfig(**options), steps=3).loss == presets.alpha_mix(0.5)


def test_unknown_targets_are_refused(tmp_path):
    for make in (lambda: config(tmp_path, loss_target="sdpo"), lambda: TrainConfig(loss_target="sdpo")):
        with pytest.raises(
            ValueError, match=r"loss_target: expected one of \[.*'alpha_mix', .*'purified'.*\]; got 'sdpo'"
        ):
            make()
    assert needed_contexts("opsd", True) == ["teacher", "reference"]
