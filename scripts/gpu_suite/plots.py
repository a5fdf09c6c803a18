"""Draws two figures: the matmuls compared with cuBLAS, and whole passes against the bytes that they read."""

from __future__ import annotations

from pathlib import Path

from scripts.gpu_suite.record import Json


def draw(results: Json, folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    products = [row for row in results.get("products", []) if "microseconds" in row]
    for model in dict.fromkeys(row["model"] for row in products):
        _draw_products([row for row in products if row["model"] == model], folder / f"products_{model}.png")
    passes = [row for row in results.get("passes", []) if "milliseconds" in row]
    if passes:
        bandwidth = results.get("environment", {}).get("copy_bandwidth_bytes_per_second")
        _draw_passes(passes, bandwidth, folder / "passes.png")


def _draw_products(rows: list[Json], file: Path) -> None:
    import matplotlib.pyplot as plt

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, axes = plt.subplots(1, len(layers), figsize=(4 * len(layers), 4), squeeze=False)
    for axis, layer in zip(axes[0], layers, strict=True):
        own = [row for row in rows if row["layer"] == layer]
        for contender in dict.fromkeys(row["contender"] for row in own):
            points = sorted((row["rows"], row["microseconds"]) for row in own if row["contender"] == contender)
            axis.plot(*zip(*points, strict=True), marker="o", label=contender)
        axis.set(title=f"{layer} {own[0]['outputs']} × {own[0]['inputs']}", xlabel="rows M", xscale="log", yscale="log")
    axes[0][0].set_ylabel("µs per call, weights from memory")
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(rows[0]["model"])
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw_passes(rows: list[Json], bandwidth: float | None, file: Path) -> None:
    import matplotlib.pyplot as plt

    contexts = sorted({row["context"] for row in rows})
    figure, axes = plt.subplots(1, len(contexts), figsize=(4.5 * len(contexts), 4), squeeze=False, sharey=True)
    for axis, context in zip(axes[0], contexts, strict=True):
        for weights in dict.fromkeys(row["weights"] for row in rows):
            own = sorted(
                (row for row in rows if row["context"] == context and row["weights"] == weights),
                key=lambda row: row["rows"],
            )
            counts = [row["rows"] for row in own]
            (line,) = axis.plot(counts, [row["milliseconds"] for row in own], marker="o", label=weights)
            if bandwidth:
                limit = [row["bytes"] / bandwidth * 1e3 for row in own]
                axis.plot(counts, limit, linestyle=":", color=line.get_color())
        axis.set(title=f"context {context}", xlabel="rows M", xscale="log")
    axes[0][0].set(ylabel="ms per pass (dotted: bytes / copy bandwidth)", ylim=(0, None))
    axes[0][-1].legend()
    figure.suptitle(f"{rows[0]['model']}, random weights: one verification pass")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
