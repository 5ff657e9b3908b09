"""The whole method as one plain PyTorch loop over a Hugging Face causal language model.

Each step has three parts. Sample completions from the student on the question alone. Run the frozen initial weights over
the same tokens after the question (base), after question and reference solution (teacher), and after the reference
solution alone. Move the student towards the target built of them.

Under ``torchrun`` the processes share each step's questions, and the result is that of one process on all of them.

Left out, to keep it readable from top to bottom: sharded models, vLLM, mixed precision (the model trains in the dtype
it was loaded in), learning-rate schedules (it is constant), logging services. The model stays in the mode it comes in.
``from_pretrained`` gives eval mode, so the student is trained on the distribution that it sampled from.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from popsd import PurifiedOPSDLoss
from popsd_integrations.finite_steps import FiniteSteps
from popsd_integrations.huggingface.distributed import (
    agreed,
    everyones,
    join_processes,
    processes,
    rank,
    run_in_forward,
)
from popsd_integrations.huggingface.forwards import counting, exact_layout
from popsd_integrations.huggingface.frozen import FrozenChecksum, FrozenWeights, frozen_states, frozen_weights
from popsd_integrations.huggingface.groups import facts, repeated, within_prompts
from popsd_integrations.huggingface.heads import causal_model
from popsd_integrations.huggingface.invariants import check_model
from popsd_integrations.huggingface.objective import measures_decomposition, needed_contexts, student_loss, target_code
from popsd_integrations.huggingface.packing import pack_contexts
from popsd_integrations.huggingface.prompts import Prompts
from popsd_integrations.huggingface.sampling import Generate, Sampler, check_positions, random_state, seed_everything
from popsd_integrations.run_folder import exclusive, finishing_on_sigterm, writing
from popsd_integrations.runs import report
from popsd_integrations.runs.held_out import FILE as COMPLETIONS
from popsd_integrations.runs.held_out import HeldOut, keep
from popsd_integrations.runs.line import lines
from popsd_integrations.runs.report import METRICS
from popsd_integrations.torch_loop.checkpoint import (
    read_checkpoint,
    read_metrics,
    restore,
    run_fingerprint,
    save_checkpoint,
    save_model,
)
from popsd_integrations.torch_loop.config import TrainConfig
from popsd_integrations.torch_loop.evaluation import Judged, evaluation
from popsd_integrations.torch_loop.processes import (
    check_same,
    check_shared,
    own_seed,
    share,
    sum_gradients,
    summed,
    together,
)

CHECKPOINT = "checkpoint.pt"
# Options that a continued run may change, because the steps taken already do not depend on them.
_FREE = ("steps", "checkpoint_every")


class TrainResult(NamedTuple):
    """model: the trained student (the PEFT model under LoRA). metrics: one dictionary per step, as in metrics.jsonl.

    Both are the same on all processes, but for the seconds.
    """

    model: Any
    metrics: list[dict[str, float]]


def train(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompts],
    config: TrainConfig,
    *,
    output_dir: str | Path,
    generate: Generate | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    held_out: HeldOut | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train ``model`` in place on the questions of ``prompts`` (see ``huggingface.ContextBuilder``).

    generate: samples the completions, see ``huggingface.Sampler``. None: ``hf_generate``.
    evaluate: called with the model every ``evaluate_every`` steps and at the end; its numbers join the metrics as
        ``eval/…``. Every process calls it, and the first one's numbers count.
    held_out: problems that are answered and judged at the same steps, sampled as in training and greedily. Adds
        ``eval/accuracy``, ``eval/accuracy_greedy`` and ``eval/truncated``; the completions go to eval_completions.jsonl.
    resume: continue from the checkpoint in ``output_dir``, or from the start where there is none yet, to the same metrics
        as an unbroken run. Pass the same initial model, since the checkpoint holds the trained parameters only. The random
        states of PyTorch and of ``random`` are seeded, saved and restored. A ``generate`` with a generator of its own is
        not covered.

    ``output_dir`` receives metrics.jsonl, popsd_config.json (the options), checkpoint.pt and, at its end, report.html and
    in ``model`` what was trained, with the tokenizer. ``progress`` shows a bar and a line of at most eight figures a step, of
    all that is in metrics.jsonl, and at the end how to load and evaluate the model.

    Several processes: ``torchrun --nproc_per_node N script.py``, where every process calls this with the same whole model on
    its own device, the same prompts and options. They share the questions of each step, in the order in which one process
    takes them, and the held-out problems; a top share of the masks is of each process's part. Loss, metrics and parameters
    are those of one process with the same completions. The first process writes to its ``output_dir``, which all must be
    able to read.
    The group of torchrun is started here, unless one is there; ``torch.distributed.init_process_group(timeout=...)`` before
    the call sets how long the others wait for a process that is silent. Where one dies or fails, they fail too.

    One run at a time works in ``output_dir``. After a SIGTERM the run finishes its step, saves, and raises SystemExit(143).
    A step whose gradient is not finite is refused: the weights stay, a warning names the rows, and ``step_refused`` is 1.

    Raises, before any work, TypeError for other prompts, and ValueError for no prompts; for a folder that cannot be written
    to or that another run works in; for a checkpoint that is there without ``resume``, is damaged, is of another run, or
    has taken more steps; for a model that ``huggingface.check_model`` refuses; for a batch that the processes cannot share
    evenly, and a process whose arguments differ. Raises RuntimeError, before a checkpoint is
    written, where the frozen weights have changed, FloatingPointError after three refused steps in a row and for parameters
    that are not finite, and OSError on a full disk. The last checkpoint then stays.
    """
    listed = prompts if hasattr(prompts, "__len__") else [prompts]
    odd = sorted({type(row).__name__ for row in listed if not isinstance(row, Prompts)})
    if odd:
        raise TypeError(
            f"prompts: expected a list of Prompts; got {', '.join(odd)}. Build them of Problems with "
            "ContextBuilder(tokenizer).build_all(problems)."
        )
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one problem; got none. Build them with ContextBuilder.build_all.")
    if config.evaluate_every and evaluate is None and held_out is None:
        raise ValueError(
            f"evaluate_every: expected 0 where nothing is evaluated; got {config.evaluate_every}. Pass held_out or evaluate."
        )
    join_processes()
    with ExitStack() as stack:
        output = agreed(lambda: stack.enter_context(exclusive(output_dir)))
        asked_to_end = stack.enter_context(finishing_on_sigterm())
        progress = progress and rank() == 0
        result = _train(
            model, tokenizer, prompts, config, output, generate, evaluate, held_out, resume, progress, asked_to_end
        )
        agreed(lambda: report.write_page(output))
        if progress:
            print("\n".join(report.how_to_go_on(output)))
        return result


