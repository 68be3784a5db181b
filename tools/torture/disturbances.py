"""The kinds of disturbance: functions of a case, with all random choices from the seed of the case."""

import contextlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tools.torture import compare, judge
from tools.torture.compare import Results
from tools.torture.hook.sitecustomize import RECORD
from tools.torture.judge import Wrong
from tools.torture.processes import Command, Server
from tools.torture.stages import Reader, Stage, World

LIMIT = 60.0  # seconds within which a signalled command must end
_LONGEST_RUN = 300.0  # seconds for a whole command on a busy machine


@dataclass
class Undisturbed:
    """An undisturbed execution of a stage.

    Attributes:
      seconds: from start to end of a forked command. import_seconds: extra seconds of a new interpreter.
      operations: file operations that the hook counted, one per line.
      read: the result of each reader.
      names: unfinished-looking files that it leaves; see `compare.names`.
      sizes: bytes in each directory that may become a small disk.
    """

    seconds: float
    import_seconds: float
    results: Results
    operations: list[str]
    read: dict[str, Results]
    names: set[str]
    sizes: dict[str, int]


@dataclass
class Case:
    """One disturbance of one stage.

    `moments` describes the disturbances, for the report.
    """

    stage: Stage
    seed: int
    random: random.Random
    directory: Path
    server: Server
    usual: Undisturbed
    moments: list[str] = field(default_factory=list)
    _count: int = 0

    def start(self, argv: list[str] | None = None, *, real: bool = False, **environment: str | None) -> Command:
        """Starts the command of the stage, or another one on its files."""
        self._count += 1
        logs = self.directory / "logs"
        tally = logs / f"{self._count}.tally"
        places = {"GPTJAX_CACHE": str(self.directory / "cache"), "TMPDIR": str(self.directory / "tmp")}
        places |= {"TORTURE_ROOT": f"{self.directory}/", "TORTURE_TALLY": str(tally)}
        argv = argv or self.stage.argv(self.directory)
        real = real or self.stage.workers  # worker processes import the main module again
        log = logs / f"{self._count}.log"
        return self.server.start(argv, cwd=self.directory, log=log, real=real, **places | environment)

    def operations(self) -> list[str]:
        """The file operations of the last command so far."""
        tally = self.directory / "logs" / f"{self._count}.tally"
        text = tally.read_text(errors="replace") if tally.exists() else ""
        return [text[i : i + RECORD].strip() for i in range(0, len(text), RECORD)]

    def finish_as_usual(self) -> None:
        """Runs the same command again: it must succeed, with the undisturbed results, and leave nothing behind."""
        command = self.start()
        judge.ended(command, command.finish(_LONGEST_RUN), {0})
        if what := compare.difference(self.usual.results, self.stage.results(self.directory)):
            raise Wrong(f"after the same command again, {what}")
        self.nobody_is_left(command)
        if left := compare.left_behind(self.directory, self.usual.names):
            raise Wrong(f"left behind: {', '.join(left[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''}")

    def nobody_is_left(self, *commands: Command) -> None:
        """Checks that no processes of ended commands are left, or that they end at once."""
        end = time.monotonic() + LIMIT
        while alive := [pid for command in commands for pid in command.alive()]:
            if time.monotonic() > end:
                raise Wrong(f"{len(alive)} of its processes are still alive")
            time.sleep(0.05)


def undisturbed(stage: Stage, world: World, server: Server, directory: Path) -> Undisturbed:
    """Runs a stage and its readers twice; the second time is the reference, in which nothing is compiled."""
    usual = Undisturbed(0, server.start_seconds, {}, [], {}, set(), {})
    first: Results = {}
    for number in range(2):
        case = Case(stage, number, random.Random(0), directory / str(number), server, usual)
        world.fill(stage, case.directory)
        command = case.start()
        status = command.finish(2 * _LONGEST_RUN)
        seconds = time.perf_counter() - command.begin
        if status:
            raise SystemExit(f"{stage.name} fails undisturbed:\n{command.errors()[-2000:]}")
        usual.seconds, usual.operations = seconds, case.operations()
        usual.results = stage.results(case.directory)
        if number and (what := compare.difference(first, usual.results)):
            raise SystemExit(f"{stage.name} differs between two undisturbed executions: {what}")
        first = usual.results
        usual.names = compare.names(case.directory)
        usual.sizes = {place: compare.pages(case.directory / place) for place in stage.disks}
        for reader in stage.readers if number else ():
            command = case.start(reader.argv(case.directory))
            status = command.finish(2 * _LONGEST_RUN)
            if status and reader.name != "again":
                raise SystemExit(f"{stage.name} cannot be read by {reader.name}:\n{command.errors()[-2000:]}")
            usual.read[reader.name] = reader.made(case.directory) if reader.made else {}
        shutil.rmtree(case.directory)
    return usual


