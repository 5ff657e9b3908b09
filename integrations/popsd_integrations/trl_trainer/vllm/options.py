"""Which options vLLM reads. What it would not read, or what would pair prompts with other completions, is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

_OF_SERVER = {f"vllm_server_{name}" for name in ("base_url", "host", "port", "timeout")} | {"vllm_group_port"}
_OF_COLOCATE = {
    f"vllm_{name}"
    for name in (
        "gpu_memory_utilization",
        "max_model_length",
        "tensor_parallel_size",
        "model_impl",
        "enable_sleep_mode",
    )
}
_SEEDED = "Every prompt would draw the same random numbers; the option seed gives each completion its own."
_ENDS = "Completions end at the ends that the model's generation_config and the tokenizer name; name it there."
_REFUSED_IN_GENERATION = {
    "seed": _SEEDED,
    **dict.fromkeys(("stop", "stop_token_ids", "ignore_eos"), _ENDS),
    **dict.fromkeys(
        ("best_of", "use_beam_search", "truncate_prompt_tokens"), "The loss is of the prompt as it is, sampled once."
    ),
    "skip_special_tokens": "The trainer takes token ids.",
}


def check_options(args: Any) -> None:
    """Raise ValueError for an option of vLLM's that nothing would read.

    args: a ``trl.DistillationConfig``. Without ``use_vllm`` none is read; a server is started with its own.
    """
    if not args.use_vllm:
        read: set[str] = set()
        where = "use_vllm is False"
    elif args.vllm_mode == "server":
        read = {"vllm_mode", "vllm_structured_outputs_regex"} | _OF_SERVER
        where = "a vLLM server has options of its own (vllm_mode 'server')"
        if args.vllm_server_base_url is not None:
            read -= {"vllm_server_host", "vllm_server_port"}
            where += " and vllm_server_base_url is given"
    else:
        read = {"vllm_mode", "vllm_structured_outputs_regex"} | _OF_COLOCATE
        where = "there is no server (vllm_mode 'colocate')"
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name.startswith("vllm_") and field.name not in read and value != field.default:
            raise ValueError(f"{field.name}: expected it left out, since {where}; got {value!r}.")
    if not args.use_vllm:
        return
    if args.vllm_mode not in ("colocate", "server"):
        raise ValueError(f"vllm_mode: expected 'colocate' or 'server'; got {args.vllm_mode!r}.")
    if args.cache_implementation is not None:
        raise ValueError(
            f"cache_implementation: expected None with use_vllm, which has its own cache; got {args.cache_implementation!r}."
        )
    for name, remedy in _REFUSED_IN_GENERATION.items():
        if name in (args.generation_kwargs or {}):
            raise ValueError(
                f"generation_kwargs: expected no {name!r} with use_vllm; got {args.generation_kwargs[name]!r}. {remedy}"
            )


def check_sampling(generation_kwargs: dict[str, Any] | None) -> None:
    """Raise ValueError for a name that vLLM's SamplingParams has not: a server would ignore it. Needs vLLM."""
    import inspect

    from vllm import SamplingParams

    unknown = sorted((generation_kwargs or {}).keys() - inspect.signature(SamplingParams).parameters.keys())
    if unknown:
        raise ValueError(
            f"generation_kwargs: expected arguments of vllm.SamplingParams with use_vllm; got {', '.join(unknown)}. "
            "transformers' names are not vLLM's."
        )
