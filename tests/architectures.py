"""Every causal architecture of the installed transformers, built tiny: is it trained exactly, or refused?

    python tests/architectures.py [names] [--output docs/architectures.md]

Each is given random weights, LoRA, and two steps through the trainer on prompts of different lengths. At both steps the
trainer's loss is compared with the loss of the model's own logits, of which each row is run alone and without padding, and
which are composed here in float64. What the trainer accepts must agree; everything else must be refused with a reason.
Then completions of prompts of different lengths are sampled greedily in one call. Each of their tokens must be the likeliest
by the model's own logits of that row alone.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl_helpers import EOS, PAD, FixedTrainer, build

from popsd_integrations.huggingface.packing import unpad
from popsd_integrations.huggingface.sampling import hf_generate
from popsd_integrations.trl_trainer.dataset import problem_of

TOLERANCE = 2e-3  # of the loss; float32 rounding in a product of two tails reaches 1e-4
FLOOR = 1e-4  # nats: below it the 2e-8 that float32 logits leave in any loss would count as a share of nothing
LARGEST = 50_000_000
ROWS = [
    {
        "prompt": f"Q {a} {b} A" if a % 2 else f"Q {a} {b} WAIT {b} {a} CHECK 1 2 3 A",
        "privileged_context": f"{a} OK {b} 5",
    }
    for a, b in ((0, 1), (1, 0), (2, 1), (3, 0))
]


class Result(NamedTuple):
    """outcome: "left" or "right" (exact there), "refused", "not built", or "silent", which is a fault."""

    outcome: str
    detail: str


SIZES = [
    (r"(vocab_size|n_vocab|n_token)(_per_layer_input)?", 64),
    (r"unpadded_vocab_size", 64),
    (
        r"(hidden_size|d_model|n_embd|emb_dim|embed_dim|model_dim|word_embed_proj_dim|attention_hidden_size|lru_width|dim)",
        32,
    ),
    (r"(embedding_size|d_embed|moe_latent_size|mamba_d_ssm|backbone_hidden_size)", 32),
    (
        r"(intermediate_size|ffn_dim|d_inner|n_inner|d_ff|ffn_hidden_size|encoder_ffn_dim|decoder_ffn_dim|intermediate_size_mlp)",
        48,
    ),
    (r"(.*moe.*intermediate.*size|shared_expert.*size|dense_intermediate_size|expert_.*size|.*ffn_hidden_size)", 16),
    (
        r"(num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_decoder_layers|num_encoder_layers)",
        2,
    ),
    (
        r"(num_attention_heads|n_heads?|num_heads|encoder_attention_heads|decoder_attention_heads|swa_num_attention_heads)",
        4,
    ),
    (
        r"(num_key_value_heads|n_head_kv|num_kv_heads|attn_kv_heads|swa_num_key_value_heads|num_global_key_value_heads)",
        2,
    ),
    (r"(head_dim|attention_head_size|kv_channels|attention_head_dim|swa_head_dim|d_kv|global_head_dim)", 8),
    (r"(q_lora_rank|kv_lora_rank)", 16),
    (r"(qk_nope_head_dim|qk_rope_head_dim|rotary_dim|v_head_dim|swa_v_head_dim|index_head_dim)", 8),
    (r"qk_head_dim", 16),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)", 4),
    (r"(num_experts_per_tok|moe_k|num_experts_per_token|moe_topk|moe_top_k|top_k_experts|experts_per_token)", 2),
    (r"(n_group|num_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (
        r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_kv_shared_layers|num_nextn_predict_layers)",
        0,
    ),
    (r"(state_size|mamba_d_state|ssm_state_size|mamba_state_dim)", 8),
    (r"(mamba_n_heads|mamba_num_heads)", 4),
    (r"(mamba_d_head|mamba_head_dim)", 16),
    (r"(mamba_n_groups|n_groups|mamba_ngroups)", 1),
    (r"(linear_num_key_heads|linear_num_value_heads)", 2),
    (r"(linear_key_head_dim|linear_value_head_dim)", 8),
    (r"(time_step_rank|mamba_dt_rank)", 4),
    (r"(max_position_embeddings|n_positions|max_target_positions|n_ctx)", 128),
    (r"(pad_token_id)", PAD),
    (r"(eos_token_id)", EOS),
    (r"(bos_token_id|decoder_start_token_id|sep_token_id|unk_token_id|forced_.*_token_id)", 1),
    (r"(hidden_size_per_layer_input|laurel_rank)", 8),
    (r"index_n_heads", 4),
    (r"index_topk", 128),
    (r"(initializer_range|init_std)", 0.15),
    (r".*(dropout|drop_rate|pdrop|layerdrop).*", 0.0),
]
"""What a configuration's numbers become, by the name; the first pattern that fits."""

