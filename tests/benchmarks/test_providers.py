"""Every provider that this machine can run computes the loss it is said to compute, in popsd's terms."""

import sys
from dataclasses import replace

import pytest
import torch

import popsd
from popsd_benchmarks.accuracy import GRADIENT, LOSS, Judge
from popsd_benchmarks.cases import FLOOR, SHAPES, Case, Shape, matmuls, operations
from popsd_benchmarks.memory import peak_on_cpu
from popsd_benchmarks.problems import make_problem
from popsd_benchmarks.providers import PROVIDERS, own
from popsd_benchmarks.providers.base import Provider, missing
from popsd_benchmarks.providers.ours import DIAGNOSTICS, Popsd

SHAPE = Shape(name="test", tokens=17, vocab=257, width=24)
JUDGED = [p for p in PROVIDERS.values() if p.computes_loss and not p.compiles]


def ready(provider, case):
    """Skips, with the reason, what cannot run here."""
    for reason in (provider.supports(case), provider.available()):
        if reason is not None:
            pytest.skip(f"{provider.name}: {reason}")


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("loss", ["purified", "two"])
@pytest.mark.parametrize("provider", JUDGED, ids=lambda p: p.name)
def test_agrees_with_the_oracle(provider, loss, beta, trainable):
    case = Case(loss=loss, shape=SHAPE, beta=beta, trainable_head=trainable, spread=0.5)
    ready(provider, case)
    problem = make_problem(case)
    errors = Judge(problem).errors(provider, provider.prepare(problem)())
    assert set(errors) == {"loss", "dhidden"} | ({"dweight"} if trainable else set())
    assert all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.parametrize("provider", JUDGED, ids=lambda p: p.name)
def test_soft_cap_and_padding(provider):
    """A soft cap is applied or refused; a padding row is left out or, as the provider says, not."""
    shape = replace(SHAPE, softcap=30.0, used=250)
    for changed in (replace(shape, softcap=None), shape):
        case = Case(loss="two", shape=changed, spread=0.5)
        if provider.supports(case) is not None or provider.available() is not None:
            continue
        problem = make_problem(case)
        errors = Judge(problem).errors(provider, provider.prepare(problem)())
        assert all(error < 1e-5 for error in errors.values()), (changed, errors)


def test_the_gram_matrix_is_formed_once(monkeypatch):
    formed, real = [], popsd.gram_matrix
    monkeypatch.setattr(popsd, "gram_matrix", lambda *arguments: formed.append(real(*arguments)) or formed[-1])
    given, loss = [], popsd.linear_purified_jsd
    monkeypatch.setattr(popsd, "linear_purified_jsd", lambda *a, **o: given.append(o["gram"]) or loss(*a, **o))
    step = Popsd("gram", impl="torch", options={"decompose": "gram"}).prepare(
        make_problem(Case(loss="purified", shape=SHAPE))
    )
    step(), step()
    assert len(formed) == 1 and all(gram is formed[0] for gram in given) and len(given) == 2


def test_padding_matters_to_the_judge():
    judge = Judge(make_problem(Case(loss="two", shape=replace(SHAPE, used=200), spread=0.5)))
    with_padding, without = judge.exact(False), judge.exact(True)
    assert not torch.allclose(with_padding.loss, without.loss, rtol=1e-3)
    assert judge.exact(True) is without


def test_bfloat16_passes_where_logits_are_float32_and_not_where_they_are_16_bit():
    problem = make_problem(Case(loss="purified", shape=SHAPE, dtype="bfloat16"))
    judge = Judge(problem)
    verdicts = {}
    for name in ("popsd-torch", "eager", "eager-16bit-logits"):
        problem.clear()
        loss = PROVIDERS[name].prepare(problem)()
        verdicts[name] = judge.complaint(PROVIDERS[name], judge.errors(PROVIDERS[name], loss))
    assert verdicts["popsd-torch"] is None and verdicts["eager"] is None
    assert "dhidden off by" in verdicts["eager-16bit-logits"]


def test_the_judge_finds_a_zero_gradient_and_nan():
    problem = make_problem(Case(loss="two", shape=SHAPE))
    judge, provider = Judge(problem), PROVIDERS["popsd-torch"]
    loss = provider.prepare(problem)()
    problem.hidden.student.grad.zero_()
    assert judge.errors(provider, loss)["dhidden"] == pytest.approx(1.0)
    assert judge.errors(provider, loss * float("nan"))["loss"] == float("inf")
    assert judge.complaint(provider, {"loss": float("inf"), "dhidden": 0.0}) is not None


