"""The model card: TRL's, with the base model, how this run was trained, and the papers of its method."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from popsd_integrations.trl_trainer.compat import DistillationTrainer


class _Paper(NamedTuple):
    key: str
    title: str
    authors: str
    arxiv: str

    def bibtex(self) -> str:
        title = self.title.replace("β", r"$\beta$")
        lines = [f"title  = {{{{{title}}}}}", f"author = {{{self.authors}}}", "year   = 2026"]
        lines += [f"eprint = {{{self.arxiv}}}", "archivePrefix = {arXiv}"]
        lines += [f"url    = {{https://arxiv.org/abs/{self.arxiv}}}"]
        return f"@misc{{{self.key},\n    " + ",\n    ".join(lines) + "\n}"


_OPSD = _Paper(
    "zhao2026opsd",
    "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models",
    "Siyan Zhao and Zhihui Xie and Mengchen Liu and Jing Huang and Guan Pang and Feiyu Chen and Aditya Grover",
    "2601.18734",
)
_PURIFIED = _Paper(
    "shen2026purified",
    "Purified OPSD: On-Policy Self-Distillation Without Losing How to Think",
    "Zhanming Shen and Jintao Tong and Shaotian Yan and Chen Shen and Hao Chen and Wentao Ye and "
    "Xiaomeng Hu and Rui Miao and Haobo Wang and Junbo Zhao and Gang Chen and Jieping Ye",
    "2607.02234",
)
_BETA = _Paper(
    "xu2026beta",
    "β-OPSD: Deriving with Policy Optimization, Training with Self-Distillation",
    "Jiawei Xu and Minghui Liu and Juzheng Zhang and Tom Goldstein and Furong Huang",
    "2607.28582",
)
_METHODS = {
    "purified": ("Purified OPSD", [_PURIFIED, _OPSD]),
    "opsd": ("OPSD", [_OPSD]),
    "beta_opsd": ("β-OPSD", [_BETA, _OPSD]),
}


def method(loss_target: str) -> tuple[str, dict[str, str]]:
    """What TRL calls ``_name`` and ``_paper`` of a trainer: the name of the method, and its paper with BibTeX.

    The first paper is the method's own; that of OPSD, and GKD's for the divergence, are cited with it. A target without a
    paper has these two alone.
    """
    name, papers = _METHODS.get(loss_target, (f"on-policy self-distillation towards {loss_target}", [_OPSD]))
    own = {"title": papers[0].title, "id": papers[0].arxiv} if loss_target in _METHODS else {}
    cited = [*(paper.bibtex() for paper in papers), DistillationTrainer._paper.get("citation", "").strip()]
    return name, own | {"citation": "\n\n".join(filter(None, cited))}


def complete(trainer: Any) -> None:
    """Add to the card that TRL has written what it does not know: the run's own base model, trained part and options."""
    path = Path(trainer.args.output_dir) / "README.md"
    base = trainer.model.config._name_or_path or "a model that was built in Python"
    text = path.read_text(encoding="utf-8")
    text = text.replace("[None](https://huggingface.co/None)", f"`{base}`")  # of a local model
    text = text.replace('model="None"', f'model="{trainer.args.output_dir}"')
    before, heading, after = text.partition("### Framework versions")
    path.write_text(f"{before.rstrip()}\n\n{_section(trainer, base)}\n{heading}{after}", encoding="utf-8")


def _section(trainer: Any, base: str) -> str:
    args, data = trainer.args, trainer.train_dataset
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    frozen = "another model's" if trainer._own_teacher else "the base model's"
    moving = ", as a moving average of the student's" if args.frozen_weights == "ema" else ""
    facts = {
        "base model": f"`{base}`, {str(trainer.model.dtype).removeprefix('torch.')}",
        "trained": _trained(trainer.model),
        "frozen weights (base, teacher, reference)": frozen + moving,
        "training data": f"{len(data):,} problems" if hasattr(data, "__len__") else "a stream",
        "steps": f"{trainer.state.global_step:,} of {trainer.state.max_steps:,}, {a_step} completions each",
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])
    options = {name: value for name, value in args.run_options().items() if value not in (None, {}, [])}
    listed = yaml.safe_dump(options, sort_keys=True, allow_unicode=True, width=120).strip()
    return f"### How it was trained\n\n{table}\n\nOptions of the method and the optimiser:\n\n```yaml\n{listed}\n```\n"


def _trained(model: Any) -> str:
    count = sum(getattr(x, "ds_numel", x.numel()) for x in model.parameters() if x.requires_grad)  # ZeRO-3 empties them
    adapters = getattr(model, "peft_config", {}).values()
    kinds = [
        f"{getattr(adapter.peft_type, 'value', adapter.peft_type)}, r = {getattr(adapter, 'r', '?')}, "
        f"alpha = {getattr(adapter, 'lora_alpha', '?')}, on {_targets(adapter)}"
        for adapter in adapters
    ]
    return f"{'; '.join(kinds) or 'all weights'} ({count:,} parameters)"


def _targets(adapter: Any) -> str:
    targets = getattr(adapter, "target_modules", None) or ()
    return targets if isinstance(targets, str) else ", ".join(sorted(targets))
