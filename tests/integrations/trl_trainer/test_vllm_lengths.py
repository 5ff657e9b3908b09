"""What vLLM keeps memory for, and which engine is refused."""

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl_helpers import ROWS, config

from popsd_integrations.miniature.tokenizer import build_tokenizer
from popsd_integrations.trl_trainer.vllm.engine import Engine, check_engine
from popsd_integrations.trl_trainer.vllm.lengths import set_max_length

LONGER = [*ROWS, {"prompt": "Q 1 2 3 4 A", "privileged_context": "1"}, {"prompt": None, "privileged_context": "1"}]


def lengths(folder, rows=LONGER, stream=False, evaluated=None, **options):
    args = config(folder, use_vllm=True, **options)
    dataset = Dataset.from_list(rows)
    data = {"train_dataset": dataset.to_iterable_dataset() if stream else dataset}
    if evaluated:
        data["eval_dataset"] = {"one": Dataset.from_list(evaluated)}
    return set_max_length(args, data, build_tokenizer()), args.vllm_max_model_length


def test_the_length_is_that_of_the_longest_question_and_completion(tmp_path):
    assert lengths(tmp_path) == (6 + 6, 12)
    assert lengths(tmp_path, rows=ROWS, evaluated=LONGER) == (12, 12)
    assert lengths(tmp_path, max_prompt_length=5, on_overflow="drop") == (4 + 6, 10)
    scored = {"eval_scorer": "trl_helpers:begins", "eval_max_new_tokens": 9}
    assert lengths(tmp_path, **scored) == (6 + 9, 15)
    assert lengths(tmp_path, vllm_max_model_length=12) == (12, 12)
    assert lengths(tmp_path, vllm_mode="server") == (12, None)


def test_the_length_of_a_stream_is_the_longest_allowed(tmp_path):
    assert lengths(tmp_path, stream=True) == (None, None)
    assert lengths(tmp_path, stream=True, max_prompt_length=9, on_overflow="drop") == (15, 15)


def test_engines_that_would_not_sample_from_the_student_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vllm_max_model_length: expected at least 12, .*\(6 tokens\).*; got 11"):
        lengths(tmp_path, vllm_max_model_length=11)
    check_engine(Engine(torch.bfloat16, 12, None), 12)
    check_engine(Engine(torch.bfloat16, 12, None), None)
    with pytest.raises(
        ValueError, match=r"expected a server that takes 13 tokens.*; got 12. Start it with --max-model-len"
    ):
        check_engine(Engine(torch.bfloat16, 12, None), 13)
    with pytest.raises(ValueError, match=r"expected a server whose weights are not quantised; got 'fp8'"):
        check_engine(Engine(torch.bfloat16, 64, "fp8"), 12)
