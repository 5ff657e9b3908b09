"""What a plugin file chooses, and which options of ms-swift go with it. Nothing here imports ms-swift before ``use``."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from packaging.version import Version

from popsd import Impl, MaskConfig, PurifiedOPSDLoss, Strategy
from popsd_integrations.huggingface.objective import loss_function, needed_contexts, target_config
from popsd_integrations.huggingface.prompts import ContextConfig

OLDEST, TOO_NEW = (4, 6), (4, 7)
"""Releases of ms-swift from the first one that was run to the first one that was not."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What ms-swift has no option for; the others are its own.

    loss_target, target_parameters: see ``huggingface.objective``. loss: fields of `popsd.PurifiedConfig` by name, but for
        ``beta``, which is ``--beta``, and ``temperature``. loss_temperature: divides the logits in the loss; None is
        ``--temperature``, as in ms-swift.
    contexts: how the prompts of teacher and reference are written from a column with solutions. What is about the student's
        prompt or about lengths is ms-swift's, and must be left at its default.
    masks: which completion tokens the loss keeps. diagnostics_steps: log Eq. 4 every so many steps, 0 never.
    frozen_batch_size: rows per frozen forward, None for all. impl, strategy, workspace_mib: see `popsd.linear_purified_jsd`.
    Raises ValueError and TypeError for what is out of range or would do nothing.
    """

    loss_target: str = "purified"
    target_parameters: Mapping[str, float] | None = None
    loss: Mapping[str, Any] = field(default_factory=dict)
    loss_temperature: float | None = None
    contexts: ContextConfig = field(default_factory=ContextConfig)
    masks: MaskConfig | None = None
    diagnostics_steps: int = 10
    frozen_batch_size: int | None = None
    impl: str = "auto"
    strategy: str = "chunked"
    workspace_mib: float | None = None

    def __post_init__(self) -> None:
        for name, option in (("beta", "--beta"), ("temperature", "--temperature, or loss_temperature")):
            if name in self.loss:
                raise ValueError(f"{name}: expected in swift's {option}; got {self.loss[name]!r} in the plugin.")
        for name, least in (("diagnostics_steps", 0), ("frozen_batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}; got {value}.")
        for name in _OF_SWIFT:
            value, default = getattr(self.contexts, name), getattr(ContextConfig(), name)
            if value != default:
                raise ValueError(f"contexts.{name}: expected {default!r}, since {_OF_SWIFT[name]}; got {value!r}.")
        if self.contexts.needs_other:
            raise ValueError(
                "contexts: expected no 'other_problem', which is drawn from the whole data; write a column."
            )
        Impl(self.impl), Strategy(self.strategy)
        self.loss_function()

    def loss_function(self, *, beta: float = 0.5, temperature: float = 1.0) -> PurifiedOPSDLoss:
        """The loss, with ms-swift's ``--beta`` and ``--temperature``. Raises ValueError for a temperature of 0."""
        tempered = temperature if self.loss_temperature is None else self.loss_temperature
        if not tempered > 0:
            raise ValueError(
                f"temperature: expected a positive number, which divides the logits of the loss; got {tempered}. To sample "
                "greedily set loss_temperature=1.0 in the plugin."
            )
        config = target_config(
            self.loss_target, self.target_parameters, beta=beta, temperature=tempered, **dict(self.loss)
        )
        names = ("masks", "impl", "strategy", "workspace_mib")
        return loss_function(self.loss_target, config, **{name: getattr(self, name) for name in names})

    @property
    def needs_reference(self) -> bool:
        """Whether a reference-only teacher is run, be it for Eq. 4 alone."""
        return "reference" in needed_contexts(self.loss_target, self.diagnostics_steps > 0)


_STUDENTS = "the student's prompt is ms-swift's (messages, --system, --enable_thinking)"
_LENGTHS = "ms-swift measures the student's prompt alone (--max_length)"
_OF_SWIFT = {"question_template": _STUDENTS, "system_prompt": _STUDENTS, "student_kwargs": _STUDENTS}
_OF_SWIFT |= {"max_prompt_length": _LENGTHS, "on_overflow": _LENGTHS}
_chosen: list[Options] = []


