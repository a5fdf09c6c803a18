"""One run: compose what the configuration names, decode every prompt, write the records, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from quasar.config.build import build
from quasar.config.schema import Grid, check
from quasar.console import Reporter
from quasar.decoding.draft import StepResult
from quasar.drafters.base import Drafter
from quasar.evaluation.fidelity import Trajectories
from quasar.evaluation.prompts import Prompt, load_prompts, prompt_set_hash
from quasar.experiment.build import Prepared, choose_device, prepare
from quasar.experiment.conversation import Session
from quasar.results.baselines import SharedBaselines, baseline_identity
from quasar.results.environment import describe_machine, device_name, peak_memory_bytes
from quasar.results.metrics import Measured, RunFacts, compute, named, summary_of
from quasar.results.report import print_report
from quasar.results.schema import Environment, Json, ModelFiles, PromptRecord
from quasar.results.store import RunFolder


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
        parts = prepare(settings, prompts, drafter, device, reporter)
        environment = _environment(parts, prompts)
        records = run_folder.begin(command, environment)
        _print_header(reporter, parts, len(prompts), len(records), folder)
        session = _session(parts, shared_baselines, reporter)
        _decode_all(session, prompts, records, run_folder, reporter)
        measured = Measured(records, _facts(session, environment))
        values = compute(measured)
        summary = summary_of(values)
        run_folder.finish(summary)
    print_report(reporter, measured, values, folder)
    return summary


def _environment(parts: Prepared, prompts: list[Prompt]) -> Environment:
    checkpoint = parts.checkpoint
    return Environment(
        machine=describe_machine(parts.verifier.device),
        model=ModelFiles(checkpoint.origin, checkpoint.revision, checkpoint.file_hashes()),
        verifier=list(parts.verifier.details),
        drafter=list(parts.drafter.details),
        prompt_set=prompt_set_hash(prompts),
        prompts=len(prompts),
    )


def _session(parts: Prepared, shared_baselines: Path | None, reporter: Reporter) -> Session:
    """The session, with the reference and what is measured against it where the run asks for that."""
    evaluate = parts.settings.evaluate
    session = Session(parts.settings, parts.drafter, parts.verifier, parts.tokenizer)
    if evaluate.fidelity:
        session.trajectories = Trajectories(parts.checkpoint.identity, parts.verifier.device, parts.verifier.dtype)
    if (evaluate.baselines or evaluate.fidelity) and not parts.verifier.is_reference:
        session.reference = parts.build_reference(reporter)
    if shared_baselines is not None:
        _share(session, shared_baselines)
    return session


def _print_header(reporter: Reporter, parts: Prepared, prompts: int, finished: int, folder: Path) -> None:
    settings, checkpoint, verifier = parts.settings, parts.checkpoint, parts.verifier
    dtype = str(verifier.dtype).removeprefix("torch.")
    lossless = f"; lossless with respect to the {verifier.label}, not to the reference"
    exact = settings.decode.acceptance == "exact"
    entries = {
        "model": f"{checkpoint.name}, weights from {checkpoint.origin}",
        "drafter": "; ".join([_describe(settings.drafter), *parts.drafter.details]),
        "verifier": "; ".join([_describe({**settings.verifier, "dtype": dtype}), *verifier.details])
        + (lossless if exact and not verifier.is_reference else ""),
        **({} if exact else {"decode": "typical acceptance: lossy, its output follows no model's distribution"}),
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
    dtype = str(session.verifier.dtype)

    def shared(is_reference: bool) -> SharedBaselines:
        return SharedBaselines(folder, baseline_identity(session.settings, is_reference, dtype), device)

    session.shared_same, session.shared_reference = shared(session.verifier.is_reference), shared(True)


def _decode_all(
    session: Session, prompts: list[Prompt], records: list[PromptRecord], folder: RunFolder, reporter: Reporter
) -> None:
    """Decode the prompts that ``records`` lacks, and append each one's record to it and to the folder."""
    done = {record.question_id for record in records}
    session.warm_up()
    tokens, steps = 0, 0
    finished, speed, rate = Measured(), named("tokens_per_second"), ""
    with reporter.live("decoding") as update:

        def on_step(step: StepResult) -> None:
            nonlocal tokens, steps
            tokens, steps = tokens + len(step.emitted), steps + 1
            update(len(records), len(prompts), f"{rate}acceptance length {tokens / steps:.2f}")

        for prompt in prompts:
            if prompt.key not in done:
                record = session.decode_prompt(prompt, on_step)
                folder.append(record)
                records.append(record)
                # Of finished prompts: the clock on the wall also counts baselines and fidelity.
                finished.add(record)
                if (measured := speed.compute(finished)) is not None:
                    rate = f"{speed.text(measured)} tokens/s, "


def _facts(session: Session, environment: Environment) -> RunFacts:
    settings, verifier = session.settings, session.verifier
    return RunFacts(
        model=settings.model.name,
        drafter=settings.drafter["name"],
        verifier=settings.verifier["name"],
        data=settings.data.name,
        temperature=settings.decode.temperature,
        verifier_label=verifier.label,
        is_reference=verifier.is_reference,
        weight_bytes=verifier.cost.weight_bytes,
        kv_bytes_per_token=verifier.cost.kv_bytes_per_token,
        copy_bandwidth=environment.machine.copy_bandwidth_bytes_per_second,
        peak_memory_bytes=peak_memory_bytes(verifier.device),
        device=device_name(verifier.device),
        simulated=session.simulated,
        lossy=settings.decode.acceptance == "typical",
    )
