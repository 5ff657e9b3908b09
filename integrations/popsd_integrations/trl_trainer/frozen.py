"""The frozen weights of ``PurifiedOPSDTrainer``: where they come from, and that the student starts from them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from popsd_integrations.huggingface.frozen import AdapterOff, FrozenModel
from popsd_integrations.huggingface.heads import is_sharded
from popsd_integrations.huggingface.invariants import check_model
from popsd_integrations.huggingface.prompts import Prompts
from popsd_integrations.huggingface.sampling import TOGETHER, exact_grouping
from popsd_integrations.trl_trainer.config import PurifiedOPSDConfig

logger = logging.getLogger(__name__)


def check_models(model: Any, teacher_model: Any, quantization_config: Any, args: PurifiedOPSDConfig) -> None:
    """Raise ValueError for options of a student or a teacher that is not loaded here."""
    if quantization_config is not None and not isinstance(model, str):
        raise ValueError(
            "quantization_config: expected None with a model that is loaded already, to which it does nothing; got a "
            f"{type(quantization_config).__name__}. Pass it to from_pretrained, or give the model by its path."
        )
    if teacher_model is not None and args.frozen_weights == "ema":
        raise ValueError("teacher_model: expected None with frozen_weights='ema'; the average is the teacher.")
    for name in ("teacher_model_init_kwargs", "teacher_model_revision"):
        if getattr(args, name) is not None and not isinstance(teacher_model, str):
            raise ValueError(
                f"{name}: expected None; got {getattr(args, name)!r}. It applies to a teacher_model given by its path. "
                "The student's own frozen weights are loaded as the student is (model_init_kwargs)."
            )


def prepare_student(model: nn.Module, *, fsdp: bool = False) -> None:
    """Raise ValueError for a loss of the model's own, which only its forward with labels would add. What is trained beside a
    quantised base becomes float32.

    TRL makes it bfloat16, which has 8 bits: a step of 5e-6 is lost on an entry of 2e-3 and more. And PEFT loads a checkpoint's
    adapter as float32, so that a resumed run was another one. FSDP wants the dtype of the base's storage, and keeps TRL's.
    """
    config: Any = model.config
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            "model.config.output_router_logits: expected False; got True. The load-balancing loss of a mixture of experts "
            "is not added here; set it to False, and freeze the routers where they must stay balanced."
        )
    if not fsdp and getattr(model, "is_quantized", False):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def copy_of(model: Any, args: PurifiedOPSDConfig) -> Any:
    """What TRL takes as a teacher to be the frozen initial weights: the path, loaded once more, or a copy."""
    if isinstance(model, str):
        # TRL loads a student without dtype in float32, and a teacher in the checkpoint's own: 1.3 % apart in bfloat16.
        kwargs = {"dtype": "float32", **(args.model_init_kwargs or {})}
        if isinstance(kwargs.get("dtype"), torch.dtype):
            kwargs["dtype"] = str(kwargs["dtype"]).removeprefix("torch.")  # TRL reads the teacher's as a name only
        args.teacher_model_init_kwargs = kwargs
        return model
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "model: expected whole parameters, to keep a copy of the initial weights; got sharded ones. Train LoRA, pass "
            "the frozen weights as teacher_model, or let accelerate shard the model."
        )
    try:
        return copy.deepcopy(model).requires_grad_(False)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            "model: no memory for the copy of the initial weights that full fine-tuning needs. Train LoRA "
            "(peft_config), which needs none, or build the trainer from a path."
        ) from error


def exact_ways(
    trainer: Any, source: AdapterOff | FrozenModel, prompts: Sequence[Prompts], given: bool
) -> tuple[str, str]:
    """The padding side by `check_model` of student and frozen weights, and the grouping of prompts by `exact_grouping`.

    given: the frozen weights are not the student's own, and may diverge from it. Nothing can be run here of sharded weights;
    left padding is then taken to be exact, which a warning says. Nor can samples of vLLM, which pads nothing.
    Raises ValueError, beside `check_model`'s, where processes that share weights would generate in unlike numbers of calls.
    """
    model, pad = trainer.model, trainer.processing_class.pad_token_id
    if any(map(is_sharded, model.parameters())):
        logger.warning(
            f"The weights of {type(model).__name__} are sharded already, so nothing was run to prove that popsd computes this "
            "model's distributions: head, padding on the left, causality, dropout and frozen weights are not checked. Call "
            "huggingface.check_model where the model is whole, or look for its architecture in docs/architectures.md."
        )
        return "left", TOGETHER
    whole = not any(map(is_sharded, source.model.parameters()))
    side = check_model(model, prompts, source if whole and not given else None, pad_token_id=pad)
    if whole and given:
        check_model(source.model, prompts, pad_token_id=pad, sides=[side])
    if not whole:
        logger.warning(
            f"The weights of the teacher_model, {type(source.model).__name__}, are sharded already and are not checked. They "
            f"are padded on the {side}, as the student's rows are."
        )
    questions = [row.question for row in prompts]
    grouping = TOGETHER if trainer.use_vllm else exact_grouping(model, questions, pad)
    if grouping != TOGETHER and (trainer.is_fsdp_enabled or trainer._zero3):
        raise ValueError(
            f"model: expected an architecture that generates in padded batches under FSDP and ZeRO-3; "
            f"{type(model).__name__} must sample prompts {grouping}, in another number of calls on each process. Train it on "
            "one device or under DDP, or sample with use_vllm."
        )
    return side, grouping
