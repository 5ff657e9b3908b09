"""Requests to a server: a prompt and a seed each. What a real one makes of them is in test_vllm_engines.py."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

import requests

from popsd_integrations.trl_trainer.vllm.engine import Engine, _engine
from popsd_integrations.trl_trainer.vllm.seeds import seed_each


class Client:
    """TRL's, as far as the trainer calls it."""

    base_url = "http://127.0.0.1:1"

    def __init__(self):
        self.session, self.asked = requests.Session(), []

    def generate(self, prompts, n=1, generation_kwargs=None, **options):
        self.asked.append((prompts, generation_kwargs))
        completions = [[*prompts[0], place] for place in range(n)]
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": None}


def seeded(seed):
    client = Client()
    seed_each(SimpleNamespace(mode="server", accelerator=SimpleNamespace(is_main_process=True), vllm_client=client))
    torch.manual_seed(seed)
    output = client.generate(prompts=[[5], [6, 7], [5]], n=2, generation_kwargs={"stop_token_ids": [1]}, top_p=0.5)
    return output, {str(prompts): kwargs for prompts, kwargs in client.asked}, [x["seed"] for _, x in client.asked]


def test_a_server_is_asked_for_each_prompt_with_a_seed_of_its_own():
    output, asked, seeds = seeded(0)
    assert output["completion_ids"] == [[5, 0], [5, 1], [6, 7, 0], [6, 7, 1], [5, 0], [5, 1]]
    assert output["prompt_ids"] == [[5], [6, 7], [5]] and output["logprobs"] is None
    assert len(set(seeds)) == 3 and all(kwargs["stop_token_ids"] == [1] for kwargs in asked.values())
    assert sorted(seeded(0)[2]) == sorted(seeds) and not {*seeded(1)[2]} & {*seeds}


def test_a_server_says_what_it_computes_in(monkeypatch):
    config = {"dtype": "torch.float32", "max_model_len": 64, "quantization": None}
    answer = SimpleNamespace(raise_for_status=lambda: None, json=lambda: {"vllm_config": {"model_config": config}})
    client = Client()
    monkeypatch.setattr(client.session, "get", lambda url, params: answer)
    assert _engine(SimpleNamespace(mode="server", vllm_client=client)) == Engine(torch.float32, 64, None)
