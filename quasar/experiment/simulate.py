"""`quasar simulate`: compares drafters on recorded passes, with a given cost of a row instead of measured times."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from quasar.cache import code_version, whole_key
from quasar.config.build import build
from quasar.config.schema import RunConfig
from quasar.decoding.draft import MAX_ROWS, Draft
from quasar.decoding.loop import Generation, decode
from quasar.decoding.scores import Scores
from quasar.decoding.stopping import Limits
from quasar.drafters._adaptive_length import AdaptiveLength
from quasar.drafters._pass_cost import PassCost
from quasar.drafters.base import Drafter, Resources
from quasar.errors import RequestError
from quasar.evaluation.conversation import conversation
from quasar.evaluation.prompts import Prompt, load_prompts, prompt_set_hash
from quasar.evaluation.recording import RecordedVerifier
from quasar.experiment.build import share_on_grid
from quasar.experiment.reference import Reference, locate_reference
from quasar.experiment.rule import rule_of, sampling_of
from quasar.experiment.standalone import build_alone, settings_of, split
from quasar.model.devices import use_threads
from quasar.results.console import Reporter
from quasar.results.environment import describe_machine
from quasar.results.provenance import Provenance
from quasar.results.simulation import Simulated, publish_simulation, sections
from quasar.verifiers.base import Verifier

RECORDINGS = Path("outputs") / "recordings"
"""The folder of all recordings, one folder per verifier."""


@dataclass(frozen=True)
class Request:
    """What to simulate.

    drafters: overrides of each drafter, such as ``drafter=ngram decode.draft_tokens=5``; the first one is compared to
    slopes: time of a further row, as a share of the time of a pass with one row
    common: overrides of the model, the verifier, the prompts and the length of the answers
    skip: prompts of each task family to leave out, such as those that a drafter was developed on
    output: folder of the results; None only prints them
    """

    drafters: Sequence[str]
    slopes: Sequence[float]
    common: Sequence[str] = ()
    skip: int = 0
    output: Path | None = None


def simulate(request: Request, reporter: Reporter) -> pd.DataFrame:
    """Decode every prompt with every drafter along recorded greedy answers, print the results and write them.

    The drafters are those of runs and are called by the decode loop of runs, so that they draft and accept the same
    tokens as in a run with this verifier. Rows that are not recorded yet are computed with the model. A step with M
    rows takes t(M) = 1 + slope (M - 1), and drafting takes no time.

    Raises RequestError if a drafter needs more than recorded rows, such as a model's weights or scratch rows.
    """
    settings = settings_of(request.common)
    chosen = {name: _settings(name, request.common, settings) for name in request.drafters}
    use_threads(settings.threads)
    located = locate_reference(settings, reporter)
    prompts = _prompts(settings, request.skip)

    def load() -> Verifier:
        return build_alone("", request.common, lambda _: prompts, reporter).verifier

    verifier = RecordedVerifier(_recordings(settings, located), load)
    found: list[Simulated] = []
    with reporter.live("simulating") as update:
        for slope in request.slopes:
            for name, own in chosen.items():
                simulation = Simulation(name, own, located, verifier, slope)
                for prompt in prompts:
                    total = len(request.slopes) * len(chosen) * len(prompts)
                    update(len(found), total, f"{name}, slope {slope:g}, {verifier.computed} new rows")
                    found.append(simulation.decode(prompt))
                    verifier.save()
    rows = pd.DataFrame([asdict(one) for one in found])
    for title, headings, lines in sections(rows):
        reporter.table(title, headings, lines)
    if request.output is not None:
        provenance = _provenance(settings, located, prompts, len(request.slopes) * len(chosen))
        for file in publish_simulation(request.output, rows, provenance):
            reporter.line(f"wrote {file}")
    return rows


class Simulation:
    """A drafter that decodes along recorded answers, at one cost of a row.

    name: what the results call the drafter
    settings: configuration of the drafter and of decoding, which must be greedy
    """

    def __init__(
        self, name: str, settings: RunConfig, located: Reference, verifier: RecordedVerifier, slope: float
    ) -> None:
        self._name, self._settings, self._slope, self._tokenizer = name, settings, slope, located.tokenizer
        self._cost = PassCost((1, MAX_ROWS), (1,), ((1.0, 1.0 + slope * (MAX_ROWS - 1)),))
        self._verifier = _Clocked(verifier, self._cost)
        chosen = settings.decode
        most = chosen.draft_tokens if isinstance(chosen.draft_tokens, int) else None
        self._limits = Limits(chosen.max_new_tokens, verifier.context_length, located.tokenizer.stop_tokens, most)
        drafter: Drafter = build("drafter", settings.drafter)
        if drafter.rule is not None:
            raise RequestError(f"{name}: decides itself what is accepted, so that nothing is left to simulate")
        drafter.prepare(_resources(name, located, verifier, self._cost))
        if chosen.draft_tokens == "auto" and not drafter.chooses_size:
            drafter = AdaptiveLength(drafter, self._cost, self._verifier.clock)
        drafter.start([])
        self._drafter = drafter

    def decode(self, prompt: Prompt) -> Simulated:
        """Decode all turns of a prompt."""
        turns = conversation(prompt, self._tokenizer, self._limits.context_length, self._decode_turn)
        drafted = np.array([count for turn in turns for count in turn.generation.drafted], dtype=int)
        accepted = np.array([count for turn in turns for count in turn.generation.accepted], dtype=int)
        return Simulated(
            drafter=self._name,
            slope=self._slope,
            family=prompt.family,
            question=prompt.key,
            steps=len(accepted),
            emitted=int(accepted.sum()) + len(accepted),
            drafted=int(drafted.sum()),
            accepted=int(accepted.sum()),
            time=float(self._cost(1 + drafted, 0).sum()),
            oracle_time=float(self._cost(1 + accepted, 0).sum()),
        )

    def _decode_turn(self, tokens: list[int], key: str) -> _Turn:
        chosen = self._settings.decode
        generation = decode(
            *(tokens, self._drafter, self._verifier, rule_of(chosen), sampling_of(chosen), self._limits),
            generator=torch.Generator(),
        )
        return _Turn(generation)


@dataclass(frozen=True)
class _Turn:
    generation: Generation

    @property
    def token_ids(self) -> list[int]:
        return self.generation.tokens


class _Clocked:
    """The recorded verifier with a clock that only its passes advance."""

    def __init__(self, verifier: RecordedVerifier, cost: PassCost) -> None:
        self._verifier, self._cost, self._milliseconds = verifier, cost, 0.0
        self.device, self.keep = verifier.device, verifier.keep

    def prefill(self, tokens: Tensor) -> Scores:
        return self._verifier.prefill(tokens)

    def verify(self, last: int, draft: Draft) -> Scores:
        self._milliseconds += float(self._cost(np.array([draft.rows]), 0)[0])
        return self._verifier.verify(last, draft)

    def clock(self) -> float:
        """Return the simulated seconds so far."""
        return self._milliseconds / 1e3


@dataclass(frozen=True)
class _SimulatedResources(Resources):
    """Resources whose passes have a given cost instead of a measured one."""

    cost: PassCost = field(kw_only=True)

    @property
    def pass_cost(self) -> PassCost:
        return self.cost


def _resources(name: str, located: Reference, verifier: Verifier, cost: PassCost) -> Resources:
    def refuse(*_: Any) -> NoReturn:
        raise RequestError(f"{name}: drafts with the weights of a model, which cannot be simulated; run it")

    return _SimulatedResources(verifier, located.tokenizer.encode, refuse, refuse, {}, cost=cost)


def _settings(name: str, common: Sequence[str], settings: RunConfig) -> RunConfig:
    """Return the configuration of one drafter.

    Raises RequestError if decoding is not greedy, or if more than the drafter and the draft length differs.
    """
    own = settings_of([*common, *split(name)])
    if replace(own, drafter=settings.drafter, decode=settings.decode) != settings or (
        replace(own.decode, draft_tokens=settings.decode.draft_tokens) != settings.decode
    ):
        raise RequestError(
            f"{name}: only drafter.* and decode.draft_tokens may differ between the drafters that are compared; give "
            "other overrides once, for all of them"
        )
    chosen = own.decode
    if chosen.temperature or chosen.stop or rule_of(chosen).lossy or rule_of(chosen).simulated:
        raise RequestError(
            "the recorded answers are greedy and end with a stop token or at decode.max_new_tokens; simulate with "
            "decode.temperature=0, without decode.stop and with decode.acceptance=exact"
        )
    return own


def _prompts(settings: RunConfig, skip: int) -> list[Prompt]:
    """Return the prompts of the configuration, of each task family those after the first ``skip``."""
    data = settings.data
    loaded = load_prompts(data if data.limit is None else replace(data, limit=skip + data.limit))
    families = groupby(sorted(loaded, key=lambda prompt: prompt.family), key=lambda prompt: prompt.family)
    found = [prompt for _, members in families for prompt in list(members)[skip:]]
    if not found:
        raise RequestError(f"--skip={skip} leaves no prompt of data={data.name}")
    return found


def _recordings(settings: RunConfig, located: Reference) -> Path:
    """Return the folder for the recordings of the configuration's verifier by this version of the code."""
    key = {
        "model": located.checkpoint.identity,
        "verifier": settings.verifier,
        "calibration": asdict(settings.calibration),
    }
    return RECORDINGS / hashlib.sha256(whole_key(key, located.device, located.dtype).encode()).hexdigest()[:12]


def _provenance(settings: RunConfig, located: Reference, prompts: Sequence[Prompt], runs: int) -> Provenance:
    machine = describe_machine(located.device)
    return Provenance(
        code_version=code_version(),
        git_commit=machine.git_commit,
        git_dirty=machine.git_dirty,
        finished=(datetime.now(UTC).date().isoformat(),),
        machine=machine.name,
        device=machine.device,
        threads=machine.threads,
        torch=machine.packages["torch"],
        model=settings.model.name,
        model_origin=located.checkpoint.origin,
        weights_on_grid=share_on_grid(located.checkpoint),
        prompt_sets=(prompt_set_hash(list(prompts)),),
        prompts=len(prompts),
        repetitions=(1,),
        max_new_tokens=(settings.decode.max_new_tokens,),
        shared_baselines=False,
        runs=runs,
    )
