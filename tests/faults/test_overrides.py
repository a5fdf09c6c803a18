"""Over a thousand overrides: each is refused in one clear error or means exactly what an independent table says.

The table below does not know the program's schema: it says per key which values are right. An override must not raise
anything but the program's error or Hydra's own, and no wrong value may pass.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from quasar.config.rules import check
from quasar.config.schema import CONF, RunConfig, register
from quasar.errors import RequestError

Valid = Callable[[Any], bool]

VALUES: dict[str, Any] = {
    "0": 0,
    "1": 1,
    "-1": -1,
    "7": 7,
    "16": 16,
    "64": 64,
    "10000000000000000000000": 10**22,
    "0.5": 0.5,
    "1.0": 1.0,
    "2.5": 2.5,
    "-0.25": -0.25,
    "1e-300": 1e-300,
    "1e300": 1e300,
    "7e6789": math.inf,
    "-inf": -math.inf,
    "nan": math.nan,
    "true": True,
    "false": False,
    "null": None,
    "''": "",
    "word": "word",
    "auto": "auto",
    "'5'": "5",
    "'true'": "true",
    "[]": [],
    "[1,2]": [1, 2],
    "[1,1]": [1, 1],
    "[a,b]": ["a", "b"],
    "[a,'']": ["a", ""],
    "[1.5]": [1.5],
    "[true]": [True],
    "{a:1}": {"a": 1},
}
"""Values as the command line writes them, with their meaning."""


def number(value: Any) -> float | int | None:
    """The number that a value is; a text of digits is one, true is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return int(value) if value.isdigit() else None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def integer(low: int, high: int = 10**40) -> Valid:
    return lambda value: isinstance(found := number(value), int) and low <= found <= high


def real(low: float, high: float = 1e308, above: bool = False) -> Valid:
    def valid(value: Any) -> bool:
        found = number(value)
        return found is not None and (low < found if above else low <= found) and found <= high

    return valid


def either(*choices: Any) -> Valid:
    return lambda value: any(type(value) is type(choice) and value == choice for choice in choices)


def or_null(valid: Valid) -> Valid:
    return lambda value: value is None or valid(value)


def any_of(*options: Valid) -> Valid:
    return lambda value: any(valid(value) for valid in options)


def text(value: Any) -> bool:
    return (isinstance(value, str) and bool(value)) or (isinstance(value, int) and not isinstance(value, bool))


def texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(text, value))


def layers(least: int) -> Valid:
    def valid(value: Any) -> bool:
        if not isinstance(value, list) or len(value) < least:
            return False
        return all(integer(0)(entry) for entry in value) and len(set(value)) == len(value)

    return valid


