"""The logger that writes metrics.csv."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from equiloss.errors import CheckpointError
from equiloss.records.run_dir import METRICS


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
        """Write one row; a float as its repr, which reads back to the same float64."""
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

        Raises:
            CheckpointError: if they are not all there, or have other columns.
        """
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        header = ",".join(self.columns)
        if len(lines) <= rows or lines[0].decode().strip() != header:
            raise CheckpointError(
                f"{self.path} has lost rows: the checkpoint was written after {rows} of them"
            )
        kept = sum(map(len, lines[: rows + 1]))
        self._file = self.path.open("r+", newline="", buffering=1, encoding="utf-8")
        self._file.truncate(kept)
        self._file.seek(kept)
        self.rows = rows

    @rank_zero_only
    def sync(self) -> None:
        """Force every row to disk, as a checkpoint that counts them is about to be."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Flush; the test after a fit goes on in the same file."""
        if self._file is not None:
            self._file.flush()

    @rank_zero_only
    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
