"""The rows of results: their names, and what becomes of them."""

import pytest
import torch

import popsd
from popsd import Decomposition, Head, LossOutput, Method, Purification, PurifiedConfig
from popsd.engine.problem import problem_of
from popsd.engine.results import Results, loss_output, result_names
from popsd.testing import make_head, make_hidden
from popsd_kernels.rows import RowLoss


def test_the_kernels_results_are_the_losses():
    """Both are declared, for callers read one and kernels write the other."""
    assert LossOutput._fields[1 : 1 + len(RowLoss._fields)] == RowLoss._fields
    kinds = (RowLoss, Decomposition, Purification)
    names = [name for kind in kinds for name in kind._fields]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("decompose", [None, *Method])
@pytest.mark.parametrize("purification", [False, True])
def test_what_is_written_is_read_under_its_name(decompose, purification):
    hidden, head = make_hidden(6, 8, 0.4), make_head(31, 8)
    ids = torch.zeros(6, dtype=torch.long)
    problem = problem_of(
        hidden, (head, head), PurifiedConfig(), token_ids=ids, decompose=decompose, purification=purification
    )
    results, names = Results(problem), result_names(problem.options)
    results.losses[:] = torch.arange(len(RowLoss._fields))[:, None]
    if decompose is not None:
        results.write_decomposition(
            Decomposition(
                *(
                    torch.full((6,), 100.0 + i) if name in names else None
                    for i, name in enumerate(Decomposition._fields)
                )
            )
        )
    results.purification[:] = 200.0 + torch.arange(len(Purification._fields) * purification)[:, None]
    output = loss_output(results.rows[0], results.rows, problem, (2, 3), torch.ones(6))
    for i, name in enumerate(RowLoss._fields):
        assert getattr(output, name).shape == (2, 3) and (getattr(output, name) == i).all()
    assert (output.decomposition is None) == (decompose is None) and (output.purification is None) != purification
    known = {} if decompose is None else output.decomposition._asdict()
    for i, (name, value) in enumerate(known.items()):
        assert value is None if name not in names else (value == 100 + i).all()
    assert sum(x is not None for x in known.values()) == {None: 0, Method.LOGITS: 18, Method.GRAM: 6}[decompose]
    for i, value in enumerate(output.purification or ()):
        assert (value == 200 + i).all()


def test_without_token_ids_there_is_no_log_probability():
    output = popsd.linear_purified_jsd(make_hidden(6, 8, 0.4), Head(make_head(31, 8).weight))
    assert output.token_logprob is None and output.argmax_agreement is not None
