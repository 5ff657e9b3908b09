"""The trainer beside a real vLLM, in its own process and as a server: docs/vllm.md says how to make an environment for it.

It runs on a CPU too; `vllm_on_cpu` says what is replaced there. An engine takes a minute to load, so all tests share two.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen3Config, TrainerCallback
from trl_helpers import EOS, LORA, PAD, ROWS, config, logs

from popsd_integrations.miniature.tokenizer import VOCABULARY, build_tokenizer
from popsd_integrations.trl_trainer import PurifiedOPSDTrainer

pytestmark = pytest.mark.slow
STARTS = 600
"""Seconds that a server may take to start."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
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
    folder = tmp_path_factory.mktemp("model")
    for part in (model.bfloat16(), build_tokenizer()):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def on_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        import vllm_on_cpu  # noqa: F401
        from trl.generation.vllm_client import VLLMClient

        real = VLLMClient.init_communicator
        patch.setattr(VLLMClient, "init_communicator", lambda self, device: real(self, torch.device("cuda")))
        yield patch


@pytest.fixture(scope="module")
def colocate(on_cpu):
    """One engine for all trainers that ask for the same. On a CPU sleep does nothing, so here it forgets the weights."""
    from trl.generation import vllm_generation
    from vllm.v1.worker.cpu_worker import CPUWorker

    engines, load = {}, vllm_generation.LLM

    def kept(enable_sleep_mode, **options):
        key = str(options)
        engine = engines[key] = engines.get(key) or load(**options)
        vars(engine).pop("generate", None)  # it is as after loading
        if engine.llm_engine.is_sleeping():
            engine.wake_up()
        return engine

    def forget(worker, level=1):
        for parameter in worker.model_runner.model.parameters():
            parameter.data.fill_(torch.nan)

    on_cpu.setattr(vllm_generation, "LLM", kept)
    on_cpu.setattr(CPUWorker, "sleep", forget)
    yield {}
    assert len(engines) == 1


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(**variables):
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables


@pytest.fixture(scope="module")
def server(on_cpu, model, tmp_path_factory):
    """The options that name a server, which runs until the last test."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--worker-extension-cls", "vllm_on_cpu.Extension", "--max-model-len", "64"]
    command += ["--weight-transfer-config", '{"backend": "nccl"}', "--enforce-eager"]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment(VLLM_SERVER_DEV_MODE="1"), stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + STARTS
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield {"vllm_mode": "server", "vllm_server_host": "127.0.0.1", "vllm_server_port": port}
    finally:
        process.terminate()
        process.wait(60)


def answers(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except (urllib.error.URLError, TimeoutError):
        return False


class Noting(PurifiedOPSDTrainer):
    """Notes what is sampled, and how far each token's logit is below the largest of the student itself."""

    greedy = False

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        generation = self.vllm_generation
        if self.greedy:
            generation.generation_kwargs = generation.generation_kwargs | {"temperature": 0.0}
        completions = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.sampled = [*getattr(self, "sampled", []), *map(list, completions)]
        with torch.no_grad():
            for prompt, ids in zip(prompt_ids, completions, strict=True):
                logits = self.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
                largest = logits.max(dim=-1).values
                below = largest - logits.gather(1, torch.tensor(list(ids))[:, None])[:, 0]
                self.below = [*getattr(self, "below", []), *(below / largest.abs().clamp(min=1)).tolist()]
        return completions


def trainer_of(model, folder, cls=Noting, **options):
    if "vllm_mode" in options:
        options["vllm_group_port"] = free_port()  # a process keeps the one that it opened
    return cls(
        model=str(model),
        args=config(folder, use_vllm=True, model_init_kwargs={"dtype": torch.bfloat16}, **options),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=build_tokenizer(),
        peft_config=LORA,
    )


class Greedy(Noting):
    greedy = True


@pytest.mark.parametrize(("mode", "options"), [("colocate", {"vllm_enable_sleep_mode": True}), ("server", {})])
def test_vllm_samples_from_the_student_and_the_base_stays(mode, options, model, request, tmp_path):
    options = options | request.getfixturevalue(mode)
    trainer = trainer_of(model, tmp_path, cls=Greedy, max_steps=20, **options)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    # bfloat16 has 8 bits, and vLLM multiplies by the merged weights where the student adds the adapter's part.
    assert len(trainer.below) > 100 and max(trainer.below) < 2**-5
    assert sum(x == 0 for x in trainer.below) > 0.9 * len(trainer.below)
    assert any(row.get("vllm_rounding", 0) > 0 for row in trainer.state.log_history)


def test_two_processes_share_an_engine(on_cpu, model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(Path(__file__).with_name("vllm_ranks.py")), str(model), str(tmp_path)]
    run = subprocess.run(
        command, env=environment(ACCELERATE_USE_CPU="1"), capture_output=True, text=True, timeout=STARTS
    )
    assert run.returncode == 0, run.stderr[-4000:]


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def adapter(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters() if parameter.requires_grad]


@pytest.fixture(scope="module")
def unbroken(model, colocate, tmp_path_factory):
    trainer = trainer_of(model, tmp_path_factory.mktemp("unbroken"), max_steps=4)
    trainer.train()
    return trainer


def test_a_killed_run_resumes_to_the_same_completions_and_weights(unbroken, model, tmp_path):
    often = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    killed = trainer_of(model, tmp_path, **often)
    killed.add_callback(Killed())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer_of(model, tmp_path, **often)
    resumed.train(resume_from_checkpoint=True)
    assert killed.sampled == unbroken.sampled[:12] and resumed.sampled == unbroken.sampled[8:]
    assert len({tuple(ids) for ids in unbroken.sampled}) > 8
    assert all(map(torch.equal, adapter(resumed), adapter(unbroken)))


def test_another_seed_samples_others(unbroken, model, tmp_path):
    other = trainer_of(model, tmp_path, max_steps=1, seed=7)
    other.train()
    assert other.sampled != unbroken.sampled[:4]


def test_a_server_samples_and_trains_as_the_engine_in_the_process_does(unbroken, server, model, tmp_path):
    trainer = trainer_of(model, tmp_path, max_steps=4, **server)
    trainer.train()
    assert trainer.sampled == unbroken.sampled
    for one, other in zip(logs(trainer), logs(unbroken), strict=True):
        assert one["loss"] == other["loss"]
