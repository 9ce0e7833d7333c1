"""The logger that writes metrics.csv."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from equiloss.records.run_dir import METRICS, set_aside
from equiloss.records.writing import writing

log = logging.getLogger(__name__)


class MetricsCsv(Logger):
    """Appends a row to metrics.csv for each call; the columns are fixed from the start.

    Args:
        directory: The run directory.
        columns: Names of the metrics that may be logged.
    """

    def __init__(self, directory: Path, columns: Sequence[str]) -> None:
        super().__init__()
        self.path = directory / METRICS
        self.columns = ["step", *columns]
        self.rows = 0
        """Rows written so far."""
        self._left_out: set[str] = set()
        self._file: IO[str] | None = None

    @property
    def name(self) -> str:
        """Lightning's name of the logger; it makes no directory of its own."""
        return ""

    @property
    def version(self) -> str:
        """Lightning's version of the logger; it makes no directory of its own."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one row; a float as its repr, which reads back to the same float64.

        What a callback of the user's own logs beside the columns is for the other loggers.

        Raises:
            FileError: if it cannot be written.
        """
        if others := metrics.keys() - set(self.columns):
            metrics = {name: metrics[name] for name in metrics if name not in others}
            if new := sorted(others - self._left_out - {"epoch"}):
                log.warning("%s has no columns for %s", self.path, ", ".join(new))
            self._left_out |= others
            if not metrics:
                return
        with writing(self.path):
            if self._file is None:
                # Line by line, so that a killed run keeps what it logged.
                self._file = self.path.open("w", newline="", buffering=1, encoding="utf-8")
                csv.writer(self._file).writerow(self.columns)
            writer = csv.DictWriter(self._file, self.columns)
            writer.writerow({"step": step, **metrics})
        self.rows += 1

    @rank_zero_only
    def continue_after(self, rows: int) -> None:
        """Cut the file after so many rows, and append from there.

        Of a file that has lost rows those that are whole are kept; it is set aside itself.

        Raises:
            FileError: if the file cannot be written.
        """
        header = ",".join(self.columns).encode()
        content = self.path.read_bytes() if self.path.is_file() else b""
        lines = content.splitlines(keepends=True) or [b""]
        known = lines[1 : rows + 1] if lines[0].strip() == header else []
        kept = [line for line in known if self._is_row(line)]
        with writing(self.path):
            if len(kept) < rows:
                log.warning("%s has lost %d of %d rows", self.path, rows - len(kept), rows)
                if self.path.is_file():
                    set_aside(self.path)
                lines = [header + b"\r\n", *kept]
                self.path.write_bytes(b"".join(lines))
            size = sum(map(len, lines[: len(kept) + 1]))
            self._file = self.path.open("r+", newline="", buffering=1, encoding="utf-8")
            self._file.truncate(size)
            self._file.seek(size)
        self.rows = len(kept)

    def _is_row(self, line: bytes) -> bool:
        values = line.rstrip(b"\r\n").split(b",")
        try:
            numbers = [float(value) for value in values if value]
        except ValueError:
            return False
        return bool(numbers) and len(values) == len(self.columns) and line.endswith(b"\n")

    @rank_zero_only
    def sync(self) -> None:
        """Force every row to disk, as a checkpoint that counts them is about to be."""
        if self._file is not None:
            with writing(self.path):
                self._file.flush()
                os.fsync(self._file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush; the test after a fit goes on in the same file."""
        if self._file is not None:
            with writing(self.path):
                self._file.flush()

    @rank_zero_only
    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with writing(self.path):
                self._file.close()
