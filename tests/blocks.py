"""Decodes a known sequence block by block, with drafts that are wrong at their end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quasar.decoding.draft import Draft
from quasar.model.transformer import Transformer
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier


def logits_in_blocks(model: Transformer, tokens: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the logits [1 + sum(sizes), V] after token 19 and those that follow it, from blocks of these sizes."""
    verifier = FP16Verifier(model, Setup(capacity=16))  # smaller than the sequence: the cache must grow too
    rows = [verifier.prefill(tokens[:20]).logits]
    position = 20
    for size in sizes:
        right = tokens[position + 1 : position + size].tolist()
        # The draft is right up to `size - 1` tokens, then wrong: the wrong ones must leave no trace.
        logits = verifier.verify(int(tokens[position]), Draft.chain([*right, 63, 62])).logits
        rows.append(logits[:size])
        verifier.keep(range(size - 1))
        position += size
    return torch.cat(rows)
