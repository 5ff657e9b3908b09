"""The miniature through the TRL trainer: OPSD collapses and the purified target does not, as with the plain loop."""

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl_helpers import EOS, PAD

from popsd_integrations.miniature.evaluate import evaluate
from popsd_integrations.miniature.sampler import sample
from popsd_integrations.miniature.task import MAX_NEW_TOKENS, MINIATURE_CONTEXTS, draw_puzzles
from popsd_integrations.miniature.tokenizer import build_tokenizer
from popsd_integrations.miniature.warmup import WarmupConfig, warm_up
from popsd_integrations.trl_trainer import PurifiedOPSDConfig, PurifiedOPSDTrainer

STEPS, BATCH = 50, 64


class FastTrainer(PurifiedOPSDTrainer):
    """Samples with the miniature's generator, which lets finished rows go: half the time of ``generate``."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        options = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 1.0, "eos_token_id": [EOS], "pad_token_id": PAD}
        return sample(self.model, prompt_ids, **options)


@pytest.mark.slow
def test_opsd_collapses_and_purified_does_not(tmp_path):
    torch.set_num_threads(1)
    puzzles = draw_puzzles(STEPS * BATCH, "train", seed=0)
    rows = [{"prompt": puzzle.problem.question, "solution": puzzle.problem.solution} for puzzle in puzzles]
    test = draw_puzzles(384, "test", seed=0)
    scores = {"base": evaluate(warm_up(WarmupConfig(), tmp_path / "cache"), test)}
    for target in ("opsd", "purified"):
        trainer = FastTrainer(
            model=warm_up(WarmupConfig(), tmp_path / "cache"),
            args=PurifiedOPSDConfig(
                output_dir=str(tmp_path / target),
                loss_target=target,
                question_template=MINIATURE_CONTEXTS.question_template,
                teacher_template=MINIATURE_CONTEXTS.teacher_template,
                reference_template=MINIATURE_CONTEXTS.reference_template,
                per_device_train_batch_size=BATCH,
                max_steps=STEPS,
                max_completion_length=MAX_NEW_TOKENS,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=False,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=build_tokenizer(),
        )
        trainer.train()
        scores[target] = evaluate(trainer.model, test)
        markers = [row["markers/per_completion"] for row in trainer.state.log_history if "loss" in row]
        assert len(markers) == STEPS // 10
    assert scores["opsd"].accuracy < scores["base"].accuracy - 0.08, scores
    assert scores["purified"].accuracy > scores["opsd"].accuracy + 0.08, scores
    assert scores["purified"].markers > 2 * scores["opsd"].markers, scores
    print({name: tuple(round(x, 3) for x in score) for name, score in scores.items()})
