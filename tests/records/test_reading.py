"""Files that a run may find in the place of its own: each refused in one line, soon."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from equiloss.errors import RecordError, printable
from equiloss.records import trackers
from equiloss.records.atomic import write_atomically
from equiloss.records.reading import read_json, read_yaml
from equiloss.records.results import Result
from equiloss.records.run_dir import RESULTS, TRACKERS
from equiloss.records.writing import FileError
from support import composed

LAUGHS = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefg"))
JSON = {
    "": "is empty",
    '{"a": 1': "is no JSON (Expecting",
    "[" * 1_000_000: "is nested deeper than",
    '{"a":' * 100 + "1" + "}" * 100: "is nested deeper than",
    "1" + "0" * 400: "is no JSON (a number of 401 digits",
    "18446744073709551616": "has an integer beyond 64 bits",
    "[NaN]": "is no JSON (NaN)",
    '["\udcff"]': "is no text in UTF-8",
    " " * (5 << 20): "is larger than 4 MiB",
}
YAML = {
    "": "is empty",
    "- a": "holds no mapping",
    "a: [": "is no YAML (did not find",
    "\0": "is no YAML (unacceptable character",
    "a: &a [x]\n" + LAUGHS: "has an alias, an anchor or a tag in line 1",
    "a: !!python/object/apply:os.abort []": "has an alias, an anchor or a tag in line 1",
    "a: " + "[" * 100 + "]" * 100: "is nested deeper than",
    "1: 2": "has the key 1, which is no text",
    "a: " + "9" * 5000: "has a number that is none",
    "a: 1" + "0" * 400: "has an integer beyond 64 bits",
    "a: 1" + ":1" * 20_000: "has a value of more than 20000 characters",
    "a: [" + "1," * 150_000 + "]": "has more than 100000 parts",
    "#" * (2 << 20): "is larger than 1 MiB",
}


@pytest.mark.parametrize(
    ("read", "text", "words"),
    [(reader, text, words) for reader, texts in ((read_json, JSON), (read_yaml, YAML))
     for text, words in texts.items()],
    ids=[words for texts in (JSON, YAML) for words in texts.values()],
)  # fmt: skip
def test_what_is_of_no_use_is_refused_in_one_line(read, text, words, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text(text, errors="surrogateescape")
    began = time.perf_counter()
    with pytest.raises(RecordError) as caught:
        read(file)
    assert time.perf_counter() - began < 5
    message = str(caught.value)
    assert message.startswith(f"{file} {words}")
    assert message.endswith("mend or remove that file")
    assert message.isprintable()
    assert "Error" not in message


def test_neither_link_nor_pipe_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "link").symlink_to("secret")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, words in {
        "link": "is a link, which is not followed",
        "pipe": "is no regular file",  # at once, though nobody writes into it
        "folder": r"cannot be opened \(Is a directory\)",
        "nothing": "is missing",
    }.items():
        with pytest.raises(RecordError, match=f"{name} {words}: "):
            read_json(tmp_path / name)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".report.md.tmp").symlink_to("mine")
    with pytest.raises(FileError, match="symbolic links"):
        write_atomically(tmp_path / "report.md", "theirs")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_stored_configuration_reads_back_as_omegaconf_reads_it(tmp_path: Path) -> None:
    shared = [1e-5, "1e-3", "2024-01-01", "1:30", "yes", None, 1e20, 0.1 + 0.2]
    # One list in two places, and numbers in a person's hand.
    text = composed().text
    text += OmegaConf.to_yaml(OmegaConf.create({"one": shared, "other": shared}))
    text += "third: [1e-3, 1E5, 2024-01-01, 1.5e3, .inf, 0x1f]\n"
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert "&" not in text
    assert read_yaml(file) == OmegaConf.to_container(OmegaConf.load(file))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"metrics": []}, "is of another form: metrics"),
        ({"metrics": {"test/acc": True}}, "is of another form: metrics"),
        ({"world_size": 2.5}, "is of another form: world_size"),
        ({"surprise": 1}, "is of another form: surprise"),
        ({"status": "done"}, "is of another form: status"),
        ({"loss": {}}, "is of another form: loss"),
        ({"parity": {"steps": 1}}, "is of another form: parity"),
    ],
)
def test_results_of_another_form_are_refused(changed, words, tmp_path) -> None:
    Result("completed", "0", {"name": "x"}).write(tmp_path)
    tree = read_json(tmp_path / RESULTS) | changed
    (tmp_path / RESULTS).write_text(json.dumps(tree))
    with pytest.raises(RecordError, match=words):
        Result.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"mlflow": 3}'])
def test_a_damaged_note_of_trackers_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / TRACKERS).write_text(text)
    with pytest.raises(RecordError, match=rf"{TRACKERS} .*: mend or remove that file"):
        trackers._known(tmp_path)


def test_printable_text_steers_no_terminal() -> None:
    assert printable("é±→😀 [red]") == "é±→😀 [red]"
    steering = "\x1b[31m\x9b\r\n\t\b\x7f\u202e\u2028\ud800"
    assert printable(steering).isprintable()
    assert printable(steering).isascii()
