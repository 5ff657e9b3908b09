"""What lets vLLM take weights on a CPU. Imported by the trainer, and by a server's worker through ``--worker-extension-cls``.

NCCL's communicator is replaced by vLLM's own group over TCP, and CUDA's streams by nothing. Endpoints, announcements, packing
and loading stay vLLM's. On a CPU vLLM packs a layer's weights when they are loaded and cannot load others after that, so here
it multiplies by them as they are.
"""

import torch
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.weight_transfer import packed_tensor
from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding


class OverTCP:
    """In place of ``PyNcclCommunicator``."""

    def __init__(self, group, device):
        self.group = group

    def broadcast(self, tensor, src):
        if self.group.rank == src:
            self.group.broadcast_obj(tensor, src)
        else:
            tensor.copy_(self.group.broadcast_obj(None, src))


class NoStream:
    def synchronize(self):
        pass


class Extension:
    """Of a server's worker, which imports this module before it loads the model."""


def unpacked(layer, remove_weight=False):
    layer.cpu_linear = torch.nn.functional.linear


for module in (linear, utils, vocab_parallel_embedding):
    if hasattr(module, "dispatch_cpu_unquantized_gemm"):
        module.dispatch_cpu_unquantized_gemm = unpacked
pynccl.PyNcclCommunicator = OverTCP
packed_tensor._get_streams = lambda device, count: (NoStream(),) * count
torch.accelerator.current_device_index = lambda: 0
