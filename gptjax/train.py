"""Train a GPT: config -> checkpoints, metrics, samples and a report in a work directory.

  python -m gptjax.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m gptjax.train --config=configs/quickstart.py:runlocal --workdir=runs/try --config.train.num_steps=9

The same command on the same work directory continues where it stopped. Ctrl-C or SIGTERM saves first.
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


def main(argv: list[str]) -> None:
    flag_values = flags.FlagValues()
    cli.define_config(flag_values, argv)
    flags.DEFINE_string(
        "workdir",
        None,
        "where everything of the run is written, e.g. --workdir=runs/first",
        flag_values=flag_values,
    )
    cli.parse(flag_values, argv, __doc__)
    if not flag_values.workdir:
        raise UserError("--workdir is missing; e.g. --workdir=runs/first")
    train(cli.read_config(flag_values), Path(flag_values.workdir), chosen=cli.chosen_options(flag_values))


def train(config: config_lib.Config, workdir: Path, *, chosen: Collection[str] = ()) -> None:
    """Trains to the end, or raises RunError after saving what there is.

    `chosen`: options that were set on the command line; those of the model are not taken from `init_from`.
    """
    # ---- Set-up: everything that can be wrong is found before anything is compiled -------------------------------
    import jax
    import optax

    from gptjax.data import corpus, pipeline
    from gptjax.evaluation.likelihood import Likelihood, Scorer
    from gptjax.evaluation.report import write_report
    from gptjax.generation.samples import Sampler
    from gptjax.model import gpt
    from gptjax.model.architecture import Architecture
    from gptjax.optim.optimizers import make_optimizer
    from gptjax.parallel import mesh as mesh_lib
    from gptjax.parallel import partition, runtime
    from gptjax.training import checkpoints as checkpoints_lib
    from gptjax.training import manifest, metrics, pretrained, stopping, throughput
    from gptjax.training import workdir as workdir_lib
    from gptjax.training.state import abstract_state, initial_state
    from gptjax.training.step import make_train_step

    origin = pretrained.find(config.init_from)
    config = pretrained.adopt(config, origin, chosen)
    rows = config.train.batch_size // config.train.accumulation
    runtime.start(config.mesh, rows=rows, cache_dir=corpus.cache_directory(config))
    mesh = mesh_lib.make_mesh(config.mesh)
    with_devices = config.copy_and_resolve_references()
    with_devices.mesh.data = mesh.shape["data"]
    config_lib.validate(with_devices)
    chief = jax.process_index() == 0

    sources = corpus.open_sources(config, progress=cli.data_progress if chief and sys.stderr.isatty() else None)
    tokenizer = sources[0].store.tokenizer()
    template = corpus.chat_template(sources)
    batches = corpus.open_batches(sources, config, rows=_process_rows(config.train.batch_size))
    validation = {source.name: source.store.split("validation") for source in sources}
    config = pretrained.with_vocabulary(config, origin, tokenizer)
    config = config_lib.resolve(config, tokenizer.vocab_size, batches.steps_per_epoch)
    num_steps = config.train.num_steps
    workdir_lib.claim(workdir, config)

    architecture = Architecture.from_config(config.model, tokenizer.vocab_size)
    graphdef, abstract_params = gpt.abstract_model(architecture)
    optimizer, schedule = make_optimizer(
        config.optimizer,
        config.schedule,
        num_steps=num_steps,
        warmup=config.schedule.warmup,
        decay=config.schedule.decay,
    )
    ema = config.train.ema_decay > 0
    target = abstract_state(architecture, optimizer, mesh, ema=ema)
    checkpoints = checkpoints_lib.Checkpoints(workdir, keep=config.train.keep_checkpoints)
    start = max(checkpoints.steps(), default=0)
    data_identity = {"source": config.data.source, **corpus.identity(sources)}
    if start:
        workdir_lib.check_data(workdir, data_identity)
        state = checkpoints.restore(start, target)
    else:
        state = initial_state(architecture, optimizer, mesh, ema=ema, seed=config.seed)
        if origin is not None:
            state = pretrained.load(origin, state)
    if chief:
        workdir_lib.write_whole(workdir / "config.json", config_lib.to_json(config))
        tokenizer.save(workdir / "tokenizer.json")
        about = manifest.build(config, mesh, abstract_params, data_identity)
        workdir_lib.write_whole(workdir / "manifest.json", json.dumps(about, indent=1) + "\n")

    train_step = make_train_step(config, graphdef, optimizer, schedule, mesh, target)
    scorer = Scorer(
        graphdef,
        mesh,
        context_length=config.model.context_length,
        batch_size=config.evaluation.batch_size or 2 * config.train.batch_size,
    )
    sampler = None
    if config.logging.samples:
        sampler = Sampler(config, workdir, mesh, architecture, graphdef, tokenizer, template, start=start)
    tokens_per_step = config.train.batch_size * config.model.context_length
    peak = throughput.peak_flops(mesh.devices.flat[0], config.model.compute_dtype)
    meter = throughput.Meter(tokens_per_step, architecture.flops_per_token(), peak and peak * mesh.devices.size)
    log = metrics.MetricsLog(workdir, step=start, tensorboard=config.logging.tensorboard and chief)
    history = metrics.read(log.path)
    guard = stopping.DivergenceGuard(config.train.divergence_threshold)
    guard.lowest = min((x["loss"] for x in history if x["split"] == "train"), default=math.inf)
    stopper = stopping.EarlyStopping(config.train.early_stopping_patience, history)
    display = metrics.Display(num_steps, start=start, enabled=chief)
    training_tokens = sum(source.store.split("train").num_tokens for source in sources)
    display.print(
        f"{gpt.parameter_count(abstract_params):,} parameters, {training_tokens:,} training tokens, "
        f"vocabulary {tokenizer.vocab_size}, {num_steps} steps of {tokens_per_step:,} tokens "
        f"({num_steps / batches.steps_per_epoch:.2f} epochs), mesh {_describe(mesh)}"
    )
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
        values = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        line = {"step": step, "split": "train", **values, **meter.read()}
        line |= {"tokens_seen": step * tokens_per_step, "epoch": batches.epoch(step)}
        line |= {f"epoch/{name}": epoch for name, epoch in batches.epochs(step).items()}
        log.write(line)
        display.train(line)
        guard.check(step, values["loss"], advice())

    def evaluate(step: int) -> float:
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
        log.write(line)
        display.validation(line)
        if sampler:
            sampler.sample(step, state.evaluation_params)
        return likelihood.loss

    def save(step: int, validation_loss: float | None) -> None:
        if not math.isfinite(parameter_norm(state.params)):  # or it would push a good checkpoint out
            raise RunError(f"the parameters are not finite after step {step}. {advice()}")
        scores = {} if validation_loss is None else {"validation_loss": validation_loss}
        checkpoints.save(step, state, config=config, tokenizer=tokenizer, template=template, metrics=scores)

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
                    paused = time.perf_counter()
                    loss = evaluate(step)
                    improved = stopper.update(loss)
                    if improved or last or stopper.exhausted or step % config.train.checkpoint_every == 0:
                        save(step, loss)
                    meter.pause(time.perf_counter() - paused)
                elif step > start and step % config.train.checkpoint_every == 0:
                    flush()
                    paused = time.perf_counter()
                    save(step, None)
                    meter.pause(time.perf_counter() - paused)
                if last or stopper.exhausted:
                    break
                if stop.received:
                    flush()
                    if step not in checkpoints.steps():
                        save(step, None)
                    checkpoints.wait()
                    raise RunError(
                        f"stopped by {stop.received} at step {step}; saved in {checkpoints.directory / str(step)}. "
                        "The same command continues"
                    )

                waited = time.perf_counter()
                _, batch = next(stream)
                waited = time.perf_counter() - waited
                batch = partition.to_device(batch, mesh)
                dispatched = time.perf_counter()
                with jax.transfer_guard("disallow"):
                    state, step_metrics = train_step(state, batch)
                if step == start:
                    jax.block_until_ready(step_metrics)
                    display.print(f"first step after {time.perf_counter() - meter.begin:.1f} s")
                    meter.pause(time.perf_counter() - dispatched)  # compilation
                meter.step(waited)
                flush()  # of the step before: the device already works on this one
                if (step + 1) % config.logging.every == 0 or step + 1 == num_steps:
                    pending = (step + 1, step_metrics)
                # At most two steps are in flight, so that memory stays bounded and Ctrl-C acts at once.
                jax.block_until_ready(previous)
                previous = step_metrics["loss"]
        checkpoints.wait()
    except OSError as error:
        saved = checkpoints.steps() or "none"
        where = f"Checkpoints: {saved} in {checkpoints.directory}"
        raise RunError(f"{error}. {where}; the same command continues") from error
    finally:
        stop.restore()
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


def _process_rows(batch_size: int) -> slice:
    import jax

    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def _describe(mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"


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
