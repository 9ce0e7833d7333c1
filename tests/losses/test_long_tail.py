"""The page on long tails: its command, and what it says of the outcome."""

from __future__ import annotations

import re
import shlex
import statistics
from collections import defaultdict
from pathlib import Path

from equiloss.records.results import Result
from support import ROOT, Train, slow

PAGE = (ROOT / "docs" / "long-tail.md").read_text(encoding="utf-8")


@slow
def test_balanced_softmax_is_ahead_in_balanced_accuracy(train: Train, tmp_path: Path) -> None:
    (command,) = re.findall(r"^```bash\npython train.py (.*?)\n```", PAGE, flags=re.MULTILINE)
    done = train(*shlex.split(command), timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = defaultdict(list)
    for file in (tmp_path / "runs" / "long_tail").glob("*/results.json"):
        result = Result.read(file.parent)
        weighted = ", weighted" if result.loss["options"]["weight"] else ""
        accuracy = result.metrics["test/balanced_acc"]
        assert accuracy is not None
        found[result.loss["name"] + weighted].append(accuracy)
    assert {name: len(runs) for name, runs in found.items()} == {
        "balanced_softmax": 5,
        "cross_entropy": 5,
        "cross_entropy, weighted": 5,
    }
    gain = statistics.fmean(found["balanced_softmax"]) - statistics.fmean(found["cross_entropy"])
    assert gain > 0
    # The page's rows are of these runs; another machine rounds otherwise.
    for name, values in found.items():
        (row,) = re.findall(rf"^\| {name} \|((?: 0\.\d+ \|){{5}})$", PAGE, flags=re.MULTILINE)
        told = [float(text) for text in row.split("|") if text.strip()]
        deviation = max(statistics.stdev(told), statistics.stdev(values))
        assert abs(statistics.fmean(told) - statistics.fmean(values)) < 2 * deviation
