"""Where runs go in W&B, and whether it can be reached with a key."""

from __future__ import annotations

import netrc
import os
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlparse

FOLDER = "wandb"
"""Below a run's folder: everything that wandb writes."""
DEFAULT_HOST = "https://api.wandb.ai"


@dataclass(frozen=True)
class Target:
    """Where runs go. mode: auto, online or offline."""

    mode: str = "auto"
    project: str = "quasar"
    entity: str | None = None
    tags: tuple[str, ...] = ()


def choose_mode(chosen: str) -> Literal["online", "offline"]:
    """What ``auto`` comes to: what the variable WANDB_MODE says, else online where there is a key."""
    if chosen == "auto":
        chosen = os.environ.get("WANDB_MODE") or ("online" if key_is_configured() else "offline")
    return "online" if chosen == "online" else "offline"


def key_is_configured() -> bool:
    """Whether wandb would find a key: in the environment or in the file that ``wandb login`` writes. It is not read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", DEFAULT_HOST)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
