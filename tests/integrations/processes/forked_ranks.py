"""Checks by several gloo processes, forked from one that has imported everything, which costs milliseconds each:
``forked_ranks.py FOLDER MODULE ...``.

The children's environment is that which torchrun makes. ``FOLDER/results.json`` has, by check, what each rank found:
``{"code": its exit code, "found": what the check returned, or the error it raised}``.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

LIMIT = 120
"""Seconds after which a rank that hangs is killed. No check takes more than a few."""


def fork(check, rank, size, port, folder):
    child = os.fork()
    if child:
        return child
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    code, found = 1, None
    try:
        found, code = check(folder), 0
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        traceback.print_exc()
        found = f"{type(error).__name__}: {error}"
    finally:
        (folder / f"{rank}.json").write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(code)  # gloo's threads now and then abort the interpreter's own way out


def run(check, folder, size=2, until=None):
    """[{"code", "found"}] of each rank of ``check(folder)``. until: a rank; the others are killed once it has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    # as torchrun's agent: the port is whichever is free, and the ranks are its clients
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = {rank: fork(check, rank, size, store.port, folder) for rank in range(size)}
    codes, deadline = {}, time.monotonic() + LIMIT
    while len(codes) < size:
        if time.monotonic() > deadline or until in codes:
            for rank in children.keys() - codes.keys():
                os.kill(children[rank], signal.SIGKILL)
        for rank in children.keys() - codes.keys():
            ended, status = os.waitpid(children[rank], os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [
        {
            "code": codes[rank],
            "found": json.loads(path.read_text()) if (path := folder / f"{rank}.json").exists() else None,
        }
        for rank in range(size)
    ]


def warm_up(folder):
    """Import what the children would each import for themselves. No backward, whose threads a fork would lose."""
    import accelerate  # noqa: F401
    from example_checks import inputs
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from popsd_integrations.huggingface.sampling import hf_generate

    place = inputs(folder)
    AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(place / "adapter")
    hf_generate(model, [[1, 2]], max_new_tokens=2, temperature=1.0, eos_token_id=[3], pad_token_id=0)


def main(folder, *modules):
    warm_up(folder)
    results = {}
    for module in modules:
        for check, options in importlib.import_module(module).CHECKS:
            began = time.monotonic()
            results[check.__name__] = run(check, folder / check.__name__, **options)
            print(f"{check.__name__}: {time.monotonic() - began:.1f} s", flush=True)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
