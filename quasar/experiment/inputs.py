"""What the records of a run depend on besides its configuration: code, prompts, model files and other texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from quasar.cache import code_version, sha256_of
from quasar.config.schema import RunConfig
from quasar.evaluation.calibration import calibration_prompts
from quasar.evaluation.prompts import Prompt, prompt_set_hash
from quasar.model.sources import MODEL_FILES, Checkpoint, hash_of_parts
from quasar.results.attempt import Inputs

PACKAGES = ("torch", "transformers")
FILE_KEYS = ("path", "corpus", "trace")
"""Keys of a drafter or verifier whose values are files or folders that it reads."""


def inputs_of(settings: RunConfig, prompts: Sequence[Prompt], checkpoint: Checkpoint, device: str) -> Inputs:
    """Hash everything that the records depend on besides the configuration. No file of the model is loaded.

    device: see `quasar.cache.device_identity`
    """
    chosen = settings.calibration
    texts = prompt_set_hash(calibration_prompts(chosen)) if chosen.prompts else None
    named = {"drafter": settings.drafter, "verifier": settings.verifier}
    return Inputs(
        code_version=code_version(),
        device=device,
        packages={name: metadata.version(name) for name in PACKAGES},
        prompts={prompt.key: prompt_set_hash([prompt])[:16] for prompt in prompts},
        model=checkpoint.file_hashes,
        calibration=texts,
        files=dict(_named_files(named)),
    )


def _named_files(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the SHA-256 of every file or folder that a configuration node names, by its key."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _named_files(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            members = {str(index): member for index, member in enumerate(value) if isinstance(member, Mapping)}
            yield from _named_files(members, f"{prefix}{key}.")
        elif key in FILE_KEYS and isinstance(value, str):
            path = Path(value).expanduser()
            if path.is_file():
                yield f"{prefix}{key}", hash_of_parts(path) if path.suffix == ".gguf" else sha256_of(path)
            elif path.is_dir():
                yield f"{prefix}{key}", _folder_hash(path)


def _folder_hash(folder: Path) -> str:
    files = sorted({file for pattern in (*MODEL_FILES, "*.json", "*.gguf") for file in folder.glob(pattern)})
    hashes = {file.name: sha256_of(file) for file in files}
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
