"""Two hundred damaged model folders: each is refused in one line that names the folder, or read right."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from quasar.config.schema import ModelSource
from quasar.errors import RequestError
from quasar.model.sources import locate
from quasar.model.tokenizer import _byte_tokenizer, load_tokenizer
from quasar.quantization.packed import load_reference
from tests.selection import fast

CHUNKS, FOLDERS_PER_CHUNK = 8, 25
TOKENS = torch.arange(12)
KINDS = ("whole", "sharded", "quantized")
WRONG: tuple[Any, ...] = (-1, True, "text", None, [], {}, [None], 1e300, 1 << 70, float("nan"), {"a": {"b": []}})
"""Values that no key of the folders may have, or that mean what a missing key means."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A valid folder of each kind. Their configs have no value that differs from the one that a missing key has."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=256,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 2 * parameter.shape[1] ** -0.5)
    folders = {kind: root / kind for kind in KINDS}
    for folder in folders.values():
        model.save_pretrained(folder)
        _byte_tokenizer().save_pretrained(folder)
    _shard(folders["sharded"])
    _quantize(folders["quantized"])
    return folders


@pytest.fixture(scope="module")
def expected(originals: dict[str, Path]) -> dict[str, Tensor]:
    return {kind: logits(folder, kind) for kind, folder in originals.items()}


@pytest.mark.timeout(170)
@pytest.mark.parametrize("chunk", fast(range(CHUNKS), 0, 1))
def test_a_damaged_folder_is_refused_in_one_line_or_read_right(
    chunk: int, originals: dict[str, Path], expected: dict[str, Tensor], tmp_path: Path
) -> None:
    refused = 0
    for seed in range(chunk * FOLDERS_PER_CHUNK, (chunk + 1) * FOLDERS_PER_CHUNK):
        choice = random.Random(seed)
        kind = choice.choice(KINDS)
        folder = tmp_path / str(seed)
        shutil.copytree(originals[kind], folder)
        what = choice.choice(DAMAGES)(folder, choice)
        outcome: Tensor | RequestError
        try:
            outcome = logits(folder, kind)
        except RequestError as error:
            outcome = error
        except Exception as error:
            raise AssertionError(f"seed {seed} ({kind}, {what}): {type(error).__name__}: {error}") from error
        place = f"seed {seed} ({kind}, {what})"
        if isinstance(outcome, Tensor):
            assert torch.equal(outcome, expected[kind]), f"{place}: read wrong without a word"
        else:
            refused += 1
            assert str(folder) in str(outcome), f"{place}: {outcome}"
            assert "\n" not in str(outcome), f"{place}: {outcome}"
        shutil.rmtree(folder)
    assert refused > FOLDERS_PER_CHUNK // 3


def logits(folder: Path, kind: str) -> Tensor:
    """Read everything that a run reads, and compute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = ModelSource(name="model", source="path", path=str(folder), dequantize=kind == "quantized")
        checkpoint = locate(source)
        tokenizer = load_tokenizer(checkpoint)
        tokenizer.encode_chat([{"role": "user", "content": "Guten Tag, 世界"}])
        model = load_reference(checkpoint, torch.float32, torch.device("cpu"), lambda *_: None)
        return model(TOKENS)


def _shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    listed = {name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in sorted(set(listed.values())):
        save_file({name: tensors[name] for name in tensors if listed[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _quantize(folder: Path) -> None:
    """Give the linear layers of the blocks int8 weights with one scale per row."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        scales = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[name], tensors[f"{name}_scale"] = torch.round(tensors[name] / scales).to(torch.int8), scales
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    (folder / "config.json").write_text(json.dumps(config))


def _json_file(folder: Path, choice: random.Random) -> Path:
    return choice.choice(sorted(folder.glob("*.json")))


