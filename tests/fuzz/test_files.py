"""Whatever the files of a run hold, no code of theirs runs and nothing is loaded in silence."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import posix
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equiloss.config.resolved import ResolvedConfig
from equiloss.errors import UserError
from equiloss.launching.composition_errors import explain
from equiloss.launching.resume import claim
from equiloss.records.metrics_csv import MetricsCsv
from equiloss.records.run_dir import BEST, CHECKPOINTS, LAST, PREVIOUS
from equiloss.report import page
from equiloss.run import run
from equiloss.training.checkpoint import Checkpoints
from equiloss.training.checkpoint_file import AtomicCheckpointIO, _seal
from support import composed, fuzz, wrong_with

SEED = 0
STATES = [f"{CHECKPOINTS}/{name}" for name in (LAST, PREVIOUS, BEST)]
WILD = (None, -1, 2**70, float("nan"), "x" * 30_000, [], {}, {"a": [1]}, torch.ones(2), True)


@pytest.fixture(scope="module")
def config() -> ResolvedConfig:
    small = ("data=synthetic", "data.options.num_samples=60", "model=mlp", "trainer.max_steps=2")
    every = ("checkpoint.every_n_steps=1", "model.options.widths=[4]", "callbacks=quiet")
    return composed(*small, *every)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, config: ResolvedConfig) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    (directory / "config.yaml").write_text(config.text)
    run(config, directory)
    return directory


class Code:
    """A pickle of it calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def crafted(canary: Path, drawn: random.Random) -> Any:
    """What leaves a canary behind where it is loaded, as a value or within others."""
    text = f"open({str(canary)!r}, 'w').close()"
    codes = (
        Code(os.system, f"touch {canary}"),
        Code(posix.system, f"touch {canary}"),
        Code(builtins.eval, text),
        Code(builtins.exec, text),
        Code(os.mkdir, str(canary)),
        Code(Path.touch, canary),
        Code(torch.save, {}, str(canary)),
    )
    code = drawn.choice(codes)
    return drawn.choice((code, {"state_dict": code}, [code], {"equiloss": {"counts": code}}))


def with_pickle(content: bytes, pickled: bytes) -> bytes:
    """A checkpoint's archive with other content in place of its data.pkl, and without a seal."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        for entry in old.infolist():
            own = entry.filename.endswith("/data.pkl")
            new.writestr(entry.filename, pickled if own else old.read(entry))
    return written.getvalue()


def write_sealed(place: Path, archive: bytes) -> None:
    """Write an archive with the digest of what it holds, whatever that is."""
    place.write_bytes(archive)
    with place.open("rb+") as file:
        _seal(file)


def damaged(content: bytes, others: list[bytes], drawn: random.Random) -> bytes:
    """Bytes of a file with some of them flipped, lost, doubled, moved, or of another file."""
    size = len(content)
    begin, end, third = sorted(drawn.randrange(size + 1) for _ in range(3))
    page_of = (begin // 4096) * 4096
    flipped = bytearray(content)
    for _ in range(drawn.choice((1, 1, 8))):
        flipped[drawn.randrange(size)] ^= 1 << drawn.randrange(8)
    return drawn.choice(
        (
            bytes(flipped),
            bytes(flipped),
            content[:begin],
            content[begin:],
            content[:begin] + drawn.randbytes(drawn.choice((1, 22, 71))) + content[begin:],
            content[:end] + content[begin:],
            content[:begin] + content[end:third] + content[begin:end] + content[third:],
            content[:page_of]
            + bytes(len(content[page_of : page_of + 4096]))
            + content[page_of + 4096 :],
            drawn.choice(others),
            b"",
        )
    )


def rebuilt(content: bytes, drawn: random.Random, place: Path) -> bytes:
    """A checkpoint with one of its values replaced or gone, written as ours are."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    node = state
    while True:
        key = drawn.choice(list(node))
        if not (isinstance(node[key], dict) and node[key] and drawn.random() < 0.7):
            break
        node = node[key]
    if drawn.random() < 0.5:
        del node[key]
    else:
        node[key] = drawn.choice(WILD)
    AtomicCheckpointIO().save_checkpoint(state, place)
    return place.read_bytes()


