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
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import nn

from popsd_integrations.commandline.options import ANSWER_COLUMN, SOLUTION_COLUMNS, WRONG_COLUMN
from popsd_integrations.huggingface.distributed import run_in_forward
from popsd_integrations.huggingface.forwards import counting
from popsd_integrations.huggingface.frozen import EMA, has_adapter
from popsd_integrations.huggingface.objective import measures_decomposition, needed_contexts, student_loss
from popsd_integrations.huggingface.packing import padded, unpad
from popsd_integrations.huggingface.prompts import ContextBuilder, Problem, Prompts
from popsd_integrations.huggingface.sampling import check_sampled, only_given_settings, own_randomness
from popsd_integrations.runs.frozen_weights import FrozenWeightsCallback
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
from popsd_integrations.trl_trainer.frozen import FrozenTrainer, check_models, copy_of, prepare_student
from popsd_integrations.trl_trainer.logs import card
from popsd_integrations.trl_trainer.logs.console import show_lines
from popsd_integrations.trl_trainer.logs.recording import record_completions, record_loss
from popsd_integrations.trl_trainer.vllm.engine import send_student
from popsd_integrations.trl_trainer.vllm.lengths import set_max_length

__all__ = ["PurifiedOPSDConfig", "PurifiedOPSDTrainer"]


class PurifiedOPSDTrainer(FrozenTrainer):
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
    _name, _paper = card.method("purified")

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
        self._name, self._paper = card.method(args.loss_target)
        needed = set_max_length(args, data, processing_class) if args.use_vllm else None
        self._own_teacher = teacher_model is not None
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
        show_lines(self)
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
        self._side, self._grouping, self._layout, self._shares = self._checked_model(data)
        self.add_callback(FrozenWeightsCallback(self._frozen_source))
        if args.plot_metrics:
            self.add_callback(PlotMetrics())
        self.add_callback(RunFiles(self.model.config._name_or_path, sizes(data), args.evaluate_options()))

    def create_model_card(self, model_name: str | None = None, *args: Any, **options: Any) -> None:
        super().create_model_card(model_name or Path(self.args.output_dir).name, *args, **options)
        if self.is_world_process_zero():
            card.complete(self)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", *SOLUTION_COLUMNS, WRONG_COLUMN, OTHER_COLUMN, ANSWER_COLUMN]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler, number = super()._get_train_sampler(dataset), self.args.num_generations
        sampler.mini_repeat_count, sampler.batch_size = number, sampler.batch_size // number
        check_rows(sampler.num_samples, sampler.batch_size)
        return EpochSampler(sampler, lambda: self.state.global_step)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, and what the loss needs beside it. TRL shuffles and splits all of it by rows.

        Added are the prompts of teacher and reference, and ``lengths``: for each row the tokens of its question, teacher
        prompt, reference prompt and completion, which stay on the host.
        """
        prompts = [self._prompts(problem_of(row)) for row in inputs]
        evaluated = not self.model.training
        longest = self.args.eval_max_completion_length if evaluated else None
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
        record_completions(self, completions)
        self._record_prompts(completions)
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
            generating(self, greedy=True, max_new_tokens=self.args.eval_max_completion_length),
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
            self._nothing_trained.tokens += record_loss(self, metrics)
            # DDP and FSDP average the gradients.
            loss = loss * self.accelerator.num_processes * accumulation_factor(self)
        else:
            loss = loss / metrics["tokens"].clamp(min=1)
            record_loss(self, metrics | {"loss": loss})
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
        with self.accelerator.autocast(), counting() as work:
            frozen = self._frozen_states(student, packed, contexts)
            loss, metrics = student_loss(
                student, self._loss_fn, packed["base"], frozen, mask=weights, num_items=total, decompose=decompose
            )
        run = torch.tensor([work.tokens, work.positions], dtype=loss.dtype).to(loss.device)
        return loss, metrics | {"weight": weights.sum().to(loss.dtype), "run": run}

    def _prompts(self, problem: Problem) -> Prompts:
        prompts = self._rows.prompts(problem, "dataset")
        if prompts is None:
            raise ValueError(
                f"dataset: expected prompts of at most max_prompt_length={self.args.max_prompt_length} tokens; got a "
                "longer one. Pass the dataset when the trainer is built, which drops those rows."
            )
        return prompts
