"""Times other engines and this one on the same prompts, so that a slow baseline of its own cannot flatter a speedup.

    python experiments/peers.py --prompts FOLDER --limit 2 --repetitions 2
    python experiments/peers.py --prompts FOLDER --llama-server PATH --gguf FILE
    python experiments/peers.py --prompts FOLDER --openvino FOLDER --openvino-python PATH

Every engine is a process of its own, and all take turns on each prompt in an order that is drawn anew, so that a ratio
is taken within seconds. They decode greedily from the same token ids with the same number of threads, and only the time
after the first token counts. Writes ``experiments/peers/``: peers.parquet (one row per engine, prompt and repetition),
environment.json, table.md and a figure.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from quasar.results.intervals import Estimate

FOLDER = Path(__file__).parent / "peers"
BASELINE = "Quasar fp16, autoregressive"
NGRAM = ("drafter=ngram", "decode.draft_tokens=5")
OWN = {
    BASELINE: ("verifier=fp16", "drafter=none"),
    "Quasar fp16, n-gram": ("verifier=fp16", *NGRAM),
    "Quasar int8, n-gram": ("verifier=int8", "verifier.lm_head_bits=8", *NGRAM),
    "Quasar int4, n-gram": ("verifier=int4", "verifier.activation_bits=8", "verifier.lm_head_bits=8", *NGRAM),
}
LOOKUP = {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 3}
# Which of the two is faster depends on the processor.
TRANSFORMERS: dict[str, tuple[str, dict[str, int]]] = {
    "transformers BF16, autoregressive": ("bfloat16", {}),
    "transformers BF16, prompt lookup": ("bfloat16", LOOKUP),
    "transformers float32, autoregressive": ("float32", {}),
    "transformers float32, prompt lookup": ("float32", LOOKUP),
}
LLAMA = "llama.cpp, autoregressive"
SERVER_START_SECONDS = 120


@dataclass(frozen=True)
class Task:
    """What an engine's process needs to know.

    kind: one of `ENGINES`
    model: a folder: the reference's checkpoint, or what optimum-intel made of it
    options: the engine's own settings
    """

    engine: str
    kind: str
    model: str
    tokens: int
    threads: int
    options: Any


@dataclass(frozen=True)
class Answer:
    """tokens: how many were decoded after the first one; seconds: how long these took."""

    tokens: int
    seconds: float


Engine = Callable[[list[int]], Answer]
Question = tuple[str, str, list[int]]
"""Key, task family and token ids of a prompt."""


def main() -> None:
    arguments = _arguments()
    if arguments.worker:
        _serve(Task(**json.loads(arguments.worker)))
        return
    prompts, checkpoint = _prompts(arguments), _checkpoint()
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for task in _tasks(arguments, str(checkpoint.folder)):
            python = arguments.openvino_python if task.kind == "openvino" else sys.executable
            engines[task.engine] = stack.enter_context(_Process(task, python)).answer
        if arguments.llama_server:
            engines[LLAMA] = stack.enter_context(_LlamaServer(arguments)).answer
        rows = measure(engines, prompts, arguments.repetitions)
    FOLDER.mkdir(exist_ok=True)
    rows.to_parquet(FOLDER / "peers.parquet", index=False)
    origin = _origin(arguments, checkpoint.origin, len(prompts))
    (FOLDER / "environment.json").write_text(json.dumps(origin, indent=2) + "\n")
    (FOLDER / "table.md").write_text(table(rows, origin))
    draw(rows, origin, FOLDER / "peers")
    print((FOLDER / "table.md").read_text())


def _tasks(arguments: argparse.Namespace, reference: str) -> list[Task]:
    chosen = [(name, "quasar", reference, list(overrides)) for name, overrides in OWN.items()]
    chosen += [(name, "transformers", reference, list(options)) for name, options in TRANSFORMERS.items()]
    for folder in arguments.openvino:
        name = f"OpenVINO {Path(folder).name}"
        chosen += [
            (f"{name}, autoregressive", "openvino", folder, {}),
            (f"{name}, prompt lookup", "openvino", folder, LOOKUP),
        ]
    return [
        Task(name, kind, model, arguments.tokens, arguments.threads, options) for name, kind, model, options in chosen
    ]


def measure(engines: dict[str, Engine], prompts: Sequence[Question], repetitions: int) -> pd.DataFrame:
    """Let the engines take turns on each prompt. Each decodes the first prompt once before that, as warm-up."""
    import pandas as pd

    for answer in engines.values():
        answer(prompts[0][2])
    order, rows = random.Random(0), []
    for repetition in range(repetitions):
        for number, (key, family, tokens) in enumerate(prompts):
            print(f"repetition {repetition + 1}/{repetitions}, prompt {number + 1}/{len(prompts)}", file=sys.stderr)
            for name in order.sample(list(engines), len(engines)):
                found = engines[name](tokens)
                rows.append(
                    {"engine": name, "prompt": key, "family": family, "repetition": repetition, **asdict(found)}
                )
    return pd.DataFrame(rows)


def ratios(rows: pd.DataFrame) -> dict[str, Estimate]:
    """Return how many times as fast as `BASELINE` every engine decodes, the fastest first.

    Geometric means of ratios on the same prompt and repetition, with 95 % intervals.
    """
    from quasar.results.intervals import estimate, geometric_mean

    pace = (rows.seconds / rows.tokens).groupby([rows.engine, rows.prompt, rows.repetition]).mean().unstack()
    families = rows.drop_duplicates("prompt").set_index("prompt").family
    found = {}
    for engine in rows.engine.unique():
        faster = np.log(pace.loc[BASELINE] / pace.loc[engine])
        columns = {"log": faster.to_numpy(), "ones": np.ones(faster.shape)}
        found[engine] = estimate(columns, families[faster.index].tolist(), geometric_mean("log", "ones"))
    return dict(sorted(found.items(), key=lambda item: -item[1].value))


def table(rows: pd.DataFrame, origin: dict[str, Any]) -> str:
    """Return the engines' speeds, and their ratios to `BASELINE`, as Markdown."""
    from quasar.results.markdown import markdown_table

    totals = rows.groupby("engine")[["tokens", "seconds"]].sum()
    lines = [
        [engine, f"{totals.tokens[engine] / totals.seconds[engine]:.1f}", found.text(lambda value: f"{value:.2f}x")]
        for engine, found in ratios(rows).items()
    ]
    body = markdown_table(["engine", "tokens/s", f"over {BASELINE}"], lines)
    meaning = "Decoding only, without the prefill. Geometric mean of paired ratios, 95 % intervals (BCa)."
    return f"# Other engines\n\n## Speed\n\n{body}\n\n{meaning} {_footer(origin)}.\n"


