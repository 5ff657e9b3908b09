"""The pre-flight check: what the teacher would teach, measured on the base model's own completions before any training.

Completions are sampled on the question alone. The same tokens are run after the question (base), after question and
reference solution (teacher), and after the reference solution alone. The purified target is composed of these, token by
token. Student and base are still the same model, so the decomposition is that of the first training step. Training moves
the student from the base to the target. So the markers gain where the target gives them more probability than the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from popsd import Head, HiddenStates, PurifiedConfig, head_logits, linear_purified_jsd, purified_target_logits
from popsd.markers import EpistemicMarkers
from popsd_integrations.huggingface.frozen import FrozenModel, frozen_states
from popsd_integrations.huggingface.heads import causal_model, eval_mode
from popsd_integrations.huggingface.invariants import check_model
from popsd_integrations.huggingface.packing import pack_contexts
from popsd_integrations.huggingface.prompts import Prompts
from popsd_integrations.huggingface.sampling import Generate, Sampler, check_positions

CONTEXTS = ("base", "teacher", "reference", "target")
CURVES = (
    "reference_fraction",
    "cos_total_reference",
    "cos_total_transferable",
    "centred_reference_fraction",
    "weighted_reference_fraction",
    "mass_moved",
)
_BLOCK_ELEMENTS = 1 << 22
"""Logits of one context that are looked at together: 16 MiB in float32. Composing the target holds less than ten times that."""


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Options of `diagnose`.

    completions: how many to sample, one per problem. batch_size: rows per forward. max_new_tokens, temperature: of sampling.
    loss: the target to be checked, its masks on entries included. markers: what to look for; each must be one token.
    bins: points of the curves over positions. margin: a change of the markers' probability below this share counts as none.
    """

    completions: int = 32
    batch_size: int = 8
    max_new_tokens: int = 512
    temperature: float = 1.0
    loss: PurifiedConfig = field(default_factory=PurifiedConfig)
    markers: EpistemicMarkers = field(default_factory=EpistemicMarkers)
    bins: int = 24
    margin: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("completions", "batch_size", "max_new_tokens", "bins"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}.")
        for name in ("temperature", "margin"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a finite number of at least 0; got {getattr(self, name)}.")


@dataclass(frozen=True)
class Diagnosis:
    """tokens: a row for each completion token, in order, with completion, position, text and numbers.

    markers: mean probability per completion token of each marker and of "all" under base, teacher, reference and target.
    positions: means over bins of positions. means: over all tokens. config: what was asked for.
    """

    tokens: list[dict[str, Any]]
    markers: dict[str, dict[str, float]]
    positions: list[dict[str, float]]
    means: dict[str, float]
    config: dict[str, Any]

    @property
    def change(self) -> float:
        """The markers' probability under the target, relative to the base's. 1 is unchanged."""
        return _ratio(self.markers["all"], "target")

    @property
    def direction(self) -> str:
        """What training on the purified target would do to the markers: "raise", "lower" or "keep"."""
        margin = self.config["margin"]
        return "raise" if self.change > 1 + margin else "lower" if self.change < 1 - margin else "keep"

    @property
    def sentence(self) -> str:
        """The finding in words."""
        total, verb = self.markers["all"], {"raise": "raise", "lower": "lower", "keep": "leave as they are"}
        teacher = _ratio(total, "teacher")
        return (
            f"The purified target would {verb[self.direction]} the epistemic markers: {total['target']:.4f} per completion "
            f"token against the base's {total['base']:.4f} ({self.change:.2f} times); the teacher itself, standard OPSD's "
            f"target, has {total['teacher']:.4f} ({teacher:.2f} times). It moves {self.means['mass_moved']:.1%} of the "
            f"probability mass, and of the teacher's signal ‖Δ_ref‖/‖Δ_total‖ = {self.means['reference_fraction']:.2f} "
            "exists without the question."
        )


def diagnose(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompts],
    config: DiagnoseConfig | None = None,
    *,
    generate: Generate | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Sample ``model``'s completions and measure what the purified target would change in them. Nothing is trained.

    generate: see ``huggingface.Sampler``; None: ``hf_generate``.
    Raises ValueError for no problem, for completions without a token, where no marker is a token of ``tokenizer``, and for
    a model that ``huggingface.check_model`` refuses.
    """
    config = config or DiagnoseConfig()
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one problem; got none. Build them with ContextBuilder.build_all.")
    markers = config.markers.token_ids(tokenizer)
    sampling: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    sampler = Sampler(model, tokenizer, **sampling, generate=generate, vocab_size=config.loss.vocab_size)
    side = check_model(model, prompts, pad_token_id=sampler.pad_token_id)
    chosen = list(prompts[: config.completions])
    check_positions(model, chosen, config.max_new_tokens)
    tokens: list[dict[str, Any]] = []
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for first in _progress(range(0, len(chosen), config.batch_size), progress):
            rows = chosen[first : first + config.batch_size]
            completions = sampler(model, rows)
            tokens += _measure(
                model, tokenizer, rows, completions, first, markers, config, (sampler.pad_token_id, side)
            )
    if not tokens:
        raise ValueError(
            "prompts: expected completions of at least one token; got none. Look at the prompts' templates."
        )
    return Diagnosis(tokens, _marker_table(tokens, markers), _curves(tokens, config), _means(tokens), _plain(config))


def _measure(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Prompts],
    completions: Sequence[Sequence[int]],
    first: int,
    markers: dict[str, tuple[int, ...]],
    config: DiagnoseConfig,
    padding: tuple[int, str],
) -> list[dict[str, Any]]:
    kept = [place for place, ids in enumerate(completions) if ids]
    if not kept:
        return []
    rows, completions = [rows[place] for place in kept], [completions[place] for place in kept]
    pad, side = padding
    packed = pack_contexts(rows, completions, pad_token_id=pad, side=side, device=causal_model(model).device)
    states = frozen_states(FrozenModel(model), packed)
    assert states.base is not None and states.reference is not None
    mask = packed["base"].completion_mask
    base, teacher, reference = (x[mask] for x in (states.base, states.teacher, states.reference))
    ids = packed["base"].completion_ids[mask]
    output = linear_purified_jsd(
        HiddenStates(base, base, teacher, reference), states.head, config=config.loss, decompose=True, telemetry=True
    )
    assert output.decomposition is not None and output.purification is not None
    columns = output.decomposition._asdict() | output.purification._asdict()
    columns |= {name: getattr(output, name) for name in ("divergence", "student_entropy", "target_entropy")}
    columns |= _probabilities((base, teacher, reference), states.head, ids, markers, config.loss)
    numbers = {name: x.tolist() for name, x in columns.items() if x is not None}
    where = [(first + kept[row], position) for row, line in enumerate(completions) for position in range(len(line))]
    return [
        {"completion": completion, "position": position, "token": token, "text": tokenizer.decode([token])}
        | {name: values[index] for name, values in numbers.items()}
        for index, ((completion, position), token) in enumerate(zip(where, ids.tolist(), strict=True))
    ]


def _probabilities(
    hidden: Sequence[torch.Tensor],
    head: Head,
    ids: torch.Tensor,
    markers: dict[str, tuple[int, ...]],
    loss: PurifiedConfig,
) -> dict[str, torch.Tensor]:
    """Probabilities of the sampled token and of each marker, [N] each, under the four distributions.

    hidden: [N, D] of base, teacher and reference. ids: [N]. A few rows of logits are computed at a time.
    """
    step = max(1, _BLOCK_ELEMENTS // head.weight.shape[0])
    blocks: list[dict[str, torch.Tensor]] = []
    for start in range(0, len(ids), step):
        logits = [head_logits(x[start : start + step], head) for x in hidden]
        target = purified_target_logits(*logits, config=loss)
        block = {}
        for context, z in zip(CONTEXTS, (*logits, target), strict=True):
            tempered = z if z is target else z[:, : target.shape[1]] / loss.temperature
            p = tempered.softmax(dim=-1)
            block[f"{context}/token"] = p.gather(1, ids[start : start + step, None])[:, 0]
            for word, tokens in markers.items():
                block[f"{context}/{word}"] = p[:, list(tokens)].sum(dim=1)
        blocks.append(block)
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _marker_table(tokens: list[dict[str, Any]], markers: dict[str, tuple[int, ...]]) -> dict[str, dict[str, float]]:
    table = {
        word: {context: _mean([row[f"{context}/{word}"] for row in tokens]) for context in CONTEXTS} for word in markers
    }
    return table | {"all": {context: sum(table[word][context] for word in markers) for context in CONTEXTS}}


def _curves(tokens: list[dict[str, Any]], config: DiagnoseConfig) -> list[dict[str, float]]:
    longest = 1 + max(row["position"] for row in tokens)
    width = -(-longest // min(config.bins, longest))
    names = [f"{context}/{word}" for context in CONTEXTS for word in config.markers.words]
    curves = []
    for start in range(0, longest, width):
        inside = [row for row in tokens if start <= row["position"] < start + width]
        point = {"position": start + (width - 1) / 2, "tokens": float(len(inside))}
        point |= {name: _mean([row[name] for row in inside]) for name in CURVES}
        present = [name for name in names if name in tokens[0]]
        for context in CONTEXTS:
            own = [name for name in present if name.startswith(f"{context}/")]
            point[f"{context}/markers"] = sum(_mean([row[name] for row in inside]) for name in own)
        curves.append(point)
    return curves


def _means(tokens: list[dict[str, Any]]) -> dict[str, float]:
    names = [name for name, value in tokens[0].items() if isinstance(value, float)]
    return {"tokens": float(len(tokens)), **{name: _mean([row[name] for row in tokens]) for name in names}}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ratio(table: dict[str, float], context: str) -> float:
    return table[context] / table["base"] if table["base"] > 0 else float("inf") if table[context] > 0 else 1.0


def _plain(config: DiagnoseConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _progress(steps: range, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(steps, desc="diagnose", unit="batch", disable=not shown)
