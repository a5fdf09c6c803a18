"""Verification passes as CUDA graphs: one graph per number of rows, replayed with new contents of the same buffers.

The host takes longer to launch the ten kernels of a layer one by one than the GPU takes to run them. The rows of a pass
are padded to the next number of rows that has a graph. A padding row attends only to itself, and no other row attends
to it.
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
"""Numbers of rows that graphs are captured for. The kernels take the same time for 1 to 16 rows."""
WARM_UP_PASSES = 2


class CudaGraphExecutor(EagerExecutor):
    """Runs the passes of a model as captured graphs on a GPU.

    If a capture fails, all passes run eagerly from then on, and a warning gives the reason.
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
        """See `EagerExecutor`. Reserves cache slots for padding rows too, because their keys and values are written."""
        rows = len(tokens)
        if layers is None:
            self._knows_most_likely = rows <= BUCKETS[-1]
        if rows > BUCKETS[-1]:
            return self.eagerly(tokens, offsets, block_mask, start, layers, outputs)
        bucket = bucket_for(rows)
        start = self._cache.length if start is None else start
        self._cache.reserve(start - self._cache.length + bucket)
        if (addresses := self._cache_addresses()) != self._addresses:
            # The cache has been reallocated, and the graphs would write to its old memory.
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
        # The next replay overwrites the logits of the graph.
        logits = graph.logits[:rows][outputs]
        return logits.clone() if isinstance(outputs, slice) else logits

    def graph_of(self, rows: int) -> torch.cuda.CUDAGraph | None:
        """Return the graph for passes of ``rows`` rows through all layers; None if it has not been captured."""
        captured = self._graphs.get((bucket_for(rows), None))
        return None if captured is None else captured.graph

    def most_likely(self, rows: int) -> list[int] | None:
        """See `EagerExecutor`. The graph computes the argmaxes and copies them to host memory."""
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
        # The host reads these copies only when it needs them.
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
    """The inputs of a pass in one buffer, which is filled on the host and copied to the device at once.

    start: int64 [1]; tokens, offsets: int64 [B]; block_mask: int64 [B, B]; all are views of the buffer on the device
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
        """Copy the inputs of a pass, padded to the bucket.

        Waits for the copy of the previous pass, which is finished if a result of that pass has been read.
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
    """A graph and the buffer that it writes its logits to, [B, V]."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor


def bucket_for(rows: int) -> int:
    """Return the smallest bucket of at least ``rows`` rows. Raises ValueError if the largest bucket is too small."""
    index = bisect.bisect_left(BUCKETS, rows)
    if index == len(BUCKETS):
        raise ValueError(f"a pass of {rows} rows is larger than the largest graph, which has {BUCKETS[-1]} rows")
    return BUCKETS[index]


def capture(run: Callable[[], Tensor]) -> CapturedPass:
    """Capture a call that returns logits. Before that, call it a few times so that it compiles and allocates."""
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
