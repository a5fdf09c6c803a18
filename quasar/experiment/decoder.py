"""Decodes one prompt: all its turns, their baselines and their fidelity, as one record."""

from __future__ import annotations

import hashlib
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import zip_longest

import torch

from quasar.config.schema import RunConfig
from quasar.decoding.acceptance import AcceptanceRule
from quasar.decoding.draft import StepResult
from quasar.decoding.loop import Generation, decode
from quasar.decoding.sampling import Sampling
from quasar.decoding.seams import Verifying
from quasar.decoding.stopping import Limits, StopStrings
from quasar.drafters.base import Drafter
from quasar.drafters.none import NoneDrafter
from quasar.evaluation.accuracy import graded
from quasar.evaluation.conversation import conversation
from quasar.evaluation.exactness import compare
from quasar.evaluation.fidelity import Fidelity, ReferencePath, Trajectories, measure
from quasar.evaluation.prompts import Prompt
from quasar.experiment.rule import rule_of, sampling_of
from quasar.experiment.shared_prompt import SharedPrompt
from quasar.model.tokenizer import Message, Tokenizer
from quasar.results.baselines import Baseline, SharedBaselines, local_baseline
from quasar.results.schema import (
    DECODE_PHASES,
    PHASES,
    STEP_COUNTS,
    Baselines,
    Exactness,
    ForcedAnswer,
    Milliseconds,
    PromptRecord,
    Steps,
    Timing,
    Turn,
)
from quasar.verifiers.base import Verifier

OnStep = Callable[[StepResult], None]

WARM_UP: list[Message] = [{"role": "user", "content": "Say hello, hello, hello."}]
"""The conversation that is decoded for warm-up."""


