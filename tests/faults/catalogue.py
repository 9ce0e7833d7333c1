"""The faults that are injected, each with what is promised for it."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from processes import children
from support import PYTHONPATH

Process = subprocess.Popen[str]
INTERRUPTED = (
    r"interrupted by {} after \d+ steps: the same command with hydra\.run\.dir=\S+ goes on"
)
ONE_LINE = "stops after the step under way, its state saved; resumes to the bit"


@dataclass(frozen=True)
class Fault:
    """One fault, how it is injected, and what is promised."""

    name: str
    promise: str
    code: int
    """Exit code of train.py."""
    says: str = ""
    """A pattern that its output has."""
    ranks: int = 1
    kind: str = "digits"
    """digits | folder: the data of the run."""
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    prepare: Callable[[], None] = lambda: None
    """Called in the process before it becomes train.py."""
    redirected: str = ""
    """A shell's redirection of its output."""
    does: Callable[[Process], None] | None = None
    """Done to the process."""
    when_it_trains: bool = True
    damages: Callable[[Path], None] | None = None
    """Done to the directory of a stopped run, which is then continued."""
    seconds: float = 60.0
    """Longest time from the fault to the end."""
    status: str | None = None
    resumes: bool = True
    """Whether the run, continued where it has not completed, ends with the bits of a whole one."""
    loses_rows: bool = False
    """Whether metrics.csv is what was damaged."""

    def run(self, place: Path) -> tuple[str, ...]:
        """What the run is told."""
        data = (
            ("data=image_folder", f"data.root={place}/images", "data.num_workers=0")
            if self.kind == "folder"
            else ()
        )
        return (*data, f"trainer.devices={self.ranks}")

    def variables(self, place: Path) -> dict[str, str]:
        """Variables of its environment."""
        own = dict(self.environment)
        if "NO_LOCKS" in own:
            (place / "sitecustomize.py").write_text(NO_LOCKS)
            own["PYTHONPATH"] = f"{place}{os.pathsep}{PYTHONPATH}"
        return own


NO_LOCKS = """
import errno, fcntl, os
def lockf(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.lockf = lockf
"""


def sends(*numbers: signal.Signals, pause: float = 0.3) -> Callable[[Process], None]:
    """Signals to train.py."""

    def do(process: Process) -> None:
        for position, number in enumerate(numbers):
            if position:
                time.sleep(pause)
            process.send_signal(number)

    return do


def sends_to_group(number: signal.Signals) -> Callable[[Process], None]:
    return lambda process: os.killpg(process.pid, number)


def sends_to_child(which: int, *numbers: signal.Signals) -> Callable[[Process], None]:
    """Signals to a rank, or to a loader worker of a run of one process."""

    def do(process: Process) -> None:
        for position, number in enumerate(numbers):
            if position:
                time.sleep(3)
            os.kill(children(process.pid)[which], number)

    return do


def waits_then(number: signal.Signals, seconds: float) -> Callable[[Process], None]:
    def do(process: Process) -> None:
        time.sleep(seconds)
        process.send_signal(number)

    return do


def reader_leaves(process: Process) -> None:
    """As `| head -c1` does."""
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None


def at(*parts: str) -> Callable[[Path], Path]:
    return lambda directory: directory.joinpath(*parts)


LAST = at("checkpoints", "last.ckpt")
BEST = at("checkpoints", "best.ckpt")
INDEX = at("checkpoints", "index.json")