def kill(case: Case) -> None:
    """Kills at random times or file operations, up to three times; then runs to the end."""
    killed = []
    for _ in range(case.random.choices((1, 2, 3), (60, 25, 15))[0]):
        killed.append(_killed(case))
        _not_taken_for_whole(case)
    case.finish_as_usual()
    case.nobody_is_left(*killed)


def _killed(case: Case, *, operations: tuple[float, float] = (0, 1), by_operation: bool = False) -> Command:
    """Starts the command and kills it. `operations`: the range of the kill, as shares of the undisturbed operations."""
    how = "operation" if by_operation else case.random.choices(("time", "operation", "soon after"), (40, 40, 20))[0]
    if how == "time":
        real, whom = case.random.random() < 0.3, case.random.choice(("group", "parent", "worker"))
        whom = whom if case.stage.workers else "group"
        seconds = case.random.random() * (case.usual.seconds + real * case.usual.import_seconds)
        case.moments.append(f"{whom} killed after {seconds:.3f} s{' of a new interpreter' * real}")
        command = case.start(real=real)
        command.wait(max(command.begin + seconds - time.perf_counter(), 0))
        command.signal(signal.SIGKILL, whom)
    else:
        low, high = (round(share * len(case.usual.operations)) for share in operations)
        number = case.random.randint(max(low, 1), max(high, 1))
        who = case.random.choice(("group", "parent", "self")) if case.stage.workers else "group"
        delay = case.random.uniform(1e-5, 3e-3) if how == "soon after" else 0.0
        case.moments.append(
            f"{'self' if delay else who} killed {how} {number} of {len(case.usual.operations)} "
            f"({case.usual.operations[number - 1]})"
        )
        command = case.start(TORTURE_AT=str(number), TORTURE_WHO=who, TORTURE_DELAY=str(delay))
    status = command.finish(_LONGEST_RUN)
    if status not in (-signal.SIGKILL, -signal.SIGALRM):  # messages of workers about a killed parent are not gptjax's
        judge.ended(command, status, {0, 1})
    return command


