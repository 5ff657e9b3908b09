"""TRL's own GKDTrainer and DistillationTrainer, tiny, on completions that are given."""

import warnings

import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer
from trl_helpers import PAD, ROWS, tiny

from popsd_integrations.miniature.tokenizer import build_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDConfig, GKDTrainer

QUIET = {
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
QUIET |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "gradient_checkpointing": False, "beta": 0.3}


def collate(rows):
    """Prompts and completions of several lengths, padded on the left as TRL's own collator pads; one has no completion."""
    ids, attention, labels = [], [], []
    longest = 3 + max(row["length"] for row in rows)
    for row in rows:
        sequence = [11, row["a"], 13, *([14, 3, row["a"]] * row["length"])[: row["length"]]]
        pad = longest - len(sequence)
        ids.append([PAD] * pad + sequence)
        attention.append([0] * pad + [1] * len(sequence))
        labels.append([-100] * (pad + 3) + sequence[3:])
    prompts = [[11, row["a"], 13] for row in rows]
    names = ("input_ids", "attention_mask", "labels", "prompts", "prompt_attention_mask")
    return dict(zip(names, map(torch.tensor, (ids, attention, labels, prompts, [[1] * 3] * len(rows))), strict=True))


def gkd(
    folder,
    cls=GKDTrainer,
    student=None,
    teacher=None,
    peft_config=None,
    length=None,
    callbacks=(),
    metrics=None,
    **options,
):
    """length: of all completions; None: from none to four tokens."""
    data = Dataset.from_list([{"a": i, "length": length or i % 5, "messages": []} for i in range(8)])
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "lmbda": 0.0}
    return cls(
        student or tiny(),
        teacher or tiny(seed=3, tied=False),
        GKDConfig(output_dir=str(folder), **QUIET | defaults | options),
        data_collator=collate,
        train_dataset=data,
        eval_dataset=data,
        processing_class=build_tokenizer(),
        peft_config=peft_config,
        callbacks=list(callbacks),
        compute_metrics=metrics,
    )


def distillation(folder, student, teacher, completions, callbacks=(), **options):
    """TRL's DistillationTrainer on completions that a function gives for prompts."""

    class Fixed(DistillationTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            return completions(self.model, prompt_ids)

    return Fixed(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir=str(folder), **QUIET | {"max_completion_length": 17, "max_steps": 1} | options
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=build_tokenizer(),
        callbacks=list(callbacks),
    )