def _places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to the values of a JSON object; of long lists and vocabularies only the first entries."""
    found = [path] if path else []
    if isinstance(content, dict):
        for key in list(content)[:40]:
            found += _places(content[key], (*path, key))
    elif isinstance(content, list):
        for index in range(min(len(content), 3)):
            found += _places(content[index], (*path, index))
    return found


def _in_json(folder: Path, choice: random.Random, change: Callable[[Any, Any], None]) -> str:
    file = _json_file(folder, choice)
    content = json.loads(file.read_text())
    places = _places(content)
    if not places:
        return f"{file.name} unchanged"
    *owners, key = choice.choice(places)
    owner = content
    for one in owners:
        owner = owner[one]
    change(owner, key)
    file.write_text(json.dumps(content))
    return f"{file.name}: {[*owners, key]}"


def wrong_value(folder: Path, choice: random.Random) -> str:
    value = choice.choice(WRONG)
    return f"{_in_json(folder, choice, lambda owner, key: owner.__setitem__(key, value))} = {value!r}"


def missing_value(folder: Path, choice: random.Random) -> str:
    return f"{_in_json(folder, choice, lambda owner, key: owner.__delitem__(key))} deleted"


def broken_json(folder: Path, choice: random.Random) -> str:
    file = _json_file(folder, choice)
    text = file.read_bytes()
    broken = choice.choice(
        [text[: len(text) // 2], b"", b"[]", b"null", b"\xff\xfe" + text, b'{"a":' * 50_000, text[:-2] + b", }", b"7"]
    )
    file.write_bytes(broken)
    return f"{file.name}: {broken[:20]!r}"


def missing_file(folder: Path, choice: random.Random) -> str:
    file = choice.choice(sorted(folder.iterdir()))
    file.unlink()
    return f"{file.name} deleted"


def truncated_file(folder: Path, choice: random.Random) -> str:
    file = choice.choice(sorted(folder.glob("*.safetensors")))
    content = file.read_bytes()
    size = choice.choice([0, 4, 8, 100, len(content) // 2, len(content) - 1])
    file.write_bytes(content[:size])
    return f"{file.name} cut at {size}"


def damaged_header(folder: Path, choice: random.Random) -> str:
    file = choice.choice(sorted(folder.glob("*.safetensors")))
    content = bytearray(file.read_bytes())
    place = choice.randrange(0, 8 + min(int.from_bytes(content[:8], "little"), 2000))
    content[place] ^= 1 << choice.randrange(8)
    file.write_bytes(bytes(content))
    return f"{file.name}: byte {place}"


def _in_tensors(folder: Path, choice: random.Random, change: Callable[[dict[str, Tensor], str], str]) -> str:
    file = choice.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(file)
    name = choice.choice(sorted(tensors))
    what = change(tensors, name)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    return f"{file.name}: {name} {what}"


def missing_tensor(folder: Path, choice: random.Random) -> str:
    def change(tensors: dict[str, Tensor], name: str) -> str:
        del tensors[name]
        return "deleted"

    return _in_tensors(folder, choice, change)


def extra_tensor(folder: Path, choice: random.Random) -> str:
    extra = choice.choice(["bias", "weight_g_idx", "weight_zero_point", "qweight", "lora_A.weight", "extra"])

    def change(tensors: dict[str, Tensor], name: str) -> str:
        tensors[f"{name.rpartition('.')[0]}.{extra}"] = torch.ones(7)
        return f"with {extra} beside it"

    return _in_tensors(folder, choice, change)


def wrong_shape(folder: Path, choice: random.Random) -> str:
    def change(tensors: dict[str, Tensor], name: str) -> str:
        tensor = tensors[name]
        shapes = [
            tensor[:1],
            tensor[:0],
            tensor.flatten()[0],
            tensor.repeat(2, *[1] * (tensor.dim() - 1)),
            tensor[None],
        ]
        shapes += (
            [tensor.T] if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1] and 1 not in tensor.shape else []
        )
        # A scale [N, 1] may be written as [N] too.
        tensors[name] = choice.choice(shapes).clone()
        return f"is {list(tensors[name].shape)}"

    return _in_tensors(folder, choice, change)


def wrong_dtype(folder: Path, choice: random.Random) -> str:
    kinds = (torch.int8, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.int64)

    def change(tensors: dict[str, Tensor], name: str) -> str:
        other = choice.choice([kind for kind in kinds if kind != tensors[name].dtype])
        tensors[name] = tensors[name].to(other)
        return f"is {other}"

    return _in_tensors(folder, choice, change)


DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (
    wrong_value,
    wrong_value,
    wrong_value,
    missing_value,
    missing_value,
    broken_json,
    missing_file,
    truncated_file,
    damaged_header,
    missing_tensor,
    extra_tensor,
    wrong_shape,
    wrong_dtype,
)
