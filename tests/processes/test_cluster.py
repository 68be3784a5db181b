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
    ],
)
def test_node_lists_of_slurm(text, nodes):
    assert cluster.expand_nodes(text) == nodes


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
