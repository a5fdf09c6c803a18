"""Self-speculation: drafts with a subset of the verifier's layers and with the verifier's KV cache."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, validate_call

from quasar.cache import json_store
from quasar.config.checks import distinct
from quasar.decoding.acceptance import Greedy
from quasar.decoding.draft import Context, Draft
from quasar.decoding.loop import Generation, decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.stopping import Limits
from quasar.decoding.stopwatch import DECODE_PHASES
from quasar.drafters._autoregressive import draft_chain
from quasar.drafters._layer_search import SearchResult, search_skipped_layers, spread
from quasar.drafters.base import Drafter, Resources
from quasar.errors import RequestError
from quasar.verifiers.base import LayeredVerifier

# This is long enough for verification passes of every size to occur.
WARM_UP_TOKENS = 16

STORE = json_store("layerskip")


class LayerSkipDrafter(Drafter):
    """Draft & Verify (Zhang et al. 2024) with skipped layers, or LayerSkip's early exit (Elhoushi et al. 2024).

    A draft step runs one token through the kept layers. It attends to the keys and values of the verified tokens and
    appends tentative ones, which the verification pass overwrites. If decoding samples, the draft tokens are sampled
    too, and the draft contains their distributions. The cost is ``num_tokens`` passes over kept layers and head.

    num_tokens:   maximum number of tokens per draft
    method:       fixed uses the layers of the next three options. search ignores them and looks for the fastest set of
                  skipped layers (see `search_skipped_layers`)
    exit_layer:   draft with the first ``exit_layer`` layers
    skip_layers:  skip exactly these layers
    skip_ratio:   if neither of the two is set, skip this share of the layers, spread evenly between the first and the
                  last layer
    confidence:   a draft ends with the first token whose probability is lower
    draft_verifier: name of a verifier of the same model, in a cheaper format, whose layers draft instead of the
                  run's verifier. They use the same keys and values
    search_sets, search_prompts, search_tokens, seed: the search measures ``search_sets`` sets, drawn with ``seed``, by
                  decoding ``search_tokens`` tokens for each of ``search_prompts`` calibration prompts. It caches the
                  best set by model, verifier and device
    """

    @validate_call
    def __init__(
        self,
        num_tokens: PositiveInt = 4,
        method: Literal["fixed", "search"] = "fixed",
        exit_layer: PositiveInt | None = None,
        skip_layers: Annotated[list[NonNegativeInt], AfterValidator(distinct)] | None = None,
        skip_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25,
        confidence: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        draft_verifier: str | None = None,
        search_sets: PositiveInt = 24,
        search_prompts: PositiveInt = 3,
        search_tokens: Annotated[int, Field(ge=2)] = 48,
        seed: int = 0,
    ) -> None:
        if exit_layer is not None and skip_layers is not None:
            raise RequestError(
                f"drafter.exit_layer={exit_layer} and drafter.skip_layers={skip_layers} exclude each "
                "other; set one to null"
            )
        self.num_tokens, self.confidence, self.draft_verifier = num_tokens, confidence, draft_verifier
        self.method, self.seed = method, seed
        self.exit_layer, self.skip_layers, self.skip_ratio = exit_layer, skip_layers, skip_ratio
        self.search_sets, self.search_prompts, self.search_tokens = search_sets, search_prompts, search_tokens
        self._lent: LayeredVerifier | None = None
        self._verifier: LayeredVerifier | None = None
        self._layers: list[int] = []

    @property
    def reads_verifier_cache(self) -> bool:
        return True

    def prepare(self, resources: Resources) -> None:
        """Build ``draft_verifier`` and search for the layers, if the settings request it."""
        verifier = resources.verifier
        if not isinstance(verifier, LayeredVerifier):
            raise RequestError(
                f"drafter=layerskip needs a verifier with layers to skip; {type(verifier).__name__} has none"
            )
        lent = None if self.draft_verifier is None else resources.build_verifier(self.draft_verifier)
        self.use(verifier, lent)
        if self.method == "search":
            found = self._searched(resources, verifier)
            self.exit_layer, self.skip_layers = None, found.skipped
            self.use(verifier, lent)
            self.details = (
                f"skips layers {found.skipped}, the fastest of {found.tried} sets at "
                f"{found.tokens_per_second:.1f} tokens/s on calibration prompts",
            )

    def use(self, verifier: LayeredVerifier, lent: LayeredVerifier | None = None) -> None:
        """Draft with this verifier's layers, or with the layers of ``lent`` on this verifier's cache.

        Raises RequestError for the same reasons as `kept_layers`, and if the two cannot share a cache.
        """
        self._layers = self.kept_layers(verifier.num_layers)
        if lent is not None:
            lent.share_cache(verifier)
        self._lent, self._verifier = lent, lent or verifier
        self.weight_bytes = self._verifier.draft_bytes(self._layers)

    def kept_layers(self, num_layers: int) -> list[int]:
        """Return the layers that draft, ascending.

        Raises RequestError if the settings name layers that the model does not have, or keep no layer or all of them.
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
            skipped = set(spread(num_layers, self.skip_ratio))
        kept = [layer for layer in range(num_layers) if layer not in skipped]
        if not kept or len(kept) == num_layers:
            raise RequestError(
                f"drafter.skip_layers={sorted(skipped)} leaves {len(kept)} of {num_layers} layers to draft with; "
                "skip at least one and keep at least one"
            )
        return kept

    def propose(self, context: Context, budget: int) -> Draft:
        if self._verifier is None:
            raise RuntimeError("LayerSkipDrafter.propose: there are no layers yet; call prepare or use first")
        logits = partial(self._verifier.draft_logits, layers=self._layers)
        return draft_chain(logits, context, min(self.num_tokens, budget), self.confidence)

    def _searched(self, resources: Resources, verifier: LayeredVerifier) -> SearchResult:
        """Return the fastest set of skipped layers, from the cache if the same search was done before."""
        calibration = resources.calibration()
        if calibration is None:
            raise RequestError("drafter.method=search needs calibration text; set calibration.prompts above 0")
        key = {
            **resources.identity,
            **calibration.key,
            "draft_verifier": self.draft_verifier,
            "settings": [self.num_tokens, self.confidence, self.search_sets, self.search_prompts, self.search_tokens],
            "warm_up": WARM_UP_TOKENS,
            "seed": self.seed,
        }
        prompts = [sequence.tolist() for sequence in calibration.sequences[: self.search_prompts]]

        def search() -> dict[str, Any]:
            speed = partial(self._speed, verifier, prompts)
            return vars(
                search_skipped_layers(speed, verifier.num_layers, self.search_sets, self.seed, resources.progress)
            )

        return SearchResult(**STORE.get(key, verifier.device, verifier.dtype, search))

    def _speed(self, verifier: LayeredVerifier, prompts: list[list[int]], skipped: list[int]) -> float:
        """Measure greedy tokens per second over all prompts when drafts skip these layers."""
        drafter = LayerSkipDrafter(self.num_tokens, skip_layers=skipped, confidence=self.confidence)
        drafter.use(verifier, self._lent)

        def generate(prompt: list[int], length: int) -> Generation:
            limits = Limits(length, len(prompt) + length, frozenset())
            return decode(prompt, drafter, verifier, Greedy(), Sampling(), limits, torch.Generator())

        # This decode is not timed, because the first passes compile, record or capture, and the cache may grow.
        generate(max(prompts, key=len), WARM_UP_TOKENS)
        tokens, milliseconds = 0, 0.0
        for prompt in prompts:
            generation = generate(prompt, self.search_tokens)
            tokens += sum(generation.emitted)
            milliseconds += sum(sum(generation.milliseconds[phase]) for phase in DECODE_PHASES)
        return tokens / milliseconds * 1e3
