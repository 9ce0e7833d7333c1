"""One process at a time in a directory: a run's, or a sweep's."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from equiloss.errors import ConfigError
from equiloss.records.run_dir import LOCK


@contextmanager
def hold(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes off a directory while the context lasts.

    Args:
        directory: A run's, or a sweep's.
        wait: Wait for the process that holds it, instead of raising.

    Raises:
        ConfigError: if another process holds it, naming the holder.
    """
    # A record lock belongs to this process alone: it ends with it, however it ends, and forked
    # loader workers that outlive it do not hold it.
    with (directory / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            file.seek(0)
            raise ConfigError(
                f"{directory} is in use by {file.read() or 'another process'}: name another "
                "directory, or wait with in_use=wait"
            ) from error
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
