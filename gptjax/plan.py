"""Compile a run for other hardware: does it fit, what do devices exchange, how long does a step take, what is the cost?

  python -m gptjax.plan --config=configs/gpt2_124m.py --topology=v5e:2x4
  python -m gptjax.plan --config=configs/gpt3.py:6.7b --topology=v5p:4x4x4 --tokens=10B --price=4.2
  python -m gptjax.plan --config=configs/gpt2_1558m.py --topology=v5e:4x4 --suggest
  python -m gptjax.plan --config=configs/quickstart.py --topology=local
  python -m gptjax.plan --setup

The train step of the config is compiled from shapes by the compiler of the hardware itself: for TPUs on any machine,
with libtpu in an environment of its own (--setup), for the devices of this machine with --topology=local.
"""

import contextlib
import json
import re
from collections.abc import Iterator

from absl import flags

from gptjax import cli, outputs
from gptjax import config as config_lib
from gptjax.config.durations import ascii_digits
from gptjax.config.values import shown
from gptjax.errors import UserError

MOST_TOKENS, MOST_PRICE, MOST_COMPILES = 1e18, 1e6, 1000
ASSUMED_CHARACTERS = 256  # vocabulary of a tokenizer of characters, which depends on the text
ASSUMED_EPOCH = 1000  # steps; the true length depends on the data, and changes no shape


def main(argv: list[str]) -> None:
    flag_values = flags.FlagValues()
    define = dict(flag_values=flag_values)
    cli.define_config(flag_values)
    flags.DEFINE_string("topology", None, "hardware, e.g. --topology=v5e:4x4, v5p:4x4x4 or local", **define)
    flags.DEFINE_bool(
        "suggest", False, "search batch, accumulation, remat and mesh for the fastest that fits", **define
    )
    flags.DEFINE_integer("compiles", 6, "programs that --suggest compiles at most, e.g. --compiles=12", **define)
    flags.DEFINE_string("tokens", None, "tokens of the whole run, e.g. --tokens=10B; default: the config's", **define)
    flags.DEFINE_float("price", None, "price of a chip per hour, e.g. --price=1.2", **define)
    flags.DEFINE_string("output", None, "also write everything here, e.g. --output=plan.json", **define)
    flags.DEFINE_bool("setup", False, "install the TPU compiler in an environment of its own", **define)
    cli.parse(flag_values, argv, __doc__)
    check_flags(flag_values)
    if flag_values.setup:
        from gptjax.planning import tpu

        print(f"the TPU compiler is in {tpu.set_up().parents[1]}")
        if flag_values.config is None:
            return
    if not flag_values.topology:
        from gptjax.planning import chips

        raise UserError(f"--topology is missing; choose from {chips.listing()}")
    plan(cli.read_config(flag_values), flag_values)


def check_flags(options: flags.FlagValues) -> None:
    """Raises UserError for wrong flags, before anything is compiled."""
    if options.price is not None and not 0 <= options.price <= MOST_PRICE:
        raise UserError(f"--price={options.price}: a chip costs 0 to {MOST_PRICE:.0f} an hour, in any currency")
    if not 1 <= options.compiles <= MOST_COMPILES:
        raise UserError(f"--compiles={options.compiles}: --suggest compiles 1 to {MOST_COMPILES} programs")
    if options.tokens is not None:
        number_of_tokens(options.tokens)
    if options.output == "":
        raise UserError("--output is empty; name a file")


def plan(config: config_lib.Config, options: flags.FlagValues) -> None:
    """Compiles, prints the report, writes --output."""
    from gptjax.planning import report, suggestion
    from gptjax.planning.roofline import cost, roofline

    tokens = None if options.tokens is None else number_of_tokens(options.tokens)
    tokens = tokens or tokens_of(config)
    if options.output:
        outputs.claim(options.output)
    config = config_lib.resolve(config, vocab_size(config), ASSUMED_EPOCH)
    with open_compiler(config, options.topology) as compiler:
        facts, problem = None, None
        try:
            facts = compiler.compile(config)
        except UserError as error:
            if not options.suggest:
                raise
            problem = error
        if facts is not None:
            times = roofline(facts, compiler.peak)
            price = tokens and cost(facts, times, tokens, options.price)
            print(report.text(facts, times, price))
            content = report.to_dict(facts, times, price, config_lib.sha256(config))
        else:
            print(f"the config as it is: {problem}")
            content = {"config_sha256": config_lib.sha256(config), "fits": False, "problem": str(problem)}
        if options.suggest:
            print("\nSearching for the fastest that fits:", flush=True)
            trials = suggestion.search(
                config,
                compiler,
                first=facts,
                compiles=options.compiles,
                say=lambda line: print(line, flush=True),
            )
            content["suggestion"] = suggest(config, trials, tokens, options.price)
    if options.output:
        outputs.write(options.output, json.dumps(content, indent=1) + "\n", "the plan")


