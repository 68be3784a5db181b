"""The results of a stage, for bit-by-bit comparison, and the files that it leaves behind."""

import hashlib
import json
import logging
import re
import threading
from pathlib import Path
from typing import Any

Results = dict[str, str]  # name -> a digest or text that is equal if the result is

# Keys of metrics.jsonl that the clock or the machine decides.
_CLOCK = re.compile(r"seconds/.*|.*_s|.*per_second|mfu|goodput|.*memory.*")
_BESIDE = ("tokenizer", "chat_template", "generation")  # in the metadata of a checkpoint
# Names of unfinished files, and of locks.
_LEFT = re.compile(r".*\.partial|.*\.building|.*\.tmp|.*-tmp.*|.*\.lock|lock|\..*")
_one_at_a_time = threading.Lock()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def file_digest(path: Path, case: Path) -> str:
    """The digest of a file; the path of the case directory in it does not count."""
    return digest(path.read_bytes().replace(str(case).encode(), b"CASE")) if path.is_file() else "not there"


def files(directory: Path, case: Path, *, leaving_out: str = "") -> Results:
    """All files under a directory, by their paths in it."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {str(path.relative_to(directory)): path for path in paths}
    return {n: file_digest(p, case) for n, p in names.items() if not (leaving_out and re.search(leaving_out, n))}


def run(workdir: Path, case: Path) -> Results:
    """The results of a training run: each line of metrics except times, its samples, and its last state."""
    names = ("config.json", "tokenizer.json", "samples.jsonl", "data_card.md")
    lines = (workdir / "metrics.jsonl").read_text().splitlines() if (workdir / "metrics.jsonl").exists() else []
    told = [{k: v for k, v in _parse(line).items() if not _CLOCK.fullmatch(k)} for line in lines]
    losses = [f"{line.get('split')} {line.get('step')} {line.get('loss')}" for line in told]
    found = {"metrics.jsonl": f"{digest(json.dumps(told).encode())} {'; '.join(losses[-2:])}"}
    return found | last_state(workdir) | {name: file_digest(workdir / name, case) for name in names}


def _parse(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {"not JSON": line}
    return value if isinstance(value, dict) else {"not an object": line}


def last_state(workdir: Path) -> Results:
    """The results of the last checkpoint: its step, every array of its state, and the model's other files."""
    directory = workdir / "checkpoints"
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())
    if not steps:
        return {"last step": "none"}
    checkpoint = directory / str(steps[-1])
    try:
        metadata = json.loads((checkpoint / "metadata" / "metadata").read_text())
        beside = {name: digest(json.dumps(metadata.get(name)).encode()) for name in _BESIDE}
    except (OSError, ValueError, AttributeError) as error:
        beside = {"metadata": f"not readable: {type(error).__name__}"}
    return {"last step": str(steps[-1]), "state": state(checkpoint)} | beside


def state(checkpoint: Path) -> str:
    """A digest of the arrays of a checkpoint, or why it cannot be read."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with _one_at_a_time:
        logging.getLogger("absl").setLevel(logging.ERROR)
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                tree = checkpointer.metadata(checkpoint / "state").item_metadata.tree
                as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                restored = checkpointer.restore(
                    checkpoint / "state", args=ocp.args.PyTreeRestore(restore_args=as_arrays)
                )
        except Exception as error:  # anything that Orbax may raise for a damaged one
            return f"not readable: {type(error).__name__}"
    sums = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
        array = np.asarray(leaf)
        sums.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return sums.hexdigest()[:16]


def difference(expected: Results, found: Results) -> str:
    """The differences, in one line; empty if there are none."""
    names = [name for name in expected | found if expected.get(name) != found.get(name)]
    texts = [f"{name} is {found.get(name, 'not there')}, not {expected.get(name, 'there')}" for name in names[:3]]
    return "; ".join(texts) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def left_behind(case: Path, before: set[str]) -> list[str]:
    """Files and directories that no result needs, except those that an undisturbed run leaves, too (`before`)."""
    return sorted(str(path.relative_to(case)) for path in _unfinished(case) if _kind(case, path) not in before)


def names(case: Path) -> set[str]:
    """Kinds of names of unfinished files and locks in a case's directories."""
    return {_kind(case, path) for path in _unfinished(case)}


def _unfinished(case: Path) -> list[Path]:
    found = (path for top in ("in", "out", "cache") for path in (case / top).rglob("*"))
    return [path for path in found if _LEFT.fullmatch(path.name)]


def _kind(case: Path, path: Path) -> str:
    """A path in a case, without digests and numbers."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "N", str(path.relative_to(case)))


def pages(directory: Path) -> int:
    """The bytes of the files under a directory on a tmpfs."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in directory.rglob("*") if path.is_file())
