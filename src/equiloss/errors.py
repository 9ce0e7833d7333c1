"""Errors that a user can cause; the command line shows them in one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

# A longer list of choices would bury the near miss.
LISTED = 25
# Nor would a longer line be read.
LONGEST = 580


class UserError(ValueError):
    """Something the user can mend: its message names the culprit, the rule and the choices."""


class ConfigError(UserError):
    """A configuration value that makes no sense."""


class DataError(UserError):
    """Files or targets that cannot be used."""


class LossError(UserError):
    """A loss that is unknown, misused or broken."""


class ModelError(UserError):
    """A network that is unknown, or does not fit the data."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


class DamagedError(CheckpointError):
    """A checkpoint whose content is not what was written."""


class NonFiniteError(UserError):
    """Training met a loss or a gradient that is not finite."""


class ParityError(UserError):
    """A formulation disagrees with the oracle beyond its bound."""


class RecordError(UserError):
    """A file that a run or a sweep left behind, and that is of no use.

    Attributes:
        file: Its path.
        why: What is wrong with it, as the end of a sentence.
    """

    def __init__(self, file: Path, why: str) -> None:
        self.file, self.why = file, printable(why)
        super().__init__(f"{printable(str(file))} {self.why}: mend or remove that file")


def printable(text: str) -> str:
    r"""Text in one line, with every character that would steer a terminal written out.

    >>> print(printable("red: \x1b[31m\n"))
    red: \x1b[31m\n
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def brief(text: str) -> str:
    """Text in one printable line of a few hundred characters; a long one loses its middle.

    The culprit comes first and the way out last.

    >>> brief("seed must be at least 0, got -1" + "0" * 5000 + ": set another")[-16:]
    '000: set another'
    """
    line = printable(text.strip())
    return line if len(line) <= LONGEST else f"{line[:350]}…{line[-LONGEST // 3 :]}"


def first_line(error: BaseException) -> str:
    r"""What an error says first, or its kind where it says nothing.

    >>> first_line(ValueError("no such file\nCheck the path."))
    'no such file'
    """
    return str(error).strip().partition("\n")[0] or type(error).__name__


def choose(what: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`, otherwise raise with the near miss.

    Args:
        what: The name of the setting, for the message.
        value: What was given.
        choices: What is allowed.

    Raises:
        ConfigError: if `value` is none of the choices.

    >>> choose("task", "fit", ("fit", "test"))
    'fit'
    >>> choose("task", "fti", ("fit", "test"))
    Traceback (most recent call last):
    equiloss.errors.ConfigError: unknown task 'fti'. Did you mean 'fit'? Known: fit, test
    """
    known = list(choices)
    if value in known:
        return value
    raise ConfigError(unknown(what, value, known))


def unknown(what: str, value: str, choices: Iterable[str]) -> str:
    """The message for an unknown name: the near miss, and what is known.

    >>> unknown("optimizer", "sgdw", ["SGD", "Adam"])
    "unknown optimizer 'sgdw'. Did you mean 'SGD'? Known: SGD, Adam"
    """
    names = list(dict.fromkeys(choices))
    known = {name.lower(): name for name in names}
    near = [known[match] for match in difflib.get_close_matches(value.lower(), known, n=5)]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if len(names) > LISTED and near:
        return f"unknown {what} {value!r}.{hint} Near: {', '.join(near)}; {len(names)} are known"
    return f"unknown {what} {value!r}.{hint} Known: {', '.join(names)}"