def _not_taken_for_whole(case: Case) -> None:
    """The rest of a killed command must be refused by the next reader, or be complete."""
    stage = case.stage
    if not stage.readers or stage.readers[0].made is None or stage.readers[0].name == "again":
        there = {name: found for name, found in stage.results(case.directory).items() if found != "not there"}
        expected = {name: text for name, text in case.usual.results.items() if name in there}
        if what := compare.difference(expected, there):
            raise Wrong(f"an incomplete result was accepted: {what}")
        return
    if not stage.whole and case.random.random() < 0.5:
        return
    _read(case, stage.readers[0], compares=stage.whole)
    for path in (case.directory / "out").glob("next*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read(case: Case, reader: Reader, *, compares: bool, damaged: str = "") -> Command:
    """Runs a reader: it must refuse with a message, or, if it `compares`, give the undisturbed result.

    Another result is allowed if a warning names the `damaged` file: an older checkpoint is complete.
    """
    command = case.start(reader.argv(case.directory))
    status = command.finish(_LONGEST_RUN)
    judge.ended(command, status, {0, 1, 2})
    made = reader.made(case.directory) if status == 0 and compares and reader.made else case.usual.read[reader.name]
    if (what := compare.difference(case.usual.read[reader.name], made)) and not (
        damaged and judge.warns(command, damaged)
    ):
        raise Wrong(f"gptjax {command.argv[0]} accepts it as complete, and {what}")
    return command


_SIGNALS = ("INT", "TERM", "HUP", "USR1", "USR2", "INT INT", "STOP CONT")


def send_signals(case: Case) -> None:
    """Sends a signal at any time from the first millisecond; the same command must then continue."""
    which, real = case.random.choice(_SIGNALS), case.random.random() < 0.5
    whom = case.random.choice(("group", "parent"))
    seconds = case.random.random() * (case.usual.seconds + real * case.usual.import_seconds)
    gap = case.random.random() * (0.3 if which == "STOP CONT" else 1.0)
    case.moments.append(f"{which} to the {whom} after {seconds:.3f} s{' of a new interpreter' * real}")
    command = case.start(real=real)
    command.wait(max(command.begin + seconds - time.perf_counter(), 0))
    done = len(case.operations()) / len(case.usual.operations)
    running = command.wait(0) is None
    first, *more = (getattr(signal, f"SIG{name}") for name in which.split())
    command.signal(first, whom)
    for number in more:
        command.wait(gap)
        command.signal(number, whom)
    status = command.finish(LIMIT + _LONGEST_RUN * (which == "STOP CONT"))
    allowed = {0} if which == "STOP CONT" else {0, 1, 130, -first, 128 + first}
    judge.ended(command, status, allowed)
    if status == 0 and running and done < 0.5 and which in ("INT", "TERM", "INT INT"):
        raise Wrong(f"{which} had no effect: it ended with status 0")
    case.nobody_is_left(command)
    case.finish_as_usual()


def fill_disk(case: Case) -> None:
    """Makes a directory a small disk: the command must report it, and continue once there is room."""
    place = case.random.choice(sorted(case.stage.disks))
    size = 4096 * case.random.randint(1, max(case.usual.sizes[place] // 4096 - 1, 1))
    # If there is time to compile, compiled programs also go to the cache.
    cold = place == "cache" and case.random.random() < 0.3
    case.moments.append(f"{place} has {size} of {case.usual.sizes[place]} bytes{', programs too' * cold}")
    directory = case.directory / place
    with small_disk(directory, size) as enlarge:
        environment = {"JAX_COMPILATION_CACHE_DIR": None} if cold else {}
        command = case.start(real=cold, **environment)
        status = command.finish(LIMIT + 2 * case.usual.seconds + 60 * cold)
        only_a_side = case.stage.disks[place]
        judge.ended(command, status, {0} if only_a_side and place != "tmp" else {0, 1})
        case.nobody_is_left(command)
        if status == 1:
            judge.tells_of_the_disk(command, str(directory))
        else:
            expected, found = case.usual.results, case.stage.results(case.directory)
            if only_a_side:  # may be missing
                expected, found = (
                    {name: text for name, text in results.items() if not name.startswith(f"{place}/")}
                    for results in (expected, found)
                )
            if what := compare.difference(expected, found):
                raise Wrong(f"it ended with status 0 on a full disk, and {what}")
        enlarge()
        case.finish_as_usual()


@contextlib.contextmanager
def small_disk(directory: Path, size: int) -> Iterator[Callable[[], None]]:
    """Mounts a disk of `size` bytes in memory; yields a function that enlarges it."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", directory], check=True)
    finally:
        subprocess.run(["umount", "--lazy", directory], check=False)


def flip(case: Case) -> None:
    """Truncates or empties a file or flips a bit; the next reader must report it or give the right result."""
    reader = case.random.choice(case.stage.readers)
    if reader.name == "again" and not case.stage.whole and case.random.random() < 0.5:
        _killed(case, operations=(0.5, 1), by_operation=True)
    else:
        command = case.start()
        judge.ended(command, command.finish(_LONGEST_RUN), {0})
    found = sorted({path for pattern in reader.files for path in case.directory.glob(pattern) if path.is_file()})
    if not found:
        case.moments.append("there was no file yet")
        return
    path = case.random.choice(found)
    told = any(path in case.directory.glob(pattern) for pattern in reader.told)
    case.moments.append(f"{_damage(path, case.random)} {path.relative_to(case.directory)}, then {reader.name}")
    names = [path.name, *(str(parent) for parent in path.parents if case.directory in parent.parents)]
    command = _read(case, reader, compares=told, damaged=_checkpoint_of(path))
    if command.status and not (reader.name == "again" and str(case.directory / "out") in command.last_line()):
        judge.names(command, *names)


def _checkpoint_of(path: Path) -> str:
    """The directory of the checkpoint step that a file is in, or else the file itself."""
    steps = [parent for parent in path.parents if parent.parent.name == "checkpoints"]
    return str(steps[0] if steps else path)


def _damage(path: Path, generator: random.Random) -> str:
    """Damages a file, and describes how."""
    content = path.read_bytes()
    how = generator.choice(("cut", "emptied", "flipped")) if content else "emptied"
    if how == "cut":
        content = content[: generator.randrange(len(content))]
    elif how == "flipped":
        place = generator.randrange(len(content))
        how = f"flipped byte {place} of"
        content = content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :]
    else:
        content = b""
    path.write_bytes(content)
    return how


KINDS: dict[str, Callable[[Case], None]] = {
    "kill": kill,
    "signal": send_signals,
    "disk": fill_disk,
    "flip": flip,
}
