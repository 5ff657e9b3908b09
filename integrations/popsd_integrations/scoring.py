"""Whether a completion answers a problem: by math-verify, or by any function of completion and answer.

Importing this needs no math-verify; the first verdict of the "math" scorer does.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from popsd_integrations.own_code import code_fingerprint, is_own

TAIL = 20_000
"""Characters at the end of a completion in which math-verify looks. Its patterns take seconds over a whole chain of thought."""


class Verdict(NamedTuple):
    """correct; answer: what the completion answers, as text, or None; formatted: whether it is given as it was asked for."""

    correct: bool
    answer: str | None = None
    formatted: bool | None = None


Scorer = Callable[[str, str], Verdict]
"""Of a completion's text and the problem's answer."""


def scorer(name: str = "math") -> Scorer:
    """The scorer of a name: "math" is `math_verdict`, ``module:function`` any other.

    Such a function takes a completion and the problem's answer, both text, and returns whether they agree, or
    ``(whether, the completion's answer or None)``. Only with answers can a majority be taken.
    Raises ValueError where it cannot be imported, or at the first call that returns something else; ImportError without
    math-verify.
    """
    if name == "math":
        _math_verify()
        return math_verdict
    found = _imported(name)

    def verdict(completion: str, answer: str) -> Verdict:
        returned = found(completion, answer)
        if isinstance(returned, bool | int | float) and returned in (0, 1):
            return Verdict(bool(returned))
        if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], str | None):
            return Verdict(bool(returned[0]), returned[1], returned[1] is not None)
        raise ValueError(
            f"eval_scorer: expected {name} to return True, False or (True or False, answer); got {returned!r}."
        )

    return verdict


def _imported(name: str) -> Callable[[str, str], Any]:
    module, colon, function = name.partition(":")
    try:
        if not colon:
            raise ImportError("it has no colon")
        found: Callable[[str, str], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"eval_scorer: expected 'math' or an importable module:function; got {name!r} ({error}). "
            "A module in the current folder needs PYTHONPATH=."
        ) from error
    return found


def scorer_code(name: str) -> str | None:
    """Fingerprint of a scorer of one's own, which may be edited between two runs. None for popsd's."""
    found = None if name == "math" else _imported(name)
    return code_fingerprint(found) if is_own(found) else None


def check_answer(score: Scorer, answer: str) -> None:
    """Raise ValueError for an answer of the data that ``score`` could never find right, or cannot read."""
    if score is not math_verdict:
        score("", answer)
    elif not gold(answer):
        raise ValueError(
            f"answer: expected one that math-verify can parse; got {answer!r}. Mend it or name an --eval_scorer."
        )


def math_verdict(completion: str, answer: str) -> Verdict:
    r"""By math-verify: what stands in the last \boxed, or else in the last expression, compared as mathematics.

    A completion that closes a block of thought is judged by what follows it. formatted: whether there is a \boxed.

    >>> math_verdict(r"so \boxed{\frac{2}{4}}", "0.5")
    Verdict(correct=True, answer='1/2', formatted=True)
    """
    _, parse, verify = _math_verify()
    final = completion.rpartition("</think>")[2]
    content = boxed(final)
    # More than one answer can stand beside another, and math-verify then joins them. The last one is what counts here.
    text = final[-TAIL:] if content is None else rf"\boxed{{{content}}}"
    found = parse(text)
    # 1 < x ≤ 2 answers (1, 2]; math-verify takes only the converse unless it is told
    correct = bool(found) and bool(verify(gold(answer), found, allow_set_relation_comp=True))
    return Verdict(correct, _written(found) if found else None, content is not None)


def _written(found: list[Any]) -> str:
    """What was parsed, so that 1/2 and 0.5 are one answer. As it stands there where SymPy cannot write it."""
    try:
        return str(found[0])
    except (ValueError, RecursionError):  # Python writes no number of more than 4,300 digits
        return str(found[-1])


def gold(answer: str) -> list[Any]:
    """What math-verify makes of an answer of the data; empty where it cannot parse it."""
    _, parse, _ = _math_verify()
    content = boxed(answer)
    written = answer.strip().strip("$") if content is None else content
    found = parse(rf"\boxed{{{written}}}") if written.strip() else []
    return [] if found and isinstance(found[0], str) else list(found)  # text alone: it could not be parsed


def boxed(text: str) -> str | None:
    r"""The content of the last whole \boxed{…} or \fbox{…}, braces within it matched, or None.

    >>> boxed(r"\boxed{1} then \boxed{\frac{1}{2}}"), boxed(r"\boxed{1")
    ('\\frac{1}{2}', None)
    """
    for start in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for place in range(start.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0) * (text[place - 1] != "\\")
            if depth == 0:
                return text[start.end() : place]
    return None


def _math_verify() -> tuple[Any, Any, Any]:
    try:
        import math_verify
    except ImportError as error:
        raise ImportError("math-verify is missing: pip install 'popsd[eval]'", name="math_verify") from error
    # What cannot be parsed is a verdict here, and no reason to print a stack of calls.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return math_verify, math_verify.parse, math_verify.verify
