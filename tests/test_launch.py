"""`gptjax launch` with --dry_run, and with stand-ins of gcloud."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from gptjax import cli, launch
from gptjax.launchers import tpu, tpu_slice


@pytest.fixture
def dry_run(capsys, monkeypatch):
    """Runs the verb with --dry_run: (status, output, errors). Nothing may be started."""

    def forbidden(*arguments, **options):
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(subprocess, "run", forbidden)
    monkeypatch.setattr(subprocess, "Popen", forbidden)

    def run(text: str):
        status = cli.run(launch.main, ["gptjax launch", *shlex.split(text)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


# (topology, chips, hosts, chips a host, accelerator type): from the tables of Google's "TPU versions" pages.
SLICES = [
    ("v4:2x2x1", 4, 1, 4, "v4-8"),
    ("v4:4x4x4", 64, 16, 4, "v4-128"),
    ("v5e:1x1", 1, 1, 1, "v5litepod-1"),
    ("v5e:2x4", 8, 1, 8, "v5litepod-8"),
    ("v5e:4x4", 16, 4, 4, "v5litepod-16"),
    ("v5e:16x16", 256, 64, 4, "v5litepod-256"),
    ("v5p:2x2x2", 8, 2, 4, "v5p-16"),
    ("v5p:8x8x8", 512, 128, 4, "v5p-1024"),
    ("v6e:2x4", 8, 1, 8, "v6e-8"),
    ("v6e:16x16", 256, 64, 4, "v6e-256"),
]


@pytest.mark.parametrize(("text", "chips", "hosts", "chips_per_host", "accelerator_type"), SLICES)
def test_slices(text, chips, hosts, chips_per_host, accelerator_type):
    found = tpu_slice.Slice.parse(text)
    assert (found.chips, found.hosts, found.chips_per_host) == (chips, hosts, chips_per_host)
    assert found.generation.accelerator_type(chips) == accelerator_type


@pytest.mark.parametrize(
    ("text", "said"),
    [("v3:2x2", "v4, v5e, v5p, v6e"), ("v5e:4x4x4", "2 dimensions"), ("v5p:4x4", "v5p:4x4x4"), ("v5e:3x3", "9 chips")],
)
def test_a_topology_that_does_not_exist(dry_run, text, said):
    status, _, errors = dry_run(f"tpu create --name=a --zone=z --topology={text} --dry_run")
    assert status == 2 and said in errors


def test_slurm_script(dry_run):
    status, text, _ = dry_run(
        "slurm --nodes=4 --gpus_per_node=8 --time=2:00:00 --config=c.py:x --workdir='/shared/my run' --python=python "
        "--dry_run -- --config.train.num_steps=5"
    )
    assert status == 0
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for setting in ("nodes=4", "ntasks-per-node=1", "gpus-per-node=8", "time=2:00:00", "signal=TERM@120"):
        assert f"#SBATCH --{setting}" in lines
    assert not any("partition" in line for line in lines)
    command = shlex.split(lines[-1])
    assert command[:2] == ["exec", "srun"]
    train = ["python", "-m", "gptjax.train", "--config=c.py:x", "--workdir=/shared/my run"]
    assert command[-6:] == [*train, "--config.train.num_steps=5"]


def test_tpu_machines(dry_run):
    where = "--name=a --zone=us-west4-a --topology=v5e:4x4 --dry_run"
    _, text, _ = dry_run(f"tpu create {where} --spot")
    assert text == (
        "gcloud compute tpus queued-resources create a --zone=us-west4-a --node-id=a "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot\n"
    )
    _, text, _ = dry_run(f"tpu describe {where}")
    assert text == "gcloud compute tpus queued-resources describe a --zone=us-west4-a\n"
    _, text, _ = dry_run(f"tpu delete {where} --project=p")
    assert text == "gcloud compute tpus queued-resources delete a --zone=us-west4-a --project=p --force --quiet\n"


def test_tpu_training_runs_on_all_workers_of_all_slices(dry_run):
    where = "--name=a --zone=z --topology=v6e:16x16 --slices=2 --bucket=b --dry_run"
    _, text, _ = dry_run(f"tpu create {where}")
    assert "--node-count=2 --node-prefix=a" in text and "--node-id" not in text
    status, text, _ = dry_run(f"tpu train {where} --config=c.py --workdir=runs/a -- --config.train.num_steps=5")
    commands = [shlex.split(line) for line in text.splitlines()]
    assert status == 0 and [command[5] for command in commands] == ["a-0", "a-1"]
    for command in commands:
        assert "--worker=all" in command
        remote = command[-1].removeprefix("--command=")
        assert remote.endswith(
            ".venv/bin/python -m gptjax.train --config=c.py --workdir=/mnt/gptjax/runs/a --config.train.num_steps=5"
        )
        assert "gcsfuse --implicit-dirs b /mnt/gptjax" in remote
    assert dry_run(f"tpu setup {where}")[1].count("--worker=all") == 4
    status, _, errors = dry_run("tpu train --name=a --zone=z --topology=v5e:4x4 --dry_run")
    assert status == 2 and "--bucket" in errors


@pytest.mark.parametrize(("topology", "chips", "hosts", "chips_per_host", "_"), SLICES)
def test_jobset(dry_run, topology, chips, hosts, chips_per_host, _):
    where = f"--name=a --topology={topology} --slices=3 --image=i --bucket=b --config=c.py --workdir=runs/a --dry_run"
    status, text, _ = dry_run(f"""gke {where} -- "--config.logging.sample_prompt=it's" """)
    assert status == 0
    manifest = yaml.safe_load(text)
    assert manifest["kind"] == "JobSet"
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == 3
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == hosts
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": tpu_slice.GENERATIONS[topology.partition(":")[0]].gke_accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": chips_per_host}
    train = ["python", "-m", "gptjax.train", "--config=c.py", "--workdir=/mnt/gptjax/runs/a"]
    assert container["command"] == [*train, "--config.logging.sample_prompt=it's"]


TPU = "tpu train --zone=z --bucket=bucket --config=c.py --workdir=runs/a"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("slurm --config=c --workdir=w --nodes=0", "argument --nodes: 0 is not between 1 and 100000"),
        ("slurm --config=c --workdir=w --nodes=two", "argument --nodes: 'two' is not a whole number"),
        ("slurm --config=c --workdir=w --nodes=nan", "argument --nodes: 'nan' is not a whole number"),
        ("slurm --config=c --workdir=w --nodes=1e30", "argument --nodes: 1e30 is not between 1 and 100000"),
        ("slurm --config=c --workdir=w --gpus_per_node=-1", "argument --gpus_per_node: -1 is not between 0 and 64"),
        ("slurm --config=c --workdir=w --time=soon", "argument --time: 'soon' is not a time such as 24:00:00"),
        ("slurm --config=c --workdir=''", "argument --workdir: '' is not a name"),
        ("slurm --config=c --workdir=w --name='a b'", "argument --name: 'a b' is not a name of letters"),
        ("slurm --config=c --workdir=w --account='a\n#SBATCH x'", "argument --account: 'a\\n#SBATCH x' is not a name"),
        (f"{TPU} --name=a --topology=h100:8", "--topology=h100:8: the generations are v4, v5e, v5p, v6e"),
        (f"{TPU} --name=a --topology=v5e:9999x9999", "99980001 chips; the largest slice has 8960"),
        (f"{TPU} --name=a --topology=v5e:4x4 --slices=0", "argument --slices: 0 is not between 1 and 256"),
        (f"{TPU} --name=A_b --topology=v5e:4x4", "argument --name: 'A_b' is not a name of lower-case letters"),
        (
            f"{TPU} --name=a --topology=v5e:4x4 --bucket=gs://b",
            "argument --bucket: 'gs://b' is not the name of a bucket",
        ),
    ],
)
def test_what_cannot_be_started_is_refused_in_the_last_line(dry_run, arguments, words):
    status, _, errors = dry_run(f"{arguments} --dry_run")
    last = errors.strip().splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and words in last, last


def test_a_whole_number_may_be_written_in_another_way(dry_run):
    status, script, _ = dry_run("slurm --config=c --workdir=w --nodes=2.0 --gpus_per_node=8 --dry_run")
    assert status == 0 and "--nodes=2\n" in script


BUCKET = "--config=configs/gpt2_124m.py --workdir=gs://bucket/runs/a"
GOLDEN = {
    "slurm": "slurm --nodes=4 --gpus_per_node=8 --config=c.py --workdir=/shared/a --python=python",
    "slurm_requeue": "slurm --requeue --time=24:00:00 --config=c.py --workdir=/shared/a --python=python",
    "tpu_bucket": f"tpu train --name=a --zone=z --topology=v6e:4x4 {BUCKET}",
    "gke_mounted": "gke --name=a --topology=v5e:4x4 --image=i --bucket=b --config=c.py --workdir=runs/a",
    "gke_bucket": f"gke --name=a --topology=v5p:4x4x4 --slices=2 --image=i {BUCKET}",
    "sky": f"sky --nodes=2 --accelerators=H100:8 --spot --infra=gcp/us-central1 {BUCKET}",
    "sky_tpu": f"sky --name=b --accelerators=tpu-v5litepod-16 {BUCKET}",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_an_engine_is_given_is_the_golden_text(dry_run, name, update_golden):
    status, text, errors = dry_run(f"{GOLDEN[name]} --dry_run -- --config.train.num_steps=5")
    file = Path(__file__).parent / "golden" / "launch" / f"{name}.txt"
    if update_golden:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert status == 0, errors
    assert text == file.read_text(), "if that is meant: pytest tests/test_launch.py --update-golden"


@pytest.mark.parametrize("name", ["sky", "sky_tpu"])
def test_skypilot_reads_its_task(dry_run, name, tmp_path):
    sky = pytest.importorskip("sky")
    file = tmp_path / "task.yaml"
    file.write_text(dry_run(f"{GOLDEN[name]} --dry_run")[1])
    task = sky.Task.from_yaml(str(file))
    (machine,) = task.resources
    wanted = {"sky": ({"H100": 8}, True, 2), "sky_tpu": ({"tpu-v5litepod-16": 1}, False, 1)}[name]
    assert (machine.accelerators, machine.use_spot, task.num_nodes) == wanted
    assert machine.job_recovery["max_restarts_on_errors"] == 3
    assert task.run.splitlines()[0] == "set -eu" and ("SKYPILOT_NODE_RANK" in task.run) == (name == "sky")


def test_the_script_of_a_skypilot_task_joins_its_machines(capsys):
    assert cli.run(launch.main, ["gptjax launch", *shlex.split(GOLDEN["sky"]), "--dry_run"]) == 0
    script = yaml.safe_load(capsys.readouterr().out)["run"]
    script = script.replace("exec ~/gptjax-venv/bin/python", "printf '%s\\n'")
    machines = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    told = subprocess.run(["bash", "-c", script], env=os.environ | machines, capture_output=True, text=True, check=True)
    assert told.stdout.split()[-3:] == ["--coordinator=10.0.0.1:9800", "--num_processes=2", "--process_id=1"]


def test_machines_of_skypilot_need_a_bucket(dry_run):
    status, _, errors = dry_run("sky --accelerators=H100 --config=c --workdir=runs/a --dry_run")
    assert status == 2 and "expected gs://BUCKET/PATH" in errors


GCLOUD = """#!/bin/bash
# A queued resource whose machines are taken away in the first training: its state is a file.
cd "$(dirname "$0")"
echo "$*" | cut -c1-60 >> calls
case "$*" in
*describe*) [ -f state ] && cat state || { echo "NOT_FOUND: no such resource" >&2; exit 1; } ;;
*create*) echo ACTIVE > state ;;
*delete*) rm state ;;
*gptjax.train*) [ -f taken ] || { touch taken; echo "${LEFT:-SUSPENDED}" > state; exit 1; } ;;
esac
"""


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """The calls of a fake gcloud."""
    file = tmp_path / "gcloud"
    file.write_text(GCLOUD)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(tpu, "POLL", 0.01)

    def told() -> list[str]:
        known = ("describe", "create", "delete", "scp", "ssh")
        lines = (tmp_path / "calls").read_text().splitlines()
        return [next(word for word in line.split() if word in known) for line in lines]

    return told


def test_a_run_goes_on_where_its_machines_are_taken_away(gcloud):
    arguments = f"tpu keep --name=a --zone=z --topology=v5e:4x4 --spot {BUCKET}"
    assert cli.run(launch.main, ["gptjax launch", *shlex.split(arguments)]) == 0
    once = ["describe", "create", "describe", "scp", "ssh", "ssh"]
    assert gcloud() == [*once, "describe", "describe", "delete", *once]


def test_a_run_that_fails_on_machines_that_stay_has_failed(gcloud, monkeypatch, capsys):
    monkeypatch.setenv("LEFT", "ACTIVE")
    arguments = f"tpu keep --name=a --zone=z --topology=v5e:4x4 {BUCKET}"
    assert cli.run(launch.main, ["gptjax launch", *shlex.split(arguments)]) == 1
    assert "failed: a slice failed" in capsys.readouterr().err
    assert "delete" not in gcloud()
