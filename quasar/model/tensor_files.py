"""The safetensors files of a model folder: which of them belong to the model, and the tensors in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quasar.config.inputs import open_regular
from quasar.errors import RequestError
from quasar.model.json_files import read_object, warn_once

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")

# Buffers that old versions of transformers wrote; transformers computes them from the config and does not read them.
_COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
_FLOATS = {"F64", "F32", "F16", "BF16"}


class TensorFiles:
    """The tensors of a folder's safetensors files, by name.

    The files are those that transformers reads: ``model.safetensors``, or those in the index. Without both it is a
    single file, or all parts of one model.

    Raises RequestError if files are missing, damaged or of several models, or if the index does not list exactly the
    tensors in the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        if (folder / "adapter_config.json").exists():
            raise RequestError(
                f"{folder}: contains adapter_config.json, and adapters are not supported; merge the adapter into the "
                "model and save it to another folder"
            )
        listed = _indexed(folder)
        for file in _files(folder, listed):
            for name in self._handle(file).keys():  # noqa: SIM118 (safe_open is no mapping)
                if name in self._where:
                    raise RequestError(f"{folder}: tensor {name} is in both {self._where[name].name} and {file.name}")
                self._where[name] = file
        if listed is not None:
            self._require_listed(listed)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        return [name for name in self._where if not name.endswith(_COMPUTED)]

    def file_of(self, name: str) -> Path:
        try:
            return self._where[name]
        except KeyError:
            raise RequestError(f"{self.folder}: tensor {name} is missing; the checkpoint is incomplete") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype as safetensors names it, such as BF16."""
        return str(self._slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        file = self.file_of(name)
        try:
            tensor: Tensor = self._handle(file).get_tensor(name)
        except SafetensorError as error:
            raise _corrupt(file, error) from None
        return tensor

    def read_float(self, name: str) -> Tensor:
        """Read a tensor of floats. Raises RequestError for any other dtype: its integers are no weights as they are."""
        if (dtype := self.dtype(name)) not in _FLOATS:
            raise RequestError(
                f"{self.file_of(name)}: tensor {name} is {dtype}, which is no dtype of unquantized weights; "
                f"supported are {', '.join(sorted(_FLOATS))}"
            )
        return self.read(name)

    def require_only(self, names: Iterable[str], because: str) -> None:
        """Raise RequestError if the files contain tensors besides ``names``."""
        extra = sorted(set(self.names()) - set(names))
        if extra:
            raise RequestError(
                f"{self.file_of(extra[0])}: contains {_some(extra)}, which {because}; config and weights do not "
                "belong together"
            )

    def require_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise RequestError if a tensor is missing or has another shape."""
        missing = sorted(name for name in shapes if name not in self._where)
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise RequestError(f"{self.folder}: tensor {_some(missing)} {verb} missing; the checkpoint is incomplete")
        for name, expected in shapes.items():
            if (found := self.shape(name)) != expected:
                raise RequestError(
                    f"{self.file_of(name)}: {name} has shape {found}, but config.json implies {expected}; config and "
                    "weights do not belong together"
                )

    def _slice(self, name: str) -> Any:  # safetensors names no public type
        file = self.file_of(name)
        try:
            return self._handle(file).get_slice(name)
        except SafetensorError as error:
            raise _corrupt(file, error) from None

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            # safetensors would wait for the content of a pipe.
            open_regular(file).close()
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _corrupt(file, error) from None
        return self._open[file]

    def _require_listed(self, listed: Mapping[str, str]) -> None:
        index = self.folder / INDEX
        absent = sorted(name for name, file in listed.items() if self._where.get(name) != self.folder / file)
        if absent:
            name = absent[0]
            raise RequestError(f"{index}: tensor {name} is not in {listed[name]}; the checkpoint is incomplete")
        self.require_only(
            [*listed, *(name for name in self._where if name.endswith(_COMPUTED))], f"{INDEX} does not list"
        )


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape and values."""
    return first.shape == second.shape and torch.equal(first, second)


def _indexed(folder: Path) -> dict[str, str] | None:
    """Return the file of every tensor in the index; None if there is no index."""
    index = folder / INDEX
    if not index.exists():
        return None
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise RequestError(f"{index}: key 'weight_map' must be an object that maps tensors to files")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise RequestError(f"{index}: weight_map.{name}={file!r}: must be a safetensors file of the folder")
    return listed


def _files(folder: Path, listed: Mapping[str, str] | None) -> list[Path]:
    present = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("._"))
    if not present:
        raise RequestError(f"{folder}: contains no *.safetensors; only safetensors and GGUF files are supported")
    if listed is not None:
        files = sorted({folder / file for file in listed.values()})
    elif folder / WHOLE in present:
        files = [folder / WHOLE]
    else:
        # Mistral's own format, which its repositories contain beside that of transformers.
        others = [file for file in present if not file.name.startswith("consolidated")]
        files = others or present
        if len(files) > 1 or SHARD.fullmatch(files[0].name):
            _require_all_parts(folder, files)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise RequestError(f"{folder}: {', '.join(missing)} of {INDEX} is missing; the checkpoint is incomplete")
    unread = [file.name for file in present if file not in files and not file.name.startswith("consolidated")]
    if unread:
        warn_once(f"{folder}: {', '.join(unread)} is not read, because it is not part of the model")
    return files


def _require_all_parts(folder: Path, files: list[Path]) -> None:
    parts = [SHARD.fullmatch(file.name) for file in files]
    names = {(part["stem"], part["count"]) for part in parts if part is not None}
    numbers = sorted(int(part["number"]) for part in parts if part is not None)
    if None in parts or len(names) != 1 or numbers != list(range(1, int(next(iter(names))[1]) + 1)):
        raise RequestError(
            f"{folder}: {_some([file.name for file in files])} are not the parts of one model, and there is no "
            f"{INDEX}; download the checkpoint again"
        )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _corrupt(file: Path, error: Exception) -> RequestError:
    return RequestError(f"{file}: corrupt or truncated ({error}); delete it and download the model again")
