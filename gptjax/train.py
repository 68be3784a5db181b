"""Train a GPT: config -> checkpoints, metrics, samples and a report in a work directory.

  python -m gptjax.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m gptjax.train --config=configs/quickstart.py:runlocal --workdir=runs/try --config.train.num_steps=9
  python -m gptjax.train --config=configs/ladder.py:d6 --describe

The same command on the same work directory continues where it stopped. Ctrl-C or SIGTERM saves first. On several
machines, start it once on each: `srun` and Cloud TPU need no flags (tools/launch.py writes the job).
"""

import json
import math
import sys
import time
from collections.abc import Collection
from pathlib import Path

from absl import flags

from gptjax import cli
from gptjax import config as config_lib
from gptjax.errors import RunError, UserError
from gptjax.files import write_whole
from gptjax.processes import cluster, distributed


def main(argv: list[str]) -> None:
    flag_values = flags.FlagValues()
    cli.define_config(flag_values, argv)
    flags.DEFINE_string(
        "workdir",
        None,
        "where everything of the run is written, e.g. --workdir=runs/first",
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "profile",
        None,
        "trace COUNT steps from STEP on and print what takes the time, e.g. --profile=100:5",
        flag_values=flag_values,
    )
    flags.DEFINE_bool(
        "describe",
        False,
        "print parameters, FLOPs, tokens and memory, and train nothing, e.g. --describe",
        flag_values=flag_values,
    )
    cluster.define_flags(flag_values)
    cli.parse(flag_values, argv, __doc__)
    if flag_values.describe:
        describe(cli.read_config(flag_values), chosen=cli.chosen_options(flag_values))
        return
    if not flag_values.workdir:
        raise UserError("--workdir is missing; e.g. --workdir=runs/first")
    config, workdir = cli.read_config(flag_values), Path(flag_values.workdir)
    with distributed.join(flag_values, cli.describe):
        train(config, workdir, chosen=cli.chosen_options(flag_values), profile=flag_values.profile)


def describe(config: config_lib.Config, *, chosen: Collection[str] = ()) -> None:
    """Prints what the config is, without training it."""
    from gptjax.planning import description
    from gptjax.training import pretrained

    description.show(pretrained.adopt(config, pretrained.find(config.init_from), chosen))


