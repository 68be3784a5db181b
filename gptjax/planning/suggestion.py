"""Searches batch, accumulation, rematerialisation and mesh for the fastest step that fits.

An analytic model of memory and time orders the candidates. The compiler judges each candidate that is tried, and its
numbers correct the model of memory for the next ones.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax

from gptjax import config as config_lib
from gptjax.errors import UserError
from gptjax.model.architecture import Architecture
from gptjax.model.gpt import abstract_params, parameter_count
from gptjax.optim.hyper import names
from gptjax.optim.optimizers import make_optimizer
from gptjax.planning import chips
from gptjax.planning.compiler import Compiler
from gptjax.planning.facts import Facts
from gptjax.planning.roofline import Roofline, roofline
from gptjax.training.throughput import datasheet_flops

REMAT = ("none", "dots", "full")  # from the fastest to the smallest
RECOMPUTED = {"none": 1.0, "dots": 1.05, "full": 4 / 3, "offload": 4 / 3}  # FLOPs run / model FLOPs
HEADROOM = 0.97  # usable share of the memory; a run keeps other things beside the step


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Values of the options that are searched."""

    batch_size: int
    accumulation: int
    remat: str
    data: int
    fsdp: int
    expert: int
    context: int
    tensor: int

    def apply(self, config: config_lib.Config) -> config_lib.Config:
        """A copy of the config with these values."""
        changed = config.copy_and_resolve_references()
        for path, value in self._options().items():
            section, name = path.split(".")
            changed[section][name] = value
        return changed.lock()

    def flags(self, config: config_lib.Config) -> list[str]:
        """The values that differ from the config, as flags. mesh.data=-1 already means all remaining devices."""
        options = [(p, v) for p, v in self._options().items() if p != "mesh.data" or config.mesh.data != -1]
        return [f"--config.{p}={v}" for p, v in options if config[p.split(".")[0]][p.split(".")[1]] != v]

    def _options(self) -> dict[str, int | str]:
        return {
            "train.batch_size": self.batch_size,
            "train.accumulation": self.accumulation,
            "model.remat": self.remat,
            "mesh.data": self.data,
            "mesh.fsdp": self.fsdp,
            "mesh.expert": self.expert,
            "mesh.context": self.context,
            "mesh.tensor": self.tensor,
        }


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate and the compiler's facts about it. `times` is None if it does not fit."""

    candidate: Candidate
    facts: Facts
    times: Roofline | None


