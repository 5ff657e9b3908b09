import pytest

from popsd.markers import DEFAULT_MARKERS, KIM_MARKERS, EpistemicMarkers, MarkerCounts


class LetterTokenizer:
    """Ids are code points; 0 is a special token."""

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(token) for token in token_ids if token or not skip_special_tokens)


def test_counts_whole_words_in_any_case():
    counts = EpistemicMarkers().count_text(
        ["Wait, maybe not. WAIT! The waiter checks the butter.", "However, check it: but why?"]
    )
    assert counts.counts == dict.fromkeys(DEFAULT_MARKERS, 0) | {
        "wait": 2,
        "maybe": 1,
        "however": 1,
        "check": 1,
        "but": 1,
    }
    assert counts.total == 6
    assert counts.completions == 2


def test_counts_from_token_ids_decode_first():
    completions = [[ord(letter) for letter in "hmm, Wait"] + [0], [ord(letter) for letter in "no"]]
    counts = EpistemicMarkers(("wait", "hmm")).count_ids(completions, LetterTokenizer())
    assert counts.counts == {"wait": 1, "hmm": 1}
    assert counts.tokens == 12
    assert counts.per_completion() == 1.0
    assert counts.per_completion("wait") == 0.5
    assert counts.per_thousand_tokens("wait") == pytest.approx(1000 / 12)


def test_phrases_and_non_latin_markers():
    markers = EpistemicMarkers(("wait", "wait a moment", "等等", "c++"))
    assert markers.count_text(["Wait a moment. Wait. 等等 C++"]).counts == {
        "wait": 1,
        "wait a moment": 1,
        "等等": 1,
        "c++": 1,
    }


def test_letters_whose_lower_case_is_no_ascii_letter_count_as_the_ones_they_match():
    markers = EpistemicMarkers(("perhaps", "hmm", "wait", "kaı"))
    counts = markers.count_text(["perhapſ PERHAPſ", "waİt waıt", "\u212aaı"]).counts
    assert counts == {"perhaps": 2, "hmm": 0, "wait": 2, "kaı": 1}

    class Long:
        words = ("perhapſ", " Wait,", "hmm")

        def __len__(self):
            return 3

        def decode(self, token_ids, *, skip_special_tokens):
            return self.words[token_ids[0]]

    assert EpistemicMarkers(("perhaps", "wait")).token_ids(Long()) == {"perhaps": (0,), "wait": (1,)}


def test_no_completions_give_zero_rates():
    counts = EpistemicMarkers().count_text([])
    assert (counts.total, counts.per_completion(), counts.per_thousand_tokens()) == (0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("wait", TypeError, r"words: .*Write \('wait',\)"),
        ((), ValueError, r"words: expected at least one"),
        (("a", " "), ValueError, r"words: .*no empty one"),
        (("Wait", "wait"), ValueError, r"words: .*Remove the repetition"),
    ],
)
def test_bad_markers_are_named(words, error, message):
    with pytest.raises(error, match=message):
        EpistemicMarkers(words)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"texts: expected a list.*Wrap it"):
        EpistemicMarkers().count_text("wait")
    with pytest.raises(ValueError, match=r"marker: .*'well'.*Add it to EpistemicMarkers"):
        MarkerCounts({"wait": 1}, 1).per_completion("well")


def test_substrings_count_wherever_they_stand():
    text = "Wait, unlikely. CHECKING the waiter"
    words = EpistemicMarkers(KIM_MARKERS).count_text([text]).counts
    inside = EpistemicMarkers(KIM_MARKERS, whole_words=False).count_text([text]).counts
    assert {word: count for word, count in words.items() if count} == {"wait": 1}
    assert {word: count for word, count in inside.items() if count} == {"wait": 2, "likely": 1, "check": 1}


class WordTokenizer(LetterTokenizer):
    """One token per entry."""

    words = ("<pad>", "Wait", " wait", "WAIT,", "waiter", " may", "be", " maybe", "。check", "\n\nBut ")

    def __len__(self):
        return len(self.words)

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(self.words[token] for token in token_ids)


def test_token_ids_are_all_forms_of_a_word_alone():
    markers = EpistemicMarkers(("wait", "maybe", "check", "but"))
    assert markers.token_ids(WordTokenizer()) == {"wait": (1, 2, 3), "maybe": (7,), "check": (8,), "but": (9,)}


def test_markers_without_a_token_are_named():
    with pytest.warns(UserWarning, match=r"no single token for hmm"):
        assert EpistemicMarkers(("wait", "hmm")).token_ids(WordTokenizer()) == {"wait": (1, 2, 3)}
    with pytest.raises(ValueError, match=r"words: expected a marker that is one token .*\['hmm'\]"):
        EpistemicMarkers(("hmm",)).token_ids(WordTokenizer())
