"""A file system without locks is not a directory in use."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from equiloss.config import TrainerConfig
from equiloss.errors import ConfigError
from equiloss.launching.lock import NoLocksError, hold
from equiloss.launching.slots import share
from equiloss.records.run_dir import LOCK


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, request.param)


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def lockf(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("in_use", ["refuse", "wait"])
def test_a_file_system_without_locks_is_named(in_use: str, tmp_path: Path) -> None:
    with (
        pytest.raises(NoLocksError, match=rf"^the file system of {tmp_path} has no locks.*=unlock"),
        hold(tmp_path, in_use),
    ):
        pass
    with (
        pytest.raises(NoLocksError, match=rf"^the file system of {tmp_path}/.*in_use=unlocked"),
        share(tmp_path, TrainerConfig(), 2, in_use),
    ):
        pass


@pytest.mark.usefixtures("no_locks")
def test_without_locks_one_may_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with hold(tmp_path, "unlocked"):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert f"{tmp_path} has no locks: nothing keeps others off it" in caplog.text
    before = os.sched_getaffinity(0)
    with share(tmp_path, TrainerConfig(), 2, "unlocked") as variables:
        assert variables == {}
        assert os.sched_getaffinity(0) == before
    assert "has no locks: jobs share all cores and GPUs" in caplog.text


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES], ids=errno.errorcode.get)
def test_what_is_in_use_stays_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, number)
    with pytest.raises(ConfigError, match="is in use by"), hold(tmp_path, "unlocked"):
        pass