def _train(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompts],
    config: TrainConfig,
    output: Path,
    generate: Generate | None,
    evaluate: Callable[[Any], dict[str, float]] | None,
    held_out: HeldOut | None,
    resume: bool,
    progress: bool,
    asked_to_end: Callable[[], bool],
) -> TrainResult:
    check_shared(model, config.batch_size)
    loss_fn = config.loss_function()
    sampling: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    sampling |= {"generate": generate, "vocab_size": loss_fn.config.vocab_size}
    sampler = Sampler(model, tokenizer, **sampling)
    judged = (
        None if held_out is None else Judged(held_out, model, tokenizer, sampling, config.batch_size // processes())
    )
    check_positions(model, prompts, config.max_new_tokens)
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    given = options | target_code(config.loss_target) | {"processes": processes()}
    fingerprint = run_fingerprint(given, model, prompts)
    checkpoint = read_checkpoint(output / CHECKPOINT, fingerprint, resume, config.steps)
    check_same(fingerprint, 0 if checkpoint is None else checkpoint["step"])
    seed_everything(config.seed)
    if config.lora_rank is not None:
        model = _with_lora(model, config)
    source = frozen_weights(model)
    side = check_model(model, prompts, source, pad_token_id=sampler.pad_token_id)
    checksum = FrozenChecksum(source)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.learning_rate, betas=config.adam_betas, weight_decay=config.weight_decay
    )
    if rank() > 0:  # they began alike, and sample on their own
        seed_everything(own_seed(config.seed))
    start = 0 if checkpoint is None else restore(checkpoint, trained, optimizer, rank())
    history = agreed(partial(_begin, model, config, output, start, len(prompts)))
    finite, ending = FiniteSteps(), False
    batch: dict[str, Any] = {"pad_token_id": sampler.pad_token_id, "side": side, "device": causal_model(model).device}
    batch["layout"] = exact_layout(model, prompts, padding_free=config.padding_free)
    backward = partial(_backward, model, source, loss_fn, config, batch)

    log_path = os.devnull if rank() else output / METRICS
    with writing(output / METRICS), open(log_path, "a", encoding="utf-8") as log:
        for step in (bar := _progress(range(start, config.steps), config, start, progress)):
            began = time.perf_counter()
            indices = share(_rows(step, config, len(prompts)))
            rows = [prompts[index] for index in indices]
            completions = sampler(model, rows)
            generated = time.perf_counter()
            decompose = config.decompose_every > 0 and step % config.decompose_every == 0
            decompose = decompose and measures_decomposition(config.loss_target)
            everybodys = together(completions)
            found = backward(rows, completions, decompose, sum(map(len, everybodys)))
            sum_gradients(trained.values())
            norm = nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm).item()
            look = partial(_not_finite, indices, rows, completions, backward, list(trained.values()))
            refused = finite.refuses(norm, step + 1, lambda look=look: together(look()))  # type: ignore[misc]
            if not refused:
                optimizer.step()
            optimizer.zero_grad()

            of_all = everyones((found, asked_to_end()))
            metrics = {"step": step + 1, **summed([part for part, _ in of_all])}
            run, positions = metrics.pop("tokens_run"), metrics.pop("positions_run")
            metrics |= {"grad_norm": norm, "step_refused": float(refused)}
            metrics |= _completion_metrics(everybodys, tokenizer, sampler.eos_token_id, config)
            metrics |= {"seconds/generate": generated - began, "seconds/update": time.perf_counter() - generated}
            metrics["forwards/padding_share"] = 1 - run / positions
            metrics["forwards/tokens_per_second"] = run / metrics["seconds/update"]
            ending = any(asked for _, asked in of_all)
            last = step + 1 == config.steps
            if last or _due(step, config.evaluate_every):
                metrics |= evaluation(model, evaluate, judged, config.seed, output, step + 1)
            history.append(metrics)
            log.write(json.dumps(metrics) + "\n")
            log.flush()
            taken = metrics["seconds/generate"] + metrics["seconds/update"]  # without the evaluation
            for line in lines(metrics | {"step_time": taken}, step + 1, config.steps) if progress else ():
                bar.write(line)
            if last or ending or _due(step, config.checkpoint_every):
                checksum.check()
                states = everyones(random_state())
                if rank() == 0:
                    os.fsync(log.fileno())
                    save_checkpoint(output / CHECKPOINT, fingerprint, step + 1, trained, optimizer, states)
            if ending:
                break
    if not ending:
        agreed(lambda: save_model(model, tokenizer, output / report.MODEL))
    elif not asked_to_end():
        signal.raise_signal(signal.SIGTERM)  # another process was asked, and all end alike
    return TrainResult(model, history)


