"""The `equiloss` command."""

from equiloss.cli.main import app

__all__ = ["app"]