def mutate(directory: Path, canary: Path, drawn: random.Random) -> bool:
    """Change one file of a run; returns whether a checkpoint has a correct seal all the same."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != ".lock")
    name = drawn.choice([*STATES, *STATES, *(str(p.relative_to(directory)) for p in files)])
    place, kind = directory / name, drawn.random()
    content = place.read_bytes()
    if name in STATES and kind < 0.3:
        if kind < 0.1:
            place.write_bytes(rebuilt(content, drawn, place.with_name("other.ckpt")))
            place.with_name("other.ckpt").unlink()
        elif kind < 0.2:
            archive = with_pickle(content, pickle.dumps(crafted(canary, drawn)))
            write_sealed(place, archive) if drawn.random() < 0.8 else place.write_bytes(archive)
        else:
            with zipfile.ZipFile(io.BytesIO(content)) as archive_read:
                (data,) = [n for n in archive_read.namelist() if n.endswith("/data.pkl")]
                pickled = archive_read.read(data)
            write_sealed(place, with_pickle(content, damaged(pickled, [b"."], drawn)))
        return True
    if kind < 0.4:
        place.write_bytes(pickle.dumps(crafted(canary, drawn), protocol=drawn.choice((0, 2, 4))))
        return False
    place.write_bytes(damaged(content, [p.read_bytes() for p in files if p != place], drawn))
    return False


def equal(one: Any, other: Any) -> bool:
    """Whether loaded values are the same, tensors to the bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and bool(one == other)


def faults(directory: Path, config: ResolvedConfig, originals: list[Any] | None) -> list[str]:
    """What is wrong with the way in which each reader takes the files of a directory."""
    io_of = AtomicCheckpointIO()
    found = []

    def load(name: str) -> None:
        loaded = io_of.load_checkpoint(directory / name)
        if originals is not None and not any(equal(loaded, original) for original in originals):
            found.append(f"{name} was loaded in silence")

    def hold() -> None:
        with claim(directory, config):
            pass

    checkpoints = directory / CHECKPOINTS
    metrics = MetricsCsv(directory, [])
    readers: dict[str, Callable[[], Any]] = {
        **{name: (lambda name=name: load(name)) for name in STATES},
        "find_state": Checkpoints(checkpoints, config.config.checkpoint, metrics).find_state,
        "report": lambda: page.write_report([directory]),
        "claim": hold,
    }
    for name, read in readers.items():
        try:
            read()
        except UserError as error:
            wrong = wrong_with(explain(error))
            found += [f"{name}: {wrong}"] if wrong else []
        except Exception as error:
            found.append(f"{name} raised {type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("cases", [30, pytest.param(2_000, marks=fuzz)])
def test_no_damaged_or_crafted_file_runs_code_or_is_taken_for_another(
    cases: int, finished: Path, config: ResolvedConfig, tmp_path: Path, monkeypatch
) -> None:
    originals = [torch.load(finished / name, weights_only=True) for name in STATES]
    canary, directory = tmp_path / "canary", tmp_path / "run"
    draw_all = page.draw_all
    found = []
    for case in range(cases):
        drawn = random.Random(f"{SEED}-{case}")
        shutil.copytree(finished, directory)
        has_seal = mutate(directory, canary, drawn)
        # A picture takes a second.
        monkeypatch.setattr(page, "draw_all", draw_all if case % 100 == 99 else lambda *_: [])
        why = faults(directory, config, None if has_seal else originals)
        why += ["the canary is there"] * canary.exists()
        found += [f"seed {SEED}, case {case}: {each[:600]}" for each in why]
        shutil.rmtree(directory)
        if canary.exists():
            break
    assert not found, f"{len(found)}:\n" + "\n".join(found[:40])
    assert list(tmp_path.iterdir()) == []


def test_the_control_with_code_allowed_the_canary_is_there(finished: Path, tmp_path: Path) -> None:
    content = (finished / STATES[0]).read_bytes()
    for number in range(8):
        drawn, canary = random.Random(number), tmp_path / f"canary-{number}"
        crafty = tmp_path / "crafted.ckpt"
        write_sealed(crafty, with_pickle(content, pickle.dumps(crafted(canary, drawn), 2)))
        torch.load(crafty, weights_only=False)
        assert canary.exists(), number
