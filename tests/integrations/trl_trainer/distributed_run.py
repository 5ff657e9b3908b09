"""What torchrun starts for test_trl_distributed.py: a short run on two gloo processes, its figures written by rank 0.

``accelerate launch --cpu --num_processes 2`` silently runs one process, and an FSDP accelerate config silently becomes DDP
on CPU, so the world size and the engine are asserted here.
"""

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from forked import run_as_rank
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from trl_helpers import LORA, ROWS, FixedTrainer, build, logs, tiny
from vllm_in_place import put_in_place

from popsd_integrations.huggingface.distributed import everyones
from popsd_integrations.trl_trainer import PurifiedOPSDTrainer

ZERO = {
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
ZERO_STAGES = {
    "zero2": {"stage": 2},
    # By default every parameter of the tiny model would stay whole, or be kept once it is gathered.
    "zero3": {"stage": 3}
    | dict.fromkeys(
        ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 0
    ),
}
OPTIONS = {"max_steps": 3, "diagnostics_steps": 2, "max_grad_norm": 1e9, "skip_first_tokens": 1}


def sharded(lora, apart):
    """A student sharded by FSDP2 layer by layer; ``apart``: the untied head is a group of its own."""
    model = tiny(tied=not apart)
    if lora:
        from peft import get_peft_model

        torch.manual_seed(42)  # as the trainer does before it puts an adapter on
        model = get_peft_model(model, LORA)
    causal = model.get_base_model() if lora else model
    for layer in causal.model.layers:
        fully_shard(layer)
    if apart:
        fully_shard(causal.lm_head)
    fully_shard(model)
    return model


def judged(folder):
    """Completions of the evaluations, in an order that does not depend on the number of processes."""
    path = Path(folder, "eval_completions.jsonl")
    return sorted(path.read_text().splitlines()) if path.exists() else []


def saved(model, folder):
    path = Path(folder, f"model-{os.environ.get('RANK', 0)}")
    model.save_pretrained(path)
    return str(path)


def gathered(engine, parameters):
    if engine != "zero3":
        return nullcontext()
    import deepspeed

    assert all(p.numel() == 0 < p.ds_numel for p in parameters), "nothing is partitioned"
    return deepspeed.zero.GatheredParameters(parameters)


def main(engine, kind, folder):
    lora, apart = "lora" in kind, "apart" in kind
    processes = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = 2 if "accumulated" in kind and processes == 2 else 1
    options = OPTIONS | {
        "per_device_train_batch_size": 4 // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": "checkpointed" in kind and processes == 2,
        "masks": {"min_target_entropy": 2.6, "floor": 0.25} if "masked" in kind else None,
    }
    if "several" in kind:  # the completions of a prompt are on both processes
        options |= {"num_generations": 4, "padding_free": True, "skip_first_tokens": 0}
    if "vllm" in kind:
        put_in_place(pytest.MonkeyPatch())
        options |= {"use_vllm": True, "diagnostics_steps": 0}
    options["cls"] = PurifiedOPSDTrainer if "vllm" in kind else FixedTrainer
    wrapped = []
    if engine == "fsdp2":
        torch.distributed.init_process_group("gloo")
        model = sharded(lora, apart)
        teacher = None if lora else sharded(False, apart) if "teacher" in kind else tiny(tied=not apart)
        trainer = build(folder, model=model, teacher=teacher, **options)
        trainer.accelerator.prepare_model = lambda model, **_: model  # which would put it into DDP
    else:
        if engine in ("zero2", "zero3"):
            options["deepspeed"] = ZERO | {"zero_optimization": ZERO_STAGES[engine]}
        model = tiny(tied=not apart)
        if "path" in kind:  # ZeRO-3 then partitions while it loads
            model = saved(model, folder)
        if "evaluated" in kind:
            rows = [{**row, "answer": "3"} for row in ROWS[:7]]
            options |= {
                "eval_rows": rows,
                "eval_strategy": "steps",
                "eval_steps": 1,
                "eval_scorer": "trl_helpers:begins",
            }
            options["per_device_eval_batch_size"] = 4 // processes
        trainer = build(folder, model=model, lora=lora, **options)
    real = trainer.compute_loss

    def spy(model, *arguments, **keywords):
        if trainer.model.training:  # transformers evaluates the module within, where DeepSpeed's hooks are too
            wrapped.append(type(model))
        return real(model, *arguments, **keywords)

    trainer.compute_loss = spy
    trainer.train()
    assert trainer.accelerator.num_processes == processes == (1 if engine == "one" else 2)
    if engine == "ddp":
        assert set(wrapped) == {DistributedDataParallel}
    if engine in ("zero2", "zero3"):
        assert {kind.__name__ for kind in wrapped} == {"DeepSpeedEngine"}
        assert trainer.accelerator.deepspeed_plugin.zero_stage == ZERO_STAGES[engine]["stage"]
    if engine == "fsdp2":
        assert all(issubclass(kind, FSDPModule) for kind in wrapped)
    parameters = list(trainer.model.parameters())
    with gathered(engine, parameters):
        norm = sum((p.full_tensor() if hasattr(p, "full_tensor") else p).double().norm().item() for p in parameters)
    held = []
    if "vllm" in kind:
        trainer.vllm_generation.sync_weights()
        held = [p.double().norm().item() for p in trainer.vllm_generation.llm.model.parameters()]
        assert everyones(held) == [held] * processes
    if trainer.accelerator.is_main_process:
        result = {"logs": logs(trainer), "eval": logs(trainer, "eval_loss"), "judged": judged(folder)}
        Path(folder, "result.json").write_text(json.dumps(result | {"norm": norm, "held": held, "rows": len(ROWS)}))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


if __name__ == "__main__":
    run_as_rank(main)
