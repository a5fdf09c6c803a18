"""Verification passes as CUDA graphs: one per size of block, replayed with new contents of the same buffers.

Launching the ten kernels of a layer one by one takes the host longer than the GPU takes to run them. A block is
padded to the next size for which there is a graph; the rows it is padded with see themselves alone and nobody
sees them.
"""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quasar.model.execution.eager import EagerExecutor, checksum, running_layers
from quasar.model.kv_cache import KVCache
from quasar.model.transformer import Transformer

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Rows of a block for which graphs are captured; the kernels compute any of 1 to 16 rows in the same time."""
WARM_UP_PASSES = 2


class CudaGraphExecutor(EagerExecutor):
    """Runs the passes of a model as captured graphs where the device is a GPU.

    A pass that cannot be captured is run op by op from then on, after a warning that says why.
    """

    def __init__(self, model: Transformer, cache: KVCache, capture: bool | None = None) -> None:
        super().__init__(model, cache)
        self._capture = model.device.type == "cuda" if capture is None else capture
        self._inputs: dict[int, PassInputs] = {}
        self._graphs: dict[tuple[int, tuple[int, ...] | None], CapturedPass] = {}
        self._addresses = self._cache_addresses()
        pinned = model.device.type == "cuda"
        self._checksum_on_host = torch.zeros((), dtype=torch.float32, pin_memory=pinned)
        self._most_likely_on_host = torch.zeros(BUCKETS[-1], dtype=torch.int64, pin_memory=pinned)
        self._knows_most_likely = False

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
        """See `EagerExecutor`. Makes room in the cache for the padded block, whose rows it writes."""
        rows = len(tokens)
        if layers is None:
            self._knows_most_likely = rows <= BUCKETS[-1]
        if rows > BUCKETS[-1]:
            return self.eagerly(tokens, offsets, block_mask, start, layers, outputs)
        bucket = bucket_for(rows)
        start = self._cache.length if start is None else start
        self._cache.reserve(start - self._cache.length + bucket)
        if (addresses := self._cache_addresses()) != self._addresses:
            # The cache has moved: the graphs would write to where it was.
            self._graphs.clear()
            self._addresses = addresses
        if bucket not in self._inputs:
            self._inputs[bucket] = PassInputs(bucket, self._model.device)
        inputs = self._inputs[bucket]
        inputs.fill(tokens, start, offsets, block_mask)
        key = (bucket, None if layers is None else tuple(layers))
        if self._capture and key not in self._graphs:
            self._try_to_capture(key, inputs)
        self._checksum = self._checksum_on_host
        graph = self._graphs.get(key)
        if graph is None:
            return self._run(inputs, key[1])[:rows][outputs]
        graph.graph.replay()
        # The next replay writes over the graph's own logits.
        logits = graph.logits[:rows][outputs]
        return logits.clone() if isinstance(outputs, slice) else logits

    def graph_of(self, rows: int) -> torch.cuda.CUDAGraph | None:
        """The graph that passes of ``rows`` rows through all layers replay, or None where there is none (yet)."""
        captured = self._graphs.get((bucket_for(rows), None))
        return None if captured is None else captured.graph

    def most_likely(self, rows: int) -> list[int] | None:
        """See `EagerExecutor`: found by the graph itself, which leaves them in the host's memory."""
        if not self._knows_most_likely:
            return None
        if self._model.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        found: list[int] = self._most_likely_on_host[:rows].tolist()
        return found

    def _run(self, inputs: PassInputs, layers: tuple[int, ...] | None) -> Tensor:
        logits: Tensor = self._model(
            inputs.tokens,
            self._cache,
            start=inputs.start,
            offsets=inputs.offsets,
            block_mask=inputs.block_mask,
            layers=layers,
        )
        # The host looks at these when it likes.
        self._checksum_on_host.copy_(checksum(logits), non_blocking=True)
        if layers is None:
            self._most_likely_on_host[: inputs.bucket].copy_(logits.max(-1).indices, non_blocking=True)
        return logits

    def _try_to_capture(self, key: tuple[int, tuple[int, ...] | None], inputs: PassInputs) -> None:
        with running_layers(self._model) as running:
            try:
                self._graphs[key] = capture(lambda: self._run(inputs, key[1]))
                return
            except RuntimeError as error:
                reason = str(error).strip().split("\n", 1)[0]
        self._capture = False
        self._graphs.clear()
        where = f" in {running[-1]}" if running and running[-1] else ""
        warnings.warn(
            f"verification runs op by op and slower: capturing a pass of {key[0]} rows as a CUDA graph failed{where} "
            f"({reason})",
            RuntimeWarning,
            stacklevel=3,
        )

    def _cache_addresses(self) -> tuple[int, int]:
        return self._cache.keys[0].data_ptr(), self._cache.values[0].data_ptr()


class PassInputs:
    """What varies from pass to pass, in one buffer: filled on the host, copied to the device in one piece.

    start: int64 [1]; tokens, offsets: int64 [B]; block_mask: int64 [B, B]; all views of the buffer on the device
    """

    def __init__(self, bucket: int, device: torch.device) -> None:
        self.bucket = bucket
        size = 1 + 2 * bucket + bucket * bucket
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        self.start, self.tokens, self.offsets, self.block_mask = self._views(self._device)
        self._host_views = self._views(self._host)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, tokens: Tensor, start: int, offsets: Tensor, block_mask: Tensor) -> None:
        """Take over a block, padded to the bucket.

        Waits for the last block's copy, which has ended long ago where somebody read the results of its pass.
        """
        if self._copied is not None:
            self._copied.synchronize()
        rows = len(tokens)
        host_start, host_tokens, host_offsets, host_mask = self._host_views
        host_start[0] = start
        host_tokens.zero_()[:rows] = tokens
        host_offsets.zero_()[:rows] = offsets
        host_mask.zero_().fill_diagonal_(1)
        host_mask[:rows, :rows] = block_mask
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _views(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        bucket = self.bucket
        start, tokens, offsets, mask = buffer.split([1, bucket, bucket, bucket * bucket])
        return start, tokens, offsets, mask.view(bucket, bucket)


@dataclass(frozen=True)
class CapturedPass:
    """A graph and the buffer into which it writes its logits, [B, V]."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor


def bucket_for(rows: int) -> int:
    """The smallest bucket that holds ``rows``. Raises ValueError beyond the largest."""
    index = bisect.bisect_left(BUCKETS, rows)
    if index == len(BUCKETS):
        raise ValueError(f"a block of {rows} rows is larger than the largest graph's {BUCKETS[-1]}")
    return BUCKETS[index]


def capture(run: Callable[[], Tensor]) -> CapturedPass:
    """Capture a call that returns logits, after first calls that compile and allocate."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_PASSES):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run()
    return CapturedPass(graph, logits)