def draw(rows: pd.DataFrame, origin: dict[str, Any], stem: Path) -> None:
    """Draw the ratios: this program's engines filled, in the colour of their verifier, the others hollow and grey."""
    from quasar.results.figures import style
    from quasar.results.figures.marks import interval, named_rows, ratio_axis

    found = ratios(rows)
    footer = textwrap.wrap(_footer(origin), style.footer_characters(style.ONE_COLUMN))
    with style.canvas("How fast are other engines?", footer, (style.ONE_COLUMN, 0.8 + 0.19 * len(found))) as picture:
        axes = picture.subplots()
        for row, (engine, value) in enumerate(found.items()):
            own = engine in OWN
            colour = style.colours(OWN[engine][0].removeprefix("verifier="))[0] if own else style.GREY
            interval(axes, "x", value, row, colour)
            axes.plot(value.value, row, "o", color=colour, markerfacecolor=colour if own else "white", zorder=3)
        named_rows(axes, list(found))
        ratio_axis(axes, "x")
        axes.set_xlabel(f"tokens/s over {BASELINE}")
        style.save(picture, stem)


def _footer(origin: dict[str, Any]) -> str:
    return "; ".join(f"{key} {value}" for key, value in origin.items())


class _Process:
    """An engine of this file in a process of its own, which answers one JSON line per prompt."""

    def __init__(self, task: Task, python: str) -> None:
        self._task, self._python = task, python

    def __enter__(self) -> Self:
        command = [self._python, __file__, "--worker", json.dumps(asdict(self._task))]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()

    def answer(self, tokens: list[int]) -> Answer:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(tokens) + "\n")
        self._child.stdin.flush()
        if not (line := self._child.stdout.readline()):
            raise RuntimeError(f"the process of {self._task.engine!r} ended; its messages are above")
        return Answer(**json.loads(line))


