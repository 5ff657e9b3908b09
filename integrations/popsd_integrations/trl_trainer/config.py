"""Options of ``PurifiedOPSDTrainer``: TRL's own, and those of the method."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from popsd import Impl, MaskConfig, PurifiedConfig, PurifiedOPSDLoss, Strategy, presets
from popsd.engine.validation import check_workspace
from popsd.markers import EpistemicMarkers
from popsd_integrations.commandline.options import MethodOptions
from popsd_integrations.huggingface.groups import check_generations
from popsd_integrations.huggingface.objective import (
    loss_function,
    needed_contexts,
    takes_purified_options,
    target_code,
    target_config,
)
from popsd_integrations.huggingface.prompts import ContextConfig
from popsd_integrations.trl_trainer.compat import DistillationConfig
from popsd_integrations.trl_trainer.vllm.options import check_options

_REFUSED = {
    "teacher_model_name_or_path": "The teacher is the student's own frozen weights; others are passed as teacher_model.",
    "max_tool_calling_iterations": "This trainer calls no tools.",
}
_UNUSED = {
    "label_smoothing_factor": (0.0, "The loss compares distributions and has no labels."),
    "train_sampling_strategy": ("random", "The order of the rows is drawn from seed and epoch; see shuffle_dataset."),
}
"""Options of transformers that this trainer does not read, with the one value that is true of it."""
_LENGTH = "Set max_completion_length, which prompts are checked against."
_REFUSED_IN_GENERATION = {
    **dict.fromkeys(("max_new_tokens", "max_length", "max_tokens"), _LENGTH),
    "stop_strings": "Completions end at the ends that the model's generation_config and the tokenizer name.",
    "return_dict_in_generate": "The trainer takes the tokens alone.",
    **dict.fromkeys(("n", "num_return_sequences"), "num_generations samples several completions of each prompt."),
    "eos_token_id": "The trainer cuts completions at the ends that the model's generation_config and the tokenizer name, and "
    "would train on padding after another; name it there.",
}
_ENTRY_MASKS = ("plausibility", "tail_floor", "tail_cap")
_OPTION_OF = {"temperature": "loss_temperature"} | {
    name: name for name in ("beta", "token_clip", "entry_clip", "vocab_size", "pmi_beta", "pmi_clip", *_ENTRY_MASKS)
}


_SHAPING = {
    *(
        "beta",
        "learning_rate",
        "lr_scheduler_type",
        "optim",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "weight_decay",
        "max_grad_norm",
    ),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "max_completion_length"),
    *("chat_template_kwargs", "seed", "shuffle_dataset"),
}
"""TRL's options that the steps of a run depend on."""
_FREE = {
    *("impl", "strategy", "workspace_mib", "batched_frozen", "padding_free", "frozen_batch_size"),
    *("diagnostics_steps", "markers", "plot_metrics", "eval_scorer", "eval_problems", "eval_max_completion_length"),
}
"""Options of the method that change how a run computes or what it logs, but not its steps."""


