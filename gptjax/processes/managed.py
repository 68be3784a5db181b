"""The machines of a managed training job, from the variables of the service. Nothing here imports JAX.

Vertex AI custom jobs: CLUSTER_SPEC. SageMaker training jobs: resourceconfig.json, or SM_HOSTS and SM_CURRENT_HOST where
its toolkit starts the command. Huawei ModelArts (and Volcano, on which it is built): VC_WORKER_HOSTS and VC_TASK_INDEX.
"""

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.errors import UserError

VERTEX, SAGEMAKER, MODELARTS = "Vertex AI", "SageMaker", "ModelArts"
SAGEMAKER_CONFIG = "/opt/ml/input/config"
POOLS = ("workerpool0", "workerpool1")  # the primary and the workers; others are parameter servers and evaluators


class Job(NamedTuple):
    """`rank` is the number of this machine among `hosts`; process 0 listens on `port` of the first."""

    service: str
    hosts: tuple[str, ...]
    rank: int
    port: int


def find(environment: Mapping[str, str]) -> Job | None:
    """The job of this machine; None outside of managed training. Raises UserError where the variables do not fit."""
    if "CLUSTER_SPEC" in environment:
        return _vertex(environment)
    if {"SM_HOSTS", "TRAINING_JOB_NAME", "TRAINING_JOB_ARN"} & environment.keys():
        return _sagemaker(environment)
    if {"VC_WORKER_HOSTS", "MA_JOB_DIR"} & environment.keys():
        return _modelarts(environment)
    return None


def _vertex(environment: Mapping[str, str]) -> Job:
    """{"cluster": {"workerpool0": ["HOST:PORT"], ...}, "task": {"type": "workerpool1", "index": 0}}."""
    spec = read("CLUSTER_SPEC", environment["CLUSTER_SPEC"])
    try:
        pools = {pool: [str(address) for address in spec["cluster"].get(pool, ())] for pool in POOLS}
        pool, index = spec["task"]["type"], int(spec["task"]["index"])
        port = int(pools[POOLS[0]][0].rpartition(":")[2])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise UserError(f"CLUSTER_SPEC={environment['CLUSTER_SPEC'][:300]}: no cluster of worker pools") from None
    if pool not in POOLS or not 0 <= index < len(pools[pool]):
        raise UserError(f"CLUSTER_SPEC: task {index} of {pool}; gptjax must run in {' or '.join(POOLS)} only")
    hosts = tuple(address.rpartition(":")[0] for address in (*pools[POOLS[0]], *pools[POOLS[1]]))
    return Job(VERTEX, hosts, index + (len(pools[POOLS[0]]) if pool == POOLS[1] else 0), port)


def _sagemaker(environment: Mapping[str, str]) -> Job | None:
    if "SM_HOSTS" in environment:
        name, hosts = "SM_HOSTS", read("SM_HOSTS", environment["SM_HOSTS"])
        current = environment.get("SM_CURRENT_HOST")
    else:
        path = Path(SAGEMAKER_CONFIG) / "resourceconfig.json"
        if not path.exists():
            return None
        name, said = str(path), read(str(path), path.read_text(encoding="utf-8"))
        hosts, current = (said.get("hosts"), said.get("current_host")) if isinstance(said, dict) else (None, None)
    if not isinstance(hosts, list) or current not in hosts:
        raise UserError(f"{name}: this machine, {current!r}, is not one of {str(hosts)[:200]}")
    hosts = sorted(map(str, hosts), key=_natural)
    return Job(SAGEMAKER, tuple(hosts), hosts.index(current), _port(environment.get("TRAINING_JOB_NAME", ""), hosts))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key with which algo-10 follows algo-9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _modelarts(environment: Mapping[str, str]) -> Job:
    hosts = [host for host in environment.get("VC_WORKER_HOSTS", "localhost").split(",") if host]
    index = environment.get("VC_TASK_INDEX") or "0"
    for name in ("MA_NUM_HOSTS", "VC_WORKER_NUM"):
        if (count := environment.get(name)) and count != str(len(hosts)):
            raise UserError(f"{name}={count}, and VC_WORKER_HOSTS names {len(hosts)} machines")
    if not index.isdecimal() or int(index) >= len(hosts):
        raise UserError(f"VC_TASK_INDEX={index!r} with {len(hosts)} machines: expected 0 to {len(hosts) - 1}")
    return Job(MODELARTS, tuple(hosts), int(index), _port("", hosts))


def read(name: str, text: str) -> Any:
    """The value of a JSON text. Raises UserError with `name` if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"{name} is not JSON: {text[:200]!r}") from None


def _port(name: str, hosts: list[str]) -> int:
    """A port for the job, below the range that the kernel gives to outgoing connections."""
    return 10_000 + 2 * (zlib.crc32(f"{name} {hosts}".encode()) % 11_000)
