"""What two ranks find of the wrappers: each compares the reduced gradient of its shard with that of the whole batch, which it
computes by itself.
"""

import functools

import torch
import torch.distributed as dist
from loop_helpers import fixed_generate, tiny
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import popsd
from popsd_integrations.huggingface import (
    Prompts,
    agreed,
    frozen_states,
    frozen_weights,
    global_num_items,
    head_from_model,
    hidden_states,
    join_processes,
    pack_contexts,
    run_in_forward,
)
from popsd_integrations.huggingface.distributed import everyones, rank, unwrapped
from popsd_integrations.huggingface.objective import student_loss

PROMPTS = [Prompts([11, a, 13], [11, a, 20, 1, 17, 13][: 6 - a % 2], [12, a, 17, 13]) for a in range(5)]
COMPLETIONS = fixed_generate(None, [row.question for row in PROMPTS])
SHARDS = [[[0], [1, 2]], [[3], [4]]]
"""Rows of each rank's micro-batches: 3 and 2 rows, of 2 to 4 tokens."""
LOSS = popsd.PurifiedOPSDLoss(popsd.PurifiedConfig(beta=0.3))


def student(lora, tied):
    """A model that has left its frozen weights behind, and where they are."""
    model = tiny(tie_word_embeddings=tied)
    source = frozen_weights(model)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        source = frozen_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return model.train(), source


def wrapped(wrapper, model, tied):
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "fsdp1":
        policy = ModuleWrapPolicy({type(causal.model.layers[0])})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
        )
    for layer in causal.model.layers:
        fully_shard(layer)
    if not tied:
        fully_shard(causal.lm_head)  # a group of its own, which no forward gathers
    return fully_shard(model)


def packed_part(part):
    return pack_contexts([PROMPTS[i] for i in part], [COMPLETIONS[i] for i in part], pad_token_id=10)


def backward(model, source, micro_batches, items=None):
    """The loss of the micro-batches and their gradient. items: None is the number of their tokens."""
    packed = [packed_part(part) for part in micro_batches]
    items = items or global_num_items(*(batch["base"].completion_mask for batch in packed))
    total = 0.0
    for batch in packed:

        def loss(batch=batch):
            frozen = frozen_states(source, batch)
            return student_loss(model, LOSS, batch["base"], frozen, num_items=items)

        value, _ = run_in_forward(model, loss)
        value.backward()
        total += value.item()
    return total


def backward_outside(model, source, micro_batches):
    """The same with a loss outside the wrapper's forward: the head is read after it."""
    packed = packed_part([row for part in micro_batches for row in part])
    with torch.no_grad():
        frozen = frozen_states(source, packed)
    items = global_num_items(packed["base"].completion_mask)
    loss, _ = student_loss(model, LOSS, packed["base"], frozen, num_items=items)
    loss.backward()
    return loss.item()


def gradients(model):
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {name.replace("_fsdp_wrapped_module.", ""): x for name, x in copied(model).items()}
    return copied(unwrapped(model))


def copied(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).clone() for name, x in found.items()}


@functools.cache
def alone(lora, tied):
    """(loss, gradients) of the whole batch on this rank."""
    model, source = student(lora, tied)
    loss = backward(model, source, [[row] for row in range(len(PROMPTS))], items=sum(map(len, COMPLETIONS)))
    return loss, gradients(model)


def compared(run, wrapper, lora, tied):
    """(largest difference of the gradient, difference of the loss, largest gradient)"""
    loss, expected = alone(lora, tied)
    model, own = student(lora, tied)
    model = wrapped(wrapper, model, tied)
    if lora:
        own = frozen_weights(model)
    parts = everyones(run(model, own, SHARDS[rank()]))
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) > 10
    error = max((found[name] - expected[name]).abs().max().item() for name in expected)
    largest = max(x.abs().max().item() for x in expected.values())
    return error, abs(sum(parts) / len(parts) - loss), largest


def wrappers(folder):
    join_processes()
    assert dist.get_world_size() == 2
    return {" ".join([case[0].__name__, *map(str, case[1:])]): compared(*case) for case in CASES}


FULL_TIED, FULL, LORA = (False, True), (False, False), (True, False)
CASES = [
    *((backward, wrapper, *kind) for wrapper in ("ddp", "fsdp2", "fsdp1") for kind in (FULL_TIED, LORA)),
    (backward, "fsdp2", *FULL),
    (backward_outside, "ddp", *FULL),
    (backward_outside, "fsdp2", *FULL_TIED),
    (backward_outside, "fsdp2", *FULL),
]


def told(function):
    try:
        function()
    except (ValueError, KeyError, FloatingPointError) as error:
        return str(error)
    return "nothing"


def refusals(folder):
    """What a loop that goes past the wrapper is told, and what `agreed` passes on."""
    ids = torch.tensor([[5, 6]])
    join_processes()
    found = {}
    lora, _ = student(True, True)
    around = DistributedDataParallel(lora)
    found["ddp, module"] = told(lambda: hidden_states(lora, ids))
    found["ddp, base"] = told(lambda: hidden_states(lora.get_base_model(), ids))
    with torch.no_grad():
        found["ddp, no gradient"] = told(lambda: hidden_states(lora, ids))
    found["ddp"] = told(lambda: hidden_states(around, ids))
    found["ddp, inside"] = told(lambda: run_in_forward(around, lambda: hidden_states(lora, ids)))
    found["bare, inside"] = told(lambda: run_in_forward(lora, lambda: hidden_states(lora, ids)))
    lora, _ = student(True, True)
    sharded = wrapped("fsdp2", lora, True)
    found["fsdp2, base"] = told(lambda: hidden_states(sharded.get_base_model(), ids))
    lora, _ = student(True, True)
    flat = wrapped("fsdp1", lora, True)
    found["fsdp1"] = told(lambda: hidden_states(flat, ids))
    found["fsdp1, head"] = told(lambda: head_from_model(flat))
    found["fsdp1, frozen"] = told(lambda: frozen_states(frozen_weights(flat), packed_part([0])))

    def fails():
        raise KeyError(f"of rank {rank()}")

    found["agreed"] = [agreed(lambda: f"of rank {rank()}"), told(lambda: agreed(fails))]
    mask = torch.tensor([True, True, False]) if rank() else torch.tensor([0.5, 0.0])
    found["items"] = global_num_items(mask, mask[:1]).item()
    return found


CHECKS = [(wrappers, {}), (refusals, {})]
