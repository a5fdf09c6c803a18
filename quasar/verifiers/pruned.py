"""A structurally pruned verifier: fewer MLP channels or fewer layers, in 16 bit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, validate_call

from quasar.model.transformer import Transformer
from quasar.pruning.depth import deep_layers, prune_depth
from quasar.pruning.size import block_parameters
from quasar.pruning.width import prune_width
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier


class PrunedVerifier(TransformerVerifier):
    """method width removes MLP channels by magnitude; depth removes ``layers``, or deep ones by ``ratio``.

    ratio: fraction of the decoder blocks' parameters to remove; `achieved_ratio` is what rounding left of it.
    """

    label = "pruned model"

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def __init__(
        self,
        model: Transformer,
        setup: Setup,
        *,
        method: Literal["width", "depth"] = "width",
        ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        layers: list[NonNegativeInt] | None = None,
    ) -> None:
        before = block_parameters(model)
        if method == "width":
            model = prune_width(model, ratio, setup.progress)
        else:
            model = prune_depth(model, deep_layers(model.config.num_layers, ratio) if layers is None else layers)
        self.achieved_ratio = 1 - block_parameters(model) / before
        super().__init__(model, setup)
