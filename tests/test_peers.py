"""The comparison with other engines: turns, ratios, and the protocols of the processes."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "peers.py"
SERVER = """#!{python}
import http.server, json, sys
assert sys.argv[sys.argv.index("--model") + 1] == "weights.gguf"
assert sys.argv[sys.argv.index("--threads") + 1] == "3"
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())
    def do_GET(self):
        self.reply({{"status": "ok"}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["temperature"] == 0 and not asked["cache_prompt"]
        self.reply({{"timings": {{"predicted_n": asked["n_predict"], "predicted_ms": 10.0 * len(asked["prompt"])}}}})
    def log_message(self, *unused):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
OPENVINO_GENAI = """
from types import SimpleNamespace as Space
class TokenizedInputs(Space):
    def __init__(self, ids, mask):
        assert ids.dtype == mask.dtype == "int64" and ids.shape == mask.shape and mask.all()
        self.ids = ids
class LLMPipeline:
    def __init__(self, folder, device, INFERENCE_NUM_THREADS, prompt_lookup=False):
        assert (folder, device, INFERENCE_NUM_THREADS) == ("int8", "CPU", 3)
        self.lookup = prompt_lookup
    def get_generation_config(self):
        return Space(num_assistant_tokens=None, max_ngram_size=None)
    def generate(self, inputs, config):
        assert config.do_sample is False
        drafting = (config.num_assistant_tokens, config.max_ngram_size)
        assert drafting == ((5, 3) if self.lookup else (None, None))
        print("a library's message")
        first, total = 40.0, 40.0 + 10.0 * inputs.ids.shape[1] / (2 if self.lookup else 1)
        measured = Space(
            get_ttft=lambda: Space(mean=first), get_generate_duration=lambda: Space(mean=total)
        )
        return Space(tokens=[[7] * config.max_new_tokens], perf_metrics=measured)
"""


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module
    spec.loader.exec_module(module)
    return module


def test_ratios_are_paired(peers: ModuleType, tmp_path: Path) -> None:
    """The second engine takes a third of the time on every prompt and repetition, though prompts differ by far."""
    turns: list[str] = []

    def engine(name: str, pace: float):
        def answer(tokens: list[int]):
            turns.append(name)
            return peers.Answer(10, 10 * pace * len(tokens))

        return answer

    engines = {peers.BASELINE: engine("slow", 3.0), "fast": engine("fast", 1.0)}
    prompts = [(str(length), "math" if length % 2 else "code", [0] * length) for length in range(1, 9)]
    rows = peers.measure(engines, prompts, repetitions=2)
    assert len(rows) == 2 * 8 * 2
    assert turns[:2] == ["slow", "fast"]  # the warm-up
    pairs = [tuple(turns[place : place + 2]) for place in range(2, len(turns), 2)]
    assert set(pairs) == {("slow", "fast"), ("fast", "slow")}
    text = peers.table(rows, {"commit": "abc"})
    assert "| fast | 0.2 | 3.00x |" in text
    assert f"| {peers.BASELINE} | 0.1 | 1.00x |" in text
    assert "commit abc" in text
    peers.draw(rows, {"commit": "abc"}, tmp_path / "peers")
    assert {file.suffix for file in tmp_path.iterdir()} == {".pdf", ".png", ".svg"}
    drawn = (tmp_path / "peers.svg").read_text()
    assert "tokens/s over" in drawn
    assert "fill: #ffffff; stroke: #555555" in drawn, "another engine is hollow and grey"
    assert "fill: #ffffff; stroke: #000000" not in drawn, "the program's own is filled"


def test_llama_cpp(peers: ModuleType, tmp_path: Path) -> None:
    binary = tmp_path / "llama-server"
    binary.write_text(SERVER.format(python=sys.executable))
    binary.chmod(0o755)
    arguments = argparse.Namespace(llama_server=str(binary), gguf="weights.gguf", threads=3, tokens=7)
    with peers._LlamaServer(arguments) as server:
        assert server.answer([1, 2, 3]) == peers.Answer(7, 0.03)
    arguments.gguf = "another.gguf"
    with pytest.raises(RuntimeError, match="did not start"), peers._LlamaServer(arguments):
        pass


def test_openvino_genai(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of both modules hold what the process asks of them: with and without prompt lookup, in a process."""
    (tmp_path / "openvino.py").write_text("def Tensor(array):\n    return array\n")
    (tmp_path / "openvino_genai.py").write_text(OPENVINO_GENAI)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for options, seconds in (({}, 0.03), (peers.LOOKUP, 0.015)):
        task = peers.Task("OpenVINO int8", "openvino", "int8", 8, 3, options)
        with peers._Process(task, sys.executable) as engine:
            assert engine.answer([1, 2, 3]) == peers.Answer(7, pytest.approx(seconds))
