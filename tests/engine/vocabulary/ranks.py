"""What test_shards.py starts: four processes that share a vocabulary, forked after one import, over gloo.

Each computes every case from its rows and from the whole head, and writes down how far apart the two are and how many bytes it
has put into reductions. The shards are unequal.
"""

import json
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
from conftest import decorate_for_the_interpreter
from forked import fork_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import popsd
from popsd import Head, HiddenStates, MaskConfig, PurifiedConfig
from popsd.testing import make_head, make_hidden
from popsd_kernels import launch

N, D, V, WORLD = 5, 12, 67, 4
CUTS = {4: (0, 20, 40, 60, V), 2: (0, 41, V)}
PARTED = {"center": False, "plausibility": 0.1, "tail_floor": 0.01, "tail_cap": 0.1}
ALL = {"decompose": True, "telemetry": True}
CASES = {
    "JSD": {},
    "JSD, no ids": {"token_ids": None},
    "forward KL, sum": {"config": {"beta": 0.0}, "train": True, "reduction": "sum"},
    "reverse KL, both clips": {"config": {"beta": 1.0, "entry_clip": 0.01, "token_clip": 0.3}, "train": True},
    "JSD, entry clip": {"config": {"entry_clip": 0.01}},
    "linear target": {"config": {"pmi_clip": None}},
    "uncentred, masks on entries": {"config": PARTED, "bias": True},
    "everything, impossible entries": {"bias": True, "impossible": True, "train": True, **ALL},
    "Rényi": {"config": {"beta": 0.0, "renyi_alpha": 0.9}},
    "soft cap": {"softcap": 5.0, "bias": True, "decompose": True},
    "mix": {"config": popsd.presets.arithmetic_mix(0.3, beta=0.0), "bias": True},
    "gram": {"decompose": "gram", "bias": True},
    "padding, many chunks": {"config": {"vocab_size": 64}, "workspace_mib": 5e-4},
    "two heads": {"frozen": 5, "bias": True},
    "two distributions": {"frozen": 5, "teacher": True, "train": True},
    "coefficients": {"beta": torch.tensor([0.0, 0.5, 1.0, 0.5, 0.0])},
    "masks": {"masks": MaskConfig(max_reference_fraction=1.0, top_student_entropy=0.6, floor=0.1, signal="raw")},
}  # fmt: skip
OF_HEADS = ("train", "bias", "impossible", "softcap", "frozen", "teacher")
KERNELS = (
    "JSD", "reverse KL, both clips", "uncentred, masks on entries", "everything, impossible entries", "Rényi", "mix",
)  # fmt: skip
"""Cases that the Triton kernels compute too, of the first tokens."""
TOKENS = {"torch": N, "triton": 3}


class Group:
    """Ranks that share the vocabulary. Counts what is reduced among them."""

    def __init__(self, ranks):
        self.group, self.size, self.bytes = dist.new_group(ranks), len(ranks), 0
        self.rank = ranks.index(dist.get_rank()) if dist.get_rank() in ranks else -1

    def rows(self, tensor):
        cuts = CUTS[self.size]
        return None if tensor is None else tensor[cuts[self.rank] : cuts[self.rank + 1]]

    @contextmanager
    def counted(self):
        reduce, self.bytes = dist.all_reduce, 0

        def spy(tensor, *arguments, **options):
            self.bytes += tensor.numel() * tensor.element_size()
            return reduce(tensor, *arguments, **options)

        dist.all_reduce = spy
        try:
            yield
        finally:
            dist.all_reduce = reduce


def heads_of(case, group=None):
    """(student's, frozen or None), whole or this rank's rows."""
    found = []
    for seed in (1, case.get("frozen")):
        if seed is None:
            return found[0], None
        head = make_head(V, D, seed=seed, bias=case.get("bias", False))
        if case.get("impossible"):
            head.bias[41:44] = head.bias[60:] = -torch.inf  # the last of four shards is one that no policy uses
        tensors = [x if group is None or x is None else group.rows(x).clone() for x in (head.weight, head.bias)]
        for x in tensors:
            if x is not None and seed == 1:
                x.requires_grad_(case.get("train", False))
        found.append(Head(*tensors, softcap=case.get("softcap")))
    return tuple(found)