def _begin(model: nn.Module, config: TrainConfig, output: Path, start: int, count: int) -> list[dict[str, float]]:
    """Leave in the folder what the steps before ``start`` wrote, describe the run, and return those steps' metrics."""
    history = read_metrics(output / METRICS, upto=start)
    keep(output / COMPLETIONS, lambda record: record["step"] <= start)
    base = causal_model(model).config._name_or_path
    report.write_config(output, base=base, options=dataclasses.asdict(config), data={"prompts": count})
    return history


def _backward(
    model: nn.Module,
    source: FrozenWeights,
    loss_fn: PurifiedOPSDLoss,
    config: TrainConfig,
    batch: Mapping[str, Any],
    rows: Sequence[Prompts],
    completions: Sequence[Sequence[int]],
    decompose: bool,
    tokens: int,
) -> dict[str, float]:
    """Accumulate the gradient of the rows' part in the batch's mean loss per completion token, and return that of the metrics.

    batch: how it is packed, for `pack_contexts`. tokens: of the batch. The metrics include what the forwards ran.
    """
    size = config.micro_batch_size or len(rows)
    contexts = needed_contexts(config.loss_target, decompose)
    totals: dict[str, torch.Tensor] = {}
    with counting() as work:
        for first in range(0, len(rows), size):
            part, ids = rows[first : first + size], completions[first : first + size]
            packed = pack_contexts(part, ids, **batch)
            frozen = frozen_states(source, packed, contexts, batched=config.batched_frozen)
            options: dict[str, Any] = {"num_items": tokens, "decompose": decompose}
            # sum_gradients reduces what hidden_states would otherwise look for a wrapper of
            function = partial(student_loss, model, loss_fn, packed["base"], frozen, **options)
            loss, metrics = run_in_forward(model, function)
            loss.backward()
            of_batch = sum(map(len, ids)) / tokens
            weighted = {name: value * of_batch for name, value in metrics.items() if name != "tokens"}
            weighted["loss"] = loss.detach()
            totals = {name: value + totals.get(name, 0) for name, value in weighted.items()}
    found = {name: value.item() for name, value in totals.items()}
    return found | {"tokens_run": work.tokens, "positions_run": work.positions}


