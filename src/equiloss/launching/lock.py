"""One process at a time in a directory: a run's, or a sweep's."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from equiloss.errors import ConfigError
from equiloss.records.run_dir import LOCK

log = logging.getLogger(__name__)


class NoLocksError(ConfigError):
    """A file system on which no file can be locked."""


@contextmanager
def hold(directory: Path, in_use: str = "refuse") -> Iterator[None]:
    """Keep other processes off a directory while the context lasts.

    Args:
        directory: A run's, or a sweep's.
        in_use: refuse | wait: raise, or wait for the process that holds it. unlocked: raise too,
            but do without where the file system has no locks.

    Raises:
        ConfigError: if another process holds it, naming the holder.
        NoLocksError: if the file system has no locks.
    """
    with (directory / LOCK).open("a+", encoding="utf-8") as file:
        try:
            if not lock(file, wait=in_use == "wait"):
                file.seek(0)
                raise ConfigError(
                    f"{directory} is in use by {file.read() or 'another process'}: name another "
                    "directory, or wait with in_use=wait"
                )
        except NoLocksError:
            if in_use != "unlocked":
                raise
            log.warning(
                "the file system of %s has no locks: nothing keeps others off it", directory
            )
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {now}"
        with suppress(OSError):  # the lock holds without a name, too
            os.write(file.fileno(), holder.encode())
        try:
            yield
        finally:
            file.truncate(0)


def lock(file: IO[str], *, wait: bool = False) -> bool:
    """Lock an open file; returns whether it is ours, which is false if another process has it.

    A record lock belongs to this process alone: it ends with it, however it ends, and forked
    loader workers that outlive it do not hold it.

    Raises:
        NoLocksError: if the file system has no locks, as NFS without lockd.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise NoLocksError(
            f"the file system of {Path(file.name).parent} has no locks "
            f"({os.strerror(error.errno or 0).lower()}): name a directory on another one, or, "
            "where no other process uses this one, go on with in_use=unlocked"
        ) from error
    return True
