"""Ctrl-C works at any moment of a command and prints one line."""

import os
import signal
import subprocess
import sys
import time

import pytest

from gptjax import interrupts


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python -m gptjax.train --x", True),
        ("python -X dev -W error -mgptjax.evaluate", True),
        ("python /usr/bin/gptjax train", True),
        ("gptjax.exe gptjax", True),
        ("python -m pytest gptjax", False),
        ("python -c import_gptjax -m gptjax", False),
        ("python tool.py gptjax", False),
        ("python", False),
    ],
)
def test_which_process_is_a_command(line, expected):
    assert interrupts.is_command(line.split()) is expected


# The command is ready at READY; then it does what follows, in which the signal comes.
PLACES = {
    "python": "time.sleep(60)",
    "an import": "import slow_module",
    "an import that makes it an ImportError": "import slow_module_in_c",
    "a callback": "swallow()",
}
PROGRAM = """
import sys
sys.orig_argv = ["python", "-m", "gptjax.train"]
import time
from gptjax import cli, interrupts

def swallow():
    class Callback:
        def __del__(self):
            print("READY", flush=True)
            time.sleep(60)
    callback = Callback()
    del callback
    time.sleep(60)

def main(argv):
    if {place!r} != "swallow()":
        print("READY", flush=True)
    {place}

sys.exit(cli.run(main, []))
"""


def ended_by(number, place, tmp_path):
    """The exit status of the program after a signal, and its output."""
    (tmp_path / "slow_module.py").write_text("import time; time.sleep(60)")
    (tmp_path / "slow_module_in_c.py").write_text(
        "import time\ntry:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError('numpy failed') from None"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", PROGRAM.format(place=PLACES[place])]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "READY\n"
        time.sleep(0.2)
        process.send_signal(number)
        _, said = process.communicate(timeout=50)
    finally:
        process.kill()
        process.communicate()
    return process.returncode, said


@pytest.mark.parametrize("place", PLACES)
def test_it_is_acted_on_wherever_it_comes(place, tmp_path):
    assert ended_by(signal.SIGINT, place, tmp_path) == (130, "failed: interrupted\n")


@pytest.mark.parametrize(("name", "place"), [("SIGTERM", "python"), ("SIGUSR1", "a callback")])
def test_signals_of_schedulers_end_any_verb_in_one_line(name, place, tmp_path):
    status, said = ended_by(getattr(signal, name), place, tmp_path)
    assert (status, said.splitlines()) == (1, [f"failed: {interrupts.stopped_by(name)}"])


def test_a_signal_that_is_ignored_stays_so():
    """As SIGHUP under nohup."""
    program = PROGRAM.format(place="import os; os.kill(os.getpid(), 1); print('HERE')")
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + program
    done = subprocess.run(
        [sys.executable, "-c", ignoring],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stdout) == (0, "READY\nHERE\n")


def test_a_failed_command_ends_before_a_thread_that_does_not():
    """Its atexit functions run; it does not wait for a library's thread, as Python would."""
    program = """
import sys
sys.orig_argv = ["python", "-m", "gptjax.train"]
import atexit, threading
from gptjax import cli, interrupts
from gptjax.errors import RunError
interrupts.install()
atexit.register(print, "at exit")
threading.Thread(target=threading.Event().wait).start()
def main(argv):
    raise RunError("the disk is full")
sys.exit(cli.run(main, []))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "at exit\n", "failed: the disk is full\n")
