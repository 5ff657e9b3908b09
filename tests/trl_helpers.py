"""A tiny student, data and completions for the trainer's tests: everything on CPU, nothing from the Hub."""

import inspect
import json

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny_models import tiny_qwen3
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer
from popsd_integrations.trl_trainer import PurifiedOPSDConfig, PurifiedOPSDTrainer

EOS, PAD = VOCABULARY.index("EOS"), VOCABULARY.index("PAD")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ 'Q ' if m.role == 'user' else 'SEP ' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}A{% if enable_thinking %} CHECK{% endif %}{% endif %}"
)
ROWS = [
    {"prompt": f"Q {a} {b} A", "privileged_context": f"{a} WAIT {b} OK" if b else f"{b} {a}"}
    for a in range(4)
    for b in range(2)
]
PROBLEMS = [{"problem": f"{a} {b}", "answer": f"{a} WAIT {b}"} for a in range(4) for b in range(2)]
TEMPLATES = {
    "teacher_template": "{question} R {solution} OK A",
    "reference_template": "R {solution} OK A",
}
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def tiny(seed=0, tied=True, **options):
    special = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": None}
    return tiny_qwen3(len(VOCABULARY), seed, tie_word_embeddings=tied, initializer_range=0.2, **special, **options)


def files(folder, dataset):
    """Write a tiny model and its tokenizer to ``folder / "model"`` and problems to the file ``folder / dataset``; returns the
    options of ``popsd train`` that name them.
    """
    tokenizer, model = build_tokenizer(), tiny()
    tokenizer.chat_template = CHAT_TEMPLATE
    model.generation_config.eos_token_id = EOS
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "model")
    (folder / dataset).parent.mkdir(exist_ok=True)
    (folder / dataset).write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / dataset),
        "prompt_column": "problem",
        "solution_column": "answer",
        "text_as_conversation": True,
        "per_device_train_batch_size": 4,
        "max_completion_length": 5,
        "report_to": "none",
        "bf16": False,
        **TEMPLATES,
    }


def config(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_completion_length": 6,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "diagnostics_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "plot_metrics": False,
        "beta": 0.3,
    }
    return PurifiedOPSDConfig(output_dir=str(folder), **(defaults | TEMPLATES | options))


def trl_loss(*arguments, **options):
    """TRL's own two-distribution loss; 1.12 took a chunk size, 1.15 needs a GPU where Triton is installed."""
    takes_chunk_size = "chunk_size" in inspect.signature(_chunked_divergence_loss).parameters
    try:
        return _chunked_divergence_loss(*arguments, *((2,) if takes_chunk_size else ()), **options)
    except RuntimeError as error:
        if "active drivers" not in str(error):
            raise
        pytest.skip("this TRL's own loss does not run on CPU beside Triton")


def completion_of(prompt_ids):
    """A completion that depends on the question alone, of one to four tokens."""
    return [prompt_ids[1] % 10, 14, 3, EOS][3 - prompt_ids[1] % 4 :]


def begins(completion, answer):
    """A scorer."""
    return completion.startswith(answer)


class FixedTrainer(PurifiedOPSDTrainer):
    """Generates ``completion_of`` instead of sampling, so that runs split otherwise see the same tokens."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return [completion_of(ids) for ids in prompt_ids]


def build(
    folder, model=None, rows=ROWS, cls=FixedTrainer, lora=False, tokenizer=None, eval_rows=None, teacher=None, **options
):
    return cls(
        model=model or tiny(),
        teacher_model=teacher,
        args=config(folder, **options),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=_datasets(eval_rows),
        processing_class=tokenizer or build_tokenizer(),
        peft_config=LORA if lora else None,
    )


def _datasets(rows):
    if isinstance(rows, dict):
        return {name: _datasets(part) for name, part in rows.items()}
    return None if rows is None else Dataset.from_list(rows)


def logs(trainer, key="loss"):
    return [row for row in trainer.state.log_history if key in row]
