"""Dataclasses for what an attempt at a run says of itself: the contents of environment.json and status.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from quasar.results.schema import Json, built


@dataclass(frozen=True)
class Machine:
    """The machine that a run was measured on, with its code and packages.

    kernels, kernels_reason: level of the CPU kernels, and why this level is used; empty on a GPU
    """

    git_commit: str | None
    git_dirty: bool | None
    python: str
    packages: dict[str, str | None]
    platform: str
    cpu: str
    cpu_count: int | None
    threads: int
    device: str
    copy_bandwidth_bytes_per_second: float
    kernels: str = ""
    kernels_reason: str = ""

    @property
    def name(self) -> str:
        """The device, and the number of threads on a CPU. Only times with the same name are comparable."""
        return f"{self.device}, {self.threads} threads" if self.device.startswith("cpu") else self.device


@dataclass(frozen=True)
class ModelFiles:
    """The source of the reference's weights.

    files: SHA-256 by file name
    weights_on_grid: share of the weights that are on a low-bit grid; None for random weights
    """

    origin: str
    revision: str | None
    files: dict[str, str]
    weights_on_grid: float | None


@dataclass(frozen=True)
class Inputs:
    """What the records of a run depend on besides its configuration. A run is continued only with equal inputs.

    code_version: see `quasar.cache.code_version`
    device: name of the GPU, or the level of the CPU kernels; other devices may round differently
    packages: versions of the packages that compute logits and encode texts
    prompts: hash of every prompt, by its question id
    model: SHA-256 of the model's files by name
    calibration: hash of the calibration text; None if the run has none
    files: SHA-256 of other files that the configuration names, by key
    """

    code_version: str
    device: str
    packages: dict[str, str]
    prompts: dict[str, str]
    model: dict[str, str]
    calibration: str | None
    files: dict[str, str]

    @classmethod
    def from_json(cls, content: Json | None) -> Inputs | None:
        """Return the inputs in environment.json, or None if the file was missing or damaged or lacks them."""
        try:
            return built(cls, (content or {})["inputs"])
        except (KeyError, ValueError):
            return None

    def differences(self, recorded: Inputs) -> list[str]:
        """Return a phrase for every input that differs from the recorded one."""
        found = []
        for name, words in _INPUT_WORDS.items():
            before, now = getattr(recorded, name), getattr(self, name)
            if before == now:
                continue
            if isinstance(now, dict) and isinstance(before, dict):
                changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
                shown = ", ".join(changed[:NAMED_DIFFERENCES]) + (", ..." if len(changed) > NAMED_DIFFERENCES else "")
                found.append(f"{words} ({shown})")
            elif name == "calibration":
                found.append(words)
            else:
                found.append(f"{words} ({before} before, {now} now)")
        return found


_INPUT_WORDS = {
    "code_version": "the version of the code",
    "device": "the device or the level of its kernels",
    "packages": "versions of packages",
    "prompts": "prompts",
    "model": "files of the model",
    "calibration": "the calibration text",
    "files": "files that the configuration names",
}
NAMED_DIFFERENCES = 5


@dataclass(frozen=True)
class Environment:
    """What environment.json says of one attempt at a run. The keys of ``machine`` are at its top level.

    verifier, drafter: sentences on what was decided while the verifier and the drafter were built
    prompt_set: hash of all prompts
    prompts: number of prompts
    sandbox: what isolates the generated code that is graded; None if none is executed
    header, warnings: what the run printed before its first prompt: lines by their titles, and the warnings below
    facts: the fields of `quasar.results.measured.RunFacts`, so that the metrics of an unfinished run can be computed
    """

    machine: Machine
    model: ModelFiles
    verifier: list[str]
    drafter: list[str]
    prompt_set: str
    prompts: int
    inputs: Inputs
    sandbox: str | None = None
    header: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    facts: Json = field(default_factory=dict)

    def to_json(self) -> Json:
        content = {**vars(self.machine), **vars(self), "model": vars(self.model), "inputs": vars(self.inputs)}
        del content["machine"]
        return content


@dataclass(frozen=True)
class Status:
    """The content of status.json.

    status: running, done or failed
    error: the error of a failed attempt
    time: time of the last change, ISO 8601
    code_versions, machines: all versions of the code and all machines that have worked on the run
    pid: id of the process that wrote the file
    """

    status: str
    error: str | None
    time: str
    config_hash: str
    code_versions: list[str]
    machines: list[str]
    pid: int

    def to_json(self) -> Json:
        return dict(vars(self))

    @classmethod
    def from_json(cls, content: Json | None) -> Status | None:
        """Return the status, or None if the file was missing or damaged or lacks a key."""
        try:
            return None if content is None else built(cls, content)
        except ValueError:
            return None
