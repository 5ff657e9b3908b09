"""The options of ``popsd train`` that are popsd's own, with their help: the one place of their names, defaults and texts.

Nothing is imported that takes time, so that ``popsd train --help`` and any usage error answer at once. `PurifiedOPSDConfig` and
`TrainArguments` inherit these fields beside TRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from popsd_integrations.commandline.kinds import Option, option

LOSS_TARGETS = ("purified", "opsd", "beta_opsd", "contrastive_hints", "arithmetic_mix", "alpha_mix")
"""The names that popsd.presets registers; importing it takes seconds."""
SOLUTION_COLUMNS = ("privileged_context", "solution")
WRONG_COLUMN, ANSWER_COLUMN = "wrong_privileged_context", "answer"


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _template(name: str) -> Callable[[], str]:
    """The default of `ContextConfig`, whose package takes a second to import."""

    def default() -> str:
        from popsd_integrations.huggingface.prompts import ContextConfig

        return str(getattr(ContextConfig, name))

    return default


def _markers() -> list[str]:
    from popsd.markers import DEFAULT_MARKERS

    return list(DEFAULT_MARKERS)


@dataclass
class DataOptions:
    """Where the data is, and what to do with it."""

    prompt_column: str = _option("prompt", "Column with the questions.")
    solution_column: str | None = _option(
        None, f"Column with the reference solutions. None: one of {SOLUTION_COLUMNS}."
    )
    wrong_solution_column: str = _option(WRONG_COLUMN, "Column with wrong solutions, for contrastive_hints.")
    answer_column: str | None = _option(None, f"Column with the answers, for eval_scorer. None: {ANSWER_COLUMN}.")
    text_as_conversation: bool = _option(
        False, "Write questions that are text as a user's message, in the chat template."
    )
    dry_run: bool = _option(
        False,
        "Check data, prompts, lengths, steps and memory, without the weights, and stop.",
    )
    device: str | None = _option(
        None,
        "With dry_run: the device to plan the memory for, such as h100 or 24GiB. None: this machine's GPU, if it has one.",
    )


@dataclass
class MethodOptions:
    """The method. The first three are TRL's, with defaults after arXiv 2607.02234."""

    beta: float = _option(0.5, "JSD coefficient: 0 is forward KL, 0.5 the symmetric JSD, 1 reverse KL.")
    learning_rate: float = _option(5e-6, "The initial learning rate for AdamW.")
    max_completion_length: int | None = _option(1024, "Maximum number of tokens to generate per completion.")
    num_generations: int = _option(
        1,
        "Completions of each prompt. The rows of a step (per_device_train_batch_size x gradient_accumulation_steps x "
        "processes) are completions, so a step takes so many times fewer prompts. In evaluation there is one of each.",
    )

    loss_target: str = _option(
        "purified",
        f"{', '.join(LOSS_TARGETS)}, module:name. 'purified' subtracts the reference-only teacher; 'opsd' distils the "
        "teacher itself; 'beta_opsd' and 'alpha_mix' mix the logits of base and teacher, 'arithmetic_mix' their "
        "probabilities; 'contrastive_hints' subtracts a teacher with the hint in wrong_privileged_context. 'module:name' "
        "imports the module, for a target of your own; in Python a name given to popsd.register_target will do.",
    )
    target_parameters: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Numbers of the target by name. Such as alpha of alpha_mix and share of arithmetic_mix."},
    )
    pmi_beta: float | None = _option(
        None,
        "Divides the signal in softmax(log base + signal / pmi_beta). At 1 the target of beta_opsd is the teacher. None: 1.",
    )
    pmi_clip: float | str | None = _option(
        "auto",
        "Soft clip c of the signal, c * tanh(signal / c). None: no clip. 'auto': 10 for purified, else no clip.",
    )
    entry_clip: float | None = _option(None, "Cap on each vocabulary entry's contribution (OPSD's stabiliser).")
    token_clip: float | None = _option(None, "Cap on each token's loss.")
    loss_temperature: float | None = _option(None, "Divides all logits in the loss. None: `temperature`, as in TRL.")
    vocab_size: int | None = _option(
        None,
        "Leading rows of the head in use (such as len(tokenizer)). Its padding rows then take no part in the loss.",
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further fields of popsd.PurifiedConfig, such as exact_difference."}
    )
    plausibility: float | None = _option(
        None, "Entries whose base probability is below this share of the largest keep the base's."
    )
    tail_floor: float | None = _option(
        None, "Where both teachers are below this probability, the signal is at most tail_cap."
    )
    tail_cap: float | None = _option(None, "Largest signal in nats where tail_floor applies.")
    skip_first_tokens: int = _option(0, "Leave so many first tokens of every completion out of the loss.")
    masks: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Which tokens the loss keeps: fields of popsd.MaskConfig. Such as top_target_entropy. "
            "Logged as masks/kept_share. A top share is taken of each process's micro-batch."
        },
    )
    protect_markers: bool = _option(
        False,
        "Leave sampled tokens that are one of `markers` out of the loss. Adds their ids to protect_ids of `masks`.",
    )
    position_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Weights that rise along a completion: arguments of popsd.presets.position_weights. Such as "
            "first. The loss still divides by the number of tokens."
        },
    )
    impl: Literal["auto", "triton", "torch"] = _option("auto", "Backend of the loss.")
    strategy: Literal["chunked", "single_read", "streaming"] = _option("chunked", "How logits are computed and read.")
    workspace_mib: float | None = _option(None, "Memory for logits in the loss. None: 72 MiB on CPU, 2 GiB on a GPU.")

    question_template: str = field(
        default_factory=_template("question_template"), metadata={"help": "The student's prompt; holds {question}."}
    )
    teacher_template: str = field(
        default_factory=_template("teacher_template"),
        metadata={"help": "The teachers' prompts. The teacher's holds {question} and {solution}."},
    )
    reference_template: str = field(
        default_factory=_template("reference_template"), metadata={"help": "Holds {solution} and never the question."}
    )
    reference: Literal["solution_only", "other_problem", "none"] | None = _option(
        None,
        "What the reference-only teacher reads. 'solution_only'; 'other_problem', the question with another problem's "
        "solution; 'none', the question alone. None: 'solution_only', and the wrong hint for contrastive_hints.",
    )
    teacher_reference: Literal["solution", "other_problem", "none"] = _option(
        "solution",
        "Which solution the teacher is given. 'solution'; as controls 'other_problem', another problem's, or 'none'.",
    )
    teacher_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "The teachers' chat_template_kwargs. Such as enable_thinking. None: the student's."},
    )
    reference_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "`chat_template_kwargs` of the reference-only teacher. None: the teacher's."},
    )
    max_prompt_length: int | None = _option(None, "Longest prompt in tokens, in any context.")
    on_overflow: Literal["error", "truncate", "drop"] = _option(
        "error",
        "What to do with a prompt too long. 'truncate' cuts the solution, never the question; 'drop' the problem.",
    )

    frozen_weights: Literal["initial", "ema"] = _option(
        "initial",
        "Weights of base and teachers. 'initial': adapter off, or a copy under full fine-tuning; 'ema': a moving average of "
        "the student.",
    )
    ema_decay: float = _option(0.999, "In average = decay * average + (1 - decay) * student, per optimiser step.")
    batched_frozen: bool = _option(
        False, "Run the frozen contexts as one batch. Faster only where they are equally long."
    )
    padding_free: bool | None = _option(
        None,
        "True: run rows end to end, without padding; refused where a model's rows would see each other. False: in padded "
        "batches. None: end to end where attention is told where rows end (flash, flex), else rows of like length together.",
    )
    frozen_batch_size: int | None = _option(None, "Rows per frozen forward. None: all at once.")

    diagnostics_steps: int = _option(10, "Log the decomposition of the teacher's signal every so many steps; 0 never.")
    markers: list[str] = field(
        default_factory=_markers,
        metadata={"help": "Epistemic markers counted in the completions."},
    )
    eval_scorer: str | None = _option(
        None,
        "Judge the completions of evaluations: math (math-verify) or module:function. Against the column 'answer', as popsd "
        "evaluate does. Logged as eval_accuracy (sampled as in training) and eval_accuracy_greedy.",
    )
    eval_problems: int | None = _option(
        None, "Evaluate on so many first rows of each evaluation dataset. None: on all."
    )
    eval_max_completion_length: int | None = _option(
        None,
        "Longest judged completion; eval_loss reads its first max_completion_length tokens. None: as in training.",
    )
    plot_metrics: bool = _option(True, "Write metrics.png to output_dir at the end of training.")


GROUPS = {
    "Data": "prompt_column solution_column wrong_solution_column answer_column text_as_conversation dry_run device",
    "Target": "loss_target target_parameters pmi_beta pmi_clip plausibility tail_floor+tail_cap",
    "Loss": "beta entry_clip token_clip loss_temperature vocab_size skip_first_tokens masks protect_markers position_weights "
    "loss_kwargs impl strategy workspace_mib",
    "Prompts and completions": "question_template teacher_template+reference_template reference teacher_reference "
    "teacher_chat_template_kwargs+reference_chat_template_kwargs max_prompt_length on_overflow max_completion_length",
    "Training": "learning_rate frozen_weights ema_decay batched_frozen frozen_batch_size",
    "Evaluation and logs": "eval_scorer eval_problems eval_max_completion_length diagnostics_steps markers plot_metrics",
}
"""The order of the short help. Two names joined by + share a line; what stands in no group comes last."""


def own_options() -> dict[str, Option]:
    """All of them, by name."""
    both = (*fields(DataOptions), *fields(MethodOptions))
    written = DataOptions.__annotations__ | MethodOptions.__annotations__  # transformers' parser changes a field's type
    return {entry.name: option(entry.name, written[entry.name], entry.default, entry.metadata) for entry in both}