PARTS: dict[str, dict[str, Any]] = {
    "mamba": {"intermediate_size": 64, "expand": 2},
    "falcon_mamba": {"intermediate_size": 64, "expand": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 32},
    "xlstm": {"num_blocks": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "nemotron_h": {"hybrid_override_pattern": "M*-"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "minicpm3": {"dim_model_base": 16},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
}
"""What the sizes above leave inconsistent."""
_OFTEN_NONE = ("pad_token_id", "eos_token_id", "head_dim", "num_key_value_heads")


def tiny_config(config_class: type, model_type: str, overrides: dict[str, Any] | None = None) -> Any:
    """The configuration with its sizes made small, its lists cut to as many layers, and its parts likewise."""
    default = config_class()
    return config_class(**(_changes(default) | PARTS.get(model_type, {}) | (overrides or {})))


def _changes(default: Any) -> dict[str, Any]:
    values = {k: v for k, v in default.to_dict().items() if k not in ("transformers_version", "model_type")}
    layers = next((v for k, v in values.items() if re.fullmatch(SIZES[6][0], k) and isinstance(v, int)), None)
    changes: dict[str, Any] = {}
    for name, value in values.items():
        try:
            part = getattr(default, name, None)
        except Exception:  # an attribute that differs by layer
            part = None
        if isinstance(part, transformers.PretrainedConfig):
            changes[name] = type(part)(**_changes(part))
        elif isinstance(value, list) and layers is not None and len(value) == layers and layers > 2:
            other = next((i for i, x in enumerate(value) if x != value[0]), 1)
            changes[name] = [value[0], value[other]]
        elif isinstance(value, bool) or (value is None and not name.endswith(_OFTEN_NONE)):
            continue
        elif isinstance(value, int | float) or value is None:
            new = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            if new is not None:
                changes[name] = int(new) if isinstance(value, int) else new
            elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= 64:
                changes[name] = 60
    if "kv_lora_rank" in values and "num_key_value_heads" in changes:
        changes["num_key_value_heads"] = changes.get("num_attention_heads", 4)  # latent attention has no groups
    if "is_decoder" in values:
        changes["is_decoder"] = True
    return changes


def tiny_model(model_type: str, overrides: dict[str, Any] | None = None) -> Any:
    """Random weights large enough for the layers to matter; the pad token's embedding stays zero where it is."""
    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    config = tiny_config(config_class, model_type, overrides)
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise MemoryError(f"{size:,} parameters after all sizes that are known were made small")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.ndim == 2 and name in ("weight", "bias") and p.std() < 0.1:
                    p.normal_(std=0.15)
                elif name == "bias" and p.ndim == 1 and p.abs().max() == 0:
                    p.normal_(std=0.1)
            index = getattr(module, "padding_idx", None)
            if isinstance(module, torch.nn.Embedding) and index is not None:
                module.weight[index] = 0
    return model


class Judge(FixedTrainer):
    """Computes, at every step, the loss again from the model's own logits of each row alone."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        rows = {name: unpad(inputs[f"{key}_ids"], inputs[f"{key}_mask"]) for name, key in _KEYS.items()}
        expected = truth(self.model, rows, self.args)  # first: RWKV rescales its weights when the mode changes
        loss = super().compute_loss(model, inputs, *arguments, **options)
        error = abs(loss.item() - expected) / max(expected, FLOOR)
        self.__dict__.setdefault("errors", []).append(error)
        return loss


_KEYS = {"base": "prompt", "teacher": "teacher_prompt", "reference": "reference_prompt", "completion": "completion"}


@torch.no_grad()
def truth(student: Any, rows: dict[str, list[list[int]]], args: Any) -> float:
    """The purified loss per token, composed from unpadded logits in float64 (arXiv 2607.02234, Eq. 12-17 and the JSD)."""
    student.eval()
    total, tokens = 0.0, 0

    def logits(prompt: list[int], completion: list[int]) -> torch.Tensor:
        found = student(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        return found.double().log_softmax(-1)

    for i, completion in enumerate(rows["completion"]):
        own = logits(rows["base"][i], completion)
        with student.disable_adapter():
            base, teacher, reference = (logits(rows[name][i], completion) for name in ("base", "teacher", "reference"))
        delta = (teacher - reference).double()
        delta = delta - delta.mean(-1, keepdim=True)
        q = (base + args.pmi_clip * (delta / args.pmi_clip).tanh() / args.pmi_beta).log_softmax(-1)
        m = torch.logaddexp(own + torch.tensor(1 - args.beta).log(), q + torch.tensor(args.beta).log())
        kl = args.beta * (q.exp() * (q - m)) + (1 - args.beta) * (own.exp() * (own - m))
        total, tokens = total + kl.sum().item(), tokens + len(completion)
    student.train()
    return total / tokens


@torch.no_grad()
def sampling_error(model: Any, prompts: list[list[int]]) -> float:
    """How far below the largest logit, relative to it, a greedily sampled token is by its row's own logits; the worst one."""
    model.eval()
    options = {"max_new_tokens": 6, "temperature": 0.0, "eos_token_id": [EOS], "pad_token_id": PAD}
    worst = 0.0
    for prompt, completion in zip(prompts, hf_generate(model, prompts, **options), strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(completion)[:, None])[:, 0]
        worst = max(worst, ((logits.amax(1) - chosen) / logits.abs().amax(1)).max().item())
    return worst


def with_lora(model: Any) -> Any:
    """LoRA on every plain linear layer but the head. Routers return tuples, grouped layers are no plain ones, and PEFT refuses
    some layers of Mamba.
    """
    head = model.get_output_embeddings()
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    modules = dict(model.named_modules())
    names = [
        name
        for name, x in modules.items()
        if isinstance(x, linear) and x is not head and not re.search("Router|Grouped", type(x).__name__)
    ]
    if any(name.endswith("conv1d") for name in modules):
        names = [name for name in names if not name.endswith("out_proj")]
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))


