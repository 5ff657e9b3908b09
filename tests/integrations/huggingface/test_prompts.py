import pytest

from popsd_integrations.huggingface.prompts import ContextBuilder, ContextConfig, Problem, thinking_states

pytest.importorskip("transformers")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking %} <think>{% endif %}{% endif %}"
)


def word_tokenizer(chat_template=None):
    """A word-level tokenizer that knows every word it will meet in these tests."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = (
        "PAD EOS UNK <|system|> <|user|> <|assistant|> <think> What is two plus ? It four since and make {solution} "
    )
    words += "Be brief Solution: Again: Question:"
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words.split()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="UNK"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="PAD", eos_token="EOS", unk_token="UNK")
    fast.chat_template = chat_template
    return fast


PROBLEM = Problem("What is two plus two ?", "It is four since two and two make four")
TEMPLATES = {
    "question_template": "Question: {question}",
    "teacher_template": "Question: {question} Solution: {solution} Again:",
    "reference_template": "Solution: {solution} Again:",
}


def test_plain_text_prompts():
    tokenizer = word_tokenizer()
    prompts = ContextBuilder(tokenizer, ContextConfig(**TEMPLATES)).build(PROBLEM)
    assert tokenizer.decode(prompts.question) == "Question: What is two plus two ?"
    assert tokenizer.decode(prompts.teacher) == f"Question: {PROBLEM.question} Solution: {PROBLEM.solution} Again:"
    assert tokenizer.decode(prompts.reference) == f"Solution: {PROBLEM.solution} Again:"


def test_chat_prompts_with_kwargs_of_their_own():
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    config = ContextConfig(
        **TEMPLATES,
        system_prompt="Be brief",
        student_kwargs={"enable_thinking": True},
        teacher_kwargs={"enable_thinking": False},
    )
    prompts = ContextBuilder(tokenizer, config).build(PROBLEM)
    assert tokenizer.decode(prompts.question).startswith("<|system|> Be brief <|user|> Question: What")
    assert tokenizer.decode(prompts.question).endswith("<|assistant|> <think>")
    assert tokenizer.decode(prompts.teacher).endswith("Again: <|assistant|>")
    assert "What" not in tokenizer.decode(prompts.reference).split()


def test_fields_inside_the_data_stay_literal():
    tokenizer = word_tokenizer()
    prompts = ContextBuilder(tokenizer, ContextConfig(**TEMPLATES)).build(Problem("What is {solution} ?", "It is four"))
    assert tokenizer.decode(prompts.question) == "Question: What is {solution} ?"


def test_too_long_is_an_error_by_default():
    builder = ContextBuilder(word_tokenizer(), ContextConfig(**TEMPLATES, max_prompt_length=12))
    with pytest.raises(ValueError, match=r"max_prompt_length: .*at most 12.*teacher 18.*on_overflow to 'truncate'"):
        builder.build(PROBLEM)


def test_truncation_cuts_the_same_solution_in_both_and_never_the_question():
    tokenizer = word_tokenizer()
    builder = ContextBuilder(tokenizer, ContextConfig(**TEMPLATES, max_prompt_length=12, on_overflow="truncate"))
    prompts = builder.build(PROBLEM)
    assert tokenizer.decode(prompts.teacher) == f"Question: {PROBLEM.question} Solution: It is four Again:"
    assert tokenizer.decode(prompts.reference) == "Solution: It is four Again:"
    assert len(prompts.teacher) == 12
    assert (builder.truncated, builder.dropped) == (1, 0)


@pytest.mark.parametrize("limit", [5, 9])  # the question alone is too long; nothing is left of the solution
def test_truncation_that_would_lose_the_question_or_the_solution_is_refused(limit):
    builder = ContextBuilder(
        word_tokenizer(), ContextConfig(**TEMPLATES, max_prompt_length=limit, on_overflow="truncate")
    )
    with pytest.raises(ValueError, match=r"the question is never cut"):
        builder.build(PROBLEM)


def test_dropped_rows_are_counted_and_none_left_is_an_error():
    builder = ContextBuilder(word_tokenizer(), ContextConfig(**TEMPLATES, max_prompt_length=12, on_overflow="drop"))
    assert len(builder.build_all([PROBLEM, Problem("What ?", "It is four")])) == 1
    assert builder.dropped == 1
    with pytest.raises(ValueError, match=r"problems: expected at least one .*Raise max_prompt_length"):
        builder.build_all([PROBLEM])


@pytest.mark.parametrize(("problem", "name"), [(Problem(" ", "x"), "question"), (Problem("x", ""), "solution")])
def test_empty_text_is_named(problem, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected non-empty text.*Leave problems without one out"):
        ContextBuilder(word_tokenizer()).build(problem)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_template": "{question} {solution}"}, r"reference_template: .*the reference never the question"),
        ({"question_template": "solve it"}, r"question_template: expected the fields"),
        ({"on_overflow": "cut"}, r"on_overflow: expected 'error'"),
        ({"max_prompt_length": 0}, r"max_prompt_length: expected at least 1"),
    ],
)
def test_bad_config_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ContextConfig(**options)


def test_system_prompt_needs_a_chat_template():
    with pytest.raises(ValueError, match=r"system_prompt: .*no chat_template.*Write it into the templates"):
        ContextBuilder(word_tokenizer(), ContextConfig(system_prompt="Be brief"))


def test_a_conversation_keeps_its_history_but_not_before_the_reference_alone():
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    builder = ContextBuilder(tokenizer, ContextConfig(**TEMPLATES))
    history = [("system", "Be brief"), ("user", "two"), ("assistant", "four"), ("user", "What is two ?")]
    question = [{"role": role, "content": content} for role, content in history]
    problem = Problem(question, "It is four")
    prompts = builder.build(problem)
    before = "<|system|> Be brief <|user|> two <|assistant|> four <|user|> "
    assert tokenizer.decode(prompts.question) == before + "Question: What is two ? <|assistant|>"
    teacher = before + "Question: What is two ? Solution: It is four Again: <|assistant|>"
    assert tokenizer.decode(prompts.teacher) == teacher
    assert (
        tokenizer.decode(prompts.reference) == "<|system|> Be brief <|user|> Solution: It is four Again: <|assistant|>"
    )
    assert question[-1]["content"] == "What is two ?"
    with pytest.raises(
        ValueError, match=r"expected a conversation that ends with the user's message; got \['system'\]"
    ):
        builder.build(Problem(question[:1], "It is four"))
    with pytest.raises(ValueError, match=r"question: expected text, since this tokenizer has no chat_template"):
        ContextBuilder(word_tokenizer()).build(problem)


def test_text_can_stay_text_beside_a_chat_template():
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    prompts = ContextBuilder(tokenizer, ContextConfig(**TEMPLATES), text_as_chat=False).build(PROBLEM)
    assert tokenizer.decode(prompts.question) == "Question: What is two plus two ?"


def test_a_solution_without_tokens_is_refused():
    class Deaf:
        chat_template = None

        def __call__(self, text, **options):
            return {"input_ids": [] if text == "\u200b" else [1]}

    with pytest.raises(ValueError, match=r"solution: expected at least one token; got none"):
        ContextBuilder(Deaf()).build(Problem("What", "\u200b"))


def test_thinking_states():
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    options = {"student_kwargs": {"enable_thinking": True}, "teacher_kwargs": {"enable_thinking": False}}
    prompts = ContextBuilder(tokenizer, ContextConfig(**TEMPLATES, **options)).build(PROBLEM)
    assert thinking_states(tokenizer, prompts) == {"question": "open", "teacher": "none", "reference": "none"}
