"""Verification passes on a CPU as a recorded sequence of kernel calls, made again in one with new contents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from quasar_kernels.cpu import Library, NotRecordableError, Tape, backend
from torch import Tensor

from quasar.model.fused import fused_blocks
from quasar.model.kv_cache import KVCache
from quasar.model.transformer import Transformer

MAX_ROWS = 64


class RecordedPasses:
    """The passes of a model over its cache, through the same layers each as one call of the compiled library.

    Computes what `Transformer.forward` computes, bit for bit.
    """

    def __init__(self, model: Transformer, cache: KVCache, library: Library) -> None:
        self._model, self._cache, self._library = model, cache, library
        head_dim = model.config.head_dim
        self._residual = torch.zeros(MAX_ROWS, model.config.hidden_size, dtype=model.dtype)
        self._rotation = torch.zeros(MAX_ROWS, head_dim), torch.zeros(MAX_ROWS, head_dim)
        self._rotations = model.rope(torch.arange(cache.capacity))
        self._start = torch.zeros(1, dtype=torch.int64)
        self._mask = torch.zeros(MAX_ROWS, MAX_ROWS, dtype=torch.bool)
        self._tapes: dict[tuple[int, ...] | None, Tape] = {}
        self._recorded_for = self._surroundings()
        self._checksum = torch.zeros(())

    @staticmethod
    def of(model: Transformer, cache: KVCache) -> RecordedPasses | None:
        """The passes of a model of which every operation has a kernel, else None."""
        library = backend()
        if library is None or model.dtype != torch.bfloat16 or model.device.type != "cpu":
            return None
        passes = RecordedPasses(model, cache, library)
        try:
            passes._tape(None)
        except NotRecordableError:
            return None
        return passes

    @torch.inference_mode()
    def __call__(
        self,
        tokens: Tensor,
        offsets: Tensor,
        block_mask: Tensor,
        start: int | None = None,
        layers: Sequence[int] | None = None,
        outputs: Tensor | slice = slice(None),
    ) -> Tensor:
        """See `Passes`."""
        rows = len(tokens)
        start = self._cache.length if start is None else start
        self._cache.reserve(start - self._cache.length + rows)
        self._residual[:rows] = self._model.embedding(tokens)
        positions = offsets + start
        if self._cache.capacity > len(self._rotations[0]):
            self._rotations = self._model.rope(torch.arange(self._cache.capacity))
        for buffer, known in zip(self._rotation, self._rotations, strict=True):
            torch.index_select(known, 0, positions, out=buffer[:rows])
        self._start[0] = start
        self._mask.view(-1)[: rows * rows].view(rows, rows).copy_(block_mask)
        logits = self.run_kernels(rows, layers, outputs)
        self._checksum = logits.sum(dtype=torch.float32)
        return logits

    @torch.inference_mode()
    def run_kernels(
        self, rows: int, layers: Sequence[int] | None = None, outputs: Tensor | slice = slice(None)
    ) -> Tensor:
        """The pass over what the buffers hold; what a call takes beyond this is overhead."""
        if (surroundings := self._surroundings()) != self._recorded_for:
            self._tapes.clear()
            self._recorded_for = surroundings
        tape = self._tape(None if layers is None else tuple(layers))
        tape.replay(rows)
        residual, *update = (part[:rows][outputs] for part in tape.results)
        logits: Tensor = self._model.lm_head(self._model.norm(residual + update[0] if update else residual))
        return logits

    def most_likely(self, rows: int) -> list[int] | None:
        """See `Passes`. On a CPU it makes no difference who looks for them."""
        return None

    @property
    def last_was_finite(self) -> bool:
        """See `Passes`. NaN and infinity survive a sum, which finite logits cannot overflow."""
        return bool(self._checksum.isfinite())

    def _surroundings(self) -> tuple[int, int, int]:
        """What a tape holds that may change: where the cache is, and how many threads share the work."""
        return self._cache.keys[0].data_ptr(), self._cache.values[0].data_ptr(), torch.get_num_threads()

    @torch.inference_mode()
    def _tape(self, layers: tuple[int, ...] | None) -> Tape:
        if layers not in self._tapes:
            slots = self._cache.keys, self._cache.values, self._start

            def run() -> tuple[Tensor, ...]:
                residual, update = fused_blocks(self._model, self._residual, self._rotation, slots, self._mask, layers)
                return (residual,) if update is None else (residual, update)

            self._tapes[layers] = Tape(self._library, MAX_ROWS, run)
        return self._tapes[layers]
