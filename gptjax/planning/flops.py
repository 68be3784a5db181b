"""FLOPs of a traced program; the body of a loop counts once per iteration."""

import math
from typing import Any

import jax
import jax.extend


def program_flops(jaxpr: Any) -> float:
    """FLOPs of matrix products and kernels. A kernel counts by its own estimate, or else by the products of its whole
    grid, including the blocks that a mask skips. Convolutions are not counted.

    XLA's cost analysis counts the body of a loop once; this function counts every iteration of a scan. A conditional
    counts as its most expensive branch. A while loop counts once, since its number of iterations is unknown.
    """
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        left, right = (v.aval.shape for v in equation.invars)
        free = math.prod(right) // math.prod(left[i] for i in (*contracted, *batch))
        return 2.0 * math.prod(left) * free
    if name == "pallas_call":
        if estimate := params.get("cost_estimate"):
            return float(estimate.flops)
        return math.prod(params["grid_mapping"].grid) * program_flops(params["jaxpr"])
    inner = [program_flops(j) for value in params.values() for j in _jaxprs(value)]
    if name == "cond":
        return max(inner, default=0.0)
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":  # the body is the program of one device
        times = params["mesh"].size
    return times * sum(inner)


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, jax.extend.core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, jax.extend.core.Jaxpr):
        return [value]
    if isinstance(value, (tuple, list)):
        return [j for item in value for j in _jaxprs(item)]
    return []
