"""Options of ``PurifiedOPSDTrainer``: TRL's own, and those of the method."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from popsd import Impl, PurifiedConfig, PurifiedOPSDLoss, Strategy
from popsd.epistemic import DEFAULT_MARKERS, EpistemicMarkers
from popsd_integrations.contexts import ContextConfig
from popsd_integrations.trl_compat import DistillationConfig

_OPTION_OF = {"temperature": "loss_temperature"} | {
    name: name for name in ("beta", "token_clip", "entry_clip", "vocab_size", "pmi_beta", "pmi_clip")
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PurifiedOPSDConfig(DistillationConfig):
    """``trl.DistillationConfig`` (generation, vLLM, logging, all of ``TrainingArguments``) and the options below.

    Defaults that differ from TRL's, after arXiv 2607.02234: beta 0.5, learning_rate 5e-6, max_completion_length 1024.
    ``temperature`` is that of sampling; the loss has its own in ``loss_temperature``. Every option is checked here.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *DistillationConfig._VALID_DICT_FIELDS,
        "teacher_chat_template_kwargs",
        "reference_chat_template_kwargs",
        "loss_kwargs",
    ]

    beta: float = _option(0.5, "JSD coefficient: 0 is forward KL, 0.5 the symmetric JSD, 1 reverse KL.")
    learning_rate: float = _option(5e-6, "The initial learning rate for AdamW.")
    max_completion_length: int | None = _option(1024, "Maximum number of tokens to generate per completion.")

    loss_target: Literal["purified", "opsd"] = _option(
        "purified", "'purified' subtracts the reference-only teacher; 'opsd' distils the teacher itself."
    )
    pmi_beta: float = _option(1.0, "Strength of the purified signal: softmax(log base + signal / pmi_beta).")
    pmi_clip: float | None = _option(10.0, "Soft clip c of the signal, c * tanh(signal / c). None: no clip.")
    entry_clip: float | None = _option(None, "Cap on each vocabulary entry's contribution (OPSD's stabiliser).")
    token_clip: float | None = _option(None, "Cap on each token's loss.")
    loss_temperature: float | None = _option(None, "Divides all logits in the loss. None: `temperature`, as in TRL.")
    vocab_size: int | None = _option(
        None, "Leading rows of the head in use (such as len(tokenizer)); its padding rows then count nowhere."
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further fields of popsd.PurifiedConfig, such as exact_difference."}
    )
    skip_first_tokens: int = _option(0, "Leave the first tokens of every completion out of the loss.")
    impl: str = _option("auto", "Who computes the loss: 'auto', 'triton' or 'torch'.")
    strategy: str = _option("chunked", "How logits come and go: 'chunked', 'single_read' or 'streaming'.")
    workspace_mib: float | None = _option(None, "Memory for logits in the loss. None: 96 MiB on CPU, 2 GiB on a GPU.")

    question_template: str = _option(ContextConfig.question_template, "The student's prompt; holds {question}.")
    teacher_template: str = _option(ContextConfig.teacher_template, "Holds {question} and {solution}.")
    reference_template: str = _option(ContextConfig.reference_template, "Holds {solution} and never the question.")
    teacher_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "`chat_template_kwargs` of the teacher, such as enable_thinking. None: the student's."},
    )
    reference_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "`chat_template_kwargs` of the reference-only teacher. None: the teacher's."},
    )
    max_prompt_length: int | None = _option(None, "Longest prompt in tokens, in any context.")
    on_overflow: Literal["error", "truncate", "drop"] = _option(
        "error", "A prompt too long: 'error'; 'truncate' cuts the solution, never the question; 'drop' the problem."
    )

    frozen_weights: Literal["initial", "ema"] = _option(
        "initial", "'initial': adapter off, or a copy under full fine-tuning; 'ema': a moving average of the student."
    )
    ema_decay: float = _option(0.999, "average = decay * average + (1 - decay) * student, per optimiser step.")
    batched_frozen: bool = _option(False, "Run the frozen contexts as one batch; pays where they are equally long.")
    frozen_batch_size: int | None = _option(None, "Rows per frozen forward. None: all at once.")

    diagnostics_steps: int = _option(10, "Log the decomposition of the teacher's signal every so many steps; 0 never.")
    markers: list[str] = field(
        default_factory=lambda: list(DEFAULT_MARKERS),
        metadata={"help": "Epistemic markers counted in the completions."},
    )
    plot_metrics: bool = _option(True, "Write metrics.png to output_dir at the end of training.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("skip_first_tokens", 0), ("diagnostics_steps", 0), ("frozen_batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}; got {value}.")
        if not self.max_completion_length or self.max_completion_length <= self.skip_first_tokens:
            raise ValueError(
                f"max_completion_length: expected more than skip_first_tokens ({self.skip_first_tokens}); got "
                f"{self.max_completion_length}. No token would be left for the loss."
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
        self.loss_function()
        self.context_config()
        self.epistemic_markers()

    def loss_function(self) -> PurifiedOPSDLoss:
        """The loss that these options describe."""
        further: Any = self.loss_kwargs or {}
        known = {entry.name for entry in fields(PurifiedConfig)} - _OPTION_OF.keys()
        if not further.keys() <= known:
            raise ValueError(
                f"loss_kwargs: expected some of {sorted(known)}; got {sorted(further)}. Others have options of their own."
            )
        own = {name: getattr(self, option) for name, option in _OPTION_OF.items()}
        if own["temperature"] is None:
            own["temperature"] = self.temperature
        return PurifiedOPSDLoss(
            PurifiedConfig(**own, **further),
            loss_target=self.loss_target,
            impl=self.impl,
            strategy=self.strategy,
            workspace_mib=self.workspace_mib,
        )

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
            student_kwargs=kwargs[0],
            teacher_kwargs=kwargs[1],
            reference_kwargs=kwargs[2],
            max_prompt_tokens=self.max_prompt_length,
            on_overflow=self.on_overflow,
        )

    def epistemic_markers(self) -> EpistemicMarkers:
        return EpistemicMarkers(tuple(self.markers))