def judge(model_type: str, folder: str, overrides: dict[str, Any] | None = None) -> Result:
    """Build the architecture, train two steps, compare."""
    try:
        model = tiny_model(model_type, overrides)
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0].norm()
    except TimeoutError:
        raise
    except Exception as error:
        return Result("not built", _short(error))
    try:
        options = {
            "learning_rate": 1e-3,
            "max_steps": 2,
            "pmi_clip": 10.0,
            "diagnostics_steps": 0,
            "logging_strategy": "no",
        }
        trainer = build(folder, model=with_lora(model), rows=ROWS, cls=Judge, **options)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    except TimeoutError:
        raise
    except Exception as error:
        return Result("refused", _short(error))
    worst = max(trainer.errors)
    if not worst <= TOLERANCE or len(trainer.errors) != 2:
        return Result("silent", f"loss off by {worst:.2g} on the {trainer._side}")
    try:
        error = sampling_error(trainer.model, [trainer._prompts(problem_of(row)).question for row in ROWS])
    except TimeoutError:
        raise
    except Exception as error:
        return Result("refused", "in generation: " + _short(error))
    if not error <= TOLERANCE:
        return Result("silent", f"sampled tokens off by {error:.2g} of the largest logit")
    return Result(trainer._side, f"loss within {worst:.0e}, samples within {error:.0e}")


def _short(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
    return text if len(text) <= 260 else text[:257] + "…"


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def table(results: dict[str, Result]) -> str:
    """The page docs/architectures.md."""
    groups = (
        ("Trained exactly", ("left", "right"), "padding on the"),
        ("Refused", ("refused",), "why"),
        ("Silently wrong", ("silent",), "error"),
        ("Not tried: no tiny model was built", ("not built",), "why"),
    )
    count = {title: sum(r.outcome in kinds for r in results.values()) for title, kinds, _ in groups}
    lines = [
        "# Architectures",
        "",
        "Every causal language model that transformers "
        f"{transformers.__version__} registers was built tiny with random weights and trained for two steps with LoRA by the "
        f"TRL trainer in float32. The loss of each step was compared with the loss of the model's own logits, row by row and "
        f"without padding; at most {TOLERANCE:g} apart counts as exact. So were greedy completions of prompts of different "
        "lengths: each token is the likeliest by its row's own logits. Where padding on the left "
        "is seen, they are sampled one length of prompts at a time, and by RWKV one prompt at a time. "
        "Made by `python tests/architectures.py`.",
        "",
        "Sparse attention with an indexer (DeepSeek V3.2 and others) is tried with an `index_topk` above the prompts' length. "
        "Below it, equal scores of the indexer are told apart by their position, which padding moves.",
        "",
        "; ".join(f"{title.lower()}: {number}" for title, number in count.items()) + ".",
        "",
    ]
    for title, kinds, what in groups:
        rows = [(name, r) for name, r in sorted(results.items()) if r.outcome in kinds]
        if rows:
            exact = kinds[0] == "left"
            lines += [f"## {title}", "", f"| architecture | {what} |", "|---|---|"]
            lines += [f"| {name} | {r.outcome if exact else r.detail} |" for name, r in rows] + [""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types (all)")
    parser.add_argument("--output", type=Path, help="write the page here")
    parser.add_argument("--seconds", type=int, default=120, help="limit for each (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results: dict[str, Result] = {}
    for name in options.names or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                with limited(options.seconds):
                    results[name] = judge(name, folder)
            except TimeoutError as error:
                results[name] = Result("not built", _short(error))
        print(name, *results[name], flush=True)
        if options.output is not None:
            options.output.write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
