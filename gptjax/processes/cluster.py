"""Which processes make up a run: from flags, torchrun, MPI, Slurm, managed training or Cloud TPU.

Nothing here imports JAX.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from absl import flags

from gptjax.errors import UserError
from gptjax.processes import managed

TPU_PORT = 8490  # libtpu itself uses 8471 to 8482
FLAGS = ("coordinator", "num_processes", "process_id")
_MOST_NODES = 100_000
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
    """Adds the flags of a run with several processes, which are not needed with Slurm and Cloud TPU."""
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
    if launched := _from_launcher(environment):
        return launched
    if "SLURM_STEP_NUM_TASKS" in environment:  # only srun sets it: a batch script or salloc's shell is one process
        return _from_slurm(environment)
    if job := managed.find(environment):
        return Cluster(f"{job.hosts[0]}:{job.port}", job.rank, job.hosts) if len(job.hosts) > 1 else None
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


class _Launcher(NamedTuple):
    """The variables that a launcher sets: size and rank among all processes, and among those on one machine."""

    name: str
    size: str
    rank: str
    local_size: str
    local_rank: str


# These are read before Slurm's: if srun started the launcher, Slurm's variables describe the launcher.
LAUNCHERS = (
    _Launcher("torchrun", "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"),
    _Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    _Launcher("mpirun", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    _Launcher(
        "mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"
    ),
)


def _from_launcher(environment: Mapping[str, str]) -> Cluster | None:
    """From RANK and WORLD_SIZE (torchrun, accelerate, Kubeflow's PyTorchJob), or the variables of an MPI.

    Raises UserError where the variables say that there are several processes, but not which one this is, or where
    process 0 is.
    """
    slurm = "SLURM_STEP_NUM_TASKS" in environment
    for launcher in LAUNCHERS:
        if (slurm and launcher.size == "PMI_SIZE") or not environment.get(launcher.size):  # srun sets PMI_SIZE as well
            continue
        count = _whole(environment, launcher.size)
        if count == 1 or (slurm and launcher.rank not in environment):  # exported by hand, for another program
            continue
        if launcher.rank not in environment:
            raise UserError(
                f"{launcher.size}={count} says that this is one of several processes, but {launcher.rank} is not set; "
                f"unset {launcher.size} for a run of one process, or start each with --coordinator, --num_processes "
                "and --process_id"
            )
        rank, local_rank = _whole(environment, launcher.rank), _whole(environment, launcher.local_rank, -1)
        if not 0 <= rank < count:
            raise UserError(f"{launcher.rank}={rank} with {launcher.size}={count}: expected 0 to {count - 1}")
        here = _whole(environment, launcher.local_size, -1)
        address = _address(environment, launcher, alone=here == count)
        share = _share_of_devices(environment, here, local_rank) if here > 0 and local_rank >= 0 else None
        return Cluster(address, rank, (address.rpartition(":")[0], *[""] * (count - 1)), share)
    return None


def _address(environment: Mapping[str, str], launcher: _Launcher, *, alone: bool) -> str:
    """HOST:PORT of process 0: MASTER_ADDR and MASTER_PORT, or a local port for an MPI job on one machine (`alone`)."""
    host, port = environment.get("MASTER_ADDR"), _whole(environment, "MASTER_PORT", 0)
    if host is None and alone and launcher.name == "mpirun":
        host = "127.0.0.1"
    if host is None:
        raise UserError(
            f"{launcher.size} is set, as by {launcher.name}, but MASTER_ADDR, the host of process 0, is not. Set "
            "MASTER_ADDR and MASTER_PORT for all processes (mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=9000 ...), use "
            "srun, or give each process --coordinator, --num_processes and --process_id"
        )
    if port and "TORCHELASTIC_RUN_ID" not in environment:
        return f"{host}:{port}"
    # torchrun itself listens on MASTER_PORT. The processes of an MPI job on one machine have the same parent.
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or str(os.getppid())
    return f"{host}:{10_000 + 2 * (zlib.crc32(f'{port} {job * (not port)}'.encode()) % 11_000)}"


def _whole(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch(r"\s*\d{1,9}\s*", text):
        raise UserError(f"{name}={text!r}: a launcher sets it to a whole number; unset it, or start with srun or flags")
    return int(text)


def _from_slurm(environment: Mapping[str, str]) -> Cluster | None:
    count = _whole(environment, "SLURM_STEP_NUM_TASKS")
    if count == 1:
        return None
    nodes = expand_nodes(environment.get("SLURM_STEP_NODELIST", ""))
    tasks = expand_tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if len(nodes) != len(tasks) or sum(tasks) != count:
        raise UserError(
            f"SLURM_STEP_NODELIST names {len(nodes)} nodes, and SLURM_STEP_TASKS_PER_NODE has {sum(tasks)} tasks on "
            f"{len(tasks)} nodes, but SLURM_STEP_NUM_TASKS={count}; give each "
            "process --coordinator, --num_processes and --process_id"
        )
    # Slurm's default distribution fills node after node. With another one, only the hosts in messages are wrong.
    hosts = tuple(node for node, number in zip(nodes, tasks, strict=True) for _ in range(number))
    # One port per job and job step, below the range that the kernel gives to outgoing connections.
    step = environment.get("SLURM_STEP_ID", "0")
    port = 10_000 + 2 * ((_whole(environment, "SLURM_JOB_ID") * 17 + (int(step) if step.isdigit() else 0)) % 11_000)
    here = tasks[_whole(environment, "SLURM_NODEID") % len(tasks)]
    return Cluster(
        f"{nodes[0]}:{port}",
        _whole(environment, "SLURM_PROCID"),
        hosts,
        _share_of_devices(environment, here, _whole(environment, "SLURM_LOCALID")),
    )


def _share_of_devices(environment: Mapping[str, str], tasks: int, local_id: int) -> tuple[int, ...] | None:
    """The GPUs of this task if several tasks on a node see the same GPUs: each takes an equal share."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    count = len(visible.split(",")) if visible else tasks
    if tasks == 1 or count < tasks:
        return None
    share = count // tasks
    return tuple(range(local_id * share, (local_id + 1) * share))


def expand_nodes(text: str) -> list[str]:
    """["n01", "n02", "gpu7"] from Slurm's "n[01-02],gpu7"; if a name has several brackets, the last counts fastest.

    Raises UserError where it is not such a list.
    """
    nodes: list[str] = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        parts = re.split(r"\[([^\]]*)\]", name)  # text, numbers, text, numbers, ..., text
        choices = [_expand_numbers(part, text) if i % 2 else [part] for i, part in enumerate(parts)]
        if math.prod(map(len, choices)) > _MOST_NODES:
            raise UserError(f"SLURM_STEP_NODELIST={text[:100]} names more than {_MOST_NODES} nodes")
        nodes += ["".join(parts) for parts in itertools.product(*choices)]
    return nodes


def _expand_numbers(text: str, whole: str) -> list[str]:
    """["08", "09", "10", "12"] from "08-10,12"."""
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if not match or int(match[2] or match[1]) - int(match[1]) not in range(_MOST_NODES):
            raise UserError(f"SLURM_STEP_NODELIST={whole[:100]}: {part!r} is not a range of nodes such as 01-16")
        first, last = match[1], match[2] or match[1]
        numbers += [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return numbers


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
