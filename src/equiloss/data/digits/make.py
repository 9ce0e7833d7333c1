"""Make digits.npz from scikit-learn's copy of the set: `python make.py`.

The same scikit-learn data give the same bytes: NumPy dates the members of an .npz 1980-01-01.
"""

from pathlib import Path

import numpy as np


def main(path: Path) -> None:
    """Write images [1797, 8, 8] and targets [1797], both uint8, to `path`."""
    # The package itself does not need scikit-learn; only this script and slow tests do.
    from sklearn.datasets import load_digits

    digits = load_digits()
    np.savez_compressed(
        path,
        images=digits.images.astype(np.uint8),  # float64 integers from 0 to 16
        targets=digits.target.astype(np.uint8),
    )


if __name__ == "__main__":
    main(Path(__file__).with_name("digits.npz"))