def use(loss_target: str = "purified", **options: Any) -> None:
    """Let ms-swift train towards ``loss_target``: what a file for ``--external_plugins`` calls.

    options: the fields of `Options`; any other name is a field of `popsd.PurifiedConfig`, such as pmi_beta and pmi_clip.
    Raises what `Options` raises, ImportError for an ms-swift that this was not tested with, and ValueError where another
    plugin has chosen otherwise.
    """
    own = {entry.name for entry in fields(Options)} - {"loss"}
    loss = {name: value for name, value in options.items() if name not in own}
    chosen = Options(loss_target=loss_target, loss=loss, **{name: x for name, x in options.items() if name in own})
    if _chosen and _chosen[0] != chosen:
        raise ValueError(
            f"external_plugins: expected one choice; got {_chosen[0]} and {chosen}. Pass one plugin of popsd."
        )
    require_supported()
    from swift.trainers import TrainerFactory

    trainer = f"{__package__}.trainer"
    TrainerFactory.TRAINER_MAPPING["gkd"] = f"{trainer}.PurifiedGKDTrainer"
    TrainerFactory.TRAINING_ARGS_MAPPING["gkd"] = f"{trainer}.PurifiedGKDConfig"
    _chosen[:] = [chosen]


def chosen() -> Options:
    """What the plugin chose."""
    return _chosen[0]


def require_supported() -> None:
    """Raise ImportError without ms-swift, and for one that this was not tested with."""
    needed = f"ms-swift>={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}.{TOO_NEW[1]}"
    try:
        version = importlib.metadata.version("ms-swift")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"popsd's plugin works with {needed}, and none is installed: pip install '{needed}'."
        ) from None
    if not OLDEST <= Version(version).release < TOO_NEW:
        raise ImportError(f"popsd's plugin works with {needed}, and {version} is installed: pip install '{needed}'.")


_EXACTLY = {
    "lmbda": (1, "The student learns on its own completions: pass --lmbda 1."),
    "sft_alpha": (0, "No cross-entropy is added to this loss."),
    "gkd_logits_topk": (None, "The whole vocabulary is compared, without holding the logits."),
    "use_liger_kernel": (False, "Liger's loss would take the place of popsd's."),
    "teacher_model_server": (
        None,
        "A server sends its top-k alone, for which docs/remote_teacher.md has a loss.",
    ),
    "offload_teacher_model": (
        False,
        "The teacher runs in each micro-batch. Train LoRA, which needs no copy.",
    ),
    "padding_free": (False, "Each of the contexts is padded by popsd."),
    "packing": (False, "Each of the contexts is padded by popsd."),
    "sequence_parallel_size": (1, "A context is not split."),
    "label_smoothing_factor": (0, "The loss compares distributions and has no labels."),
    "router_aux_loss_coef": (0, "The load-balancing loss of a mixture of experts is not added here."),
    "enable_dft_loss": (False, "It is another loss."),
    "enable_channel_loss": (False, "popsd's loss is logged as a whole."),
    "loss_type": (None, "The plugin's loss_target says what is trained towards."),
}
"""Options of ms-swift with the one value that is true of this loss."""


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for options of ms-swift that would do nothing, or that popsd's loss is wrong with.

    arguments: options by name. One that is not there counts as what it should be.
    """
    for name, (expected, remedy) in _EXACTLY.items():
        if (value := arguments.get(name, expected)) != expected:
            raise ValueError(f"{name}: expected {expected}; got {value!r}. {remedy}")
    model, teacher = arguments["model"], arguments["teacher_model"]
    if teacher is None:
        raise ValueError(
            "teacher_model: expected the model once more; got none, and then ms-swift's teacher is the student as it is at "
            f"each step, which moves. Pass --teacher_model {model}: under LoRA that is the adapter off, and costs nothing."
        )
    if teacher != model or arguments.get("teacher_adapters"):
        raise ValueError(
            f"teacher_model: expected the initial model, {model!r}, without adapters of its own; got {teacher!r} with "
            f"teacher_adapters {arguments.get('teacher_adapters')}. All frozen distributions are those that the student starts "
            "from."
        )
    lora = arguments.get("tuner_type") != "full"
    if lora and arguments.get("use_vllm"):
        raise ValueError(
            "use_vllm: expected False with an adapter; got True. ms-swift merges it into the base weights for vLLM and takes "
            "it out again, which moves teacher and reference. Sample without vLLM, or train with --tuner_type full."
        )
    steps, accumulated = arguments["steps_per_generation"], arguments["gradient_accumulation_steps"]
    if steps % accumulated:
        raise ValueError(
            f"steps_per_generation: expected a multiple of gradient_accumulation_steps ({accumulated}), so that the tokens of "
            f"an optimiser step are known when its first micro-batch is run; got {steps}."
        )
