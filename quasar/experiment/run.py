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
from quasar.experiment.build import Prepared, choose_device, prepare
from quasar.experiment.decoder import WARM_UP, PromptDecoder
from quasar.experiment.header import print_header
from quasar.experiment.passes import PassTimer
from quasar.results.baselines import SharedBaselines, baseline_identity
from quasar.results.environment import describe_machine, device_name, peak_memory_bytes
from quasar.results.generations import PASSES
from quasar.results.metrics import Measured, RunFacts, compute, named, summary_of
from quasar.results.report import print_report
from quasar.results.schema import Environment, Json, ModelFiles, PassRecord, PromptRecord
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
        _time_passes(decoder, run_folder, reporter)
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
    measures = evaluate.baselines or evaluate.fidelity or bool(evaluate.passes.repetitions)
    needs_reference = measures and not verifier.is_reference

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
    """Decode what is not in ``records`` yet, every prompt once per repetition, and append to it and to the folder."""
    done = {(record.question_id, record.repetition) for record in records}
    planned = [
        (prompt, repetition) for repetition in range(decoder.settings.evaluate.repetitions) for prompt in prompts
    ]
    decoder.warm_up()
    tokens, steps = 0, 0
    finished, speed, rate = Measured(), named("tokens_per_second"), ""
    with reporter.live("decoding") as update:

        def on_step(step: StepResult) -> None:
            nonlocal tokens, steps
            tokens, steps = tokens + len(step.emitted), steps + 1
            update(len(records), len(planned), f"{rate}acceptance length {tokens / steps:.2f}")

        for prompt, repetition in planned:
            if (prompt.key, repetition) not in done:
                record = decoder.decode_prompt(prompt, on_step, repetition)
                folder.append(record)
                records.append(record)
                # The speed comes from the measured decode times; elapsed time would include baselines and fidelity.
                finished.add(record)
                if (measured := speed.compute(finished)) is not None:
                    rate = f"{speed.text(measured)} tokens/s, "


def _time_passes(decoder: PromptDecoder, folder: RunFolder, reporter: Reporter) -> None:
    """Time the verification passes that are requested and that no earlier attempt has timed."""
    wanted = decoder.settings.evaluate.passes
    if not wanted.repetitions:
        return
    tokens = decoder.tokenizer.encode_chat(WARM_UP)
    timer = PassTimer(wanted, decoder.verifier, decoder.reference, tokens, decoder.settings.seed)
    done, total = folder.passes(), len(timer.points())
    left_out = wanted.repetitions * len(wanted.rows) * len(wanted.contexts) - total
    if left_out:
        window = decoder.verifier.context_length
        reporter.warning(f"{left_out} passes exceed the model's context window of {window} tokens and are left out")
    with reporter.live("passes") as update:

        def on_record(record: PassRecord) -> None:
            folder.append_pass(record)
            done.append(record)
            update(len(done), total, f"{record.rows} rows behind {record.context} tokens")

        timer.run(list(done), on_record)
    reporter.line(f"wrote {folder.path / PASSES}")


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
    )
