"""A verifier that wraps a model of transformers. It is slow and simple: every pass reads the whole sequence again.

    # docs/examples/conf/verifier/transformers.yaml
    _target_: transformers_verifier.TransformersVerifier
    name: transformers
    dtype: float32

    PYTHONPATH=docs/examples python run.py --config-dir=docs/examples/conf verifier=transformers drafter=ngram

A run needs nothing but a `Verifier`. This one does not use Quasar's model, so it is also an oracle for that model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quasar.decoding.draft import Draft
from quasar.decoding.scores import Scores
from quasar.errors import RequestError
from quasar.model.transformer import Transformer
from quasar.verifiers.base import Setup, Verifier, VerifierCost


class TransformersVerifier(Verifier):
    """Scores every draft by one float32 pass over the context, the draft and the scratch rows, with one full mask."""

    label = "model of transformers"

    def __init__(self, model: Transformer, setup: Setup) -> None:
        if setup.folder is None:
            raise RequestError("verifier=transformers needs a checkpoint; random weights (model=tiny) have none")
        self.model = AutoModelForCausalLM.from_pretrained(setup.folder, dtype=torch.float32)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.context_length = self.model.config.max_position_embeddings
        # There is no KV cache: a pass reads only the weights and computes all keys and values again.
        self.cost = VerifierCost(sum(weight.nbytes for weight in self.model.parameters()), 0)
        self._context: list[int] = []
        self._pass: tuple[int, Draft] = (0, Draft())

    def prefill(self, tokens: Tensor) -> Scores:
        self._context = tokens.tolist()
        return Scores(self.teacher_forced(tokens, len(tokens) - 1))

    @torch.inference_mode()
    def verify(self, last: int, draft: Draft) -> Scores:
        self._pass = last, draft
        start, rows, size = len(self._context), draft.rows, 1 + len(draft)
        tokens = torch.cat([torch.tensor(self._context), draft.row_tokens(last)])
        positions = torch.cat([torch.arange(start), draft.offsets() + start])
        visible = torch.ones(start + rows, start + rows, dtype=torch.bool).tril_()
        visible[start:, start:] = draft.block_mask()
        mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
        logits = self.model(
            tokens[None], position_ids=positions[None], attention_mask=mask[None, None], use_cache=False
        ).logits[0, start:]
        scratch = None if draft.scratch is None else logits[size:][draft.scratch.outputs]
        return Scores(logits[:size], scratch)

    def keep(self, path: Sequence[int]) -> None:
        last, draft = self._pass
        self._context += [last, *(draft.tokens[node] for node in path)]

    @torch.inference_mode()
    def teacher_forced(self, tokens: Tensor, first: int) -> Tensor:
        logits: Tensor = self.model(tokens[None], use_cache=False).logits[0, first:]
        return logits
