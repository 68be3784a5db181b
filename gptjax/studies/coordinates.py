"""The coordinate check: how far the activations of a model move in its first steps, at several widths.

With the maximal update parametrisation (Yang et al. 2022, arXiv:2203.03466, appendix D.1) the movements do not depend
on the width. In the standard parametrisation logits and hidden states move further the wider the model is, so the
best learning rate falls.
"""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import Config, cache_directory, validate
from gptjax.data.opening import RunData
from gptjax.data.pipeline import batches as batches_lib
from gptjax.errors import UserError
from gptjax.files import write_whole
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.parallel import mesh as mesh_lib
from gptjax.processes import runtime
from gptjax.studies import figures
from gptjax.training.program import Program
from gptjax.training.run import settle

FLAT = 0.2  # exponents of the width up to this absolute value count as zero


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of a coordinate check.

    Attributes:
      movements: {name of the activations: root mean square of their change, for each width}.
    """

    widths: tuple[int, ...]
    steps: int
    movements: dict[str, tuple[float, ...]]

    def exponents(self) -> dict[str, float]:
        """The powers of the width by which the movements grow: slopes of their logarithms."""
        widths = np.log(self.widths)
        return {name: float(np.polyfit(widths, np.log(values), 1)[0]) for name, values in self.movements.items()}

    @property
    def flat(self) -> bool:
        return all(abs(exponent) <= FLAT for exponent in self.exponents().values())

    def text(self) -> str:
        """The table and its conclusion."""
        exponents = self.exponents()
        head = "".join(f"{width:>11}" for width in self.widths)
        lines = [f"movement in {self.steps} steps, by width", f"{'':20}{head}   exponent"]
        for name, values in self.movements.items():
            lines.append(f"{name:20}" + "".join(f"{value:11.4f}" for value in values) + f"{exponents[name]:+11.2f}")
        worst = max(exponents, key=lambda name: abs(exponents[name]))
        if self.flat:
            lines.append(f"flat: no movement scales with the width by an exponent beyond {FLAT}")
        else:
            lines.append(f"not flat: {worst} scales with width^{exponents[worst]:.2f}: the best learning rate shifts")
        return "\n".join(lines)


def check(
    config: Config, factors: Sequence[int], *, steps: int, seeds: int, show: Callable[[str], None] = print
) -> Check:
    """Measures a config at its own width times each of the factors, as the mean over seeds.

    Heads are added and keep their size. Raises UserError for a config that cannot be widened.
    """
    if config.model.mlp_dim or config.model.num_kv_heads:
        raise UserError("--coordinates needs model.mlp_dim=0 and model.num_kv_heads=0, so that they follow the width")
    found: list[dict[str, float]] = []
    for factor in factors:
        wide = config.copy_and_resolve_references().unlock()
        wide.model.update(embed_dim=config.model.embed_dim * factor, num_heads=config.model.num_heads * factor)
        wide.train.num_steps = max(config.train.num_steps, steps) if isinstance(config.train.num_steps, int) else steps
        validate(wide)
        each = []
        for seed in range(seeds):
            wide.seed = wide.data_seed = seed
            each.append(_movement(wide.copy_and_resolve_references(), steps))
        found.append({name: float(np.mean([one[name] for one in each])) for name in each[0]})
        show(f"width {wide.model.embed_dim}: logits move by {found[-1]['logits']:.4f}")
    widths = tuple(config.model.embed_dim * factor for factor in factors)
    return Check(widths, steps, {name: tuple(one[name] for one in found) for name in found[0]})


def _movement(config: Config, steps: int) -> dict[str, float]:
    """{name: root mean square of the change of activations on the first batch after `steps` steps}."""
    rows = config.train.batch_size // config.train.accumulation
    runtime.start(config.mesh, rows=rows, cache_dir=cache_directory(config), compute_dtype=config.model.compute_dtype)
    config, objective, batches = settle(config, None, RunData.open(config))
    mesh = mesh_lib.make_mesh(config.mesh)
    program = Program.of(config, mesh, objective=objective)
    with jax.set_mesh(mesh):
        state, first, before = jax.block_until_ready(program.initial_state()), None, {}
        for step, host in batches_lib.iterate(batches, 0):
            if step == 0:
                first = host
                before = _activations(program.architecture, state.params, first)
            if step == steps:
                break
            # One program at a time: two at once on several CPU devices can block each other.
            state, _ = jax.block_until_ready(program.step(state, program.to_device(host), program.hyper(step)))
        after = _activations(program.architecture, state.params, first)
    return {name: float(np.sqrt(np.mean((after[name] - before[name]) ** 2))) for name in before}


def _activations(a: Architecture, params: gpt.Params, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The residual stream after each block with the final norm applied, and the logits."""
    found = {}
    inputs = {"positions": jnp.asarray(batch["positions"]), "segment_ids": jnp.asarray(batch["segment_ids"])}
    for layers in range(1, a.num_layers + 1):
        part = dataclasses.replace(a, num_layers=layers, scan_unroll=1)
        blocks = jax.tree.map(lambda leaf, layers=layers: leaf[:layers], params["blocks"])
        model = gpt.bind(part, params | {"blocks": blocks})
        hidden, _ = model.hidden(jnp.asarray(batch["tokens"]), **inputs)
        found[f"block {layers}"] = np.asarray(hidden, np.float64)
    found["logits"] = np.asarray(model.logits(hidden)[..., : a.vocab_size], np.float64)
    return found


def write(found: Check, workdir: Path) -> list[Path]:
    """Writes coordinates.csv, and if matplotlib is installed coordinates.svg and .pdf."""
    workdir.mkdir(parents=True, exist_ok=True)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["activations", *found.widths, "exponent"])
    for name, values in found.movements.items():
        writer.writerow([name, *values, found.exponents()[name]])
    write_whole(workdir / "coordinates.csv", out.getvalue())
    if not figures.available():
        return [workdir / "coordinates.csv"]
    import matplotlib

    with matplotlib.rc_context(figures.STYLE):
        figure, (axes,) = figures.new_figure(6, 4, 1)
        axes.set(xlabel="width", ylabel=f"movement in {found.steps} steps (root mean square)")
        axes.loglog(base=2)
        axes.set_xticks(found.widths, [str(width) for width in found.widths])
        for name, values in found.movements.items():
            axes.plot(found.widths, values, marker="o", label=f"{name}: width^{found.exponents()[name]:+.2f}")
        axes.legend(fontsize=8)
        figures.save(figure, workdir / "coordinates")
    return [workdir / f"coordinates.{kind}" for kind in ("csv", "svg", "pdf")]