@dataclass(frozen=True)
class PromptDecoder:
    """Decodes prompts with a drafter and a verifier, decodes their baselines, and measures fidelity.

    reference: the unquantized, unpruned model for AR-ref and fidelity; None if ``verifier`` is the reference, or if
        neither AR-ref nor fidelity is measured
    trajectories: the reference's answers that fidelity is measured on; None if it is not measured
    simulated: whether the verifier does not decide what is accepted; nothing is computed from the text then
    shared_same, shared_reference: baselines of ``verifier`` and ``reference`` that the jobs of a sweep share; None if
        this run decodes its own
    """

    settings: RunConfig
    drafter: Drafter
    verifier: Verifier
    tokenizer: Tokenizer
    reference: Verifier | None = None
    trajectories: Trajectories | None = None
    shared_same: SharedBaselines | None = None
    shared_reference: SharedBaselines | None = None

    @cached_property
    def sampling(self) -> Sampling:
        return sampling_of(self.settings.decode)

    @cached_property
    def rule(self) -> AcceptanceRule:
        return rule_of(self.settings.decode)

    @property
    def simulated(self) -> bool:
        return (self.drafter.rule or self.rule).simulated

    @cached_property
    def limits(self) -> Limits:
        chosen, stop_tokens = self.settings.decode, self.tokenizer.stop_tokens
        cap = chosen.draft_tokens if isinstance(chosen.draft_tokens, int) else None
        strings = StopStrings(chosen.stop, self.tokenizer.decode, self.tokenizer.spell) if chosen.stop else None
        return Limits(chosen.max_new_tokens, self.verifier.context_length, stop_tokens, cap, strings)

    @property
    def follows_reference(self) -> bool:
        """Whether the run decodes along the reference's answers too. Nothing can be compared if text is meaningless."""
        return self.trajectories is not None and not self.simulated

    def decode_prompt(self, prompt: Prompt, on_step: OnStep | None = None, repetition: int = 0) -> PromptRecord:
        """Decode every turn and return the record. The context of a later turn contains the model's earlier replies.

        repetition: number of the repetition; each draws its own random numbers and its own order of the arms
        """
        repeated = f" #{repetition}" if repetition else ""

        def decode_turn(tokens: list[int], key: str) -> Turn:
            return self._decode_turn(tokens, key + repeated, on_step)

        def follow(tokens: list[int], key: str) -> ForcedAnswer:
            return self._follow_reference(tokens, key + repeated, compares=repetition == 0)

        converse = partial(conversation, prompt, self.tokenizer, self.limits.context_length)
        turns = converse(decode_turn)
        fidelity = converse(follow) if self.follows_reference else []
        if self.sampling.greedy:
            turns = [_with_reference(turn, answer) for turn, answer in zip_longest(turns, fidelity[: len(turns)])]
        grades = self.settings.evaluate.accuracy and not self.simulated
        correct = graded(prompt, turns[0].text) if grades else None
        return PromptRecord(prompt.key, prompt.family, turns, correct, fidelity, repetition)

    def warm_up(self) -> None:
        """Decode a short text and discard it, because first calls allocate, compile and fill caches."""
        tokens = self.tokenizer.encode_chat(WARM_UP)
        self._generate(tokens, self.drafter, self.verifier, "warm-up", max_new_tokens=8)
        if self.reference is not None:
            self._generate(tokens, NoneDrafter(), self.reference, "warm-up", max_new_tokens=8)

    def _decode_turn(self, tokens: list[int], key: str, on_step: OnStep | None) -> Turn:
        """Decode freely with the pair and with each autoregressive baseline, one after the other in a drawn order."""
        baselines: dict[str, Baseline] = {}
        generation, notes = None, {}
        arms = self._free_baselines()
        for name in self._drawn_order(["pair", *arms], key):
            if name == "pair":
                generation = self._generate(tokens, self.drafter, self.verifier, key, on_step)
                notes = self.drafter.notes()
            else:
                baselines[name] = self._autoregressive(*arms[name], tokens, key)
        assert generation is not None
        laps = {phase: [round(lap, 4) for lap in generation.milliseconds.get(phase, [])] for phase in PHASES}
        return Turn(
            prompt_tokens=len(tokens),
            token_ids=generation.tokens,
            text=self.tokenizer.decode(generation.tokens),
            finish_reason=generation.finish_reason,
            steps=Steps(**{name: getattr(generation, name) for name in STEP_COUNTS}, notes=notes),
            milliseconds=Milliseconds(**laps),
            baselines=self._timings(baselines),
            exactness=self._exactness(tokens, generation, baselines, key),
        )

    def _free_baselines(self) -> dict[str, tuple[Verifier, SharedBaselines | None]]:
        """Return the baselines that are decoded freely.

        Greedy AR-ref writes the reference's answer, so it is decoded only once, along that answer. AR-same is timed
        along it too, and is decoded freely only if its output is compared.
        """
        timed = self.settings.evaluate.baselines and not (self.follows_reference and self.sampling.greedy)
        found = {}
        if timed or self._compares:
            found["ar_same"] = (self.verifier, self.shared_same)
        if timed and self.reference is not None:
            found["ar_ref"] = (self.reference, self.shared_reference)
        return found

    @property
    def _compares(self) -> bool:
        """Whether the output is compared with AR-same's, which some rules do not reproduce."""
        evaluate = self.settings.evaluate
        wanted = evaluate.baselines if evaluate.exactness is None else evaluate.exactness
        return wanted and (self.sampling.greedy or self.sampling.coupled) and not self.simulated

    def _timings(self, baselines: dict[str, Baseline]) -> Baselines | None:
        if not self.settings.evaluate.baselines or "ar_same" not in baselines:
            return None
        same = baselines["ar_same"]
        return Baselines(ar_same=_timing(same), ar_ref=_timing(baselines.get("ar_ref", same)))

    def _exactness(
        self, tokens: list[int], generation: Generation, baselines: dict[str, Baseline], key: str
    ) -> Exactness | None:
        if not self._compares:
            return None
        same = baselines["ar_same"]
        ranking = partial(self.sampling.ranking, seed=_seed(self.settings.seed, key))
        found = compare(tokens, generation.tokens, same.tokens, self.verifier, ranking)
        reference = baselines.get("ar_ref", same if self.reference is None else None)
        matches = None
        if self.settings.evaluate.baselines and reference is not None:
            matches = generation.tokens == reference.tokens
        return Exactness(found.match_self, found.first_divergence, found.top2_gap, matches)

    def _follow_reference(self, tokens: list[int], key: str, compares: bool) -> ForcedAnswer:
        """Decode along the reference's answer: the steps of τ_ref, their time, and AR-same and AR-ref on the same text.

        compares: also compare the verifier with the reference: KL and argmax per token
        """
        assert self.trajectories is not None
        reference = self.reference or self.verifier
        length = self.settings.decode.max_new_tokens
        trajectory = self.trajectories.get(reference, tokens, length, self.tokenizer.stop_tokens)
        found = measure(reference, self.verifier, trajectory) if compares else Fidelity([], [])
        answer = trajectory.answer
        emitted, milliseconds = self._along(answer, tokens, key)
        return ForcedAnswer(
            token_ids=answer,
            emitted=emitted,
            kl=_rounded(found.kl),
            top1=found.top1,
            noise_kl=_rounded(trajectory.noise_kl) if compares else [],
            noise_top1=trajectory.noise_top1 if compares else [],
            forced_ms=milliseconds["pair"],
            ar_same_ms=milliseconds.get("ar_same"),
            ar_ref_ms=milliseconds.get("ar_ref"),
        )

    def _along(self, answer: list[int], tokens: list[int], key: str) -> tuple[list[int], dict[str, float]]:
        """Decode along the reference's answer with the pair and, if baselines are requested, autoregressively.

        Returns the pair's tokens per step, and the decode time of each in milliseconds.
        """
        shared = SharedPrompt(self.verifier)
        arms: dict[str, tuple[Drafter, Verifying]] = {"pair": (self.drafter, shared)}
        if self.settings.evaluate.baselines:
            arms["ar_same"] = (NoneDrafter(), shared)
            if self.reference is not None:
                arms["ar_ref"] = (NoneDrafter(), self.reference)
        emitted: list[int] = []
        milliseconds: dict[str, float] = {}
        for name in self._drawn_order(list(arms), key):
            drafter, verifier = arms[name]
            path = self._generate(
                tokens, drafter, verifier, key, max_new_tokens=len(answer), rule=ReferencePath(answer)
            )
            milliseconds[name] = _decode_ms(path)
            if name == "pair":
                emitted = path.emitted
        if self.reference is None and "ar_same" in milliseconds:
            milliseconds["ar_ref"] = milliseconds["ar_same"]
        return emitted, milliseconds

    def _drawn_order(self, names: list[str], key: str) -> list[str]:
        """Return the names in an order drawn for the turn, so that a change in the machine's speed favours none.

        What is compared runs within seconds of each other.
        """
        return random.Random(f"{self.settings.seed} {key}").sample(names, len(names))

    def _autoregressive(
        self, verifier: Verifier, shared: SharedBaselines | None, tokens: list[int], key: str
    ) -> Baseline:
        def decoded() -> Baseline:
            generation = self._generate(tokens, NoneDrafter(), verifier, key)
            return local_baseline(generation.tokens, sum(generation.emitted), _decode_ms(generation))

        return decoded() if shared is None else shared.measured(key, tokens, decoded)

    def _generate(
        self,
        tokens: list[int],
        drafter: Drafter,
        verifier: Verifying,
        key: str,
        on_step: OnStep | None = None,
        max_new_tokens: int | None = None,
        rule: AcceptanceRule | None = None,
    ) -> Generation:
        limits = self.limits
        if max_new_tokens is not None:
            # The caller wants exactly this many tokens, even if they contain a stop string.
            limits = replace(limits, max_new_tokens=max_new_tokens, stop_strings=None)
        # A caller's rule follows a greedy path, even if the run itself samples.
        sampling = self.sampling if rule is None else Sampling()
        # Each prompt and turn has its own generator, so that a resumed run draws the same tokens as one without a stop.
        generator = torch.Generator(verifier.device).manual_seed(_seed(self.settings.seed, key))
        if rule is None:
            rule = drafter.rule or self.rule
        return decode(tokens, drafter, verifier, rule, sampling, limits, generator, on_step)


