"""The main table from the runs of sweep.sh: ``python experiments/main_table/table.py OUTPUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from quasar.results.collect import Collector, tabulate
from quasar.results.markdown import Column, markdown, rows_of

HERE = Path(__file__).parent
COLUMNS = [
    *("weight_bytes", "step_ms"),
    Column("cheaper than fp16", lambda run: f"{run['cheaper']:.2f}x"),
    "tokens_per_second",
    Column("AR-same over AR-ref", lambda run: f"{run['speedup_vs_ar_ref'] / run['speedup_vs_ar_same']:.2f}x"),
    *("speedup_vs_ar_same", "speedup_vs_ar_ref", "speedup_ci95"),
    *("mean_acceptance_length", "mean_acceptance_length_ref", "kl_to_reference", "top1_agreement"),
]
RESULTS = [
    *("prompts", "tokens_generated", "tokens_per_second", "step_ms", "verify_ms", "draft_ms", "overhead_ms"),
    *("ar_ref_ms", "speedup_vs_ar_same", "speedup_vs_ar_ref", "speedup_ci95_low", "speedup_ci95_high"),
    *("mean_acceptance_length", "mean_acceptance_length_ref", "acceptance_rate", "kl_to_reference", "top1_agreement"),
    *("weight_bytes", "bytes_per_step", "achieved_bandwidth_fraction", "device"),
]


def main(output: Path) -> None:
    runs = tabulate(Collector(output).runs(), output)
    runs = runs[runs["status"] == "done"].copy()
    runs = runs.sort_values("weight_bytes", ascending=False)
    runs["label"] = [describe(run) for run in runs.to_dict("records")]
    # Autoregressive decoding by the reference, in the same run: what a step is compared with across runs.
    runs["ar_ref_ms"] = 1e3 / (runs["tokens_per_second"] / runs["speedup_vs_ar_ref"])
    steps = runs["step_ms"] / runs["ar_ref_ms"]
    runs["cheaper"] = float(steps[runs["verifier"] == "fp16"].iloc[0]) / steps
    fp16 = runs[runs["verifier"] == "fp16"].iloc[0]
    lines = markdown("verifier", rows_of(runs.assign(verifier=runs["label"])), COLUMNS)
    lines += ["", f"{fp16['device']}; a step of AR-ref takes {fp16['ar_ref_ms']:.2f} ms."]
    (HERE / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    runs[["label", *RESULTS]].to_csv(HERE / "results.csv", index=False)


def describe(run: dict[str, object]) -> str:
    """The verifier and the options that tell it from its siblings."""
    parts = [str(run["verifier"])]
    if str(run.get("verifier.activation_bits")) == "8":
        parts.append("int8 inputs")
    if str(run.get("verifier.lm_head_bits")) == "8":
        parts.append("8-bit head")
    if not pd.isna(ratio := run.get("verifier.ratio")):
        parts.append(f"{float(str(ratio)):.0%}")
    return ", ".join(parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
