"""The plain loop under faults: damaged checkpoints, steps that are not finite, a full disk, and the request to end."""

import json
import os
import resource
import signal
from dataclasses import replace

import pytest
import torch
from loop_helpers import CONFIG, PROMPTS, deterministic, fixed_generate, no_work, run, tiny

import popsd
from popsd_integrations.run_folder import exclusive
from popsd_integrations.torch_loop import checkpoint

pytest.importorskip("transformers")

SHORT = replace(CONFIG, steps=2, batch_size=2, checkpoint_every=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder, SHORT, generate=fixed_generate)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    for name in ("checkpoint.pt", "metrics.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    return tmp_path


def resume(folder, **options):
    return run(folder, replace(SHORT, steps=4), resume=True, **({"generate": no_work} | options))


def rewritten(folder, change, sign=True):
    """Change a checkpoint's contents, with a checksum that fits them."""
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    change(content)
    if sign:
        content.pop("checksum")
        content["checksum"] = checkpoint.checksum(content)
    torch.save(content, folder / "checkpoint.pt")


def test_every_flipped_bit_of_a_tensor_is_found(folder):
    """One bit of each tensor in turn: before there was a checksum, 48 of 60 such runs ended otherwise without a word."""
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    content.pop("checksum")
    known, tensors = checkpoint.checksum(content), []

    def collect(value):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                collect(item)

    collect(content)
    assert len(tensors) > 60
    for place, tensor in enumerate(tensors):
        octets = tensor.reshape(-1).view(torch.uint8)
        at = 7919 * place % len(octets)
        octets[at] ^= 1 << place % 8
        assert checkpoint.checksum(content) != known
        octets[at] ^= 1 << place % 8
    assert checkpoint.checksum(content) == known


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "does not load"),
        (lambda path: path.write_text("not a checkpoint"), "does not load"),
        (lambda path: torch.save({"model": {}}, path), "another program or version"),
        (lambda path: torch.save([1], path), "another program or version"),
        (lambda path: torch.save({"popsd": 3, "step": True}, path), "fingerprint, step, parameters, optimizer, random"),
        (lambda path: rewritten(path.parent, lambda x: x.pop("random")), "missing or of another type: random"),
        (lambda path: rewritten(path.parent, lambda x: x.update(step=-1)), "one with step -1"),
        (lambda path: rewritten(path.parent, lambda x: x.update(step=1), sign=False), "its checksum does not fit"),
        (lambda path: rewritten(path.parent, lambda x: x["optimizer"]["state"].clear(), sign=False), "checksum"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_any_work(folder, damage, message):
    damage(folder / "checkpoint.pt")
    with pytest.raises(
        ValueError, match=rf"output_dir: expected a readable popsd checkpoint.*{message}.*Delete the file"
    ):
        resume(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["parameters"].update({"model.norm.weight": torch.ones(1)}), r"in model\.norm\.weight \(1 in all"),
        (lambda x: x["parameters"].pop("model.norm.weight"), r"in model\.norm\.weight "),
        (lambda x: x["parameters"].update(more=torch.ones(1)), "in more "),
        (lambda x: x["optimizer"]["state"][1].update(exp_avg=torch.ones(1)), "in optimizer state 1: exp_avg"),
    ],
)
def test_tensors_of_other_shapes_are_refused(folder, change, message):
    rewritten(folder, change)
    model = tiny()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"names and shapes of what is trained.*{message}"):
        resume(folder, model=model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_another_initial_model_is_found_wherever_it_differs(folder):
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.view(-1)[-1] += 1e-6
    with pytest.raises(ValueError, match=r"differs in initial weights\."):
        resume(folder, model=model)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text('{"step": 1}\n{"st')])
def test_metrics_that_do_not_reach_the_checkpoint_are_refused(folder, damage):
    damage(folder / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"output_dir: expected a line for each of the 2 steps.*Restore the file"):
        resume(folder)


def test_a_line_that_a_kill_cut_short_is_written_again(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    rows = resume(folder, generate=fixed_generate).metrics
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == rows and len(rows) == 4


def test_a_second_run_in_the_folder_is_refused(folder):
    with exclusive(folder), pytest.raises(ValueError, match="no other run writes to"):
        resume(folder)


def test_a_full_disk_leaves_the_last_checkpoint(folder):
    before, (soft, hard) = (folder / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match=r"expected to write .*checkpoint\.pt; .*Make room"):
            resume(folder, generate=fixed_generate)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [
        ".popsd.lock",
        "checkpoint.pt",
        "metrics.jsonl",
        "popsd_config.json",
    ]
    assert len(resume(folder, generate=fixed_generate).metrics) == 4


def test_sigterm_finishes_the_step_and_the_run_goes_on_from_there(tmp_path):
    config = replace(CONFIG, steps=3, checkpoint_every=0)

    def asked_at_the_second(model, prompts, **options):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return fixed_generate(model, prompts)

    calls = []
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "asked", config, generate=asked_at_the_second)
    assert ended.value.code == 143 and len(calls) == 2
    resumed = run(tmp_path / "asked", config, generate=fixed_generate, resume=True)
    unbroken = run(tmp_path / "unbroken", config, generate=fixed_generate)
    assert deterministic(resumed.metrics) == deterministic(unbroken.metrics)


class Poison:
    """Makes the hidden states that follow token 4 not finite, in the student's pass of given steps."""

    def __init__(self, steps):
        self.steps, self.step, self.model = steps, 0, tiny()
        self.model.model.embed_tokens.register_forward_hook(self.hook)

    def hook(self, module, args, output):
        bad = (args[0] == 4) & (self.step in self.steps)
        return torch.where(bad[..., None], torch.nan, output)

    def generate(self, model, prompts, **options):
        self.step += 1
        return fixed_generate(model, prompts)


UNCHECKED = replace(CONFIG, batch_size=10, loss=popsd.PurifiedConfig(check_finite=False), checkpoint_every=1)


def test_a_step_that_is_not_finite_is_refused_and_its_rows_are_named(tmp_path, caplog):
    poison, before = Poison({2}), []
    generate = lambda model, prompts, **_: (  # noqa: E731
        before.append(model.lm_head.weight.clone()),
        poison.generate(model, prompts),
    )[1]
    rows = run(tmp_path, replace(UNCHECKED, steps=3), model=poison.model, generate=generate).metrics
    assert [row["step_refused"] for row in rows] == [0, 1, 0]
    assert not torch.equal(before[0], before[1]) and torch.equal(before[1], before[2])
    named = {index for index in range(len(PROMPTS)) if f"prompts[{index}]" in caplog.text}
    assert named == {index for index, prompt in enumerate(PROMPTS) if any(4 in context for context in prompt)}
    assert 0 < len(named) < len(PROMPTS)


def test_a_run_of_nothing_but_such_steps_ends_and_its_checkpoint_stays(tmp_path):
    poison = Poison({3, 4, 5, 6})
    with pytest.raises(
        FloatingPointError, match=r"got 3 steps in a row without one, all refused.*step 5\. Rows.*prompts\["
    ):
        run(tmp_path, UNCHECKED, model=poison.model, generate=poison.generate)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(value.isfinite().all() for value in content["parameters"].values())


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    """A finite gradient can leave such weights, at a learning rate far too high."""
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.bias[1] = torch.inf
    with pytest.raises(FloatingPointError, match=r"save at step 7; got others in bias \(1 of 2 tensors\).*stays"):
        checkpoint.save_checkpoint(
            tmp_path / "checkpoint.pt", {}, 7, dict(model.named_parameters()), torch.optim.AdamW(model.parameters()), []
        )
    assert not list(tmp_path.iterdir())
