"""What TensorBoard will find in a run directory, read back from the event file."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from equiloss.data.sampler import Slice
from equiloss.data.sources import ArraySource
from equiloss.data.splits import Splits
from equiloss.records import tensorboard
from equiloss.records.plots import draw_confusion
from equiloss.records.results import metric_names, read_metrics
from equiloss.records.tensorboard import HPARAMS, RunTensorBoard, chart_layout, tag
from equiloss.records.writing import FileError
from equiloss.run import run
from equiloss.training import evaluation_figures
from equiloss.training.evaluation_figures import draw_worst
from support import Run, composed, no_room

FORMULATIONS = ["softmax_nll", "log_softmax_nll", "cross_entropy"]


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    directory = tmp_path_factory.mktemp("run")
    options = ("callbacks=quiet", "model.options.widths=[8,16]", "trainer.max_epochs=2")
    run(composed("loss=label_smoothing", *options), directory)
    (file,) = directory.glob("events.*")
    return EventAccumulator(str(file), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_every_metric_is_a_scalar(events: EventAccumulator) -> None:
    tags = set(events.Tags()["scalars"])
    assert {tag(name) for name in metric_names(FORMULATIONS)} <= tags
    assert not any(each.startswith("parity/") for each in tags)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(46))
    assert [event.step for event in events.Scalars("val/nll")] == [22, 45]


def test_scalars_are_those_of_metrics_csv_in_float32(events: EventAccumulator) -> None:
    exact = read_metrics(Path(events.path).parent, "train/loss")
    values = [event.value for event in events.Scalars("train/loss")]
    assert values == torch.tensor(exact, dtype=torch.float64).float().tolist()


def plugin_data(events: EventAccumulator, tag: str) -> bytes:
    content: bytes = events.SummaryMetadata(tag).plugin_data.content
    return content


def test_hparams_have_the_constant_keys(events: EventAccumulator) -> None:
    experiment = HParamsPluginData.FromString(
        plugin_data(events, "_hparams_/experiment")
    ).experiment
    assert {info.name for info in experiment.hparam_infos} == {*HPARAMS, "loss.options"}
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert metrics == {"val/nll", "val/acc", "test/nll", "test/acc"}
    start = HParamsPluginData.FromString(
        plugin_data(events, "_hparams_/session_start_info")
    ).session_start_info
    assert start.hparams["loss.name"].string_value == "cross_entropy"
    assert start.hparams["loss.label_smoothing"].string_value == "0.1"
    assert start.hparams["loss.options"].string_value == "z_loss=0.0"


def test_the_three_formulations_share_a_chart(events: EventAccumulator) -> None:
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = {
        chart.title: list(chart.multiline.tag)
        for category in layout.category
        for chart in category.chart
    }
    expected = [f"verification/{name}/loss_error$" for name in FORMULATIONS]
    assert charts["loss error (nats)"] == expected
    assert list(chart_layout(FORMULATIONS)) == ["verification", "training"]


def test_the_config_is_there_as_text(events: EventAccumulator) -> None:
    (tensor,) = events.Tensors("config/text_summary")
    assert b"label_smoothing: 0.1" in tensor.tensor_proto.string_val[0]


def test_figures_are_there(events: EventAccumulator) -> None:
    for name in ("test/confusion", "test/worst_images"):
        (image,) = events.Images(name)
        assert image.encoded_image_string.startswith(b"\x89PNG")
        assert image.width > 300


def test_the_confusion_matrix_shows_its_counts() -> None:
    figure = draw_confusion([[3, 1], [0, 7]], ["cat", "dog"])
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["3", "1", "7"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]


def test_the_worst_images_are_those_with_the_largest_loss() -> None:
    from equiloss.config import DataConfig
    from equiloss.data import datasets

    splits = datasets.load(DataConfig(name="digits"))
    worst = torch.tensor([[5.0, 2, 1, 7], [3.0, 0, 4, 9]], dtype=torch.float64)
    (axes,) = draw_worst(worst, splits).axes
    assert [text.get_text() for text in axes.texts] == [
        "1, taken for\n7: 5.00 nats",
        "4, taken for\n9: 3.00 nats",
    ]
    batch = splits.test.__getitems__(Slice(0, torch.tensor([2, 0])))
    for shown, text, image in zip(axes.images, axes.texts, batch.images, strict=True):
        assert torch.equal(torch.as_tensor(shown.get_array()), image[0])
        left, right, low, high = shown.get_extent()
        assert left < text.get_position()[0] < right
        assert low > high > text.get_position()[1]  # y grows downwards


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_images_of_any_channels_and_classes_of_any_name_are_drawn(channels: int) -> None:
    images = torch.arange(2 * channels * 16).reshape(2, channels, 4, 4).byte()
    source = ArraySource(images, torch.tensor([0, 1]))
    each = (1.0,) * channels
    splits = Splits(source, source, source, class_names=(r"$\frac{", "猫"), mean=each, std=each)
    worst = torch.tensor([[5.0, 0, 1, 0], [3.0, 1, 0, 1]], dtype=torch.float64)
    draw_worst(worst, splits).draw_without_rendering()
    draw_confusion([[3, 1], [0, 7]], splits.class_names).draw_without_rendering()


def test_a_picture_that_cannot_be_drawn_ends_no_run(
    run_here: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of paint\nand more")

    monkeypatch.setattr(evaluation_figures, "draw_confusion", broken)
    assert run_here("debug=fast", "logger=tensorboard").status == "completed"
    assert "no picture test/confusion: out of paint" in caplog.messages


def board(directory: Path) -> RunTensorBoard:
    config = {"loss": {"name": "cross_entropy"}}
    return RunTensorBoard(directory, config=config, config_text="", metrics=[], formulations=[])


def test_an_event_file_on_a_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the writer's thread prints no traceback of its own."""
    monkeypatch.setattr(tensorboard, "HELD_SECONDS", 0.0)
    logger, opened = board(tmp_path), ExitStack()
    opened.enter_context(logger.opened())
    words = f"^cannot write {tmp_path}/events.*: file too large"

    def fill() -> None:
        for step in count():  # the writer's thread finds out in its own time
            logger.log_metrics({f"train/{number}": 1.0 for number in range(10)}, step)

    with no_room(), pytest.raises(FileError, match=words):
        fill()
    with pytest.raises(FileError, match=words):
        opened.close()
    assert capsys.readouterr().err == ""


