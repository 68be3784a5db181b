"""A run on GKE: a manifest of a JobSet, one job per slice of TPU chips, one pod per machine.

GKE gives every pod TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and, with several slices, the MEGASCALE variables.
"""

import argparse

from gptjax.errors import UserError
from gptjax.launchers.arguments import (
    BUCKET,
    NAME,
    SAVE_SECONDS,
    WORD,
    add_run,
    call,
    in_bucket,
    show,
    train_command,
    whole,
)
from gptjax.launchers.tpu_slice import Slice

MOUNT = "/mnt/gptjax"  # where the pods mount the bucket
# If a pod fails, all pods restart and continue the run, at most `restarts` times. Preemptions do not count.
JOBSET = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: {restarts}
    rules:
    - name: preempted
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: {slices}
    template:
      spec:
        parallelism: {hosts}
        completions: {hosts}
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onPodConditions:
            - type: DisruptionTarget
        template:
{annotations}          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: {grace}
            serviceAccountName: {service_account}
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: {accelerator}
              cloud.google.com/gke-tpu-topology: {topology}
            containers:
            - name: gptjax
              image: {image}
              command: {command}
              resources:
                requests:
                  google.com/tpu: {chips}
                limits:
                  google.com/tpu: {chips}
{volumes}"""
ANNOTATIONS = """\
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
"""
VOLUMES = """\
              volumeMounts:
              - name: bucket
                mountPath: {mount}
            volumes:
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: {bucket}
                  mountOptions: implicit-dirs
"""


def define(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--name", type=NAME, required=True)
    parser.add_argument("--topology", required=True, help="e.g. --topology=v5e:4x4")
    parser.add_argument("--slices", type=whole(1, 256), default=1)
    parser.add_argument(
        "--image", type=WORD, required=True, help="image with gptjax[tpu,gcs]; --config is a path in it"
    )
    parser.add_argument("--restarts", type=whole(0, 100_000), default=10)
    parser.add_argument(
        "--service_account", type=WORD, default="default", help="service account that may write to the bucket"
    )
    parser.add_argument(
        "--bucket", type=BUCKET, help="bucket that every pod mounts; not needed if --workdir is gs://..."
    )


def manifest(options: argparse.Namespace) -> str:
    """The JobSet, in YAML."""
    tpu = Slice.parse(options.topology)
    mounted = not in_bucket(options.workdir)
    if mounted and not options.bucket:
        raise UserError("gke needs --bucket=NAME or --workdir=gs://BUCKET/PATH, since pods share no disk")
    command = train_command(options, f"{MOUNT}/{options.workdir}" if mounted else options.workdir, "python")
    return JOBSET.format(
        name=options.name,
        restarts=options.restarts,
        slices=options.slices,
        hosts=tpu.hosts,
        chips=tpu.chips_per_host,
        accelerator=tpu.generation.gke_accelerator,
        topology=tpu.topology,
        grace=SAVE_SECONDS,
        service_account=options.service_account,
        image=options.image,
        command="[" + ", ".join("'" + word.replace("'", "''") + "'" for word in command) + "]",
        annotations=ANNOTATIONS if mounted else "",
        volumes=VOLUMES.format(mount=MOUNT, bucket=options.bucket) if mounted else "",
    )


def run(options: argparse.Namespace) -> None:
    text = manifest(options)
    if options.dry_run:
        show(text)
    else:
        call(["kubectl", "apply", "-f", "-"], text)
