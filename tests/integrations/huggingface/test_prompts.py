import pytest

from popsd_integrations.huggingface.prompts import (
    ContextBuilder,
    ContextConfig,
    Problem,
    other_solutions,
    thinking_states,
)

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


OTHERS = [Problem("What is two ?", "It is four"), Problem("What is plus ?", "two and two")]


def test_controls_give_another_problems_solution_or_none():
    tokenizer = word_tokenizer()

    def written(**options):
        builder = ContextBuilder(tokenizer, ContextConfig(**TEMPLATES, **options))
        return [tokenizer.decode(ids) for ids in builder.build_all(OTHERS)[0]]

    asked, own, other = "Question: What is two ?", "It is four", "two and two"
    hinted, alone = f"{asked} Solution: {{}} Again:".format, "Solution: {} Again:".format
    assert written(reference="other_problem") == [asked, hinted(own), hinted(other)]
    assert written(reference="none") == [asked, hinted(own), asked]
    assert written(teacher_reference="other_problem") == [asked, hinted(other), alone(other)]
    assert written(teacher_reference="other_problem", reference="none") == [asked, hinted(other), asked]
    assert written(teacher_reference="none") == [asked, asked, alone(own)]
    assert written(teacher_reference="none", reference="other_problem") == [asked, asked, hinted(other)]


def test_other_problems_are_drawn_by_seed_and_never_the_same_text():
    texts = [str(number // 2) for number in range(40)]
    drawn = other_solutions(texts, 0)
    assert drawn == other_solutions(texts, 0) != other_solutions(texts, 1)
    assert all(own != other for own, other in zip(texts, drawn, strict=True)) and len(set(drawn)) > 15
    distinct = [str(number) for number in range(40)]
    assert sorted(other_solutions(distinct, 3)) == sorted(distinct)


@pytest.mark.parametrize("texts", [["4"], ["4", "4"]])
def test_no_other_problem_is_refused(texts):
    builder = ContextBuilder(word_tokenizer(), ContextConfig(**TEMPLATES, teacher_reference="other_problem"))
    with pytest.raises(ValueError, match=r"other_problem: expected problems of at least two different solutions"):
        builder.build_all([Problem("What ?", text) for text in texts])
    with pytest.raises(ValueError, match=r"other_solution: expected non-empty text; got None"):
        builder.build(OTHERS[0])
    with pytest.raises(ValueError, match=r"other_solution: expected another text than the solution"):
        builder.build(OTHERS[0]._replace(other_solution=OTHERS[0].solution))


@pytest.mark.parametrize("same", ["other_problem", "none"])
def test_two_contexts_alike_are_refused(same):
    with pytest.raises(ValueError, match="nothing would be left of the signal"):
        ContextConfig(reference=same, teacher_reference=same)


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


@pytest.mark.parametrize(
    ("problem", "name"),
    [
        (Problem(" ", "x"), "question"),
        (Problem("x", ""), "solution"),
        (Problem("x", None), "solution"),
        (Problem("x", float("nan")), "solution"),
    ],
)
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


def byte_tokenizer(chat_template=None):
    """A token for each byte, as a byte-level BPE without merges, and a begin token that it adds to text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "<|end|>", "<unk>"])
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|end|>", unk_token="<unk>")
    fast.chat_template = chat_template
    return fast


def test_truncation_leaves_no_half_character():
    tokenizer = byte_tokenizer()
    config = {"teacher_template": "{question}{solution}", "reference_template": "{solution}", "on_overflow": "truncate"}
    kept = []
    for limit in range(4, 9):
        builder = ContextBuilder(tokenizer, ContextConfig(**config, max_prompt_length=limit))
        kept.append(tokenizer.decode(builder.build(Problem("Q", "aé世z")).reference, skip_special_tokens=True))
    assert kept == ["a", "aé", "aé", "aé", "aé世"]


BROKEN = {
    "None": None,
    "a number": 3,
    "no messages": [],
    "a message that is text": ["What"],
    "ShareGPT": [{"from": "human", "value": "What"}],
    "no content": [{"role": "user", "content": None}],
    "no role": [{"role": None, "content": "What"}],
    "an image": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What"}]}],
    "half a pair": "two \ud800",
    "half a pair amid": [{"role": "system", "content": "\udc00"}, {"role": "user", "content": "What"}],
    "rendered": "<s>user: What<|end|>assistant:",
    "a turn within": [{"role": "user", "content": "What<|end|>assistant: this"}],
}


@pytest.mark.parametrize("question", BROKEN.values(), ids=BROKEN)
def test_a_question_that_is_none_is_named(question):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"^question(\[0\])?: expected") as raised:
        ContextBuilder(byte_tokenizer(template)).build(Problem(question, "four"))
    if "<|end|>" in str(question):
        assert "control tokens; got '<" in str(raised.value) and "pass messages with 'role'" in str(raised.value)


def test_control_tokens_in_a_solution_are_named_and_those_of_a_template_are_not():
    builder = ContextBuilder(byte_tokenizer())
    with pytest.raises(ValueError, match=r"^solution: expected text without .*got '<\|end\|>'"):
        builder.build(Problem("What", "four<|end|>"))
    assert builder.build(Problem("What <unk> <end|>", "four <|e"))
    templates = {"question_template": "<s>{question}<|end|>", "teacher_template": "<s>{question}{solution}"}
    prompts = ContextBuilder(byte_tokenizer(), ContextConfig(**templates)).build(Problem("What", "four"))
    assert all(ids.count(256) == 1 and ids[0] == 256 for ids in prompts), "begun once"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('no system') }}",
            r"chat_template: expected to write a conversation of \['user'\]; .*no system",
        ),
        (
            "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
            "{% endfor %}{% endfor %}A",
            r"chat_template: expected the user's message in what it writes; got a prompt without it",
        ),
    ],
)
def test_a_template_that_fails_or_loses_the_question_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        ContextBuilder(word_tokenizer(template)).build(PROBLEM)
