"""Self-speculation: a subset of the verifier's own layers drafts, on the verifier's KV cache."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, validate_call

from quasar.cache import json_store
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

# Enough for blocks of every size.
WARM_UP_TOKENS = 16

STORE = json_store("layerskip")


class LayerSkipDrafter(Drafter):
    """Draft & Verify (Zhang et al. 2024) with chosen layers left out, or LayerSkip's early exit (Elhoushi et al. 2024).

    Draft steps run one token each through the kept layers, read the keys and values that verification wrote for
    them, and add tentative ones of their own, which verification overwrites. Where decoding samples, the draft
    is sampled too and carries its distributions. Costs ``num_tokens`` passes over the kept layers and the head.

    num_tokens:   tokens per draft, at most
    exit_layer:   draft with the first ``exit_layer`` layers
    skip_layers:  leave out exactly these layers
    skip_ratio:   otherwise leave out this share of the layers, spread evenly over the second to last but one
    method:       search looks for the layers itself, whatever these three say (the goal of SWIFT, Xia et al. 2025): it
                  measures tokens per second over ``search_tokens`` tokens of each of ``search_prompts`` calibration
                  prompts for ``search_sets`` sets, drawn by ``seed``, and caches the best one by model, verifier and
                  device
    confidence:   a draft ends with the first token whose probability is lower
    draft_verifier: name of a verifier whose layers draft in the place of the run's own, in a cheaper precision, on the
                  same keys and values
    """

    @validate_call
    def __init__(
        self,
        num_tokens: PositiveInt = 4,
        method: Literal["fixed", "search"] = "fixed",
        exit_layer: PositiveInt | None = None,
        skip_layers: list[NonNegativeInt] | None = None,
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

    def prepare(self, resources: Resources) -> None:
        """Build the verifier that drafts, and search for the layers, where the settings ask for it."""
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
        """Draft with this verifier's layers, or with those of ``lent`` on this verifier's cache.

        Raises RequestError as `kept_layers`, and if the two cannot share a cache.
        """
        self._layers = self.kept_layers(verifier.num_layers)
        if lent is not None:
            lent.share_cache(verifier)
        self._lent, self._verifier = lent, lent or verifier

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
            raise RuntimeError("LayerSkipDrafter.propose: no layers to draft with yet; call prepare or use first")
        logits = partial(self._verifier.draft_logits, layers=self._layers)
        return draft_chain(logits, context, min(self.num_tokens, budget), self.confidence)

    def _searched(self, resources: Resources, verifier: LayeredVerifier) -> SearchResult:
        """The best set of layers, from the user's cache where the same search was made before."""
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
        """Greedy tokens per second without these layers, over all prompts."""
        drafter = LayerSkipDrafter(self.num_tokens, skip_layers=skipped, confidence=self.confidence)
        drafter.use(verifier, self._lent)

        def generate(prompt: list[int], length: int) -> Generation:
            limits = Limits(length, len(prompt) + length, frozenset())
            return decode(prompt, drafter, verifier, Greedy(), Sampling(), limits, torch.Generator())

        # Not counted: the first passes through these layers compile, record or capture them, and the cache may grow.
        generate(max(prompts, key=len), WARM_UP_TOKENS)
        tokens, milliseconds = 0, 0.0
        for prompt in prompts:
            generation = generate(prompt, self.search_tokens)
            tokens += sum(generation.emitted)
            milliseconds += sum(sum(generation.milliseconds[phase]) for phase in DECODE_PHASES)
        return tokens / milliseconds * 1e3
