"""One rank, as `equiloss.launching.ranks` starts it: a plain module on a run's `config.yaml`."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

from equiloss.distributed import interruption
from equiloss.distributed.interruption import Interrupted
from equiloss.errors import UserError
from equiloss.imports import import_target, import_torchmetrics
from equiloss.launching import streams
from equiloss.launching.composition_errors import explain
from equiloss.launching.pulse import end_with, start_pulse
from equiloss.records.atomic import write_atomically
from equiloss.records.run_dir import CONFIG, TRAIN_LOG, rank_error
from equiloss.records.writing import FileError


def _take_threads(number: int) -> None:
    """Use so many CPU threads, whatever another variable of the environment asks for."""
    import torch

    torch.set_num_threads(number)
    if torch.get_num_threads() != number:
        raise UserError(f"torch uses {torch.get_num_threads()} CPU threads in place of {number}")


def _main(run_dir: Path, run: str) -> int:
    """Run one rank; returns the exit code."""
    number = int(os.environ["LOCAL_RANK"])
    interruption.leave_to_the_system()
    start_pulse()
    streams.make_optional()
    # Not sys.stdin: its lock, held while it waits, would be copied into forked loader workers,
    # which close their stdin and would wait for it for ever.
    end_with(sys.stdin.fileno())
    try:
        import logging

        from omegaconf import DictConfig, OmegaConf

        from equiloss.config.resolved import resolve

        logging.basicConfig(
            level=logging.INFO if number == 0 else logging.WARNING,
            format="[%(levelname)s] %(name)s: %(message)s",
            handlers=[
                logging.StreamHandler(),
                *([logging.FileHandler(run_dir / TRAIN_LOG, encoding="utf-8")] * (number == 0)),
            ],
        )
        _take_threads(int(os.environ["OMP_NUM_THREADS"]))
        stored = OmegaConf.load(run_dir / CONFIG)
        assert isinstance(stored, DictConfig)
        import_torchmetrics()
        import_target(run, "run", UserError)(resolve(stored), run_dir)
    except Interrupted as interrupted:
        return interrupted.code
    except SystemExit as stopped:
        _leave_word(
            number, run_dir, UserError(f"code of the run ended it by sys.exit({stopped.code})")
        )
        return 1
    except Exception as error:  # the supervisor reports it, whatever it is
        _leave_word(number, run_dir, error)
        return 1
    return 0


def _leave_word(number: int, run_dir: Path, error: Exception) -> None:
    """Tell the supervisor what ended this rank."""
    own_words = isinstance(error, UserError)
    word = {
        "time": time.time(),
        "message": explain(error),
        # A user's mistake is the same mistake on every rank.
        "everywhere": own_words,
        "trace": traceback.format_exc(),
    }
    try:
        write_atomically(rank_error(run_dir, number), json.dumps(word))
    except FileError:  # so it is said here, in the rank's own output
        print(f"error: {word['message']}", file=sys.stderr)


if __name__ == "__main__":
    code = _main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a process group whose other ranks are gone may wait for them while it closes.
    os._exit(code)
