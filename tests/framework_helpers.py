"""Data, a trainer without sampling and two steps of it, for the tests of Unsloth and Axolotl."""

import torch
from byte_models import byte_tokenizer
from datasets import Dataset
from transformers import TrainerCallback

from popsd_integrations.huggingface import ContextBuilder, ContextConfig, Problem
from popsd_integrations.trl_trainer import PurifiedOPSDConfig, PurifiedOPSDTrainer

ROWS = [{"prompt": [{"role": "user", "content": f"{n} + 2?"}], "solution": f"It is {n + 2}."} for n in range(4)]
BETA = 0.3


def completion_of(question):
    """One to four tokens, by the first digit of the question."""
    tokenizer = byte_tokenizer()
    digit = int(next(x for x in tokenizer.decode(question) if x.isdigit()))
    return [40 + digit, 50, 60, tokenizer.eos_token_id][digit % 4 :]


def in_contexts(rows=ROWS):
    """(question, teacher, reference, completion) of the rows, as the oracle takes them."""
    builder = ContextBuilder(byte_tokenizer(), ContextConfig())
    built = builder.build_all([Problem(row["prompt"], row["solution"]) for row in rows])
    return [(*prompts, completion_of(prompts.question)) for prompts in built]


class Gradients(TrainerCallback):
    """Those of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class FixedTrainer(PurifiedOPSDTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return [completion_of(ids) for ids in prompt_ids]


def train(folder, model):
    """Two steps; returns the trainer and the gradients of each."""
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 1e-2}
    given |= {"max_completion_length": 6, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "beta": BETA}
    given |= {"bf16": False, "use_cpu": True, "max_grad_norm": 1e9, "shuffle_dataset": False, "plot_metrics": False}
    gradients = Gradients()
    trainer = FixedTrainer(
        model=model,
        args=PurifiedOPSDConfig(str(folder), lr_scheduler_type="constant", disable_tqdm=True, **given),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=byte_tokenizer(),
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, gradients.steps


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])
