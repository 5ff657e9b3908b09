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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import nn

from popsd_integrations.commandline.options import ANSWER_COLUMN, SOLUTION_COLUMNS, WRONG_COLUMN
from popsd_integrations.huggingface.distributed import agreed, run_in_forward
from popsd_integrations.huggingface.frozen import EMA, AdapterOff, FrozenModel, FrozenStates, frozen_states, has_adapter
from popsd_integrations.huggingface.heads import held, local_head
from popsd_integrations.huggingface.objective import measures_decomposition, needed_contexts, student_loss
from popsd_integrations.huggingface.packing import Packed, pack_padded, padded, unpad
from popsd_integrations.huggingface.prompts import ContextBuilder, Problem, Prompts
from popsd_integrations.huggingface.sampling import check_sampled, only_given_settings, own_randomness
from popsd_integrations.runs.held_out import GREEDY, SAMPLED, Judge, accuracies, log
from popsd_integrations.trl_trainer.callbacks import (
    EMACallback,
    NothingTrained,
    PlotMetrics,
    RunFiles,
    SameRun,
    trained_part,
)
from popsd_integrations.trl_trainer.compat import (
    EpochSampler,
    accumulation_factor,
    ends_of,
    generating,
    record,
    record_extreme,
    record_means,
    rows_of_data,
    suppress_unused_tokens,
    take_eval_means,
)
from popsd_integrations.trl_trainer.config import PurifiedOPSDConfig
from popsd_integrations.trl_trainer.dataset import (
    OTHER_COLUMN,
    RowCheck,
    check_columns,
    check_evaluation,
    check_rows,
    fingerprint,
    problem_of,
    sizes,
    tokenizer_of,
    with_other_solutions,
)
from popsd_integrations.trl_trainer.frozen import (
    FrozenWeightsCallback,
    check_models,
    copy_of,
    exact_ways,
    prepare_student,
)
from popsd_integrations.trl_trainer.guards import GuardedTrainer
from popsd_integrations.trl_trainer.vllm.engine import send_student
from popsd_integrations.trl_trainer.vllm.lengths import set_max_length

__all__ = ["PurifiedOPSDConfig", "PurifiedOPSDTrainer"]

_PROMPT_OF = {"base": "prompt", "teacher": "teacher_prompt", "reference": "reference_prompt"}
"""What TRL's batch calls each context's prompts, in the order of the fields of `Prompts`."""
_NONE = 2**40
"""Longer than a completion: minus this is the longest of none."""