def _with_reference(turn: Turn, answer: ForcedAnswer | None) -> Turn:
    """Add what decoding along the reference's answer says about the turn: its baselines and whether the texts agree.

    At temperature 0 the reference's answer is AR-ref's output, and autoregressive decoding takes the same time per
    token on any text.
    """
    if answer is None:
        return turn
    if turn.exactness is not None:
        turn = replace(turn, exactness=replace(turn.exactness, match_reference=turn.token_ids == answer.token_ids))
    if answer.ar_same_ms is None or answer.ar_ref_ms is None:
        return turn
    decoded, machine = len(answer.token_ids) - 1, socket.gethostname()
    same = turn.baselines.ar_same if turn.baselines else Timing(decoded, answer.ar_same_ms, machine)
    return replace(turn, baselines=Baselines(ar_same=same, ar_ref=Timing(decoded, answer.ar_ref_ms, machine)))


def _timing(baseline: Baseline) -> Timing:
    return Timing(baseline.decoded_tokens, baseline.decode_ms, baseline.machine)


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big")


def _decode_ms(generation: Generation) -> float:
    """Time of all steps, prefill apart, rounded like everything that goes into the record."""
    return round(sum(sum(generation.milliseconds.get(phase, [])) for phase in DECODE_PHASES), 4)
