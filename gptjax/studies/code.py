"""The hash of the code behind a number: cells of different code are not compared."""

import hashlib
from pathlib import Path

import gptjax


def code_hash() -> str:
    """The hash of the modules that can change the result of a run; those that compare or plan are left out."""
    root, digest = Path(gptjax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        room = path.relative_to(root).parts[0]
        if room in ("reporting", "planning", "plan.py", "ablate.py") or (room == "studies" and path.stem != "packed"):
            continue
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
