import json

import pytest

from popsd_integrations.evaluate import benchmarks


def test_numbers_are_written_without_exponents(tmp_path):
    path = tmp_path / "a.jsonl"
    values = ["0.00001", "1.5", "-2.5e-7", "1e22", "3"]
    path.write_text("".join(f'{{"question": "q", "answer": {value}}}\n' for value in values))
    answers = [task.answer for task in benchmarks.load([str(path)])["a"]]
    assert answers == ["0.00001", "1.5", "-0.00000025", "1" + 22 * "0", "3"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "null", "true", "[]"])
def test_an_answer_that_is_no_number_is_named_by_its_row(value, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"question": "q", "answer": 1}}\n{{"question": "q", "answer": {value}}}\n')
    with pytest.raises(ValueError, match=r"text or a finite number in column 'answer'.*problem 1 of a"):
        benchmarks.load([str(tmp_path / "a.jsonl")])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_newlines_alone(end, tmp_path):
    """Not at U+2028, which JSON allows within text; a mark at the beginning and blank lines are no rows."""
    rows = [{"question": f"a\u2028b\u0085c{number}", "answer": number} for number in range(2)]
    text = (end + " " + end).join(json.dumps(row, ensure_ascii=False) for row in rows) + end
    (tmp_path / "a.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert [task.question for task in benchmarks.load([str(tmp_path / "a.jsonl")])["a"]] == [
        row["question"] for row in rows
    ]


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(ValueError, match="expected a file; there is none at"):
        benchmarks.load([str(tmp_path / "none.jsonl")])
