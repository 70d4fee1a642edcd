"""The settings of a job: a frozen table of RINGREDUCE_* variables and arguments of `init`.

Read once, when a communicator to the world is opened; an argument wins over its variable. Nothing
else in the package reads RINGREDUCE_* variables.
"""

import difflib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ringreduce import _core, tuning
from ringreduce.errors import MismatchError, RingReduceError

PREFIX = "RINGREDUCE_"
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Settings:
    """The values in force. All ranks of a job have the same, those of OWN excepted."""

    timeout_s: float
    warn_after_s: float
    algorithm: str
    log: str
    host: str
    tuning: str = ""
    constants: Mapping[str, float] = field(default_factory=dict)  # that the file of tuning has
    cuda_mpi: str = "auto"


@dataclass(frozen=True)
class Setting:
    """One row of the table: where a field of `Settings` comes from."""

    field: str
    variable: str
    argument: str | None  # of `init`
    default: str
    parse: Callable[[object], Any]
    meaning: str

    def names(self) -> str:
        """Both ways to set it, for messages."""
        return f"{self.variable} / init({self.argument}=...)" if self.argument else self.variable


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError("must be a number of seconds")
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError("must be a positive number of seconds")
    return seconds


def _one_of(choices: tuple[str, ...]) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str):
            raise TypeError(f"must be one of {', '.join(choices)}")
        if value.lower() not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value.lower()

    return parse


def _path(value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError("must be the path of a file")
    return os.fsdecode(value)


SETTINGS = (
    Setting(
        "timeout_s",
        "RINGREDUCE_TIMEOUT",
        "timeout",
        "1800",
        _seconds,
        "seconds after which a collective raises CollectiveTimeout",
    ),
    Setting(
        "warn_after_s",
        "RINGREDUCE_WARN_AFTER",
        "warn_after",
        "30",
        _seconds,
        "seconds after which a waiting rank says whom it waits for",
    ),
    Setting(
        "algorithm",
        "RINGREDUCE_ALGORITHM",
        "algorithm",
        "auto",
        _one_of(tuple(_core.ALGORITHMS)),
        "algorithm of every collective that has it: " + ", ".join(_core.ALGORITHMS),
    ),
    Setting(
        "tuning",
        "RINGREDUCE_TUNING",
        "tuning",
        "",
        _path,
        "file of python -m ringreduce.tune, on rank 0's host, by which algorithms are chosen",
    ),
    Setting(
        "log",
        "RINGREDUCE_LOG",
        None,
        "warning",
        _one_of(LOG_LEVELS),
        "what is logged: " + ", ".join(LOG_LEVELS),
    ),
    Setting(
        "host",
        "RINGREDUCE_HOST",
        None,
        "",
        str,
        "ranks with different ones use the network, as if on different hosts: to try it on one",
    ),
    Setting(
        "cuda_mpi",
        "RINGREDUCE_CUDA_MPI",
        None,
        "auto",
        _one_of(("auto", "off")),
        "off: an MPI that says it is CUDA-aware is not given GPU memory all the same",
    ),
)
OWN = ("log", "host")  # a rank may well have its own
OF_THE_BUILD = ("CUDA_ARCHS",)  # setup.py reads it: here it is neither known nor unknown


def read(environment: Mapping[str, str], **arguments: object) -> Settings:
    """The settings that `environment` and the arguments of `init` give. None: not given.

    Raises ValueError or TypeError naming the variable or argument, and the value.
    """
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        argument = arguments.get(setting.argument) if setting.argument else None
        if argument is not None:
            name, value = f"init({setting.argument}=...)", argument
        else:
            name, value = setting.variable, environment.get(setting.variable, setting.default)
        try:
            values[setting.field] = setting.parse(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} {error}, not {value!r}") from None
    return Settings(**values)


def with_constants(settings: Settings) -> Settings:
    """With those of the file of its tuning, if any. Raises ValueError if it cannot be used."""
    if not settings.tuning:
        return settings
    try:
        return replace(settings, constants=tuning.read(settings.tuning))
    except ValueError as error:
        raise ValueError(f"RINGREDUCE_TUNING / init(tuning=...): {error}") from None


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """RINGREDUCE_* variables that do not exist, each with a near one that does, if any."""
    # Without the prefix that they share, which would make all of them near.
    known = [setting.variable.removeprefix(PREFIX) for setting in SETTINGS]
    names = sorted(name.removeprefix(PREFIX) for name in environment if name.startswith(PREFIX))
    nearest = {
        name: difflib.get_close_matches(name, known, n=1)
        for name in names
        if name not in known and name not in OF_THE_BUILD
    }
    return {PREFIX + name: PREFIX + near[0] if near else None for name, near in nearest.items()}


def warn_about_unknown(environment: Mapping[str, str]) -> None:
    """Warns, once for each, of variables that were probably meant to have an effect."""
    for name, nearest in unknown_variables(environment).items():
        hint = f"did you mean {nearest}?" if nearest else "see python -m ringreduce.info"
        warnings.warn(f"unknown variable {name} has no effect; {hint}", stacklevel=3)


def agree(
    exchange: Callable[[bytes], list[bytes]], rank: int, settings: Settings | Exception
) -> Settings:
    """Collective: makes sure that all ranks start with the same settings. Returns this rank's.

    The file of a tuning is read by rank 0 only, which hands its constants to all.

    A rank whose settings could not be read passes the exception: it is raised again there, and
    every other rank raises a RingReduceError that quotes it, so that nobody waits for a rank that
    never starts. Raises MismatchError, on every rank, for a setting that differs.
    """
    if rank == 0 and isinstance(settings, Settings):
        try:
            settings = with_constants(settings)
        except ValueError as error:
            settings = error
    mine = (
        {"problem": f"{type(settings).__name__}: {settings}"}
        if isinstance(settings, Exception)
        else asdict(settings)
    )
    everyone = [json.loads(message) for message in exchange(json.dumps(mine).encode())]
    if isinstance(settings, Exception):
        raise settings
    for other, theirs in enumerate(everyone):
        if "problem" in theirs:
            raise RingReduceError(f"rank {other} could not start: {theirs['problem']}")
    for setting in SETTINGS:
        if setting.field in OWN:
            continue
        first = everyone[0][setting.field]
        for other, theirs in enumerate(everyone):
            if theirs[setting.field] != first:
                raise MismatchError(
                    f"rank {rank}: {setting.names()} is {first} on rank 0 but "
                    f"{theirs[setting.field]} on rank {other}; give all ranks the same value "
                    "(Open MPI: mpirun -x NAME; MPICH: mpiexec -genv NAME VALUE)"
                )
    return replace(settings, constants=everyone[0]["constants"])
