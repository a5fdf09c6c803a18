"""A structurally pruned verifier with narrower or fewer layers, in 16 bit."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, NonNegativeInt, validate_call

from quasar.config.checks import ReadIf, distinct
from quasar.model.transformer import Transformer
from quasar.pruning.depth import Selection, prune_depth, select_layers
from quasar.pruning.importance import Importance
from quasar.pruning.size import block_parameters
from quasar.pruning.width import prune_width
from quasar.verifiers._prepared import Found, prepared
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier

OF_WIDTH, OF_DEPTH = ReadIf("method", ("width",)), ReadIf("method", ("depth",))
WITHOUT_LAYERS = ReadIf("layers", (None,))


class PrunedVerifier(TransformerVerifier):
    """The model without its least important channels, KV groups or layers.

    method: width removes MLP channels, and whole KV groups if ``heads`` is true; depth removes layers
    ratio: fraction of the decoder blocks' parameters to remove. After rounding, ``achieved_ratio`` is the real fraction
    importance, heads, uniform: options of width, see `quasar.pruning.width.prune_width`
    selection: how depth chooses the layers, see `quasar.pruning.depth.select_layers`
    layers: if given, depth removes exactly these layers and ignores ``ratio``
    """

    label = "pruned model"

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def __init__(
        self,
        model: Transformer,
        setup: Setup,
        *,
        method: Literal["width", "depth"] = "width",
        ratio: Annotated[float, Field(ge=0, lt=1), WITHOUT_LAYERS] = 0.1,
        importance: Annotated[Importance, OF_WIDTH] = "flap",
        heads: Annotated[bool, OF_WIDTH] = False,
        uniform: Annotated[bool, OF_WIDTH] = False,
        selection: Annotated[Selection, OF_DEPTH, WITHOUT_LAYERS] = "block_influence",
        layers: Annotated[
            Annotated[list[NonNegativeInt], Field(min_length=1), AfterValidator(distinct)] | None, OF_DEPTH
        ] = None,
    ) -> None:
        settings = {
            "pruned": method,
            "ratio": ratio,
            "importance": importance,
            "heads": heads,
            "uniform": uniform,
            "selection": selection,
            "layers": layers,
        }
        before = block_parameters(model)

        def prune(model: Transformer) -> tuple[Transformer, Found]:
            if method == "width":
                calibration = partial(setup.calibration_for, f"verifier.importance={importance}")
                return prune_width(model, ratio, importance, heads, uniform, calibration, setup.progress), {}
            calibration = partial(setup.calibration_for, f"verifier.selection={selection}")
            removed = layers
            if removed is None:
                removed = select_layers(model, ratio, selection, calibration, setup.progress)
            return prune_depth(model, removed), {}

        model, _ = prepared(model, setup, settings, prune)
        self.achieved_ratio = 1 - block_parameters(model) / before
        self.details = (f"{self.achieved_ratio:.1%} of the blocks' parameters removed",)
        super().__init__(model, setup)
