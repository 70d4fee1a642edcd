"""The table of settings: frozen names, bad values that name themselves, agreement of ranks."""

import pytest

from ringreduce import testing
from ringreduce.errors import MismatchError, RingReduceError
from ringreduce.settings import (
    SETTINGS,
    Settings,
    agree,
    read,
    unknown_variables,
    warn_about_unknown,
)


def test_the_list_of_variables_is_frozen():
    """A new variable is a promise: add it here on purpose."""
    assert [(setting.variable, setting.argument, setting.default) for setting in SETTINGS] == [
        ("RINGREDUCE_TIMEOUT", "timeout", "1800"),
        ("RINGREDUCE_WARN_AFTER", "warn_after", "30"),
        ("RINGREDUCE_ALGORITHM", "algorithm", "auto"),
        ("RINGREDUCE_TUNING", "tuning", ""),
        ("RINGREDUCE_LOG", None, "warning"),
        ("RINGREDUCE_HOST", None, ""),
        ("RINGREDUCE_CUDA_MPI", None, "auto"),
    ]


def test_defaults():
    assert read({}) == Settings(
        timeout_s=1800.0, warn_after_s=30.0, algorithm="auto", log="warning", host=""
    )


def test_an_argument_wins_over_its_variable():
    environment = {"RINGREDUCE_TIMEOUT": "5", "RINGREDUCE_ALGORITHM": "Ring"}
    assert read(environment).timeout_s == 5.0
    assert read(environment).algorithm == "ring"
    assert read(environment, timeout=7).timeout_s == 7.0
    assert read(environment, algorithm="tree", timeout=None) == Settings(
        5.0, 30.0, "tree", "warning", ""
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RINGREDUCE_TIMEOUT", "soon"),
        ("RINGREDUCE_TIMEOUT", "0"),
        ("RINGREDUCE_TIMEOUT", "-1"),
        ("RINGREDUCE_TIMEOUT", "inf"),
        ("RINGREDUCE_TIMEOUT", "nan"),
        ("RINGREDUCE_TIMEOUT", ""),
        ("RINGREDUCE_WARN_AFTER", "0"),
        ("RINGREDUCE_ALGORITHM", "rings"),
        ("RINGREDUCE_LOG", "loud"),
    ],
)
def test_a_bad_value_names_variable_and_value(variable, value):
    with pytest.raises(ValueError, match=f"{variable} must be .*, not '{value}'"):
        read({variable: value})


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("timeout", 0, ValueError),
        ("timeout", True, TypeError),
        ("timeout", [1], TypeError),
        ("warn_after", -2.5, ValueError),
        ("algorithm", "best", ValueError),
        ("algorithm", 3, TypeError),
        ("tuning", 3, TypeError),
    ],
)
def test_a_bad_argument_names_itself(argument, value, error):
    with pytest.raises(error, match=rf"init\({argument}=\.\.\.\) must be "):
        read({}, **{argument: value})


def test_unknown_variables_get_the_nearest_name():
    environment = {
        "RINGREDUCE_TIMEOUT": "5",
        "RINGREDUCE_ALGORITM": "ring",
        "RINGREDUCE_XYZZY": "1",
        "RINGREDUCE_CUDA_ARCHS": "90",
        "OTHER": "1",
    }
    assert unknown_variables(environment) == {
        "RINGREDUCE_ALGORITM": "RINGREDUCE_ALGORITHM",
        "RINGREDUCE_XYZZY": None,
    }
    with pytest.warns(UserWarning) as caught:
        warn_about_unknown(environment)
    assert len(caught) == 2
    assert "did you mean RINGREDUCE_ALGORITHM?" in str(caught[0].message)


def errors_of_agreement(settings_of_rank):
    """What each of the ranks gets from `agree`."""

    def fn(comm):
        try:
            return agree(comm.bootstrap.exchange, comm.rank, settings_of_rank[comm.rank])
        except Exception as error:
            return error

    return testing.run_threads(len(settings_of_rank), fn, timeout_s=20)


def test_equal_settings_agree_and_the_log_may_differ():
    ours, theirs = read({}), read({"RINGREDUCE_LOG": "debug"})
    assert errors_of_agreement([ours, theirs, ours]) == [ours, theirs, ours]


@pytest.mark.parametrize(
    ("argument", "first", "second"),
    [("timeout", 10, 20), ("warn_after", 1, 2), ("algorithm", "ring", "tree")],
)
def test_a_difference_is_a_mismatch_on_every_rank(argument, first, second):
    settings = [read({}, **{argument: value}) for value in (first, first, second)]
    errors = errors_of_agreement(settings)
    for rank, error in enumerate(errors):
        assert type(error) is MismatchError
        assert f"rank {rank}: " in str(error)
        assert f"{first}" in str(error)
        assert f"{second}" in str(error)
        assert "on rank 0 but" in str(error)
        assert "on rank 2;" in str(error)


def test_a_rank_that_cannot_read_its_settings_is_named_on_the_others():
    with pytest.raises(ValueError, match="soon") as caught:
        read({"RINGREDUCE_TIMEOUT": "soon"})
    errors = errors_of_agreement([read({}), caught.value])
    assert errors[1] is caught.value
    assert type(errors[0]) is RingReduceError
    assert "rank 1 could not start: ValueError: RINGREDUCE_TIMEOUT" in str(errors[0])
