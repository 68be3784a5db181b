"""The one table of parameters: what the path of each one means. Edit it to change sharding, decay or initialisation.

A path is that of the parameter tree with slashes, "blocks/attention/query/kernel". Parameters under "blocks" have a
leading axis of layers. Every parameter must match a row, and the first that matches counts. Shardings, weight decay,
Muon's matrices, casts, initial deviations and the manifest all derive from here.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from gptjax.errors import UserError

Axis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A row of the table.

    Attributes:
      pattern: regular expression of the whole path.
      split: axes of the mesh that each dimension is split over; dimensions that are left out are whole.
      decayed: weight decay acts on it: matrices and tables, not norms and biases (nanoGPT's rule, by name, because
        stacking over layers gives biases two axes).
      matrix: its last two dimensions are a matrix inside a block, which Muon orthogonalises (Jordan et al. 2024).
      gathered: each block gathers it over the fsdp axis before it multiplies.
      dtype: "compute": cast once per step, before it is gathered, which halves the bytes. "table": looked up in float32
        in training, so that the gradients of a token's occurrences add up in float32; decoding casts it. "float32".
      initial: how it starts: "normal" (deviation init_std), "residual" (init_std / sqrt(2 num_layers): what is added to
        the residual stream), both times a factor of init_multipliers; "uniform" (within 1 / sqrt(inputs)), "ones" or
        "zeros".
      vocabulary: the axis of the vocabulary, if it has one.
    """

    pattern: str
    split: tuple[Axis, ...] = ()
    decayed: bool = False
    matrix: bool = False
    gathered: bool = False
    dtype: str = "float32"
    initial: str = "normal"
    vocabulary: int | None = None

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(*self.split)


_table = functools.partial(Parameter, decayed=True, dtype="table")
_matrix = functools.partial(Parameter, decayed=True, matrix=True, gathered=True, dtype="compute")
_experts = functools.partial(Parameter, decayed=True, matrix=True, dtype="compute")
_INNER = r"blocks/(attention/(query|key|value)|mlp/(up|gate))"
_OUTER = r"blocks/(attention/out|mlp/down)"

TABLE: tuple[Parameter, ...] = (
    _table(r"(value_)?embedding/embedding", ("tensor", "fsdp"), vocabulary=0),
    _table(r"(ngram|position)_embedding/embedding", (None, "fsdp")),
    Parameter(r"head/kernel", ("fsdp", "tensor"), decayed=True, dtype="compute", vocabulary=1),
    _matrix(rf"{_INNER}/kernel", (None, "fsdp", "tensor")),
    _matrix(rf"{_OUTER}/kernel", (None, "tensor", "fsdp"), initial="residual"),
    Parameter(
        r"blocks/attention/(value_)?gate/kernel",
        (None, "fsdp", "tensor"),
        decayed=True,
        gathered=True,
        dtype="compute",
        initial="zeros",
    ),
    Parameter(r"blocks/residual_scale", initial="ones"),
    Parameter(r"blocks/embedding_scale", initial="zeros"),
    Parameter(rf"{_INNER}/bias", (None, "tensor"), initial="zeros"),
    Parameter(rf"{_OUTER}/bias", initial="zeros"),
    Parameter(rf"{_INNER}/lora_a", (None, "fsdp"), initial="uniform"),
    Parameter(rf"{_INNER}/lora_b", (None, None, "tensor"), initial="zeros"),
    Parameter(rf"{_OUTER}/lora_a", (None, "tensor"), initial="uniform"),
    Parameter(rf"{_OUTER}/lora_b", (None, None, "fsdp"), initial="zeros"),
    _experts(r"blocks/mlp/expert_(up|gate)/kernel", (None, ("expert", "tensor"), "fsdp", None)),
    _experts(r"blocks/mlp/expert_down/kernel", (None, ("expert", "tensor"), None, "fsdp"), initial="residual"),
    Parameter(r"blocks/mlp/router/kernel", decayed=True),
    Parameter(r"(blocks/)?(.*/)?\w*norm/scale", initial="ones"),
    Parameter(r"(blocks/)?(.*/)?\w*norm/bias", initial="zeros"),
)


@functools.cache
def find(path: str) -> Parameter:
    """The row of a parameter. Raises KeyError if there is none: a new parameter needs one."""
    for row in TABLE:
        if re.fullmatch(row.pattern, path):
            return row
    raise KeyError(f"no row of gptjax.parameters.TABLE matches the parameter {path}")


def deviation(path: str, init_std: float, num_layers: int, widening: float = 1.0) -> float:
    """The standard deviation of the initial values of a matrix or table; `widening`: of `Architecture`."""
    std = init_std * (2 * num_layers) ** -0.5 if find(path).initial == "residual" else init_std
    return std * widening**-0.5 if find(path).matrix else std


def path_string(path: tuple) -> str:
    """ "blocks/mlp/up/kernel" from a key path of jax.tree_util."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def map_rows(function: Callable[[Parameter, Any], Any], params: Any) -> Any:
    """`function(row, leaf)` for every leaf of a tree of parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(find(path_string(path)), leaf), params)


def multiplier(text: str, path: str, option: str) -> float:
    """The factor of one parameter in "PATTERN=FACTOR PATTERN=FACTOR": that of the first pattern that matches, or 1.

    Raises UserError for what is not such a list; `option` names it.
    """
    return next((factor for pattern, factor in _factors(text, option) if re.fullmatch(pattern, path)), 1.0)


def multipliers(text: str, paths: Sequence[str], option: str) -> dict[str, float]:
    """{path: factor}, as `multiplier` reads it. Raises UserError for a pattern that matches no parameter, too."""
    for pattern, _ in _factors(text, option):
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise UserError(f"{option}: {pattern!r} matches no parameter; these are: {', '.join(paths)}")
    return {path: multiplier(text, path, option) for path in paths}


def _factors(text: str, option: str) -> list[tuple[str, float]]:
    """[(pattern, factor)]."""
    factors = []
    for entry in text.split():
        pattern, _, value = entry.rpartition("=")
        try:
            re.compile(pattern)
            if not 0 <= float(value) < math.inf:
                raise ValueError(value)
            factors.append((pattern, float(value)))
        except (ValueError, re.error):
            raise UserError(
                f"{option}={text!r}: {entry!r} is not PATTERN=FACTOR with a factor of 0 or more, such as "
                "'embedding/.*=0.1 head/kernel=0.5'"
            ) from None
    return factors
