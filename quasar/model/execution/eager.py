"""Eager execution of a model's passes, op by op. This executor runs every model, and the faster ones derive from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quasar.model.kv_cache import KVCache
from quasar.model.transformer import Transformer


class EagerExecutor:
    """Runs `Transformer.forward` on new rows after the cached context.

    Derived executors run passes of few rows with less work on the host. They use `eagerly` for larger passes.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._checksum = torch.zeros(())

    def __call__(
        self,
        tokens: Tensor,
        offsets: Tensor,
        block_mask: Tensor,
        start: int | None = None,
        layers: Sequence[int] | None = None,
        outputs: Tensor | slice = slice(None),
    ) -> Tensor:
        """Run a pass and return its logits [len(outputs), V]. The cache grows if the rows do not fit.

        The arguments are those of `Transformer.forward`. tokens, offsets: int64 [R]; block_mask: bool [R, R]; all of
        them are on the CPU.
        """
        return self.eagerly(tokens, offsets, block_mask, start, layers, outputs)

    @torch.inference_mode()
    def eagerly(
        self,
        tokens: Tensor,
        offsets: Tensor | None = None,
        block_mask: Tensor | None = None,
        start: int | None = None,
        layers: Sequence[int] | None = None,
        outputs: Tensor | slice = slice(None),
    ) -> Tensor:
        """Same as `__call__`, but always op by op. It is used for prompts and for passes with hooks on the layers."""
        start = self._cache.length if start is None else start
        self._cache.reserve(start - self._cache.length + len(tokens))
        device = self._model.device
        logits: Tensor = self._model(
            tokens.to(device),
            self._cache,
            start=start,
            offsets=None if offsets is None else offsets.to(device),
            block_mask=None if block_mask is None else block_mask.to(device),
            layers=layers,
            outputs=outputs,
        )
        self._checksum = checksum(logits)
        return logits

    def most_likely(self, rows: int) -> list[int] | None:
        """Return the argmax of each of the first ``rows`` rows of the last pass through all layers.

        Returns None if the executor has not computed it.
        """
        return None

    @property
    def last_was_finite(self) -> bool:
        """Whether no logit of the last pass is NaN or infinite.

        This does not wait for a CUDA graph. After a replay it is valid only once a result of the pass has been read.
        """
        return math.isfinite(self._checksum.item())


def checksum(logits: Tensor) -> Tensor:
    """Return the sum of the logits, float32, which is finite if and only if all logits are finite.

    The sum of finite logits does not overflow in float32. It takes a tenth of the time of a check of every logit.
    """
    return logits.sum(dtype=torch.float32)


@contextmanager
def running_layers(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list of the modules whose `forward` is running, the innermost last. An exception leaves it unchanged."""
    running: list[str] = []

    def entering(name: str) -> object:
        return lambda module, inputs: running.append(name)

    def leaving(module: nn.Module, inputs: object, output: object) -> None:
        running.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(entering(name)))
        hooks.append(module.register_forward_hook(leaving))
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()
