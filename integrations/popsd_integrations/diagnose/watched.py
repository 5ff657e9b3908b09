"""Which tokens stand for which marker, also where the tokenizer writes a marker in several pieces."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from popsd.markers import EpistemicMarkers


class Watched(NamedTuple):
    """ids: the tokens of each marker. pieces: of a marker that is no token by itself, the first pieces it is measured by.
    left_out: markers that the tokenizer cannot begin, or not by a token that is no other marker's.
    """

    ids: dict[str, tuple[int, ...]]
    pieces: dict[str, list[str]]
    left_out: list[str]

    @property
    def summed(self) -> tuple[str, ...]:
        """The markers that "all" is the sum of. First pieces begin other words too, and count only where there is no other."""
        return tuple(word for word in self.ids if word not in self.pieces) or tuple(self.ids)

    @property
    def note(self) -> str:
        """What a reader has to know of split markers, or an empty text."""
        parts = [
            f"{word} is several tokens here and is measured by its first ({', '.join(map(repr, found))}), which begins other "
            "words too"
            for word, found in self.pieces.items()
        ]
        if self.pieces:
            parts.append("sums are of " + ", ".join(self.summed))
        if self.left_out:
            parts.append(f"this tokenizer has no token for {', '.join(self.left_out)}")
        return "; ".join(parts)


def watched(markers: EpistemicMarkers, tokenizer: Any) -> Watched:
    """Raises ValueError where no marker has a token of any kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of markers without a token of their own, which are looked at below
            ids = markers.token_ids(tokenizer)
    except ValueError:
        ids = {}
    taken = {token for tokens in ids.values() for token in tokens}
    pieces: dict[str, list[str]] = {}
    left_out = []
    for word in markers.words:
        if word in ids:
            continue
        found = sorted(_first_pieces(word, tokenizer) - taken)
        if not found:
            left_out.append(word)
            continue
        ids[word], pieces[word] = tuple(found), [tokenizer.decode([token]) for token in found]
        taken.update(found)
    if not ids:
        raise ValueError(
            f"markers: expected a marker that this tokenizer can write; got {list(markers.words)}. Choose others."
        )
    return Watched({word: ids[word] for word in markers.words if word in ids}, pieces, left_out)


def _first_pieces(word: str, tokenizer: Any) -> set[int]:
    """The first token with text of each usual spelling, as far as the word begins with that text."""
    found = set()
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for spelt in (word, word.capitalize(), word.upper()):
        for text in (spelt, f" {spelt}"):
            for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
                piece = tokenizer.decode([token]).strip()
                if piece:
                    if token not in special and word.startswith(piece.lower()):
                        found.add(token)
                    break
    return found
