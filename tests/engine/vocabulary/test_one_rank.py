"""What a group of one rank shows: the call outside of a compiled graph, and that agreement is not asked for again."""

import pytest
import torch
import torch.distributed as dist

import popsd
from popsd import Head
from popsd.engine.tokens import checks
from popsd.testing import make_head, make_hidden, relative_l2

N, V, D = 6, 53, 12


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_compiled_callers_leave_the_call_out_of_their_graph(group):
    hidden, head = make_hidden(N, D, 0.4), make_head(V, D)

    def step(student, group=None):
        output = popsd.linear_purified_jsd(
            hidden._replace(student=2.0 * student), head, vocab_group=group, impl="torch"
        )
        return output.loss.sum()

    gradients = []
    for function, options in ((step, {}), (torch.compile(step, backend="eager"), {"group": group})):
        leaf = hidden.student.clone().requires_grad_()
        function(leaf, **options).backward()
        gradients.append(leaf.grad)
    assert relative_l2(gradients[1], gradients[0]) < 1e-5


def test_where_looking_would_wait_ranks_agree_once(group, monkeypatch):
    hidden, head, gathers = make_hidden(N, D, 0.4), make_head(V, D), []
    real = dist.all_gather
    monkeypatch.setattr(dist, "all_gather", lambda *args, **options: gathers.append(real(*args, **options)))
    monkeypatch.setattr(checks, "may_look", lambda tensor: False)  # as on a GPU

    def calls(times, **fields):
        before = len(gathers)
        config = popsd.PurifiedConfig(beta=0.37, **fields)
        for _ in range(times):
            popsd.linear_purified_jsd(hidden, head, config=config, vocab_group=group, impl="torch")
        return len(gathers) - before

    assert calls(3) == 1
    assert calls(2) == 0 and calls(2, vocab_size=50) == 1 and calls(2, check_finite=True) == 2


def test_what_fits_no_shard_is_refused(group):
    hidden, head = make_hidden(N, D, 0.4), make_head(V, D)
    with pytest.raises(
        ValueError, match=r"config.vocab_size: expected at most the 53 rows that the 1 ranks hold; got 54"
    ):
        popsd.gram_matrix(head, 54, vocab_group=group)
    with pytest.raises(TypeError, match=r"student_head: expected a popsd.Head; got Tensor"):
        popsd.linear_purified_jsd(hidden, head.weight, vocab_group=group)
    with pytest.raises(ValueError, match=r"hidden.student: expected width 13"):
        popsd.linear_purified_jsd(hidden, Head(torch.randn(V, D + 1)), vocab_group=group)