def candidates(config: config_lib.Config, devices: int) -> Iterator[Candidate]:
    """Every valid combination that uses all devices, at the batch size of the config. If that batch size cannot be
    divided at all, the nearest multiples of the number of devices are used instead."""
    size = config.train.batch_size
    found = list(_combinations(config, devices, size))
    if not found:
        for other in sorted({max(size // devices, 1) * devices, -(-size // devices) * devices}):
            found += _combinations(config, devices, other)
    yield from found


def _combinations(config: config_lib.Config, devices: int, batch_size: int) -> Iterator[Candidate]:
    heads, kv_heads = config.model.num_heads, config.model.num_kv_heads or config.model.num_heads
    experts = config.model.num_experts
    for tensor in _divisors(devices):
        if heads % tensor or kv_heads % tensor or experts % tensor or tensor > 16:
            continue
        for context in _divisors(devices // tensor):
            # The context axis is used only if the config uses it, or if there are fewer rows than devices.
            rare = context > 1 and config.mesh.context == 1 and batch_size * tensor >= devices
            if rare or config.model.context_length % context:
                continue
            shards = devices // tensor // context
            for accumulation in _divisors(batch_size // shards) if batch_size % shards == 0 else ():
                for expert in _divisors(math.gcd(shards, experts // tensor or 1)):
                    for fsdp in _divisors(shards // expert):
                        data = shards // expert // fsdp
                        for remat in dict.fromkeys((*REMAT, config.model.remat)):
                            yield Candidate(batch_size, accumulation, remat, data, fsdp, expert, context, tensor)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


class Model:
    """Estimates memory and time of a candidate from its shapes, only well enough to order candidates.

    `scale` corrects the bytes of temporaries by the compiler's measurements.
    """

    def __init__(self, config: config_lib.Config, device_kind: str, peak: float | None = None):
        self.config = config
        self.architecture = Architecture.from_config(config.model, config.model.vocab_size)
        parameters = abstract_params(self.architecture)
        optimizer = make_optimizer(config.optimizer, parameters, dict.fromkeys(names(), 0.0))
        state = jax.eval_shape(optimizer.init, parameters)
        self.moments = sum(leaf.size for leaf in jax.tree.leaves(state)) / parameter_count(parameters)
        mlp = parameters["blocks"]["mlp"]
        self.experts = parameter_count({name: leaf for name, leaf in mlp.items() if name.startswith("expert_")})
        self.others = parameter_count(parameters) - self.experts
        self.chip = chips.find(device_kind)
        self.peak = peak or datasheet_flops(device_kind, config.model.compute_dtype) or 1e12
        self.scale = dict.fromkeys(RECOMPUTED, 1.0)

    def state_bytes(self, c: Candidate) -> float:
        """Bytes of parameters, optimizer state and, if it is on, the running average, in float32."""
        copies = 1 + self.moments + config_lib.averages(self.config)
        return 4 * copies * self._parameters(c) / c.fsdp

    def _parameters(self, c: Candidate) -> float:
        """The number of parameters that a group of devices along fsdp holds together."""
        return (self.others + self.experts / c.expert) / c.tensor

    def temporary_bytes(self, c: Candidate) -> float:
        """Bytes of gradients, parameters in the compute type, activations and logits."""
        a, width = self.architecture, 2 if self.config.model.compute_dtype == "bfloat16" else 4
        tokens = c.batch_size // c.accumulation // (c.data * c.fsdp * c.expert) * a.context_length / c.context
        heads = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim
        up = a.mlp_dim * (2 if a.activation == "swiglu" else 1)
        chosen = a.experts_per_token if a.num_experts else 1
        products = (heads + chosen * up) / c.tensor + 2 * a.embed_dim  # results of a block's matrix products
        block = products + (2 * chosen * a.mlp_dim + heads) / c.tensor + 6 * a.embed_dim
        if a.num_experts:  # the group's tokens, once per choice, on the way to experts and back
            block += 4 * chosen * c.expert * a.embed_dim
        if self.config.model.get("attention", "reference") in ("reference", "xla"):
            block += 3 * a.num_heads / c.tensor * a.context_length
        kept = {"none": block, "dots": products + a.embed_dim, "full": a.embed_dim, "offload": 0}[c.remat]
        chunk = self.config.objective.get("logits_chunk", 0) or a.context_length
        logits = 8 * tokens * min(chunk / a.context_length, 1) * a.padded_vocab_size / c.tensor
        layer = 2 * width * self._parameters(c) / a.num_layers  # gathered, while the next one arrives
        activations = width * tokens * (a.num_layers * kept + 2 * block)
        return self.scale[c.remat] * (activations + logits + layer) + self._weight_bytes(c)

    def _weight_bytes(self, c: Candidate) -> float:
        """Bytes of gradients, of their sum over micro-batches, and of parameters in the compute type."""
        width = 2 if self.config.model.compute_dtype == "bfloat16" else 4
        return self._parameters(c) / c.fsdp * (4 + width + 4 * (c.accumulation > 1))

    def total_bytes(self, c: Candidate) -> float:
        return self.state_bytes(c) + self.temporary_bytes(c)

    def seconds(self, c: Candidate) -> float:
        """Seconds of a step: computation, plus the traffic that does not overlap with it."""
        a, devices = self.architecture, c.data * c.fsdp * c.expert * c.context * c.tensor
        tokens = c.batch_size * a.context_length
        compute = RECOMPUTED[c.remat] * a.flops_per_token() * tokens / devices / self.peak

        def ring(size: float, group: int) -> float:
            return size * (group - 1) / group

        gathers = 2 * c.accumulation  # weights in bfloat16, in the forward and the backward pass
        sent = ring(2 * self._parameters(c), c.fsdp) * gathers
        sent += ring(4 * self._parameters(c), c.fsdp) * c.accumulation  # gradients
        sent += 2 * ring(4 * self.others / (c.fsdp * c.tensor), c.data * c.expert)
        sent += 2 * ring(4 * self.experts / (c.fsdp * c.expert * c.tensor), c.data)
        local = tokens / (c.data * c.fsdp * c.expert * c.context)
        reductions = 6 if c.remat in ("full", "offload") else 4
        sent += 2 * ring(2 * local * a.embed_dim, c.tensor) * reductions * a.num_layers
        sent += ring(2 * local * c.expert * a.embed_dim, c.expert) * reductions * a.num_layers
        keys = 2 * a.num_kv_heads * a.head_dim / c.tensor
        sent += 3 * ring(2 * local * c.context * keys, c.context) * a.num_layers
        links = sent / (self.chip.link_rate if self.chip else 1e10)
        return max(compute, links) + 0.2 * min(compute, links) + 1e-4 * c.accumulation

    def learn(self, trial: Trial) -> None:
        """Corrects the scale for the candidate's kind of rematerialisation by a measurement."""
        memory, candidate = trial.facts.memory, trial.candidate
        measured = memory.temporaries if memory else (trial.facts.needed_bytes or 0) - self.state_bytes(candidate)
        if measured <= 0:
            return
        self.scale[candidate.remat] = 1.0
        weights = self._weight_bytes(candidate)
        ratio = (measured - weights) / (self.temporary_bytes(candidate) - weights)
        self.scale[candidate.remat] = min(max(ratio, 0.1), 20.0)


def search(
    config: config_lib.Config,
    compiler: Compiler,
    *,
    first: Facts | None = None,
    compiles: int = 6,
    say: Callable[[str], None] = lambda line: None,
) -> list[Trial]:
    """All trials: first those that fit, from the fastest, then the others, from the smallest.

    Args:
      config: resolved; its own values of the searched options are one candidate.
      first: the facts of the config itself, if it compiles at all.
      compiles: the largest number of programs to compile.
      say: called with one line per trial.
    """
    model = Model(config, compiler.device_kind, compiler.peak)
    limit = (compiler.available_bytes or math.inf) * HEADROOM
    left = list(candidates(config, compiler.devices))
    trials: list[Trial] = []
    if first is not None:
        own = Candidate(config.train.batch_size, config.train.accumulation, config.model.remat, **first.mesh)
        trials.append(Trial(own, first, roofline(first, compiler.peak) if _fits(first, limit) else None))
        model.learn(trials[0])
        left = [c for c in left if c != own]
    for _ in range(compiles):
        small = [c for c in left if model.total_bytes(c) <= limit]
        if not left:
            break
        chosen = min(small, key=model.seconds) if small else min(left, key=model.total_bytes)
        left.remove(chosen)
        fitting = [t for t in trials if t.times]
        if fitting and (not small or model.seconds(chosen) > 1.1 * min(model.seconds(t.candidate) for t in fitting)):
            break  # no remaining candidate is expected to be faster
        try:
            facts = compiler.compile(chosen.apply(config))
        except UserError as error:
            say(f"  {' '.join(chosen.flags(config))}: {error}")
            continue
        trial = Trial(chosen, facts, roofline(facts, compiler.peak) if _fits(facts, limit) else None)
        trials.append(trial)
        model.learn(trial)
        say(f"  {' '.join(chosen.flags(config))}: {_outcome(trial)}")
    return sorted(trials, key=_order)


def _fits(facts: Facts, limit: float) -> bool:
    return facts.fits and facts.memory.peak <= limit


def _order(trial: Trial) -> tuple[bool, float]:
    if trial.times is not None:
        return False, middle_seconds(trial.times)
    return True, needed(trial.facts)


def middle_seconds(times: Roofline) -> float:
    """The mean of full overlap and none, by which steps are compared."""
    return ((times.at_best_s or 0.0) + (times.at_worst_s or 0.0)) / 2


def needed(facts: Facts) -> float:
    """Bytes needed on a device; infinite where the compiler does not say."""
    return facts.memory.peak if facts.memory else facts.needed_bytes or math.inf


def _outcome(trial: Trial) -> str:
    size = needed(trial.facts) / chips.GIB
    if trial.times is None:
        return f"{size:.2f} GiB, does not fit"
    return f"{size:.2f} GiB, {1e3 * middle_seconds(trial.times):.1f} ms per step"
