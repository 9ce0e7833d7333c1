"""Checkpoint files: whole or not there, and never damaged in silence."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from equiloss.config import CheckpointConfig
from equiloss.errors import CheckpointError, DamagedError
from equiloss.records.atomic import write_atomically
from equiloss.records.metrics_csv import MetricsCsv
from equiloss.records.run_dir import INDEX, PREVIOUS
from equiloss.training import checkpoint_file
from equiloss.training.checkpoint import Checkpoints
from equiloss.training.checkpoint_file import AtomicCheckpointIO


def state(value: float) -> dict[str, Any]:
    return {
        "weights": torch.full((100,), float(value)),
        "step": int(value),
        "plain": {"a": [1, None]},
    }


@pytest.fixture
def io() -> AtomicCheckpointIO:
    return AtomicCheckpointIO()


@pytest.fixture
def last(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "last.ckpt"


def step_of(io: AtomicCheckpointIO, path: Path) -> int:
    step: int = io.load_checkpoint(path)["step"]
    return step


class Crash(BaseException):
    """The process ends here."""


def crash_before_the_rename(
    io: AtomicCheckpointIO, path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Save, and crash just before the move; returns what would have been moved."""
    replace = Path.replace
    left_behind = []

    def crashing(source: Path, target: Path) -> Path:
        if Path(target) == path:
            left_behind.append(source)
            raise Crash
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crashing)
        with pytest.raises(Crash):
            io.save_checkpoint(state(value), path)
    return left_behind[0]


class TestRoundTrip:
    def test_what_is_saved_is_loaded(self, io, last):
        io.save_checkpoint(state(1), last)
        loaded = io.load_checkpoint(last)
        assert torch.equal(loaded.pop("weights"), torch.ones(100))
        assert loaded == {"step": 1, "plain": {"a": [1, None]}}

    def test_the_newest_replaces_the_one_before(self, io, last):
        for value in (1, 2, 3):
            io.save_checkpoint(state(value), last)
            assert step_of(io, last) == value
        assert step_of(io, last.with_name(PREVIOUS)) == 2
        names = sorted(path.name for path in last.parent.iterdir())
        assert names == [INDEX, "last.ckpt", PREVIOUS]

    def test_files_of_one_directory_have_digests_of_their_own(self, io, last):
        best = last.with_name("best.ckpt")
        io.save_checkpoint(state(1), last)
        io.save_checkpoint(state(2), best)
        assert (step_of(io, last), step_of(io, best)) == (1, 2)
        index = json.loads((last.parent / INDEX).read_text())
        assert set(index) == {"last.ckpt", "best.ckpt"}
        for name, digests in index.items():
            assert digests == [hashlib.sha256((last.parent / name).read_bytes()).hexdigest()]

    @pytest.mark.parametrize("index", [None, "", "{", "[1]", '{"last.ckpt": 3}', "[" * 10**5])
    def test_nothing_depends_on_the_index(self, io, last, index):
        io.save_checkpoint(state(1), last)
        (last.parent / INDEX).unlink()
        if index is not None:
            (last.parent / INDEX).write_text(index)
        assert step_of(io, last) == 1
        io.save_checkpoint(state(2), last)
        assert set(json.loads((last.parent / INDEX).read_text())) == {"last.ckpt"}

    def test_the_seal_is_a_comment_that_torch_and_zip_leave_alone(self, io, last):
        io.save_checkpoint(state(1), last)
        assert torch.load(last, weights_only=True, mmap=True)["step"] == 1
        with zipfile.ZipFile(last) as archive:
            assert archive.comment.startswith(b"sha256:")
            assert archive.testzip() is None


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


