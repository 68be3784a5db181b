"""Which processes make up a run: from flags, Slurm or Cloud TPU. Nothing here imports JAX."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

from absl import flags

from gptjax.errors import UserError

TPU_PORT = 8490  # beside those that libtpu uses, 8471 to 8482
FLAGS = ("coordinator", "num_processes", "process_id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, and the number of this process.

    Attributes:
      address: HOST:PORT of process 0. JAX uses PORT + 1.
      hosts: the expected host of each process; "" where it is not known.
      local_devices: the GPUs of this process among those it sees; None = all.
    """

    address: str
    process_id: int
    hosts: tuple[str, ...]
    local_devices: tuple[int, ...] | None = None

    @property
    def num_processes(self) -> int:
        return len(self.hosts)

    def describe(self, process: int) -> str:
        """ "process 1 (host n1)"."""
        host = self.hosts[process]
        return f"process {process} (host {host})" if host else f"process {process}"


def define_flags(flag_values: flags.FlagValues) -> None:
    """Adds the flags of a run with several processes; Slurm and Cloud TPU need none of them."""
    define = dict(flag_values=flag_values)
    flags.DEFINE_string(
        "coordinator", None, "several processes: HOST:PORT of process 0, e.g. --coordinator=10.0.0.1:9000", **define
    )
    flags.DEFINE_integer("num_processes", None, "number of processes in the run, e.g. --num_processes=2", **define)
    flags.DEFINE_integer("process_id", None, "number of this process, from 0, e.g. --process_id=1", **define)
    flags.DEFINE_float("join_timeout", 50, "seconds to wait for all processes, e.g. --join_timeout=300", **define)


def find(options: flags.FlagValues, environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """The cluster of this process, or None for a run of one process. Raises UserError where the flags do not fit."""
    given = {name: getattr(options, name) for name in FLAGS if getattr(options, name) is not None}
    if given or all(name in environment for name in VARIABLES):
        return _from_flags(given, environment)
    if "SLURM_STEP_NUM_TASKS" in environment:  # only srun sets it: a batch script or salloc's shell is one process
        return _from_slurm(environment)
    return _from_tpu(environment)


def _from_flags(given: Mapping[str, str | int], environment: Mapping[str, str]) -> Cluster | None:
    values = {name: given.get(name, environment.get(variable)) for name, variable in zip(FLAGS, VARIABLES, strict=True)}
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if missing:
        raise UserError(f"a run with several processes also needs {' and '.join(missing)}")
    address = str(values["coordinator"])
    if not re.fullmatch(r"(\[[\da-fA-F:]+\]|[^:]+):\d+", address):
        raise UserError(f"--coordinator={address}: expected HOST:PORT of process 0, such as 10.0.0.1:9000")
    try:
        count, process_id = int(values["num_processes"]), int(values["process_id"])
    except ValueError:
        raise UserError(f"{VARIABLES[1]} and {VARIABLES[2]} must be whole numbers") from None
    if not 0 <= process_id < count:
        raise UserError(f"--process_id={process_id} with --num_processes={count}: expected 0 to {count - 1}")
    hosts = (address.rpartition(":")[0], *[""] * (count - 1))
    return Cluster(address, process_id, hosts) if count > 1 else None


def _from_slurm(environment: Mapping[str, str]) -> Cluster | None:
    count = int(environment["SLURM_STEP_NUM_TASKS"])
    if count == 1:
        return None
    nodes = expand_nodes(environment["SLURM_STEP_NODELIST"])
    tasks = expand_tasks(environment["SLURM_STEP_TASKS_PER_NODE"])
    # Slurm's default distribution fills node after node. With another one, only messages name wrong hosts.
    hosts = tuple(node for node, number in zip(nodes, tasks, strict=True) for _ in range(number))
    # One port per job and job step, below the range that the kernel gives to outgoing connections.
    step = environment.get("SLURM_STEP_ID", "0")
    port = 10_000 + 2 * ((int(environment["SLURM_JOB_ID"]) * 17 + (int(step) if step.isdigit() else 0)) % 11_000)
    here = tasks[int(environment["SLURM_NODEID"])]
    return Cluster(
        f"{nodes[0]}:{port}",
        int(environment["SLURM_PROCID"]),
        hosts,
        _share_of_devices(environment, here, int(environment["SLURM_LOCALID"])),
    )


def _share_of_devices(environment: Mapping[str, str], tasks: int, local_id: int) -> tuple[int, ...] | None:
    """The GPUs of this task, where several tasks on a node see the same GPUs: each takes its part."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    count = len(visible.split(",")) if visible else tasks
    if tasks == 1 or count < tasks:
        return None
    share = count // tasks
    return tuple(range(local_id * share, (local_id + 1) * share))


def expand_nodes(text: str) -> list[str]:
    """["n01", "n02", "gpu7"] from Slurm's "n[01-02],gpu7"."""
    nodes = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        prefix, bracket, rest = name.partition("[")
        if not bracket:
            nodes.append(name)
            continue
        numbers, _, suffix = rest.partition("]")
        for part in numbers.split(","):
            first, _, last = part.partition("-")
            nodes += [f"{prefix}{i:0{len(first)}}{suffix}" for i in range(int(first), int(last or first) + 1)]
    return nodes


def expand_tasks(text: str) -> list[int]:
    """[2, 2, 1] from Slurm's "2(x2),1"."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in counts for _ in range(int(times or 1))]


def _from_tpu(environment: Mapping[str, str]) -> Cluster | None:
    """Cloud TPU: GKE sets variables, a TPU VM asks its metadata server. Several slices form one run."""
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if environment.get("JAX_PLATFORMS") not in (None, "", "tpu") or "TPU_SKIP_MDS_QUERY" in environment:
        return None
    try:
        if workers:
            names, worker, slices = workers.split(","), int(environment["TPU_WORKER_ID"]), environment
        elif has_tpu():
            # "name:id:address" per worker, or only names
            names = [entry.split(":")[-1] for entry in _metadata("worker-network-endpoints").split(",")]
            worker = int(_metadata("agent-worker-number"))
            slices = dict(re.findall(r"(\w+): '([^']*)'", _metadata("tpu-env"))) | dict(environment)
        else:
            return None
    except OSError:  # no metadata server: a TPU machine outside Google Cloud
        return None
    names = [name.split(":")[0] for name in names]
    count, number = int(slices.get("MEGASCALE_NUM_SLICES") or 1), int(slices.get("MEGASCALE_SLICE_ID") or 0)
    if count * len(names) == 1:
        return None
    first = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).split(":")[0]
    hosts = [""] * (count * len(names))
    hosts[number * len(names) : (number + 1) * len(names)] = names
    return Cluster(f"{first}:{TPU_PORT}", number * len(names) + worker, tuple(hosts))


def has_tpu() -> bool:
    """Whether this machine has a TPU and the library for it."""
    devices = (*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*"))
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def _metadata(key: str) -> str:
    import urllib.request

    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()
