"""Reads a configuration as a `RunConfig`: every key by the schema, then the rules that several keys must follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from quasar.config.checks import converted, read, shown
from quasar.config.component import checked_component
from quasar.config.groups import check_choices
from quasar.config.schema import ModelSource, RunConfig
from quasar.errors import RequestError, first_line


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
