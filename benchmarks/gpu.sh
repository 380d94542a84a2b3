#!/usr/bin/env bash
# Every GPU record and every GPU benchmark, unattended, with time limits of less than nine minutes in all:
#
#     bash benchmarks/gpu.sh [--dry] [DIR]
#
# It needs JAX for CUDA and no network, and leaves DIR/STEP.json and DIR/summary.json (benchmarks/results).
# NANOGPT=a checkout has nanoGPT's steps timed beside ours; PYTHON and NANOGPT_PYTHON say with which Pythons.
# --dry, or GPU_DRY_RUN=1: all steps on the CPU with a tiny model, to see that they work; their numbers mean
# nothing, and go to build/gpu_dry_run.
set -u
here=$(dirname "${BASH_SOURCE[0]}")
python=${PYTHON:-python}
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} # this checkout, installed or not
options=()
if [ "${1:-}" = --dry ]; then
    GPU_DRY_RUN=1
    shift
fi
patience=1
if [ "${GPU_DRY_RUN:-0}" = 1 ]; then
    options+=(--dry)
    patience=4 # two busy cores are slower at starting four processes than a GPU machine
    out=${1:-$here/../build/gpu_dry_run}
else
    out=${1:-$here/results}
fi
if [ -n "${NANOGPT:-}" ]; then
    options+=(--nanogpt "$NANOGPT" --nanogpt_python "${NANOGPT_PYTHON:-$python}")
fi
mkdir -p "$out" || exit 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT

step() { # step NAME SECONDS: what fails, or takes longer, does not stop the others
    rm -f "$out/$1.json"
    timeout -k 3 $((patience * $2)) "$python" "$here/gpu.py" "$1" --out "$out" --work "$work" "${options[@]}"
}

step facts 20
step record_4 75
step record_3 105 # with the time to 1.39
step record_5 105
step sampling 30 # from the model of record_5
step determinism 65
step nanogpt_eager 25
step nanogpt_compiled 75
step summary 10
