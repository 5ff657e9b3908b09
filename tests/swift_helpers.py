"""A tiny student, data and watched trainers for ms-swift, in an environment that has it: docs/ms_swift.md."""

import torch
from byte_models import save
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


class Fixed(Watched):
    """Answers by the question alone, in one to four tokens the last of which ends; one question gets no answer at all."""

    def _generate_completions(self, samples):
        for sample in self._preprocess_inputs(samples):
            digit = int(sample.messages[-1]["content"][0])
            sample.response_token_ids = [*[40 + digit, 50, 60][: digit % 4], self.template.tokenizer.eos_token_id]
            if digit == 3:
                sample.response_token_ids = []
            sample.messages.append({"role": "assistant", "content": ""})
            sample.add_eos = False
        return samples


class Moving(Fixed):
    """Writes to a frozen weight."""

    def compute_loss(self, *args, **kwargs):
        with torch.no_grad():
            self._frozen_source().model.get_input_embeddings().weight[0, 0] += 1
        return super().compute_loss(*args, **kwargs)


def run(folder, monkeypatch, given, trainer=Watched, choice="", **changes):
    """``swift rlhf`` in this process, by a plugin that chooses ``choice``; returns the trainer."""
    monkeypatch.setattr(options, "_chosen", [])
    folder.mkdir(exist_ok=True)
    plugin = folder / "plugin.py"
    plugin.write_text(
        f"from popsd_integrations.ms_swift import use\nuse({choice})\n"
        "from swift.trainers import TrainerFactory\n"
        f"TrainerFactory.TRAINER_MAPPING['gkd'] = 'swift_helpers.{trainer.__name__}'\n",
        encoding="utf-8",
    )
    given = given | {"external_plugins": str(plugin), "output_dir": str(folder / "run")} | changes
    rlhf_main(command(given))
    return trainer.last