def call(case, heads, impl, group=None, hidden=None):
    """(output, gradient of the hidden states)."""
    tokens = TOKENS[impl] if hidden is None else len(hidden.student)
    hidden = hidden or HiddenStates(*(x[:tokens] for x in make_hidden(N, D, 0.4)))
    leaf = hidden.student.clone().requires_grad_()
    config = case.get("config", {})
    options = {
        "config": PurifiedConfig(**config) if isinstance(config, dict) else config,
        "impl": impl,
        "vocab_group": group,
        "token_ids": torch.tensor([63, 21, -1, 0, 40])[:tokens],
        "weights": torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5])[:tokens],
    }
    options |= {name: x for name, x in case.items() if name not in ("config", *OF_HEADS)}
    if case.get("teacher"):
        output = popsd.linear_jsd(leaf, heads[0], hidden.teacher, heads[1], **options)
    else:
        output = popsd.linear_purified_jsd(HiddenStates(leaf, *hidden[1:]), *heads, **options)
    (output.loss * torch.linspace(0.5, 2.0, max(output.loss.numel(), 1)).view_as(output.loss)).sum().backward()
    return output, leaf.grad


def tensors_of(output):
    for name, x in output._asdict().items():
        if isinstance(x, tuple):
            yield from ((f"{name}/{part}", y) for part, y in x._asdict().items() if y is not None)
        elif x is not None:
            yield name, x


def distance(found, expected, scale=None):
    """‖found − expected‖ relative to ‖expected‖; inf where they are NaN or infinite in other places."""
    found, expected = found.detach(), expected.detach()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)) or found.shape != expected.shape:
        return float("inf")
    norm = expected[finite].norm() if scale is None else scale
    return float((found[finite] - expected[finite]).norm() / norm.clamp_min(1e-6))


def errors(case, impl, group):
    whole, shard = heads_of(case), heads_of(case, group)
    first = HiddenStates(*(x[: TOKENS[impl]] for x in make_hidden(N, D, 0.4)))
    expected, dhidden = call(case, whole, "torch", hidden=first)
    with group.counted():
        found, own = call(case, shard, impl, group.group)
    result = {name: distance(x, y) for (name, x), (_, y) in zip(tensors_of(found), tensors_of(expected), strict=True)}
    result["dhidden"] = distance(own, dhidden)
    if case.get("train"):
        for name in ("weight", "bias"):
            gradient = None if getattr(whole[0], name) is None else getattr(whole[0], name).grad
            if gradient is not None:
                result[f"d{name}"] = distance(getattr(shard[0], name).grad, group.rows(gradient), gradient.norm())
    return {"errors": result, "bytes": group.bytes - 4 * TOKENS[impl] * D, "tokens": TOKENS[impl]}


