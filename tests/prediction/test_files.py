"""`equiloss predict` and `equiloss show`: files in, classes out, and what is left out is named."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from equiloss.cli.main import app
from equiloss.prediction import files
from equiloss.prediction.model import load
from equiloss.records.reading import parse_json
from equiloss.run import run
from equiloss.training.checkpoint_file import AtomicCheckpointIO
from support import composed, slow, wrong_with


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes, and a run that tells them apart."""
    place = tmp_path_factory.mktemp("predicted")
    generator = np.random.default_rng(0)
    for name, bright in (("dark", 40), ("light", 200)):
        (place / "pictures" / name).mkdir(parents=True)
        for number in range(30):
            size = generator.integers(9, 20, 2)
            pixels = np.clip(generator.normal(bright, 20, (*size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / "pictures" / name / f"{number:02}.png")
    words = (f"data.root={place}/pictures", "data.image_size=8", "data.num_workers=0")
    config = composed(
        *("callbacks=quiet", "logger=csv", "parity=off", "model=mlp", "data=image_folder", *words),
        *("data.batch_size=12", "trainer.max_epochs=8"),
    )
    run(config, place / "run")
    (place / "run" / "config.yaml").write_text(config.text)
    (place / "new").mkdir()
    for number, bright in enumerate((30, 210, 45)):
        pixels = np.full((11, 14), bright, dtype=np.uint16) * 257  # 16 bits of grey
        Image.fromarray(pixels).save(place / "new" / f"{number}.png")
    return place


def called(*words: object, lines: str = "") -> tuple[int, str, str]:
    """Exit code, output and errors of `equiloss …`."""
    done = CliRunner().invoke(app, [*map(str, words)], input=lines, env={"COLUMNS": "120"})
    return done.exit_code, done.stdout, done.stderr


def test_a_table_of_a_folder(place: Path) -> None:
    code, output, errors = called("predict", place / "run", place / "new", "--top", 2)
    assert (code, errors) == (0, "")
    rows = [line.split() for line in output.splitlines() if "/new/" in line]
    assert [row[1] for row in rows] == ["dark", "light", "dark"]
    assert all(float(row[2]) + float(row[4]) == pytest.approx(1, abs=2e-4) for row in rows)


def test_files_of_predictions(place: Path, tmp_path: Path) -> None:
    where = tmp_path / "found.csv"
    code, output, _ = called("predict", place / "run", place / "new", "--output", where)
    assert (code, output) == (0, f"3 predictions in {where}\n")
    with where.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["dark", "light", "dark"]
    assert all(0.5 < float(row["probability"]) <= 1 for row in rows)
    lines = "".join(f"{row['path']}\n" for row in reversed(rows))
    where = tmp_path / "found.json"
    words = ("--output", where, "--batch-size", 2)
    assert called("predict", place / "run", "-", *words, lines=lines)[0] == 0
    again = json.loads(where.read_text())
    assert [entry["path"] for entry in again] == [row["path"] for row in reversed(rows)]
    for entry, row in zip(again, reversed(rows), strict=True):
        assert entry["classes"][0]["name"] == row["class"]
        assert entry["classes"][0]["probability"] == pytest.approx(float(row["probability"]))


def test_what_is_broken_is_named_and_left_out(place: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "whole.png").write_bytes((place / "new" / "0.png").read_bytes())
    (tmp_path / "deep" / "cut.png").write_bytes((place / "new" / "0.png").read_bytes()[:40])
    (tmp_path / "deep" / "text.png").write_text("no image")
    (tmp_path / "deep" / "notes.txt").write_text("no image either")
    code, output, errors = called("predict", place / "run", tmp_path)
    assert code == 1
    assert [line.split()[1] for line in output.splitlines() if "/deep/" in line] == ["dark"]
    said = errors.splitlines()
    assert said[0] == "1 files are no images, and are passed over"
    assert all(
        line.split()[4].endswith(name)
        for line, name in zip(said[1:], ("cut.png:", "text.png:"), strict=True)
    )
    assert all(line.startswith("error: cannot read image ") for line in said[1:])


def test_a_huge_header_is_one_line(place: Path, tmp_path: Path) -> None:
    picture = tmp_path / "huge.png"
    whole = bytearray((place / "new" / "0.png").read_bytes())
    whole[16:24] = (40_000).to_bytes(4, "big") * 2  # width and height
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    picture.write_bytes(whole)
    code, output, errors = called("predict", place / "run", picture)
    assert code == 1
    assert not output  # no table without a row
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"error: cannot read image {picture}: ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["no/such/run", "x.png"], "no checkpoint at no/such/run"),
        (["{run}", "{new}", "--device", "abacus"], "device=abacus cannot be had: "),
        (["{new}", "{new}", "--output", "no/such/x.csv"], "there is no directory no/such"),
        (["{new}", "{new}", "--output", "{folder}"], "x.csv is a directory: name a file"),
        (["{run}", "a" * 300], f"cannot use {'a' * 300}: file name too long: name another"),
        (["{run}", "no/such.png"], "no file or folder at no/such.png"),
        (["{run}", "{empty}"], "{empty}: no image to predict"),
        # Before the run is looked for.
        (["{new}", "{new}", "--output", "x.txt"], "--output=x.txt must end in .csv or .json"),
    ],
)
def test_wrong_words_are_one_line(place: Path, tmp_path: Path, words: list[str], line: str) -> None:
    (folder := tmp_path / "x.csv").mkdir()
    paths = {"run": place / "run", "new": place / "new", "empty": tmp_path, "folder": folder}
    code, output, errors = called("predict", *(word.format(**paths) for word in words))
    assert (code, output) == (1, "")
    (said,) = errors.splitlines()
    assert said.startswith("error: ")
    assert line.format(**paths) in said
    assert wrong_with(said) is None


