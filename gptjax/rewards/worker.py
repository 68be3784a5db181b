"""A process that calls one reward function of a user: `python worker.py FILE FUNCTION`. It talks in lines of JSON.

It imports nothing of gptjax. First it writes {"ready": true} or {"error": ...}. Then it answers each line
{"prompt", "completion", "reference", "seconds"} with {"value": number} or {"error": ...}. What the function prints goes
to stderr.
"""

import importlib.util
import json
import os
import signal
import sys


def _say(stream, message):
    stream.write((json.dumps(message) + "\n").encode())
    stream.flush()


def _told(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def _load(path, name):
    directory = os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120
    sys.path.insert(0, directory)
    spec = importlib.util.spec_from_file_location("rewards_of_user", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise AttributeError(f"the file has no function {name!r}")
    return function


def _answer(function, request):
    try:
        value = function(request["prompt"], request["completion"], request["reference"])
    except Exception as error:
        return {"error": f"raised {_told(error)}"}
    try:
        number = float(value) if not isinstance(value, str | bytes) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None:
        return {"error": f"returned {value!r:.60}, not a number"}
    if number != number or number in (float("inf"), float("-inf")):
        return {"error": f"returned {number}"}
    return {"value": number}


def main(path, name):
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # keeps the function's own reads and prints out of the pipes
    os.dup2(2, 1)
    try:
        function = _load(path, name)
    except BaseException as error:
        _say(replies, {"error": _told(error)})
        return
    _say(replies, {"ready": True})
    for line in requests:
        request = json.loads(line)
        # If the run is gone and the function hangs, only this alarm ends the process, by its default action.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["seconds"] + 10)
        reply = _answer(function, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(replies, reply)


if __name__ == "__main__":
    main(*sys.argv[1:])