class _LlamaServer:
    """llama.cpp's server. It gets token ids, so that no tokenizer differs, and times its own decoding."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]

    def __enter__(self) -> Self:
        chosen = self._arguments
        flags = ["--threads", str(chosen.threads), "--port", str(self._port), "--host", "127.0.0.1"]
        command = [chosen.llama_server, "--model", chosen.gguf, *flags]
        self._child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + SERVER_START_SECONDS
        while not self._ready():
            if self._child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{chosen.llama_server} did not start; run it by hand: {' '.join(command)}")
            time.sleep(0.2)
        return self

    def __exit__(self, *error: object) -> None:
        self._child.terminate()
        self._child.wait()

    def answer(self, tokens: list[int]) -> Answer:
        request = {"prompt": tokens, "n_predict": self._arguments.tokens, "temperature": 0, "cache_prompt": False}
        timings = self._ask("completion", request)["timings"]
        return Answer(timings["predicted_n"], timings["predicted_ms"] / 1000)

    def _ready(self) -> bool:
        try:
            return bool(self._ask("health")["status"] == "ok")
        except OSError:
            return False

    def _ask(self, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            found: dict[str, Any] = json.load(reply)
            return found


def _serve(task: Task) -> None:
    """Answer prompts from standard input until it ends. Messages of libraries go to standard error."""
    import os

    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answer = ENGINES[task.kind](task)
    for line in sys.stdin:
        print(json.dumps(asdict(answer(json.loads(line)))), file=replies, flush=True)


def _own_engine(task: Task) -> Engine:
    import torch

    from quasar.config.build import build
    from quasar.decoding.loop import decode
    from quasar.evaluation.prompts import load_prompts
    from quasar.experiment.build import prepare
    from quasar.experiment.decoder import PromptDecoder
    from quasar.experiment.standalone import settings_of
    from quasar.model.devices import use_threads
    from quasar.results.console import Reporter
    from quasar.results.schema import DECODE_PHASES

    use_threads(task.threads)
    settings = settings_of([*task.options, f"decode.max_new_tokens={task.tokens}"])
    parts = prepare(settings, load_prompts(settings.data), build("drafter", settings.drafter), Reporter())
    chosen = PromptDecoder(parts.settings, parts.drafter, parts.verifier, parts.tokenizer)

    def answer(tokens: list[int]) -> Answer:
        found = decode(
            *(tokens, parts.drafter, parts.verifier, chosen.rule, chosen.sampling, chosen.limits),
            generator=torch.Generator(parts.verifier.device).manual_seed(0),
        )
        milliseconds = sum(sum(found.milliseconds.get(phase, [])) for phase in DECODE_PHASES)
        return Answer(len(found.tokens) - 1, milliseconds / 1000)

    return answer


def _transformers_engine(task: Task) -> Engine:
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(task.threads)
    dtype, lookup = task.options
    model: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype=getattr(torch, dtype))

    class Clock(StoppingCriteria):
        """Notes the time and the length after every step; it never stops the output."""

        def __init__(self) -> None:
            self.laps: list[tuple[float, int]] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
            self.laps.append((time.perf_counter(), input_ids.shape[1]))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def answer(tokens: list[int]) -> Answer:
        clock, prompt = Clock(), torch.tensor([tokens])
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=task.tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
            **lookup,
        )
        (start, before), (end, after) = clock.laps[0], clock.laps[-1]
        return Answer(after - before, end - start)

    return answer


def _openvino_engine(task: Task) -> Engine:
    import openvino
    import openvino_genai

    lookup = {"prompt_lookup": True} if task.options else {}
    model = openvino_genai.LLMPipeline(task.model, "CPU", INFERENCE_NUM_THREADS=task.threads, **lookup)
    config = model.get_generation_config()
    config.max_new_tokens, config.do_sample = task.tokens, False
    if task.options:
        config.num_assistant_tokens = task.options["prompt_lookup_num_tokens"]
        config.max_ngram_size = task.options["max_matching_ngram_size"]

    def answer(tokens: list[int]) -> Answer:
        prompt = np.array([tokens], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(prompt), openvino.Tensor(np.ones_like(prompt)))
        found = model.generate(inputs, config)
        first, total = found.perf_metrics.get_ttft().mean, found.perf_metrics.get_generate_duration().mean
        return Answer(len(found.tokens[0]) - 1, (total - first) / 1000)

    return answer


ENGINES = {"quasar": _own_engine, "transformers": _transformers_engine, "openvino": _openvino_engine}


def _prompts(arguments: argparse.Namespace) -> list[Question]:
    """Return the first turn of every prompt."""
    from quasar.config.schema import DataConfig
    from quasar.evaluation.prompts import load_prompts
    from quasar.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(_checkpoint())
    prompts = load_prompts(DataConfig(name="specbench", path=arguments.prompts, limit=arguments.limit))
    return [
        (prompt.key, prompt.family, tokenizer.encode_chat([{"role": "user", "content": prompt.turns[0]}]))
        for prompt in prompts
    ]


def _checkpoint() -> Any:
    """Return the default model's checkpoint, whose folder transformers can load."""
    from quasar.experiment.standalone import settings_of
    from quasar.model.sources import locate

    return locate(settings_of([]).model, lambda *progress: None)


