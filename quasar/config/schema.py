"""Typed schema of ``conf/``. The values and one line of documentation for each are in the YAML files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from quasar.errors import RequestError

_CHECKOUT, _WHEEL = (Path(__file__).parents[n] / "conf" for n in (2, 1))
CONF = _CHECKOUT if _CHECKOUT.is_dir() and not _WHEEL.is_dir() else _WHEEL
"""The configuration folder: next to the packages in a checkout, inside ``quasar`` in an installed wheel."""


@dataclass
class Grid:
    """A quantization grid that a model's weights are already on."""

    bits: int = MISSING
    symmetric: bool = MISSING
    group_size: int = MISSING


@dataclass
class PackageSource:
    """A GGUF file inside a wheel: the wheel's requirement and size, the file's path, SHA-256 and quantization grid."""

    requirement: str = MISSING
    download_bytes: int = MISSING
    file: str = MISSING
    sha256: str = MISSING
    grid: Optional[Grid] = None


@dataclass
class ModelSource:
    """conf/model/*.yaml"""

    name: str = MISSING
    source: str = MISSING
    repo: Optional[str] = None
    revision: Optional[str] = None
    path: Optional[str] = None
    dequantize: bool = False
    package: Optional[PackageSource] = None
    seed: int = 0
    chat_template: dict[str, Any] = field(default_factory=dict)


@dataclass
class DecodeConfig:
    """conf/decode/*.yaml"""

    max_new_tokens: int = MISSING
    temperature: float = MISSING
    top_k: Optional[int] = MISSING
    top_p: float = MISSING
    draft_tokens: int | str | None = MISSING
    stop: list[str] = MISSING
    acceptance: str = MISSING
    typical_threshold: float = MISSING
    typical_alpha: float = MISSING


@dataclass
class HubDataset:
    """A dataset of the Hugging Face hub: repository, commit, configuration (null: the only one) and split."""

    repo: str = MISSING
    revision: str = MISSING
    subset: Optional[str] = None
    split: str = MISSING


@dataclass
class DataConfig:
    """conf/data/*.yaml"""

    name: str = MISSING
    path: Optional[str] = None
    limit: Optional[int] = MISSING
    hub: Optional[HubDataset] = None


@dataclass
class CalibrationConfig:
    """The calibration node of conf/config.yaml"""

    path: Optional[str] = MISSING
    prompts: int = MISSING
    max_tokens: int = MISSING
    seed: int = MISSING


@dataclass
class EvaluateConfig:
    """The evaluate node of conf/config.yaml"""

    baselines: bool = MISSING
    fidelity: bool = MISSING
    accuracy: bool = MISSING
    unsafe_code: bool = MISSING
    exactness: Optional[bool] = MISSING
    repetitions: int = MISSING


@dataclass
class LoggerConfig:
    """conf/logger/*.yaml"""

    name: str = MISSING
    mode: str = MISSING
    project: str = MISSING
    entity: Optional[str] = MISSING
    tags: list[str] = MISSING
    wait: float = MISSING


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

    prompts: Optional[int] = MISSING
    tables: dict[str, list[str]] = MISSING
    by_family: list[str] = MISSING
    figures: list[str] = MISSING


@dataclass
class RunConfig:
    """The whole configuration. The keys of drafter and verifier are not fixed here: their classes check them."""

    name: str = MISSING
    arm: Optional[str] = MISSING
    model: ModelSource = field(default_factory=ModelSource)
    drafter: dict[str, Any] = MISSING
    verifier: dict[str, Any] = MISSING
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    device: str = MISSING
    threads: Optional[int] = MISSING
    seed: int = MISSING
    output_dir: str = MISSING
    resume: bool = MISSING
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)


def register() -> None:
    """Register the schema with Hydra under the name that conf/config.yaml refers to."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def check(config: DictConfig) -> RunConfig:
    """Return the configuration as typed objects.

    Raises RequestError for a value out of range; the message names the key and the allowed values.
    """
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, RunConfig)
    decode = typed.decode
    _require(decode.max_new_tokens >= 1, "decode.max_new_tokens", decode.max_new_tokens, "at least 1")
    _require(decode.temperature >= 0, "decode.temperature", decode.temperature, "0 (greedy) or more")
    _require(0 < decode.top_p <= 1, "decode.top_p", decode.top_p, "above 0 and at most 1")
    _require(decode.top_k is None or decode.top_k >= 1, "decode.top_k", decode.top_k, "at least 1, or null")
    _require(
        decode.draft_tokens in (None, "auto") or (isinstance(decode.draft_tokens, int) and decode.draft_tokens >= 1),
        "decode.draft_tokens",
        decode.draft_tokens,
        "at least 1, auto, or null (the drafter's default); use drafter=none to draft nothing",
    )
    _require(all(decode.stop), "decode.stop", decode.stop, "a list of texts of at least one character")
    _require(decode.acceptance in ("exact", "typical"), "decode.acceptance", decode.acceptance, "exact or typical")
    _require(
        decode.acceptance == "exact" or decode.temperature > 0,
        "decode.acceptance",
        decode.acceptance,
        f"exact at decode.temperature={decode.temperature:g}, because greedy decoding does not sample; raise the "
        "temperature",
    )
    for key in ("typical_threshold", "typical_alpha"):
        _require(0 < getattr(decode, key) <= 1, f"decode.{key}", getattr(decode, key), "above 0 and at most 1")
    _require(
        typed.data.limit is None or typed.data.limit >= 1, "data.limit", typed.data.limit, "at least 1, or null (all)"
    )
    _require(
        typed.threads is None or typed.threads >= 1, "threads", typed.threads, "at least 1, or null (PyTorch's choice)"
    )
    _require(typed.calibration.prompts >= 0, "calibration.prompts", typed.calibration.prompts, "at least 0 (none)")
    _require(typed.calibration.max_tokens >= 1, "calibration.max_tokens", typed.calibration.max_tokens, "at least 1")
    repetitions = typed.evaluate.repetitions
    _require(repetitions >= 1, "evaluate.repetitions", repetitions, "at least 1")
    devices = ("auto", "cpu", "cuda")
    _require(typed.device in devices, "device", typed.device, f"one of {', '.join(devices)}")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    dtype = typed.verifier.get("dtype")
    _require(dtype in dtypes, "verifier.dtype", dtype, f"one of {', '.join(dtypes)}")
    sources = ("auto", "hub", "package", "path", "random")
    _require(typed.model.source in sources, "model.source", typed.model.source, f"one of {', '.join(sources)}")
    modes = ("auto", "online", "offline")
    _require(typed.logger.mode in modes, "logger.mode", typed.logger.mode, f"one of {', '.join(modes)}")
    return typed


def _require(holds: bool, key: str, value: object, remedy: str) -> None:
    if not holds:
        raise RequestError(f"{key}={value}: must be {remedy}")