_LEAST = {
    **dict.fromkeys(("skip_first_tokens", "diagnostics_steps", "learning_rate"), 0),
    **dict.fromkeys(("frozen_batch_size", "eval_problems", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
}


@dataclass
class PurifiedOPSDConfig(MethodOptions, DistillationConfig):
    """``trl.DistillationConfig`` (generation, vLLM, logging, all of ``TrainingArguments``) and those of `MethodOptions`.

    Defaults that differ from TRL's, after arXiv 2607.02234: beta 0.5, learning_rate 5e-6, max_completion_length 1024.
    ``temperature`` is that of sampling; the loss has its own in ``loss_temperature``. Completions are sampled with these
    options alone: nothing of the model's own generation_config applies but its end-of-sequence tokens.
    Raises ValueError for every option that is out of range or would do nothing.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *DistillationConfig._VALID_DICT_FIELDS,
        "teacher_chat_template_kwargs",
        "reference_chat_template_kwargs",
        "target_parameters",
        "loss_kwargs",
        "masks",
        "position_weights",
    ]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, remedy in _REFUSED.items():
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: expected None; got {getattr(self, name)!r}. {remedy}")
        for name, (only, remedy) in _UNUSED.items():
            if getattr(self, name, only) != only:
                raise ValueError(f"{name}: expected {only!r}; got {getattr(self, name)!r}. {remedy}")
        for name, remedy in _REFUSED_IN_GENERATION.items():
            if name in (self.generation_kwargs or {}):
                raise ValueError(
                    f"generation_kwargs: expected no {name!r}; got {self.generation_kwargs[name]!r}. {remedy}"
                )
        check_options(self)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}; got {value}.")
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps * max(1, self.world_size)
        check_generations(
            self.num_generations, rows, "per_device_train_batch_size × gradient_accumulation_steps × processes"
        )
        if not self.max_completion_length or self.max_completion_length <= self.skip_first_tokens:
            raise ValueError(
                f"max_completion_length: expected more than skip_first_tokens ({self.skip_first_tokens}); got "
                f"{self.max_completion_length}. No token would be left for the loss."
            )
        longest = self.eval_max_completion_length
        if longest is not None and (self.eval_scorer is None or longest < self.max_completion_length):
            raise ValueError(
                f"eval_max_completion_length: expected at least max_completion_length ({self.max_completion_length}), with an "
                f"eval_scorer; got {longest} with eval_scorer {self.eval_scorer!r}. Without a scorer nothing reads more."
            )
        if self.frozen_weights not in ("initial", "ema"):
            raise ValueError(f"frozen_weights: expected 'initial' or 'ema'; got {self.frozen_weights!r}.")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1], such as 0.999; got {self.ema_decay}.")
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs: expected use_reentrant False; got True, which fails with LoRA and DDP. "
                "Leave it out."
            )
        Impl(self.impl), Strategy(self.strategy)
        if isinstance(self.pmi_clip, str) and self.pmi_clip != "auto":  # a flag; in YAML a number or null
            try:
                self.pmi_clip = None if self.pmi_clip.lower() in ("none", "null") else float(self.pmi_clip)
            except ValueError as error:
                raise ValueError(f"pmi_clip: expected a number, auto or none; got {self.pmi_clip!r}.") from error
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], and 1 for no filter; got {self.top_p}.")
        check_workspace(self.workspace_mib)
        config = self.loss_function().config
        if (
            isinstance(config, PurifiedConfig)
            and takes_purified_options(self.loss_target)
            and not self.target_parameters
        ):
            self.pmi_beta, self.pmi_clip = config.pmi_beta, config.pmi_clip  # as they will be logged
        if self.reference is not None and "reference" not in needed_contexts(self.loss_target, True):
            raise ValueError(
                f"reference: expected None with loss_target={self.loss_target!r}, which runs no reference-only teacher; got "
                f"{self.reference!r}. teacher_reference says what the teacher is given."
            )
        if self.reference == "wrong_hint" or (self.reference and self.loss_target == "contrastive_hints"):
            raise ValueError(
                f"reference: expected None with loss_target='contrastive_hints', which is the wrong hint, and "
                f"'wrong_hint' nowhere else; got {self.reference!r} with {self.loss_target!r}."
            )
        self.token_weights(torch.ones(1, 1))
        self.context_config()
        self.epistemic_markers()

    def loss_function(self, tokenizer: Any = None) -> PurifiedOPSDLoss:
        """The loss that these options describe. tokenizer: needed for the tokens of protect_markers."""
        own = {name: getattr(self, option) for name, option in _OPTION_OF.items()}
        own["temperature"] = self.temperature if own["temperature"] is None else own["temperature"]
        own = {name: value for name, value in own.items() if value is not None and value != "auto"}
        if self.pmi_clip is None:
            own["pmi_clip"] = None  # which says something, where another None says nothing
        further = self._fields("loss_kwargs", {entry.name for entry in fields(PurifiedConfig)} - _OPTION_OF.keys())
        return loss_function(
            self.loss_target,
            target_config(self.loss_target, self.target_parameters, **own, **further),  # type: ignore[arg-type]
            masks=self._mask_config(tokenizer),
            impl=self.impl,
            strategy=self.strategy,
            workspace_mib=self.workspace_mib,
        )

    def token_weights(self, mask: torch.Tensor) -> torch.Tensor:
        """Which completion tokens of ``mask`` [B, T] count, before `MaskConfig`: [B, T] bool, or float weights."""
        counted = mask.bool()
        counted = counted & (torch.arange(mask.shape[1], device=mask.device) >= self.skip_first_tokens)
        if self.position_weights is None:
            return counted
        return presets.position_weights(counted, **self._fields("position_weights", {"first", "power"}))

    def _mask_config(self, tokenizer: Any) -> MaskConfig | None:
        rules = self._fields("masks", {entry.name for entry in fields(MaskConfig)} - {"skip_first"})
        if self.protect_markers and tokenizer is not None:
            markers = self.epistemic_markers().token_ids(tokenizer).values()
            rules["protect_ids"] = sorted({*rules.get("protect_ids", ()), *(token for ids in markers for token in ids)})
        return MaskConfig(**rules) if rules else None

    def _fields(self, name: str, known: Collection[str]) -> dict[str, Any]:
        """The fields given in an option that holds others. Raises ValueError for one that is not in ``known``."""
        given: Any = getattr(self, name) or {}
        if not isinstance(given, dict) or not given.keys() <= set(known):
            got = sorted(given) if isinstance(given, dict) else repr(given)
            raise ValueError(
                f"{name}: expected some of {sorted(known)}; got {got}. Other fields are options by themselves."
            )
        return dict(given)

    def context_config(self) -> ContextConfig:
        """How these options write the prompts."""
        kwargs: list[Any] = [
            self.chat_template_kwargs,
            self.teacher_chat_template_kwargs,
            self.reference_chat_template_kwargs,
        ]
        for index, value in enumerate(kwargs):
            kwargs[index] = (kwargs[index - 1] if index else {}) if value is None else value
        return ContextConfig(
            question_template=self.question_template,
            teacher_template=self.teacher_template,
            reference_template=self.reference_template,
            reference=self.reference or ("wrong_hint" if self.loss_target == "contrastive_hints" else "solution_only"),
            teacher_reference=self.teacher_reference,
            other_seed=self.seed,
            student_kwargs=kwargs[0],
            teacher_kwargs=kwargs[1],
            reference_kwargs=kwargs[2],
            max_prompt_length=self.max_prompt_length,
            on_overflow=self.on_overflow,
        )

    def evaluate_options(self) -> list[str]:
        """Options with which ``popsd evaluate`` judges the same prompts by the same scorer."""
        given = {
            "--question_template": self.question_template if self.question_template != "{question}" else None,
            "--chat_template_kwargs": json.dumps(self.chat_template_kwargs) if self.chat_template_kwargs else None,
            "--eval_scorer": self.eval_scorer if self.eval_scorer != "math" else None,
        }
        return [part for name, value in given.items() if value is not None for part in (name, value)]

    def run_options(self) -> dict[str, Any]:
        """What makes a run this one, as JSON: the options that its steps depend on, but for the number and size of batches.

        Those of the optimiser are among them, since a checkpoint brings its own and the ones given would be ignored. So is
        what a loss_target of one's own computes.
        """
        own = {entry.name for entry in fields(self)} - {entry.name for entry in fields(DistillationConfig)}
        names = (own | _SHAPING) - _FREE | ({"markers"} if self.protect_markers else set())
        options = {name: getattr(self, name) for name in sorted(names)} | target_code(self.loss_target)
        plain: dict[str, Any] = json.loads(json.dumps(options, default=str))
        return plain

    def epistemic_markers(self) -> EpistemicMarkers:
        return EpistemicMarkers(tuple(self.markers))
