#!/usr/bin/env bash
# Every verifier's fidelity on Spec-Bench prompts: experiments/fidelity/sweep.sh PROMPTS OUTPUT [override ...]
# PROMPTS: a folder of Spec-Bench JSONL files. Killed or failed, the same command goes on where it was.
set -euo pipefail
prompts=$(realpath "$1")
output=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/../.."

sweep() {
    local part=$1
    shift
    "${PYTHON:-python}" run.py -m experiment=fidelity "data.path=$prompts" "hydra.sweep.dir=$output/$part" resume=true "$@"
}

sweep dense verifier=fp16 "$@"
sweep int8 verifier=int8 verifier.method=rtn,smoothquant "$@"
sweep int8-alpha verifier=int8 verifier.alpha=0.5,0.8 "$@"
sweep int8-head verifier=int8 verifier.lm_head_bits=8 "$@"
sweep int4 verifier=int4 verifier.method=rtn,awq,gptq verifier.symmetric=true,false "$@"
sweep int4-unclipped verifier=int4 verifier.method=rtn verifier.clip=false "$@"
sweep int4-groups verifier=int4 verifier.group_size=32,96 "$@"
sweep int4-a8 verifier=int4 verifier.activation_bits=8 verifier.lm_head_bits=16,8 "$@"
sweep width verifier=pruned verifier.importance=flap,wanda,taylor,magnitude verifier.ratio=0.05,0.1,0.25,0.5 "$@"
sweep width-heads verifier=pruned verifier.heads=true verifier.ratio=0.1,0.25 "$@"
sweep depth verifier=pruned verifier.method=depth verifier.selection=block_influence,angular,deepest \
    verifier.ratio=0.05,0.1,0.25,0.5 "$@"
sweep bitsandbytes verifier=bnb_int8,bnb_nf4,bnb_fp4 "$@"
"${PYTHON:-python}" experiments/fidelity/table.py "$output"
