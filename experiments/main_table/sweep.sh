#!/usr/bin/env bash
# Prompt lookup with every verifier, timed: experiments/main_table/sweep.sh PROMPTS OUTPUT [override ...]
# PROMPTS: a folder of Spec-Bench JSONL files. Killed or failed, the same command goes on where it was.
set -euo pipefail
prompts=$(realpath "$1")
output=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/../.."

sweep() {
    local part=$1
    shift
    "${PYTHON:-python}" run.py -m experiment=main_table "data.path=$prompts" "hydra.sweep.dir=$output/$part" resume=true "$@"
}

sweep plain verifier=fp16,int8,int4,pruned "$@"
sweep int8-head verifier=int8 verifier.lm_head_bits=8 "$@"
sweep int4-inputs verifier=int4 verifier.activation_bits=8 verifier.lm_head_bits=16,8 "$@"
"${PYTHON:-python}" experiments/main_table/table.py "$output"
