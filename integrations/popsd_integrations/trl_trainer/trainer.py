"""Purified on-policy self-distillation (arXiv 2607.02234) as a TRL trainer.

``trl.DistillationTrainer`` generates, batches, accumulates, logs, evaluates, saves and resumes. Five things are overridden:
- the columns it keeps,
- the order of its data, which a resumed run must find again,
- how prompts become tokens: popsd tokenises each question once, and TRL takes the ids,
- what it generates: the prompts of teacher and reference join the batch,
- the loss: three frozen forwards and the student's over the same completion tokens, without full-vocabulary logits.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
from datasets import IterableDataset
from torch import nn
from transformers import ProcessorMixin

from popsd_integrations.huggingface.frozen import EMA, AdapterOff, FrozenModel, FrozenStates, frozen_states, has_adapter
from popsd_integrations.huggingface.heads import held, local_head, run_in_forward
from popsd_integrations.huggingface.objective import measures_decomposition, needed_contexts, student_loss
from popsd_integrations.huggingface.packing import Packed, pack_padded, padded, unpad
from popsd_integrations.huggingface.prompts import ContextBuilder, Problem, Prompts, thinking_states
from popsd_integrations.huggingface.sampling import only_given_settings
from popsd_integrations.trl_trainer.callbacks import EMACallback, NothingTrained, PlotMetrics
from popsd_integrations.trl_trainer.compat import (
    DistillationTrainer,
    EpochSampler,
    accumulation_factor,
    record,
)
from popsd_integrations.trl_trainer.config import PurifiedOPSDConfig
from popsd_integrations.trl_trainer.frozen import FrozenWeightsCallback, agreed, check_teacher, copy_of, exact_side

__all__ = ["PurifiedOPSDConfig", "PurifiedOPSDTrainer"]

logger = logging.getLogger(__name__)

SOLUTION_COLUMNS = ("privileged_context", "solution")
WRONG_COLUMN = "wrong_privileged_context"
_PROMPT_OF = {"base": "prompt", "teacher": "teacher_prompt", "reference": "reference_prompt"}
"""What TRL's batch calls each context's prompts, in the order of the fields of `Prompts`."""


class PurifiedOPSDTrainer(DistillationTrainer):
    """Distil a model into itself on its own completions, towards the purified target or, as a baseline, the teacher.

    Args:
        model: the student: a name or path, a causal language model, or a PEFT model. Its weights as they come, without
            the adapter under PEFT, are the frozen initial weights; merge an adapter trained before.
        args: `PurifiedOPSDConfig`.
        train_dataset, eval_dataset: with the columns ``prompt`` (text or conversational) and ``privileged_context`` or
            ``solution`` (text: the reference solution), and for contrastive hints ``wrong_privileged_context``. As in TRL, a
            text prompt is used as it is, without chat template.
        teacher_model: the frozen weights, where they shall be others than the student's own. Needed where neither the
            adapter can be switched off nor the weights copied, such as a model that is sharded already.
        processing_class, callbacks, optimizers, quantization_config, peft_config: see ``trl.DistillationTrainer``.

    ``args`` is copied, so that the same one can build another trainer.

    Raises, at construction: ValueError and TypeError for missing columns, problems without question or solution, prompts
    too long, a conversation without chat template, a model that ``check_model`` refuses, options that would do nothing.
    ``train`` raises ValueError where the data gives no batch, or a stream gave none, and where the checkpoint to resume
    began from other initial weights; RuntimeError where the frozen weights have changed at a checkpoint or at the end.
    """

    loss_is_scaled_for_ga = True
    _tag_names: ClassVar[list[str]] = ["trl", "popsd", "purified-opsd"]
    _name = "Purified OPSD"
    _paper: ClassVar[dict[str, str]] = {"title": "Purified On-Policy Self-Distillation", "id": "2607.02234"}

    def __init__(
        self,
        model: Any,
        args: PurifiedOPSDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        teacher_model: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or "model"
            args = PurifiedOPSDConfig(f"{name.split('/')[-1]}-Purified-OPSD")
        if not isinstance(args, PurifiedOPSDConfig):
            raise TypeError(f"args: expected a PurifiedOPSDConfig; got {type(args).__name__}.")
        if isinstance(processing_class, ProcessorMixin):
            raise TypeError(
                f"processing_class: expected a tokenizer; got {type(processing_class).__name__}. Images are not supported."
            )
        args = copy.copy(args)  # TRL reads the teacher's options from it, and below they are set
        check_teacher(teacher_model, args)
        given = teacher_model is not None
        adapter = peft_config is not None or (not isinstance(model, str) and has_adapter(model))
        if teacher_model is None and not adapter and args.frozen_weights == "initial":
            teacher_model = copy_of(model, args)
        super().__init__(
            model=model,
            teacher_model=teacher_model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
        self._loss_fn = args.loss_function(self.processing_class)
        self._markers = args.epistemic_markers()
        self._contexts = ContextBuilder(self.processing_class, args.context_config(), text_as_chat=False)
        self.train_dataset: Any = self._checked(train_dataset, "train_dataset")
        self.eval_dataset: Any = self._checked(eval_dataset, "eval_dataset")
        self.add_callback(NothingTrained())
        self._ema = None
        if args.frozen_weights == "ema":
            if self.is_fsdp_enabled or self._zero3:
                raise ValueError(
                    "frozen_weights: expected 'initial' under FSDP and ZeRO-3; got 'ema', which needs whole parameters."
                )
            self._ema = EMA(self.model, args.ema_decay)
            self.add_callback(EMACallback(self._ema))
        self._side = self._checked_model(given=given)
        self.add_callback(FrozenWeightsCallback(self._frozen_source))
        if args.plot_metrics:
            self.add_callback(PlotMetrics())

    def _checked_model(self, given: bool) -> str:
        """The padding side that `check_model` finds exact. given: the frozen weights are others than the student's own."""
        dataset = self.train_dataset if self.train_dataset is not None else self.eval_dataset
        dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
        builder = ContextBuilder(self.processing_class, self._contexts.config, text_as_chat=False)  # counts for itself
        built = [x for row in islice(dataset or (), 2) if (x := builder.build(problem_of(row))) is not None]
        self.model.train()  # as it will be
        source, pad = self._frozen_source(), self.processing_class.pad_token_id
        return agreed(self.accelerator, lambda: exact_side(self.model, source, built, pad, given))

    def _frozen_source(self) -> AdapterOff | FrozenModel:
        if self.teacher_model is not None:
            return FrozenModel(self.accelerator.unwrap_model(self.teacher_model))
        return self._ema or AdapterOff(self.accelerator.unwrap_model(self.model))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", *SOLUTION_COLUMNS, WRONG_COLUMN]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if len(sampler) == 0:
            raise ValueError(
                f"train_dataset: expected at least the {sampler.batch_size} rows of one step (per_device_train_batch_size × "
                f"gradient_accumulation_steps × processes); got {sampler.num_samples}. Lower one of them, or add data."
            )
        return EpochSampler(sampler, lambda: self.state.global_step)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, and what the loss needs beside it. TRL shuffles and splits all of it by rows.

        Added are the prompts of teacher and reference, and ``lengths``: for each row the tokens of its question, teacher
        prompt, reference prompt and completion, which stay on the host.
        """
        prompts = [self._prompts(problem_of(row)) for row in inputs]
        with only_given_settings(self.model):
            batch = super()._generate_and_score_completions([{"prompt": row.question} for row in prompts])
        for name in ("teacher", "reference"):
            rows = [getattr(row, name) for row in prompts]
            ids, mask = padded(rows, self.processing_class.pad_token_id, device=self.accelerator.device)
            batch |= {f"{name}_prompt_ids": ids, f"{name}_prompt_mask": mask}
        completions = unpad(batch["completion_ids"], batch["completion_mask"])
        batch["lengths"] = [tuple(map(len, (*row, ids))) for row, ids in zip(prompts, completions, strict=True)]
        weights = self.args.token_weights(batch["completion_mask"])
        totals = torch.stack([(weights != 0).sum(), weights.sum()])
        batch["num_items_in_batch"], batch["weight_in_batch"] = self.accelerator.reduce(totals, "sum").unbind()
        self._record_completions(completions)
        return batch

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """Prompts come as token ids already, so TRL cannot tokenise a question otherwise than teacher and reference."""
        return prompts, None, {}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of the completion tokens' losses over their number in the global batch; in evaluation, their mean.

        ``num_items_in_batch``, which transformers counted before there were completions, is not used.
        """
        every = self.args.diagnostics_steps
        decompose = every > 0 and (self.state.global_step % every == 0 or not self.model.training)
        decompose = decompose and measures_decomposition(self.args.loss_target)
        totals = [inputs["num_items_in_batch"].clamp(min=1), inputs["weight_in_batch"].clamp(min=1e-9)]
        total = totals[0] if self.model.training else None
        student = self.accelerator.unwrap_model(model)
        loss, metrics = run_in_forward(model, student, lambda: self._loss(student, inputs, total, decompose))
        self._record_loss(metrics, totals if self.model.training else None)
        if self.model.training:
            # DDP and FSDP average the gradients.
            loss = loss * self.accelerator.num_processes * accumulation_factor(self)
        return (loss, None) if return_outputs else loss

    def _loss(
        self, student: nn.Module, inputs: dict[str, Any], total: torch.Tensor | None, decompose: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Runs inside the wrapped model's forward."""
        contexts = needed_contexts(self.args.loss_target, decompose)
        packed = {name: self._packed(inputs, name) for name in dict.fromkeys(("base", *contexts))}
        weights = self.args.token_weights(packed["base"].completion_mask)
        with self.accelerator.autocast():
            frozen = self._frozen_states(student, packed, contexts)
            loss, metrics = student_loss(
                student, self._loss_fn, packed["base"], frozen, mask=weights, num_items=total, decompose=decompose
            )
        return loss, metrics | {"weight": weights.sum().to(loss.dtype)}

    def _packed(self, inputs: dict[str, Any], context: str) -> Packed:
        """The micro-batch in one context. Its lengths are on the host, so nothing waits for the device."""
        place = list(_PROMPT_OF).index(context)
        return pack_padded(
            *(inputs[f"{name}_{kind}"] for name in (_PROMPT_OF[context], "completion") for kind in ("ids", "mask")),
            pad_token_id=self.processing_class.pad_token_id,
            side=self._side,
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
            states = run_in_forward(self.teacher_model, inner, run_and_hold)
        # FSDP2 may have sharded the head again on leaving, which empties the one that was seen inside.
        return states if self._zero3 else states._replace(head=local_head(inner))

    def _prompts(self, problem: Problem) -> Prompts:
        prompts = self._contexts.build(problem)
        if prompts is None:
            raise ValueError(
                f"dataset: expected prompts of at most max_prompt_length={self.args.max_prompt_length} tokens; got a "
                "longer one. Pass the dataset when the trainer is built, which drops those rows."
            )
        return prompts

    def _checked(self, dataset: Any, name: str) -> Any:
        """The dataset without the rows that ``on_overflow='drop'`` leaves out. Raises ValueError on a row that is no good.

        Of a stream only the columns and the first row can be known here.
        """
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {key: self._checked(part, f"{name}[{key!r}]") for key, part in dataset.items()}
        columns = dataset.column_names
        if columns is not None and ("prompt" not in columns or not set(SOLUTION_COLUMNS) & set(columns)):
            raise ValueError(
                f"{name}: expected the columns 'prompt' and one of {list(SOLUTION_COLUMNS)}; got {columns}. "
                "Rename them with dataset.rename_column."
            )
        if columns is not None and self.args.loss_target == "contrastive_hints" and WRONG_COLUMN not in columns:
            raise ValueError(
                f"{name}: expected the column {WRONG_COLUMN!r} for loss_target='contrastive_hints'; got {columns}. It "
                "holds a wrong solution of each problem; another problem's will do."
            )
        builder = ContextBuilder(self.processing_class, self._contexts.config, text_as_chat=False)
        if isinstance(dataset, IterableDataset):
            first = next(iter(dataset), None)
            if first is not None:
                self._warn_of_thinking(builder.build(problem_of(first)))
            drop = self.args.on_overflow == "drop"
            return dataset.filter(lambda row: self._contexts.build(problem_of(row)) is not None) if drop else dataset
        keep: list[int] = []
        for index, row in enumerate(dataset):
            try:
                problem = problem_of(row)
                if self.args.max_prompt_length is None:
                    builder.check(problem)  # nothing but the solution has to become tokens
                elif builder.build(problem) is None:
                    continue
            except ValueError as error:
                raise ValueError(f"{name}, row {index}: {error}") from error
            keep.append(index)
        if not keep:
            raise ValueError(
                f"{name}: expected at least one usable row; {builder.dropped} of {len(dataset)} were dropped."
            )
        dropped, truncated = builder.dropped, builder.truncated
        self._warn_of_thinking(builder.build(problem_of(dataset[keep[0]])))
        if dropped or truncated:
            logger.warning(
                f"{name}: of {len(dataset)} problems {dropped} were dropped and {truncated} have their "
                f"solution cut, for prompts longer than max_prompt_length={self.args.max_prompt_length}."
            )
        return dataset if len(keep) == len(dataset) else dataset.select(keep)

    def _warn_of_thinking(self, prompts: Prompts | None) -> None:
        states = {} if prompts is None else thinking_states(self.processing_class, prompts)
        if len(set(states.values())) > 1:
            logger.warning(
                f"The prompts end in different thinking states: {states}. The completion's first tokens then mean "
                "something else to each. Set the same chat_template_kwargs, or skip_first_tokens."
            )

    @torch.no_grad()
    def _record_completions(self, completions: list[list[int]]) -> None:
        counts = self._markers.count_ids(completions, self.processing_class)
        local = [*counts.counts.values(), counts.total, counts.completions, counts.tokens]
        sums = self.accelerator.reduce(torch.tensor(local, device=self.accelerator.device), "sum").tolist()
        *words, total, rows, tokens = sums
        rates = dict(zip(counts.counts, words, strict=True)) | {"per_completion": total}
        record(self, {f"markers/{name}": value / rows for name, value in rates.items()})
        record(self, {"markers/per_thousand_tokens": 1000 * total / max(tokens, 1)})
        if self.args.on_overflow != "error":
            record(self, {"contexts/dropped": self._contexts.dropped, "contexts/truncated": self._contexts.truncated})

    @torch.no_grad()
    def _record_loss(self, metrics: Mapping[str, torch.Tensor], totals: list[torch.Tensor] | None) -> None:
        """Means over the tokens of the global batch, exact under accumulation, where TRL averages the micro-batches.

        totals: the global batch's tokens and their weight, of which kept_share is a share; None: this call's.
        """
        metrics = dict(metrics)
        local = torch.stack([metrics.pop("tokens"), metrics.pop("weight")])
        denominator = [int(name == "kept_share") for name in metrics]
        sums = torch.stack([x * local[of] for x, of in zip(metrics.values(), denominator, strict=True)])
        # Here and not inside the wrapped forward, where a collective could meet FSDP's in another order on another rank.
        reduced = self.accelerator.reduce(torch.cat([sums, local]), "sum")
        whole = reduced[-2:] if totals is None else torch.stack([x.to(reduced.dtype) for x in totals])
        *values, tokens, weight = torch.cat([reduced[:-2], whole]).tolist()  # the one wait for the device
        steps = 1 if totals is None else self.current_gradient_accumulation_steps
        shares = [steps / max(x, 1e-9) for x in (tokens, weight)]
        renamed = {"student_entropy": "entropy", "kept_share": "masks/kept_share"}
        names = [renamed.get(name, name) for name in metrics]
        record(self, {name: x * shares[of] for name, x, of in zip(names, values, denominator, strict=True)})


def problem_of(row: Mapping[str, Any]) -> Problem:
    """The problem in a row of a dataset. Raises ValueError where a column is missing."""
    column = next((name for name in SOLUTION_COLUMNS if name in row), None)
    if column is None or "prompt" not in row:
        raise ValueError(f"expected the columns 'prompt' and one of {list(SOLUTION_COLUMNS)}; got {list(row)}.")
    return Problem(row["prompt"], row[column], row.get(WRONG_COLUMN))
