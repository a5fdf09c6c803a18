"""One run: compose what the configuration names, decode every prompt, write the records, report."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from quasar.building import build, node_named
from quasar.config import Grid, RunConfig, check
from quasar.console import Reporter
from quasar.draft import StepResult
from quasar.drafters.base import Drafter, PreparedDrafter, Resources
from quasar.errors import RequestError
from quasar.evaluation.calibration import prepare_calibration
from quasar.evaluation.fidelity import TrajectoryCache
from quasar.evaluation.prompts import Prompt, load_prompts, prompt_set_hash
from quasar.model.loading import load_transformer, random_transformer, tiny_config
from quasar.model.sources import Checkpoint, cache_folder, locate
from quasar.model.tokenizer import Tokenizer, load_tokenizer
from quasar.model.transformer import Transformer
from quasar.results.baselines import SharedBaselines, baseline_identity
from quasar.results.environment import describe_environment, device_name, peak_memory_bytes
from quasar.results.metrics import COUNTS, summarize
from quasar.results.records import Json, RunFolder
from quasar.results.report import print_report
from quasar.session import Session
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.transformer import TransformerVerifier

# The KV cache starts with room for the longest prompt, its answer, and a block of this many rows.
BLOCK_ROOM = 64


def run(
    config: DictConfig, folder: Path, command: list[str], reporter: Reporter, shared_baselines: Path | None = None
) -> Json:
    """Carry out one run in ``folder`` and return its summary.

    shared_baselines: folder in which a sweep's jobs share their autoregressive baselines; None: decode them here

    Raises RequestError before anything is written where the request itself is wrong; later failures leave
    status.json as ``failed`` and every finished prompt's record in place.
    """
    settings = check(config)
    device = choose_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    prompts = load_prompts(settings.data)
    drafter: Drafter = build("drafter", settings.drafter)
    run_folder = RunFolder(folder, config, settings.resume)
    with run_folder.failures_recorded():
        with reporter.stages() as stage:
            checkpoint = locate(settings.model, stage)
        tokenizer = load_tokenizer(checkpoint)
        dtype = choose_dtype(settings.verifier["dtype"], device)
        model = load_model(checkpoint, dtype, device, reporter)
        longest = _longest(prompts, tokenizer, model.config.context_length)
        capacity = min(longest + settings.decode.max_new_tokens, model.config.context_length) + BLOCK_ROOM
        with reporter.progress(f"preparing verifier={settings.verifier['name']}") as advance:
            calibration = partial(prepare_calibration, settings.calibration, prompts, tokenizer, checkpoint)
            setup = Setup(capacity, advance, calibration)
            verifier: TransformerVerifier = build("verifier", settings.verifier, model, setup)
        if isinstance(drafter, PreparedDrafter):
            with reporter.progress(f"preparing drafter={settings.drafter['name']}") as advance:
                another = partial(_build_another, checkpoint, dtype, device, replace(setup, progress=advance), reporter)
                identity = _identity(settings, checkpoint, verifier)
                drafter.prepare(Resources(verifier, tokenizer.encode, another, calibration, identity, advance))
        # A drafter that cannot draft for this verifier says so now, before anything is written.
        drafter.begin(torch.zeros(1, dtype=torch.int64), verifier)
        del model
        gc.collect()

        environment = describe_environment(device)
        environment["model"] = {
            "origin": checkpoint.origin,
            "revision": checkpoint.revision,
            "files": checkpoint.file_hashes(),
        }
        environment["verifier"] = list(verifier.facts)
        environment["drafter"] = list(getattr(drafter, "facts", ()))
        environment["prompt_set"] = prompt_set_hash(prompts)
        environment["prompts"] = len(prompts)
        records = run_folder.begin(command, environment)
        _print_header(reporter, settings, checkpoint, drafter, verifier, len(prompts), len(records), folder)
        session = Session(settings, drafter, verifier, tokenizer)
        if settings.evaluate.fidelity:
            session.trajectories = _trajectories(settings, checkpoint, verifier)
        if (settings.evaluate.baselines or settings.evaluate.fidelity) and not verifier.is_reference:
            session.reference = FP16Verifier(load_model(checkpoint, dtype, device, reporter), Setup(capacity))
        if shared_baselines is not None:
            _share(session, shared_baselines)
        _decode_all(session, prompts, records, run_folder, reporter)
        measured = summarize(records)
        summary = _summary(settings, verifier, measured, environment["copy_bandwidth_bytes_per_second"])
        summary["simulated"] = session.simulated
        if session.simulated:
            summary["distinct_4gram_ratio"] = None
        run_folder.finish(summary)
    print_report(reporter, settings, verifier, records, {**measured, "simulated": session.simulated}, folder)
    return summary


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where it is available. Raises RequestError where cuda is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("device=cuda: PyTorch sees no CUDA device; use device=cpu, or install a CUDA build of torch")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is BF16 on CPUs and on GPUs that compute in it, else FP16."""
    if name == "auto":
        bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float16
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, reporter: Reporter) -> Transformer:
    """The unquantized, unpruned model of a checkpoint."""
    if checkpoint.folder is None:
        return random_transformer(tiny_config(), checkpoint.seed, dtype, device)
    with reporter.progress("loading weights") as advance:
        return load_transformer(checkpoint.folder, dtype, device, advance)