def train(
    config: config_lib.Config, workdir: Path, *, chosen: Collection[str] = (), profile: str | None = None
) -> None:
    """Trains to the end, or raises RunError after saving what there is. Every process of a run calls it.

    `chosen`: options that were set on the command line; those of the model are not taken from `init_from`.
    `profile`: STEP:COUNT, steps of which a trace is made.
    """
    # ---- Set-up: everything that can be wrong is found before anything is compiled -------------------------------
    import jax
    import optax

    from gptjax.artifacts import checkpoints as checkpoints_lib
    from gptjax.artifacts import manifest
    from gptjax.artifacts import workdir as workdir_lib
    from gptjax.data import opening
    from gptjax.data.pipeline import batches as pipeline
    from gptjax.evaluation.likelihood import Likelihood, Scorer
    from gptjax.evaluation.samples import Sampler
    from gptjax.model import gpt, kernels
    from gptjax.model.architecture import Architecture
    from gptjax.optim.optimizers import make_optimizer
    from gptjax.parallel import mesh as mesh_lib
    from gptjax.parallel import partition
    from gptjax.processes import runtime
    from gptjax.reporting.page import write_report
    from gptjax.training import footprint, metrics, pretrained, profiling, stopping, throughput
    from gptjax.training.state import abstract_state, initial_state
    from gptjax.training.step import make_train_step

    started = time.perf_counter()
    group = distributed.current()
    chief = group.index == 0
    origin = pretrained.find(config.init_from)
    config = pretrained.adopt(config, origin, chosen)
    rows = config.train.batch_size // config.train.accumulation
    runtime.start(
        config.mesh, rows=rows, cache_dir=config_lib.cache_directory(config), compute_dtype=config.model.compute_dtype
    )
    mesh = mesh_lib.make_mesh(config.mesh)
    with_devices = config.copy_and_resolve_references()
    with_devices.mesh.data = mesh.shape["data"]
    config_lib.validate(with_devices)

    with group.first_goes_first():  # it builds the token store, if there is none
        sources = opening.open_sources(config, progress=cli.data_progress if chief and sys.stderr.isatty() else None)
    tokenizer = sources[0].store.tokenizer()
    template = opening.chat_template(sources)
    batches = opening.open_batches(sources, config, rows=partition.process_rows(config.train.batch_size, mesh))
    validation = {source.name: source.store.split("validation") for source in sources}
    config = pretrained.with_vocabulary(config, origin, tokenizer)
    config = config_lib.resolve(config, tokenizer.vocab_size, batches.steps_per_epoch)
    num_steps = config.train.num_steps
    data_identity = {"source": config.data.source, **opening.identity(sources)}
    group.same("config", dict(config_lib.flat_values(config)))
    group.same("data", {"source_fingerprint": data_identity["source_fingerprint"]})
    architecture = Architecture.from_config(config.model, tokenizer.vocab_size)
    graphdef, abstract_params = gpt.abstract_model(architecture)
    task = kernels.Task.of(architecture, packed=config.data.isolate_documents, context=mesh.shape["context"])
    attention = kernels.resolve(architecture.attention, task, mesh.devices.flat[0].platform)
    group.first(lambda: workdir_lib.claim(workdir, config))

    optimizer, schedule = make_optimizer(
        config.optimizer,
        config.schedule,
        num_steps=num_steps,
        warmup=config.schedule.warmup,
        decay=config.schedule.decay,
    )
    ema = config.train.ema_decay > 0
    target = abstract_state(architecture, optimizer, mesh, ema=ema)
    footprint.check_sharded(abstract_params, mesh, allow_replicated=config.mesh.allow_replicated)
    checkpoints = checkpoints_lib.Checkpoints(workdir, keep=config.train.keep_checkpoints)
    start = group.first(lambda: max(checkpoints.steps(), default=0))
    trace = profile and profiling.Profile.parse(profile, workdir, start=start, num_steps=num_steps)
    footprint.check_fits(target, mesh, checkpoint=checkpoints.directory / str(start) if start else None)
    group.advice = checkpoints.advice
    if start:
        group.first(lambda: workdir_lib.check_data(workdir, data_identity))
        state = checkpoints.restore(start, target)
    else:
        state = initial_state(architecture, optimizer, mesh, ema=ema, seed=config.seed)
        if origin is not None:
            state = pretrained.load(origin, state)
    if chief:
        write_whole(workdir / "config.json", config_lib.to_json(config))
        tokenizer.save(workdir / "tokenizer.json")
        about = manifest.build(config, mesh, abstract_params, data_identity)
        write_whole(workdir / "manifest.json", json.dumps(about, indent=1) + "\n")
        if card := opening.data_card(sources):
            write_whole(workdir / "data_card.md", card)

    train_step = make_train_step(config, graphdef, optimizer, schedule, mesh, target)
    scorer = Scorer(architecture, mesh, batch_size=config.evaluation.batch_size or 2 * config.train.batch_size)
    sampler = None
    if config.logging.samples:
        sampler = Sampler(config, workdir, mesh, architecture, tokenizer, template, start=start)
    tokens_per_step = config.train.batch_size * config.model.context_length
    peak = throughput.peak_flops(mesh.devices.flat[0], config.model.compute_dtype)
    log = metrics.MetricsLog(workdir, step=start, tensorboard=config.logging.tensorboard, enabled=chief)
    history = group.first(lambda: metrics.history(log.path))
    meter = throughput.Meter(
        tokens_per_step,
        architecture.flops_per_token(),
        peak and peak * mesh.devices.size,
        started=started,
        before=history["seconds"],
    )
    guard = stopping.DivergenceGuard(config.train.divergence_threshold, lowest=history["lowest"])
    stopper = stopping.EarlyStopping(config.train.early_stopping_patience, history["validation"])
    display = metrics.Display(num_steps, start=start, enabled=chief)
    training_tokens = sum(source.store.split("train").num_tokens for source in sources)
    display.print(
        f"{gpt.parameter_count(abstract_params):,} parameters, {training_tokens:,} training tokens, "
        f"vocabulary {tokenizer.vocab_size}, {num_steps} steps of {tokens_per_step:,} tokens "
        f"({num_steps / batches.steps_per_epoch:.2f} epochs)"
    )
    display.print(f"attention: {attention}")
    display.print(footprint.describe(target, mesh) + (f"; {group.size} processes" if group.size > 1 else ""))
    if start:
        display.print(f"continuing at step {start} from {checkpoints.directory / str(start)}")

    # ---- What the loop does beside stepping ----------------------------------------------------------------------
    parameter_norm = jax.jit(optax.tree.norm)
    pending: tuple[int, dict] | None = None  # metrics of a step that is not yet waited for

    def advice() -> str:
        saved = checkpoints.steps() or "none"
        return f"Try a lower --config.optimizer.learning_rate. Checkpoints: {saved} in {checkpoints.directory}"

    def flush() -> None:
        """Fetches and writes the metrics of the last logged step; raises if the run has diverged."""
        nonlocal pending
        if pending is None:
            return
        step, device_metrics = pending
        pending = None
        with meter.doing("step"):
            values = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        line = {"step": step, "split": "train", **values, **meter.read()}
        line |= {"tokens_seen": step * tokens_per_step, "epoch": batches.epoch(step)}
        line |= {f"epoch/{name}": epoch for name, epoch in batches.epochs(step).items()}
        line |= meter.goodput()
        log.write(line)
        display.train(line)
        guard.check(step, values["loss"], advice())

    def evaluate(step: int) -> dict:
        """The validation line of metrics.jsonl; also samples."""
        likelihoods = {
            name: scorer.score(
                state.evaluation_params,
                split,
                eot_id=tokenizer.eot_id,
                stride=config.evaluation.stride,
                max_tokens=config.evaluation.max_tokens,
            )
            for name, split in validation.items()
        }
        likelihood = Likelihood.joined(list(likelihoods.values()))
        line = {
            "step": step,
            "split": "validation",
            "loss": likelihood.loss,
            "perplexity": math.exp(min(likelihood.loss, 700)),
            "bits_per_byte": likelihood.bits_per_byte,
            "accuracy": likelihood.accuracy,
            "tokens_seen": step * tokens_per_step,
            "wall_time_s": time.perf_counter() - meter.begin,
        }
        if len(likelihoods) > 1:
            line |= {f"loss/{name}": part.loss for name, part in likelihoods.items()}
        if sampler:
            sampler.sample(step, state.evaluation_params)
        return line

    def save(step: int, validation_loss: float | None) -> None:
        if not math.isfinite(parameter_norm(state.params)):  # or it would push a good checkpoint out
            raise RunError(f"the parameters are not finite after step {step}. {advice()}")
        scores = {} if validation_loss is None else {"validation_loss": validation_loss}
        about = {"config": config, "tokenizer": tokenizer, "template": template}
        checkpoints.save(step, state, **about, generation=origin and origin.generation, metrics=scores)

    # ---- The loop: evaluate and save the state as it is, and only then advance -----------------------------------
    stop = stopping.StopSignals()
    stream = pipeline.iterate(batches, start)
    previous = None
    try:
        with jax.set_mesh(mesh):
            for step in range(start, num_steps + 1):
                last = step == num_steps
                if step > start and (last or step % config.evaluation.every == 0):
                    flush()
                    with meter.doing("eval"):
                        line = evaluate(step)
                    log.write(line | meter.goodput())
                    display.validation(line)
                    improved = stopper.update(line["loss"])
                    if improved or last or stopper.exhausted or step % config.train.checkpoint_every == 0:
                        with meter.doing("checkpoint"):
                            save(step, line["loss"])
                elif step > start and step % config.train.checkpoint_every == 0:
                    flush()
                    with meter.doing("checkpoint"):
                        save(step, None)
                if last or stopper.exhausted:
                    break
                if signal := group.stops_at(step, stop.received):
                    flush()
                    if step not in checkpoints.steps():
                        save(step, None)
                    checkpoints.wait()
                    raise RunError(
                        f"stopped by {signal} at step {step}; saved in {checkpoints.directory / str(step)}. "
                        "The same command continues"
                    )

                if trace and chief:
                    trace.before(step, previous)
                with meter.doing("data"):
                    _, batch = next(stream)
                batch = partition.to_device(batch, mesh, batch_size=config.train.batch_size)
                with meter.doing("compile" if step == start else "step"), jax.transfer_guard("disallow"):
                    state, step_metrics = train_step(state, batch)
                    if step == start:
                        jax.block_until_ready(step_metrics)
                if step == start:
                    display.print(f"first step after {time.perf_counter() - meter.begin:.1f} s")
                meter.step()
                flush()  # of the step before: the device already works on this one
                if (step + 1) % config.logging.every == 0 or step + 1 == num_steps:
                    pending = (step + 1, step_metrics)
                # At most two steps are in flight, so that memory stays bounded and Ctrl-C acts at once.
                with meter.doing("step"):
                    jax.block_until_ready(previous)
                previous = step_metrics["loss"]
                if trace and chief and (text := trace.after(step, state)):
                    display.print(text)
        checkpoints.wait()
    except OSError as error:
        saved = checkpoints.steps() or "none"
        where = f"Checkpoints: {saved} in {checkpoints.directory}"
        raise RunError(f"{error}. {where}; the same command continues") from error
    finally:
        stop.restore()
        if trace:
            trace.stop()
        stream.close()
        display.close()
        log.close()
        checkpoints.close()
        if chief:
            try:
                write_report(workdir)
            except OSError as error:  # must not hide what ended the run
                print(f"report.html could not be written: {error}", file=sys.stderr)

    if chief:
        _summary(workdir, stopper)


def _summary(workdir: Path, stopper) -> None:
    early = f"stopped early: {stopper.patience} evaluations without improvement"
    perplexity = math.exp(min(stopper.best, 700))
    print(
        f"{early if stopper.exhausted else 'done'}; best validation loss {stopper.best:.4f}, "
        f"perplexity {perplexity:.2f}"
    )
    print(f"curves:   {workdir / 'report.html'}")
    print(f"evaluate: python -m gptjax.evaluate --workdir={workdir}")
    print(f"generate: python -m gptjax.generate --workdir={workdir} --prompt='...'")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
