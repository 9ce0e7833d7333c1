"""The benchmarks' own arithmetic, and that their arrangements do the same work."""

from __future__ import annotations

import sys

import pytest
import torch
from benchmarks import accuracy, baselines, fine_tuning, loss, paired, plot
from benchmarks.__main__ import main, table

from support import PYTHONPATH, composed, slow


def test_ratios_compare_within_a_round():
    # The machine was three times as slow in the second round.
    got = paired.ratio("a", 1.5, own=[2.0, 6.0, 2.0], baseline=[1.0, 3.0, 1.0])
    assert got == ("a", 2.0, 2.0, 2.0, 2.0, 1.5)
    text = table("A title", [got])
    assert "| a | 2 s | 2.00 | 2.00 to 2.00 | 1.50 |" in text


@slow
def test_each_arrangement_is_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    one = paired.Arrangement("one", "stand_ins:measured", {"seconds": 2.0})
    two = paired.Arrangement("two", "stand_ins:measured", {"seconds": 3.0}, wanted=1.4)
    measured = paired.ratios([one, two], rounds=2)
    assert [(each.name, each.ratio) for each in measured] == [
        *(("one", 1.0), ("two", 1.5)),
        (paired.CONTROL, 1.0),
    ]
    broken = paired.Arrangement("broken", "stand_ins:measured", {"seconds": "x"})
    with pytest.raises(RuntimeError, match=r"(?s)broken: .*could not convert"):
        paired.ratios([one, broken], rounds=1)


@pytest.mark.parametrize("name", loss.LOSSES)
def test_the_losses_are_the_same_number(name):
    logits = torch.randn(128, 10, generator=torch.Generator().manual_seed(0))
    target = torch.arange(128) % 10
    expected = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(loss.LOSSES[name](logits, target), expected)


def test_the_bare_loop_moves_images_by_a_pixel_at_most():
    torch.manual_seed(0)
    images = torch.zeros(200, 1, 5, 5)
    images[:, :, 2, 1] = 1
    moved = baselines.shifted_and_flipped(images)
    assert moved.sum(dim=(1, 2, 3)).tolist() == [1] * 200
    rows, columns = moved.sum(0)[0].nonzero().unbind(1)
    assert rows.unique().tolist() == [1, 2, 3]
    assert columns.unique().tolist() == [0, 1, 2, 3, 4]  # mirrored, 3 takes the place of 1


def test_a_part_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "lose"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "invalid choice: 'lose'" in capsys.readouterr().err


@pytest.mark.parametrize("name", accuracy.EXPERIMENTS)
def test_what_is_trained_to_an_accuracy_is_an_experiment(name):
    assert name in composed(f"experiment={name}").config.tags


@pytest.mark.parametrize("way", fine_tuning.arrangements(), ids=lambda way: way.name)
def test_what_is_timed_of_fine_tuning_is_a_configuration(way):
    assert composed(*fine_tuning.WORK, *way.options["overrides"]).config.model.name == "resnet18"


def test_the_picture_has_axes_for_each_table(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [paired.ratio(name, 1.5, [1.0, 2.0], [1.0, 1.0])._asdict() for name in "ab"]
    plot.draw({title: {"measured": rows} for title in "abc"}, tmp_path / "picture.png")
    (figure,) = drawn
    assert [axes.get_title("left") for axes in figure.axes] == [*"abc"]
    assert [len(axes.patches) for axes in figure.axes] == [2] * 3
