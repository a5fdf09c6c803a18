"""The folder in which compiled kernels and tuned tilings are stored."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$QUASAR_CACHE``, or the user's cache folder for Quasar on this platform."""
    if chosen := os.environ.get("QUASAR_CACHE"):
        return Path(chosen)
    try:
        import platformdirs
    except ModuleNotFoundError:  # a machine that only runs the GPU kernels, on Linux
        return Path.home() / ".cache" / "quasar"
    return Path(platformdirs.user_cache_dir("quasar"))
