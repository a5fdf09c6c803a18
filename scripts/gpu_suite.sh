#!/usr/bin/env bash
# Check and time the GPU kernels and whole verification passes; needs torch, triton, transformers, numpy,
# safetensors and matplotlib only. Usage: scripts/gpu_suite.sh OUTPUT_FOLDER [--smollm2 FOLDER] [options]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m scripts.gpu_suite "$@"
