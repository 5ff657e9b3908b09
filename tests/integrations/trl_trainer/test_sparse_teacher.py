"""The sparse loss against the functions of TRL's server distillation, whose option it takes."""

import pytest
import torch

pytest.importorskip("trl")
server = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")

import popsd  # noqa: E402
from popsd.testing import make_head, make_hidden, relative_l2  # noqa: E402


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("add_tail", [True, False])
def test_it_is_trl_s(beta, add_tail):
    hidden, head = make_hidden(9, 16, 0.4), make_head(101, 16)
    teacher, ids = torch.log_softmax(popsd.head_logits(hidden.teacher, head), dim=-1).topk(5)
    teacher[2, 3:] = -torch.inf
    known = teacher > -torch.inf

    def theirs(states):
        own = torch.log_softmax(states @ head.weight.T, dim=-1).gather(-1, ids).masked_fill(~known, -torch.inf)
        pair = (own, teacher)
        if add_tail:
            (own, mask), (other, _) = (server._add_tail_bucket(x, known) for x in pair)
        else:
            (own, other), mask = (x - torch.logsumexp(x, dim=-1, keepdim=True) for x in pair), known
        return server._jsd_divergence(own, other, beta, mask).sum(-1)

    def ours(states):
        config = popsd.DivergenceConfig(beta=beta)
        return popsd.linear_sparse_jsd(
            states, head, popsd.SparseTarget(ids, teacher), add_tail=add_tail, config=config
        ).loss

    found = []
    for loss in (theirs, ours):
        leaf = hidden.student.clone().requires_grad_()
        value = loss(leaf)
        value.sum().backward()
        found.append((value, leaf.grad))
    assert relative_l2(found[1][0], found[0][0]) < 1e-4
    known_rows = known.all(dim=1)  # through -inf TRL's gradient is NaN
    assert relative_l2(found[1][1][known_rows], found[0][1][known_rows]) < 1e-4
