"""Shared by the tests of runs in buckets and `tools/kill_bucket_runs.py`: a tiny run, its environment, its losses."""

import json

from object_store import ObjectStore

CONFIG = """
from gptjax.config import get_default

def get_config():
    config = get_default()
    config.tokenizer = "byte"
    config.data.update(source="text:{folder}/*.txt", split_by="position", validation_fraction=0.1)
    config.model.update(num_layers=1, num_heads=2, embed_dim=16, context_length=16, dropout=0.1)
    config.train.update(num_steps={steps}, batch_size=4, checkpoint_every={save}, keep_checkpoints=2)
    config.evaluation.update(every={evaluate}, max_tokens=200)
    config.logging.update(every=1, samples=0, tensorboard=False)
    config.mesh.data = 1
    return config
"""


def environment(store: ObjectStore) -> dict[str, str]:
    """The environment variables with which gptjax and its child processes use a store."""
    return {
        "STORAGE_EMULATOR_HOST": store.url,
        "TENSORSTORE_GCS_HTTP_URL": store.url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # read once; it asks for the kind of a bucket by gRPC
        "JAX_PLATFORMS": "cpu",
    }


def losses(text: str) -> list[tuple]:
    """The losses in metrics.jsonl, without times."""
    return [(line["split"], line["step"], line["loss"]) for line in map(json.loads, text.splitlines())]
