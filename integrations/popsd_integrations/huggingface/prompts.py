"""The prompts of student, teacher and reference-only teacher."""

from __future__ import annotations

import itertools
import random
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Conversation = str | list[dict[str, Any]]
"""Text, or messages with "role" and "content"."""


class Problem(NamedTuple):
    """A question and its reference solution.

    question: text, or a conversation: messages with "role" and "content", the last one the user's. Templates are filled
        with that message. The messages before it stay in student and teacher. The reference keeps only the system's.
    wrong_solution: the wrong hint. Only ``ContextConfig.reference = "wrong_hint"`` uses it.
    other_solution: the solution of another problem, see `other_solutions`. Only "other_problem" in `ContextConfig` uses it.
    """

    question: str | Sequence[Mapping[str, Any]]
    solution: str
    wrong_solution: str | None = None
    other_solution: str | None = None


def other_solutions(solutions: Sequence[str], seed: int) -> list[str]:
    """For each problem the solution of another one, drawn by ``seed``. Each problem lends its solution once, but for those
    that would lend a text to its own equal: the next one lends in their place.

    Raises ValueError where there is no other text.
    """
    order = list(range(len(solutions)))
    random.Random(f"other problem:{seed}").shuffle(order)
    if len(set(solutions)) < 2:
        raise ValueError(
            f"other_problem: expected problems of at least two different solutions; got {len(solutions)} problems and "
            f"{len(set(solutions))} different solutions. Add data, or choose another reference."
        )
    others = [""] * len(order)
    for place, index in enumerate(order):
        following = itertools.chain(order[place + 1 :], order)
        others[index] = next(text for text in map(solutions.__getitem__, following) if text != solutions[index])
    return others


