"""Digests of a run's samples: a checkpoint keeps them, and a resumed run must find the same.

There is one for each class of a split, so that a difference is named by its class, and the
checkpoint stays small.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from equiloss.errors import DataError


def of_tensor(tensor: Tensor) -> str:
    """Digest of a tensor's type, shape and contents.

    >>> of_tensor(torch.zeros(2)) == of_tensor(torch.zeros(2, 1))
    False
    """
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=8)
    # As bytes: NumPy does not have all of torch's types.
    digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_files(files: Iterable[Path], root: Path | None) -> str:
    """Number and size of files, and a digest of their names below `root` and their sizes.

    Raises:
        DataError: naming a file that is not there.
    """
    digest, count, total = hashlib.blake2b(digest_size=8), 0, 0
    prefix = "" if root is None else f"{root}{os.sep}"
    for file in files:
        try:
            size = file.stat().st_size
        except OSError as error:
            raise DataError(f"cannot read image {file}: {error.strerror}") from error
        digest.update(os.fsencode(f"{str(file).removeprefix(prefix)}\0{size}\0"))
        count, total = count + 1, total + size
    return f"{count:,} files of {total:,} bytes (digest {digest.hexdigest()})"


def rows_by_class(targets: Tensor) -> dict[str, Tensor]:
    """Positions of each class's rows, in order; of probabilities the most probable class counts.

    >>> rows_by_class(torch.tensor([1, 0, 1]))
    {'class 0': tensor([1]), 'class 1': tensor([0, 2])}
    """
    labels = targets.argmax(dim=1) if targets.is_floating_point() else targets  # [N]
    counts = sorted(Counter(labels.tolist()).items())
    rows = torch.split(labels.argsort(stable=True), [count for _, count in counts])
    return {f"class {label}": own for (label, _), own in zip(counts, rows, strict=True)}
