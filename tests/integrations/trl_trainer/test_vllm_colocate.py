"""The trainer beside a real vLLM, in an environment that has it: docs/vllm.md says how to make one. On a CPU too."""

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3Config
from trl_helpers import EOS, LORA, PAD, ROWS, config

from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer
from popsd_integrations.trl_trainer import PurifiedOPSDTrainer


@pytest.fixture
def on_cpu(monkeypatch):
    """On a CPU vLLM packs a layer's weights when they are loaded, and cannot load others after that."""
    from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

    def unpacked(layer, remove_weight=False):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    for module in (linear, utils, vocab_parallel_embedding):
        if hasattr(module, "dispatch_cpu_unquantized_gemm"):
            monkeypatch.setattr(module, "dispatch_cpu_unquantized_gemm", unpacked)


class Greedy(PurifiedOPSDTrainer):
    """Samples greedily, and notes how far each token's logit is below the largest of the student itself."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        generation = self.vllm_generation
        generation.generation_kwargs = generation.generation_kwargs | {"temperature": 0.0}
        completions = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with torch.no_grad():
            for prompt, ids in zip(prompt_ids, completions, strict=True):
                logits = self.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
                largest = logits.max(dim=-1).values
                below = largest - logits.gather(1, torch.tensor(list(ids))[:, None])[:, 0]
                self.below = [*getattr(self, "below", []), *(below / largest.abs().clamp(min=1)).tolist()]
        return completions


@pytest.mark.slow
def test_vllm_samples_from_the_student_and_the_base_stays(on_cpu, tmp_path):
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # vLLM has no kernel for 16 on a CPU
        initializer_range=0.2,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(shape)
    model.generation_config.eos_token_id = EOS
    for part in (model.bfloat16(), build_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    trainer = Greedy(
        model=str(tmp_path / "model"),
        args=config(
            tmp_path / "run",
            use_vllm=True,
            vllm_max_model_length=64,
            max_steps=20,
            model_init_kwargs={"dtype": torch.bfloat16},
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=build_tokenizer(),
        peft_config=LORA,
    )
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    # bfloat16 has 8 bits, and vLLM multiplies by the merged weights where the student adds the adapter's part.
    assert len(trainer.below) > 100 and max(trainer.below) < 2**-5
    assert sum(x == 0 for x in trainer.below) > 0.9 * len(trainer.below)
    assert any(row.get("vllm_rounding", 0) > 0 for row in trainer.state.log_history)