class Prompts(NamedTuple):
    """Token ids of one problem's prompts.

    question: what student and base read. teacher: with the solution. reference: the solution alone, or what
    `ContextConfig` puts in their places.
    """

    question: list[int]
    teacher: list[int]
    reference: list[int]


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """How prompts are written. Templates hold ``{question}`` and ``{solution}``; everything else in them is literal.

    reference: "solution_only" writes the solution without the question, by ``reference_template``. "wrong_hint" writes the
        problem's ``wrong_solution`` by ``teacher_template``, for the contrast of hints; "other_problem" another problem's
        solution in its place. "none" writes the question alone, by ``question_template``.
    teacher_reference: which solution the teacher is given. "solution": the problem's own. Two controls ask what of a gain
        needs it: "other_problem" takes another problem's (OP²SD, arXiv 2608.09228), in "solution_only" too; "none" none
        (arXiv 2609.20612), and the teacher reads the question alone, by ``question_template``.
    other_seed: by which `ContextBuilder.build_all` draws the other problems.
    system_prompt: a first message of every chat, or None. It needs a tokenizer with a chat template.
    student_kwargs, teacher_kwargs, reference_kwargs: ``chat_template_kwargs`` of each context, such as
        ``enable_thinking``.
    max_prompt_length: longest prompt allowed in any context, or None.
    on_overflow: what happens to a longer one. "error" raises. "truncate" cuts the solution, alike in teacher and reference
        (and a wrong hint to the same number of tokens). "drop" leaves the row out. The question is never cut.
    Raises ValueError where a template has other fields, and for unknown values.
    """

    question_template: str = "{question}"
    teacher_template: str = (
        "{question}\n\nA reference solution of this problem:\n<reference>\n{solution}\n</reference>\n\n"
        "With the reference in mind, solve the problem again in your own words, step by step."
    )
    reference_template: str = (
        "A reference solution of some problem:\n<reference>\n{solution}\n</reference>\n\n"
        "With the reference in mind, solve the problem again in your own words, step by step."
    )
    reference: str = "solution_only"
    teacher_reference: str = "solution"
    other_seed: int = 0
    system_prompt: str | None = None
    student_kwargs: Mapping[str, Any] = field(default_factory=dict)
    teacher_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reference_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_prompt_length: int | None = None
    on_overflow: str = "error"

    def __post_init__(self) -> None:
        expected = {
            "question_template": {"{question}"},
            "teacher_template": {"{question}", "{solution}"},
            "reference_template": {"{solution}"},
        }
        for name, fields in expected.items():
            found = set(_FIELD.findall(getattr(self, name)))
            if found != fields:
                raise ValueError(
                    f"{name}: expected the fields {sorted(fields)} and no other; got {sorted(found)} in "
                    f"{getattr(self, name)!r}. The student never sees the solution, the reference never the question."
                )
        for name, known in (
            ("reference", ("solution_only", "wrong_hint", "other_problem", "none")),
            ("teacher_reference", ("solution", "other_problem", "none")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}; got {getattr(self, name)!r}.")
        if self.reference == self.teacher_reference:
            raise ValueError(
                f"reference: expected another than teacher_reference={self.reference!r}; got the same, and nothing would be "
                "left of the signal. Leave one of the two at its default."
            )
        if self.on_overflow not in ("error", "truncate", "drop"):
            raise ValueError(f"on_overflow: expected 'error', 'truncate' or 'drop'; got {self.on_overflow!r}.")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(f"max_prompt_length: expected at least 1, or None; got {self.max_prompt_length}.")

    @property
    def needs_other(self) -> bool:
        """Whether some context is given another problem's solution."""
        return "other_problem" in (self.reference, self.teacher_reference)


_FIELD = re.compile(r"\{question\}|\{solution\}")


class ContextBuilder:
    """Writes the three prompts of a problem by a Hugging Face tokenizer's chat template, or as plain text without one.

    text_as_chat: write a question given as text as a user's message where there is a chat template. False leaves it plain
        text, as TRL does. A conversation always takes the chat template.
    ``truncated`` counts the problems whose solution was cut, ``dropped`` those left out.
    Raises ValueError for a system prompt without a chat template.

    >>> from popsd_integrations.miniature.tokenizer import build_tokenizer
    >>> config = ContextConfig(teacher_template="{question} {solution} A", reference_template="{solution} A")
    >>> ContextBuilder(build_tokenizer(), config).build(Problem("Q 3", "4 5"))
    Prompts(question=[11, 3], teacher=[11, 3, 4, 5, 13], reference=[4, 5, 13])
    """

    def __init__(self, tokenizer: Any, config: ContextConfig | None = None, *, text_as_chat: bool = True) -> None:
        self.tokenizer = tokenizer
        self.config = config or ContextConfig()
        self.truncated = 0
        self.dropped = 0
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        # Special tokens steer the model: turns, begin and end. The unknown token is special too, but is text.
        special = {
            token: added.content
            for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items()
            if added.special and added.content != tokenizer.unk_token
        }
        self._control_ids = set(special)
        self._control = re.compile("|".join(map(re.escape, special.values()))) if special else None
        self._text_as_chat = text_as_chat and self._has_template
        if self.config.system_prompt is not None and not self._has_template:
            raise ValueError(
                "system_prompt: expected None, since this tokenizer has no chat_template; "
                f"got {self.config.system_prompt!r}. Write it into the templates."
            )

    def build(self, problem: Problem) -> Prompts | None:
        """The prompts of one problem, or None where ``on_overflow="drop"`` left it out.

        Raises ValueError as `check` does, where the chat template fails, and where a prompt is longer than
        max_prompt_length.
        """
        self.check(problem)
        problem = self._hinted(problem)
        prompts = self._prompts(problem)
        limit = self.config.max_prompt_length
        if limit is None or max(map(len, prompts)) <= limit:
            return prompts
        if self.config.on_overflow == "truncate" and len(prompts.question) <= limit:
            shortened = self._truncate(problem, prompts, limit)
            if shortened is not None:
                self.truncated += 1
                return shortened
        if self.config.on_overflow == "drop":
            self.dropped += 1
            return None
        lengths = ", ".join(f"{name} {len(ids)}" for name, ids in zip(Prompts._fields, prompts, strict=True))
        raise ValueError(
            f"max_prompt_length: expected prompts of at most {limit} tokens; got {lengths}, and the question is never "
            "cut. Raise max_prompt_length, or set on_overflow to 'truncate' (cuts the solution) or 'drop'."
        )

    def question(self, problem: Problem) -> list[int]:
        """What the student reads, of a problem that nothing has checked. Its solution is not looked at."""
        return self._encode(self.config.question_template, problem, self.config.student_kwargs)

    def build_all(self, problems: Sequence[Problem]) -> list[Prompts]:
        """The prompts of all problems but the dropped ones, each with another one's solution where the contexts need that.

        Raises ValueError where none is left, as `other_solutions` does, or as `build` does for one, with its number.
        """
        built = []
        if self.config.needs_other:
            others = other_solutions([problem.solution for problem in problems], self.config.other_seed)
            problems = [p._replace(other_solution=text) for p, text in zip(problems, others, strict=True)]
        for row, problem in enumerate(problems):
            try:
                prompts = self.build(problem)
            except ValueError as error:
                raise ValueError(f"problems[{row}]: {error}") from error
            if prompts is not None:
                built.append(prompts)
        if not built:
            raise ValueError(
                f"problems: expected at least one that fits max_prompt_length={self.config.max_prompt_length}; "
                f"got {len(problems)} problems, {self.dropped} dropped. Raise max_prompt_length."
            )
        return built

    def check(self, problem: Problem) -> None:
        """Raise ValueError where a text is empty, cannot be encoded or holds control tokens, and for a conversation that
        does not end with the user's message or whose messages lack role or content.
        """
        question, solution, wrong, other = problem
        spoken = {} if isinstance(question, str) else self._messages(question)
        texts = {"question": question if isinstance(question, str) else question[-1]["content"], "solution": solution}
        if self.config.reference == "wrong_hint":
            texts["wrong_solution"] = wrong
            if wrong == solution:
                raise ValueError(f"wrong_solution: expected another text than the solution; got {wrong!r} in both.")
        if self.config.needs_other:
            texts["other_solution"] = other
            if other == solution:
                raise ValueError(f"other_solution: expected another text than the solution; got {other!r} in both.")
        for name, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"{name}: expected non-empty text; got {text!r}. Leave problems without one out of the data."
                )
        for name, text in (spoken | texts).items():
            self._check_text(name, text)
        if not self.tokenizer(solution, add_special_tokens=False)["input_ids"]:
            raise ValueError(
                f"solution: expected at least one token; got none from {solution!r}. Without it the teacher knows no "
                "more than the student; leave the problem out of the data."
            )

    def _messages(self, question: Any) -> dict[str, str]:
        """The contents of a conversation by their place in it. Raises ValueError where it is none."""
        if not isinstance(question, Sequence) or not all(isinstance(message, Mapping) for message in question):
            raise ValueError(f"question: expected text or a list of messages; got {reprlib.repr(question)}.")
        if not self._has_template:
            raise ValueError(
                "question: expected text, since this tokenizer has no chat_template; got a conversation. Set "
                "tokenizer.chat_template (instruction-tuned models bring one), or write the questions as text."
            )
        for place, message in enumerate(question):
            content = "" if message.get("tool_calls") else message.get("content")
            if not isinstance(message.get("role"), str) or not isinstance(content, str):
                raise ValueError(
                    f"question[{place}]: expected a message whose 'role' and 'content' are text; got "
                    f"{reprlib.repr(dict(message))}. "
                    "ShareGPT's 'from' and 'value' have to be renamed, and images cannot be used."
                )
        roles = [message["role"] for message in question]
        if roles[-1:] != ["user"]:
            raise ValueError(f"question: expected a conversation that ends with the user's message; got {roles}.")
        return {f"question[{place}]": message.get("content") or "" for place, message in enumerate(question)}

    def _check_text(self, name: str, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: expected text that UTF-8 can encode; got {text[error.start]!r} at character {error.start}, half "
                "of a surrogate pair. Leave the problem out of the data, or write the whole character."
            ) from error
        if self._control is None:
            return
        found = self._control.findall(text)
        if found and not self._control_ids.isdisjoint(self.tokenizer(text, add_special_tokens=False)["input_ids"]):
            raise ValueError(
                f"{name}: expected text without the tokenizer's control tokens; got {found[0]!r}. In a prompt that is "
                "rendered already the solution would land in the assistant's turn: pass messages with 'role' and "
                "'content', which the chat template renders. Take such tokens out of other texts."
            )

    def _hinted(self, problem: Problem) -> Problem:
        """The problem as the contexts use it: the teacher's solution, and the reference's contrast as the wrong one."""
        question, solution, wrong, other = problem
        contrasts = {"wrong_hint": wrong, "other_problem": other}
        given = other if self.config.teacher_reference == "other_problem" else solution
        assert given is not None  # checked
        return Problem(question, given, contrasts.get(self.config.reference))

    def conversations(self, problem: Problem) -> tuple[Conversation, Conversation, Conversation]:
        """What student, teacher and reference read, as messages, or as text where `build` would take it so.

        For a framework that tokenises by itself; what is about tokens in the configuration is then not read. Raises ValueError
        as `check` does.
        """
        self.check(problem)
        question, teacher, reference = (self._write(*part) for part in self._parts(self._hinted(problem)))
        return question, teacher, reference

    def _parts(self, problem: Problem) -> list[tuple[str, Problem]]:
        """Template and fillings of student, teacher and reference, of a problem from `_hinted`."""
        config = self.config
        teacher, reference, contrasted = config.teacher_template, config.reference_template, problem
        if problem.wrong_solution is not None:
            reference, contrasted = config.teacher_template, problem._replace(solution=problem.wrong_solution)
        if config.teacher_reference == "none":
            teacher = config.question_template
        if config.reference == "none":
            reference = config.question_template
        return [(config.question_template, problem), (teacher, problem), (reference, contrasted)]

    def _prompts(self, problem: Problem) -> Prompts:
        """Of a problem from `_hinted`."""
        kwargs = (self.config.student_kwargs, self.config.teacher_kwargs, self.config.reference_kwargs)
        parts = zip(self._parts(problem), kwargs, strict=True)
        return Prompts(*(self._encode(*part, chat_template_kwargs) for part, chat_template_kwargs in parts))

    def _write(self, template: str, problem: Problem) -> Conversation:
        question, history = problem.question, []
        if not isinstance(question, str):
            *history, last = ({**message} for message in question)
            question = last["content"]
        values = {"{question}": question, "{solution}": problem.solution}
        # One pass over the template, so that a question which contains "{solution}" stays as it is.
        text = _FIELD.sub(lambda found: values[found[0]], template)
        if isinstance(problem.question, str) and not self._text_as_chat:
            return text
        if "{question}" not in template:  # what the user and the model said before is part of the question
            history = [message for message in history if message["role"] == "system"]
        if self.config.system_prompt is not None and not any(message["role"] == "system" for message in history):
            history.insert(0, {"role": "system", "content": self.config.system_prompt})
        return [*history, {"role": "user", "content": text}]

    def _encode(self, template: str, problem: Problem, chat_template_kwargs: Mapping[str, Any]) -> list[int]:
        written = self._write(template, problem)
        if isinstance(written, str):
            begin = getattr(self.tokenizer, "bos_token", None)
            begun = begin is not None and written.startswith(begin)  # by the template: the tokenizer adds no second one
            return list(self.tokenizer(written, add_special_tokens=not begun)["input_ids"])
        try:
            rendered = self.tokenizer.apply_chat_template(
                written, add_generation_prompt=True, tokenize=False, **chat_template_kwargs
            )
        except Exception as error:  # a template raises what it likes
            roles = [message["role"] for message in written]
            raise ValueError(
                f"chat_template: expected to write a conversation of {roles}; got {type(error).__name__}: {error}"
            ) from error
        if written[-1]["content"].strip() not in rendered:
            raise ValueError(
                "chat_template: expected the user's message in what it writes; got a prompt without it. Templates of "
                "some vision models write lists of contents alone; set tokenizer.chat_template to one that writes text."
            )
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _truncate(self, problem: Problem, prompts: Prompts, limit: int) -> Prompts | None:
        """The prompts with the longest beginning of the solution that fits both. Δ_it needs the same solution in both."""
        hints = [text for text in (problem.solution, problem.wrong_solution) if text is not None]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in hints]
        keep = max(map(len, ids))
        while max(map(len, prompts)) > limit:
            # Decoding and encoding again may change the number of tokens, hence the loop.
            keep -= max(map(len, prompts)) - limit
            # A token may end amid a character, which then decodes as U+FFFD.
            solution, *wrong = (self.tokenizer.decode(hint[: max(keep, 0)]).rstrip("\ufffd").strip() for hint in ids)
            if not all((solution, *wrong)):
                return None
            prompts = self._prompts(Problem(problem.question, solution, *wrong))
        return prompts


def thinking_states(tokenizer: Any, prompts: Prompts) -> dict[str, str]:
    """How each prompt ends: "open" in a <think> block, "closed" after one, "none" otherwise.

    The same completion follows all three prompts. Where they end differently, its first tokens (``<think>`` or the answer)
    mean something else in each context, and the templates alone cause a divergence there.
    """
    ends = {name: tokenizer.decode(ids[-8:]).rstrip() for name, ids in prompts._asdict().items()}
    return {
        name: "open" if end.endswith("<think>") else "closed" if end.endswith("</think>") else "none"
        for name, end in ends.items()
    }
