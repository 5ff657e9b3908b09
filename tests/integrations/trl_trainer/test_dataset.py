"""What the trainer refuses of a dataset before training, by row, and which tokenizer it takes."""

import pytest

pytest.importorskip("trl")

from datasets import Dataset, DatasetDict
from peft import LoraConfig
from trl_helpers import CHAT_TEMPLATE, ROWS, FixedTrainer, build, config, logs, tiny

from popsd_integrations.huggingface.prompts import ContextBuilder
from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer
from popsd_integrations.trl_trainer.dataset import RowCheck, check_columns
from popsd_integrations.trl_trainer.frozen import prepare_student
from popsd_integrations.trl_trainer.trainer import PurifiedOPSDTrainer


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (ROWS, TypeError, r"train_dataset: expected a datasets\.Dataset .*; got list\. datasets\.Dataset\.from_list"),
        (DatasetDict(train=Dataset.from_list(ROWS)), TypeError, r"train_dataset: .*got DatasetDict\. .*pass one split"),
        (
            Dataset.from_list([{**row, "image": None} for row in ROWS]),
            ValueError,
            r"train_dataset: expected text alone; got the columns \['image'\]",
        ),
    ],
)
def test_what_is_no_dataset_of_text_is_refused_before_the_model_is_loaded(tmp_path, dataset, error, message):
    with pytest.raises(error, match=message):
        PurifiedOPSDTrainer("no/model", config(tmp_path), dataset)


POISON = {
    "None": (None, "question: expected text or a list of messages; got None"),
    "empty": ("", "question: expected non-empty text"),
    "long": ("Q " + "1 " * 50_000, "expected at most the model's 32768 positions; got 50005 tokens in teacher"),
    "surrogate": ("Q \ud800", "question: expected text that UTF-8 can encode"),
    "template token": ("Q EOS 1", "question: expected text without the tokenizer's control tokens; got 'EOS'"),
    "ShareGPT": ([{"from": "human", "value": "1"}], r"question\[0\]: expected a message whose 'role' and 'content'"),
    "template error": ([{"role": "user", "content": "13"}], "chat_template: expected to write .*unlucky"),
}


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    tokenizer = build_tokenizer()
    refuses = "{% if messages[-1].content == '13' %}{{ raise_exception('unlucky') }}{% endif %}"
    tokenizer.chat_template = refuses + CHAT_TEMPLATE
    args = config(tmp_path_factory.mktemp("out"))
    return RowCheck(ContextBuilder(tokenizer, args.context_config(), text_as_chat=False), tiny(), args)


class Rows(list):
    """Arrow turns a lone surrogate away, and mixes no types in a column; other sources may not."""


@pytest.mark.parametrize("name", POISON)
def test_a_poisoned_row_is_named(check, name):
    question, message = POISON[name]
    rows = Rows([*ROWS[:6], {"prompt": question, "privileged_context": "1"}, *ROWS[6:]])
    with pytest.raises(ValueError, match=rf"^train_dataset, row 6: {message}"):
        check.dataset(rows, "train_dataset")


def test_a_poisoned_row_of_a_stream_is_named_when_it_comes(tmp_path):
    rows = [*ROWS[:6], {"prompt": "Q EOS", "privileged_context": "1"}]
    trainer = FixedTrainer(
        model=tiny(),
        args=config(tmp_path, max_steps=2),
        train_dataset=Dataset.from_list(rows).to_iterable_dataset(),
        processing_class=build_tokenizer(),
    )
    with pytest.raises(ValueError, match=r"train_dataset, row 6: question: expected text without .*control tokens"):
        trainer.train()
    with pytest.raises(ValueError, match=r"eval_dataset\['a'\], row 0: expected the columns 'prompt' and one of"):
        trainer._rows.dataset({"a": Rows([{"prompt": "Q"}])}, "eval_dataset")


def test_prompts_and_completions_must_fit_the_models_positions(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": len(VOCABULARY), "n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 2}
    ends = {"eos_token_id": 19, "pad_token_id": 10, "bos_token_id": None}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, **ends))
    with pytest.raises(
        ValueError, match=r"train_dataset, row 0: expected at most the model's 12 positions; got 9 tokens"
    ):
        build(tmp_path, model=gpt2)
    options = {
        "max_prompt_length": 8,
        "max_completion_length": 4,
        "on_overflow": "drop",
        "per_device_train_batch_size": 2,
    }
    kept = build(tmp_path, model=gpt2, **options, teacher_template="{question} {solution}")
    assert len(kept.train_dataset) == 8 and kept.train().global_step == 1


def test_a_tokenizer_without_an_end_and_a_balancing_loss_are_refused(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"processing_class: expected a tokenizer with an eos_token; got None"):
        build(tmp_path, tokenizer=tokenizer)
    model = tiny()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"model\.config\.output_router_logits: expected False; got True"):
        prepare_student(model)
    check_columns({"a": Dataset.from_list(ROWS)}, "eval_dataset", config(tmp_path))


def processor():
    """A Gemma-3 processor: what AutoProcessor gives for the checkpoints of 4B and more."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer().backend_tokenizer,
        extra_special_tokens=dict.fromkeys(("boi_token", "eoi_token", "image_token"), "SO"),
        pad_token="PAD",
        eos_token="EOS",
    )
    return Gemma3Processor(Gemma3ImageProcessor(), tokenizer, chat_template=CHAT_TEMPLATE)


def vision_model():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {
        "image_token_index": 21,
        "boi_token_index": 21,
        "eoi_token_index": 21,
        "eos_token_id": 19,
        "pad_token_id": 10,
    }
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, **ids)
    )


@pytest.mark.parametrize("given", [False, True])
def test_a_checkpoint_with_a_processor_trains_on_text(tmp_path, given):
    vision_model().save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": f"{a} 5"}], "solution": f"WAIT {a}"} for a in range(4)]
    trainer = FixedTrainer(
        str(tmp_path / "model"),
        config(tmp_path),
        Dataset.from_list(rows),
        processing_class=processor() if given else None,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert logs(trainer)[0]["loss"] > 0
    assert not hasattr(trainer.processing_class, "image_processor")
