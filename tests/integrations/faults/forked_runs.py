"""Runs in forked children that are killed at random moments, and resumed: ``forked_runs.py KINDS FOLDER KILLS SEED``.

A fork costs milliseconds where a new process imports for seconds, so a hundred kills are minutes. The first kill and every
second one come within 5 ms of a random file operation, which is where checkpoints are written. The others come at a random
time of the run, which on a busy machine may be before the first checkpoint. KINDS: loop, trainer, or both with a comma
between. Prints a JSON object: for each kind how many children were killed, left a file unfinished, had a checkpoint to
resume from, and came to the unbroken run's result in the end.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")


def loop_run(folder, variant):
    from loop_helpers import CONFIG, deterministic, run

    from popsd_integrations.torch_loop.checkpoint import checksum

    config = replace(CONFIG, steps=4, checkpoint_every=1, lora_rank=(None, 4)[variant])
    result = run(folder, config, resume=True)
    return checksum([dict(result.model.named_parameters()), deterministic(result.metrics)])


def trainer_run(folder, variant):
    from trl_helpers import build

    from popsd_integrations.torch_loop.checkpoint import checksum
    from popsd_integrations.trl_trainer import PurifiedOPSDTrainer
    from popsd_integrations.trl_trainer.callbacks import newest_whole_checkpoint

    options = ({"lora": True, "frozen_weights": "ema", "ema_decay": 0.5}, {"save_total_limit": 1})[variant]
    options |= {"save_strategy": "steps", "save_steps": 1, "shuffle_dataset": True, "max_steps": 4}
    trainer = build(folder, cls=PurifiedOPSDTrainer, **options)
    trainer.train(resume_from_checkpoint=newest_whole_checkpoint(folder))
    average = {} if trainer._ema is None else trainer._ema.state_dict()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return checksum([dict(trainer.model.named_parameters()), average, losses])


RUNS = {"loop": loop_run, "trainer": trainer_run}


def fork(kind, folder, variant, before=lambda: None):
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        before()
        result = RUNS[kind](folder, variant)
        folder.with_suffix(".result").write_text(result)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_after_file_event(folder, number, delay):
    """In a child: end it so long after the so-manieth time it touches a file in its folder. 0: never, but count them."""
    seen = []

    def hook(event, arguments):
        if event in FILE_EVENTS and str(arguments[0]).startswith(f"{folder}{os.sep}"):
            seen.append(event)
            if number == 0:
                folder.with_suffix(".events").write_text(str(len(seen)))
            elif len(seen) == number:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    sys.addaudithook(hook)


def unbroken(kind, folder, variant):
    """(result, seconds, file events) of a run that nobody kills."""
    began = time.monotonic()
    code = ended(fork(kind, folder, variant, lambda: die_after_file_event(folder, 0, 0)))
    assert code == 0, folder.with_suffix(".log").read_text()
    seconds = time.monotonic() - began
    return folder.with_suffix(".result").read_text(), seconds, int(folder.with_suffix(".events").read_text())


def warm_up(kind):
    """What the children would import each for itself. No backward pass, whose threads a fork would lose."""
    if kind == "trainer":
        import trl_helpers  # noqa: F401
    import loop_helpers
    from peft import LoraConfig, get_peft_model

    from popsd_integrations.huggingface.sampling import hf_generate

    model = get_peft_model(loop_helpers.tiny(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    loop_helpers.build_tokenizer()
    hf_generate(model, [[1, 2]], max_new_tokens=2, temperature=1.0, eos_token_id=[3], pad_token_id=0)


def kill_runs(kind, folder, kills, seed):
    chance = random.Random(seed)
    known = {}
    found = {"kills": 0, "unfinished": 0, "resumable": 0, "identical": 0, "wrong": []}
    attempt = 0
    while found["kills"] < kills:
        attempt += 1
        variant = (attempt - 1) // 2 % 2
        if variant not in known:
            known[variant] = unbroken(kind, folder / f"unbroken-{variant}", variant)
        result, seconds, events = known[variant]
        run = folder / f"{attempt}"
        if attempt % 2 == 0:
            child = fork(kind, run, variant)
            time.sleep(chance.uniform(0.02, 1.1) * seconds)
            os.kill(child, signal.SIGKILL)
        else:
            moment = chance.randint(1, events), chance.uniform(0, 0.005)
            child = fork(kind, run, variant, lambda run=run, moment=moment: die_after_file_event(run, *moment))
        if ended(child) != -signal.SIGKILL:
            shutil.rmtree(run, ignore_errors=True)
            continue  # it had ended before
        found["kills"] += 1
        found["unfinished"] += any(run.rglob("*.popsd-tmp"))
        found["resumable"] += (run / "checkpoint.pt").exists() or any(run.glob("checkpoint-*/trainer_state.json"))
        code = ended(fork(kind, run, variant))
        if code == 0 and run.with_suffix(".result").read_text() == result and not any(run.glob("*.popsd-tmp")):
            found["identical"] += 1
            shutil.rmtree(run, ignore_errors=True)
        else:
            found["wrong"].append([str(run), code, run.with_suffix(".log").read_text()[-2000:]])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    kinds, folder, kills, seed = sys.argv[1].split(","), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    for kind in kinds:
        warm_up(kind)
        (folder / kind).mkdir()
    print(json.dumps({kind: kill_runs(kind, folder / kind, kills, seed) for kind in kinds}))
