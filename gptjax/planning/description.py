"""`train --describe`: parameters, FLOPs, tokens and memory of a config, without training."""

import math
from typing import Any

import jax
import numpy as np

from gptjax import config as config_lib
from gptjax.config import Config
from gptjax.data import opening
from gptjax.data.tokenization.tokenizer import known_vocab_size
from gptjax.model import gpt, lora
from gptjax.model.architecture import FLOPS_CONVENTION, Architecture
from gptjax.optim.hyper import names
from gptjax.optim.optimizers import make_optimizer
from gptjax.parameters import find, path_string
from gptjax.training.run import settle
from gptjax.training.state import create_state

MIN_WIDTH = 110  # columns of the table
ORDER = ("embedding", "position_embedding", "ngram_embedding", "value_embedding", "blocks", "final_norm", "head")


def describe(config: Config) -> dict[str, Any]:
    """The numbers that `show` prints.

    The vocabulary size is taken from the config, or from a tokenizer that needs no corpus (byte, hf, and bpe:N, where N
    is the largest size). Otherwise, or if a length is in epochs, the data are opened.
    """
    vocab_size, steps_per_epoch = config.model.vocab_size, math.nan
    if not vocab_size and not config.data.source.startswith("store:"):  # a store has its own vocabulary
        vocab_size = known_vocab_size(config.tokenizer)
    in_epochs = isinstance(config.train.num_steps, str) and "epoch" in config.train.num_steps
    if not vocab_size or in_epochs:
        data = opening.RunData.open(config)
        vocab_size = max(config.model.vocab_size, data.tokenizer.vocab_size)
        steps_per_epoch = settle(config, None, data)[2].steps_per_epoch
    architecture = Architecture.from_config(config.model, vocab_size)
    _, params = gpt.abstract_model(architecture)
    flops = architecture.flops_per_token()
    tokens_per_step = config.train.batch_size * architecture.context_length
    num_steps = config_lib.resolve_duration(
        config.train.num_steps, total=None, tokens_per_step=tokens_per_step, steps_per_epoch=steps_per_epoch
    )
    rows = _rows(architecture, params)
    count = sum(row["parameters"] for row in rows)
    tables = sum(row["parameters"] for row in rows if row["parameters"] and _is_table(row["module"]))
    return {
        "rows": rows,
        "parameters": count,
        "embedding_parameters": tables,
        "non_embedding_parameters": count - tables,
        "flops_per_token": flops,
        "convention": FLOPS_CONVENTION,
        "vocab_size": vocab_size,
        "num_steps": num_steps,
        "tokens_per_step": tokens_per_step,
        "tokens": num_steps * tokens_per_step,
        "training_flops": flops * num_steps * tokens_per_step,
        "memory": _memory(config, params),
    }


def show(config: Config) -> None:
    """Prints the tables of a config."""
    from rich.console import Console
    from rich.table import Table

    about = describe(config)
    console = Console(width=max(Console().width, MIN_WIDTH))
    table = Table("parameter", "shape", "count", "share", "FLOPs per token", "share", title="parameters")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in about["rows"]:
        table.add_row(
            row["module"],
            " x ".join(map(str, row["shape"])),
            f"{row['parameters']:,}" if row["parameters"] else "",
            f"{row['parameters'] / about['parameters']:.1%}" if row["parameters"] else "",
            f"{row['flops']:.3g}" if row["flops"] else "",
            f"{row['flops'] / about['flops_per_token']:.1%}" if row["flops"] else "",
        )
    console.print(table)
    tokens, count = about["tokens"], about["parameters"]
    lines = {
        "parameters": f"{count:,} = {about['embedding_parameters']:,} in embeddings and head "
        f"+ {about['non_embedding_parameters']:,} in blocks and norms",
        "vocabulary": f"{about['vocab_size']:,}",
        "FLOPs per token": f"{about['flops_per_token']:.4g} to train ({about['convention']})",
        "tokens": f"{tokens:,} = {about['num_steps']:,} steps of {about['tokens_per_step']:,}; "
        f"{tokens / count:.1f} per parameter",
        "training": f"{about['training_flops']:.3g} FLOPs",
    }
    memory = about["memory"]
    parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in memory.items() if size)
    lines["memory"] = f"{_gigabytes(sum(memory.values()))} on all devices together ({parts}), without activations"
    for name, text in lines.items():
        console.print(f"{name + ':':17} {text}", highlight=False)


def _is_table(path: str) -> bool:
    row = find(path)
    return row.dtype == "table" or row.vocabulary is not None


def _rows(a: Architecture, params: gpt.Params) -> list[dict[str, Any]]:
    """One row per parameter, with the FLOPs of its matrix product, and one row for the attention products."""
    rows, per_parameter = [], 4 if a.lora_rank else 6
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = path_string(path)
        flops = 0
        if name == "head/kernel" or (name == "embedding/embedding" and a.tie_embeddings):
            flops = per_parameter * a.vocab_size * a.embed_dim
        elif name.endswith("kernel"):
            used = a.experts_per_token / a.num_experts if "/expert_" in name else 1
            flops = round(per_parameter * math.prod(leaf.shape) * used)
        rows.append({"module": name, "shape": leaf.shape, "parameters": math.prod(leaf.shape), "flops": flops})
    rows.sort(key=lambda row: ORDER.index(row["module"].partition("/")[0]))
    attention = a.flops_per_token() - sum(row["flops"] for row in rows)
    rows.append({"module": "scores and mixing of attention", "shape": (), "parameters": 0, "flops": attention})
    return rows


def _memory(config: Config, params: gpt.Params) -> dict[str, int]:
    """{kind: bytes} of the float32 arrays that live as long as the run."""
    hyper = dict.fromkeys(names(), 0.0)  # the structure of the state does not depend on the values
    optimizer = make_optimizer(config.optimizer, lora.split(params)[0], hyper)
    state = jax.eval_shape(lambda p: create_state(p, optimizer, ema=config_lib.averages(config)), params)

    def size(tree: Any) -> int:
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))

    return {
        "parameters": size(state.params),
        "gradients": size(lora.split(state.params)[0]),
        "optimizer": size(state.opt_state),
        "average": size(state.ema_params),
    }


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
