#!/usr/bin/env bash
# Check and time the GPU kernels and whole verification passes; needs torch, triton, transformers, numpy,
# safetensors and matplotlib only. Usage: scripts/gpu_suite.sh OUTPUT_FOLDER [--smollm2 FOLDER] [options]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"

# An illegal access of a kernel makes the device unusable for its process (exit code 75) or ends the process. Another
# process then continues with the remaining sections.
resume=()
for _ in 1 2 3 4 5 6; do
    code=0
    "${PYTHON:-python3}" -m scripts.gpu_suite "$@" "${resume[@]}" || code=$?
    case $code in
        75 | 134 | 135 | 136 | 139) resume=(--resume) ;;
        *) break ;;
    esac
done
exit "$code"
