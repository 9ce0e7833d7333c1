"""Time by stage: each second counts for one stage, and the trace has them all."""

from __future__ import annotations

import json

import pytest

from equiloss.training import profile
from equiloss.training.profile import Stages


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now[0])
    return now


def test_a_stage_counts_without_those_inside_it(clock):
    stages = Stages()
    with stages.profile("optimizer_step"):
        clock[0] += 1
        with stages.profile("[Callback]ParityMonitor.on_before_optimizer_step"):
            clock[0] += 2
            with stages.profile("logging"):
                clock[0] += 4
        clock[0] += 8
    with stages.profile("run_training_batch"):
        clock[0] += 16
    assert stages.seconds == {"optimizer": 9, "parity": 2, "logging": 4, "loop": 16}
    table = stages.table(steps=2)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows[0] == ("loop", "51.6%", "16.000", "8000.000", "1")
    events = json.loads(stages.trace())["traceEvents"]
    durations = {event["cat"]: (event["ts"], event["dur"]) for event in events}
    assert durations["parity"] == (1e6, 6e6)
    assert durations["optimizer"] == (0, 15e6)


def test_a_trace_stays_short_enough_to_be_opened(clock, monkeypatch):
    monkeypatch.setattr(profile, "EVENTS", 3)
    stages = Stages()
    for _ in range(5):
        with stages.profile("loss"):
            clock[0] += 1
    assert stages.calls["loss"] == 5
    assert len(json.loads(stages.trace())["traceEvents"]) == 3
