"""One run: compose what the configuration names, decode every prompt, write the records, report."""

from __future__ import annotations

import dataclasses
import gc
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from quasar.acceptance import rule_for
from quasar.building import build
from quasar.config import RunConfig, check
from quasar.console import Reporter
from quasar.decode import Generation, Limits, decode
from quasar.draft import StepResult
from quasar.drafters.base import Drafter
from quasar.drafters.none import NoneDrafter
from quasar.errors import QuasarError, RequestError
from quasar.evaluation.exactness import compare
from quasar.evaluation.prompts import Prompt, load_prompts, prompt_set_hash
from quasar.model.loading import load_transformer, random_transformer, tiny_config
from quasar.model.sources import Checkpoint, locate
from quasar.model.tokenizer import Message, Tokenizer, load_tokenizer
from quasar.model.transformer import Transformer
from quasar.results.environment import describe_environment, device_name, peak_memory_bytes
from quasar.results.metrics import summarize
from quasar.results.records import Json, RunFolder
from quasar.results.report import print_report
from quasar.sampling import Sampling
from quasar.verifiers.base import Setup
from quasar.verifiers.fp16 import FP16Verifier
from quasar.verifiers.transformer import TransformerVerifier


def run(config: DictConfig, folder: Path, command: list[str], reporter: Reporter) -> Json:
    """Carry out one run in ``folder`` and return its summary.

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
    with reporter.stages() as stage:
        checkpoint = locate(settings.model, stage)
    tokenizer = load_tokenizer(checkpoint)
    model = _load(checkpoint, choose_dtype(settings, device), device, reporter)
    _check_lengths(prompts, tokenizer, model.config.context_length)

    environment = describe_environment(device)
    environment["model"] = {"origin": checkpoint.origin, "revision": checkpoint.revision, "files": checkpoint.file_hashes()}
    environment["prompt_set"] = prompt_set_hash(prompts)
    finished = run_folder.begin(command, environment)
    try:
        with reporter.progress(f"preparing verifier={settings.verifier['name']}") as advance:
            capacity = min(model.config.context_length, _longest(prompts, tokenizer) + settings.decode.max_new_tokens) + 64
            verifier = build("verifier", settings.verifier, model, Setup(capacity, advance))
        del model
        gc.collect()
        _header(settings, checkpoint, verifier, device, len(prompts), folder, len(finished), reporter)
        session = Session(settings, drafter, verifier, tokenizer)
        if settings.evaluate.baselines and not verifier.is_reference:
            reference = _load(checkpoint, choose_dtype(settings, device), device, reporter)
            session.reference = FP16Verifier(reference, Setup(capacity))
        records = _decode_all(session, prompts, finished, run_folder, reporter)
        summary = _summary(settings, session, records, environment, device)
        run_folder.finish(summary)
    except KeyboardInterrupt:
        run_folder.status("failed", "interrupted")
        raise
    except QuasarError as error:
        run_folder.status("failed", str(error))
        raise
    except Exception:
        run_folder.status("failed", traceback.format_exc())
        raise
    print_report(reporter, settings, verifier, records, summary, folder)
    return summary


@dataclass
class Session:
    """What decoding a prompt needs. reference: for the AR-ref baseline; None where the verifier is the reference."""

    settings: RunConfig
    drafter: Drafter
    verifier: TransformerVerifier
    tokenizer: Tokenizer
    reference: TransformerVerifier | None = None

    def __post_init__(self) -> None:
        decode_settings = self.settings.decode
        self.sampling = Sampling(decode_settings.temperature, decode_settings.top_k, decode_settings.top_p)
        self.rule = rule_for(self.sampling)
        self.limits = Limits(
            decode_settings.max_new_tokens,
            self.verifier.model.config.context_length,
            self.tokenizer.stop_tokens,
            decode_settings.draft_tokens,
        )

    def generate(self, tokens: list[int], drafter: Drafter, verifier: TransformerVerifier, key: str, on_step: Any = None) -> Generation:
        # A generator per prompt and turn, so that a resumed run draws what an undisturbed one would have drawn.
        generator = torch.Generator(verifier.device).manual_seed(_seed(self.settings.seed, key))
        return decode(tokens, drafter, verifier, self.rule, self.sampling, self.limits, generator, on_step)

    def decode_prompt(self, prompt: Prompt, on_step: Any) -> Json:
        """Decode all turns of a prompt, later ones on the model's own replies; the record of generations.jsonl."""
        messages: list[Message] = []
        turns = []
        for number, text in enumerate(prompt.turns):
            messages.append({"role": "user", "content": text})
            tokens = self.tokenizer.encode_chat(messages)
            if len(tokens) >= self.limits.context_length:
                break
            generation = self.generate(tokens, self.drafter, self.verifier, f"{prompt.key}/{number}", on_step)
            reply = self.tokenizer.decode(generation.tokens)
            messages.append({"role": "assistant", "content": reply})
            turns.append(self._turn(tokens, generation, reply, f"{prompt.key}/{number}"))
        return {"question_id": prompt.key, "family": prompt.family, "turns": turns}

    def _turn(self, tokens: list[int], generation: Generation, reply: str, key: str) -> Json:
        baselines, exactness = self._baselines(tokens, generation, key)
        return {
            "prompt_tokens": len(tokens),
            "token_ids": generation.tokens,
            "text": reply,
            "finish_reason": generation.finish_reason,
            "steps": {name: getattr(generation, name) for name in ("drafted", "depth", "accepted", "emitted", "context")},
            "milliseconds": {
                phase: [round(lap, 4) for lap in generation.milliseconds.get(phase, [])]
                for phase in ("prefill", "draft", "verify", "overhead", "observe")
            },
            "baselines": baselines,
            "exactness": exactness,
        }

    def _baselines(self, tokens: list[int], generation: Generation, key: str) -> tuple[Json, Json]:
        """Autoregressive decoding of the same turn: AR-same, and AR-ref where baselines are asked for."""
        evaluate = self.settings.evaluate
        baselines: Json = {}
        exactness: Json = {}
        if not (evaluate.baselines or evaluate.exactness):
            return baselines, exactness
        same = self.generate(tokens, NoneDrafter(), self.verifier, key)
        if self.sampling.greedy:
            exactness = compare(tokens, generation.tokens, same.tokens, self.verifier)
        if evaluate.baselines:
            reference = same
            if self.reference is not None:
                reference = self.generate(tokens, NoneDrafter(), self.reference, key)
            baselines = {"ar_same": _timing(same), "ar_ref": _timing(reference)}
            if self.sampling.greedy:
                exactness["match_reference"] = generation.tokens == reference.tokens
        return baselines, exactness


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where it is available. Raises RequestError where cuda is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("device=cuda: PyTorch sees no CUDA device here; use device=cpu, or install a CUDA build of torch")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_dtype(settings: RunConfig, device: torch.device) -> torch.dtype:
    """``auto`` is BF16 on CPUs and on GPUs that compute in it, else FP16."""
    name = settings.verifier["dtype"]
    if name == "auto":
        bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float16
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _load(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, reporter: Reporter) -> Transformer:
    if checkpoint.folder is None:
        return random_transformer(tiny_config(), checkpoint.seed, dtype, device)
    with reporter.progress("loading weights") as advance:
        return load_transformer(checkpoint.folder, dtype, device, advance)


