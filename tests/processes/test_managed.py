"""Managed training: the machines of a job, the command of its container, and a run on two machines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from gptjax import cli, launch
from gptjax.errors import UserError
from gptjax.launchers import managed as entry
from gptjax.processes import cluster, managed

REPOSITORY = Path(__file__).parents[2]
CONFIG = """
from gptjax.config import get_default

def get_config():
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(split_by="position", validation_fraction=0.1, cache_dir="{cache}")
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16)
    config.train.update(num_steps=4, batch_size=4, checkpoint_every=4)
    config.evaluation.update(every=4, max_tokens=200, batch_size=4)
    config.logging.update(every=1, samples=0, tensorboard=False)
    return config
"""


def vertex(rank: int, hosts: tuple[str, ...] = ("h0", "h1"), port: int = 2222) -> dict[str, str]:
    pools = {"workerpool0": [f"{hosts[0]}:{port}"], "workerpool1": [f"{host}:{port}" for host in hosts[1:]]}
    task = {"type": "workerpool1" if rank else "workerpool0", "index": max(rank - 1, 0), "trial": ""}
    return {"CLUSTER_SPEC": json.dumps({"cluster": pools, "environment": "cloud", "task": task})}


def sagemaker(rank: int, hosts: tuple[str, ...] = ("algo-1", "algo-2")) -> dict[str, str]:
    return {"SM_HOSTS": json.dumps(hosts), "SM_CURRENT_HOST": hosts[rank], "TRAINING_JOB_NAME": "job"}


def modelarts(rank: int, hosts: tuple[str, ...] = ("w-0.job", "w-1.job")) -> dict[str, str]:
    number = str(len(hosts))
    names = {"VC_WORKER_HOSTS": ",".join(hosts), "VC_TASK_INDEX": str(rank)}
    return names | {
        "MA_NUM_HOSTS": number,
        "VC_WORKER_NUM": number,
        "MA_JOB_DIR": "/home/ma-user/modelarts/user-job-dir",
    }


SERVICES = [vertex, sagemaker, modelarts]


def find(environment: dict[str, str]) -> cluster.Cluster | None:
    options = flags.FlagValues()
    cluster.define_flags(options)
    options(["train"])
    return cluster.find(options, environment)


@pytest.mark.parametrize("service", SERVICES)
def test_the_machines_of_a_job_are_one_run(service):
    first, second = find(service(0)), find(service(1))
    assert (first.process_id, second.process_id, first.num_processes) == (0, 1, 2)
    assert first.address == second.address and first.hosts == second.hosts
    assert first.address.startswith(f"{first.hosts[0]}:")


@pytest.mark.parametrize("service", SERVICES)
def test_a_job_of_one_machine_is_a_run_of_one_process(service):
    assert find(service(0, hosts=("h",))) is None


def test_sagemaker_without_its_toolkit_writes_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(managed, "SAGEMAKER_CONFIG", str(tmp_path))
    hosts = [f"algo-{i}" for i in (1, 10, 2)]
    (tmp_path / "resourceconfig.json").write_text(json.dumps({"current_host": "algo-10", "hosts": hosts}))
    found = find({"TRAINING_JOB_NAME": "job"})
    assert found.hosts == ("algo-1", "algo-2", "algo-10") and found.process_id == 2


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CLUSTER_SPEC": "{"}, "CLUSTER_SPEC is not JSON"),
        ({"CLUSTER_SPEC": "[]"}, "no cluster of worker pools"),
        ({"CLUSTER_SPEC": vertex(1)["CLUSTER_SPEC"].replace('"type": "workerpool1"', '"type": "workerpool2"')}, "only"),
        (sagemaker(0) | {"SM_CURRENT_HOST": "algo-3"}, "'algo-3', is not one of"),
        (modelarts(0) | {"VC_TASK_INDEX": "2"}, "expected 0 to 1"),
        (modelarts(0) | {"MA_NUM_HOSTS": "3"}, "MA_NUM_HOSTS=3, and VC_WORKER_HOSTS names 2 machines"),
    ],
)
def test_variables_that_do_not_fit(environment, said):
    with pytest.raises(UserError, match=said):
        managed.find(environment)


def resolved(environment: dict[str, str], *arguments: str) -> list[str]:
    return entry.resolve(launch.parse(["managed", *arguments]), environment)[3:]


def test_vertex_ai_keeps_checkpoints_in_a_bucket_of_all_machines():
    where = {
        "AIP_MODEL_DIR": "gs://b/model/",
        "AIP_CHECKPOINT_DIR": "gs://b/checkpoints/",
        "AIP_TRAINING_DATA_URI": "gs://d/",
    }
    command = resolved(vertex(1) | where, "--config=c", "--", "--config.data.source=text:{input:data}/*.txt")
    assert command == ["--config=c", "--workdir=gs://b/checkpoints", "--config.data.source=text:gs://d/*.txt"]


def test_sagemaker_gives_channels_and_hyper_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr(managed, "SAGEMAKER_CONFIG", str(tmp_path))
    monkeypatch.setattr(entry, "CHECKPOINTS", str(tmp_path))
    given = {"config": '"c"', "config.train.num_steps": "5", "sagemaker_program": '"x"'}
    (tmp_path / "hyperparameters.json").write_text(
        json.dumps(given | {"config.data.source": "text:{input:training}/a"})
    )
    channel = {"SM_CHANNEL_TRAINING": "/opt/ml/input/data/training"}
    command = resolved(sagemaker(0, hosts=("algo-1",)) | channel, "train")
    assert command == [
        "--config=c",
        f"--workdir={tmp_path}",
        "--config.train.num_steps=5",
        "--config.data.source=text:/opt/ml/input/data/training/a",
    ]
    with pytest.raises(UserError, match="is local to each machine"):
        resolved(sagemaker(0), "train")
    with pytest.raises(UserError, match=r"SageMaker has no input 'test'; inputs: \['training'\]"):
        resolved(sagemaker(0) | channel, "--workdir=gs://b/a", "--", "--config.data.source=text:{input:test}")


def test_modelarts_puts_its_folders_behind_the_command():
    mount = "/home/ma-user/modelarts"
    command = resolved(
        modelarts(0, hosts=("w",)) | {"MA_MOUNT_PATH": mount},
        *("--config=c", "--", "--config.data.source=text:{input:data_url}/*.txt"),
        *(f"--data_url={mount}/inputs/data_url_0", f"--train_url={mount}/outputs/train_url_0/"),
    )
    source = f"--config.data.source=text:{mount}/inputs/data_url_0/*.txt"
    assert command == ["--config=c", f"--workdir={mount}/outputs/train_url_0", source]


def test_outside_of_managed_training(capsys):
    assert cli.run(launch.main, ["gptjax launch", "managed", "--config=c"]) == 2
    assert "this is not a job of Vertex AI, SageMaker or ModelArts" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("service", SERVICES)
def test_two_containers_train_one_model(service, tiny_corpus, tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG.format(cache=tmp_path / "cache"))
    hosts = (f"127.0.0.{os.getpid() % 250 + 2}", "localhost")  # two names of this machine
    more = {"port": 10_000 + 2 * (os.getpid() % 11_000)} if service is vertex else {}
    jax = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, "-m", "gptjax.launch", "managed", f"--config={tmp_path}/tiny.py"]
    machines = [
        subprocess.Popen(
            [*command, f"--workdir={tmp_path}/run", "--", f"--config.data.source=text:{tiny_corpus}/*.txt"],
            env=os.environ | service(rank, hosts, **more) | jax,
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [machine.communicate(timeout=240)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["devices"]["processes"] == 2
