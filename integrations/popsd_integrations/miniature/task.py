"""The task: given four distinct digits and a target T, find the one pair that sums to T modulo 10, by trial and check.

A completion is a row of tries, then ``ANS a b EOS``. A careful try is ``MAYBE a b CHECK s WAIT|OK`` with s = (a + b) mod
10, and after WAIT another try follows. A terse try is ``SO a b OK``. It is accepted unchecked, right or wrong. So the
accuracy comes from the markers MAYBE, CHECK and WAIT, as in a long chain of thought.

The three contexts write in different styles (STYLES). This is a design choice in the synthetic data: the teacher is less
terse than the reference-only teacher. The choice decides the sign of the outcome. With a teacher terser than the
reference-only one, the purified target loses markers too.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from popsd_integrations.huggingface.prompts import ContextConfig, Problem, Prompts
from popsd_integrations.miniature.tokenizer import TOKEN_ID

MAX_NEW_TOKENS = 46  # all six pairs tried carefully and the answer take 40
MINIATURE_CONTEXTS = ContextConfig(
    question_template="Q {question} A", teacher_template="Q {question} {solution} A", reference_template="{solution} A"
)


class Style(NamedTuple):
    """share: part of a warm-up batch. terse: P(a try is terse). peek: P(a try proposes the reference solution's pair)."""

    share: float
    terse: float
    peek: float


STYLES = {"question": Style(0.5, 0.18, 0.0), "teacher": Style(0.3, 0.6, 0.95), "reference": Style(0.2, 0.8, 0.97)}


@dataclass(frozen=True)
class Puzzle:
    """digits: four distinct, in the order shown. target: T. pair: the two that sum to T modulo 10, in that order."""

    digits: tuple[int, int, int, int]
    target: int
    pair: tuple[int, int]

    @property
    def problem(self) -> Problem:
        """The puzzle as text: question ``x1 x2 x3 x4 SEP T``, solution ``R a b OK`` (terse, no markers)."""
        question = " ".join(map(str, self.digits)) + f" SEP {self.target}"
        return Problem(question, f"R {self.pair[0]} {self.pair[1]} OK")

    @property
    def split(self) -> str:
        """train (7 in 10), validation (1) or test (2), by a hash that does not depend on the order of the digits."""
        key = f"{sorted(self.digits)}:{self.target}".encode()
        bucket = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % 10
        return "train" if bucket < 7 else "validation" if bucket == 7 else "test"

    def solved_by(self, completion: Sequence[int]) -> bool:
        """Whether the completion ends in ``ANS a b EOS`` with the right pair, in either order."""
        tail = list(completion[-4:])
        return (
            len(tail) == 4
            and (tail[0], tail[3]) == (TOKEN_ID["ANS"], TOKEN_ID["EOS"])
            and set(tail[1:3]) == set(self.pair)  # the id of a digit is the digit
        )


def verdict(completion: str, answer: str) -> tuple[bool, str | None]:
    """Whether a completion as text ends in ``ANS a b`` with the pair ``a b`` in either order, and its pair, sorted.

    A scorer for ``popsd evaluate --eval_scorer popsd_integrations.miniature.task:verdict``.

    >>> verdict("MAYBE 3 8 CHECK 1 WAIT SO 6 8 OK ANS 6 8", "8 6")
    (True, '6 8')
    """
    tail = completion.split()[-3:]
    given = " ".join(sorted(tail[1:])) if len(tail) == 3 and tail[0] == "ANS" else None
    return given == " ".join(sorted(answer.split())), given


def draw_puzzle(rng: random.Random, split: str) -> Puzzle:
    """A random puzzle of one split."""
    while True:
        digits = rng.sample(range(10), 4)
        target = rng.randrange(10)
        pairs = [pair for pair in itertools.combinations(digits, 2) if sum(pair) % 10 == target]
        if len(pairs) == 1:
            puzzle = Puzzle((digits[0], digits[1], digits[2], digits[3]), target, pairs[0])
            if puzzle.split == split:
                return puzzle


def draw_puzzles(count: int, split: str, seed: int) -> list[Puzzle]:
    """``count`` puzzles of one split, the same for the same seed."""
    rng = random.Random(f"{split}:{seed}")
    return [draw_puzzle(rng, split) for _ in range(count)]


def write_completion(puzzle: Puzzle, context: str, rng: random.Random) -> list[int]:
    """Token ids of a completion in the style of a context. Without the question, a pair is any two digits."""
    style = STYLES[context]
    digits: Sequence[int] = range(10) if context == "reference" else puzzle.digits
    untried = [pair for pair in itertools.combinations(digits, 2) if set(pair) != set(puzzle.pair)]
    untried.append(puzzle.pair)
    rng.shuffle(untried)
    tokens: list[str] = []
    while True:
        pair = puzzle.pair if puzzle.pair in untried and rng.random() < style.peek else untried[-1]
        untried.remove(pair)
        a, b = map(str, pair)
        if rng.random() < style.terse:
            tokens += ["SO", a, b, "OK"]
            break
        right = set(pair) == set(puzzle.pair)
        tokens += ["MAYBE", a, b, "CHECK", str(sum(pair) % 10), "OK" if right else "WAIT"]
        if right:
            break
    tokens += ["ANS", a, b, "EOS"]
    return [TOKEN_ID[token] for token in tokens]


def warmup_batches(batch_size: int, seed: int) -> Iterator[dict[str, tuple[list[list[int]], list[list[int]]]]]:
    """Endless supervised batches: for each context, prompts and completions as lists of token ids."""
    rng = random.Random(f"warm-up:{seed}")
    counts = {context: round(batch_size * style.share) for context, style in STYLES.items()}
    while True:
        batch = {}
        for context, count in counts.items():
            puzzles = [draw_puzzle(rng, "train") for _ in range(count)]
            prompts = [getattr(prompt_ids(puzzle), context) for puzzle in puzzles]
            batch[context] = (prompts, [write_completion(puzzle, context, rng) for puzzle in puzzles])
        yield batch


def prompt_ids(puzzle: Puzzle) -> Prompts:
    """The three prompts as token ids, as ``ContextBuilder`` with MINIATURE_CONTEXTS builds them of ``puzzle.problem``."""
    templates = MINIATURE_CONTEXTS
    contexts = (templates.question_template, templates.teacher_template, templates.reference_template)
    texts = (template.format(**puzzle.problem._asdict()) for template in contexts)
    return Prompts(*([TOKEN_ID[token] for token in text.split()] for text in texts))
