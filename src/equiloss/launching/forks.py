"""Jobs of a sweep at the same time: forks of a process that has imported everything once.

Hydra finds launchers in packages called hydra_plugins alone, and its own is what a sweep has that
asks for no other: so ours takes its place, and does what it does unless several jobs are asked for.
Each fork has a session of its own, so that a signal reaches it once, from here.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from equiloss.config import DataConfig
from equiloss.config.sweep import SweepConfig
from equiloss.distributed import interruption, membership
from equiloss.distributed.interruption import Interrupted
from equiloss.errors import printable
from equiloss.launching import slots
from equiloss.launching.composition_errors import explain
from equiloss.launching.pulse import end_with
from equiloss.launching.sweep import direction, worst
from equiloss.records.ledger import ATTEMPT, Ledger

Job = tuple[int, Sequence[str]]
"""Number and overrides."""
BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


def install() -> None:
    """Have Hydra's own launcher heed `sweep.parallel`."""
    Plugins.instance().class_name_to_class[BASIC] = ForkLauncher


class ForkLauncher(BasicLauncher):
    """Hydra's own launcher, which launches one job after the other, in forks side by side."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Launch the jobs of a batch, and return what each gave, in their order.

        Raises:
            ConfigError: for a number of jobs that is none.
            Interrupted: after a signal, when all jobs have ended.
        """
        assert self.config is not None
        SweepConfig(self.config.sweep.parallel)
        at_once = slots.at_once(self.config)
        # A rank of torchrun's has ranks beside it, and no jobs. A batch of one is forked too: a
        # run in this process would leave threads behind that later forks lack.
        if at_once == 1 or membership.external() is not None:
            return super().launch(job_overrides, initial_job_idx)
        _import_for_all()
        _fetch(self.config)
        forks = _Forks(self.config, at_once, super().launch)
        try:
            return forks.done([*enumerate(job_overrides, start=initial_job_idx)])
        except BaseException as error:
            number = error.number if isinstance(error, Interrupted) else None
            forks.end(number or signal.SIGTERM)
            raise
        finally:
            forks.close()


def _import_for_all() -> None:
    """Import what each fork would, without a thread: a lock that one holds would stay held."""
    from equiloss.imports import import_torchmetrics

    import_torchmetrics()
    import equiloss.run  # noqa: F401


def _fetch(config: DictConfig) -> None:
    """Download once what the jobs would fetch into the same place, in a fork that ends."""
    from equiloss.data import datasets

    def load() -> None:
        with suppress(Exception):  # whatever is wrong, the jobs will say
            typed = OmegaConf.merge(OmegaConf.structured(DataConfig), config.data)
            datasets.load(cast(DataConfig, OmegaConf.to_object(typed)))

    if config.data.download:
        fork = multiprocessing.get_context("fork").Process(target=load)
        fork.start()
        fork.join()


class _Forks:
    """The jobs of one batch, some of them at work."""

    def __init__(self, config: DictConfig, at_once: int, launch: Callable[..., Any]) -> None:
        self.config, self.at_once, self.launch = config, at_once, launch
        self.running: dict[Connection, tuple[Job, BaseProcess]] = {}
        # Closed for the forks when this process ends, however it does.
        self.lives, self.holds = os.pipe()

    def done(self, jobs: Sequence[Job]) -> list[JobReturn]:
        """What the jobs give, so many of them at once."""
        waiting, returned = deque(jobs), dict[int, JobReturn]()
        while waiting or self.running:
            while waiting and len(self.running) < self.at_once:
                self._start(waiting.popleft())
            for answers in wait([*self.running]):
                assert isinstance(answers, Connection)
                try:
                    answer = answers.recv()
                except EOFError:
                    answer = None
                job, process = self.running.pop(answers)
                answers.close()
                process.join()
                known = isinstance(answer, JobReturn)
                returned[job[0]] = answer if known else self._lost(job, process, answer)
        return [returned[number] for number, _ in jobs]

    def _start(self, job: Job) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        answers, mine = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=self._fork, args=(job, mine))
        # A signal waits until the fork is known, and in the fork until it can be understood.
        signal.pthread_sigmask(signal.SIG_BLOCK, interruption.SIGNALS)
        try:
            process.start()
            self.running[answers] = job, process
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, interruption.SIGNALS)
            mine.close()

    def _fork(self, job: Job, answers: Connection) -> None:
        """One job, in a process of its own."""
        os.setsid()
        os.close(self.holds)
        end_with(self.lives)
        number, overrides = job
        os.environ[slots.AT_ONCE] = str(self.at_once)
        streams = _Numbered(number, sys.stdout), _Numbered(number, sys.stderr)
        sys.stdout, sys.stderr = streams
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, interruption.SIGNALS)
            (returned,) = self.launch([overrides], number)
            # Its configurations are of classes that no other process knows, and no sweeper
            # reads them.
            answers.send(replace(returned, cfg=None, hydra_cfg=None))
        except Interrupted as interrupted:
            sys.exit(interrupted.code)
        except Exception as error:  # of Hydra's, before or after the job's own part
            answers.send(explain(error))
        finally:
            for stream in streams:
                stream.end()

    def _lost(self, job: Job, process: BaseProcess, error: str | None) -> JobReturn:
        """What a job gives whose process ended without a result: the worst, as others that fail."""
        number, overrides = job
        code = process.exitcode or 0
        if interrupted := interruption.of_code(code):
            raise interrupted  # somebody asked that one job alone
        how = interruption.name_of(-code) if code < 0 else f"code {code}"
        error = error or f"its process ended with {how}"
        ledger = Ledger(Path(self.config.hydra.sweep.dir).absolute())
        entry = ledger.newest(os.environ.get(ATTEMPT, "")).get(number)
        objective = worst(direction(self.config.hydra.sweeper, self.config))
        if entry is None or entry.status == "running":
            directory = entry.directory if entry else "no directory"
            print(printable(f"error: job {number}: {error}"), file=sys.stderr, flush=True)
            ledger.add(number, directory, "failed", error=error, overrides=[*overrides])
        elif entry.objective is not None:
            objective = entry.objective
        return JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=objective)

    def end(self, number: int) -> None:
        """Pass a signal on, and wait for all jobs: each stops after its step."""
        for _, process in self.running.values():
            assert process.pid is not None
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)
        for _, process in self.running.values():
            process.join()

    def close(self) -> None:
        """Let go of what was open for the forks."""
        for descriptor in (self.lives, self.holds):
            os.close(descriptor)


class _Numbered(io.TextIOBase):
    """Whole lines with the number of their job before them: several jobs print at once."""

    def __init__(self, number: int, stream: Any) -> None:
        self.stream, self.mark, self.begun = stream, f"#{number} ", ""
        self.lock = threading.Lock()

    def isatty(self) -> bool:
        """No: a bar of one job would overwrite another's."""
        return False

    def fileno(self) -> int:
        """That of the stream below."""
        descriptor: int = self.stream.fileno()
        return descriptor

    def write(self, text: str) -> int:
        """Write the lines that are complete; what follows waits for its end."""
        with self.lock:
            *lines, self.begun = (self.begun + text).split("\n")
            if lines:
                self.stream.write("".join(f"{self.mark}{line}\n" for line in lines))
                self.stream.flush()
        return len(text)

    def end(self) -> None:
        """Write what has no end of line."""
        if self.begun:
            self.write("\n")
