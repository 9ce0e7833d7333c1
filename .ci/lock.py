"""Write requirements.lock from pip's report: `python .ci/lock.py report.json requirements.lock`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = """\
# What the development installation resolved to, each file with its hash: `make lock` writes it.
#   python -m pip install --require-hashes --requirement requirements.lock
#   python -m pip install --no-deps --editable .
# For CPython {python} on {system} {machine}; `make lock-check` fetches every file and compares it.
"""


def lock(report: dict[str, Any]) -> str:
    """The lines of the lock, sorted by name; this project itself is left out."""
    where = report["environment"]
    head = HEAD.format(
        python=where["python_version"],
        system=where["platform_system"],
        machine=where["platform_machine"],
    )
    lines = []
    for item in report["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name == "equiloss":
            continue
        sha256 = item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name.lower()}=={version} --hash=sha256:{sha256}\n")
    return head + "".join(sorted(lines))


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(lock(json.loads(source.read_text())))
