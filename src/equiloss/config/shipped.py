"""The configuration files and the example project that travel with the package."""

from __future__ import annotations

from pathlib import Path

# Links to the repository's own, which a wheel holds as folders.
CONF = Path(__file__).parents[1] / "conf"
PROJECT = Path(__file__).parents[1] / "project"
