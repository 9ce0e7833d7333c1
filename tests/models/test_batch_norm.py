"""Batch norm on several CPU ranks is batch norm on one device, forward, backward and later on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from equiloss.distributed.process_groups import run_ranks
from equiloss.invariance.interruption import bits
from equiloss.records.results import Result
from equiloss.run import run
from rank_functions import batch_norm_passes, run_in_rank, run_until_out_of_time
from support import composed, final_weights, slow


@pytest.mark.parametrize("counts", [[4, 3], [1, 0, 6]])
def test_it_is_that_of_one_device(counts: list[int]) -> None:
    """Uneven and empty slices, gradients, two steps of running statistics, and evaluation."""
    one = run_ranks(batch_norm_passes, 1, [sum(counts)])
    several = run_ranks(batch_norm_passes, len(counts), counts)
    for expected, parts in zip(one[0], zip(*several, strict=True), strict=True):
        for name, value in expected.items():
            if name in ("output", "gradient", "evaluated"):
                found = torch.cat([part[name] for part in parts])
                torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
            elif name.startswith("parameter"):
                found = sum(part[name] for part in parts)
                torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
            else:
                for part in parts:
                    assert torch.equal(part[name], parts[0][name])  # the same on every rank
                    torch.testing.assert_close(part[name], value, rtol=1e-12, atol=1e-12)
        assert {"running_mean", "num_batches_tracked", "gradient"} <= expected.keys()


OPTIONS = (
    "callbacks=quiet",
    "logger=csv",
    "parity=off",
    "trainer.threads=1",
    "trainer.precision=64-true",
    "data.max_samples=60",
    "data.batch_size=13",
    "trainer.max_steps=7",
    "checkpoint.every_n_steps=1",
    "model=custom",
    "model.target=stand_ins:learning",
    "test_weights=last",
)


# Three add up in an order; two have none.
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=slow), 3])
def test_a_run_evaluates_what_its_checkpoint_has_and_resumes_to_the_bit(
    ranks: int, tmp_path: Path
) -> None:
    several = composed(*OPTIONS, "trainer=ddp_cpu", f"trainer.devices={ranks}")
    run_ranks(run_in_rank, ranks, several, tmp_path / "several")
    result = Result.read(tmp_path / "several")
    last = tmp_path / "several" / "checkpoints" / "last.ckpt"

    def evaluated(task: str) -> dict[str, Any]:
        words = (f"task={task}", f"ckpt_path='{last}'", "trainer=ddp_cpu")
        config = composed(*OPTIONS, *words, f"trainer.devices={ranks}")
        run_ranks(run_in_rank, ranks, config, tmp_path / task)
        return Result.read(tmp_path / task).metrics

    # On as many ranks to the bit: on others the sums are added up in another order.
    again = {**evaluated("validate"), **evaluated("test")}
    names = [name for name in again if name.startswith(("val/", "test/"))]
    assert len(names) == 12
    assert {n: again[n] for n in names} == {n: result.metrics[n] for n in names}

    run(composed(*OPTIONS), tmp_path / "one")
    one, two = final_weights(tmp_path / "one"), final_weights(tmp_path / "several")
    for name, value in one.items():
        if name != "model.mean":  # the first rank's
            torch.testing.assert_close(two[name], value, rtol=1e-11, atol=1e-12)

    devices = ("trainer=ddp_cpu", f"trainer.devices={ranks}")
    limited = composed(*OPTIONS, *devices, "trainer.max_time=00:00:00:00")
    for _ in range(2):
        run_ranks(run_until_out_of_time, ranks, limited, tmp_path / "cut")
    run_ranks(run_in_rank, ranks, several, tmp_path / "cut")
    assert [part["from_step"] for part in Result.read(tmp_path / "cut").segments] == [0, 1, 2]
    assert set(bits(tmp_path / "cut", tmp_path / "several").values()) == {0}
