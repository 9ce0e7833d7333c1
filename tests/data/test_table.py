"""Labels in a table: what is read, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equiloss.config import DataConfig
from equiloss.data.datasets import Splits, load
from equiloss.data.sampler import Slice
from equiloss.data.splits import SPLITS
from equiloss.errors import ConfigError, DataError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "all").mkdir()
    for number in range(20):
        pixels = np.full((4, 5, 3), (100 * (number % 2), number, 7), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "all" / f"{number:02}.png")
    return tmp_path


def written(place: Path, lines: list[str], ending: str = "\n", encoding: str = "utf-8") -> Path:
    (place / "labels.csv").write_bytes(ending.join(lines).encode(encoding))
    return place / "labels.csv"


def lines(separator: str = ",", *, names: tuple[str, str] = ("cat", "dog")) -> list[str]:
    rows = [f"all/{number:02}.png{separator}{names[number % 2]}" for number in range(20)]
    return [f"path{separator}label", *rows]


def table(file: Path, **changes) -> Splits:
    return load(DataConfig(name="table", table=str(file), **changes))


def by_number(splits: Splits) -> dict[int, tuple[str, int]]:
    """Split and target of each picture, by the number in its second channel."""
    found = {}
    for split in SPLITS:
        source = getattr(splits, split)
        batch = source.__getitems__(Slice(0, torch.arange(len(source))))
        for image, target in zip(batch.images, batch.target.tolist(), strict=True):
            found[int(image[1, 0, 0])] = (split, target)
    return found


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize(("ending", "encoding"), [("\n", "utf-8"), ("\r\n", "utf-8-sig")])
def test_tables_are_read_however_they_were_written(pictures, separator, ending, encoding):
    splits = table(written(pictures, lines(separator), ending, encoding))
    assert splits.class_names == ("cat", "dog")
    assert [len(getattr(splits, split)) for split in SPLITS] == [14, 2, 4]
    assert all(target == number % 2 for number, (_, target) in by_number(splits).items())
    quoted = [
        separator.join(f'"{word}"' for word in line.split(separator)) for line in lines(separator)
    ]
    assert by_number(table(written(pictures, quoted))) == by_number(splits)


def test_numbers_stand_in_their_order_and_columns_may_have_other_names(pictures):
    file = written(
        pictures,
        ["id,file,kind", *(f"{n},{row}" for n, row in enumerate(lines(names=("10", "9"))[1:]))],
    )
    splits = table(file, options={"path": "file", "label": "kind"})
    assert splits.class_names == ("9", "10")
    with pytest.raises(ConfigError, match=r"Unknown column of .*'kin'|column of .*'kin'.*'kind'"):
        table(file, options={"path": "file", "label": "kin"})


def test_splits_of_the_table_are_taken_and_missing_ones_drawn(pictures):
    head, *rows = lines()
    marked = [f"{row},{'Valid' if number < 4 else 'train'}" for number, row in enumerate(rows)]
    splits = table(written(pictures, [f"{head},split", *marked]))
    assert [len(getattr(splits, split)) for split in SPLITS] == [13, 4, 3]
    assert {n for n, (split, _) in by_number(splits).items() if split == "val"} == {0, 1, 2, 3}
    held = {1: "val", 2: "test", 5: "test"}
    marked = [f"{row},{held.get(number, '')}" for number, row in enumerate(rows)]
    splits = table(written(pictures, [f"{head},split", *marked]))
    found = {number: split for number, (split, _) in by_number(splits).items()}
    assert found == {number: held.get(number, "train") for number in range(20)}
    assert [len(getattr(splits, split)) for split in SPLITS] == [17, 1, 2]  # each file once
    with pytest.raises(DataError, match=r"labels\.csv, line 3: later is no split; known: train,"):
        table(written(pictures, [f"{head},split", marked[0], f"{rows[1]},later"]))


def test_paths_begin_at_the_table_or_at_root(pictures, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    file = written(elsewhere, lines())
    with pytest.raises(DataError, match=rf"20 of 20 files .* the first is {elsewhere}/all/00.png"):
        table(file)
    assert len(table(file, root=str(pictures)).train) == 14


def test_lines_that_repeat_others_are_counted_and_contradictions_refused(pictures):
    splits = table(written(pictures, [*lines(), *lines()[1:4]]))
    assert sum(len(getattr(splits, split)) for split in SPLITS) == 20
    assert splits.notes == (f"3 lines of {pictures}/labels.csv repeat others",)
    with pytest.raises(DataError, match=r"line 22: .*/00\.png is dog of train here and cat of"):
        table(written(pictures, [*lines(), "all/00.png,dog"]))


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["all/99.png,cat"], r"1 of 21 files of .* are missing; the first is .*99\.png in line 22"),
        (["all/note.txt,cat"], r"line 22: PIL finds no image in .*note\.txt"),
        (["all/00.png,"], r"line 22: all/00\.png has no label; remove the line"),
        (["all/00.png,cat,more"], "line 22: another number of columns, or no path"),
    ],
)
def test_lines_that_cannot_be_used_are_named(pictures, extra, told):
    (pictures / "all" / "note.txt").write_text("no image")
    with pytest.raises(DataError, match=told):
        table(written(pictures, [*lines(), *extra]))


def test_tables_that_are_none_are_named(pictures):
    with pytest.raises(ConfigError, match=r"data=table needs data\.table="):
        load(DataConfig(name="table"))
    with pytest.raises(DataError, match=r"cannot read data\.table=.*none\.csv: No such file"):
        table(pictures / "none.csv")
    with pytest.raises(ConfigError, match=r"column of .*'path'"):
        table(written(pictures, ["a,b", "c,d"]))
    with pytest.raises(DataError, match="has no row below its columns"):
        table(written(pictures, ["path,label"]))
    with pytest.raises(DataError, match="a single label, cat: there is nothing to tell apart"):
        table(written(pictures, lines(names=("cat", "cat"))))
    with pytest.raises(DataError, match="is no text in UTF-8"):
        table(written(pictures, lines(names=("café", "dog")), encoding="latin-1"))
    with pytest.raises(DataError, match=r"labels\.csv, line 1: unexpected end of data"):
        table(written(pictures, ['"path,label']))
    assert table(written(pictures, lines(names=("-1", "--5")))).class_names == ("--5", "-1")


def test_it_is_the_set_that_the_same_folders_are(pictures):
    for number in range(20):
        there = pictures / "folders" / ("cat", "dog")[number % 2]
        there.mkdir(parents=True, exist_ok=True)
        (there / f"{number:02}.png").write_bytes(
            (pictures / "all" / f"{number:02}.png").read_bytes()
        )
    rows = [
        f"{kind}/{n:02}.png,{kind}"
        for k, kind in enumerate(("cat", "dog"))
        for n in range(k, 20, 2)
    ]
    listed = table(written(pictures / "folders", ["path,label", *rows]))
    folders = load(DataConfig(name="image_folder", root=str(pictures / "folders")))
    assert by_number(listed) == by_number(folders)
    for split in SPLITS:
        one, other = (getattr(each, split) for each in (listed, folders))
        assert one.files == other.files
        assert torch.equal(one.targets, other.targets)
