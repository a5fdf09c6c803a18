"""Self-speculation: a subset of the verifier's own layers drafts, on the verifier's KV cache."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, validate_call
from torch import Tensor

from quasar.draft import Context, Draft, StepResult
from quasar.errors import RequestError
from quasar.sampling import draw
from quasar.verifiers.base import LayeredVerifier, Verifier


class LayerSkipDrafter:
    """Draft & Verify (Zhang et al. 2024) with chosen layers left out, or LayerSkip's early exit (Elhoushi et al. 2024).

    Draft steps run one token each through the kept layers, read the keys and values that verification wrote for
    them, and add tentative ones of their own, which verification overwrites. Where decoding samples, the draft
    is sampled too and carries its distributions. Costs ``num_tokens`` passes over the kept layers and the head.

    exit_layer:   draft with the first ``exit_layer`` layers
    skip_layers:  leave out exactly these layers
    skip_ratio:   otherwise leave out this share of the layers, spread evenly over the second to last but one
    """

    @validate_call
    def __init__(
        self,
        num_tokens: PositiveInt = 4,
        exit_layer: PositiveInt | None = None,
        skip_layers: list[NonNegativeInt] | None = None,
        skip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25,
    ) -> None:
        if exit_layer is not None and skip_layers is not None:
            raise RequestError(
                f"drafter.exit_layer={exit_layer} and drafter.skip_layers={skip_layers} exclude each "
                "other; set one to null"
            )
        self.num_tokens = num_tokens
        self.exit_layer, self.skip_layers, self.skip_ratio = exit_layer, skip_layers, skip_ratio

    def begin(self, prompt: Tensor, verifier: Verifier) -> None:
        if not isinstance(verifier, LayeredVerifier):
            raise RequestError(
                f"drafter=layerskip needs a verifier with layers to skip; {type(verifier).__name__} has none"
            )
        self._verifier: LayeredVerifier = verifier
        self._layers = self.kept_layers(verifier.num_layers)

    def kept_layers(self, num_layers: int) -> list[int]:
        """The layers that draft, ascending.

        Raises RequestError where the settings name layers the model lacks or leave none.
        """
        if self.exit_layer is not None:
            if self.exit_layer >= num_layers:
                raise RequestError(
                    f"drafter.exit_layer={self.exit_layer}: the model has {num_layers} layers; "
                    f"exit after 1 to {num_layers - 1}"
                )
            return list(range(self.exit_layer))
        if self.skip_layers is not None:
            missing = sorted(layer for layer in self.skip_layers if layer >= num_layers)
            if missing:
                raise RequestError(
                    f"drafter.skip_layers names {missing}, but the model's layers are 0 to {num_layers - 1}"
                )
            skipped = set(self.skip_layers)
        else:
            count = max(1, round(self.skip_ratio * num_layers))
            inner = range(1, num_layers - 1)
            count = min(count, len(inner))
            skipped = {inner[int((index + 0.5) * len(inner) / count)] for index in range(count)}
        kept = [layer for layer in range(num_layers) if layer not in skipped]
        if not kept or len(kept) == num_layers:
            raise RequestError(
                f"drafter.skip_layers={sorted(skipped)} leaves {len(kept)} of {num_layers} layers to draft with; "
                "skip at least one and keep at least one"
            )
        return kept

    def propose(self, context: Context, budget: int) -> Draft:
        tokens: list[int] = []
        distributions: list[Tensor] = []
        token = context.last
        for offset in range(min(self.num_tokens, budget)):
            logits = self._verifier.draft_logits(token, offset, self._layers)
            if context.sampling.greedy:
                token = int(logits.argmax())
            else:
                distributions.append(context.sampling.probabilities(logits))
                token = draw(distributions[-1], context.generator)
            tokens.append(token)
        return Draft.chain(tokens, torch.stack(distributions) if distributions else None)

    def observe(self, step: StepResult) -> None:
        pass
