"""The W&B project that runs are logged to, and whether an API key is configured."""

from __future__ import annotations

import netrc
import os
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlparse

FOLDER = "wandb"
"""Name of the folder, in a run's folder, for everything that wandb writes."""
DEFAULT_HOST = "https://api.wandb.ai"


@dataclass(frozen=True)
class Target:
    """The W&B project, entity and tags of a run. mode: auto, online or offline."""

    mode: str = "auto"
    project: str = "quasar"
    entity: str | None = None
    tags: tuple[str, ...] = ()


def choose_mode(chosen: str) -> Literal["online", "offline"]:
    """Resolve ``auto``: use the environment variable WANDB_MODE if it is set, else online if a key is configured."""
    if chosen == "auto":
        chosen = os.environ.get("WANDB_MODE") or ("online" if key_is_configured() else "offline")
    return "online" if chosen == "online" else "offline"


def key_is_configured() -> bool:
    """Whether wandb would find an API key in the environment or in the file that ``wandb login`` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", DEFAULT_HOST)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
