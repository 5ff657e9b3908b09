"""The frozen weights of ``PurifiedOPSDTrainer``: where they come from, and that the student starts from them."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from popsd.markers import EpistemicMarkers
from popsd_integrations.huggingface.distributed import agreed, run_in_forward
from popsd_integrations.huggingface.forwards import exact_layout
from popsd_integrations.huggingface.frozen import EMA, AdapterOff, FrozenModel, FrozenStates, frozen_states
from popsd_integrations.huggingface.groups import facts, within_prompts
from popsd_integrations.huggingface.heads import held, is_sharded, local_head
from popsd_integrations.huggingface.invariants import check_model
from popsd_integrations.huggingface.packing import PACKED, PADDED, Packed, pack_padded
from popsd_integrations.huggingface.prompts import Prompts
from popsd_integrations.huggingface.sampling import TOGETHER, exact_grouping, exact_sharing
from popsd_integrations.trl_trainer.compat import record
from popsd_integrations.trl_trainer.config import PurifiedOPSDConfig
from popsd_integrations.trl_trainer.guards import GuardedTrainer

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


class Ways(NamedTuple):
    """The padding side by `check_model` of student and frozen weights, the grouping of prompts by `exact_grouping`, the layout
    of forwards by `exact_layout`, and whether prompts of several completions are run once, by `exact_sharing`."""

    side: str
    grouping: str
    layout: str
    shares: bool


def exact_ways(trainer: Any, source: AdapterOff | FrozenModel, prompts: Sequence[Prompts], given: bool) -> Ways:
    """Ways in which the model is itself.

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
        return Ways("left", TOGETHER, _layout(trainer, [model], prompts), False)
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
    sharding = trainer.is_fsdp_enabled or trainer._zero3
    if grouping != TOGETHER and sharding:
        raise ValueError(
            f"model: expected an architecture that generates in padded batches under FSDP and ZeRO-3; "
            f"{type(model).__name__} must sample prompts {grouping}, in another number of calls on each process. Train it on "
            "one device or under DDP, or sample with use_vllm."
        )
    layout = _layout(trainer, [model, source.model] if given or not whole else [model], prompts)
    several = trainer.args.num_generations > 1 and questions and not (trainer.use_vllm or sharding)
    return Ways(side, grouping, layout, bool(several) and exact_sharing(model, questions, pad))


def _layout(trainer: Any, models: Sequence[nn.Module], prompts: Sequence[Prompts]) -> str:
    """Of models that are run alike: the student, and frozen weights where they are not its own."""
    asked, sharding = trainer.args.padding_free, trainer.is_fsdp_enabled or trainer._zero3
    if any(is_sharded(p) for model in models for p in model.parameters()):
        if asked:
            raise ValueError(
                "padding_free: expected None or False with weights that are sharded already, on which nothing can be run to "
                "prove that rows do not see each other; got True. Let accelerate shard them, or leave it out."
            )
        return PADDED
    layouts = [exact_layout(model, prompts, padding_free=asked, one_forward=sharding) for model in models]
    return next((layout for layout in layouts if layout != PACKED), PACKED)


_PROMPT_OF = {"base": "prompt", "teacher": "teacher_prompt", "reference": "reference_prompt"}
"""What TRL's batch calls each context's prompts, in the order of the fields of `Prompts`."""


class FrozenTrainer(GuardedTrainer):
    """TRL's trainer with frozen weights beside the student, and what both run of a micro-batch.

    Its subclass has ``_rows``, ``_markers``, ``_ema``, ``_zero3`` and, of `exact_ways`, ``_side`` and ``_layout``. It adds
    the tokens that forwards ran to ``_tokens_run``. By the time in which nothing was generated they are logged as
    ``forwards/tokens_per_second``.
    """

    _rows: Any
    _markers: EpistemicMarkers
    _ema: EMA | None
    _zero3: bool
    _own_teacher: bool
    _side: str
    _layout: str
    _tokens_run, _since = 0.0, 0.0

    def train(self, *args: Any, **options: Any) -> Any:
        self._tokens_run, self._since = 0.0, time.perf_counter()
        return super().train(*args, **options)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        now = time.perf_counter()
        if self.model.training and self._tokens_run > 0:
            logs["forwards/tokens_per_second"] = self._tokens_run / (now - self._since)
        self._tokens_run, self._since = 0.0, now
        super().log(logs, *args, **options)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        began = time.perf_counter()
        inputs = super()._prepare_inputs(generation_batch)
        self._since += time.perf_counter() - began
        return inputs

    def _record_prompts(self, completions: list[list[int]]) -> None:
        """How the completions of one prompt differ. One process after the other holds rows in the sampler's order."""
        if self.args.num_generations == 1 or not self.model.training:
            return
        local = torch.tensor(facts(completions, self._markers, self.processing_class), device=self.accelerator.device)
        record(self, within_prompts(self.accelerator.gather(local).tolist(), self.args.num_generations))

    def _checked_model(self, data: Mapping[str, Any]) -> Ways:
        """What `exact_ways` finds. data: as given; a stream that drops rows would count them here."""
        built = [prompts for name, dataset in data.items() for prompts in self._rows.first(dataset, name, 2)][:2]
        self.model.train()  # as it will be
        return agreed(lambda: exact_ways(self, self._frozen_source(), built, self._own_teacher))

    def _frozen_source(self) -> AdapterOff | FrozenModel:
        if self.teacher_model is not None:
            return FrozenModel(self.accelerator.unwrap_model(self.teacher_model))
        return self._ema or AdapterOff(self.accelerator.unwrap_model(self.model))

    def _packed(self, inputs: dict[str, Any], context: str) -> Packed:
        """The micro-batch in one context. Its lengths are on the host, so nothing waits for the device."""
        place = list(_PROMPT_OF).index(context)
        return pack_padded(
            *(inputs[f"{name}_{kind}"] for name in (_PROMPT_OF[context], "completion") for kind in ("ids", "mask")),
            pad_token_id=self.processing_class.pad_token_id,
            side=self._side,
            layout=self._layout,
            lengths=[(row[place], row[-1]) for row in inputs["lengths"]],
        )

    def _frozen_states(self, student: nn.Module, packed: Mapping[str, Packed], contexts: Sequence[str]) -> FrozenStates:
        def run(source: Any) -> FrozenStates:
            options = {"batched": self.args.batched_frozen, "batch_size": self.args.frozen_batch_size}
            return frozen_states(source, packed, contexts, **options)

        if self.teacher_model is None:
            return run(self._frozen_source())
        inner = self.accelerator.unwrap_model(self.teacher_model)

        def run_and_hold() -> FrozenStates:
            states = run(self._frozen_source())
            return states._replace(head=held(states.head))

        with torch.no_grad():
            states = run_in_forward(self.teacher_model, run_and_hold)
        # FSDP2 may have sharded the head again on leaving, which empties the one that was seen inside.
        return states if self._zero3 else states._replace(head=local_head(inner))
