"""One run: build what the configuration names, decode every prompt, write the records, print the results."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import DictConfig

from quasar.config.build import build
from quasar.config.schema import check
from quasar.console import Reporter
from quasar.decoding.draft import StepResult
from quasar.drafters.base import Drafter
from quasar.evaluation.fidelity import Trajectories
from quasar.evaluation.prompts import Prompt, load_prompts, prompt_set_hash
from quasar.experiment.build import Prepared, check_machine, choose_device, prepare
from quasar.experiment.decoder import PromptDecoder
from quasar.experiment.header import print_header
from quasar.results.baselines import SharedBaselines, baseline_identity
from quasar.results.environment import describe_machine, device_name, peak_memory_bytes
from quasar.results.metrics import Measured, RunFacts, compute, named, summary_of
from quasar.results.report import print_report
from quasar.results.schema import Environment, Json, ModelFiles, PromptRecord
from quasar.results.store import RunFolder


def run(
    config: DictConfig, folder: Path, command: list[str], reporter: Reporter, shared_baselines: Path | None = None
) -> Json:
    """Execute one run in ``folder`` and return its summary.

    shared_baselines: folder in which the jobs of a sweep share their autoregressive baselines; None if this run
        decodes its own

    Raises RequestError before anything is written if the request is wrong. A later failure sets the status to
    ``failed`` and keeps the records of all finished prompts.
    """
    settings = check(config)
    check_machine(settings)
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
        print_header(reporter, parts, len(prompts), len(records), folder)
        decoder = _decoder(parts, shared_baselines, reporter)
        _decode_all(decoder, prompts, records, run_folder, reporter)
        measured = Measured(records, _facts(decoder, environment))
        values = compute(measured)
        summary = summary_of(values)
        run_folder.finish(summary)
    print_report(reporter, measured, values, folder)
    return summary


def _environment(parts: Prepared, prompts: list[Prompt]) -> Environment:
    checkpoint = parts.checkpoint
    return Environment(
        machine=describe_machine(parts.verifier.device),
        model=ModelFiles(checkpoint.origin, checkpoint.revision, checkpoint.file_hashes, parts.weights_on_grid),
        verifier=list(parts.verifier.details),
        drafter=list(parts.drafter.details),
        prompt_set=prompt_set_hash(prompts),
        prompts=len(prompts),
    )


def _decoder(parts: Prepared, shared_baselines: Path | None, reporter: Reporter) -> PromptDecoder:
    """Build the decoder. It has the reference and its answers if the run measures anything against them."""
    verifier, evaluate = parts.verifier, parts.settings.evaluate
    trajectories = Trajectories(parts.checkpoint.identity, verifier.device, verifier.dtype)
    needs_reference = (evaluate.baselines or evaluate.fidelity) and not verifier.is_reference

    def shared(is_reference: bool) -> SharedBaselines | None:
        if shared_baselines is None:
            return None
        identity = baseline_identity(parts.settings, is_reference, str(verifier.dtype))
        return SharedBaselines(shared_baselines, identity, _machine(verifier.device))

    return PromptDecoder(
        parts.settings,
        parts.drafter,
        verifier,
        parts.tokenizer,
        reference=parts.build_reference(reporter) if needs_reference else None,
        trajectories=trajectories if evaluate.fidelity else None,
        shared_same=shared(verifier.is_reference),
        shared_reference=shared(True),
    )


def _machine(device: torch.device) -> str:
    """Name the device, and the number of threads on a CPU. Only times with the same name are comparable."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return device_name(device) + threads


def _decode_all(
    decoder: PromptDecoder, prompts: list[Prompt], records: list[PromptRecord], folder: RunFolder, reporter: Reporter
) -> None:
    """Decode the prompts that are not in ``records`` yet, and append their records to it and to the folder."""
    done = {record.question_id for record in records}
    decoder.warm_up()
    tokens, steps = 0, 0
    finished, speed, rate = Measured(), named("tokens_per_second"), ""
    with reporter.live("decoding") as update:

        def on_step(step: StepResult) -> None:
            nonlocal tokens, steps
            tokens, steps = tokens + len(step.emitted), steps + 1
            update(len(records), len(prompts), f"{rate}acceptance length {tokens / steps:.2f}")

        for prompt in prompts:
            if prompt.key not in done:
                record = decoder.decode_prompt(prompt, on_step)
                folder.append(record)
                records.append(record)
                # The speed comes from the measured decode times; elapsed time would include baselines and fidelity.
                finished.add(record)
                if (measured := speed.compute(finished)) is not None:
                    rate = f"{speed.text(measured)} tokens/s, "


def _facts(decoder: PromptDecoder, environment: Environment) -> RunFacts:
    settings, verifier = decoder.settings, decoder.verifier
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
        simulated=decoder.simulated,
        lossy=settings.decode.acceptance == "typical",
        model_origin=environment.model.origin,
        weights_on_grid=environment.model.weights_on_grid,
        dtype=str(verifier.dtype).removeprefix("torch."),
    )
