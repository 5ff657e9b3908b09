"""The pre-flight check: what the target would teach, measured on the base model's own completions before any training.

Completions are sampled on the question alone. The same tokens are run after the question (base), after question and
reference solution (teacher), and after the reference solution alone. The target is composed of these, token by token.
Student and base are still the same model, so the decomposition is that of the first training step. Training moves
the student from the base to the target. So the markers gain where the target gives them more probability than the base.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from popsd import (
    Head,
    HiddenStates,
    MaskConfig,
    PurifiedConfig,
    TargetConfig,
    decompose,
    head_logits,
    linear_jsd,
    linear_purified_jsd,
    purified_target_logits,
)
from popsd.markers import EpistemicMarkers
from popsd.outputs import LossOutput
from popsd_integrations.diagnose.summary import CONTEXTS, Diagnosis, summarise
from popsd_integrations.diagnose.watched import Watched, watched
from popsd_integrations.huggingface.frozen import FrozenModel, frozen_states
from popsd_integrations.huggingface.heads import causal_model, eval_mode
from popsd_integrations.huggingface.invariants import check_model
from popsd_integrations.huggingface.objective import loss_function, needed_contexts
from popsd_integrations.huggingface.packing import Packed, pack_contexts
from popsd_integrations.huggingface.prompts import Prompts
from popsd_integrations.huggingface.sampling import Generate, Sampler, check_positions

OVERLAP_TOP = 16
"""Likeliest tokens of teacher and base that `overlap` compares."""
_BLOCK_ELEMENTS = 1 << 22
"""Logits of one context that are looked at together: 16 MiB in float32. Composing the target holds less than ten times that."""

TokenWeights = Callable[[torch.Tensor], torch.Tensor]
"""From the mask of completion tokens [B, T] bool to their weights in the loss [B, T]."""


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Options of `diagnose`.

    completions: how many to sample, one per problem. batch_size: rows per forward. max_new_tokens, temperature: of sampling.
    loss_target, loss, masks: what would be trained, as ``popsd train`` takes it. Tokens that the masks drop count nowhere.
    markers: what to look for. bins: points of the curves over positions. margin: a change of the markers' probability below
    this share counts as none. autocast: the dtype that forwards run in by mixed precision, or None.
    """

    completions: int = 32
    batch_size: int = 8
    max_new_tokens: int = 512
    temperature: float = 1.0
    loss_target: str = "purified"
    loss: PurifiedConfig | TargetConfig = field(default_factory=PurifiedConfig)
    masks: MaskConfig | None = None
    markers: EpistemicMarkers = field(default_factory=EpistemicMarkers)
    bins: int = 24
    margin: float = 0.02
    seed: int = 0
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("completions", "batch_size", "max_new_tokens", "bins"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}.")
        for name in ("temperature", "margin"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a finite number of at least 0; got {getattr(self, name)}.")
        loss_function(self.loss_target, self.loss, masks=self.masks)

    @property
    def contexts(self) -> list[str]:
        """What the target is composed of."""
        return needed_contexts(self.loss_target, decompose=False)


def diagnose(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompts],
    config: DiagnoseConfig | None = None,
    *,
    generate: Generate | None = None,
    token_weights: TokenWeights | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Sample ``model``'s completions and measure what the target would change in them. Nothing is trained.

    generate: see ``huggingface.Sampler``; None: ``hf_generate``. token_weights: None counts every token.
    Raises ValueError for no problem, for completions without a token, where no token counts, where no marker has a token of
    ``tokenizer``, and for a model that ``huggingface.check_model`` refuses.
    """
    config = config or DiagnoseConfig()
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one problem; got none. Build them with ContextBuilder.build_all.")
    markers = watched(config.markers, tokenizer)
    sampling: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    sampler = Sampler(model, tokenizer, **sampling, generate=generate, vocab_size=config.loss.vocab_size)
    side = check_model(model, prompts, pad_token_id=sampler.pad_token_id)
    chosen = list(prompts[: config.completions])
    check_positions(model, chosen, config.max_new_tokens)
    job = _Job(model, tokenizer, config, markers, sampler.pad_token_id, side, token_weights)
    tokens: list[dict[str, Any]] = []
    precision: Any = contextlib.nullcontext()
    if config.autocast is not None:
        precision = torch.autocast(causal_model(model).device.type, config.autocast)
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(), precision:
        torch.manual_seed(config.seed)
        for first in _progress(range(0, len(chosen), config.batch_size), progress):
            rows = chosen[first : first + config.batch_size]
            tokens += _measure(job, rows, sampler(model, rows), first)
    if not tokens:
        raise ValueError(
            "prompts: expected completions of at least one token; got none. Look at the prompts' templates."
        )
    texts = [{name: tokenizer.decode(ids) for name, ids in row._asdict().items()} for row in chosen]
    return summarise(tokens, texts, markers, dataclasses.asdict(config) | {"contexts": config.contexts})


class _Job(NamedTuple):
    model: nn.Module
    tokenizer: Any
    config: DiagnoseConfig
    markers: Watched
    pad_token_id: int
    side: str
    token_weights: TokenWeights | None


def _measure(
    job: _Job, rows: Sequence[Prompts], completions: Sequence[Sequence[int]], first: int
) -> list[dict[str, Any]]:
    """A row of numbers for each token of the completions, the first of which is number ``first``."""
    kept = [place for place, ids in enumerate(completions) if ids]
    if not kept:
        return []
    rows, completions = [rows[place] for place in kept], [completions[place] for place in kept]
    device = causal_model(job.model).device
    packed = pack_contexts(rows, completions, pad_token_id=job.pad_token_id, side=job.side, device=device)
    states = frozen_states(FrozenModel(job.model), packed)
    assert states.base is not None and states.reference is not None
    mask = packed["base"].completion_mask
    base, teacher, reference = (x[mask] for x in (states.base, states.teacher, states.reference))
    ids = packed["base"].completion_ids[mask]
    output = _loss(job, packed["base"], HiddenStates(base, base, teacher, reference), states.head, ids)
    parts = decompose(HiddenStates(base, None, teacher, reference), states.head, config=job.config.loss)
    columns = parts._asdict() | ({} if output.purification is None else output.purification._asdict())
    columns |= {name: getattr(output, name) for name in ("divergence", "student_entropy", "target_entropy")}
    columns |= {"weight": output.weights}
    columns |= _probabilities((base, teacher, reference), states.head, ids, job.markers, job.config)
    numbers = {name: x.tolist() for name, x in columns.items() if x is not None}
    where = [(first + kept[row], position) for row, line in enumerate(completions) for position in range(len(line))]
    return [
        {"completion": completion, "position": position, "token": token, "text": job.tokenizer.decode([token])}
        | {name: values[index] for name, values in numbers.items()}
        for index, ((completion, position), token) in enumerate(zip(where, ids.tolist(), strict=True))
    ]


def _loss(job: _Job, packed: Packed, hidden: HiddenStates, head: Head, ids: torch.Tensor) -> LossOutput:
    """Of each token, in the form that training would take it; its weights are those that training would give."""
    config, mask = job.config, packed.completion_mask
    weights = torch.ones_like(mask, dtype=torch.float32)
    if job.token_weights is not None:
        weights = job.token_weights(mask).float()
    positions = ((weights != 0) & mask).long().cumsum(dim=1).sub(1).clamp_min(0)
    common: dict[str, Any] = {"weights": weights[mask], "positions": positions[mask], "token_ids": ids}
    common |= {"config": config.loss, "masks": config.masks}
    if config.contexts == ["teacher"]:
        return linear_jsd(hidden.student, head, hidden.teacher, head, **common)
    if "reference" not in config.contexts:  # the base takes its place in training too
        hidden = hidden._replace(reference=hidden.base)
    return linear_purified_jsd(hidden, head, telemetry=isinstance(config.loss, PurifiedConfig), **common)


def _probabilities(
    hidden: Sequence[torch.Tensor], head: Head, ids: torch.Tensor, markers: Watched, config: DiagnoseConfig
) -> dict[str, torch.Tensor]:
    """Probabilities of the sampled token and of each marker, [N] each, under the four distributions, and what compares these.

    hidden: [N, D] of base, teacher and reference. ids: [N]. A few rows of logits are computed at a time.
    """
    step = max(1, _BLOCK_ELEMENTS // head.weight.shape[0])
    blocks: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(ids), step):
        logits = [head_logits(x[start : start + step], head) for x in hidden]
        target = _target_logits(logits, config)
        logits = [z[:, : target.shape[1]] / config.loss.temperature for z in logits]
        block = {}
        for context, z in zip(CONTEXTS, (*logits, target), strict=True):
            p = z.softmax(dim=-1)
            block[f"{context}/token"] = p.gather(1, ids[start : start + step, None])[:, 0]
            for word, tokens in markers.ids.items():
                inside = [token for token in tokens if token < p.shape[1]]
                block[f"{context}/{word}"] = p[:, inside].sum(dim=1)
        blocks.append(block | _compared(logits[0], logits[1], target))
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _target_logits(logits: Sequence[torch.Tensor], config: DiagnoseConfig) -> torch.Tensor:
    """Tempered logits of the target, [n, V'], V' the vocabulary in use."""
    base, teacher, reference = logits
    if config.contexts == ["teacher"]:
        return teacher[:, : config.loss.vocab_size] / config.loss.temperature
    reference = reference if "reference" in config.contexts else base
    return purified_target_logits(base, teacher, reference, config=config.loss)


def _compared(base: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of tempered logits [n, V]: how much the target moves, and measures of teachers that others publish, [n] each.

    overlap, overlap_advantage: arXiv 2604.13016 as verl logs it. overlap is the share of the teacher's likeliest tokens
    that are the base's too; overlap_advantage the mean over these of −π_T·(log π_T − log π_0).
    """
    log_base = base.log_softmax(dim=-1)
    log_target = target.log_softmax(dim=-1)
    target_kl = _kl(log_target, log_base)
    moved = log_target.exp_().sub_(log_base.exp()).abs_().sum(dim=-1) / 2
    del log_target
    log_teacher = teacher.log_softmax(dim=-1)
    teacher_kl = _kl(log_teacher, log_base)
    top = min(OVERLAP_TOP, base.shape[1])
    first = log_teacher.topk(top, dim=-1)
    shared = (first.indices[:, :, None] == log_base.topk(top, dim=-1).indices[:, None, :]).any(dim=-1)
    gained = first.values.exp() * (log_base.gather(1, first.indices) - first.values)
    return {
        "mass_moved": moved,
        "target_base_kl": target_kl,
        "teacher_base_kl": teacher_kl,
        "overlap": shared.float().mean(dim=-1),
        "overlap_advantage": torch.where(shared, gained, 0.0).sum(dim=-1) / shared.sum(dim=-1).clamp_min(1),
    }


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q) of [n, V] log-probabilities; an entry that p has not counts 0."""
    terms = log_p.exp().mul_(log_p - log_q)
    return terms.masked_fill_(log_p.isneginf(), 0.0).sum(dim=-1)


def _progress(steps: range, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(steps, desc="diagnose", unit="batch", disable=not shown)
