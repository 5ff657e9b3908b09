"""What was meant, where a name is misspelt."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """For the first option in ``text`` that is not known, the known one nearest to it. "" where none is near.

    >>> did_you_mean("unrecognized arguments: --pmi_bta 2", ["--pmi_beta", "--beta"])
    ' Did you mean --pmi_beta?'
    """
    known = sorted(known)
    for option in re.findall(r"--\w+", text):
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.7)
            return f" Did you mean {near[0]}?" if near else ""
    return ""


class Parser(argparse.ArgumentParser):
    """One whose errors say what was meant by a misspelt command, value or option."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if choice is not None:
            near = difflib.get_close_matches(choice[1], re.findall(r"[\w.-]+", choice[2]), n=1)
            message += f". Did you mean {near[0]}?" if near else ""
        super().error(message)
