"""Passes over a block of rows that cost the host next to nothing, where device and model have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from quasar.model.execution.cpu_tape import RecordedPasses
from quasar.model.execution.cuda_graph import BUCKETS, BlockPasses, can_fuse
from quasar.model.kv_cache import KVCache
from quasar.model.transformer import Transformer

MAX_ROWS = BUCKETS[-1]
"""Rows of the largest block; longer ones are prompts, where the host's work is lost in the device's."""


class Passes(Protocol):
    """The passes of one model over one cache."""

    def __call__(
        self,
        tokens: Tensor,
        offsets: Tensor,
        block_mask: Tensor,
        start: int | None = None,
        layers: Sequence[int] | None = None,
        outputs: Tensor | slice = slice(None),
    ) -> Tensor:
        """Logits of a block of at most `MAX_ROWS` rows, as `Transformer.forward`; its tensors are on the CPU.

        Makes room in the cache for the block.
        """
        ...

    def most_likely(self, rows: int) -> list[int] | None:
        """The first maximum of the logits of each of the first ``rows`` rows of the last pass through all layers;
        None where the passes do not look for it."""
        ...

    @property
    def last_was_finite(self) -> bool:
        """Whether no logit of the last pass is NaN or infinite; valid once a result of the pass was read."""
        ...


def passes_for(model: Transformer, cache: KVCache) -> Passes | None:
    """CUDA graphs on a GPU, recorded calls of the kernels on a CPU, None where neither serves the model."""
    if can_fuse(model):
        return BlockPasses(model, cache)
    return RecordedPasses.of(model, cache)
