"""Reads tensors by name from the safetensors files of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quasar.errors import RequestError


class TensorFiles:
    """The tensors of all ``*.safetensors`` files of a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise RequestError(f"{folder}: contains no *.safetensors; only safetensors and GGUF files are supported")
        for file in files:
            for name in self._handle(file).keys():  # noqa: SIM118 (safe_open is no mapping)
                self._where[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> list[str]:
        return list(self._where)

    def file_of(self, name: str) -> Path:
        try:
            return self._where[name]
        except KeyError:
            raise RequestError(f"{self.folder}: tensor {name} is missing; the checkpoint is incomplete") from None

    def read(self, name: str) -> Tensor:
        file = self.file_of(name)
        try:
            return self._handle(file).get_tensor(name)
        except SafetensorError as error:
            raise _corrupt(file, error) from None

    def _handle(self, file: Path) -> Any:  # safetensors names no public type
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _corrupt(file, error) from None
        return self._open[file]


def _corrupt(file: Path, error: Exception) -> RequestError:
    return RequestError(f"{file}: corrupt or truncated ({error}); delete it and download the model again")
