"""The one matrix of correctness: which public calls are made, with which options, heads, dtypes and sizes. Data alone: what is
done with a case, and what it may be off by, is in judge.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from popsd import PurifiedConfig

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPREADS = {"kl 1e-3": 0.012, "kl 1e-1": 0.12, "kl 1": 0.45}
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.3},
    "entry_clip": {"entry_clip": 1e-3},
    "token_clip": {"token_clip": 0.4},
    "no pmi_clip": {"pmi_clip": None},
    "pmi_beta": {"pmi_beta": 2.0},
    "uncentred": {"center": False, "pmi_clip": 1.0},
    "exact_difference": {"exact_difference": True},
    "plausibility": {"plausibility": 0.1},
    "tail cap": {"tail_floor": 1e-3, "tail_cap": 0.1},
}


class Heads(NamedTuple):
    """frozen: options of the frozen head; None: the student's head serves all streams."""

    own: Mapping[str, Any]
    frozen: Mapping[str, Any] | None = None


HEADS = {
    "plain": Heads({}),
    "bias": Heads({"bias": True}),
    "scale": Heads({"bias": True, "logit_scale": 0.5}),
    "scale alone": Heads({"logit_scale": 0.5}),
    "softcap": Heads({"bias": True, "softcap": 30.0}),
    "two heads": Heads({"bias": True, "logit_scale": 0.8}, {}),
    "two heads, no bias": Heads({"logit_scale": 0.8}, {}),
    "two heads, softcap": Heads({"softcap": 20.0}, {"bias": True, "softcap": 30.0, "logit_scale": 1.1}),
}


