#!/usr/bin/env bash
# Every drafter with every verifier in float32 against that verifier's own autoregressive output:
# experiments/exactness/sweep.sh OUTPUT [override ...]. Killed or failed, the same command goes on where it was.
set -euo pipefail
output=$(realpath -m "$1")
shift
cd "$(dirname "$0")/../.."
"${PYTHON:-python}" run.py -m name=exactness "hydra.sweep.dir=$output" resume=true \
    verifier=fp16,int8,int4,pruned drafter=none,ngram,lookahead,layerskip verifier.dtype=float32 \
    data.limit=null decode.max_new_tokens=16 evaluate.fidelity=false evaluate.exactness=true "$@"
"${PYTHON:-python}" experiments/exactness/table.py "$output"