def _not_finite(
    indices: Sequence[int],
    rows: Sequence[Prompts],
    completions: Sequence[Sequence[int]],
    backward: Callable[..., dict[str, float]],
    trained: Sequence[nn.Parameter],
) -> list[str]:
    """Run each row by itself, and name those whose loss or gradient is not finite."""
    names = []
    for index, row, ids in zip(indices, rows, completions, strict=True):
        for parameter in trained:
            parameter.grad = None
        loss = backward([row], [ids], False, len(ids))["loss"] if ids else 0.0
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if not math.isfinite(loss) or not norm.isfinite():
            names.append(f"prompts[{index}]")
    return names


def _completion_metrics(
    completions: Sequence[Sequence[int]], tokenizer: Any, eos: Sequence[int], config: TrainConfig
) -> dict[str, float]:
    counts = config.markers.count_ids(completions, tokenizer)
    number = config.num_generations
    return {
        "completions/mean_length": sum(map(len, completions)) / len(completions),
        "completions/eos_rate": sum(ids[-1] in eos for ids in completions) / len(completions),
        "markers/per_completion": counts.per_completion(),
        "markers/per_thousand_tokens": counts.per_thousand_tokens(),
        **{f"markers/{word}": counts.per_completion(word) for word in counts.counts},
        **(within_prompts(facts(completions, config.markers, tokenizer), number) if number > 1 else {}),
    }


def _rows(step: int, config: TrainConfig, count: int) -> list[int]:
    """Rows of a step, those of a question together.

    An epoch is a permutation drawn from (seed, epoch), so the step alone determines them.
    """
    questions = config.batch_size // config.num_generations
    places = range(step * questions, (step + 1) * questions)
    orders = {epoch: list(range(count)) for epoch in {place // count for place in places}}
    for epoch, order in orders.items():
        random.Random(f"{config.seed}:{epoch}").shuffle(order)
    return repeated([orders[place // count][place % count] for place in places], config.num_generations)


def _with_lora(model: nn.Module, config: TrainConfig) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora_rank needs peft: pip install 'popsd[trl]', or set lora_rank=None.") from error

    if hasattr(model, "peft_config"):
        raise ValueError(
            "lora_rank: expected None for a model that has an adapter already; its own adapter is trained."
        )
    targets = config.lora_targets if isinstance(config.lora_targets, str) else list(config.lora_targets)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    was_training = model.training
    return get_peft_model(model, lora).train(was_training)


def _progress(steps: range, config: TrainConfig, start: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(steps, desc=config.loss_target, initial=start, total=config.steps, unit="step", disable=not shown)


def _due(step: int, every: int) -> bool:
    return every > 0 and (step + 1) % every == 0
