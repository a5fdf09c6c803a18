"""Checks of what is outside the machine: the Hugging Face hub, W&B and SLURM. A run needs none of them."""

from __future__ import annotations

import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator

from quasar.doctor.finding import Finding
from quasar.errors import first_line

SECONDS = 3.0
"""How long a service may take to answer."""


def hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    offline = "models come from the hub's local cache, model.path=FOLDER, or a package (smollm2_135m)"
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "falls back", f"HF_HUB_OFFLINE is set: {offline}")
        return
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        # The address is that of the hub, which the user may set; nothing is read from it.
        with urllib.request.urlopen(request, timeout=SECONDS):  # nosec B310
            pass
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError) as error:
        reason = first_line(getattr(error, "reason", None) or error) if isinstance(error, Exception) else str(error)
        yield Finding("hub", "falls back", f"not reachable ({reason}): {offline}", "connect, or set HF_ENDPOINT")
        return
    yield Finding("hub", "works", "reachable: models and datasets can be downloaded")


def wandb() -> Iterator[Finding]:
    from quasar.results.wandb.target import key_is_configured

    if key_is_configured():
        yield Finding("W&B", "works", "an API key is configured: logger=wandb logs online")
    else:
        yield Finding("W&B", "falls back", "no API key: logger=wandb logs offline", "wandb login, or WANDB_API_KEY")


def slurm() -> Iterator[Finding]:
    missing = [name for name in ("sbatch", "sinfo") if shutil.which(name) is None]
    remedy = "use hydra/launcher=slurm on a login node of a cluster"
    if missing:
        yield Finding("SLURM", "falls back", f"no {' and no '.join(missing)}: sweeps run on this machine", remedy)
        return
    try:
        done = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding(
            "SLURM", "falls back", f"sinfo does not answer ({first_line(error)})", "ask the cluster's administrators"
        )
        return
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[0]
        yield Finding("SLURM", "falls back", f"sinfo fails ({reason}): sweeps run on this machine", remedy)
    else:
        names = ", ".join(dict.fromkeys(done.stdout.split()))
        yield Finding("SLURM", "works", f"hydra/launcher=slurm submits to the partitions {names}")
