"""What torchrun starts for test_vllm_engines.py: two processes under DDP, and one engine whose weights they share out."""

import os
from pathlib import Path

import torch
import vllm_on_cpu  # noqa: F401
from forked import run_as_rank
from test_vllm_engines import Noting, trainer_of
from vllm import LLM
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

from popsd_integrations.huggingface.distributed import everyones

RUN = os.environ["TORCHELASTIC_RUN_ID"]
real_name, real_barrier, real_generate = _CPUSHMDistributed.make_group_name, torch.distributed.barrier, LLM.generate
# Under torchrun vLLM's shared memory has the same name in every run, and stays behind.
_CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: RUN + real_name(communicator).lstrip("/"))
torch.distributed.barrier = lambda *args, device_ids=None, **options: real_barrier(*args, **options)  # gloo has none


class Sampling(Noting):
    """Samples at the first step, so that processes without the same seeds would part, and is greedy afterwards."""

    @property
    def greedy(self):
        return self.state.global_step > 0


def main(model, folder):
    made = []

    def generate(self, *args, **options):
        outputs = real_generate(self, *args, **options)
        made.extend(tuple(output.outputs[0].token_ids) for output in outputs)
        return outputs

    LLM.generate = generate
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "vllm_tensor_parallel_size": 2}
    trainer = trainer_of(model, folder, cls=Sampling, **options)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    assert everyones(made) == [made] * 2 and len(made) == 12 and len(set(made[:4])) > 2
    own = slice(2 * trainer.accelerator.process_index, 2 * trainer.accelerator.process_index + 2)
    assert [tuple(ids) for ids in trainer.sampled] == [
        ids for step in (made[:4], made[4:8], made[8:]) for ids in step[own]
    ]
    greedy = trainer.below[sum(map(len, trainer.sampled[:2])) :]
    assert len(greedy) >= 4 and max(greedy) < 2**-5, max(greedy)
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    real_barrier()
    for left in Path("/dev/shm").glob(f"{RUN}*"):
        left.unlink(missing_ok=True)


if __name__ == "__main__":
    run_as_rank(main)