class Size(NamedTuple):
    tokens: int
    vocab: int
    width: int

    @property
    def used(self) -> int:
        """Rows of the vocabulary in use: all but some padding, as in Qwen3's 151,669 of 151,936."""
        return self.vocab - max(1, self.vocab // 569)


# On 132 multiprocessors `launch.too_few_rows` splits the rows of calls below some 240 tokens; 272 take the two main sweeps.
# 2 GiB are enough for every place but "beyond", which takes 13.
GPU_SIZES = {
    "main": Size(272, 40_007, 256),
    "few": Size(16, 151_936, 256),
    "full": Size(272, 151_936, 256),
    "beyond": Size(2**31 // 151_936 + 129, 151_936, 0),
}
TORCH_SIZES = {"main": Size(24, 997, 48), "few": Size(3, 997, 48), "full": Size(24, 997, 48)}
INTERPRETED_SIZES = dict.fromkeys(("main", "few", "full"), Size(3, 173, 24))
"""Blocks of 128 there: a full one and a tail."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of the public functions.

    call: "purified" or "two" (distributions), from hidden states or with ``logits`` from logits; "decompose"; "target";
    "beyond". head: of HEADS. total: ``reduction="sum"``. spread, std: distance of the streams, deviation of the logits.
    place: of the sizes. way: how it is run, see WAYS. portable: without approximate instructions.
    thin: also in Triton's interpreter. memcheck: one of the few for compute-sanitizer.
    """

    name: str
    call: str = "purified"
    logits: bool = False
    dtype: torch.dtype = torch.bfloat16
    options: Mapping[str, Any] = field(default_factory=dict)
    head: str = "plain"
    trainable: bool = False
    total: bool = False
    spread: float = 0.3
    std: float = 3.0
    strategy: str = "chunked"
    place: str = "main"
    way: str = "plain"
    portable: bool = False
    thin: bool = False
    memcheck: bool = False

    @property
    def gpu_only(self) -> bool:
        return self.way in ("compiled", "captured", "on a stream") or self.place == "beyond" or self.portable

    @property
    def main_path(self) -> bool:
        """Whether a GPU of 132 multiprocessors must run both main sweeps for it."""
        return self.call in ("purified", "two", "beyond") and self.strategy == "chunked" and self.place != "few"

    def config(self, size: Size) -> PurifiedConfig:
        return PurifiedConfig(vocab_size=size.used, **self.options)


def _cases() -> Iterator[Case]:
    betas, three = (0.0, 0.3, 0.5, 1.0), (0.0, 0.5, 1.0)
    calls = ("purified", "two")
    wide = ("float32", "bf16")
    for dtype, (kl, spread), beta in itertools.product(DTYPES, SPREADS.items(), betas):
        yield Case(
            name=f"purified {dtype} {kl} beta {beta}", dtype=DTYPES[dtype], spread=spread, options={"beta": beta},
            thin=((dtype, kl) == ("float32", "kl 1") and beta != 0.5) or (dtype, kl, beta) == ("bf16", "kl 1e-1", 0.5),
            memcheck=(dtype, kl) == ("bf16", "kl 1") and beta in (0.0, 0.5),
        )  # fmt: skip
    for std, beta, exact in itertools.product((10.0, 30.0), betas, (False, True)):
        options = {"beta": beta, "exact_difference": exact}
        name = f"purified bf16 logit std {std:.0f}{' exact' if exact else ''} beta {beta}"
        yield Case(name=name, spread=0.12, std=std, options=options)
    for dtype, (i, (name, options)), beta in itertools.product(wide, enumerate(OPTIONS.items()), three):
        yield Case(
            name=f"purified {dtype} {name} beta {beta}", dtype=DTYPES[dtype], options={"beta": beta, **options},
            thin=dtype == "float32" and (three[i % 3] == beta or name == "entry_clip"),
            memcheck=(dtype, name, beta) == ("bf16", "plausibility", 0.5),
        )  # fmt: skip
    for dtype, head, call in itertools.product(
        wide, ("bias", "scale", "softcap", "two heads", "two heads, softcap"), calls
    ):
        yield Case(
            name=f"{call} {dtype} {head} beta 0.3", call=call, dtype=DTYPES[dtype], head=head, options={"beta": 0.3},
            thin=dtype == "float32" and (call == "purified" or head.startswith("two")),
        )  # fmt: skip
    for dtype, total, call in itertools.product(DTYPES, (False, True), calls):
        yield Case(
            name=f"{call} {dtype} trainable {'sum' if total else 'per token'}", call=call, dtype=DTYPES[dtype],
            head="bias", trainable=True, total=total, thin=(dtype, call) == ("float32", "two" if total else "purified"),
        )  # fmt: skip
    for dtype, beta, call in itertools.product(DTYPES, three, calls):
        yield Case(
            name=f"{call} logits {dtype} beta {beta}", call=call, logits=True, dtype=DTYPES[dtype],
            options={"beta": beta}, thin=beta == 0.5 and dtype != "fp16", memcheck=(dtype, beta, call) == ("bf16", 0.5, "two"),
        )  # fmt: skip
    yield from _few_rows()
    for dtype, head in itertools.product(wide, ("plain", "scale", "softcap", "two heads")):
        name = f"decomposition {dtype} {head}"
        yield Case(
            name=name,
            call="decompose",
            dtype=DTYPES[dtype],
            head=head,
            thin=(dtype, head) in (("float32", "softcap"), ("float32", "two heads")),
        )
    for dtype in wide:
        name = f"target logits {dtype}"
        yield Case(name=name, call="target", logits=True, dtype=DTYPES[dtype], thin=dtype == "float32")
    yield from _streaming()
    for dtype, options in itertools.product(wide, ({"beta": 0.0}, {"beta": 0.5}, {"beta": 1.0}, {"entry_clip": 1e-3})):
        label = " ".join(f"{name} {value}" for name, value in options.items())
        yield Case(name=f"portable {dtype} {label}", dtype=DTYPES[dtype], options=options, portable=True)
    for dtype, call in itertools.product(wide, calls):
        yield Case(name=f"{call} {dtype} full vocabulary", call=call, dtype=DTYPES[dtype], place="full")
    yield Case(name="purified logits bf16 full vocabulary", logits=True, place="full")
    for way in ("under autocast", "compiled", "captured", "on a stream"):
        yield Case(name=f"run {way}", way=way, thin=way == "under autocast")
    yield Case(name="more than 2^31 logits", call="beyond", logits=True, place="beyond")
    yield from _single_read()


def _few_rows() -> Iterator[Case]:
    """Several programs per row. With one head float32 never splits: base and student travel as a difference."""
    for beta, call in itertools.product((0.0, 0.5, 1.0), ("purified", "two")):
        yield Case(
            name=f"few rows {call} bf16 beta {beta}", call=call, place="few", options={"beta": beta},
            memcheck=(beta, call) == (0.5, "purified"),
        )  # fmt: skip
    some = Case(name="few rows", place="few")
    for call in ("purified", "two"):
        name = f"few rows {call} float32 two heads"
        yield replace(some, name=name, call=call, dtype=torch.float32, head="two heads", thin=True)
        yield replace(some, name=f"few rows {call} logits bf16", call=call, logits=True, thin=True)
        yield replace(some, name=f"few rows {call} softcap", call=call, head="softcap")
    yield replace(some, name="few rows trainable", head="bias", trainable=True, total=True)
    yield replace(some, name="few rows entry_clip", head="softcap", options={"entry_clip": 1e-3}, thin=True)
    yield replace(some, name="few rows token_clip", options={"token_clip": 0.4})


def _streaming() -> Iterator[Case]:
    for dtype, beta, call in itertools.product(DTYPES, (0.0, 0.5, 1.0), ("purified", "two")):
        yield Case(
            name=f"streaming {call} {dtype} beta {beta}",
            call=call,
            dtype=DTYPES[dtype],
            options={"beta": beta},
            strategy="streaming",
            thin=(dtype, call) == ("float32", "purified") and beta < 1.0,
            memcheck=(dtype, beta, call) == ("bf16", 0.5, "two"),
        )
    for dtype in ("float32", "bf16"):
        some = Case(name=f"streaming {dtype}", dtype=DTYPES[dtype], strategy="streaming", thin=dtype == "float32")
        yield replace(some, name=f"{some.name} trainable sum", call="two", head="bias", trainable=True, total=True)
        yield replace(some, name=f"{some.name} trainable per token", head="bias", trainable=True, thin=False)
        yield replace(some, name=f"{some.name} two heads", head="two heads", thin=False)
        yield replace(some, name=f"{some.name} entry_clip", options={"entry_clip": 1e-3}, thin=False)
        yield replace(some, name=f"{some.name} few rows", place="few", thin=False)


def _single_read() -> Iterator[Case]:
    """Last of all: its programs wait for one another, and if that is not live nothing after it runs."""
    some = Case(name="single read", strategy="single_read")
    for dtype, beta in itertools.product(DTYPES, (0.0, 0.5, 1.0)):
        name = f"single read {dtype} beta {beta}"
        yield replace(some, name=name, dtype=DTYPES[dtype], options={"beta": beta}, thin=dtype == "float32")
    yield replace(some, name="single read scale", head="scale alone")
    yield replace(some, name="single read two heads", head="two heads, no bias")
    yield replace(some, name="single read entry_clip", options={"entry_clip": 1e-3})
    yield replace(some, name="single read few rows", place="few")
    yield replace(some, name="single read full vocabulary", place="full")


CASES = tuple(_cases())
