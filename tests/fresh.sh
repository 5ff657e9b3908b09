#!/usr/bin/env bash
# What a new user installs: wheel and source distribution, with the oldest and the newest packages that popsd allows, each in a
# new environment and away from the clone. Runs `popsd doctor` and every Python block of the documents there.
#
#   tests/fresh.sh [oldest|newest ...]        FRESH=folder keeps the environments; PIP_EXTRA_INDEX_URL names CPU builds of torch
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=${FRESH:-$(mktemp -d)}
mkdir -p "$work"
[ -n "${FRESH:-}" ] || trap 'rm -rf "$work"' EXIT

# The lower bounds of pyproject.toml. A CUDA build of torch brings the Triton it needs; 2.11 is the first with 3.6.
oldest=(torch==2.8.0 transformers==5.0.0 trl==1.12.0 peft==0.19.0 accelerate==1.12.0 datasets==4.7.0 math-verify==0.8.0 matplotlib==3.9.0)
newest=(triton)

"$python" -m venv "$work/build"
"$work/build/bin/pip" install -q build
rm -rf "$work/source" "$work/dist"
git -C "$root" archive --prefix=source/ HEAD | tar -x -C "$work"
"$work/build/bin/python" -m build -q --outdir "$work/dist" "$work/source"

try() { # name, distribution, packages
    local name=$1 distribution=$2 bin=$work/$1/bin
    shift 2
    echo "== $name: $(basename "$distribution") with $*"
    "$python" -m venv "$work/$name"
    "$bin/pip" install -q "$distribution[trl,eval,plots]" "$@" pytest
    "$bin/pip" check
    mkdir -p "$work/away-$name"
    cp -r "$root"/{tests,examples,docs,README.md} "$work/away-$name"
    cd "$work/away-$name"
    "$bin/popsd" doctor || [ "$name" = oldest ] # whose torch brings a Triton that is older than the kernels need
    "$bin/python" -m pytest -q -o pythonpath=tests --import-mode=importlib -p no:cacheprovider -k python_blocks tests/test_docs.py
}

[ $# -gt 0 ] || set -- oldest newest
for name in "$@"; do
    case $name in
    oldest) try oldest "$(echo "$work"/dist/*.whl)" "${oldest[@]}" ;;
    newest) try newest "$(echo "$work"/dist/*.tar.gz)" "${newest[@]}" ;;
    *) echo "fresh.sh: expected oldest or newest; got $name" >&2; exit 2 ;;
    esac
done
