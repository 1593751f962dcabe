"""One line on stderr and the right exit status."""

from __future__ import annotations

import errno

import pytest
from hydra.errors import ConfigCompositionException, InstantiationException, MissingConfigException
from omegaconf.errors import MissingMandatoryValue

from nbmix.app.command import TRACEBACK, is_bad_input, one_line, one_line_errors
from nbmix.errors import InputError
from tests.helpers.running import configure


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def raised_while_making(cause: Exception) -> Exception:
    return caused(
        InstantiationException(f"Error in call to target 'a.B':\n{cause!r}\nfull_key: model"), cause
    )


@pytest.fixture(autouse=True)
def no_traceback_wanted(monkeypatch):
    for name in (TRACEBACK, "NBMIX_HOLDS_ERRORS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "error, line, bad_input",
    [
        (InputError("model.x=1: too\nmany"), "model.x=1: too many", True),
        (raised_while_making(InputError("model.x=0: no")), "model.x=0: no", True),
        (
            MissingConfigException(
                "Could not find 'model/foo'\n\nConfig search path:\n\tprovider=x", "model/foo"
            ),
            "Could not find 'model/foo' (see conf/ for what there is)",
            True,
        ),
        (
            ConfigCompositionException(
                "Could not override 'data.path'.\nTo append to your config use +data.path=a"
            ),
            "Could not override 'data.path' with this choice of data; for a file of your own add data=h5ad, "
            "or data=tenx (see conf/ for what there is)",
            True,
        ),
        (
            ConfigCompositionException(
                "Could not override 'model.k'.\nTo append to your config use +model.k=3"
            ),
            "Could not override 'model.k' (see conf/ for what there is)",
            True,
        ),
        (
            MissingMandatoryValue("Missing mandatory value: start.path\n    full_key: start.path"),
            "Missing mandatory value: start.path (see conf/ for what there is)",
            True,
        ),
        (
            caused(
                ValueError("Unable to configure handler 'file'"),  # of logging
                PermissionError(errno.EACCES, "Permission denied", "a.log"),
            ),
            "a file cannot be written (Permission denied: a.log); choose another folder by hydra.run.dir",
            True,
        ),
        (KeyError("a"), "KeyError: 'a' (set HYDRA_FULL_ERROR=1 to see where)", False),
        (
            raised_while_making(RuntimeError("a\nb")),
            "RuntimeError: a b (set HYDRA_FULL_ERROR=1 to see where)",
            False,
        ),
        (ValueError(), "ValueError: no message (set HYDRA_FULL_ERROR=1 to see where)", False),
    ],
)
def test_every_error_is_one_line(error, line, bad_input):
    assert one_line(error) == line
    assert is_bad_input(error) is bad_input


@pytest.mark.parametrize(
    "error, status", [(InputError("x"), 2), (RuntimeError("x"), 1), (KeyboardInterrupt(), 130)]
)
def test_exit_status(error, status, capsys):
    with pytest.raises(SystemExit) as left, one_line_errors():
        raise error
    assert left.value.code == status
    assert len(capsys.readouterr().err.splitlines()) == (0 if status == 130 else 1)


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(InputError, match="x"), one_line_errors(whole_process=True), one_line_errors():
        raise InputError("x")


def test_hydra_raises_to_us_and_children_do_not_inherit_it(monkeypatch):
    import os

    with one_line_errors(whole_process=True):
        assert os.environ[TRACEBACK] == "1"
        with one_line_errors():
            assert TRACEBACK not in os.environ


@pytest.mark.parametrize(
    "words, near",
    [
        (["model.n_component=3"], "model.n_components"),
        (["trainer.max_epoch=3"], "trainer.max_epochs"),
        (["modl=em"], "model"),
        (["sed=3"], "seed"),
        (["model=emm"], "model=em"),
        (["start=kmean"], "start=kmeans"),
        (["m_step@model.m_step=newtn"], "m_step=newton"),
    ],
)
def test_near_misses_are_named(words, near):
    with pytest.raises(Exception) as error:
        configure(*words)
    assert is_bad_input(error.value)
    assert one_line(error.value).endswith(f"; did you mean {near}?")


def test_a_word_that_is_no_setting():
    with pytest.raises(Exception) as error:
        configure("data", "h5ad")
    assert one_line(error.value).startswith("data: is no setting; write data=VALUE")
