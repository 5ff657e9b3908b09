"""ms-swift's GKD trainer with popsd's loss. ms-swift imports this file, once a plugin has called ``use``.

ms-swift loads, samples, accumulates, saves and resumes. Three things are overridden: how a sampled row becomes a batch (three
contexts, without ms-swift's padding), the loss, and what is logged.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from swift.rlhf_trainers import GKDConfig, GKDTrainer
from swift.rlhf_trainers.gkd_helpers import encode_sample, encode_teacher_view
from torch import nn

from popsd_integrations.huggingface.distributed import global_num_items, run_in_forward
from popsd_integrations.huggingface.frozen import AdapterOff, FrozenModel, FrozenStates, frozen_states
from popsd_integrations.huggingface.heads import held, is_sharded
from popsd_integrations.huggingface.invariants import check_model
from popsd_integrations.huggingface.objective import measures_decomposition, needed_contexts, student_loss
from popsd_integrations.huggingface.packing import Packed, pack_contexts
from popsd_integrations.huggingface.prompts import ContextBuilder
from popsd_integrations.huggingface.sampling import check_sampled, special_tokens
from popsd_integrations.ms_swift.contexts import conversations, row_of
from popsd_integrations.ms_swift.options import check_arguments, chosen
from popsd_integrations.runs.frozen_weights import FrozenWeightsCallback

logger = logging.getLogger(__name__)


@dataclass
class PurifiedGKDConfig(GKDConfig):
    """ms-swift's options of ``gkd``, and those of its command line that this trainer must know. See `check_arguments`."""

    model: str | None = None
    teacher_model: str | None = None
    teacher_model_server: str | None = None
    teacher_adapters: list[str] = field(default_factory=list)
    gkd_logits_topk: int | None = None
    padding_free: bool = False
    packing: bool = False
    sequence_parallel_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_arguments(vars(self))
        chosen().loss_function(beta=self.beta, temperature=self.temperature)