def test_a_name_that_no_checkpoint_can_have_is_one_line() -> None:
    code, output, errors = called("show", "a" * 300)
    assert (code, output) == (1, "")
    assert errors == f"error: cannot use {'a' * 300}: file name too long: name another\n"


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_a_name_that_is_no_text_is_written_out(place: Path, tmp_path: Path, ending: str) -> None:
    picture = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xc3\xa9.png"))
    picture.write_bytes((place / "new" / "0.png").read_bytes())
    where = tmp_path / f"found.{ending}"
    assert called("predict", place / "run", picture, "--output", where)[0] == 0
    text = where.read_text(encoding="utf-8")
    rows = json.loads(text) if ending == "json" else [*csv.DictReader(io.StringIO(text))]
    assert [row["path"] for row in rows] == [f"{tmp_path}/\\xffé.png"]


def test_a_probability_that_is_not_finite_is_null() -> None:
    row = files.Row(Path("x.png"), [("dark", float("nan"))])
    (entry,) = parse_json(files.written([row], Path("x.json")))
    assert entry["classes"] == [{"name": "dark", "probability": None}]


def test_a_batch_is_as_large_as_was_asked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = load(place / "run")
    sizes: list[int] = []
    network.network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    pictures = [place / "new" / "0.png"] * 301
    assert len([*files.predict(network, pictures, batch_size=300)]) == 301
    assert sizes == [300, 1]


def test_pictures_of_another_size_are_resized_for_those_who_ask(
    tmp_path: Path, place: Path
) -> None:
    config = composed("callbacks=quiet", "logger=csv", "parity=off", "model=mlp", "debug=fast")
    run(config, tmp_path / "digits")
    checkpoint = tmp_path / "digits" / "checkpoints" / "best.ckpt"
    code, _, errors = called("predict", checkpoint, place / "new" / "0.png")
    assert code == 1
    assert "has 11x14 pixels, and the network was trained on 8x8: resize it (--resize" in errors
    assert called("predict", checkpoint, place / "new" / "0.png", "--resize")[0] == 0


def test_a_checkpoint_says_what_it_is(place: Path) -> None:
    code, output, _ = called("show", place / "run", "--json")
    assert code == 0
    said = json.loads(output)
    assert said["model"] == {"name": "mlp", "target": None, "options": {"widths": [128, 128]}}
    assert said["class_names"] == ["dark", "light"]
    assert (said["image_shape"], said["image_size"]) == ([3, 8, 8], 8)
    assert said["loss"]["name"] == "cross_entropy"
    assert said["metrics"]["val/acc"] > 0.9
    assert set(said["versions"]) == {"equiloss", "torch", "torchvision"}
    code, output, _ = called("show", place / "run" / "checkpoints" / "last.ckpt")
    assert code == 0
    assert "class_names    dark, light" in output


def test_a_metric_that_is_not_finite_is_null(place: Path, tmp_path: Path) -> None:
    checkpoint = AtomicCheckpointIO().load_checkpoint(place / "run" / "checkpoints" / "best.ckpt")
    checkpoint["equiloss"]["scalars"]["val/nll"] = float("inf")
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "odd.ckpt")
    code, output, _ = called("show", tmp_path / "odd.ckpt", "--json")
    assert code == 0
    assert parse_json(output)["metrics"]["val/nll"] is None  # which refuses Infinity


@slow
def test_the_commands_themselves(place: Path, tmp_path: Path) -> None:
    def called(*words: object) -> str:
        done = subprocess.run(
            [Path(sys.executable).parent / "equiloss", *map(str, words)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert called("predict", place / "run", place / "new").count("dark") == 2
    assert "class_names    dark, light" in called("show", place / "run")
    assert called("export", place / "run").startswith("model.onnx: certified: 12 test images")
