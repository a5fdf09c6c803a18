"""A structurally pruned verifier with narrower or fewer layers, in 16 bit or quantized."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, NonNegativeInt, validate_call

from quasar.config.build import build, chosen_node
from quasar.config.checks import ReadIf, distinct, shown
from quasar.errors import RequestError
from quasar.model.kv_cache import KvBits
from quasar.model.transformer import Transformer
from quasar.pruning.allocation import WIDTH_MULTIPLE, Amount
from quasar.pruning.depth import Selection, prune_depth, select_layers
from quasar.pruning.importance import Importance
from quasar.pruning.size import block_parameters
from quasar.pruning.width import prune_width
from quasar.quantization.statistics import Calibration
from quasar.verifiers._prepared import Found, prepared
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier

OF_WIDTH, OF_DEPTH = ReadIf("method", ("width",)), ReadIf("method", ("depth",))
WITHOUT_LAYERS = ReadIf("layers", (None,))

Quantizer = str | dict[str, Any]
QUANTIZERS = ("quasar.verifiers.int8.Int8Verifier", "quasar.verifiers.int4.Int4Verifier")
"""The verifiers that the pruned model can be handed to. They quantize the model that they are given."""
_PLACE = "verifier.quantize"


def _quantizer(choice: Quantizer) -> Quantizer:
    """Return the choice. Raises RequestError if it does not name a quantizer, or if a value does not fit it."""
    node = chosen_node("verifier", choice, _PLACE)
    if node["_target_"] not in QUANTIZERS:
        raise RequestError(f"{_PLACE}={shown(choice)}: must be int8, int4, another verifier of their classes, or null")
    if node["dtype"] != "auto":
        raise RequestError(f"{_PLACE}.dtype={node['dtype']}: has no effect; the dtype of the model is verifier.dtype")
    if node["kv_bits"] != 16:
        raise RequestError(
            f"{_PLACE}.kv_bits={node['kv_bits']}: has no effect; the bits of the KV cache are verifier.kv_bits"
        )
    return choice


class PrunedVerifier(TransformerVerifier):
    """The model without its least important channels, KV groups or layers, in 16 bit or quantized.

    method: width removes MLP channels, and whole KV groups if ``heads`` is true; depth removes layers
    ratio: fraction of the decoder blocks' parameters to remove. After rounding, ``achieved_ratio`` is the real fraction
    importance, heads, uniform: options of width, see `quasar.pruning.width.prune_width`
    selection: how depth chooses the layers, see `quasar.pruning.depth.select_layers`
    layers: if given, depth removes exactly these layers and ignores ``ratio``
    quantize: name of the verifier in conf/verifier that quantizes what is left, or a node such as ``{name: int4,
        group_size: 32}`` that replaces values of this file. Its calibration statistics are those of the pruned model
    kv_bits: bits of the keys and values in the KV cache

    Remaining widths are multiples of the quantizer's groups, so that a group never reaches beyond the end of a row. A
    ratio of 0 changes nothing: the verifier is the reference, or the quantizer's, bit for bit.
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
        quantize: Annotated[Quantizer, AfterValidator(_quantizer)] | None = None,
        kv_bits: KvBits = 16,
    ) -> None:
        node = None if quantize is None else chosen_node("verifier", quantize, _PLACE)
        settings = {
            "pruned": method,
            "ratio": ratio,
            "importance": importance,
            "heads": heads,
            "uniform": uniform,
            "selection": selection,
            "layers": layers,
            "multiple": _width_multiple(node),
        }
        before = block_parameters(model)

        def prune(model: Transformer) -> tuple[Transformer, Found]:
            if method == "width":
                amount = Amount(ratio, heads, uniform, _width_multiple(node))
                calibration = partial(setup.calibration_for, f"verifier.importance={importance}")
                return prune_width(model, amount, importance, calibration, setup.progress), {}
            calibration = partial(setup.calibration_for, f"verifier.selection={selection}")
            removed = layers
            if removed is None:
                removed = select_layers(model, ratio, selection, calibration, setup.progress)
            return prune_depth(model, removed), {}

        model, _ = prepared(model, setup, settings, prune)
        self.achieved_ratio = 1 - block_parameters(model) / before
        self.details = (f"{self.achieved_ratio:.1%} of the blocks' parameters removed",)
        if node is not None:
            quantized = _quantized(model, node, _for_pruned(setup, settings))
            self.label = f"pruned {quantized.label}"
            self.details = (*self.details, *quantized.details)
            model = quantized.model
        super().__init__(model, setup, kv_bits=kv_bits)


def _width_multiple(node: Mapping[str, Any] | None) -> int:
    """Return what the remaining widths are multiples of, so that the quantizer's groups divide them."""
    groups = [] if node is None else [node.get("group_size"), node.get("activation_group")]
    return math.lcm(WIDTH_MULTIPLE, *(group for group in groups if group is not None))


def _for_pruned(setup: Setup, settings: Found) -> Setup:
    """Return the setup for the pruned model, whose statistics and quantized weights are cached separately."""
    pruned = json.dumps(settings, sort_keys=True)

    def calibration() -> Calibration | None:
        found = setup.calibration()
        return None if found is None else replace(found, key={**found.key, "pruned": pruned})

    identity = None if setup.identity is None else f"{setup.identity}, pruned with {pruned}"
    # The verifier that quantizes never decodes, so its KV cache is as small as possible.
    return replace(setup, capacity=1, identity=identity, calibration=calibration)


def _quantized(model: Transformer, node: dict[str, Any], setup: Setup) -> TransformerVerifier:
    try:
        quantized = build("verifier", node, model, setup)
    except RequestError as error:
        raise RequestError(f"{_PLACE}={node['name']}: {error}") from None
    assert isinstance(quantized, TransformerVerifier)
    return quantized