def test_scalars_are_handed_over_once_in_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the times at which they were logged, and the last of them at the latest at the end."""
    logger, now = board(tmp_path), [1_000_000.0]
    monkeypatch.setattr(tensorboard.time, "time", lambda: now[0])
    handed: list[int] = []

    def counted(*event: Any) -> None:
        handed.append(event[1])
        add_summary(*event)

    with logger.opened():
        writer = logger.experiment._get_file_writer()
        add_summary = writer.add_summary
        monkeypatch.setattr(writer, "add_summary", counted)
        seen = []
        for step in range(5):
            logger.log_metrics({"train/loss": step / 2}, step)
            seen.append(len(handed))
            now[0] += 0.4
        # The first at once; then those of 0.4, 0.8 and 1.2 s together.
        assert seen == [1, 1, 1, 4, 4]
        logger.save()
        assert handed == [0, 1, 2, 3, 4]
        # A clock that was set back keeps nothing waiting.
        now[0] -= 3600
        logger.log_metrics({"train/loss": 2.5}, 5)
        logger.log_metrics({"train/loss": 3.0}, 6)
        assert handed == [0, 1, 2, 3, 4, 5]
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(each.step, each.value) for each in events] == [(n, n / 2) for n in range(7)]
    assert [each.wall_time for each in events[:5]] == pytest.approx(
        [1_000_000 + 0.4 * step for step in range(5)], rel=0, abs=1e-6
    )


def test_an_event_file_that_hangs_holds_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tensorboard, "CLOSE_SECONDS", 0.1)
    answers = threading.Event()
    logger = board(tmp_path)
    with logger.opened():
        monkeypatch.setattr(RecordWriter, "write", lambda *_: answers.wait(60))
        logger.log_metrics({"train/loss": 1.0}, 0)
    assert "is not whole: writing it takes too long" in caplog.text
    answers.set()