def _check_lengths(prompts: Iterable[Prompt], tokenizer: Tokenizer, context_length: int) -> None:
    for prompt in prompts:
        length = len(tokenizer.encode_chat([{"role": "user", "content": prompt.turns[0]}]))
        if length >= context_length:
            raise RequestError(
                f"{prompt.place}: question {prompt.key} has {length} tokens, but the model's context window is {context_length}; "
                "shorten it or leave it out"
            )


def _longest(prompts: Iterable[Prompt], tokenizer: Tokenizer) -> int:
    return max(len(tokenizer.encode("\n".join(prompt.turns))) for prompt in prompts) + 128


def _header(
    settings: RunConfig,
    checkpoint: Checkpoint,
    verifier: TransformerVerifier,
    device: torch.device,
    prompts: int,
    folder: Path,
    finished: int,
    reporter: Reporter,
) -> None:
    lossless = "" if verifier.is_reference else f" (lossless with respect to the {verifier.label}, not to the reference)"
    dtype = str(verifier.model.dtype).removeprefix("torch.")
    reporter.header(
        {
            "model": f"{checkpoint.name}, weights from {checkpoint.origin}",
            "drafter": _describe(settings.drafter),
            "verifier": f"{_describe(settings.verifier, dtype=dtype)}{lossless}",
            "device": f"{device_name(device)}, {torch.get_num_threads()} threads",
            "prompts": f"{prompts} from {settings.data.name}" + (f", {finished} already done" if finished else ""),
            "output": str(folder),
        }
    )
    if checkpoint.grid is not None and settings.verifier["name"] == "int4":
        reporter.warning(
            f"the weights already lie on a grid ({checkpoint.grid}): 4-bit quantization on the same grid is lossless by "
            "construction, and fidelity figures of verifier=int4 say little about the original model"
        )