class PurifiedOPSDTrainer(GuardedTrainer):
    """Distil a model into itself on its own completions, towards the purified target or, as a baseline, the teacher.

    Args:
        model: the student: a name or path, a causal language model, or a PEFT model. Its weights as they come, without
            the adapter under PEFT, are the frozen initial weights; merge an adapter trained before.
        args: `PurifiedOPSDConfig`.
        train_dataset, eval_dataset: with the columns ``prompt`` (text or conversational) and ``privileged_context`` or
            ``solution`` (text: the reference solution), and for contrastive hints ``wrong_privileged_context``. As in TRL, a
            text prompt is used as it is, without chat template. With ``eval_scorer`` an evaluation dataset has the column
            ``answer`` too.
        teacher_model: the frozen weights, where they shall be others than the student's own. Needed where neither the
            adapter can be switched off nor the weights copied, such as a model that is sharded already.
        processing_class, callbacks, optimizers, quantization_config, peft_config: see ``trl.DistillationTrainer``.

    ``train`` keeps the options in output_dir, as popsd_run.json, beside metrics.jsonl, popsd_config.json (all options),
    report.html and, of evaluations with ``eval_scorer``, eval_completions.jsonl. It resumes no checkpoint of a run with others.
    ``args`` is copied, so that the same one can build another trainer.

    Of a processor the tokenizer is used: training is on text alone, and only the tokenizer is saved with the model.

    Raises, at construction: ValueError and TypeError for missing columns, rows that give no prompts (named by number),
    prompts too long for the model or max_prompt_length, a model that ``check_model`` refuses, options that would do nothing.
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
        data = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        data = {name: dataset for name, dataset in data.items() if dataset is not None}
        check_evaluation(eval_dataset, args)
        for name, dataset in data.items():
            check_columns(dataset, name, args)
        data = {name: with_other_solutions(dataset, name, args) for name, dataset in data.items()}
        args = copy.copy(args)  # TRL reads the teacher's options from it, and below they are set
        check_models(model, teacher_model, quantization_config, args)
        processing_class = tokenizer_of(processing_class, model, args)
        needed = set_max_length(args, data, processing_class) if args.use_vllm else None
        own_teacher = teacher_model is not None
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
        prepare_student(self.model, fsdp=self.is_fsdp_enabled)
        if args.use_vllm:
            send_student(self, needed)
        self._zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
        self._loss_fn = args.loss_function(self.processing_class)
        suppress_unused_tokens(self, self._loss_fn.config.vocab_size)
        self._markers = args.epistemic_markers()
        self._contexts = ContextBuilder(self.processing_class, args.context_config(), text_as_chat=False)
        scorer, ends = args.eval_scorer, ends_of(self)
        self._judge = None if scorer is None else Judge(scorer, self.processing_class, ends)
        self._rows = RowCheck(self._contexts, self.model, args, self._judge)
        for name, dataset in data.items():
            setattr(self, name, self._rows.dataset(dataset, name))
        self._nothing_trained = NothingTrained()
        self.add_callback(self._nothing_trained)
        self._same_run = SameRun({"train_dataset": fingerprint(train_dataset)} | trained_part(self.model))
        self._ema = None
        if args.frozen_weights == "ema":
            if self.is_fsdp_enabled or self._zero3:
                raise ValueError(
                    "frozen_weights: expected 'initial' under FSDP and ZeRO-3; got 'ema', which needs whole parameters."
                )
            self._ema = EMA(self.model, args.ema_decay)
            self.add_callback(EMACallback(self._ema))
        self._side, self._grouping = self._checked_model(data, own_teacher)
        self.add_callback(FrozenWeightsCallback(self._frozen_source))
        if args.plot_metrics:
            self.add_callback(PlotMetrics())
        self.add_callback(RunFiles(self.model.config._name_or_path, sizes(data), args.evaluate_options()))

    def _checked_model(self, data: Mapping[str, Any], own_teacher: bool) -> tuple[str, str]:
        """What `exact_ways` finds. data: as given; a stream that drops rows would count them here.

        own_teacher: of frozen weights that are not the student's.
        """
        built = [prompts for name, dataset in data.items() for prompts in self._rows.first(dataset, name, 2)][:2]
        self.model.train()  # as it will be
        return agreed(lambda: exact_ways(self, self._frozen_source(), built, own_teacher))

    def _frozen_source(self) -> AdapterOff | FrozenModel:
        if self.teacher_model is not None:
            return FrozenModel(self.accelerator.unwrap_model(self.teacher_model))
        return self._ema or AdapterOff(self.accelerator.unwrap_model(self.model))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", *SOLUTION_COLUMNS, WRONG_COLUMN, OTHER_COLUMN, ANSWER_COLUMN]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        check_rows(sampler.num_samples, sampler.batch_size)
        return EpochSampler(sampler, lambda: self.state.global_step)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, and what the loss needs beside it. TRL shuffles and splits all of it by rows.

        Added are the prompts of teacher and reference, and ``lengths``: for each row the tokens of its question, teacher
        prompt, reference prompt and completion, which stay on the host.
        """
        prompts = [self._prompts(problem_of(row)) for row in inputs]
        evaluated = not self.model.training
        longest = self.args.eval_max_new_tokens if evaluated else None
        with only_given_settings(self.model), generating(self, max_new_tokens=longest):
            batch = super()._generate_and_score_completions([{"prompt": row.question} for row in prompts])
        if evaluated:
            self._judge_completions(inputs, prompts, unpad(batch["completion_ids"], batch["completion_mask"]))
            batch |= {x: batch[x][:, : self.args.max_completion_length] for x in ("completion_ids", "completion_mask")}
        for name in ("teacher", "reference"):
            rows = [getattr(row, name) for row in prompts]
            ids, mask = padded(rows, self.processing_class.pad_token_id, device=self.accelerator.device)
            batch |= {f"{name}_prompt_ids": ids, f"{name}_prompt_mask": mask}
        completions = unpad(batch["completion_ids"], batch["completion_mask"])
        check_sampled(completions, self._loss_fn.config.vocab_size)
        batch["lengths"] = [tuple(map(len, (*row, ids))) for row, ids in zip(prompts, completions, strict=True)]
        counted = self.args.token_weights(batch["completion_mask"]) != 0
        batch["num_items_in_batch"] = self.accelerator.reduce(counted.sum(), "sum")
        self._record_completions(completions)
        return batch

    def _judge_completions(
        self, inputs: list[dict[str, Any]], prompts: list[Prompts], sampled: list[list[int]]
    ) -> None:
        """Judge what was sampled, and what is generated greedily beside it, where accuracy is asked for."""
        if self._judge is None:
            return
        questions = [row.question for row in prompts]
        with (
            only_given_settings(self.model),
            generating(self, greedy=True, max_new_tokens=self.args.eval_max_new_tokens),
        ):
            greedy = self._generate_single_turn(questions, None, {})
        own = rows_of_data(self, len(inputs))
        rows = [(ids, row.get(ANSWER_COLUMN)) for ids, row in zip(questions, inputs, strict=True)][:own]
        for kind, completions in ((SAMPLED, sampled), (GREEDY, greedy)):
            self._judge.add(kind, rows, completions[:own])

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
        total = inputs["num_items_in_batch"].clamp(min=1)
        if not self.model.training:
            total = torch.ones_like(total)  # the sum: its mean is taken over the whole set, in `evaluation_loop`
        student = self.accelerator.unwrap_model(model)
        loss, metrics = run_in_forward(model, lambda: self._loss(student, inputs, total, decompose))
        if self.model.training:
            self._record_loss(metrics)
            # DDP and FSDP average the gradients.
            loss = loss * self.accelerator.num_processes * accumulation_factor(self)
        else:
            loss = loss / metrics["tokens"].clamp(min=1)
            self._record_loss(metrics | {"loss": loss})
        return (loss, None) if return_outputs else loss

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """transformers' loop, whose loss and metrics are means over the tokens of the whole set, each row counted once.

        Of a stream that ends amid a batch the rows that accelerate repeats for other processes are counted again.
        The random states stay as they are, and every evaluation draws the same numbers.
        """
        take_eval_means(self)
        with own_randomness(self.args.seed + self.accelerator.process_index):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = take_eval_means(self)
        if self._judge is not None:
            records = gather_object(self._judge.take())
            found |= accuracies(records)
            if self.accelerator.is_main_process:
                log(Path(self.args.output_dir), self.state.global_step, metric_key_prefix, records)
        output.metrics.update({f"{metric_key_prefix}_{name}": x for name, x in found.items()})
        return output

    def _loss(
        self, student: nn.Module, inputs: dict[str, Any], total: torch.Tensor | None, decompose: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Runs inside the wrapped model's forward."""
        contexts = needed_contexts(self.args.loss_target, decompose)
        packed = {name: self._packed(inputs, name) for name in dict.fromkeys(("base", *contexts))}
        weights = self.args.token_weights(packed["base"].completion_mask)
        weights[rows_of_data(self, len(weights)) :] = 0
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
            states = run_in_forward(self.teacher_model, run_and_hold)
        # FSDP2 may have sharded the head again on leaving, which empties the one that was seen inside.
        return states if self._zero3 else states._replace(head=local_head(inner))

    def _prompts(self, problem: Problem) -> Prompts:
        prompts = self._rows.prompts(problem, "dataset")
        if prompts is None:
            raise ValueError(
                f"dataset: expected prompts of at most max_prompt_length={self.args.max_prompt_length} tokens; got a "
                "longer one. Pass the dataset when the trainer is built, which drops those rows."
            )
        return prompts

    @torch.no_grad()
    def _record_completions(self, completions: list[list[int]]) -> None:
        completions = completions[: rows_of_data(self, len(completions))]
        counts = self._markers.count_ids(completions, self.processing_class)
        ends = {*ends_of(self), self.processing_class.pad_token_id}
        lengths = {"": list(map(len, completions)), "terminated_": [len(ids) for ids in completions if ids[-1] in ends]}
        local = [*counts.counts.values(), counts.total]
        local += [number for some in lengths.values() for number in (sum(some), len(some))]
        local += [max((sign * x for x in some), default=-_NONE) for some in lengths.values() for sign in (-1, 1)]
        parts = self.accelerator.gather(torch.tensor([local], device=self.accelerator.device)).tolist()
        *sums, shortest, longest, shortest_ended, longest_ended = map(list, zip(*parts, strict=True))
        *words, total, tokens, rows, ended_tokens, ended = map(sum, sums)
        rates = dict(zip(counts.counts, words, strict=True)) | {"per_completion": total}
        record_means(
            self,
            {f"markers/{name}": (value, rows) for name, value in rates.items()}
            | {
                "markers/per_thousand_tokens": (1000 * total, tokens),
                "completions/mean_length": (tokens, rows),
                "completions/clipped_ratio": (rows - ended, rows),
                "completions/mean_terminated_length": (ended_tokens, ended),
            },
        )
        extremes = {"": (shortest, longest), "terminated_": (shortest_ended, longest_ended)}
        for kind, (least, most) in extremes.items():
            if max(most) > -_NONE:
                record_extreme(self, f"completions/min_{kind}length", -max(least), min)
                record_extreme(self, f"completions/max_{kind}length", max(most), max)
        if self.args.on_overflow != "error":
            record(self, {"contexts/dropped": self._contexts.dropped, "contexts/truncated": self._contexts.truncated})

    @torch.no_grad()
    def _record_loss(self, metrics: Mapping[str, torch.Tensor]) -> None:
        """Of means over this call's tokens, those over all tokens until the next logging step; of kept_share over weights."""
        metrics = dict(metrics)
        local = torch.stack([metrics.pop("tokens"), metrics.pop("weight")])
        of_weight = [name == "kept_share" for name in metrics]
        sums = torch.stack([x * local[int(of)] for x, of in zip(metrics.values(), of_weight, strict=True)])
        # Here and not inside the wrapped forward, where a collective could meet FSDP's in another order on another rank.
        reduced = self.accelerator.reduce(torch.cat([sums, local]), "sum")
        *values, tokens, weight = reduced.tolist()  # the one wait for the device
        renamed = {"student_entropy": "entropy", "kept_share": "masks/kept_share"}
        names = [renamed.get(name, name) for name in metrics]
        counts = [weight if of else tokens for of in of_weight]
        record_means(self, dict(zip(names, zip(values, counts, strict=True), strict=True)))
        if self.model.training:
            self._nothing_trained.tokens += values[of_weight.index(True)] if any(of_weight) else tokens
