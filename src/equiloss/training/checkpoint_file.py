"""Checkpoint files that are whole or not there, and that carry their own SHA-256.

torch's format is a ZIP archive, and an archive may end in a comment: a checkpoint's is the digest
of everything before it. (A flipped byte would otherwise load in silence: torch ignores the
archive's own checksums.) `checkpoints/index.json` has the newest digest of each name, as
`sha256sum` prints them; nothing depends on it but files of versions that wrote no seal.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from equiloss.errors import CheckpointError, DamagedError
from equiloss.records.atomic import write_atomically
from equiloss.records.run_dir import BEST, CHECKPOINTS, INDEX, LAST, PREVIOUS
from equiloss.records.writing import FileError

MARK = b"sha256:"
SEAL_BYTES = len(MARK) + 64
# How an archive without a comment ends: this record, of so many bytes.
END, END_BYTES = b"PK\5\6", 22
INDEX_LIMIT = 2**20


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then moves it there; verifies it when it is read."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None = None,
    ) -> None:
        """Write `path` so that a crash at any moment leaves a whole one; keep the state before."""
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_suffix(".tmp")
        try:
            with temporary.open("wb+") as file:
                torch.save(checkpoint, file)
                digest = _seal(file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:  # an interrupt too
            temporary.unlink(missing_ok=True)
            raise
        if place.name == LAST and place.exists():
            place.replace(place.with_name(PREVIOUS))
        temporary.replace(place)
        _sync_directory(place.parent)
        index = _read_index(place.parent) | {place.name: [digest]}
        with suppress(FileError):  # nothing depends on it
            write_atomically(place.parent / INDEX, json.dumps(index, indent=2) + "\n")

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Read a checkpoint of tensors and plain data.

        Raises:
            DamagedError: if its content is not what was written.
            CheckpointError: if the file is missing, or no checkpoint.
        """
        place = Path(path)
        verify(place)
        try:
            loaded: dict[str, Any] = torch.load(place, map_location=map_location, weights_only=True)
        except Exception as error:  # torch raises many types for a file that is no checkpoint
            raise CheckpointError(
                f"{place} is not a checkpoint of tensors and plain data: name one that a run of "
                "equiloss has written"
            ) from error
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{place} was not written by equiloss")
        return loaded


def verify(place: Path) -> None:
    """Compare a checkpoint's content with its digest.

    Raises:
        DamagedError: if they differ.
        CheckpointError: if the file is missing or cannot be read.
    """
    if not place.is_file():
        inside = f": name a file in it, such as {place / CHECKPOINTS / BEST}" * place.is_dir()
        raise CheckpointError(f"no checkpoint at {place}{inside}")
    try:
        with place.open("rb") as file:
            archive = file.read(2) == END[:2]
        whole = _is_whole(place)
    except OSError as error:
        raise CheckpointError(f"cannot read {place}: {error.strerror}") from error
    if not whole and archive:
        raise DamagedError(f"{place} is damaged: its content is not what its digest says")
    if not whole:
        raise DamagedError(f"{place} is damaged, or no checkpoint: it is no archive of tensors")


def _seal(file: Any) -> str:
    """Put the digest of an open archive into its comment; returns the digest of all of it."""
    file.seek(-2, os.SEEK_END)  # the length of the comment: there is none
    file.write(SEAL_BYTES.to_bytes(2, "little"))
    file.seek(0)
    hashed = hashlib.file_digest(file, "sha256")
    seal = MARK + hashed.hexdigest().encode()
    file.write(seal)
    hashed.update(seal)
    digest: str = hashed.hexdigest()
    return digest


def _is_whole(place: Path) -> bool:
    with place.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < END_BYTES:
            return False
        file.seek(max(size - SEAL_BYTES, 0))
        end = file.read()
        if end.startswith(MARK):
            with (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
                memoryview(content)[:-SEAL_BYTES] as body,
            ):
                return hashlib.sha256(body).hexdigest().encode() == end.removeprefix(MARK)
        if not end[-END_BYTES:].startswith(END):
            return False
        # Of a version that wrote no seal: the index, or the archive's own checksums.
        known = _read_index(place.parent).get(place.name)
        if known is not None:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest() in known
        try:
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
        except Exception:  # damaged archives raise many types
            return False


def _read_index(directory: Path) -> dict[str, list[str]]:
    """The digests on record; none where the file is missing or makes no sense."""
    file = directory / INDEX
    try:
        if file.stat().st_size > INDEX_LIMIT:
            return {}
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = index.items() if isinstance(index, dict) else ()
    return {name: digests for name, digests in entries if isinstance(digests, list)}


def _sync_directory(directory: Path) -> None:
    """Have the names in a directory survive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