class PurifiedGKDTrainer(GKDTrainer):
    """Trains towards the target that the plugin chose, with the initial model as base, teacher and reference.

    Raises, at construction, what ``check_model`` raises. Training raises ValueError for rows that give no contexts and
    RuntimeError where the frozen weights have changed at a checkpoint or at the end.
    """

    loss_is_scaled_for_ga = True  # of transformers: this loss is divided by the tokens of the whole optimiser step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._options = chosen()
        self._loss_fn = self._options.loss_function(beta=self.beta, temperature=self.temperature)
        if (tempered := self._loss_fn.config.temperature) != 1 and self._options.loss_temperature is None:
            logger.warning(
                f"temperature: {tempered} divides the logits of the loss too, and .9 is ms-swift's default. The paper's "
                "loss has 1: pass --temperature 1, or set loss_temperature=1.0 in the plugin."
            )
        tokenizer, student = self.template.tokenizer, self.accelerator.unwrap_model(self.model)
        ends, self._pad_token_id = special_tokens(student, tokenizer)
        if self._pad_token_id in ends and not self.args.use_vllm:
            logger.warning(
                f"pad_token: {tokenizer.pad_token!r} ends completions too, and ms-swift takes it out of them. The student then "
                "does not learn where to stop. Give the tokenizer another pad token."
            )
        self._contexts = ContextBuilder(tokenizer, self._options.contexts)
        self._side = self._exact_side(student)
        self._means: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
        self.add_callback(FrozenWeightsCallback(self._frozen_source))

    def _frozen_source(self) -> AdapterOff | FrozenModel:
        if self.teacher_model is None:
            return AdapterOff(self.accelerator.unwrap_model(self.model))
        return FrozenModel(self.accelerator.unwrap_model(self.teacher_model))

    def _exact_side(self, student: nn.Module) -> str:
        source = self._frozen_source()
        if any(map(is_sharded, (*student.parameters(), *source.model.parameters()))):
            logger.warning(
                "The weights are sharded already, so nothing was run to prove that popsd computes this model's logits."
            )
            return "left"
        student.train()  # as it will be
        # ms-swift has loaded the adapter of the checkpoint by now. The frozen weights are compared with that run's instead.
        resumed = isinstance(source, AdapterOff) and self.args.resume_from_checkpoint
        return check_model(student, frozen=None if resumed else source, pad_token_id=self._pad_token_id)

    def _prepare_batch_inputs(self, samples: list[Any]) -> list[dict[str, Any]]:
        """A batch for each micro-batch: the rows in their contexts, which tokens count, and what the loss is divided by."""
        batches = [self._batch(part) for part in self.split_by_mini_batches(samples)]
        steps = self.args.gradient_accumulation_steps if self.model.training else 1
        for first in range(0, len(batches), steps):
            together = batches[first : first + steps]
            total = global_num_items(*(batch["mask"] for batch in together))
            for batch in together:
                batch["num_items"] = total
        return batches

    def _batch(self, samples: Sequence[Any]) -> dict[str, Any]:
        with self._template_context(self.template):
            rows = [row_of(self._encodings(sample), self._pad_token_id) for sample in samples]
        completions = [row.completion for row in rows]
        check_sampled(completions, self._loss_fn.config.vocab_size)
        packed = pack_contexts(
            [row.prompts for row in rows],
            completions,
            pad_token_id=self._pad_token_id,
            contexts=list(dict.fromkeys(("base", *self._needed(self._options.diagnostics_steps > 0)))),
            side=self._side,
            device=self.accelerator.device,
        )
        counts = torch.tensor([row.counts for row in rows], device=self.accelerator.device)
        return {"packed": packed, "mask": packed["base"].completion_mask & counts[:, None]}

    def _encodings(self, sample: Any) -> dict[str, dict[str, Any]]:
        """What ms-swift's template makes of a sampled row in each context, with the very tokens that were sampled."""
        *messages, answer = sample.messages
        columns = sample.extra | {"teacher_prompt": sample.teacher_prompt}
        written = conversations(self._contexts, messages, columns, reference=self._options.needs_reference)
        encodings = {"question": encode_sample(sample, self.template)}
        for name, conversation in written.items():
            view, further = copy.copy(sample), getattr(self._options.contexts, f"{name}_kwargs")
            template_kwargs = {**(sample.extra.get("chat_template_kwargs") or {}), **further}
            view.teacher_messages, view.extra = [*conversation, answer], {"chat_template_kwargs": template_kwargs}
            encodings[name] = encode_teacher_view(view, self.template)
        for encoding in encodings.values():
            encoding.pop("_extra_kwargs", None)
        return encodings

    def _needed(self, decompose: bool) -> list[str]:
        return needed_contexts(self._options.loss_target, decompose)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of the completion tokens' losses over their number in the optimiser step; in evaluation, in the micro-batch."""
        every = self._options.diagnostics_steps
        decompose = every > 0 and (self.state.global_step % every == 0 or not self.model.training)
        decompose = decompose and measures_decomposition(self._options.loss_target)
        student = self.accelerator.unwrap_model(model)
        loss, metrics = run_in_forward(model, lambda: self._loss(student, inputs, decompose))
        self._record(metrics)
        return (loss, None) if return_outputs else loss

    def _loss(
        self, student: nn.Module, inputs: dict[str, Any], decompose: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Runs inside the wrapped model's forward."""
        with self.accelerator.autocast():
            frozen = self._frozen_states(inputs["packed"], self._needed(decompose))
            return student_loss(
                student,
                self._loss_fn,
                inputs["packed"]["base"],
                frozen,
                mask=inputs["mask"],
                num_items=inputs["num_items"],
                decompose=decompose,
            )

    def _frozen_states(self, packed: Mapping[str, Packed], needed: Sequence[str]) -> FrozenStates:
        def run() -> FrozenStates:
            states = frozen_states(self._frozen_source(), packed, needed, batch_size=self._options.frozen_batch_size)
            return states if self.teacher_model is None else states._replace(head=held(states.head))

        return run() if self.teacher_model is None else run_in_forward(self.teacher_model, run)

    @torch.no_grad()
    def _record(self, metrics: dict[str, torch.Tensor]) -> None:
        """Of means over this call's tokens, those over all tokens of all processes until the next logging."""
        metrics = dict(metrics)
        tokens = metrics.pop("tokens")
        sums = torch.stack([*(tokens * value for value in metrics.values()), tokens])
        # Outside the wrapped forward, where a collective could meet FSDP's in another order on another rank.
        *values, total = self.accelerator.reduce(sums, "sum").tolist()
        means = self._means[self._mode]
        for name, value in zip(metrics, values, strict=True):
            before, counted = means.get(name, (0.0, 0.0))
            means[name] = before + value, counted + total

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """ms-swift's logging, with the loss's own metrics."""
        prefix = "eval_" if self._mode == "eval" else ""
        for name, (total, count) in self._means.pop(self._mode, {}).items():
            logs[f"{prefix}{name}"] = total / max(count, 1.0)
        super().log(logs, *args, **kwargs)
