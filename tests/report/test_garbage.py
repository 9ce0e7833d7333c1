"""Directories of strangers: whatever a file holds, the other runs are reported."""

from __future__ import annotations

import io
import json
import random
import re
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from equiloss.cli.main import app
from equiloss.errors import UserError
from equiloss.launching import sweep_table
from equiloss.records.ledger import ATTEMPT, Ledger
from equiloss.records.plots import draw_confusion, label
from equiloss.records.run_dir import CONFIG, EVALUATION, LEDGER, METRICS, MULTIRUN, RESULTS
from equiloss.report.compare import compare
from equiloss.report.figures import PICTURES, draw_all
from equiloss.report.page import data, page, write_report
from equiloss.report.runs import ReportError, find_runs
from left_behind import edit, write_evaluation, write_multirun, write_run

WILD = (
    *(b"NaN", b"1e400", b"1" + b"0" * 400, b"1e308", b"-1e308", b"null", b"true", b"-1", b"0"),
    *(b"[]", b"{}", b'""', b"[[[[", b'"\\ud800"', b'"$\\\\x{$"', b'"[red]|<b>`\\n"', b'["x", 2]'),
    *(b"&a ", b"*a", b"!!int ", b"\xff", b"\0", b"\x1b[31m", b",", b"\n", b'"', b":", b"1:1"),
)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of two runs, one at work."""
    monkeypatch.setenv(ATTEMPT, "now")
    for name, loss in (("good", "cross_entropy"), ("odd", "softmax_nll")):
        write_evaluation(write_run(tmp_path / "sweep" / name, loss, steps=3))
    write_multirun(tmp_path / "sweep", "loss=cross_entropy,softmax_nll", seed="0,1")
    ledger = Ledger(tmp_path / "sweep")
    ledger.begin("now", jobs=3, objective="val/nll", direction="minimize")
    ledger.add(0, "good", "completed", objective=0.5, seconds=3.0)
    ledger.add(1, "odd", "failed", error="no memory", seconds=2.0)
    return tmp_path / "sweep"


def mutated(content: bytes, drawn: random.Random) -> bytes:
    """Content with one to four changes: a place cut, doubled, or with something wild in it."""
    for _ in range(drawn.choice((1, 1, 2, 4))):
        begin = drawn.randrange(len(content) + 1)
        end = min(begin + drawn.randrange(12), len(content))
        middle = drawn.choice((b"", content[begin:end] * 2, drawn.choice(WILD), drawn.choice(WILD)))
        content = content[:begin] + middle + (b"" if drawn.random() < 0.1 else content[end:])
    return content


def value_replaced(content: bytes, drawn: random.Random) -> bytes:
    """Content with one of its values replaced."""
    pieces = content.replace(b"\r", b"").split(b"\n")
    place = drawn.randrange(len(pieces))
    key, colon, _ = pieces[place].rpartition(b": ")
    pieces[place] = key + colon + drawn.choice(WILD)
    return b"\n".join(pieces)


def make_report(sweep: Path) -> None:
    """All that the command makes of the directory, but for the pictures."""
    run_set = find_runs([sweep])
    assert "good" in [run.name for run in run_set.runs]
    assert all(why.isprintable() and "Error" not in why for why in run_set.skipped.values())
    comparison = compare(run_set)
    assert page(comparison, PICTURES).encode().replace(b"\n", b"").decode().isprintable()
    json.dumps(data(comparison), allow_nan=False)


def show_sweep(sweep: Path) -> None:
    """The table, or the one line that says why there is none."""
    with suppress(UserError):
        jobs, line = sweep_table.table(sweep)
        Console(file=io.StringIO()).print(jobs)
        assert line.isprintable()


def test_two_hundred_damaged_files_end_neither_report_nor_table(sweep: Path) -> None:
    drawn = random.Random(0)
    of_report = [*(f"odd/{name}" for name in (CONFIG, RESULTS, METRICS, EVALUATION)), MULTIRUN]
    for number in range(200):
        name = [*of_report, LEDGER][number % 6]
        content = (sweep / name).read_bytes()
        damage = drawn.choice((mutated, value_replaced))
        (sweep / name).write_bytes(damage(content, drawn))
        show_sweep(sweep) if name == LEDGER else make_report(sweep)
        (sweep / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (CONFIG, "parity: {formulations: 3}\nloss: {name: x}", "has parity.formulations that"),
        (CONFIG, "seed: 1", "names no loss"),
        (METRICS, "\0garbage\n", "has no row of numbers in line"),
        (METRICS, "step,a\n-1,0.5\n", "has no row of numbers in line 2"),
        (EVALUATION, '{"class_names": []}x', "is no JSON"),
        (EVALUATION, '{"class_names": ["a"], "test": 1}', "has no counts of test"),
        (RESULTS, "[]", "holds no mapping"),
    ],
)
def test_what_is_wrong_and_what_is_lost_is_said(name, text, words, sweep) -> None:
    (sweep / "odd" / name).write_text(text)
    run_set = find_runs([sweep])
    (why,) = run_set.skipped.values()
    assert words in why
    assert "until that file is mended or removed" in why
    assert [run.name for run in run_set.runs] == ["good", "odd"][
        : 1 + (name in (METRICS, EVALUATION))
    ]


@pytest.mark.parametrize("name", [CONFIG, RESULTS, METRICS, EVALUATION])
def test_no_link_out_of_a_run_is_followed(name: str, sweep: Path, tmp_path: Path) -> None:
    (sweep / "odd" / name).rename(tmp_path / "elsewhere")
    (sweep / "odd" / name).symlink_to(tmp_path / "elsewhere")
    write_run(tmp_path / "other")
    (sweep / "linked").symlink_to(tmp_path / "other")
    run_set = find_runs([sweep])
    assert "is a link, which is not followed" in next(iter(run_set.skipped.values()))
    assert "linked" not in [run.name for run in run_set.runs]


def test_no_report_is_written_through_a_link(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (sweep / "report").symlink_to(tmp_path / "mine")
    with pytest.raises(ReportError, match="is a link, not followed: give --output"):
        write_report([sweep])
    assert list((tmp_path / "mine").iterdir()) == []


HOSTILE = "[red]a|b`c<img src=x>![d](http://e)\x1b[31m\n# f"


def test_names_are_no_markup_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a`|<b>", status="failed", error=HOSTILE, task={HOSTILE: 1})
    edit(run, loss={"name": HOSTILE})
    write_run(tmp_path / "other")
    text = page(compare(find_runs([tmp_path])))
    assert "\\[red\\]a\\|b\\`c\\<img src=x\\>!\\[d\\](http://e)\\\\x1b\\[31m # f" in text
    active = re.sub(r"\\.|`[^`\n]*`", "", text)
    assert set("<>[]`\x1b").isdisjoint(active)
    assert len({line.count("|") for line in active.splitlines() if line.startswith("|")}) == 1


def test_names_are_no_markup_in_the_terminal(sweep: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    Ledger(sweep).add(2, HOSTILE, HOSTILE, objective=0.1)
    edit(sweep / "odd", loss={"name": HOSTILE})
    (sweep / "odd" / "x\x1b[31m").mkdir()
    (sweep / "odd" / "x\x1b[31m" / RESULTS).write_text("")
    monkeypatch.setattr("equiloss.report.page.draw_all", lambda *_: [])
    for command in ("sweep", "report"):
        result = CliRunner().invoke(app, [command, str(sweep)])
        assert result.exit_code == 0, result.output
        assert "[red]a|b`c<img" in result.output
        assert "\x1b" not in result.output


def test_a_name_is_no_formula_in_a_picture() -> None:
    draw_confusion([[1]], ["$\\bad{$"]).draw_without_rendering()
    assert len(label("x" * 100_000, 110).splitlines()) == 2


def test_a_picture_that_cannot_be_drawn_is_noted(sweep: Path, monkeypatch) -> None:
    comparison = compare(find_runs([sweep]))

    def too_far(*_: object, **__: object) -> None:
        raise OverflowError

    monkeypatch.setattr("equiloss.report.panels.in_rows", too_far)
    assert draw_all(comparison, sweep) == []
    assert comparison.run_set.skipped["curves.png"].startswith("is not drawn")
    assert "curves.png" in page(comparison)