def ascending(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(integer(1)(entry) for entry in value):
        return False
    numbers = [int(entry) for entry in value]
    return all(before < after for before, after in itertools.pairwise(numbers))


flag = either(True, False)
seed = integer(0, 2**63 - 1)
probability = real(1e-6, 1)

KEYS: dict[tuple[str, ...], dict[str, Valid]] = {
    (): {
        "name": text,
        "device": either("auto", "cpu", "cuda"),
        "threads": or_null(integer(1)),
        "seed": seed,
        "output_dir": text,
        "resume": flag,
        "calibration.path": or_null(text),
        "calibration.prompts": integer(0),
        "calibration.max_tokens": integer(1),
        "calibration.answers": integer(0),
        "calibration.seed": seed,
        "evaluate.baselines": flag,
        "evaluate.fidelity": flag,
        "evaluate.accuracy": flag,
        "evaluate.exactness": or_null(flag),
        "evaluate.repetitions": integer(1),
        "evaluate.passes.repetitions": integer(0),
        "evaluate.passes.rows": lambda value: ascending(value) and number(value[0]) == 1,
        "evaluate.passes.contexts": ascending,
        "arm": or_null(text),
        "publish.prompts": or_null(integer(1)),
        "publish.by_family": texts,
        "publish.figures": texts,
        "publish.pass_tables": texts,
        "publish.pass_figures": texts,
        "sweep.dry_run": flag,
        "sweep.any_code": flag,
        "sweep.share_baselines": flag,
        "sweep.allow_parallel": flag,
        "logger.mode": either("auto", "online", "offline"),
        "logger.project": text,
        "logger.entity": or_null(text),
        "logger.tags": texts,
        "logger.wait": real(0, 1e6),
        "logger.name": either("none"),
        "decode.max_new_tokens": integer(1),
        "decode.draft_tokens": or_null(any_of(integer(1), either("auto"))),
        "decode.stop": texts,
        "decode.top_k": either(None),
        "decode.top_p": real(1, 1),
        "decode.temperature": any_of(real(0, 0), real(1e-6, 1e6)),
        "decode.acceptance": either("exact"),
        "data.limit": or_null(integer(1)),
        "data.path": either(None),
        "data.name": either("builtin"),
        "model.name": either("smollm2_135m"),
        "model.seed": integer(0, 0),
        "model.repo": text,
        "model.revision": or_null(text),
        "model.path": or_null(text),
        "model.source": either("auto"),
        "verifier.name": either("int4"),
        "verifier.dtype": either("auto"),
        "verifier.method": either("gptq", "awq", "rtn"),
        "verifier.group_size": integer(1),
        "verifier.symmetric": flag,
        "verifier.clip": flag,
        "verifier.activation_bits": integer(16, 16),
        "drafter.window": any_of(integer(1), either("auto")),
        "drafter.ngram": integer(3),
        "drafter.guesses": integer(1),
        "drafter.pool_capacity": or_null(integer(1)),
        "drafter.pool_from_prompt": flag,
        "drafter.name": either("lookahead"),
    },
    ("decode=sampling",): {
        "decode.temperature": any_of(real(0, 0), real(1e-6, 1e6)),
        "decode.top_k": or_null(integer(1)),
        "decode.top_p": probability,
    },
    ("decode=sampling", "decode.acceptance=typical"): {
        "decode.typical_threshold": probability,
        "decode.typical_alpha": probability,
    },
    ("model=tiny", "data=specbench", "drafter=ngram", "verifier=int8"): {
        "data.path": or_null(text),
        "model.seed": seed,
        "model.path": either(None),
        "model.repo": either(None),
        "model.revision": either(None),
        "model.source": either("random"),
        "drafter.num_tokens": integer(1),
        "drafter.match": either("recent", "first", "frequent"),
        "drafter.n_max": integer(1),
        "drafter.branches": integer(1),
        "verifier.alpha": any_of(real(0, 1), either("auto")),
        "verifier.lm_head_bits": integer(16, 16),
        "verifier.kv_bits": any_of(integer(16, 16), integer(8, 8), integer(4, 4)),
    },
    ("drafter=suffix_automaton",): {
        "drafter.match": either("scored", "recent", "frequent"),
        "drafter.corpus": or_null(text),
        "drafter.length_factor": or_null(real(0, above=True)),
        "drafter.min_probability": lambda value: real(0)(value) and number(value) < 1,
    },
    ("drafter=mixture",): {
        "drafter.num_tokens": integer(1, 63),
        "drafter.order": integer(1, 16),
        "drafter.candidates": integer(1, 63),
        "drafter.memory": either("prompt", "session"),
    },
    ("drafter=recycling",): {
        "drafter.num_tokens": any_of(integer(1, 63), either("auto")),
        "drafter.candidates": integer(1, 63),
        "drafter.depth": integer(1),
        "drafter.memory": either("prompt", "session"),
    },
    ("drafter=layerskip", "verifier=pruned"): {
        "drafter.num_tokens": integer(1),
        "drafter.exit_layer": or_null(integer(1)),
        "drafter.skip_layers": or_null(layers(0)),
        "drafter.skip_ratio": lambda value: real(0, above=True)(value) and number(value) < 1,
        "drafter.confidence": lambda value: real(0)(value) and number(value) < 1,
        "drafter.draft_verifier": or_null(text),
        "verifier.ratio": lambda value: real(0)(value) and number(value) < 1,
        "verifier.heads": flag,
    },
    ("verifier=pruned", "verifier.method=depth"): {
        "verifier.layers": or_null(layers(1)),
    },
    ("drafter=model", "verifier=bnb_int8", "data=gsm8k"): {
        "drafter.draft.ratio": lambda value: real(0)(value) and number(value) < 1,
        "drafter.draft.name": either("pruned"),
        "verifier.threshold": real(0),
        "data.hub.split": text,
        "data.hub.revision": text,
    },
}
CROSS = {"decode.acceptance": "typical", "decode.draft_tokens": None}


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    """Hydra on the project's conf/; every test composes in it."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    composed.cache_clear()


@cache
def composed(*overrides: str) -> tuple[DictConfig, dict[str, str | None]]:
    """What Hydra composes, and the file that it chose for every group."""
    config = compose("config", overrides=list(overrides), return_hydra_config=True)
    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return config, choices


def requested(base: tuple[str, ...], *overrides: str) -> RunConfig:
    """Apply overrides to a composed configuration, as Hydra does, and check the result."""
    config, choices = composed(*base)
    config = copy.deepcopy(config)
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(list(overrides)), config)
    return check(config, choices)


def at(settings: RunConfig, key: str) -> Any:
    found: Any = settings
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


def same(found: Any, given: Any) -> bool:
    """Whether a value arrived as it was meant."""
    if isinstance(given, list) and isinstance(found, list):
        return len(found) == len(given) and all(map(same, found, given))
    if isinstance(given, bool) or isinstance(found, bool):
        return found is given
    if isinstance(given, str) and isinstance(found, int | float):
        return found == float(given)
    if isinstance(found, str) or isinstance(given, str):
        return str(found) == str(given)
    return bool(found == given)


CASES = [(base, key) for base, keys in KEYS.items() for key in keys]


def test_there_are_over_a_thousand() -> None:
    assert len(CASES) * len(VALUES) > 1000


@pytest.mark.parametrize(("base", "key"), CASES, ids=[f"{key} {' '.join(base)}".strip() for base, key in CASES])
def test_a_value_is_refused_or_means_what_it_says(base: tuple[str, ...], key: str) -> None:
    valid = KEYS[base][key]
    wrong: list[str] = []
    for written, value in VALUES.items():
        override = f"{key}={written}"
        try:
            settings = requested(base, override)
        except RequestError as error:
            if valid(value):
                wrong.append(f"{override} is right, but refused: {error}")
            elif key.split(".")[-1] not in str(error) and key.split(".")[0] not in str(error):
                wrong.append(f"{override}: the message does not name the key: {error}")
            elif "\n" in str(error):
                wrong.append(f"{override}: a message of several lines: {error}")
        except HydraException as error:
            if valid(value):
                wrong.append(f"{override} is right, but Hydra refuses it: {error}")
        else:
            if not valid(value):
                wrong.append(f"{override} is wrong, but accepted as {at(settings, key)!r}")
            elif not same(at(settings, key), value):
                wrong.append(f"{override} became {at(settings, key)!r}")
    assert wrong == []


MISSPELLED = {
    "decode.max_tokens": "decode.max_new_tokens",
    "decode.temprature": "decode.temperature",
    "model.pth": "model.path",
    "data.limits": "data.limit",
    "evaluate.accurac": "evaluate.accuracy",
    "logger.tag": "logger.tags",
    "calibration.prompt": "calibration.prompts",
    "sweep.dryrun": "sweep.dry_run",
    "verifier.groupsize": "verifier.group_size",
    "drafter.windows": "drafter.window",
    "thread": "threads",
    "model.package.grid.bit": "model.package.grid.bits",
}


@pytest.mark.parametrize(("key", "meant"), MISSPELLED.items())
def test_unknown_keys_are_refused_with_the_nearest_known_one(key: str, meant: str) -> None:
    with pytest.raises(RequestError, match=rf"^{key}=1: .*did you mean .*{meant}"):
        requested((), f"+{key}=1")


def leaves(config: Any, place: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield f"{place}{key}"
        if isinstance(value, dict) and key != "chat_template":
            yield from leaves(value, f"{place}{key}.")


REMOVABLE = [(), ("verifier=fp16", "drafter=model"), ("model=tiny", "drafter=chain", "data=gsm8k")]


@pytest.mark.parametrize("base", REMOVABLE)
def test_no_key_can_be_removed(base: tuple[str, ...]) -> None:
    config, _ = composed(*base)
    for key in leaves(OmegaConf.to_container(config)):
        with pytest.raises((RequestError, HydraException)) as refused:
            requested(base, f"~{key}")
        assert key.split(".")[-1] in str(refused.value) or key in str(refused.value), key


REFUSED = {
    "verifier=[fp16,int4]": r"^verifier must be one file of conf/verifier: .*use -m with verifier=A,B",
    "~verifier": "^verifier must be one file",
    "~logger": "^logger must be one file",
    "verifier=fp16 verifier.name=int8": r"^verifier\.name=int8: must be fp16, .*labelled",
    "verifier=fp16 +verifier.unknown=1": r"^verifier\.unknown=1: verifier has no key",
    "drafter=none +drafter.dtype=auto": r"^drafter\.dtype=auto: drafter has no key",
    "verifier=fp16 verifier._target_=quasar.verifiers.int8.Int8Verifier": r"is the class of verifier=int8",
    "verifier=fp16 verifier._target_=no.such.Verifier": r"^verifier\._target_=no\.such\.Verifier: .*cannot be imported",
    "verifier=fp16 verifier._target_=math.pi": r"is not a class",
    "verifier=fp16 verifier.dtype=int3": r"^verifier\.dtype=int3: must be one of auto, bfloat16",
    "drafter=model +drafter.draft.foo=2": r"^drafter\.draft\.foo=2: drafter\.draft has no key",
    "drafter=chain drafter.members=[ngram,nosuch]": r"drafter 'nosuch' is not in conf/drafter; choose one of cascade",
    "drafter=chain drafter.members=[{name:ngram,num_tokens:true}]": r"num_tokens=true",
    "drafter=chain drafter.members=[{num_tokens:3}]": r"lacks a name",
    "model=smollm2_135m model.source=random": r"^model\.source=random: must be auto or hub or package",
    "model=qwen3_8b model.source=package": r"^model\.source=package: .*has no model\.package",
    "model=path model.path=x model.revision=y": r"^model\.revision=y: must be null here",
    "decode=sampling decode.acceptance=typical drafter=replay": r"contains replay",
    "name=a/../../b": r"^name=.*below output_dir",
    "name=/a": r"^name=/a: .*below output_dir",
    "name=${nosuch}": "^name: cannot be resolved",
    "seed=${oc.env:QUASAR_NO_SUCH}": "^seed: cannot be resolved",
    "decode.typical_alpha=0.5": r"^decode\.typical_alpha=0\.5: has no effect with decode\.acceptance=exact; "
    r"choose decode\.acceptance=typical, or leave decode\.typical_alpha at 0\.3",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_combinations_that_mislead_are_refused(overrides: str) -> None:
    """Through the whole composition, groups included."""
    config, choices = composed(*overrides.split(" "))
    with pytest.raises(RequestError, match=REFUSED[overrides]):
        check(config, choices)


def test_random_combinations_never_raise_anything_else() -> None:
    """Several overrides at once: all of them right, or refused."""
    generator = random.Random(0)
    accepted = 0
    for _ in range(400):
        base = generator.choice(list(KEYS))
        chosen = generator.sample(list(KEYS[base]), generator.randint(1, min(3, len(KEYS[base]))))
        written = {key: generator.choice(list(VALUES)) for key in chosen}
        try:
            settings = requested(base, *(f"{key}={value}" for key, value in written.items()))
        except (RequestError, HydraException):
            continue
        else:
            accepted += 1
            assert all(KEYS[base][key](VALUES[value]) for key, value in written.items()), written
            assert all(same(at(settings, key), VALUES[value]) for key, value in written.items()), written
    assert accepted > 20
