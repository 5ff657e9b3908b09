"""What torchrun starts for test_trl_distributed.py: a short run on two gloo processes, its figures written by rank 0.

``accelerate launch --cpu --num_processes 2`` silently runs one process, and an FSDP accelerate config silently becomes DDP
on CPU, so the world size and the engine are asserted here.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from trl_helpers import LORA, ROWS, build, logs, tiny

ZERO2 = {
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
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


def main(engine, kind, folder):
    lora, apart = "lora" in kind, "apart" in kind
    processes = int(os.environ.get("WORLD_SIZE", 1))
    options = OPTIONS | {"per_device_train_batch_size": 4 // processes}
    wrapped = []
    if engine == "fsdp2":
        torch.distributed.init_process_group("gloo")
        model = sharded(lora, apart)
        teacher = None if lora else sharded(False, apart) if "teacher" in kind else tiny(tied=not apart)
        trainer = build(folder, model=model, teacher=teacher, **options)
        trainer.accelerator.prepare_model = lambda model, **_: model  # which would put it into DDP
    else:
        if engine == "zero2":
            options["deepspeed"] = ZERO2
        trainer = build(folder, model=tiny(tied=not apart), lora=lora, **options)
    real = trainer.compute_loss

    def spy(model, *arguments, **keywords):
        wrapped.append(type(model))
        return real(model, *arguments, **keywords)

    trainer.compute_loss = spy
    trainer.train()
    assert trainer.accelerator.num_processes == processes == (1 if engine == "one" else 2)
    if engine == "ddp":
        assert set(wrapped) == {DistributedDataParallel}
    if engine == "zero2":
        assert {kind.__name__ for kind in wrapped} == {"DeepSpeedEngine"}
        assert trainer.accelerator.deepspeed_plugin.zero_stage == 2
    if engine == "fsdp2":
        assert all(issubclass(kind, FSDPModule) for kind in wrapped)
    norm = sum(
        (p.full_tensor() if hasattr(p, "full_tensor") else p).double().norm().item() for p in trainer.model.parameters()
    )
    if trainer.accelerator.is_main_process:
        Path(folder, "result.json").write_text(json.dumps({"logs": logs(trainer), "norm": norm, "rows": len(ROWS)}))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own way out
