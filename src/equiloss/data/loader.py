"""The loader of a split: what goes wrong in a worker is one line, as if it were here."""

from __future__ import annotations

import math
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from equiloss.data.sampler import GlobalBatchSampler, Slice
from equiloss.data.sources import Batch, Source
from equiloss.distributed import interruption
from equiloss.errors import DataError, UserError, first_line

LOOK_SECONDS = 5.0
WAY_OUT = "give workers more shared memory (docker's --shm-size), or set data.num_workers=0"


class _Failure(NamedTuple):
    """What ended a worker's reading, as text: an error itself may not reach another process."""

    message: str
    trace: str


class _WorkerTracebackError(Exception):
    """The traceback of an error in a worker: the cause of the error that is raised here."""


class _Reader(Dataset[Batch]):
    """Reads a source, in a worker or not."""

    def __init__(self, split: str, source: Source) -> None:
        self.split = split
        self.source = source

    def __getitems__(self, part: Slice) -> Batch | _Failure:
        if get_worker_info() is None:
            return self._read(part)
        try:
            batch = self._read(part)
            # torch's own sharing, in a thread, would lose the batch with its error.
            for tensor in (batch.images, batch.target, batch.index):
                if tensor.numel():
                    tensor.share_memory_()  # type: ignore[no-untyped-call]  # torch has none
        except Exception as error:  # it is raised again where it ends the run
            message = str(error)
            if not isinstance(error, UserError):
                place = f"no room for a batch of the {self.split} split"
                message = f"{place}: {first_line(error)}; {WAY_OUT}"
            return _Failure(message, traceback.format_exc())
        return batch

    def _read(self, part: Slice) -> Batch:
        try:
            return self.source.__getitems__(part)
        except UserError:
            raise
        except Exception as error:  # a source of a user's own may fail in any way
            samples = ", ".join(map(str, part.indices[:3].tolist()))
            raise DataError(
                f"cannot read the {self.split} split: {type(self.source).__name__} failed on a "
                f"batch of {len(part.indices)} samples ({samples}, …): {first_line(error)}"
            ) from error


class SplitLoader(DataLoader[Batch]):
    """Batches of one split; Lightning takes it for resumable, and the data module makes it so.

    Args:
        split: What errors call it.
        source: Where the samples come from.
        sampler: Which of them form a batch.
        workers: Processes that read.
        timeout_s: Longest time to wait for a worker's batch, in seconds (0: for ever).
        **options: Further ones of torch's loader.

    Raises:
        DataError: (when iterated) if the source fails, or a worker dies or takes too long.
    """

    def __init__(
        self,
        split: str,
        source: Source,
        sampler: GlobalBatchSampler,
        *,
        workers: int,
        timeout_s: float,
        **options: Any,
    ) -> None:
        super().__init__(
            _Reader(split, source),
            # torch's annotation knows lists of int alone; the sampler's slices go to
            # Source.__getitems__ as they are.
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=_unchanged,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_run,
            **options,
        )
        self.split = split
        self.timeout_s = timeout_s

    def __iter__(self) -> Any:
        try:
            batches = super().__iter__()
        except OSError as error:
            reason = (error.strerror or first_line(error)).lower()
            raise DataError(
                f"cannot start the workers of the {self.split} split: {reason}; {WAY_OUT}"
            ) from error
        return self._checked(batches)

    def _checked(self, batches: Iterator[Batch | _Failure]) -> Iterator[Batch]:
        late = DataError(
            f"the workers of the {self.split} split gave no batch in {self.timeout_s:g} s: "
            f"raise data.worker_timeout_s (0: wait for ever), {WAY_OUT}"
        )
        while True:
            try:
                with naming_dead_workers(), _limited(self.timeout_s * bool(self.num_workers), late):
                    batch = next(batches, None)
            except DataError as error:
                if error is late:
                    _kill_workers(batches)
                raise
            if batch is None:
                return
            if isinstance(batch, _Failure):
                raise DataError(batch.message) from _WorkerTracebackError(batch.trace)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module has the position."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing, likewise."""


@contextmanager
def _limited(seconds: float, late: DataError) -> Iterator[None]:
    """Raise an error in the context once it has lasted so long (0: never).

    torch's own limit does not reach the wait for a worker's memory. The time is counted in pieces
    by a timer: of that in which the whole job is suspended, by Ctrl-Z or a lid, one counts at most.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return
    piece = min(seconds, LOOK_SECONDS)
    pieces = iter(range(math.ceil(seconds / piece) - 1))

    def count(*_: object) -> None:
        if next(pieces, None) is None:
            raise late

    before = signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, piece, piece)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Say in one line that a worker died: torch's signal handler raises wherever a run is.

    Raises:
        DataError: with torch's reason and the ways out.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, DataError):
            raise error.__context__ from None  # Lightning fails over it again
        said = [str(e) for e in (error.__cause__, error) if "DataLoader worker (pid" in str(e)]
        if not said:
            raise
        reason = said[0].strip().partition(". ")[0].rstrip(".")
        raise DataError(f"{reason}: memory or /dev/shm may be full; {WAY_OUT}") from error


def _kill_workers(batches: Any) -> None:
    """End workers that hang: this process would wait for them in its own end."""
    # torch would take their end for news.
    signal_handling._remove_worker_pids(id(batches))  # type: ignore[attr-defined]
    batches._worker_pids_set = False
    for worker in batches._workers:
        worker.kill()


def _leave_signals_to_the_run(_worker: int) -> None:
    """Let a worker outlive a signal to its whole group: the step under way wants its batch.

    Only its parent may end it by SIGTERM, as torch does with one that hangs.
    """
    ends = interruption.SIGNALS
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)

    def watch() -> None:
        while True:
            sent = signal.sigwaitinfo(ends)
            if sent.si_signo == signal.SIGTERM and sent.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _unchanged(batch: Any) -> Any:
    return batch