def suggest(config: config_lib.Config, trials: list, tokens: float | None, price: float | None) -> dict | None:
    """Prints the best trial with its flags; returns what --output has of it, or None if nothing fits."""
    from gptjax.planning import chips, report, suggestion
    from gptjax.planning.roofline import cost

    best = trials[0]
    if best.times is None:
        size = suggestion.needed(best.facts) / chips.GIB
        print(
            f"\nNothing fits; the smallest of {len(trials)} tried needs {size:.2f} GiB per device. Try a larger slice"
        )
        return None
    changes = best.candidate.flags(config)
    print(f"\nThe fastest that fits: {' '.join(changes) or 'the config as it is'}\n")
    price = tokens and cost(best.facts, best.times, tokens, price)
    print(report.text(best.facts, best.times, price))
    return {"flags": changes, **report.to_dict(best.facts, best.times, price, "")}


@contextlib.contextmanager
def open_compiler(config: config_lib.Config, topology: str) -> Iterator:
    """The compiler of a topology: that of this machine's devices, or the TPU's in its own environment."""
    from gptjax.planning import chips, tpu
    from gptjax.planning.compiler import Compiler

    if topology == "local":
        from gptjax.planning.local import open_local

        yield open_local(config)
        return
    slice_ = chips.parse_topology(topology)
    with tpu.TpuProcess(tpu.find_python()) as process:
        yield Compiler(
            lambda changed: process.compile(changed, topology),
            devices=slice_.num_chips,
            device_kind=slice_.chip.device_kind,
            available_bytes=slice_.chip.usable_bytes,
        )


def vocab_size(config: config_lib.Config) -> int:
    """Size of the vocabulary without reading data: model.vocab_size, or as the tokenizer's name says."""
    from gptjax.data.tokenization.tokenizer import known_vocab_size

    if config.model.vocab_size:
        return config.model.vocab_size
    try:
        size = known_vocab_size(config.tokenizer)
    except UserError as error:
        raise UserError(
            f"the vocabulary of tokenizer={shown(config.tokenizer)[1:-1]} is not known without its files ({error}); "
            "add --config.model.vocab_size=N"
        ) from None
    if not size:
        print(f"tokenizer={config.tokenizer}: its vocabulary depends on the text and is taken as {ASSUMED_CHARACTERS}")
    return size or ASSUMED_CHARACTERS


def number_of_tokens(text: str) -> float:
    """A number of tokens from a text such as 10B, 300M or 2.5e9. Raises UserError."""
    plain = ascii_digits(text).strip()
    match = re.fullmatch(r"(\d[\d_]*\.?\d*|\.\d+)((?:[eE]\+?\d{1,4})?)([KMBT]?)", plain, re.ASCII)
    units = {**config_lib.UNITS, "T": 10**12}
    number = float(match[1].replace("_", "") + match[2]) * units[match[3]] if match and len(plain) <= 100 else 0
    if not 1 <= number <= MOST_TOKENS:
        raise UserError(
            f"--tokens={shown(text)[1:-1]} is not a number of tokens, 1 to {MOST_TOKENS:.0e}; e.g. --tokens=10B"
        )
    return number


def tokens_of(config: config_lib.Config) -> float | None:
    """Tokens of the whole run; None where that depends on the data (epochs)."""
    if "epoch" in str(config.train.num_steps):
        return None
    per_step = config.train.batch_size * config.model.context_length
    steps = config_lib.resolve_duration(
        config.train.num_steps, total=None, tokens_per_step=per_step, steps_per_epoch=ASSUMED_EPOCH
    )
    return float(steps * per_step)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
