"""The targets of the kernels on an H100, and whether this run reached them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scripts.gpu_suite.record import Json

MODEL = "Qwen3-8B"
LAYERS = ("qkv", "output", "gate_up", "down")
LARGE_LAYERS = ("gate_up", "down")
SKINNY_ROWS = (1, 2, 4, 6, 8, 16)
PASS_ROWS, PASS_CONTEXT = 6, 2048


def measure(results: Json) -> list[Json]:
    """Return one line per target: the value (null if not measured), the target, and whether it is met."""
    products = [row for row in results.get("products", []) if row.get("model") == MODEL and "microseconds" in row]
    bandwidth = results.get("environment", {}).get("copy_bandwidth_bytes_per_second")
    return [
        *_product_bars(products, bandwidth),
        *_pass_bars(results.get("passes", []), bandwidth),
        *_overhead_bars(results),
    ]


def _product_bars(rows: list[Json], bandwidth: float | None) -> Iterator[Json]:
    times = {(row["contender"], row["layer"], row["rows"]): row for row in rows}
    for op, target in (("linear_w8a8", 1.7), ("linear_w4a16", 2.6)):
        ratios = {
            f"{layer} M={count}": times["cublas_bf16", layer, count]["microseconds"]
            / times[op, layer, count]["microseconds"]
            for layer in LAYERS
            for count in SKINNY_ROWS
            if (op, layer, count) in times and ("cublas_bf16", layer, count) in times
        }
        name = f"{op} over cuBLAS BF16, least of four shapes and M = 1 to 16"
        yield _least(name, ratios, target, len(LAYERS) * len(SKINNY_ROWS))
        shares = {
            f"{layer} M={count}": times[op, layer, count]["bytes_per_second"] / bandwidth
            for layer in LARGE_LAYERS
            for count in SKINNY_ROWS
            if bandwidth and (op, layer, count) in times
        }
        name = f"{op} share of copy bandwidth, least of the two large shapes and M = 1 to 16"
        yield _least(name, shares, 0.75, len(LARGE_LAYERS) * len(SKINNY_ROWS))


def _pass_bars(rows: list[Json], bandwidth: float | None) -> Iterator[Json]:
    at = {
        row["weights"]: row
        for row in rows
        if row.get("model") == MODEL and row.get("rows") == PASS_ROWS and row.get("context") == PASS_CONTEXT
    }
    base = at.get("bf16")
    place = f"M = {PASS_ROWS}, context {PASS_CONTEXT}"
    share = base["bytes_per_second"] / bandwidth if base and bandwidth else None
    yield _bar(f"BF16 pass share of copy bandwidth, {place}", share, 0.8)
    for weights, target in (("int8", 1.6), ("int4", 2.4), ("int4 head8", None)):
        ratio = base["milliseconds"] / at[weights]["milliseconds"] if base and weights in at else None
        yield _bar(f"{weights} pass over our BF16 pass, {place}", ratio, target)


def _overhead_bars(results: Json) -> Iterator[Json]:
    for row in results.get("overhead", []):
        share = row["overhead_share"] if row["model"] == MODEL else None
        yield _bar(f"overhead of a step with {row['weights']} weights", share, 0.03, most=True)


def _least(name: str, values: dict[str, float], target: float, wanted: int) -> Json:
    """Return a target for the smallest of several values. It is not met if fewer than ``wanted`` were measured."""
    worst = min(values, key=lambda key: values[key], default=None)
    bar = _bar(name, None if worst is None else values[worst], target, worst, values)
    if bar["met"] and len(values) < wanted:
        bar |= {"met": None, "missing": wanted - len(values)}
    return bar


def _bar(
    name: str,
    value: float | None,
    target: float | None,
    place: str | None = None,
    values: Any = None,
    most: bool = False,
) -> Json:
    met = None if value is None or target is None else (value <= target if most else value >= target)
    return {"name": name, "value": value, "target": target, "met": met, "place": place, "values": values}
