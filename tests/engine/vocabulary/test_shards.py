"""A vocabulary shared by two and by four gloo processes gives what one gives; and the bytes are those that the page says.

The processes are started once, see ranks.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "vocabulary_parallel.md"
TOLERANCE = 1e-5
WIDTH = 12


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has written down."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*paths, *sys.path])}
    command = [sys.executable, str(HERE / "ranks.py"), str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("group", ["torch 4", "torch 2", "triton 2"])
def test_shards_give_what_the_whole_head_gives(ranks, group):
    compared = 0
    for rank in ranks:
        for case, found in rank[group].items():
            assert max(found["errors"].values()) < TOLERANCE, (case, found["errors"])
            compared += len(found["errors"])
    assert compared > {"torch 4": 800, "torch 2": 400, "triton 2": 180}[group]


def test_heads_of_dtensors_bring_their_group(ranks):
    for rank in ranks:
        assert max(rank["DTensor"]["errors"].values()) < TOLERANCE
        assert "expected a DTensor with Shard(0)" in rank["DTensor"]["replicated"]
        assert "head: expected plain tensors for a sparse target" in rank["DTensor"]["sparse"]


REFUSED = {
    "width": "student_head: expected shards of one width on all ranks of the vocabulary; got ['12', '12', '13', '12']",
    "hidden": "hidden.student: expected the same on all ranks of the vocabulary; got others on rank 1",
    "tokens": "hidden: expected the same tokens on all ranks of the vocabulary; got ['5', '4', '5', '5']",
    "options": "vocab_group: expected the same options and arguments on all its ranks",
    "vocab_size": "config.vocab_size: expected at most the 67 rows that the 4 ranks hold; got 90",
    "no row": "vocab_group: expected a row in use on every rank; got none on rank 2",
    "frozen": "frozen_head: expected the student's shard of 20 rows on rank 0; got 19",
    "function": "vocab_group: expected a target that works entry by entry",
    "strategy": "strategy: 'single_read' needs the whole vocabulary on this rank",
    "group": "vocab_group: expected a torch.distributed ProcessGroup or None; got str",
    "ids": "token_ids: expected entries in [0, 67)",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_ranks_that_do_not_fit_together_are_told_so_everywhere(ranks, reason):
    for rank in ranks:
        assert REFUSED[reason] in str(rank["refusals"][reason])


def test_a_rank_of_another_group_is_refused(ranks):
    assert "vocab_group: expected" in ranks[0]["refusals"]["outside"]


def test_a_rank_that_is_gone_raises_on_the_others(ranks):
    assert all(rank["alone"].startswith("RuntimeError") for rank in ranks[:3])


def page_bytes():
    """{(case, backend): bytes per token} of the page's table."""
    rows = re.findall(r"^\| `([^`]+)` \|.*\| (\d+) \| (\d+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return {(case, impl): int(x) for case, *of in rows for impl, x in zip(("torch", "triton"), of, strict=True)}


def test_the_bytes_are_those_of_the_page(ranks):
    """Beside the gradient of the hidden states, and the head's mean row with, under a bias, the number of its rows."""
    stated, seen = page_bytes(), set()
    for group in ("torch 4", "torch 2", "triton 2"):
        impl = group.split()[0]
        for rank in ranks:
            for case, found in rank[group].items():
                if (case, impl) not in stated:
                    continue
                rest = found["bytes"] - stated[case, impl] * found["tokens"]
                seen.add((case, impl))
                assert rest in (0, 4 * WIDTH, 4 * WIDTH + 4), (case, impl, rest)
    assert seen >= {(case, "torch") for case, _ in stated}
    assert stated["JSD, no ids", "torch"] <= 40
