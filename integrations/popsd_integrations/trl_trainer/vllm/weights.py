"""The student's weights as vLLM is sent them: adapters merged, one layer at a time, and no parameter touched.

TRL merges all adapters into the base weights, sends them, and subtracts the adapters again. In 16 bit that does not give the
base back: after 60 steps at 5e-6 it had moved by 24 % of the adapter's delta, and with it base, teacher and reference. Here
PEFT merges into a float32 copy of one layer, which is rounded once, sent and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from popsd_integrations.huggingface.frozen import has_adapter
from popsd_integrations.huggingface.heads import causal_model

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


class StudentWeights:
    """Iterates over (name, tensor): the name that vLLM knows, in the order of ``named_parameters``, whole and detached.

    model: a Hugging Face model, with or without an adapter. Sharded by FSDP2 or ZeRO-3 each process must iterate to the end.
    gather: context manager in which parameters that ZeRO-3 has partitioned are whole.
    device: where FSDP2's shards are gathered, if they are offloaded.
    dtype: what vLLM computes in, where it is known. None: the dtype of each base weight.
    Layers with an adapter come as round(W + delta) in that dtype, with W + delta computed in float32; of
    ``modules_to_save`` the trained copy comes. The model's parameters keep their values, bit for bit, also where merging fails.

    >>> weights = dict(StudentWeights(model))
    >>> weights["model.norm.weight"].shape
    torch.Size([16])
    """

    def __init__(
        self,
        model: nn.Module,
        gather: Gather = lambda parameters: nullcontext(),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._model, self._gather, self._device, self._dtype = model, gather, device, dtype
        self._lost = self._delta = torch.zeros((), dtype=torch.float64)

    @property
    def rounding(self) -> float:
        """Of the last iteration: norm of what rounding took from the adapters' deltas, over their norm. 0: nothing.

        At 1 the weights that were sent are those of the base. In bfloat16 small deltas vanish in large weights.
        """
        return float((self._lost / self._delta).sqrt()) if self._delta > 0 else 0.0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._lost = self._delta = torch.zeros((), dtype=torch.float64)
        layers, copies = _adapted(self._model)
        for name, parameter in self._model.named_parameters():
            inside = next((path for path in layers if name.startswith(f"{path}.")), None)
            if inside is not None:
                if layers[inside] is not None:
                    yield from self._merged(inside, layers[inside])
                    layers[inside] = None
                continue
            for path, trained in copies.items():
                if name.startswith(f"{path}."):
                    kept = f"{path}.modules_to_save.{trained}."
                    name = name.replace(kept, f"{path}.") if name.startswith(kept) else ""
            if name:
                with self._gather([parameter]):
                    yield _name(name), self._whole(parameter)

    @torch.no_grad()
    def _merged(self, path: str, layer: Any) -> list[tuple[str, torch.Tensor]]:
        """The base parameters of one layer, merged into copies that stand in for its parameters meanwhile."""
        modules = list(layer.modules())
        tuners = [module for module in modules if isinstance(module, BaseTunerLayer)]
        base = layer.get_base_layer()
        with self._gather(list(layer.parameters())):
            dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
            own = [(module, dict(module._parameters)) for module in modules]
            noted = [(tuner, list(tuner.merged_adapters), dict(getattr(tuner, "_caches", {}))) for tuner in tuners]
            try:
                copied: dict[int, nn.Parameter] = {}
                for module, parameters in own:
                    for key, parameter in parameters.items():
                        if parameter is not None:
                            if id(parameter) not in copied:
                                copied[id(parameter)] = self._copy(parameter)
                            module._parameters[key] = copied[id(parameter)]
                before = {name: parameter.clone() for name, parameter in base.named_parameters()}
                for tuner in reversed(tuners):
                    tuner.merge()
                exact = {name: parameter.detach() for name, parameter in base.named_parameters()}
            finally:
                for module, parameters in own:
                    module._parameters.update(parameters)
                for tuner, merged, caches in noted:
                    tuner.merged_adapters[:] = merged
                    if hasattr(tuner, "_caches"):
                        tuner._caches.clear()
                        tuner._caches.update(caches)
        sent = {name: tensor.to(self._dtype or dtypes[name]) for name, tensor in exact.items()}
        for name, tensor in exact.items():
            for total, difference in (("_lost", sent[name] - tensor), ("_delta", tensor - before[name])):
                square = difference.float().square().sum(dtype=torch.float64)
                setattr(self, total, getattr(self, total).to(square.device) + square)
        return [(_name(f"{path}.{name}"), tensor) for name, tensor in sent.items()]

    def _copy(self, parameter: nn.Parameter) -> nn.Parameter:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return nn.Parameter(self._whole(parameter).to(dtype, copy=True), requires_grad=False)

    def _whole(self, parameter: nn.Parameter) -> torch.Tensor:
        tensor: Any = parameter.detach()
        if not isinstance(tensor, DTensor):
            return tensor
        local: Any = tensor if self._device is None else tensor.to(self._device)
        return local.full_tensor()


def check_weights(model: Any, fsdp_version: int | None = None) -> None:
    """Raise ValueError for a student whose weights vLLM cannot be sent exactly, before any is sent."""
    if getattr(causal_model(model), "is_quantized", False) or any(
        not parameter.is_floating_point() for parameter in model.parameters()
    ):
        raise ValueError(
            "use_vllm: expected a model that is not quantised; got one that is. vLLM would quantise the merged weights again, "
            "and sample from others than the student's. Load it in bfloat16, or generate with transformers."
        )
    if not has_adapter(model):
        return
    if fsdp_version == 1:
        raise ValueError(
            "use_vllm: expected FSDP2 with an adapter; got FSDP1, whose flat shards cannot be merged. Set fsdp_version 2."
        )
    layers, copies = _adapted(model)
    other = [type(x).__name__ for x in model.modules() if isinstance(x, AuxiliaryTrainingWrapper)]
    if not (layers or copies) or any(name != ModulesToSaveWrapper.__name__ for name in other):
        raise ValueError(
            "use_vllm: expected an adapter that merges into the weights, such as LoRA, and modules_to_save; got "
            f"{sorted({*other}) or 'one that does not'}. Generate with transformers."
        )
    causal = causal_model(model)
    if causal.config.get_text_config().tie_word_embeddings:
        ends = [causal.get_input_embeddings(), causal.get_output_embeddings()]
        weights = [_active(module) for module in ends]
        if weights[0] is not weights[1] or any(isinstance(module, BaseTunerLayer) for module in ends):
            raise ValueError(
                "use_vllm: expected the embeddings and the head to stay tied; got an adapter on one of them, and vLLM has one "
                "tensor for both. Leave them out of target_modules and modules_to_save, set ensure_weight_tying with both in "
                "modules_to_save, or untie them in the model's config."
            )


def _active(module: Any) -> Any:
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    return module.weight


def _adapted(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """The outermost layers with an adapter, by path; and of ``modules_to_save`` the adapter that is active, by path."""
    layers: dict[str, Any] = {}
    copies: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            copies[path] = module.active_adapters[0]
        elif isinstance(module, BaseTunerLayer) and not any(path.startswith(f"{x}.") for x in layers):
            layers[path] = module
    return layers, copies


def _name(name: str) -> str:
    """As vLLM knows it: without the wrappers of PEFT and of activation checkpointing."""
    name = name.removeprefix("base_model.model.")
    for wrapper in ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        name = name.replace(wrapper, "")
    return name
