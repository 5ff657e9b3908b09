"""A tiny student, data and watched trainers for ms-swift, in an environment that has it: docs/ms_swift.md."""

import torch
from byte_models import byte_tokenizer, save
from swift.pipelines import rlhf_main
from transformers import TrainerCallback

from popsd_integrations.ms_swift import options
from popsd_integrations.ms_swift.trainer import PurifiedGKDTrainer

ROWS = [{"messages": [{"role": "user", "content": f"{n} + 2?"}], "solution": f"It is {n + 2}."} for n in range(8)]


def files(folder):
    """Write model, tokenizer and data; returns the options that name them."""
    path, data = save(folder, ROWS)
    return {
        "rlhf_type": "gkd",
        "model": path,
        "teacher_model": path,
        "model_type": "qwen3",
        "teacher_model_type": "qwen3",
        "template": "qwen3",
        "dataset": data,
        "remove_unused_columns": "false",
        "lmbda": "1",
        "temperature": "1",
        "max_completion_length": "6",
        "torch_dtype": "float32",
        "report_to": "none",
        "logging_steps": "1",
        "save_strategy": "no",
        "add_version": "false",
        "use_hf": "true",
    }


def command(given):
    return [part for name, value in given.items() for part in (f"--{name}", *value.split())]


class Steps(TrainerCallback):
    """The trained parameters at the beginning of each step, and their gradients at its end."""

    def __init__(self):
        self.before, self.gradients = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class Watched(PurifiedGKDTrainer):
    """Keeps the rows that each optimiser step was trained on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Watched.last, self.rows, self.steps = self, [], Steps()
        self.add_callback(self.steps)

    def _prepare_batch_inputs(self, samples):
        if self.model.training:
            self.rows.append([(x.messages[0]["content"], list(x.response_token_ids)) for x in samples])
        return super()._prepare_batch_inputs(samples)


def answer(question):
    """By the question alone, one to four tokens of which the last ends; one question gets no answer at all."""
    digit = int(question[0])
    return [] if digit == 3 else [*[40 + digit, 50, 60][: digit % 4], byte_tokenizer().eos_token_id]


class Fixed(Watched):
    """Does not sample."""

    def _generate_completions(self, samples):
        for sample in self._preprocess_inputs(samples):
            sample.response_token_ids = answer(sample.messages[-1]["content"])
            sample.messages.append({"role": "assistant", "content": ""})
            sample.add_eos = False
        return samples


class Moving(Fixed):
    """Writes to a frozen weight."""

    def compute_loss(self, *args, **kwargs):
        with torch.no_grad():
            self._frozen_source().model.get_input_embeddings().weight[0, 0] += 1
        return super().compute_loss(*args, **kwargs)


def plugin(folder, trainer, choice=""):
    """Write a plugin that chooses ``choice`` and trains with a class of this file; returns the options that name it."""
    folder.mkdir(exist_ok=True)
    file = folder / "plugin.py"
    file.write_text(
        f"from popsd_integrations.ms_swift import use\nuse({choice})\n"
        "from swift.trainers import TrainerFactory\n"
        f"TrainerFactory.TRAINER_MAPPING['gkd'] = 'swift_helpers.{trainer.__name__}'\n",
        encoding="utf-8",
    )
    return {"external_plugins": str(file), "output_dir": str(folder / "run")}


def run(folder, monkeypatch, given, trainer=Watched, choice=""):
    """``swift rlhf`` in this process; returns the trainer."""
    monkeypatch.setattr(options, "_chosen", [])
    rlhf_main(command(given | plugin(folder, trainer, choice)))
    return trainer.last