def of_dtensors(group):
    """Heads of DTensors: no group is named, and the gradient is a DTensor as well."""
    mesh, case = init_device_mesh("cpu", (WORLD,)), {"train": True, "bias": True}
    whole = heads_of(case)[0]
    parts = [
        x.detach().tensor_split([17, 34, 51])[dist.get_rank()] for x in (whole.weight, whole.bias)
    ]  # as DTensor cuts 67
    shapes = (torch.Size([V, D]), (D, 1)), (torch.Size([V]), (1,))
    weight, bias = (
        DTensor.from_local(x.clone(), mesh, [Shard(0)], shape=shape, stride=stride).requires_grad_()
        for x, (shape, stride) in zip(parts, shapes, strict=True)
    )
    expected, dhidden = call(case, (whole, None), "torch")
    found, own = call(case, (Head(weight, bias), None), "torch")
    gradient = whole.weight.grad.tensor_split([17, 34, 51])[dist.get_rank()]
    assert weight.grad.placements == (Shard(0),)
    matrix = popsd.gram_matrix(Head(weight.detach(), bias.detach()))
    result = {
        "loss": distance(found.loss, expected.loss),
        "dhidden": distance(own, dhidden),
        "dweight": distance(weight.grad.to_local(), gradient, whole.weight.grad.norm()),
        "gram": distance(matrix, popsd.gram_matrix(whole)),
    }
    replicated = DTensor.from_local(whole.weight.detach(), mesh, [Replicate()])
    sparse = popsd.SparseTarget(torch.zeros(N, 1, dtype=torch.int64), torch.full((N, 1), -0.1))
    student = make_hidden(N, D, 0.4).student
    refused = {
        "replicated": message(lambda: call({}, (Head(replicated), None), "torch")),
        "sparse": message(lambda: popsd.linear_sparse_jsd(student, Head(weight, bias), sparse)),
    }
    return {"errors": result, **refused}


def message(function):
    try:
        function()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def refusals(rank, group, pair):
    """What each rank is told where the ranks do not fit together."""
    head, hidden = heads_of({}, group)[0], make_hidden(N, D, 0.4)
    wide = Head(torch.randn(20, D + 1)) if rank == 2 else head
    other = make_hidden(N, D, 0.4, seed=7) if rank == 1 else hidden
    short = HiddenStates(*(x[: N - (rank == 1)] for x in hidden))
    frozen = Head(head.weight[: 7 if rank == 3 else 19])
    function = popsd.TargetConfig(target="whole rows")
    calls = {
        "width": ({}, (wide, None), hidden),
        "hidden": ({}, (head, None), other),
        "options": ({"config": {"beta": 0.1 * rank}}, (head, None), hidden),
        "vocab_size": ({"config": {"vocab_size": 90}}, (head, None), hidden),
        "no row": ({"config": {"vocab_size": 40}}, (head, None), hidden),
        "frozen": ({}, (head, frozen), hidden),
        "function": ({"config": function}, (head, None), hidden),
        "strategy": ({"strategy": "single_read"}, (head, None), hidden),
        "group": ({"vocab_group": "world"}, (head, None), hidden),
        "ids": ({"token_ids": torch.full((N,), V)}, (head, None), hidden),
    }
    found = {name: message(lambda x=x: call(x[0], x[1], "torch", group.group, x[2])) for name, x in calls.items()}
    case = {"token_ids": None}

    def fewer():
        popsd.linear_purified_jsd(short, head, vocab_group=group.group)

    found["tokens"] = message(fewer)
    found["outside"] = message(lambda: call(case, (head, None), "torch", pair.group)) if rank == 0 else None
    return found


def run(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=240)
    )
    four, pair = Group([0, 1, 2, 3]), Group([1, 3])
    result = {"torch 4": {}, "torch 2": {}, "triton 2": {}}
    for name, case in CASES.items():
        result["torch 4"][name] = errors(case, "torch", four)
        if pair.rank >= 0:
            result["torch 2"][name] = errors(case, "torch", pair)
            if name in KERNELS:
                result["triton 2"][name] = errors(case, "triton", pair)
    result["DTensor"] = of_dtensors(four)
    result["refusals"] = refusals(rank, four, pair)
    dist.barrier()
    if rank < 3:  # the last has gone
        result["alone"] = message(lambda: call({}, heads_of({}, four), "torch", four.group))
    Path(folder, f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")


def main(folder):
    decorate_for_the_interpreter()
    launch.shipped_config = lambda kernel, device: launch.LaunchConfig(32, 4, 4)  # two slices in a shard
    popsd.register_target("whole rows", lambda base, teacher, reference: base - base.mean(dim=1, keepdim=True))
    sys.exit(fork_ranks(run, WORLD, folder))


if __name__ == "__main__":
    main(sys.argv[1])
