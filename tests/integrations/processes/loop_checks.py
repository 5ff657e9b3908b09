"""What two ranks of the plain loop do. Each check returns what its test compares with one process, or with an unbroken run."""

import os
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from loop_helpers import CONFIG, PROMPTS, deterministic, fixed_generate, run, tiny
from wrapper_checks import told

import popsd
from popsd_integrations.huggingface.distributed import join_processes, rank
from popsd_integrations.huggingface.sampling import hf_generate
from popsd_integrations.run_folder import exclusive
from popsd_integrations.torch_loop import HeldOut
from popsd_integrations.torch_loop.checkpoint import checksum
from popsd_integrations.torch_loop.processes import check_same

SHARED = replace(CONFIG, steps=3, learning_rate=1e-3, decompose_every=1, evaluate_every=2, checkpoint_every=0)
KINDS = {"full": SHARED, "lora": replace(SHARED, lora_rank=4, micro_batch_size=1)}
HELD_OUT = HeldOut(prompts=PROMPTS[:5], answers=["0", "1", "1", "2", "2"], scorer="loop_checks:begins")


def begins(completion, answer):
    return completion.startswith(answer)


def trained(kind, folder):
    """Metrics of a run, and its parameters."""
    evaluate = lambda model: {"rank": rank(), "norm": model.get_output_embeddings().weight.norm().item()}  # noqa: E731
    result = run(folder, KINDS[kind], generate=fixed_generate, held_out=HELD_OUT, evaluate=evaluate)
    parameters = {name: p.detach() for name, p in result.model.named_parameters() if p.requires_grad}
    torch.save(parameters, folder / f"parameters-{os.environ.get('RANK', 'alone')}.pt")
    return deterministic(result.metrics)


def trained_together(folder):
    return {kind: trained(kind, folder / kind) for kind in KINDS}


SAMPLED = replace(CONFIG, steps=4, checkpoint_every=1)


def sampling(folder, generate=hf_generate, **options):
    """[checksum of the parameters, metrics] of a run whose ranks sample on their own."""
    result = run(folder.parent / options.pop("into", folder.name), SAMPLED, generate=generate, **options)
    return [checksum(dict(result.model.named_parameters())), deterministic(result.metrics)]


def at_step(number, act):
    """A sampling that calls ``act`` on rank 1 in a step."""
    steps = iter(range(1, 100))

    def generate(model, prompts, **options):
        if next(steps) == number and rank() == 1:
            act()
        return hf_generate(model, prompts, **options)

    return generate


def unbroken(folder):
    return sampling(folder)


def killed(folder):
    """Rank 1 dies: rank 0 raises, without torchrun, which would end it."""
    return sampling(folder, at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL)))


def resumed_after_the_kill(folder):
    return sampling(folder, into="killed", resume=True)


def asked_to_end(folder):
    """One rank gets a SIGTERM, and both finish the step."""
    return sampling(folder, at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))


def resumed_after_the_end(folder):
    return sampling(folder, into="asked_to_end", resume=True)


def silent(folder):
    """Rank 1 hangs: rank 0 raises after the group's timeout."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=5))
    return sampling(folder, at_step(2, lambda: time.sleep(1000)))


def poisoned(folder):
    """Steps whose gradient is not finite on one rank are refused on both, which name the rows."""
    model = tiny()
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: torch.where((args[0] == 4)[..., None], torch.nan, output)
    )
    config = replace(CONFIG, batch_size=10, loss=popsd.PurifiedConfig(check_finite=False))
    return told(partial(run, folder, config, model=model, generate=fixed_generate))


def refused(folder):
    """What the ranks are told before any work."""
    no_work = partial(run, generate=lambda *_, **__: 1 / 0)
    join_processes()
    found = {"uneven": told(lambda: no_work(folder / "a", replace(CONFIG, batch_size=3)))}
    found["seeds"] = told(lambda: no_work(folder / "b", replace(CONFIG, seed=rank())))
    found["weights"] = told(lambda: no_work(folder / "c", model=tiny(seed=rank())))
    wrapped = torch.nn.parallel.DistributedDataParallel(tiny())
    found["wrapped"] = told(lambda: no_work(folder / "d", model=wrapped))
    found["places"] = told(lambda: check_same({"seed": 0}, step=3 * rank()))
    with exclusive(folder / "held") if rank() == 0 else nullcontext():
        found["held"] = told(lambda: no_work(folder / "held"))
    (folder / "file").touch()
    found["folder"] = told(lambda: no_work(folder / "file" / "runs"))
    found["processes"] = told(lambda: no_work(folder.parent / "of_one", SAMPLED, resume=True))
    return found


def of_one(folder):
    run(folder, replace(SAMPLED, steps=1), generate=fixed_generate)


CHECKS = [
    (trained_together, {}),
    (unbroken, {}),
    (killed, {}),
    (resumed_after_the_kill, {}),
    (asked_to_end, {}),
    (resumed_after_the_end, {}),
    (silent, {"until": 0}),
    (poisoned, {}),
    (of_one, {"size": 1}),
    (refused, {}),
]
