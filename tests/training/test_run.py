"""How a run ends."""

import pytest

from gptjax.errors import RunError
from gptjax.training.run import Ending


def failing(error: Exception):
    def close():
        raise error

    return close


def test_everything_is_closed_the_last_first_and_the_first_error_stands(capsys):
    closed = []
    with pytest.raises(RunError, match="diverged"), Ending() as ending:
        ending.add(lambda: closed.append("report"))
        ending.add(failing(OSError("disk full")))
        ending.add(lambda: closed.append("log"))
        raise RunError("diverged")
    assert closed == ["log", "report"]
    assert "while the run ended: disk full" in capsys.readouterr().err


def test_an_error_of_a_closing_is_that_of_the_run_where_there_is_no_other():
    closed = []
    with pytest.raises(RunError, match=r"disk full\. The same command continues"), Ending() as ending:
        ending.add(lambda: closed.append("report"))
        ending.add(failing(OSError("disk full")))
    assert closed == ["report"]
