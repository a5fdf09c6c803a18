"""A verifier that runs a model of transformers with that library's own KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from quasar.decoding.draft import Draft
from quasar.decoding.scores import Scores
from quasar.errors import RequestError
from quasar.model.transformer import Transformer
from quasar.verifiers.base import Setup, Verifier, VerifierCost


class CachedVerifier(Verifier):
    """Scores a draft by one float32 pass of ``AutoModelForCausalLM`` over its rows alone.

    Rows of the pass that are not kept leave the cache: `keep` takes the others out of every layer's keys and values.
    """

    label = "model of transformers with its cache"
    # Matmuls of transformers round a row differently if the pass has more of them.
    rows_are_independent = False

    def __init__(self, model: Transformer, setup: Setup) -> None:
        if setup.folder is None:
            raise RequestError("verifier=my_cached needs a checkpoint; random weights (model=tiny) have none")
        self.model = AutoModelForCausalLM.from_pretrained(setup.folder, dtype=torch.float32)
        config = self.model.config
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.context_length = config.max_position_embeddings
        heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        weights = sum(weight.nbytes for weight in self.model.parameters())
        self.cost = VerifierCost(weights, 2 * 4 * heads * config.num_hidden_layers)
        self._cache, self._kept = DynamicCache(), 0

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> Scores:
        self._cache, self._kept = DynamicCache(), len(tokens)
        return Scores(self.model(tokens[None], past_key_values=self._cache).logits[0, -1:])

    @torch.inference_mode()
    def verify(self, last: int, draft: Draft) -> Scores:
        rows, size = draft.rows, 1 + len(draft)
        # Every row sees the whole context, and of the pass what the draft's mask says.
        visible = torch.ones(rows, self._kept + rows, dtype=torch.bool)
        visible[:, self._kept :] = draft.block_mask()
        mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
        logits = self.model(
            draft.row_tokens(last)[None],
            position_ids=(draft.offsets() + self._kept)[None],
            attention_mask=mask[None, None],
            past_key_values=self._cache,
        ).logits[0]
        scratch = None if draft.scratch is None else logits[size:][draft.scratch.outputs]
        return Scores(logits[:size], scratch)

    @torch.inference_mode()
    def keep(self, path: Sequence[int]) -> None:
        rows = [self._kept, *(self._kept + 1 + node for node in path)]
        kept = torch.tensor([*range(self._kept), *rows])
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
        self._kept = len(kept)

    @torch.inference_mode()
    def teacher_forced(self, tokens: Tensor, first: int) -> Tensor:
        logits: Tensor = self.model(tokens[None], use_cache=False).logits[0, first:]
        return logits
