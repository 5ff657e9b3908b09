"""Architectures that differ in what padding does to them and in how their head is read; all of them are in the slow test."""

from pathlib import Path

import pytest

pytest.importorskip("trl")

import architectures
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ALL

from popsd_integrations.trl_trainer import frozen

PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"


@pytest.mark.parametrize(
    ("name", "outcome", "detail"),
    [
        ("rwkv", "right", "loss within"),  # its state runs over padding on the left
        (
            "roberta",
            "refused",
            "model: expected model.generate to sample by the model's own logits",
        ),  # positions from 2
        ("cpmant", "refused", "model: expected padding that CpmAntForCausalLM does not see"),
    ],
)
def test_the_trainers_loss_is_that_of_the_models_own_logits(tmp_path, name, outcome, detail):
    result = architectures.judge(name, str(tmp_path))
    assert result.outcome == outcome, result
    assert detail in result.detail


def test_a_fault_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "check_model", lambda *arguments, **options: "left")
    result = architectures.judge("rwkv", str(tmp_path))
    assert result.outcome == "silent" and "on the left" in result.detail


def test_the_page_names_every_architecture_and_no_silent_one():
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {architectures.transformers.__version__} " not in page:
        pytest.skip("the page was made with another transformers")
    assert not [name for name in ALL if f"| {name} |" not in page]
    assert "## Silently wrong" not in page


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_no_architecture_is_silently_wrong(tmp_path, name):
    with architectures.limited(120):
        assert architectures.judge(name, str(tmp_path)).outcome != "silent"
