#!/usr/bin/env bash
# From a model and data to both tables: accuracy and markers of the base, OPSD and the purified target at every checkpoint.
#   examples/reproduce/reproduce.sh opsd                         OPSD's public setting
#   DATA=name-or-folder examples/reproduce/reproduce.sh paper    the setting of Purified OPSD
#   examples/reproduce/reproduce.sh --dry opsd                   all of it with a tiny model, on a CPU and without network
# Killed at any moment, the same command goes on. README.md has the variables, the GPU hours and what is not known.
set -euo pipefail

usage="usage: reproduce.sh [--dry] opsd|paper"
dry=false
if [[ ${1-} == --dry ]]; then dry=true && shift; fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
setting=${1:?$usage}
config=$here/$setting.yaml
[[ -f $config ]] || { echo "setting: expected opsd or paper; got '$setting'. $usage" >&2 && exit 2; }
gpus=${GPUS:-1}
[[ $gpus =~ ^[1248]$ ]] || { echo "GPUS: expected 1, 2, 4 or 8; got '$gpus'." >&2 && exit 2; }
runs=${RUNS:-runs/reproduce/$setting}
read -ra targets <<<"${TARGETS:-opsd purified}"
read -ra benchmarks <<<"${BENCHMARKS:-aime24 aime25 hmmt25}"
model=${MODEL:-$(sed -n 's/^model_name_or_path: *//p' "$config")}
train=(--config "$config" --gradient_accumulation_steps $((8 / gpus)))
evaluate=(--num_generations 12 --temperature 1.0 --top_p 0.95 --top_k 0 --max_completion_length 38912)
evaluate+=(--chat_template_kwargs '{"enable_thinking": true}')
evaluate+=(--use_vllm --model_init_kwargs "{\"tensor_parallel_size\": $gpus}")
start=(python)
if ((gpus > 1)); then
    start=(accelerate launch --config_file "$here/../accelerate/ddp.yaml" --num_processes "$gpus")
fi
if $dry; then
    runs=${RUNS:-runs/reproduce/$setting-dry} && mkdir -p "$runs"
    model=$runs/tiny/model benchmarks=("$runs/tiny/problems.jsonl") DATA=$runs/tiny/data
    [[ -d $model ]] || python "$here/tiny.py" "$runs/tiny"
    train=(--config "$config" --max_steps 2 --save_steps 1 --max_completion_length 8 --vocab_size 261)
    train+=(--per_device_train_batch_size 1 --gradient_accumulation_steps 2 --use_cpu true --bf16 false --dtype float32)
    evaluate+=(--num_generations 2 --max_completion_length 8 --eval_scorer operator:contains --use_vllm false --model_init_kwargs '{}')
fi
train+=(--model_name_or_path "$model")
if [[ -n ${DATA-} ]]; then train+=(--dataset_name "$DATA"); fi
evaluate+=(--model_name_or_path "$model" --benchmarks "${benchmarks[@]}" --output_dir "$runs/evaluation")
popsd() { python -m popsd_integrations.cli "$@"; }
judge() { "${EVALUATE_PYTHON:-python}" -m popsd_integrations.cli evaluate "${evaluate[@]}" "$@"; }

# The prompts, the memory, and how many problems the length limit drops.
popsd train "${train[@]}" --dry_run true
# The base first: what the evaluation needs is missed now and not after hours of training.
judge
trained=()
for target in "${targets[@]}"; do
    trained+=("$target=$runs/$target")
    [[ -f $runs/$target/adapter_model.safetensors ]] && continue # written at the end
    "${start[@]}" -m popsd_integrations.cli train "${train[@]}" --loss_target "$target" --output_dir "$runs/$target"
done
judge --adapters "${trained[@]}"
popsd compare "${trained[@]}" "evaluation=$runs/evaluation" --output_dir "$runs/compare"
