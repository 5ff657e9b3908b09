"""Epistemic markers: the words by which a reasoner doubts and checks itself, counted in completions.

The paper (arXiv 2607.02234) finds that standard OPSD collapses them on Qwen3-8B (73K → 40K) and inflates them on
R1-Distill-7B (71K → 115K), while the purified target keeps them near 70K: a number worth logging at every step.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

DEFAULT_MARKERS = ("wait", "maybe", "perhaps", "check", "hmm", "actually", "but", "however")
PAPER_MARKERS = ("wait", "maybe", "perhaps", "check")
"""Those of the paper's tables, which count totals over a benchmark's completions."""
KIM_MARKERS = (*PAPER_MARKERS, "hmm", "actually", "alternatively", "seems", "might", "likely")
"""The ten of Kim et al., whom the paper follows. Their code counts lower-case substrings: ``whole_words=False``."""


class Decoder(Protocol):
    """What is needed of a tokenizer; every Hugging Face tokenizer fits."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Vocabulary(Decoder, Protocol):
    """The same, and its number of tokens."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class MarkerCounts:
    """counts: per marker, summed over the completions. completions: how many. tokens: their length, 0 if unknown."""

    counts: dict[str, int]
    completions: int
    tokens: int = 0

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def per_completion(self, marker: str | None = None) -> float:
        """Mean number of one marker, or of all of them, in a completion; 0 where there is no completion."""
        return self._of(marker) / max(self.completions, 1)

    def per_thousand_tokens(self, marker: str | None = None) -> float:
        """Markers per 1000 tokens: a rate that length does not move; 0 where the tokens were not counted."""
        return 1000 * self._of(marker) / self.tokens if self.tokens else 0.0

    def _of(self, marker: str | None) -> int:
        if marker is None:
            return self.total
        if marker not in self.counts:
            raise ValueError(
                f"marker: expected one of {sorted(self.counts)}; got {marker!r}. Add it to EpistemicMarkers."
            )
        return self.counts[marker]


@dataclass(frozen=True)
class EpistemicMarkers:
    """Counts whole words, whatever their case: ``Wait,`` counts, ``waiter`` does not.

    words: the markers, matched literally; a marker may be several words.
    whole_words: False counts every marker wherever it stands in the lower-case text, in ``waiter`` and ``unlikely`` too.
        Such counts are larger and are not to be compared with those of whole words.

    >>> [EpistemicMarkers(("wait",), whole).count_text(["Wait, waiter"]).total for whole in (True, False)]
    [1, 2]
    """

    words: tuple[str, ...] = DEFAULT_MARKERS
    whole_words: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.words, str):
            raise TypeError(
                f"words: expected a tuple of markers; got the string {self.words!r}. Write ({self.words!r},)."
            )
        object.__setattr__(self, "words", tuple(word.strip().lower() for word in self.words))
        if not self.words or not all(self.words):
            raise ValueError(f"words: expected at least one marker and no empty one; got {self.words!r}.")
        if len(set(self.words)) != len(self.words):
            raise ValueError(
                f"words: expected each marker once, case aside; got {self.words!r}. Remove the repetition."
            )

    @cached_property
    def _by_length(self) -> list[str]:
        # The longest alternative first, so that "wait a moment" is not counted as "wait".
        return sorted(self.words, key=len, reverse=True)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """A group for each of `_by_length`. The text that matched need not be the marker's in lower case: "ſ" matches s."""
        groups = "|".join(f"({re.escape(word)})" for word in self._by_length)
        return re.compile(rf"(?<!\w)(?:{groups})(?!\w)", re.IGNORECASE)

    def _marker(self, match: re.Match[str]) -> str:
        assert match.lastindex is not None
        return self._by_length[match.lastindex - 1]

    def token_ids(self, tokenizer: Vocabulary) -> dict[str, tuple[int, ...]]:
        """Of each marker, all tokens that are this word alone: any case, with spaces or punctuation around it.

        For probabilities of markers and for ``MaskConfig.protect_ids``. A marker that the tokenizer writes in several
        pieces has none, since its first piece begins other words too: a warning names it. Raises ValueError where no
        marker has any.
        """
        found: dict[str, list[int]] = {word: [] for word in self.words}
        for token in range(len(tokenizer)):
            text = tokenizer.decode([token], skip_special_tokens=True).strip()
            match = self._pattern.fullmatch(text) or self._pattern.fullmatch(re.sub(r"^\W+|\W+$", "", text))
            if match is not None:
                found[self._marker(match)].append(token)
        missing = [word for word, tokens in found.items() if not tokens]
        if len(missing) == len(found):
            raise ValueError(
                f"words: expected a marker that is one token of this tokenizer; got {list(self.words)}, none of which is. "
                "Choose markers it has, or count in text with count_ids."
            )
        if missing:
            warnings.warn(
                f"EpistemicMarkers: no single token for {', '.join(missing)}; left out here, though count_ids finds them.",
                stacklevel=2,
            )
        return {word: tuple(tokens) for word, tokens in found.items() if tokens}

    def count_text(self, texts: Sequence[str]) -> MarkerCounts:
        """Counts over a list of completions given as text. Raises TypeError for a bare string."""
        if isinstance(texts, str):
            raise TypeError("texts: expected a list of completions; got one string. Wrap it in a list.")
        counts = dict.fromkeys(self.words, 0)
        for text in texts:
            if self.whole_words:
                for match in self._pattern.finditer(text):
                    counts[self._marker(match)] += 1
            else:
                lower = text.lower()
                for word in self.words:
                    counts[word] += lower.count(word)
        return MarkerCounts(counts, len(texts))

    def count_ids(self, completions: Sequence[Sequence[int]], tokenizer: Decoder) -> MarkerCounts:
        """Counts over completions given as token ids, padding already removed.

        The ids are decoded first: one word may be several tokens, and one token several cased or spaced forms of a
        word.
        """
        texts = [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in completions]
        return MarkerCounts(self.count_text(texts).counts, len(texts), sum(map(len, completions)))
