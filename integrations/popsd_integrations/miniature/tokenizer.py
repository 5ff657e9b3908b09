"""A word-level tokenizer of 22 tokens. It is a Hugging Face tokenizer, so contexts, markers and loop need no special case."""

from __future__ import annotations

from typing import Any

DIGITS = tuple("0123456789")
WORDS = ("PAD", "Q", "R", "A", "MAYBE", "CHECK", "WAIT", "OK", "ANS", "EOS", "SEP", "SO")
VOCABULARY = DIGITS + WORDS
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}


def build_tokenizer() -> Any:
    """A ``transformers.PreTrainedTokenizerFast`` over VOCABULARY; tokens are separated by single spaces.

    Only PAD and EOS are special, so that ``skip_special_tokens`` keeps the markers MAYBE, CHECK and WAIT in the text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(TOKEN_ID, unk_token="PAD"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="PAD", eos_token="EOS")
