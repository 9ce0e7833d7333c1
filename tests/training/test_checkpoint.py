"""Checkpoint files: whole or not there, and never damaged in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from equiloss.errors import CheckpointError
from equiloss.records.atomic import write_atomically
from equiloss.records.run_dir import INDEX
from equiloss.training import checkpoint
from equiloss.training.checkpoint import AtomicCheckpointIO


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
    """Save, and crash between the index and the move; returns what would have been moved."""
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
        assert sorted(path.name for path in last.parent.iterdir()) == [INDEX, "last.ckpt"]

    def test_files_of_one_directory_have_digests_of_their_own(self, io, last):
        best = last.with_name("best.ckpt")
        io.save_checkpoint(state(1), last)
        io.save_checkpoint(state(2), best)
        assert (step_of(io, last), step_of(io, best)) == (1, 2)
        assert set(json.loads((last.parent / INDEX).read_text())) == {"last.ckpt", "best.ckpt"}

    def test_a_file_that_was_moved_elsewhere_has_no_digest_and_loads(self, io, last, tmp_path):
        io.save_checkpoint(state(1), last)
        moved = last.rename(tmp_path / "moved.ckpt")
        assert step_of(io, moved) == 1


class TestDamage:
    @pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
    def test_a_flipped_byte_is_refused_naming_the_file(self, io, last, where):
        io.save_checkpoint(state(1), last)
        content = bytearray(last.read_bytes())
        content[int(where * len(content))] ^= 1
        last.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged: its SHA-256") as caught:
            io.load_checkpoint(last)
        assert str(last) in str(caught.value)

    def test_the_control_without_a_digest_it_loads_in_silence(self, io, last):
        """torch notices no flipped byte among the weights."""
        io.save_checkpoint(state(1), last)
        content = last.read_bytes()
        weights = torch.ones(100).numpy().tobytes()
        assert weights in content
        last.write_bytes(content.replace(weights, weights[:-1] + b"\x40"))
        (last.parent / INDEX).unlink()
        assert not torch.equal(io.load_checkpoint(last)["weights"], torch.ones(100))

    def test_a_truncated_file_is_refused(self, io, last):
        io.save_checkpoint(state(1), last)
        last.write_bytes(last.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match="damaged"):
            io.load_checkpoint(last)

    def test_a_missing_file_is_named(self, io, last):
        with pytest.raises(CheckpointError, match=f"no checkpoint at {last}"):
            io.load_checkpoint(last)

    def test_what_is_no_checkpoint_is_named(self, io, tmp_path):
        path = tmp_path / "notes.ckpt"
        path.write_text("not a checkpoint")
        with pytest.raises(CheckpointError, match=r"notes\.ckpt is not a checkpoint"):
            io.load_checkpoint(path)

    def test_code_is_never_loaded(self, io, tmp_path):
        path = tmp_path / "crafted.ckpt"
        torch.save({"state_dict": Path(tmp_path)}, path)  # an object, not tensors and plain data
        with pytest.raises(CheckpointError, match=r"crafted\.ckpt is not a checkpoint"):
            io.load_checkpoint(path, weights_only=False)


class TestCrash:
    def test_between_index_and_rename_the_one_before_still_loads(self, io, last, monkeypatch):
        io.save_checkpoint(state(1), last)
        crash_before_the_rename(io, last, 2, monkeypatch)
        assert step_of(io, last) == 1

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
        io.save_checkpoint(state(1), last)
        crash_before_the_rename(io, last, 2, monkeypatch)
        crash_before_the_rename(io, last, 3, monkeypatch)
        assert step_of(io, last) == 1
        io.save_checkpoint(state(4), last)
        assert step_of(io, last) == 4

    def test_while_writing_leaves_the_one_before(self, io, last, monkeypatch):
        io.save_checkpoint(state(1), last)

        def half(checkpoint: Any, file: Any) -> None:
            file.write(b"half of")
            raise Crash

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.torch, "save", half)
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
        patch.setattr(checkpoint.os, "fsync", crash)
        with pytest.raises(Crash):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
