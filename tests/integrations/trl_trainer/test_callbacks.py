import math
import sys

import pytest
import torch

pytest.importorskip("trl")

from transformers import TrainerCallback
from trl_helpers import build, logs

from popsd_integrations.huggingface.frozen import EMA


@pytest.mark.parametrize("lora", [False, True])
def test_the_moving_average_follows_the_student(tmp_path, lora):
    trainer = build(tmp_path, lora=lora, frozen_weights="ema", ema_decay=0.75, max_steps=3)
    expected, trained = {}, [n for n, p in trainer.model.named_parameters() if p.requires_grad]

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for name, p in model.named_parameters():
                if name in trained:
                    expected[name] = 0.75 * expected[name] + 0.25 * p.detach()

    expected.update({n: p.detach().clone() for n, p in trainer.model.named_parameters() if n in trained})
    trainer.add_callback(Follow())
    trainer.train()
    assert isinstance(trainer._ema, EMA) and trainer.teacher_model is None
    for name, average in trainer._ema.state_dict().items():
        torch.testing.assert_close(average, expected[name])


def test_without_matplotlib_there_is_no_plot_and_training_ends_well(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    build(tmp_path, plot_metrics=True).train()
    assert "No metrics.png: matplotlib is missing" in caplog.text
    assert not (tmp_path / "metrics.png").exists()


def test_metrics_plot_and_completions_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    trainer = build(tmp_path, plot_metrics=True, log_completions=True, max_steps=2, markers=["wait", "ok"])
    trainer.train()
    assert (tmp_path / "metrics.png").stat().st_size > 10_000
    assert len(list((tmp_path / "completions").glob("*.parquet"))) == 2
    row = logs(trainer)[0]
    assert row["markers/per_completion"] == row["markers/wait"] + row["markers/ok"]
    assert not any(math.isnan(value) for value in row.values() if isinstance(value, float))
