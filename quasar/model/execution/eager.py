"""A model's passes over its cache, op by op: the executor that runs every model, and the base of the faster ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quasar.model.kv_cache import KVCache
from quasar.model.transformer import Transformer


class EagerExecutor:
    """Runs `Transformer.forward` over blocks of rows behind what the cache holds.

    Executors that derive from it run short blocks with less work for the host, and leave longer ones to `eagerly`.
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
        """Logits [len(outputs), V] of a block; arguments as in `Transformer.forward`.

        tokens, offsets: int64 [R]; block_mask: bool [R, R]; all on the CPU. Makes room for the block in the cache.
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
        """As a call, op by op whatever the executor: for prompts, and where the layers are watched."""
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
        """The first maximum of the logits of each of the first ``rows`` rows of the last pass through all layers; None
        if the executor does not look for it."""
        return None

    @property
    def last_was_finite(self) -> bool:
        """Whether no logit of the last pass is NaN or infinite.

        Does not wait for a CUDA graph: after one it is valid once a result of the pass was read.
        """
        return math.isfinite(self._checksum.item())


def checksum(logits: Tensor) -> Tensor:
    """A number that is finite if all logits are: NaN and infinity survive a sum, which finite logits cannot overflow.

    A sum takes a tenth of the time that looking at every logit does.
    """
    return logits.sum(dtype=torch.float32)


@contextmanager
def running_layers(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose `forward` runs, the innermost last. An exception leaves them as they were."""
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
