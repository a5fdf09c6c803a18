"""Autoregressive baselines of a sweep. The first job that needs one decodes it; the other jobs read it from a file."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from quasar.cache import code_version
from quasar.config.inputs import open_regular
from quasar.config.schema import RunConfig
from quasar.errors import RequestError
from quasar.results.generations import whole_lines
from quasar.results.schema import CHECKSUM_KEY, Json, checksum

LOCK_SECONDS = 3600.0


@dataclass(frozen=True)
class Baseline:
    """Autoregressive decoding of one turn.

    tokens: the generated tokens; the first one comes from the prefill and is not timed
    decoded_tokens, decode_ms: number of tokens after the first, and the time that they took in milliseconds
    machine: host name of the machine that decoded them
    """

    tokens: list[int]
    decoded_tokens: int
    decode_ms: float
    machine: str = ""


class SharedBaselines:
    """The baselines of one verifier in a sweep's folder, by turn and prompt.

    A job holds a file lock while it decodes a baseline. Jobs that need the same verifier wait for the lock, which the
    operating system releases if the job's process dies. All baselines are measured on one type of device.

    identity: everything that the verifier and its decoding depend on, see `baseline_identity`
    device: name of the device that this job decodes on
    """

    def __init__(self, folder: Path, identity: Json, device: str) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        self._file = folder / f"{key}.jsonl"
        self._lock = FileLock(folder / f".{key}.lock")
        self._device = device
        self._known: dict[str, Baseline] = {}
        self._read_bytes = 0

    def measured(self, turn: str, prompt: Sequence[int], decode: Callable[[], Baseline]) -> Baseline:
        """Return the baseline of one turn: the stored one if there is one, else the result of ``decode``.

        Raises RequestError if other jobs of the sweep decode on another type of device.
        """
        key = f"{turn} {hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()[:16]}"
        self._read()
        if key in self._known:
            return self._known[key]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._lock.acquire(timeout=LOCK_SECONDS):
                return self._decode(key, decode)
        except Timeout:
            # The job that holds the lock hangs. A measurement by this job is just as valid.
            return decode()

    def _decode(self, key: str, decode: Callable[[], Baseline]) -> Baseline:
        """Decode and store a baseline; the caller holds the lock.

        Another job may have stored the same baseline meanwhile, or may have died while it wrote a line.
        """
        self._read()
        if key not in self._known:
            baseline = decode()
            values = asdict(baseline)
            sealed = {"device": self._device, CHECKSUM_KEY: checksum({"key": key, **values})}
            line = json.dumps({"key": key, **sealed, **values}) + "\n"
            with self._file.open("ab") as stream:
                stream.truncate(self._read_bytes)
                stream.write(line.encode())
                stream.flush()
                os.fsync(stream.fileno())
            self._read()
        return self._known[key]

    def _read(self) -> None:
        """Read the lines that were added since the last call."""
        if not self._file.exists():
            return
        with open_regular(self._file) as stream:
            stream.seek(self._read_bytes)
            entries, whole = whole_lines(stream.read())
        self._read_bytes += whole
        for entry in entries:
            key, device, given = entry.pop("key"), entry.pop("device"), entry.pop(CHECKSUM_KEY, None)
            if device != self._device:
                raise RequestError(
                    f"{self._file}: the baselines of this sweep were measured on {device}, but this job runs on "
                    f"{self._device}; speedups would compare two devices. Pass another hydra.sweep.dir for this "
                    "device, or sweep.share_baselines=false"
                )
            if given != checksum({"key": key, **entry}):
                warnings.warn(
                    f"{self._file}: a baseline was changed after it was written; it is decoded again",
                    RuntimeWarning,
                    stacklevel=4,
                )
                continue
            self._known[key] = Baseline(**entry)


def baseline_identity(settings: RunConfig, is_reference: bool, dtype: str) -> Json:
    """Return everything that an autoregressive baseline depends on, apart from the prompt and the device.

    It does not contain the drafter, so jobs with different drafters share their baselines. AR-ref is the same for every
    verifier, and equals AR-same of the reference.
    """
    values = asdict(settings)
    kept = {key: values[key] for key in ("model", "decode", "seed", "threads")}
    kept["decode"].pop("draft_tokens")
    verifier = (
        {"name": "reference"} if is_reference else {**values["verifier"], "calibration": values.get("calibration")}
    )
    return {**kept, "verifier": {**verifier, "dtype": dtype}, "code_version": code_version()}


def local_baseline(tokens: list[int], decoded_tokens: int, decode_ms: float) -> Baseline:
    """Return a baseline that was measured on this machine."""
    return Baseline(tokens, decoded_tokens, round(decode_ms, 4), socket.gethostname())
