"""A loss of one's own on several processes: inside the wrapped model's forward, over the tokens of all of them. No TRL.

What a wrapper (DDP, FSDP, DeepSpeed's engine) adds to a model happens around its forward: shards are gathered and gradients
are reduced only there. popsd's loss never calls that forward, because it would compute the logits. So the loss is run in its
place:

    items = global_num_items(*masks)  # once per optimiser step, of all its micro-batches
    loss, metrics = run_in_forward(model, lambda: loss_of_a_micro_batch(model, num_items=items))
    loss.backward()

docs/distributed.md has a table of the wrappers; examples/loops has loops.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

_RUNNING: ContextVar[tuple[nn.Module, ...]] = ContextVar("running", default=())
"""The modules in whose forward a function runs now. Inside it the backbone is called at once."""


def run_in_forward(model: nn.Module, function: Callable[[], T]) -> T:
    """Call ``function`` as the forward of ``model``, and return its result.

    model: as the loop holds it: in DDP, in FSDP1, in DeepSpeed's engine, sharded by ``fully_shard``, or bare. Inside,
        `hidden_states` and `head_from_model` take the wrapper and the module within alike, also for frozen weights that are
        the same model with its adapter off.
    function: returns the loss, alone or in a tuple with detached metrics. Tensors that require a gradient must be returned,
        for the wrapper to see them. A collective of one's own belongs outside of it.

    Autocast is entered in ``function``: what accelerate puts around a forward is not. A compiled model runs uncompiled.
    FSDP's ``output_dtype`` rounds the loss: leave it None. Under FSDP1 the head stays in the outermost unit.

    >>> run_in_forward(model, lambda: hidden_states(model, torch.tensor([[1, 2, 3]])).sum()).ndim
    0
    """
    wrapper = called = _uncompiled(model)
    while is_around(called):
        called = called.module

    def once(*_: Any, **__: Any) -> T:
        restore()  # function may want the real forward
        token = _RUNNING.set((*_RUNNING.get(), unwrapped(called)))
        try:
            return function()
        finally:
            _RUNNING.reset(token)

    with forward_as(called, once) as restore:
        result: T = wrapper()
    return result


def global_num_items(*masks: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """``num_items`` of the loss: the counted tokens of one optimiser step, over all processes, divided by their number.

    DDP, FSDP and DeepSpeed take the mean of the gradients over the processes. Divided by this, the loss has as its mean
    over the processes, and so has its gradient, the sum over all tokens divided by the number of all tokens. The split into
    processes and micro-batches then does not matter, and no factor is needed.

    masks: of all micro-batches that are accumulated before the optimiser's step, on the model's device: bool, or weights,
        of any shape. group: of the processes that share the batch; None: all of them.
    Returns a 0-dim float32 tensor on the device of the masks, without waiting for it. Every process must call this.
    Raises ValueError without a mask.

    >>> global_num_items(torch.tensor([[True, True, False]]), torch.tensor([[True]])).item()
    3.0
    """
    if not masks:
        raise ValueError("masks: expected those of all micro-batches of one optimiser step; got none.")
    total = torch.stack([mask.detach().sum(dtype=torch.float64) for mask in masks]).sum()
    if processes() > 1:
        dist.all_reduce(total, group=group)
        total = total / dist.get_world_size(group)
    return total.float()


def processes() -> int:
    """How many processes there are: the size of the default group, or 1."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def everyones(value: T) -> list[T]:
    """The ``value`` of each process, in their order. Every process must call this, with what pickle can carry."""
    if processes() == 1:
        return [value]
    values: list[Any] = [None] * processes()
    dist.all_gather_object(values, value)
    return values


def agreed(function: Callable[[], T]) -> T:
    """What ``function`` returns or raises on the first process, on all of them. It is called there alone."""
    if processes() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def join_processes() -> None:
    """Make the processes that torchrun started one group, until they end. Nothing happens where there is one, or one process.

    PyTorch chooses the backends: gloo for what is on the host, NCCL for GPUs. Call ``torch.distributed.init_process_group``
    before where others are wanted, or another timeout.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)  # not earlier: torchrun's store serves one group of a name


def unwrapped(model: Any) -> Any:
    """The module inside compilation, DDP, FSDP1 and DeepSpeed's engine, or the model itself."""
    while is_around(model) or _uncompiled(model) is not model:
        model = model.module if is_around(model) else _uncompiled(model)
    return model


def _uncompiled(model: Any) -> Any:
    # Not by getattr, which PEFT passes on to the model that it is around.
    return getattr(model, "_modules", {}).get("_orig_mod", model)


def is_around(model: Any) -> bool:
    """Whether it holds the model as its ``module``, and reduces the gradients. FSDP2 changes the model itself."""
    # By its name, for DeepSpeed need not be installed, and its import takes seconds.
    engine = any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)
    return engine or isinstance(model, DistributedDataParallel | FullyShardedDataParallel)


def is_running(module: nn.Module) -> bool:
    """Whether `run_in_forward` runs a function in the forward of ``module``, or of one that it is a part of."""
    return any(part is module for running in _RUNNING.get() for part in running.modules())


def check_reduced(module: nn.Module) -> None:
    """Raise ValueError for a module that is called past its wrapper where a gradient is recorded: nobody would reduce it.

    A module does not know its wrapper, so the wrappers are looked for. This takes tenths of a second at most, and is left
    out on one process and inside `run_in_forward`.
    """
    if not torch.is_grad_enabled() or processes() == 1:
        return
    if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
        return
    for found in gc.get_objects():
        kind = type(found)  # isinstance would wake proxies
        if not (issubclass(kind, nn.Module) and (issubclass(kind, FSDPModule) or is_around(found))):
            continue
        if found is not module and any(part is module for part in found.modules()):
            name = next(x.__name__ for x in kind.__mro__ if issubclass(x, nn.Module) or x is FSDPModule)
            raise ValueError(
                f"model: expected the {name} around it, which reduces the gradients; got the {type(module).__name__} within. "
                "Pass what you call backward through: the wrapper, or the module that fully_shard was given last."
            )


def check_seen(model: Any) -> None:
    """Raise ValueError for FSDP1 outside its forward, where its parameters are pieces of one flat tensor."""
    if isinstance(model, FullyShardedDataParallel) and not is_running(model.module):
        raise ValueError(
            "model: expected a call inside the forward of FullyShardedDataParallel (FSDP1), whose parameters are not seen "
            "outside; got one outside. Run the loss by run_in_forward(model, function), or shard with fully_shard."
        )


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[Callable[[], None]]:
    """Another forward of one module inside; yields what ends it earlier. A forward that was set before comes back."""
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own

    module.__dict__["forward"] = forward
    try:
        yield restore
    finally:
        restore()
