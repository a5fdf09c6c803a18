"""Log-likelihoods of text, and text up to a stop string, by a run's verifier and drafter: what task suites ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from quasar.config.build import build
from quasar.config.schema import DecodeConfig
from quasar.decoding.loop import decode
from quasar.decoding.stopping import Limits, StopStrings
from quasar.drafters.base import Drafter
from quasar.errors import RequestError
from quasar.experiment.build import Prepared, prepare
from quasar.experiment.rule import rule_of, sampling_of
from quasar.experiment.standalone import settings_of
from quasar.model.devices import use_threads
from quasar.results.console import Reporter
from quasar.verifiers.base import Verifier

# Only the pair is needed: no other model is loaded.
ALONE = ["evaluate.baselines=false", "evaluate.fidelity=false", "evaluate.noise_floor=false"]


def log_likelihood(verifier: Verifier, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Return ln p(continuation | context) in nats, and whether greedy decoding would write the continuation.

    If both are longer than the model can read, the beginning of the context is left out. The log-probabilities are
    computed in float32 from the verifier's logits.

    For example, the continuation ``[b, c]`` of ``[a]`` has ln p(b | a) + ln p(c | a, b), from one pass over ``[a, b]``.

    Raises RequestError if the context or the continuation is empty, or if the continuation alone is too long.
    """
    if not context or not continuation:
        raise RequestError("log-likelihood: context and continuation need at least one token each")
    longest = verifier.context_length
    if len(continuation) > longest:
        raise RequestError(
            f"log-likelihood: a continuation of {len(continuation)} tokens does not fit the context window of {longest}"
        )
    # The last token is predicted but not read.
    tokens = [*context, *continuation][-(longest + 1) :]
    targets = torch.tensor(tokens[-len(continuation) :], device=verifier.device)
    logits = verifier.teacher_forced(torch.tensor(tokens[:-1]), len(tokens) - 1 - len(continuation))
    chosen = logits.float().log_softmax(-1).gather(1, targets.unsqueeze(1))
    return float(chosen.sum()), bool((logits.argmax(-1) == targets).all())


@dataclass(frozen=True)
class Pair:
    """A drafter and a verifier that are ready to decode. parts: what the configuration built"""

    parts: Prepared

    @classmethod
    def built(cls, overrides: Sequence[str], reporter: Reporter) -> Pair:
        """Build the pair that these overrides of conf/config.yaml name.

        Raises RequestError for what ``run.py`` would refuse too.
        """
        settings = settings_of([*ALONE, *overrides])
        use_threads(settings.threads)
        drafter: Drafter = build("drafter", settings.drafter)
        parts = prepare(settings, [], drafter, reporter)
        if parts.rule.simulated:
            name = settings.drafter["name"]
            raise RequestError(f"drafter={name}: acceptance is simulated, so that the text means nothing")
        parts.drafter.start([])
        return cls(parts)

    @cached_property
    def _generator(self) -> torch.Generator:
        # One stream for all texts, so that repetitions of a prompt are different samples.
        return torch.Generator(self.parts.verifier.device).manual_seed(self.parts.settings.seed)

    def generate(self, prompt: Sequence[int], stop: Sequence[str], length: int, sampling: Sampled) -> list[int]:
        """Decode at most ``length`` tokens after a prompt, up to the token that completes one of the texts ``stop``.

        The last tokens of the prompt are read if all of them and ``length`` more do not fit the context window.

        Raises RequestError if ``length`` leaves no room for a prompt.
        """
        parts = self.parts
        room = parts.verifier.context_length - length
        if room < 1:
            raise RequestError(
                f"{length} new tokens leave no room for a prompt in the context window of "
                f"{parts.verifier.context_length}; ask for fewer"
            )
        tokenizer, chosen = parts.tokenizer, sampling.put_into(parts.settings.decode)
        strings = StopStrings(stop, tokenizer.decode, tokenizer.spell) if stop else None
        cap = chosen.draft_tokens if isinstance(chosen.draft_tokens, int) else None
        limits = Limits(length, parts.verifier.context_length, tokenizer.stop_tokens, cap, strings)
        rule = rule_of(chosen)
        found = decode(
            list(prompt)[-room:], parts.drafter, parts.verifier, rule, sampling_of(chosen), limits, self._generator
        )
        return found.tokens


@dataclass(frozen=True)
class Sampled:
    """How tokens are drawn; temperature 0 is greedy. top_k: None for all tokens"""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def put_into(self, decode: DecodeConfig) -> DecodeConfig:
        return replace(decode, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
