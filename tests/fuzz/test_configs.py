"""Any command line is a run, or an error in one line."""

from __future__ import annotations

import copy
import os
import random
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from equiloss.config.resolved import leaves, resolve
from equiloss.launching.composition_errors import check_words, explain, mendable
from equiloss.records.reading import read_yaml
from equiloss.run import build
from equiloss.training.trainer import quieten_lightning
from forks import OUTPUT, begin, output_of
from support import ROOT, composed, fuzz, wrong_with

SEED = 0
BASE = (
    *("callbacks=quiet", "logger=csv", "parity.every_n_steps=0", "trainer.max_steps=1"),
    *("data=synthetic", "data.options.num_samples=60", "model=mlp", "model.options.widths=[4]"),
)
SECONDS = 10
# So that a network of 10**9 features is refused, and takes no machine down.
MEMORY = 16 << 30

NUMBERS = (
    *("0", "-1", "1", "2", "0.5", "-0.0", "1e-320", "1e308", "inf", "-inf", "nan", "1e400"),
    *(str(2**31), str(2**63 - 1), str(2**63), str(-(2**64)), "1" + "0" * 400, "1" + "0" * 5000),
)
TEXTS = (
    *("''", "x", "'a b'", "'='", "'a\\'b'", "é±→😀", "'\u202e\u2028'", "'\x1b[31m\n\r\t\x7f'"),
    *("\udcff", "x" * 10_000, "'" + "[red]<b>|`$\\" * 500 + "'", "true", "null", "'null'", "'???'"),
    *("/", "..", "~", "/dev/null", "/proc/self/mem", "mnist:x", "os:system", ":", "%s{0}"),
)
TREES = (
    *("[]", "{}", "[1]", "[null]", "[nan,inf]", "[[1,[2]],{a: [null]}]", "{a: 1}", "{1: 2, b: 3}"),
    *("{1: 2}", "{true: x, null: y}", "{'': {'': []}}", "[" * 60 + "]" * 60, "[0.5,'x',{}]"),
    *("{name: x}", "[{name: RandomErasing}]", "[{}]", "{lr: 1}", "[1,1,1,1,1,1,1,1,1,1]"),
)
REFERENCES = (
    *(
        "${seed}",
        "${trainer}",
        "${loss.name}",
        "${nothing}",
        "${oc.env:EQUILOSS_UNSET}",
        "${}",
        "${",
    ),
    *("${oc.env:HOME}", "${now:%Y}", "${hydra:job.name}", "${oc.decode:'[1'}", "${short_hash:a}"),
    *(
        "${.name}",
        "${..seed}",
        "${short_hash:${seed}}",
        "${sweep_name:a}",
        "${unknown:x}",
        "${${a}}",
    ),
    *("${presentation_keys:}", "${oc.select:a.b.c,}", "${oc.dict.keys:trainer}", "$${seed}"),
)
FUNCTIONS = (
    "1,2",
    "choice(1,2)",
    "range(1,3)",
    "int(x)",
    "glob(*)",
    "str(1)",
    "sort(1,2)",
    "x(1)",
    "",
)
VALUES = (*NUMBERS, *TEXTS, *TREES, *REFERENCES, *FUNCTIONS)
OPEN = (
    *("loss.options", "loss.target", "loss.gamma", "data.options.num_classes", "data.options.size"),
    *("data.options.channels", "data.options.seed", "data.options.imbalance", "model.options.x"),
    *("model.options.dropout", "optimizer.options.momentum", "optimizer.options.fused"),
    *("scheduler.options.T_max", "trainer.arguments.max_time", "trainer.profiler", "hydra.run.dir"),
)
GROUPS = (
    *("loss", "data", "model", "optimizer", "scheduler", "trainer", "callbacks", "logger"),
    *("parity", "experiment", "debug", "sweep", "nothing", "hydra/launcher"),
)


def misspelt(name: str, drawn: random.Random) -> str:
    place = drawn.randrange(len(name))
    return (
        name[:place] + drawn.choice(("", "x", ".", "..", "[0]", "@", " ", "é")) + name[place + 1 :]
    )


def override(default: dict[str, Any], drawn: random.Random) -> str:
    """One override as a user might type it, or nobody would."""
    keys = [key for key, _ in leaves(default)]
    keys += [*OPEN, *default, "data.augment", "logger.wandb"]
    key = drawn.choice(keys)
    if drawn.random() < 0.1:
        key = f"trainer.{drawn.choice([*Trainer.__init__.__annotations__])}"
    if drawn.random() < 0.1:
        key = misspelt(key, drawn)
    value = drawn.choice(VALUES)
    if drawn.random() < 0.1:
        value = str(drawn.choice([value for _, value in leaves(default)])).replace("None", "null")
    sign = drawn.choice(("", "", "", "", "+", "++", "~"))
    text = f"{sign}{key}" if sign == "~" and drawn.random() < 0.5 else f"{sign}{key}={value}"
    return text if drawn.random() < 0.98 else text.replace("=", drawn.choice(("", "==", " = ")))