def _describe(node: dict[str, Any], **overrides: object) -> str:
    options = {key: value for key, value in {**node, **overrides}.items() if key not in ("_target_", "name")}
    return node["name"] + (f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else "")


def _decode_all(
    session: Session, prompts: list[Prompt], finished: list[Json], folder: RunFolder, reporter: Reporter
) -> list[Json]:
    records = list(finished)
    done = {record["question_id"] for record in finished}
    _warm_up(session)
    tokens, steps, started = 0, 0, time.perf_counter()
    with reporter.live("decoding") as update:
        for prompt in prompts:
            if prompt.key in done:
                continue

            def on_step(step: StepResult) -> None:
                nonlocal tokens, steps
                tokens += len(step.emitted)
                steps += 1
                seconds = time.perf_counter() - started
                update(len(records), len(prompts), f"{tokens / seconds:.1f} tokens/s, acceptance length {tokens / steps:.2f}")

            record = session.decode_prompt(prompt, on_step)
            folder.append(record)
            records.append(record)
            update(len(records), len(prompts), "")
    return records


def _warm_up(session: Session) -> None:
    """One short decode that is not recorded: first calls allocate, compile and fill caches."""
    limits = dataclasses.replace(session.limits, max_new_tokens=8)
    tokens = session.tokenizer.encode_chat([{"role": "user", "content": "Say hello, hello, hello."}])
    for verifier in filter(None, (session.verifier, session.reference)):
        generator = torch.Generator(verifier.device).manual_seed(0)
        decode(tokens, session.drafter, verifier, session.rule, session.sampling, limits, generator)


def _summary(settings: RunConfig, session: Session, records: list[Json], environment: Json, device: torch.device) -> Json:
    metrics = summarize(records)
    cost = session.verifier.cost
    bytes_per_step = cost.weight_bytes + cost.kv_bytes_per_token * (metrics.pop("mean_context") or 0)
    bandwidth = environment["copy_bandwidth_bytes_per_second"]
    verify_ms = metrics["verify_ms"]
    return {
        "model": settings.model.name,
        "drafter": settings.drafter["name"],
        "verifier": settings.verifier["name"],
        "data": settings.data.name,
        "temperature": settings.decode.temperature,
        **metrics,
        "mean_acceptance_length_ref": None,
        "kl_to_reference": None,
        "top1_agreement": None,
        "weight_bytes": cost.weight_bytes,
        "bytes_per_step": bytes_per_step,
        "achieved_bandwidth_fraction": bytes_per_step / (verify_ms / 1e3) / bandwidth if verify_ms else None,
        "peak_memory_bytes": peak_memory_bytes(device),
        "device": device_name(device),
    }


def _timing(generation: Generation) -> Json:
    laps = generation.milliseconds
    decode_ms = sum(sum(laps.get(phase, [])) for phase in ("draft", "verify", "overhead", "observe"))
    return {"decoded_tokens": sum(generation.emitted), "decode_ms": round(decode_ms, 4)}


def _seed(seed: int, key: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big")