def _build_another(
    checkpoint: Checkpoint,
    run_dtype: torch.dtype,
    device: torch.device,
    setup: Setup,
    reporter: Reporter,
    choice: str | dict[str, Any],
) -> TransformerVerifier:
    """One more verifier of the run's model, by name or by node; ``dtype`` auto is the run's."""
    node = node_named("verifier", choice) if isinstance(choice, str) else choice
    name = node.get("dtype", "auto")
    dtype = run_dtype if name == "auto" else choose_dtype(name, device)
    built = build("verifier", node, load_model(checkpoint, dtype, device, reporter), setup)
    assert isinstance(built, TransformerVerifier)
    return built


def _identity(settings: RunConfig, checkpoint: Checkpoint, verifier: TransformerVerifier) -> dict[str, str]:
    """What tells this run's model, verifier and machine apart from others whose measurements are cached."""
    return {
        "model": checkpoint.identity,
        "verifier": json.dumps(settings.verifier, sort_keys=True),
        "dtype": str(verifier.model.dtype),
        "device": f"{device_name(verifier.device)}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }


def _trajectories(settings: RunConfig, checkpoint: Checkpoint, verifier: TransformerVerifier) -> TrajectoryCache:
    """The reference's answers are its own on every device and in every precision."""
    key: dict[str, str | int] = {
        "model": checkpoint.identity,
        "dtype": str(verifier.model.dtype),
        "device": verifier.device.type,
        "torch": torch.__version__,
        "length": settings.decode.max_new_tokens,
    }
    return TrajectoryCache(cache_folder() / "trajectories", key)


def _longest(prompts: Iterable[Prompt], tokenizer: Tokenizer, context_length: int) -> int:
    """Tokens of the longest prompt, over all of its turns. Raises RequestError where one does not fit the model."""
    longest = 0
    for prompt in prompts:
        length = len(tokenizer.encode_chat([{"role": "user", "content": "\n".join(prompt.turns)}]))
        if length >= context_length:
            raise RequestError(
                f"{prompt.place}: question {prompt.key} has {length} tokens, but the model's context window is "
                f"{context_length}; shorten it or leave it out"
            )
        longest = max(longest, length)
    return longest


def _print_header(
    reporter: Reporter,
    settings: RunConfig,
    checkpoint: Checkpoint,
    drafter: Drafter,
    verifier: TransformerVerifier,
    prompts: int,
    finished: int,
    folder: Path,
) -> None:
    dtype = str(verifier.model.dtype).removeprefix("torch.")
    lossless = f"; lossless with respect to the {verifier.label}, not to the reference"
    entries = {
        "model": f"{checkpoint.name}, weights from {checkpoint.origin}",
        "drafter": "; ".join([_describe(settings.drafter), *getattr(drafter, "facts", ())]),
        "verifier": "; ".join([_describe({**settings.verifier, "dtype": dtype}), *verifier.facts])
        + ("" if verifier.is_reference else lossless),
        "device": f"{device_name(verifier.device)}, {torch.get_num_threads()} threads",
        "prompts": f"{prompts} from data={settings.data.name}" + (f", {finished} already done" if finished else ""),
        "output": str(folder),
    }
    reporter.header(entries)
    if checkpoint.grid is not None and _on_grid(settings.verifier, checkpoint.grid):
        reporter.warning(
            f"these weights already lie on a 4-bit grid in groups of {checkpoint.grid.group_size}, which verifier=int4 "
            "reproduces at these settings: lossless by construction, it says nothing of quantizing the original model"
        )


def _on_grid(verifier: dict[str, Any], grid: Grid) -> bool:
    """Whether quantization at these settings can represent every weight of the grid."""
    same = verifier["name"] == "int4" and grid.bits == 4 and verifier.get("symmetric") == grid.symmetric
    return same and grid.group_size % int(verifier.get("group_size", 1)) == 0


def _describe(node: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in node.items() if key not in ("_target_", "name"))
    return node["name"] + (f" ({options})" if options else "")


def _share(session: Session, folder: Path) -> None:
    """Take the session's baselines from a sweep's folder, or put them there."""
    device = device_name(session.verifier.device)
    if session.verifier.device.type == "cpu":
        device += f", {torch.get_num_threads()} threads"
    dtype = str(session.verifier.model.dtype)

    def shared(is_reference: bool) -> SharedBaselines:
        return SharedBaselines(folder, baseline_identity(session.settings, is_reference, dtype), device)

    session.shared_same, session.shared_reference = shared(session.verifier.is_reference), shared(True)


def _decode_all(
    session: Session, prompts: list[Prompt], records: list[Json], folder: RunFolder, reporter: Reporter
) -> None:
    """Decode the prompts that ``records`` lacks, and append each one's record to it and to the folder."""
    done = {record["question_id"] for record in records}
    session.warm_up()
    tokens, steps, started = 0, 0, time.perf_counter()
    with reporter.live("decoding") as update:

        def on_step(step: StepResult) -> None:
            nonlocal tokens, steps
            tokens, steps = tokens + len(step.emitted), steps + 1
            rate = tokens / (time.perf_counter() - started)
            update(len(records), len(prompts), f"{rate:.1f} tokens/s, acceptance length {tokens / steps:.2f}")

        for prompt in prompts:
            if prompt.key not in done:
                record = session.decode_prompt(prompt, on_step)
                folder.append(record)
                records.append(record)


def _summary(settings: RunConfig, verifier: TransformerVerifier, measured: Json, copy_bandwidth: float) -> Json:
    """The flat keys of summary.json; null where this run did not measure one."""
    cost, verify_ms = verifier.cost, measured["verify_ms"]
    bytes_per_step = cost.weight_bytes + cost.kv_bytes_per_token * (measured["mean_context"] or 0)
    return {
        "model": settings.model.name,
        "drafter": settings.drafter["name"],
        "verifier": settings.verifier["name"],
        "data": settings.data.name,
        "temperature": settings.decode.temperature,
        **{key: value for key, value in measured.items() if key not in COUNTS},
        "weight_bytes": cost.weight_bytes,
        "bytes_per_step": bytes_per_step,
        "achieved_bandwidth_fraction": bytes_per_step / (verify_ms / 1e3) / copy_bandwidth if verify_ms else None,
        "peak_memory_bytes": peak_memory_bytes(verifier.device),
        "device": device_name(verifier.device),
    }