def group(drawn: random.Random) -> list[str]:
    """Overrides of a group: one that is there or not, once or twice."""
    name = drawn.choice(GROUPS)
    files = sorted(file.stem for file in (ROOT / "conf" / name).glob("*.yaml"))
    chosen = drawn.choice([*files, *files, "custom", "nothing", "", "..", "null", "a/b", "focal"])
    words = f"{drawn.choice(('', '', '+', '++', '~'))}{name}={chosen}"
    return [words] * drawn.choice((1, 1, 1, 2))


def mutations(default: dict[str, Any], case: int) -> tuple[list[str], bool]:
    """The overrides of a case, and whether one of them may choose a file."""
    drawn = random.Random(f"{SEED}-{case}")
    found = [override(default, drawn) for _ in range(drawn.choice((1, 1, 1, 2, 3)))]
    if drawn.random() < 0.03:
        found = group(drawn) + found * (drawn.random() < 0.3)
    # Nothing is downloaded, and loaders of a network are no business of a test.
    found = [text for text in found if "download" not in text]
    return found, any(text.lstrip("+~").partition("=")[0] in GROUPS for text in found)


@contextmanager
def bounded() -> Iterator[None]:
    """Refuse memory beyond a limit, and raise where a case takes too long."""

    def hang(*_: object) -> None:
        raise TimeoutError(f"it took more than {SECONDS} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def applied(words: list[str], base: DictConfig) -> DictConfig:
    """What Hydra composes of overrides that choose no file, forty times as fast."""
    config = copy.deepcopy(base)
    overrides = OverridesParser.create().parse_overrides(words)
    if any(each.is_sweep_override() for each in overrides):
        return compose("config", overrides=[*BASE, *words])
    ConfigLoaderImpl._apply_overrides_to_config(overrides, config)
    return config


def fault(words: list[str], base: DictConfig | None, directory: Path) -> str | None:
    """What is wrong with the way in which a command line is refused, if anything is."""
    try:
        with bounded():
            check_words(words)
            whole = compose("config", overrides=[*BASE, *words]) if base is None else None
            resolved = resolve(whole if whole is not None else applied(words, base))
            parts = build(resolved, directory)
            parts.data.setup("fit")
            parts.classifier.configure_optimizers()
            stored = directory.with_suffix(".yaml")
            stored.write_text(resolved.text, encoding="utf-8")
            assert replace(resolved, plain=read_yaml(stored)).hash == resolved.hash, "read back"
            stored.unlink()
    except Exception as error:
        known = mendable(error)
        return wrong_with(explain(error)) if known else f"it raised {type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("cases", [40, pytest.param(10_000, marks=fuzz)])
@pytest.mark.filterwarnings("ignore")
def test_any_command_line_is_built_or_refused_in_one_line(
    cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quieten_lightning()
    default = composed(*BASE).plain
    monkeypatch.chdir(tmp_path)
    # Other cases than everyone's: a run of 10,000 takes some minutes.
    first = int(os.environ.get("EQUILOSS_FUZZ_FIRST", "0"))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        base = compose("config", overrides=[*BASE])
        OmegaConf.set_readonly(base, False)
        faults = []
        for case in range(first, first + cases):
            words, by_group = mutations(default, case)
            why = fault(words, None if by_group else base, tmp_path / "run")
            if why is not None:
                faults.append(
                    f"seed {SEED}, case {case}, {[word[:200] for word in words]}: {why[:700]}"
                )
    assert not faults, f"{len(faults)} of {cases}:\n" + "\n".join(faults[:40])
    assert list(tmp_path.iterdir()) == []


@fuzz
@pytest.mark.parametrize("first", range(0, 300, 50))
def test_any_command_is_done_or_refused_in_one_line(first: int, tmp_path: Path) -> None:
    default = composed(*BASE).plain
    faults = []
    for case in range(first, first + 50):
        words, _ = mutations(default, case)
        # No argument of a process holds a NUL, and what is asked for is neither many ranks nor
        # many steps.
        words = [word for word in words if "\0" not in word and "hydra" not in word]
        limits = ("trainer.devices=1", "trainer.max_epochs=1")
        place = tmp_path / str(case)
        place.mkdir()
        process = begin(place / "run", *BASE, *words, *limits)
        process.join(120)
        output = output_of(place / "run")
        last = output.splitlines()[-1:] or [""]
        why = None
        if process.exitcode is None:
            process.kill()
            why = "did not end in 120 s"
        elif "Traceback" in output:
            why = output[-500:]
        elif process.exitcode != 0 and not last[0].startswith("error: "):
            why = f"exit code {process.exitcode}: {last}"
        elif process.exitcode != 0:
            why = wrong_with(last[0])
        if why is not None:
            faults.append(f"seed {SEED}, case {case}, {[word[:200] for word in words]}: {why}")
        assert {path.name for path in place.iterdir()} <= {"run", OUTPUT}
    assert not faults, f"{len(faults)}:\n" + "\n".join(faults)