def _origin(arguments: argparse.Namespace, model: str, prompts: int) -> dict[str, Any]:
    import torch
    import transformers

    from quasar.results.environment import describe_machine

    machine = describe_machine(torch.device("cpu"))
    return {
        "commit": (machine.git_commit or "none")[:10] + (" with uncommitted changes" if machine.git_dirty else ""),
        "date": date.today().isoformat(),
        "machine": machine.cpu,
        "threads": arguments.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": model,
        **({"gguf": Path(arguments.gguf).name} if arguments.gguf else {}),
        **({"openvino-genai": _version("openvino-genai", arguments.openvino_python)} if arguments.openvino else {}),
        "prompts": prompts,
        "repetitions": arguments.repetitions,
        "tokens per answer, at most": arguments.tokens,
    }


def _version(package: str, python: str) -> str:
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", metavar="FOLDER", help="Spec-Bench JSONL files, one per task family")
    parser.add_argument("--limit", type=int, default=2, help="prompts per task family")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="most tokens per answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-server", metavar="PATH", help="llama.cpp's server; --gguf names its model")
    parser.add_argument("--gguf", metavar="FILE", help="the reference's weights as GGUF, in BF16 for a fair comparison")
    parser.add_argument(
        "--openvino",
        metavar="FOLDER",
        nargs="*",
        default=[],
        help="the reference as `optimum-cli export openvino` writes it; the folder's name says in which precision",
    )
    parser.add_argument("--openvino-python", metavar="PATH", default=sys.executable, help="has openvino-genai")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.worker and not arguments.prompts:
        parser.error("--prompts is required")
    if arguments.llama_server and not arguments.gguf:
        parser.error("--llama-server needs --gguf")
    return arguments


if __name__ == "__main__":
    main()
