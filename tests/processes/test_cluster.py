import http.server
import threading

import pytest
from absl import flags

from gptjax.errors import UserError
from gptjax.processes import cluster

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}


def find(*arguments: str, **environment: str):
    options = flags.FlagValues()
    cluster.define_flags(options)
    options(["train", *arguments])
    return cluster.find(options, environment)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n0", ["n0"]),
        ("n[0-1],gpu7", ["n0", "n1", "gpu7"]),
        ("n[08-10,12]", ["n08", "n09", "n10", "n12"]),
        ("a[1,3]-ib,b", ["a1-ib", "a3-ib", "b"]),
        # As `scontrol show hostnames` has them:
        ("n[1-2]r[3-4]", ["n1r3", "n1r4", "n2r3", "n2r4"]),
        ("rack[0-1]n[08-09,11],login", [f"rack{r}n{n}" for r in "01" for n in ("08", "09", "11")] + ["login"]),
        ("a[1-2]b[0-1]c[7]d", ["a1b0c7d", "a1b1c7d", "a2b0c7d", "a2b1c7d"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_node_lists_of_slurm(text, nodes):
    assert cluster.expand_nodes(text) == nodes


@pytest.mark.parametrize("text", ["n[1-x]", "n[]", "n[3-1]", "n[1-999999999]", "a[1-900]b[1-900]"])
def test_node_lists_that_are_none(text):
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST"):
        cluster.expand_nodes(text)


def test_lists_of_slurm_that_do_not_fit():
    with pytest.raises(UserError, match=r"3 nodes, and .* 3 tasks on 2 nodes"):
        find(**SLURM | {"SLURM_STEP_NODELIST": "n[0-2]"})


TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h0"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
MASTER = {"MASTER_ADDR": "h0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("launcher", [TORCHRUN, OPEN_MPI, MPICH])
def test_other_launchers_form_the_run(launcher):
    found = find(**launcher | MASTER, CUDA_VISIBLE_DEVICES="0,1")
    assert (found.process_id, found.num_processes, found.address) == (3, 4, "h0:29500")
    assert found.local_devices == (1,)


def test_the_port_on_which_torchrun_listens_is_not_used():
    addresses = {find(**TORCHRUN, MASTER_PORT="29500", TORCHELASTIC_RUN_ID="x").address for _ in range(2)}
    assert len(addresses) == 1 and "h0:29500" not in addresses


@pytest.mark.parametrize("launcher", [OPEN_MPI, MPICH])
def test_mpi_on_one_machine_needs_no_address(launcher):
    here = {name: "4" for name in launcher if name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")}
    assert find(**launcher | here).address.startswith("127.0.0.1:")
    with pytest.raises(UserError, match="but MASTER_ADDR, the host of process 0, is not"):
        find(**launcher)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 .* RANK is not set; unset WORLD_SIZE"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE='x': a launcher sets it to a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"} | MASTER, "RANK=2 with WORLD_SIZE=2: expected 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but MASTER_ADDR, the host"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "-"} | MASTER, "OMPI_COMM_WORLD_RANK='-'"),
    ],
)
def test_other_launchers_that_do_not_fit(environment, said):
    with pytest.raises(UserError, match=said):
        find(**environment)


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": ""}])
def test_a_launcher_of_one_process_is_harmless(environment):
    assert find(**environment) is None
    assert find(**environment, OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_RANK="0") is None


def test_slurm_and_what_is_exported_in_its_script():
    assert find(**SLURM, WORLD_SIZE="8", PMI_SIZE="3", PMI_RANK="1", **MASTER).address.startswith("n0:")
    inner = find(**SLURM, **TORCHRUN, MASTER_PORT="29500")  # torchrun, started by srun
    assert (inner.num_processes, inner.process_id) == (4, 3)


@pytest.mark.parametrize(("text", "tasks"), [("1(x2)", [1, 1]), ("2(x2),1", [2, 2, 1]), ("4", [4])])
def test_task_counts_of_slurm(text, tasks):
    assert cluster.expand_tasks(text) == tasks


def test_alone_without_flags_or_cluster():
    assert find() is None
    assert find("--coordinator=h:1", "--num_processes=1", "--process_id=0") is None


def test_slurm_by_its_step():
    found = find(**SLURM)
    assert (found.process_id, found.num_processes, found.hosts) == (1, 3, ("n0", "n0", "n1"))
    assert found.address.startswith("n0:")
    assert found.describe(2) == "process 2 (host n1)"


def test_steps_of_a_job_use_different_ports():
    addresses = {find(**SLURM | {"SLURM_STEP_ID": str(step)}).address for step in range(8)}
    ports = {int(address.split(":")[1]) for address in addresses}
    assert len(ports) == 8 and not ports & {port + 1 for port in ports}, "JAX has the port after each"


def test_a_batch_script_or_an_allocation_without_srun_is_one_process():
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_NTASKS": "3"}
    assert find(**batch) is None
    assert find(**SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("visible", "share"),
    [("0,1", (1,)), ("0,1,2,3", (2, 3)), ("GPU-7", None), ("", (1,))],
)
def test_tasks_of_a_node_share_the_gpus_that_all_see(visible, share):
    assert find(**SLURM, CUDA_VISIBLE_DEVICES=visible).local_devices == share


def test_flags_win_over_slurm():
    found = find("--coordinator=10.0.0.1:9000", "--num_processes=2", "--process_id=1", **SLURM)
    assert (found.address, found.process_id, found.num_processes) == ("10.0.0.1:9000", 1, 2)


def test_the_variables_of_jax_are_read():
    environment = {"JAX_COORDINATOR_ADDRESS": "h:9", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    assert find(**environment).address == "h:9"
    assert find("--process_id=1", **environment).process_id == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num_processes=2"], "--coordinator and --process_id"),
        (["--coordinator=h", "--num_processes=2", "--process_id=0"], "expected HOST:PORT"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "expected 0 to 1"),
    ],
)
def test_flags_that_do_not_fit(arguments, said):
    with pytest.raises(UserError, match=said):
        find(*arguments)


def test_tpu_pods_of_gke():
    environment = {"TPU_WORKER_HOSTNAMES": "w0,w1", "TPU_WORKER_ID": "1"}
    found = find(**environment)
    assert (found.process_id, found.hosts) == (1, ("w0", "w1"))
    slices = {
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "first:8080",
    }
    found = find(**environment, **slices)
    assert (found.process_id, found.hosts) == (3, ("", "", "w0", "w1"))
    assert found.address.startswith("first:")
    assert find(**environment | {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert find(**environment, JAX_PLATFORMS="cpu") is None


def test_tpu_virtual_machines_ask_their_metadata_server(monkeypatch):
    answers = {
        "worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3",
        "agent-worker-number": "1",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nWORKER_ID: '1'\n",
    }

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[self.path.rpartition("/")[2]].encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(cluster, "has_tpu", lambda: True)
    found = find()
    server.shutdown()
    assert (found.process_id, found.hosts) == (1, ("10.0.0.2", "10.0.0.3"))
    assert found.address == f"10.0.0.2:{cluster.TPU_PORT}"
