"""Times work on the device without the host's part: calls are captured in a CUDA graph, which is replayed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

REPEATS = 11


def milliseconds_per_call(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = REPEATS) -> float:
    """Return the median over replays of the time of all calls, divided by their number.

    Calls on different copies of the weights, together larger than the L2 cache, time what a model sees: each of
    its weights is read once a pass.
    """
    if device.type == "cpu":
        return _host_milliseconds(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
        calls[-1]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = replay_milliseconds(graph.replay, repeats)
    graph.reset()
    return statistics.median(times) / len(calls)


def replay_milliseconds(replay: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Return the device time of each of several calls. Two calls before them are not counted."""
    for _ in range(2):
        replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]


def _host_milliseconds(calls: Sequence[Callable[[], object]]) -> float:
    begin = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - begin) * 1e3 / len(calls)
