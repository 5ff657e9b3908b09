import pytest

from popsd_integrations.evaluate import generations


def record(model="base", problem=0, sample=0, text="é"):
    place = {"model": model, "benchmark": "a", "problem": problem, "sample": sample}
    return place | {"question": "q", "expected": "1", "text": text, "tokens": 1, "finish": "stop"}


def test_a_last_line_counts_once_it_is_whole(tmp_path):
    """And a cut through a character is a cut."""
    path, rows = tmp_path / "generations.jsonl", [record(), record(sample=1)]
    generations.write(path, rows)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert generations.read(path) == rows
    for cut in (whole[:-2], whole[: whole.rindex("é".encode()) + 1]):
        path.write_bytes(cut)
        assert generations.read(path) == rows[:1]


def test_a_completion_is_there_once(tmp_path):
    path = tmp_path / "generations.jsonl"
    generations.write(path, [record(), record(sample=1), record(text="another")])
    with pytest.raises(
        ValueError, match=r"each completion once in .*line 3 is another one of sample 0 of problem 0 of a by"
    ):
        generations.read(path)


def test_what_is_missing_is_counted():
    rows = [record(problem=problem) for problem in range(2)]
    asked = {"asked": {"a": {"problems": 3, "samples": 2}}}
    assert generations.describe_missing({"checkpoints": {"base": asked}}, rows) == "4 of 6 completions: 4 of base on a"
    unsaid = {"checkpoints": {"base": {}, "x": {}}}
    assert generations.describe_missing(unsaid, rows) == "2 of 4 completions: 2 of x on a"
    assert generations.describe_missing({"checkpoints": {"base": {}}}, rows) == ""
