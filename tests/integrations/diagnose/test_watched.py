import pytest

pytest.importorskip("transformers")

from popsd.markers import EpistemicMarkers
from popsd_integrations.diagnose.watched import watched
from popsd_integrations.miniature.tokenizer import build_tokenizer


class Splitting:
    """Writes words in pieces of at most four letters; a space stands before a piece that begins a word."""

    all_special_ids = (0,)
    pieces = ("<s>", "wait", " wait", "perh", " perh", "aps", "Perh", "zeb", "ra", "a")

    def __len__(self):
        return len(self.pieces)

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.pieces[token] for token in ids if not (skip_special_tokens and token == 0))

    def __call__(self, text, add_special_tokens=False):
        ids = []
        while text:
            piece = max((x for x in self.pieces if text.startswith(x)), key=len, default=None)
            ids.append(0 if piece is None else self.pieces.index(piece))
            text = text[len(piece or text) :]
        return {"input_ids": ids}


def test_a_split_marker_is_measured_by_its_first_piece_and_that_is_said():
    found = watched(EpistemicMarkers(("perhaps", "wait", "hmm", "wait a moment")), Splitting())
    assert found.ids == {"perhaps": (3, 4, 6), "wait": (1, 2)} and found.left_out == ["hmm", "wait a moment"]
    assert found.summed == ("wait",), "first pieces begin other words too"
    assert "perhaps is several tokens here and is measured by its first ('perh', ' perh', 'Perh')" in found.note
    assert found.note.endswith("sums are of wait; this tokenizer has no token for hmm, wait a moment")
    assert watched(EpistemicMarkers(("perhaps",)), Splitting()).summed == ("perhaps",)
    assert watched(EpistemicMarkers(("maybe", "wait")), build_tokenizer()).note == ""
    with pytest.raises(ValueError, match=r"markers: expected a marker that this tokenizer can write; got \['hmm'\]"):
        watched(EpistemicMarkers(("hmm",)), Splitting())
