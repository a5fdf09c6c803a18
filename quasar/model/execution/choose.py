"""Chooses the executor that runs a model's passes."""

from __future__ import annotations

import warnings

import torch
from quasar_kernels.cpu import NotRecordableError, backend
from quasar_kernels.gpu import has_gpu_kernels

from quasar.model.execution.cpu_tape import CpuTapeExecutor
from quasar.model.execution.cuda_graph import CudaGraphExecutor
from quasar.model.execution.eager import EagerExecutor
from quasar.model.kv_cache import KVCache
from quasar.model.linear import QuantizedLinear
from quasar.model.transformer import Transformer


def executor_for(model: Transformer, cache: KVCache) -> EagerExecutor:
    """Return an executor: CUDA graphs on a GPU, a tape of kernel calls on a CPU, else eager execution.

    Execution is eager if there are no kernels for the dtype. Float32 always uses PyTorch's operations, because it is
    the dtype for exact comparisons. So is the emulation of a format that a CPU has no instructions for, which cannot be
    recorded. Warns and names the layer if there are kernels, but a layer cannot be recorded.
    """
    if model.dtype != torch.float32 and has_gpu_kernels(model.norm.weight):
        return CudaGraphExecutor(model, cache)
    emulated = any(isinstance(module, QuantizedLinear) and module.emulated for module in model.modules())
    if emulated and model.device.type == "cpu":
        return EagerExecutor(model, cache)
    if model.device.type == "cpu" and model.dtype == torch.bfloat16 and (library := backend()) is not None:
        try:
            return CpuTapeExecutor(model, cache, library)
        except NotRecordableError as error:
            warnings.warn(
                f"verification runs op by op and slower: its kernel calls cannot be recorded ({error})",
                RuntimeWarning,
                stacklevel=2,
            )
    return EagerExecutor(model, cache)
