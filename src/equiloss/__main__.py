"""`python -m equiloss` is the `equiloss` command."""

from equiloss.cli import app

app(prog_name="python -m equiloss")
