"""Time the parts that are named, or all, and print their tables; `--write` puts them into docs/.

python -m benchmarks [PART …] [--rounds N] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from benchmarks import bitwise, commands, fine_tuning, growth, loop, loss, pictures, plot, ranks
from benchmarks.paired import Ratio, ratios

DOCS = Path(__file__).parents[1] / "docs"
PAGE, FIGURES = DOCS / "performance.md", DOCS / "performance.json"
PICTURE = DOCS / "performance.png"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"

Tables = Iterator[tuple[str, list[Ratio]]]


def _loss(rounds: int) -> Tables:
    for rows, classes in loss.SHAPES:
        title = f"A loss and its gradient, logits [{rows}, {classes}]"
        yield title, ratios(loss.arrangements(rows, classes), rounds=rounds)


def _loop(rounds: int) -> Tables:
    for work, network in (("mlp", "MLP 784-64-128-64-10"), ("convnet", "Shipped convnet, 28×28")):
        yield f"{network}, a step at batch 128", ratios(loop.arrangements(work), rounds=rounds)


def _ranks(rounds: int) -> Tables:
    title = "MLP on two ranks, a step at batch 256"
    yield title, ranks.reduction(rounds)
    weight = [0.5 + number / 10 for number in range(10)]
    yield f"{title}, class weights", ranks.reduction(rounds, weight)


def _bitwise(rounds: int) -> Tables:
    title = "A step with trainer.reduction=bitwise, times one with sum"
    yield title, bitwise.reduction(rounds)


def _pictures(rounds: int) -> Tables:
    title = "Pictures of 256×192 to 64×64, an image of an epoch"
    yield title, ratios(pictures.arrangements(), rounds=rounds)


def _fine_tuning(rounds: int) -> Tables:
    title = "resnet18 at 64×64, a step at batch 32"
    yield title, ratios(fine_tuning.arrangements(), rounds=rounds)


def _growth(rounds: int) -> Tables:
    yield "Shipped convnet as work grows, a step", ratios(growth.arrangements(), rounds=rounds)


def _commands(part: str, title: str) -> Callable[[int], Tables]:
    def tables(rounds: int) -> Tables:
        # A sweep takes minutes, and the parts before it have warmed the disk's cache.
        warm_up = part != "sweep"
        yield title, ratios(commands.arrangements(part), rounds=rounds, warm_up=warm_up)

    return tables


def _suite(_: int) -> Tables:
    seconds = commands.suite()
    share = seconds / commands.WANTED_OF_SUITE
    yield (
        f"make test (lint and tests), once; times {commands.WANTED_OF_SUITE} s",
        [Ratio("make test", seconds, share, share, share, 1.0)],
    )


PARTS: dict[str, tuple[Callable[[int], Tables], int]] = {
    "loss": (_loss, 11),
    "loop": (_loop, 5),
    "ranks": (_ranks, 7),
    "bitwise": (_bitwise, 3),
    "pictures": (_pictures, 3),
    "fine_tuning": (_fine_tuning, 3),
    "growth": (_growth, 3),
    "start": (_commands("start", "From the start of a process"), 5),
    "help": (_commands("help", "Pages of help"), 3),
    "sweep": (_commands("sweep", "Six runs on the digits"), 2),
    "suite": (_suite, 1),
}
"""What is timed, and in how many rounds."""


def table(title: str, measured: list[Ratio]) -> str:
    """A table of Markdown."""
    lines = [
        *(f"**{title}**", ""),
        "| | time | ratio | quartiles | wanted |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, seconds, ratio, low, high, wanted in measured:
        aim = "" if wanted is None else f"{wanted:.2f}"
        quartiles = f"{low:.2f} to {high:.2f}"
        lines.append(f"| {name} | {_time(seconds)} | {ratio:.2f} | {quartiles} | {aim} |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def environment() -> dict[str, str | int | None]:
    """What the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("equiloss", "torch", "lightning", "hydra-core")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Time, print, and write if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar=f"{{{','.join(PARTS)}}}")
    parser.add_argument("--rounds", type=int, help="instead of each part's own number")
    parser.add_argument(
        "--write", action="store_true", help=f"write {PAGE.name} and {FIGURES.name}, and draw them"
    )
    asked = parser.parse_args()
    if asked.rounds is not None and asked.rounds < 2:
        parser.error("--rounds is 2 at least: a ratio is given with its quartiles")
    for part in asked.parts or PARTS:
        tables, rounds = PARTS[part]
        for title, measured in tables(asked.rounds or rounds):
            print(table(title, measured), end="\n\n", flush=True)
            if asked.write:
                write(title, measured)


def write(title: str, measured: list[Ratio]) -> None:
    """Put a table into the page and the figures, in the place of an earlier one of this title."""
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    figures[title] = {
        "environment": environment(),
        "measured": [each._asdict() for each in measured],
    }
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    known = [
        table(name, [Ratio(**row) for row in own["measured"]]) for name, own in figures.items()
    ]
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(known) + f"\n\n{END}{after}")
    plot.draw(figures, PICTURE)


if __name__ == "__main__":
    main()
