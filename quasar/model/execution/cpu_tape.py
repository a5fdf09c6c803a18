"""Verification passes on a CPU as a tape: kernel calls that are recorded once and then replayed in a single call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from quasar_kernels.cpu import Library, NotRecordableError, Tape
from torch import Tensor

from quasar.model.execution.eager import EagerExecutor, checksum, running_layers
from quasar.model.kv_cache import KVCache
from quasar.model.transformer import ResidualStream, Rows, Transformer

MAX_ROWS = 64


class CpuTapeExecutor(EagerExecutor):
    """Runs the decoder blocks of a bfloat16 model in one call of the compiled library.

    The results are bit for bit the same as in eager execution. Raises NotRecordableError, which names the layer and the
    operation, if a layer does anything other than calling the library.
    """

    def __init__(self, model: Transformer, cache: KVCache, library: Library) -> None:
        super().__init__(model, cache)
        self._library = library
        # A tape is recorded with the largest block, whose rows must fit into the cache.
        cache.reserve(MAX_ROWS)
        head_dim = model.config.head_dim
        self._embedded = torch.zeros(MAX_ROWS, model.config.hidden_size, dtype=model.dtype)
        self._rows = Rows(
            tuple(
                (torch.zeros(MAX_ROWS, head_dim), torch.zeros(MAX_ROWS, head_dim))
                for _ in range(len(model.ropes.ropes))
            ),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(MAX_ROWS, MAX_ROWS, dtype=torch.bool),
        )
        self._rotations = model.ropes(torch.arange(cache.capacity))
        self._tapes: dict[tuple[int, ...] | None, Tape] = {}
        self._recorded_for = self._surroundings()
        self._tape(None)

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
        count = len(tokens)
        if count > MAX_ROWS:
            return self.eagerly(tokens, offsets, block_mask, start, layers, outputs)
        start = self._cache.length if start is None else start
        self._cache.reserve(start - self._cache.length + count)
        self._embedded[:count] = self._model.embed(tokens)
        positions = offsets + start
        if self._cache.capacity > len(self._rotations[0][0]):
            self._rotations = self._model.ropes(torch.arange(self._cache.capacity))
        for buffers, known in zip(self._rows.rotations, self._rotations, strict=True):
            for buffer, table in zip(buffers, known, strict=True):
                torch.index_select(table, 0, positions, out=buffer[:count])
        self._rows.start[0] = start
        self._rows.mask.view(-1)[: count * count].view(count, count).copy_(block_mask)
        logits = self.run_kernels(count, layers, outputs)
        self._checksum = checksum(logits)
        return logits

    @torch.inference_mode()
    def run_kernels(
        self, count: int, layers: Sequence[int] | None = None, outputs: Tensor | slice = slice(None)
    ) -> Tensor:
        """Run the pass on the contents of the buffers. The other work of `__call__` is overhead."""
        if (surroundings := self._surroundings()) != self._recorded_for:
            self._tapes.clear()
            self._recorded_for = surroundings
        tape = self._tape(None if layers is None else tuple(layers))
        tape.replay(count)
        return self._model.head(ResidualStream(*(part[:count] for part in tape.results)), outputs)

    def _surroundings(self) -> tuple[int, int, int]:
        """Return the values that a tape depends on: the addresses of the cache and the number of threads."""
        return self._cache.keys[0].data_ptr(), self._cache.values[0].data_ptr(), torch.get_num_threads()

    @torch.inference_mode()
    def _tape(self, layers: tuple[int, ...] | None) -> Tape:
        if layers not in self._tapes:
            slots = self._cache.slots()

            def run() -> tuple[Tensor, ...]:
                stream = self._model.run_blocks(self._embedded, self._rows, slots, layers)
                return (stream.value,) if stream.update is None else (stream.value, stream.update)

            with running_layers(self._model) as running:
                try:
                    self._tapes[layers] = Tape(self._library, MAX_ROWS, run)
                except NotRecordableError as error:
                    raise NotRecordableError(f"{error} in {running[-1]}") from None
        return self._tapes[layers]
