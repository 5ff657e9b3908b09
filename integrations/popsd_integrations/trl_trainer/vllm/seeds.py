"""A seed of its own for each completion that vLLM samples.

By itself vLLM is seeded by the number of the process in colocate mode, and on a server by how it was started. Here seeds come
from torch's generator, which the option ``seed`` starts, checkpoints keep and an evaluation sets by itself. So a resumed run
samples what the unbroken one did, and both modes sample the same.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_AT_ONCE = 1024
"""Requests to a server under way, as many as vLLM runs together at most by itself."""


def seed_each(generation: Any) -> None:
    """Let TRL's ``VLLMGeneration`` give each completion its seed. torch's generators stay where the seeds have left them.

    A server is asked for one prompt at a time, many at once, since one request has one seed for all of its prompts.
    """
    if generation.mode == "colocate":
        generation.llm.generate = _of_engine(generation)
    elif generation.accelerator.is_main_process:
        generation.vllm_client.generate = _of_server(generation.vllm_client)


def _drawn(count: int) -> list[int]:
    return torch.randint(torch.iinfo(torch.int64).max, (count,)).tolist()


def _of_engine(generation: Any) -> Any:
    generate = generation.llm.generate

    def seeded(prompts: list[Any], sampling_params: Any, **options: Any) -> Any:
        seeds = _drawn(len(prompts))
        if generation.tensor_parallel_size > 1:  # these processes sample all of their prompts alike
            torch.distributed.broadcast_object_list(seeds, group=generation.tp_group, group_src=0)
        each = []
        for seed in seeds:
            each.append(copy.copy(sampling_params))
            each[-1].seed = seed
        with torch.random.fork_rng(devices=[]):  # on a CPU vLLM draws from torch's generator too, and throws it away
            return generate(prompts, sampling_params=each, **options)

    return seeded


def _of_server(client: Any) -> Any:
    generate = client.generate
    client.session.get_adapter(client.base_url).init_poolmanager(1, _AT_ONCE)

    def seeded(prompts: list[Any], generation_kwargs: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        def one(prompt: Any, seed: int) -> dict[str, Any]:
            return generate([prompt], generation_kwargs=(generation_kwargs or {}) | {"seed": seed}, **options)

        with ThreadPoolExecutor(min(len(prompts), _AT_ONCE)) as requests:
            outputs = list(requests.map(one, prompts, _drawn(len(prompts))))
        return {
            name: None if part is None else [row for output in outputs for row in output[name]]
            for name, part in outputs[0].items()
        }

    return seeded
