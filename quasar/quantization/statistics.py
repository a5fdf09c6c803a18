"""Calibration statistics of the inputs of every linear layer, computed once on calibration text and cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quasar.cache import Store
from quasar.errors import QuasarError
from quasar.model.transformer import Transformer

# Rows of inputs that are kept per layer. Searches over smoothing, scaling and clipping measure the error on them.
SAMPLE_ROWS = 256

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LinearStatistics:
    """Statistics of the inputs x of one linear layer over all calibration tokens, float32 [K] each.

    absmax, mean_absolute: maximum and mean of |x|
    mean, mean_square: means of x and x²
    samples: float32 [S, K], rows of x drawn at random
    """

    absmax: Tensor
    mean_absolute: Tensor
    mean: Tensor
    mean_square: Tensor
    samples: Tensor


Statistics = dict[str, LinearStatistics]
"""Calibration statistics by the name of the linear layer, such as ``blocks.3.mlp.down``."""


@dataclass(frozen=True)
class Calibration:
    """Calibration text as token ids.

    sequences: int64 tensors [R] of at least one token
    key: cache key of model and text; runs with equal keys, dtypes and devices share statistics
    seed: seed of the random samples
    """

    sequences: Sequence[Tensor]
    key: dict[str, str | int]
    seed: int = 0

    def statistics(self, model: Transformer, progress: Progress) -> Statistics:
        """Return the calibration statistics of the unquantized ``model``, from the cache if they are there."""
        key = {**self.key, "rows": SAMPLE_ROWS, "seed": self.seed}
        make = partial(collect, model, self.sequences, self.seed, progress)
        return STORE.get(key, model.device, model.dtype, make)


@torch.inference_mode()
def collect(model: Transformer, sequences: Sequence[Tensor], seed: int, progress: Progress) -> Statistics:
    """Run every sequence through the model and collect statistics of the inputs of its decoder blocks' linear layers.

    Raises QuasarError, which names the layer, if an input is not finite.
    """
    total = sum(len(sequence) for sequence in sequences)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:SAMPLE_ROWS].sort().values
    watchers = {
        name: _Watcher(name, module.in_features, len(chosen))
        for name, module in model.blocks.named_modules(prefix="blocks")
        if isinstance(module, nn.Linear)
    }
    hooks = [model.get_submodule(name).register_forward_pre_hook(watcher) for name, watcher in watchers.items()]
    first = 0
    try:
        for done, sequence in enumerate(sequences):
            progress(done, len(sequences))
            rows = chosen[(chosen >= first) & (chosen < first + len(sequence))] - first
            for watcher in watchers.values():
                watcher.sampled_rows = rows
            model(sequence.to(model.device), outputs=slice(-1, None))
            first += len(sequence)
        progress(len(sequences), len(sequences))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: watcher.statistics(total) for name, watcher in watchers.items()}


class _Watcher:
    """A forward pre-hook that accumulates the statistics of one layer's inputs."""

    def __init__(self, name: str, width: int, samples: int) -> None:
        self._name = name
        self._absmax, self._absolute, self._sum = torch.zeros(width), torch.zeros(width), torch.zeros(width)
        self._square = torch.zeros(width)
        self._samples: list[Tensor] = []
        self.sampled_rows = torch.empty(0, dtype=torch.int64)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float().cpu()
        if not x.isfinite().all():
            raise QuasarError(f"{self._name}: its input on calibration text is NaN or infinite; the model is broken")
        self._absmax = torch.maximum(self._absmax, x.abs().amax(0))
        self._absolute += x.abs().sum(0)
        self._sum += x.sum(0)
        self._square += x.square().sum(0)
        self._samples.append(x[self.sampled_rows])

    def statistics(self, tokens: int) -> LinearStatistics:
        return LinearStatistics(
            self._absmax,
            self._absolute / tokens,
            self._sum / tokens,
            self._square / tokens,
            torch.cat(self._samples),
        )


_FIELDS = tuple(LinearStatistics.__dataclass_fields__)


def _save(statistics: Statistics, file: Path) -> None:
    tensors = {f"{name}/{field}": getattr(of, field) for name, of in statistics.items() for field in _FIELDS}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def _load(file: Path) -> Statistics:
    tensors = load_file(file)
    names = dict.fromkeys(name.rsplit("/", 1)[0] for name in tensors)
    return {name: LinearStatistics(*(tensors[f"{name}/{field}"] for field in _FIELDS)) for name in names}


STORE = Store("calibration", ".safetensors", _save, _load)
