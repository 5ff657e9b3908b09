"""What torchrun starts for test_fast_jsd.py: TRL's GKDTrainer under DDP with its own loss, then with popsd's."""

from pathlib import Path

import pytest
import torch
from forked import run_as_rank
from gkd_helpers import gkd
from torch.nn.parallel import DistributedDataParallel
from trl_helpers import logs

import popsd_integrations


def main(folder):
    losses, norms, parameters = [], [], []
    for change in (popsd_integrations.unpatch_trl, popsd_integrations.patch_trl):
        change()
        trainer = gkd(Path(folder), per_device_train_batch_size=1)
        trainer.train()
        assert trainer.accelerator.num_processes == 2 and isinstance(trainer.model_wrapped, DistributedDataParallel)
        losses.append([row["loss"] for row in logs(trainer)])
        norms.append([row["grad_norm"] for row in logs(trainer)])
        parameters.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and min(losses[0]) > 1e-3
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and len(norms[0]) == 2
    mine = parameters[1].clone()
    torch.distributed.broadcast(mine, src=0)
    assert torch.equal(mine, parameters[1]), "the ranks hold one model"
    Path(folder, f"done-{trainer.accelerator.process_index}").touch()
    torch.distributed.barrier()


if __name__ == "__main__":
    run_as_rank(main)