class TestDamage:
    @pytest.mark.parametrize("index", ["kept", "lost"])
    def test_any_flipped_bit_is_refused_wherever_the_file_is(self, io, last, tmp_path, index):
        """The digest travels with the checkpoint, the last bit of its own seal included."""
        io.save_checkpoint(state(1), last)
        place = last if index == "kept" else last.rename(tmp_path / "moved.ckpt")
        whole = place.read_bytes()
        for where in [*range(0, len(whole), 97), *range(len(whole) - 100, len(whole))]:
            flip(place, where)
            with pytest.raises(DamagedError, match=f"{place} is damaged"):
                io.load_checkpoint(place)
            place.write_bytes(whole)

    def test_the_control_without_its_seal_it_loads_in_silence(self, io, last):
        """torch notices no flipped byte among the weights."""
        io.save_checkpoint(state(1), last)
        content = last.read_bytes()
        weights = torch.ones(100).numpy().tobytes()
        assert weights in content
        last.write_bytes(content.replace(weights, weights[:-1] + b"\x40"))
        assert not torch.equal(torch.load(last, weights_only=True)["weights"], torch.ones(100))

    @pytest.mark.parametrize("left", [0, 1, 21, 22, 70, 71, 500, -100, -71, -10, -1])
    def test_a_truncated_file_is_refused(self, io, last, left):
        io.save_checkpoint(state(1), last)
        last.write_bytes(last.read_bytes()[:left])
        with pytest.raises(DamagedError):
            io.load_checkpoint(last)

    def test_one_that_was_written_before_there_were_seals(self, io, last):
        """By the archive's own checksums, and by the index where it is there."""
        last.parent.mkdir()
        torch.save(state(1), last)
        assert step_of(io, last) == 1
        index = last.parent / INDEX
        index.write_text(json.dumps({"last.ckpt": [hashlib.sha256(last.read_bytes()).hexdigest()]}))
        assert step_of(io, last) == 1
        index.write_text(json.dumps({"last.ckpt": ["0" * 64]}))
        with pytest.raises(DamagedError):
            io.load_checkpoint(last)
        index.unlink()
        flip(last, last.read_bytes().index(torch.ones(100).numpy().tobytes()))
        with pytest.raises(DamagedError):
            io.load_checkpoint(last)

    def test_a_missing_file_is_named(self, io, last):
        with pytest.raises(CheckpointError, match=f"no checkpoint at {last}"):
            io.load_checkpoint(last)

    def test_what_is_no_checkpoint_is_named(self, io, tmp_path):
        path = tmp_path / "notes.ckpt"
        path.write_text("not a checkpoint, but long enough to be one")
        with pytest.raises(CheckpointError, match=r"notes\.ckpt is damaged, or no checkpoint"):
            io.load_checkpoint(path)

    def test_code_is_never_loaded(self, io, tmp_path):
        path = tmp_path / "crafted.ckpt"
        torch.save({"state_dict": Path(tmp_path)}, path)  # an object, not tensors and plain data
        with pytest.raises(CheckpointError, match=r"crafted\.ckpt is not a checkpoint"):
            io.load_checkpoint(path, weights_only=False)


GOOD = {
    "num_classes": 2,
    "split_sizes": {"train": 1},
    "loss": {"name": "x"},
    "rng": [],
    "counts": {"train_seen": 1},
    "scalars": {},
    "samples": {},
    "segments": [],
}


class TestForm:
    """What is sealed may still be anything."""

    def found(self, last: Path, **checkpoint: Any) -> int | None:
        AtomicCheckpointIO().save_checkpoint(checkpoint, last)
        metrics = MetricsCsv(last.parent, [])
        return Checkpoints(last.parent, CheckpointConfig(), metrics).find_state()

    def test_of_ours_is_found(self, last):
        assert self.found(last, equiloss=GOOD, global_step=3) == 3

    @pytest.mark.parametrize("step", [{}, {"global_step": None}, {"global_step": torch.ones(1)}])
    def test_without_its_steps_is_refused(self, last, step):
        with pytest.raises(CheckpointError, match=r"last\.ckpt does not say how many steps"):
            self.found(last, equiloss=GOOD, **step)

    @pytest.mark.parametrize(
        "changed",
        [
            *({"num_classes": "2"}, {"split_sizes": {"train": []}}, {"rng": 3}, {"extra": 1}),
            *({"counts": {"train_seen": None}}, {"counts": 1}, {"scalars": []}, {"segments": [1]}),
        ],
        ids=str,
    )
    def test_of_another_form_is_refused(self, last, changed):
        with pytest.raises(CheckpointError, match=r"last\.ckpt is of another version"):
            self.found(last, equiloss=GOOD | changed, global_step=3)


class TestCrash:
    def test_before_the_rename_the_one_before_still_loads(self, io, last, monkeypatch):
        io.save_checkpoint(state(1), last)
        crash_before_the_rename(io, last, 2, monkeypatch)
        assert step_of(io, last.with_name(PREVIOUS)) == 1

    def test_just_after_the_rename_the_new_one_loads(self, io, last, monkeypatch):
        io.save_checkpoint(state(1), last)
        crash_before_the_rename(io, last, 2, monkeypatch).replace(last)
        assert step_of(io, last) == 2

    def test_of_the_first_save_leaves_no_checkpoint(self, io, last, monkeypatch):
        crash_before_the_rename(io, last, 1, monkeypatch)
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            io.load_checkpoint(last)

    def test_twice_in_a_row_the_last_whole_one_still_loads(self, io, last, monkeypatch):
        """A resumed run may crash at the same point again."""
        previous = last.with_name(PREVIOUS)
        io.save_checkpoint(state(1), last)
        crash_before_the_rename(io, last, 2, monkeypatch)
        crash_before_the_rename(io, last, 3, monkeypatch)
        assert step_of(io, previous) == 1
        io.save_checkpoint(state(4), last)
        assert (step_of(io, last), step_of(io, previous)) == (4, 1)

    def test_while_writing_leaves_the_one_before(self, io, last, monkeypatch):
        io.save_checkpoint(state(1), last)

        def half(checkpoint: Any, file: Any) -> None:
            file.write(b"half of")
            raise Crash

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_file.torch, "save", half)
            with pytest.raises(Crash):
                io.save_checkpoint(state(2), last)
        assert step_of(io, last) == 1
        io.save_checkpoint(state(3), last)
        assert step_of(io, last) == 3


def test_no_reader_sees_half_a_text_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")

    def crash(file: int) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file.os, "fsync", crash)
        with pytest.raises(Crash):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
