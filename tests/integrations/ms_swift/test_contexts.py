"""From a row of ms-swift's data and its template's encodings to what popsd packs."""

import pytest

from popsd_integrations.huggingface import ContextBuilder, ContextConfig, Prompts
from popsd_integrations.miniature.tokenizer import build_tokenizer
from popsd_integrations.ms_swift.contexts import Row, conversations, row_of

MESSAGES = [{"role": "system", "content": "A"}, {"role": "user", "content": "Q 1"}]
SYSTEM = MESSAGES[:1]


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def builder():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    config = ContextConfig(teacher_template="{question} R {solution}", reference_template="R {solution}")
    return ContextBuilder(tokenizer, config)


def test_prompts_are_written_from_a_solution(builder):
    found = conversations(builder, MESSAGES, {"solution": "3 4", "id": 7}, reference=True)
    assert found == {"teacher": SYSTEM + user("Q 1 R 3 4"), "reference": SYSTEM + user("R 3 4")}


def test_prompts_that_the_data_brings(builder):
    before = [*MESSAGES, {"role": "assistant", "content": "2"}, *user("Q 2")]
    columns = {"teacher_prompt": "Q 2 R 5", "reference_prompt": "R 5"}
    found = conversations(builder, before, columns, reference=True)
    assert found == {"teacher": before[:-1] + user("Q 2 R 5"), "reference": SYSTEM + user("R 5")}
    assert "reference" not in conversations(builder, before, columns, reference=False)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"answer": "3"},
            r"dataset: expected one of the columns .*got none, beside \['answer'\].*--remove_unused_columns",
        ),
        ({"teacher_prompt": None}, "got none"),
        ({"teacher_prompt": "Q", "solution": "3"}, r"got \['solution', 'teacher_prompt'\]"),
        ({"teacher_prompt": "Q R 3"}, "expected the column 'reference_prompt'"),
        ({"solution": " "}, "solution: expected non-empty text"),
    ],
)
def test_a_row_without_its_columns(builder, columns, message):
    with pytest.raises(ValueError, match=message):
        conversations(builder, MESSAGES, columns, reference=True)


def encoding(prompt, response, behind=(), **further):
    ids = [*prompt, *response, *behind]
    labels = [-100] * len(prompt) + list(response) + [-100] * len(behind)
    return {"input_ids": ids, "labels": labels, "length": len(ids), **further}


def test_a_row_is_split_where_its_response_begins():
    encodings = {"question": encoding([1, 2], [7, 8], [9]), "teacher": encoding([1, 2, 3], [7, 8], [9], images=None)}
    assert row_of(encodings, 0) == Row(Prompts([1, 2], [1, 2, 3], [1, 2, 3]), [7, 8], True)
    encodings["reference"] = encoding([3], [7, 8])
    assert row_of(encodings, 0).prompts.reference == [3]


def test_a_row_without_a_response_does_not_count():
    encodings = {name: encoding([1, 2], []) for name in ("question", "teacher")}
    assert row_of(encodings, 5) == Row(Prompts([1, 2], [1, 2], [1, 2]), [5], False)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (encoding([1], [7, 9]), r"teacher: expected the student's response, \[7, 8\]; got \[7, 9\]"),
        (encoding([1], [7, 8], pixel_values=[0.5]), r"teacher: .*got \['pixel_values'\] too"),
        (encoding([1], [7, 8], loss_scale=[1.0, 0.5]), r"teacher: .*got \['loss_scale'\] too"),
        ({"input_ids": [1, 2, 3], "labels": [1, -100, 3]}, "teacher: expected one response at the end"),
    ],
)
def test_encodings_that_popsd_cannot_pack(teacher, message):
    with pytest.raises(ValueError, match=message):
        row_of({"question": encoding([1, 2], [7, 8]), "teacher": teacher}, 0)