def test_judging_some_rows_agrees_with_judging_all():
    problem = make_problem(Case(loss="purified", shape=SHAPE))
    all_rows, some = Judge(problem), Judge(problem, rows=5)
    assert not some.complete and len(some.index) == 5
    torch.testing.assert_close(some.exact(True).loss, all_rows.exact(True).loss[some.index])
    assert "loss" not in some.errors(PROVIDERS["popsd-torch"], torch.tensor(1.0)), "a sum over rows that nobody summed"
    assert Judge(make_problem(Case(loss="two", shape=SHAPE, trainable_head=True)), rows=5).complete


def test_generator_is_peaked_and_ordered_by_spread():
    near, far = (
        Judge(make_problem(Case(loss="two", shape=SHAPES["tiny"], spread=spread))).exact(True) for spread in (0.01, 1.0)
    )
    assert 0 < near.kl < 1e-3 < 0.3 < far.kl
    problem = make_problem(Case(loss="two", shape=SHAPES["tiny"]))
    logits = problem.hidden.student.detach() @ problem.head.weight.T
    assert (logits.max(1).values - logits.mean(1)).median() > 3 * logits.std(1).median()


@pytest.mark.parametrize(
    ("case", "count"),
    [
        (Case(loss="purified", shape=SHAPE), 4),
        (Case(loss="purified", shape=SHAPE, trainable_head=True), 5),
        (Case(loss="purified", shape=replace(SHAPE, softcap=30.0)), 5),
        (Case(loss="two", shape=SHAPE), 3),
        (Case(loss="two", shape=SHAPE, trainable_head=True), 4),
    ],
)
def test_floor_counts_its_matmuls(case, count, monkeypatch):
    assert matmuls(case) == count and operations(case) == count * 2 * 17 * 257 * 24
    step, calls, mm = PROVIDERS[FLOOR].prepare(make_problem(case)), [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: calls.append(args) or mm(*args, **kwargs))
    step()
    assert len(calls) == count


def test_what_is_missing_says_why():
    assert missing("json") is None
    assert "no_such_peer" in missing("no_such_peer")
    assert Provider("x").available() is None


def test_bounds_cover_every_dtype():
    assert set(LOSS) == set(GRADIENT) == {"float32", "bfloat16"}


OWN = """
from popsd_benchmarks.providers import PROVIDERS

class Two:
    four = False
    cpu_note = "of one's own"

    def __init__(self, problem):
        self.problem = problem

    def __call__(self):
        hidden, weight = self.problem.hidden, self.problem.head.weight
        log_p, log_q = ((x @ weight.T).log_softmax(-1) for x in (hidden.student, hidden.teacher))
        return (log_q.exp() * (log_q - log_p)).sum()

ready, both, number = PROVIDERS["eager"], [PROVIDERS["eager"], PROVIDERS["trl"]], 3
"""


def test_a_provider_of_ones_own_is_judged_and_its_memory_measured(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(OWN)
    monkeypatch.setattr("sys.path", sys.path[:])
    monkeypatch.chdir(tmp_path)
    (mine,) = own("my_losses:Two")
    case = Case(loss="two", shape=SHAPE, beta=0.0)
    problem = make_problem(case)
    assert Judge(problem).complaint(mine, Judge(problem).errors(mine, mine.prepare(problem)())) is None
    assert mine.name == "my_losses:Two" and mine.remark(case) == "of one's own"
    assert mine.supports(replace(case, loss="purified")) == "has no loss over four distributions"
    assert peak_on_cpu(mine, replace(case, shape=replace(SHAPE, tokens=256, vocab=8192))) > 8, "one [N, V] at least"
    assert own("my_losses:ready") == [PROVIDERS["eager"]] and own("my_losses:both")[1] is PROVIDERS["trl"]
    for name, why in (("my_losses:No", "no attribute 'No'"), ("no_such:X", "No module"), ("my_losses:number", "int")):
        with pytest.raises(ValueError, match=f"provider: expected .*got '{name}'.*{why}"):
            own(name)


@pytest.mark.slow
def test_eager_code_keeps_few_intermediates():
    """Eight [N, V] at once is what it says of itself; with every intermediate kept there were fourteen."""
    shape = replace(SHAPE, tokens=128, vocab=16384)
    assert peak_on_cpu(PROVIDERS["eager"], Case(loss="two", shape=shape)) < 9.5 * 128 * 16384 * 4 / 2**20


@pytest.mark.parametrize("provider", DIAGNOSTICS, ids=lambda p: p.name)
def test_every_diagnostic_is_a_step_that_can_be_timed(provider):
    step = provider.prepare(make_problem(Case(loss="purified", shape=SHAPE)))
    assert step().shape == (SHAPE.tokens,) and provider.supports(Case(loss="two", shape=SHAPE)) is not None
