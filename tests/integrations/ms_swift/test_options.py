"""What a plugin for ms-swift may choose, and which of ms-swift's options go with it. ms-swift itself is not needed."""

import importlib.metadata

import pytest

import popsd
from popsd_integrations.huggingface import ContextConfig
from popsd_integrations.ms_swift import Options, __main__, options, use

GOOD = {
    "model": "Qwen/Qwen3-1.7B",
    "teacher_model": "Qwen/Qwen3-1.7B",
    "tuner_type": "lora",
    "lmbda": 1.0,
    "steps_per_generation": 4,
    "gradient_accumulation_steps": 2,
}


def test_the_options_of_swift_that_go_with_the_loss():
    options.check_arguments(GOOD)
    options.check_arguments(GOOD | {"tuner_type": "full", "use_vllm": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_model": None}, r"teacher_model: .*moves. Pass --teacher_model Qwen/Qwen3-1.7B"),
        ({"teacher_model": "Qwen/Qwen3-8B"}, "teacher_model: expected the initial model, 'Qwen/Qwen3-1.7B'"),
        ({"teacher_adapters": ["a"]}, "teacher_model: .*without adapters"),
        ({"lmbda": 0.5}, "lmbda: expected 1; got 0.5"),
        ({"sft_alpha": 0.1}, "sft_alpha: expected 0"),
        ({"gkd_logits_topk": 64}, "gkd_logits_topk: expected None; got 64"),
        ({"teacher_model_server": "http://host:8000"}, "teacher_model_server: expected None"),
        ({"padding_free": True}, "padding_free: expected False"),
        ({"use_vllm": True}, "use_vllm: .*moves teacher and reference"),
        ({"steps_per_generation": 3}, r"steps_per_generation: expected a multiple .* \(2\)"),
    ],
)
def test_what_would_be_ignored_or_wrong_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        options.check_arguments(GOOD | changes)


def test_the_loss_takes_swifts_beta_and_temperature():
    found = Options(loss={"pmi_beta": 2.0}).loss_function(beta=0.3, temperature=0.9)
    assert found.config == popsd.PurifiedConfig(beta=0.3, temperature=0.9, pmi_beta=2.0)
    own = Options(loss_target="opsd", loss_temperature=1.1).loss_function(beta=0.5, temperature=0.0)
    assert (own.loss_target, own.config.temperature) == ("opsd", 1.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": {"beta": 1.0}}, "beta: expected in swift's --beta"),
        ({"loss": {"pmi_beta": -1.0}}, "pmi_beta"),
        ({"loss": {"pmi_betta": 1.0}}, "pmi_betta"),
        ({"loss_target": "none_such"}, "loss_target"),
        ({"diagnostics_steps": -1}, "diagnostics_steps: expected at least 0"),
        ({"impl": "cuda"}, "cuda"),
        ({"contexts": ContextConfig(max_prompt_length=10)}, r"contexts.max_prompt_length: .*--max_length"),
        ({"contexts": ContextConfig(system_prompt="Be brief.")}, r"contexts.system_prompt: .*--system"),
        ({"contexts": ContextConfig(reference="other_problem")}, "other_problem"),
    ],
)
def test_a_plugins_mistakes_are_found_at_once(given, message):
    with pytest.raises(ValueError, match=message):
        Options(**given)


def test_a_temperature_of_0_samples_greedily_and_cannot_divide():
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        Options().loss_function(temperature=0.0)


@pytest.mark.parametrize("version", ["4.5.9", "4.7.0", "3.0", None])
def test_an_unsupported_swift_is_one_sentence(monkeypatch, version):
    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    monkeypatch.setattr(options, "_chosen", [])
    with pytest.raises(ImportError, match=r"ms-swift>=4.6,<4.7, and .*: pip install 'ms-swift>=4.6,<4.7'") as raised:
        use()
    assert "\n" not in str(raised.value)


def test_two_plugins_that_choose_otherwise(monkeypatch):
    monkeypatch.setattr(options, "_chosen", [Options()])
    with pytest.raises(ValueError, match="external_plugins: expected one choice"):
        use("opsd")


def test_the_path_that_is_printed():
    assert __main__.main([]) == __main__.main(["purified"])
    with open(__main__.main(["opsd"]), encoding="utf-8") as file:
        assert 'loss_target="opsd"' in file.read()
    with pytest.raises(SystemExit, match=r"plugin: expected one of \['opsd', 'purified'\]; got 'other'"):
        __main__.main(["other"])