def flips(*files: Callable[[Path], Path]) -> Callable[[Path], None]:
    def do(directory: Path) -> None:
        for file in files:
            content = bytearray(file(directory).read_bytes())
            content[len(content) // 2] ^= 16
            file(directory).write_bytes(content)

    return do


def cuts(file: Callable[[Path], Path]) -> Callable[[Path], None]:
    return lambda directory: os.truncate(file(directory), file(directory).stat().st_size // 2)


def holds(file: Callable[[Path], Path], content: bytes) -> Callable[[Path], None]:
    def do(directory: Path) -> None:
        file(directory).write_bytes(content)

    return do


def replaces_an_image(directory: Path) -> None:
    """Puts another picture of the same size in its place; what is none is found by its header."""
    images = directory.parent / "images"
    other = (images / "cats" / "00.png").read_bytes()
    (images / "dogs" / "01.png").write_bytes(other + b"another")


def removes(*files: Callable[[Path], Path]) -> Callable[[Path], None]:
    def do(directory: Path) -> None:
        for file in files:
            file(directory).unlink()

    return do


def both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    def do(directory: Path) -> None:
        for damage in damages:
            damage(directory)

    return do


def moves(before: str, after: str) -> Callable[[Path], None]:
    """Renames something of the images beside the run."""

    def do(directory: Path) -> None:
        images = directory.parent / "images"
        (images / before).rename(images / after)

    return do


def limits_files() -> None:
    """No file may grow beyond 30 kB: what a full disk is to one that is larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))


def ignores_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class Canary:
    """A pickle that would leave a file where it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/equiloss-canary",)


BOMB = b"a: &a [x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + n, 98 + n, b", ".join([b"*%c" % (97 + n)] * 9)) for n in range(20)
)
SRUN = (
    ("SLURM_STEP_NUM_TASKS", "4"),
    ("SLURM_PROCID", "0"),
    ("SLURM_LOCALID", "0"),
    ("SLURM_JOB_ID", str(os.getpid())),
)

SIGNALS = [
    Fault(
        f"{number.name} to train.py",
        ONE_LINE,
        128 + number,
        INTERRUPTED.format(number.name),
        ranks,
        does=sends(number),
        seconds=15,
        status="interrupted",
    )
    for ranks in (1, 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
] + [
    Fault(
        f"{number.name} to rank {rank} of two",
        f"both ranks stop after the same step; {ONE_LINE}",
        128 + number,
        INTERRUPTED.format(number.name),
        2,
        does=sends_to_child(rank, number),
        seconds=15,
        status="interrupted",
    )
    for rank, number in ((0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGUSR1))
]
FAULTS = [
    *SIGNALS,
    Fault(
        "Ctrl-C to the whole group, loader workers included",
        ONE_LINE,
        130,
        INTERRUPTED.format("SIGINT"),
        arguments=("data.num_workers=2",),
        does=sends_to_group(signal.SIGINT),
        seconds=15,
        status="interrupted",
    ),
    *(
        Fault(
            "a second and a third signal",
            "ends at once, with the first one's code and no noise; goes on from the state before",
            143,
            ranks=ranks,
            does=sends(signal.SIGTERM, signal.SIGINT, signal.SIGINT, pause=0.02),
            seconds=5,
        )
        for ranks in (1, 2)
    ),
    Fault(
        "SIGHUP under nohup",
        "is ignored",
        0,
        prepare=ignores_hangups,
        does=sends(signal.SIGHUP),
        status="completed",
    ),
    *(
        Fault(
            "SIGKILL of train.py",
            "goes on from the newest state; no rank outlives it",
            -9,
            ranks=ranks,
            does=sends(signal.SIGKILL),
            seconds=10,
        )
        for ranks in (1, 2)
    ),
    *(
        Fault(
            f"SIGKILL of rank {rank}",
            "the job fails within seconds, and names the rank",
            1,
            f"error: rank {rank} was killed by SIGKILL",
            2,
            does=sends_to_child(rank, signal.SIGKILL),
            seconds=10,
            status="failed",
        )
        for rank in (0, 1)
    ),
    Fault(
        "a rank is stopped for good",
        "the job fails after trainer.rank_timeout_s (3 s here), naming rank, process and step",
        1,
        r"error: rank 1 \(process \d+\) has given no sign of life for 3 s, after step \d+",
        2,
        arguments=("trainer.rank_timeout_s=3",),
        does=sends_to_child(1, signal.SIGSTOP),
        seconds=15,
        status="failed",
    ),
    Fault(
        "a rank is stopped, and goes on",
        "the others wait",
        0,
        "",
        2,
        does=sends_to_child(1, signal.SIGSTOP, signal.SIGCONT),
        status="completed",
    ),
    Fault(
        "Ctrl-Z and fg",
        "goes on; the time of the stop counts for no limit",
        0,
        arguments=("data.num_workers=1", "data.worker_timeout_s=6"),
        does=lambda process: (
            os.killpg(process.pid, signal.SIGSTOP),
            time.sleep(8),
            os.killpg(process.pid, signal.SIGCONT),
        )[1],
        status="completed",
    ),
    Fault(
        "a loader worker is stopped for good",
        "the run fails after data.worker_timeout_s (5 s here), with the way out",
        1,
        r"error: the workers of the train split gave no batch in 5 s: raise data\.worker_timeout_s",
        arguments=("data.num_workers=1", "data.worker_timeout_s=5"),
        does=sends_to_child(-1, signal.SIGSTOP),
        seconds=30,
        status="failed",
    ),
    Fault(
        "a loader worker is killed",
        "the run fails with the way out",
        1,
        r"error: DataLoader worker .* is killed by signal: Killed: memory or /dev/shm",
        arguments=("data.num_workers=1",),
        does=sends_to_child(-1, signal.SIGKILL),
        seconds=30,
        status="failed",
    ),
    *(
        Fault(
            "trainer.max_time is over",
            "is interrupted, never completed; the next attempt has its own time",
            124,
            INTERRUPTED.format(r"trainer\.max_time"),
            ranks,
            arguments=("trainer.max_time=00:00:00:01",),
            status="interrupted",
        )
        for ranks in (1, 2)
    ),
    *(
        Fault(
            f"{way}(0) in the network's code",
            "a run without its results is failed",
            1,
            says,
            ranks,
            arguments=("model.target=stand_ins:leaves", f"model.options={{way:{way}}}"),
            status="failed",
            resumes=False,
        )
        for way, ranks, says in (
            ("sys.exit", 1, r"error: code of the run ended the process by sys\.exit\(0\)"),
            ("sys.exit", 2, r"error: .*sys\.exit\(0\)"),
            ("os._exit", 1, r"error: code of the run ended the process by os\._exit\(0\)"),
            ("os._exit", 2, "error: "),
        )
    ),
    *(
        Fault(name, promise, 0, says, ranks, damages=damage, status="completed")
        for name, promise, says, damage, ranks in (
            *(
                (
                    f"last.ckpt {how}",
                    "is set aside, said loudly, and the state before goes on",
                    r"last\.ckpt is damaged: it is last\.ckpt\.damaged now",
                    damage,
                    ranks,
                )
                for how, damage, ranks in (
                    ("flipped in one bit", flips(LAST), 1),
                    ("flipped in one bit", flips(LAST), 2),
                    ("cut short", cuts(LAST), 1),
                    ("empty", holds(LAST, b""), 1),
                    ("flipped, index.json lost", both(flips(LAST), removes(INDEX)), 1),
                    ("a pickle that runs code", holds(LAST, pickle.dumps(Canary())), 1),
                )
            ),
            ("last.ckpt lost", "the state before goes on", "", removes(LAST), 1),
            ("index.json lost", "is made anew", "", removes(INDEX), 1),
            ("index.json garbage", "is made anew", "", holds(INDEX, b"\0{[" * 99), 1),
            (
                "every state damaged",
                "the run starts anew, and says so",
                "no state of .* is whole: the run starts anew",
                flips(LAST, at("checkpoints", "previous.ckpt")),
                1,
            ),
            ("results.json garbage", "is made anew", "", holds(at("results.json"), b"\xff{"), 1),
            ("results.json a list", "is made anew", "", holds(at("results.json"), b"[1]"), 1),
            ("results.json empty", "is made anew", "", holds(at("results.json"), b""), 1),
        )
    ),
    *(
        Fault(
            f"metrics.csv {how}",
            "its whole rows stay, and the run goes on",
            0,
            r"metrics\.csv has lost \d+ of \d+ rows",
            damages=damage,
            status="completed",
            loses_rows=True,
        )
        for how, damage in (
            ("lost", removes(at("metrics.csv"))),
            ("empty", holds(at("metrics.csv"), b"")),
            ("garbage", holds(at("metrics.csv"), b"\xff\0," * 999)),
            ("cut short", cuts(at("metrics.csv"))),
        )
    ),
    *(
        Fault(
            f"config.yaml {how}",
            "is refused by name, and the directory left alone",
            1,
            r"error: [^\n]*config\.yaml[^\n]*\n",
            damages=holds(at("config.yaml"), content),
            seconds=30,
            resumes=False,
        )
        for how, content in (
            ("empty", b""),
            ("garbage", b"\xff\0"),
            ("a list", b"[1]"),
            ("deep", b"[" * 100_000),
            ("whose aliases explode", BOMB),
            ("with a number of 400 digits", b"seed: 1" + b"0" * 400),
        )
    ),
    Fault(
        "a checkpoint of Lightning's, left by SLURM",
        "Lightning guesses nothing from the environment",
        0,
        environment=(("SLURM_NTASKS", "1"), ("SLURM_JOB_NAME", "train"), ("SLURM_JOB_ID", "7")),
        damages=holds(at("hpc_ckpt_1.ckpt"), b"half"),
        status="completed",
    ),
    *(
        Fault(
            name,
            "is refused, naming split and class",
            1,
            rf"error: cannot continue: [^\n]*{culprit}",
            kind="folder",
            damages=damage,
            resumes=False,
        )
        for name, culprit, damage in (
            ("an image renamed", "cats", moves("cats/00.png", "cats/zz.png")),
            ("an image moved to another class", "cats|dogs", moves("cats/00.png", "dogs/zz.png")),
            ("a class renamed", "cats|tigers", moves("cats", "tigers")),
            (
                "an image replaced",
                "dogs",
                replaces_an_image,
            ),
        )
    ),
    Fault(
        "data.augment.mixup=inf",
        "is refused",
        1,
        r"error: data\.augment\.mixup must be finite",
        arguments=("data.augment.mixup=inf",),
        seconds=30,
        resumes=False,
    ),
    Fault(
        "a pipe named .png among the images",
        "is no image",
        0,
        kind="folder",
        damages=lambda directory: os.mkfifo(directory.parent / "images/cats/zz.png"),
        status="completed",
    ),
    *(
        Fault(name, "output is optional", 0, redirected=redirected, ranks=ranks, status="completed")
        for name, redirected in (
            ("standard output closed", ">&-"),
            ("standard output and error closed", ">&- 2>&-"),
            ("standard output full", "> /dev/full"),
        )
        for ranks in (1, 2)
    ),
    Fault(
        "the reader of the output leaves",
        "output is optional",
        0,
        does=reader_leaves,
        status="completed",
    ),
    Fault(
        "a file system without locks",
        "is named, with a way out",
        1,
        r"error: [^\n]*locks[^\n]*in_use=unlocked",
        environment=(("NO_LOCKS", "1"),),
    ),
    Fault(
        "a file system without locks, in_use=unlocked",
        "goes on without",
        0,
        "",
        environment=(("NO_LOCKS", "1"),),
        arguments=("in_use=unlocked",),
        status="completed",
    ),
    *(
        Fault(
            "a disk that is full" + " when the run is continued" * (damage is not None),
            "one line; the last good state stays",
            1,
            r"error: [^\n]*cannot write [^\n]*last\.ckpt: file too large",
            ranks,
            prepare=limits_files,
            damages=damage,
        )
        for ranks, damage in ((1, None), (2, None), (1, lambda _: None))
    ),
    Fault(
        "a name that is too long",
        "one line",
        1,
        r"error: [^\n]*file name too long",
        arguments=(f"hydra.run.dir={'x' * 300}",),
        resumes=False,
    ),
    Fault(
        "a file in the place of the directory",
        "one line",
        1,
        r"error: cannot [^\n]*: (not a directory|file exists)",
        arguments=("hydra.run.dir=/dev/null/run",),
        resumes=False,
    ),
    Fault(
        "ranks of srun that never come",
        "are named after 10 s, and given up after trainer.rank_timeout_s (12 s here)",
        1,
        r"rank 0 waits for rank 1, 2, 3 of the 4 that srun has started: .*error: [^\n]*did not",
        arguments=("trainer.devices=4", "trainer.rank_timeout_s=12"),
        environment=SRUN,
        resumes=False,
    ),
    Fault(
        "SIGTERM while ranks of srun do not come",
        "ends at once",
        143,
        arguments=("trainer.devices=4",),
        environment=SRUN,
        does=waits_then(signal.SIGTERM, 15),
        when_it_trains=False,
        seconds=5,
        resumes=False,
    ),
]
