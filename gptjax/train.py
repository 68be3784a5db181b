"""Train a GPT: config -> checkpoints, metrics, samples and a report in a work directory.

  python -m gptjax.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m gptjax.train --config=configs/quickstart.py:runlocal --workdir=/tmp/try --config.optimizer.learning_rate=3e-4

The same command on the same work directory continues where it stopped. Ctrl-C or SIGTERM saves first.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from absl import flags

from gptjax import cli
from gptjax import config as config_lib
from gptjax.errors import RunError, UserError

# Options that may differ when a work directory is continued: none of them changes a parameter that is trained.
FREE_OPTIONS = (
    "logging.",
    "evaluation.",
    "mesh.",
    "data.cache_dir",
    "data.data_dir",
    "model.attention",
    "model.scan_unroll",
    "model.remat",
    "train.accumulation",
    "train.checkpoint_every",
    "train.keep_checkpoints",
)


def main(argv: list[str]) -> None:
    flag_values = flags.FlagValues()
    cli.define_config(flag_values, argv)
    flags.DEFINE_string(
        "workdir", None, "where everything of the run is written, e.g. --workdir=runs/first", flag_values=flag_values
    )
    cli.parse(flag_values, argv, __doc__)
    if not flag_values.workdir:
        raise UserError("--workdir is missing; e.g. --workdir=runs/first")
    train(cli.read_config(flag_values), Path(flag_values.workdir))


def train(config: config_lib.Config, workdir: Path) -> None:
    """Trains to the end, or raises RunError after saving what there is."""
    # ---- Set-up: everything that can be wrong is found before anything is compiled -------------------------------
    import jax

    from gptjax.data import corpus, pipeline
    from gptjax.evaluation.likelihood import Scorer
    from gptjax.evaluation.report import write_report
    from gptjax.model import gpt
    from gptjax.model.architecture import Architecture
    from gptjax.optim.optimizers import make_optimizer
    from gptjax.parallel import mesh as mesh_lib
    from gptjax.parallel import partition
    from gptjax.training import checkpoints as checkpoints_lib
    from gptjax.training import manifest, metrics, throughput
    from gptjax.training.state import abstract_state, initial_state
    from gptjax.training.step import make_train_step

    mesh_lib.provide_cpu_devices(config.mesh, config.train.batch_size // config.train.accumulation)
    jax.config.update("jax_compilation_cache_dir", str(corpus.cache_directory(config) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    mesh = mesh_lib.make_mesh(config.mesh)
    chief = jax.process_index() == 0

    store = corpus.open_corpus(config, progress=cli.data_progress if chief and sys.stderr.isatty() else None)
    tokenizer = store.tokenizer()
    batches = pipeline.Batches(
        store.split("train"),
        context_length=config.model.context_length,
        batch_size=config.train.batch_size,
        seed=config.seed,
        isolate_documents=config.data.isolate_documents,
        rows=_process_rows(config.train.batch_size),
    )
    validation = store.split("validation")
    config = resolve(config, tokenizer.vocab_size, batches.steps_per_epoch)
    num_steps = config.train.num_steps
    _claim_workdir(workdir, config)

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
    data_identity = {"source": config.data.source, **{k: store.manifest[k] for k in ("source_fingerprint", "tokenizer")}}
    if start:
        _same_data(workdir, data_identity)
        state = checkpoints.restore(start, target)
    else:
        state = initial_state(architecture, optimizer, mesh, ema=ema, seed=config.seed)
        if config.init_from:
            state = _initialise_from(config.init_from, state, abstract_params, mesh, tokenizer)
    if chief:
        (workdir / "config.json").write_text(config_lib.to_json(config))
        tokenizer.save(workdir / "tokenizer.json")
        about = manifest.build(config, mesh, abstract_params, data_identity)
        (workdir / "manifest.json").write_text(json.dumps(about, indent=1) + "\n")

    train_step = make_train_step(config, graphdef, optimizer, schedule, mesh, target)
    scorer = Scorer(
        graphdef,
        mesh,
        context_length=config.model.context_length,
        batch_size=config.evaluation.batch_size or 2 * config.train.batch_size,
    )
    sampler = Sampler(config, workdir, mesh, architecture, graphdef, tokenizer) if config.logging.samples else None
    tokens_per_step = config.train.batch_size * config.model.context_length
    peak = throughput.peak_flops(mesh.devices.flat[0], config.model.compute_dtype)
    meter = throughput.Meter(tokens_per_step, architecture.flops_per_token(), peak and peak * mesh.devices.size)
    log = metrics.MetricsLog(workdir, step=start, tensorboard=config.logging.tensorboard and chief)
    history = metrics.read(log.path)
    guard = metrics.DivergenceGuard(config.train.divergence_threshold)
    guard.lowest = min((x["loss"] for x in history if x["split"] == "train"), default=math.inf)
    stopper = EarlyStopping(config.train.early_stopping_patience, history)
    display = metrics.Display(num_steps, start=start, enabled=chief)
    display.print(
        f"{gpt.parameter_count(abstract_params):,} parameters, {store.split('train').num_tokens:,} training tokens, "
        f"vocabulary {tokenizer.vocab_size}, {num_steps} steps of {tokens_per_step:,} tokens "
        f"({num_steps / batches.steps_per_epoch:.2f} epochs), mesh {_describe(mesh)}"
    )
    if start:
        display.print(f"continuing at step {start} from {checkpoints.directory / str(start)}")

    # ---- What the loop does beside stepping ----------------------------------------------------------------------
    pending: tuple[int, dict] | None = None  # metrics of a step that is not yet waited for

    def flush() -> None:
        """Fetches and writes the metrics of the last logged step; raises if the run has diverged."""
        nonlocal pending
        if pending is None:
            return
        step, device_metrics = pending
        pending = None
        values = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        advice = (
            f"Try a lower --config.optimizer.learning_rate. Checkpoints: {checkpoints.steps() or 'none'} in "
            f"{checkpoints.directory}"
        )
        line = {"step": step, "split": "train", **values, **meter.read()}
        line |= {"tokens_seen": step * tokens_per_step, "epoch": batches.epoch(step)}
        log.write(line)
        display.train(line)
        guard.check(step, values["loss"], advice)

    def evaluate(step: int) -> float:
        likelihood = scorer.score(
            state.evaluation_params,
            validation,
            eot_id=tokenizer.eot_id,
            stride=config.evaluation.stride,
            max_tokens=config.evaluation.max_tokens,
        )
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
        log.write(line)
        display.validation(line)
        if sampler:
            sampler.sample(step, state.evaluation_params)
        return likelihood.loss

    def save(step: int, validation_loss: float | None) -> None:
        scores = {} if validation_loss is None else {"validation_loss": validation_loss}
        checkpoints.save(step, state, config=config, tokenizer=tokenizer, metrics=scores)

    # ---- The loop: evaluate and save the state as it is, and only then advance -----------------------------------
    stop = StopSignals()
    stream = pipeline.iterate(batches, start)
    previous = None
    status = "done"
    try:
        with jax.set_mesh(mesh):
            for step in range(start, num_steps + 1):
                last = step == num_steps
                if step > start and (last or step % config.evaluation.every == 0):
                    flush()
                    paused = time.perf_counter()
                    loss = evaluate(step)
                    improved, exhausted = stopper.update(loss)
                    if improved or last or exhausted or step % config.train.checkpoint_every == 0:
                        save(step, loss)
                    meter.pause(time.perf_counter() - paused)
                    if exhausted:
                        status = f"stopped early: {stopper.patience} evaluations without improvement"
                        break
                elif step > start and step % config.train.checkpoint_every == 0:
                    flush()
                    paused = time.perf_counter()
                    save(step, None)
                    meter.pause(time.perf_counter() - paused)
                if stop.received and not last:
                    flush()
                    if step not in checkpoints.steps():
                        save(step, None)
                    checkpoints.wait()
                    raise RunError(
                        f"stopped by {stop.received} at step {step}; saved in {checkpoints.directory / str(step)}. "
                        "The same command continues"
                    )
                if last:
                    break

                waited = time.perf_counter()
                _, batch = next(stream)
                waited = time.perf_counter() - waited
                batch = partition.to_device(batch, mesh)
                with jax.transfer_guard("disallow"):
                    state, step_metrics = train_step(state, batch)
                if step == start:
                    compiling = time.perf_counter()
                    jax.block_until_ready(step_metrics)
                    display.print(f"first step after {time.perf_counter() - meter.begin:.1f} s")
                    meter.pause(time.perf_counter() - compiling)
                meter.step(waited)
                flush()  # of the step before: the device already works on this one
                if (step + 1) % config.logging.every == 0 or step + 1 == num_steps:
                    pending = (step + 1, step_metrics)
                # At most two steps are in flight, so that memory stays bounded and Ctrl-C acts at once.
                jax.block_until_ready(previous)
                previous = step_metrics["loss"]
        checkpoints.wait()
    finally:
        stop.restore()
        stream.close()
        display.close()
        log.close()
        checkpoints.close()
        if chief:
            write_report(workdir)

    if chief:
        _summary(status, workdir, stopper.best)


def resolve(config: config_lib.Config, vocab_size: int, steps_per_epoch: float) -> config_lib.Config:
    """The config with durations in steps and the vocabulary filled in: what config.json holds."""
    config = config.copy_and_resolve_references()
    tokens_per_step = config.train.batch_size * config.model.context_length

    def steps(value, total):
        return config_lib.resolve_duration(
            value, total=total, tokens_per_step=tokens_per_step, steps_per_epoch=steps_per_epoch
        )

    resolved = config.to_dict()
    num_steps = max(steps(config.train.num_steps, None), 1)
    for path, option in config_lib.flat_options().items():
        if option.duration:
            section, name = path.split(".")
            at_least = 0 if section == "schedule" else 1
            resolved[section][name] = max(steps(resolved[section][name], num_steps), at_least)
    resolved["model"]["vocab_size"] = resolved["model"]["vocab_size"] or vocab_size
    if resolved["model"]["vocab_size"] < vocab_size:
        raise UserError(
            f"model.vocab_size {resolved['model']['vocab_size']} is smaller than the tokenizer's {vocab_size}; leave it 0"
        )
    return config_lib.from_json(json.dumps(resolved))


class EarlyStopping:
    """Counts evaluations since the best one, the ones of an earlier part of the run included."""

    def __init__(self, patience: int, history: list[dict]):
        self.patience, self.best, self.since = patience, math.inf, 0
        for line in history:
            if line["split"] == "validation":
                self.update(line["loss"])

    def update(self, loss: float) -> tuple[bool, bool]:
        """(is this the best so far, is patience exhausted)."""
        improved = loss < self.best
        self.best, self.since = min(loss, self.best), 0 if improved else self.since + 1
        return improved, 0 < self.patience <= self.since


class StopSignals:
    """Notes SIGTERM and Ctrl-C so that the loop can save; a second Ctrl-C stops at once."""

    def __init__(self):
        self.received = ""
        self._old = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: somebody else handles signals
                return

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Sampler:
    """Writes a few continuations to WORKDIR/samples.jsonl at each evaluation."""

    def __init__(self, config, workdir, mesh, architecture, graphdef, tokenizer):
        from gptjax.generation.engine import Generator
        from gptjax.generation.sampling import SamplingParams

        self.config, self.path = config, workdir / "samples.jsonl"
        self._generator = Generator(architecture, graphdef, None, tokenizer, mesh=mesh)
        self._sampling = SamplingParams(
            max_new_tokens=config.logging.sample_tokens, temperature=0.8, top_k=200, seed=config.seed
        )

    def sample(self, step: int, params) -> None:
        import jax

        prompt = self.config.logging.sample_prompt
        self._generator.params = params
        completions = self._generator.complete([prompt] * self.config.logging.samples, self._sampling)
        if jax.process_index():
            return
        with self.path.open("a") as file:
            for completion in completions:
                line = {"step": step, "prompt": prompt, "text": completion.text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _process_rows(batch_size: int) -> slice:
    import jax

    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def _claim_workdir(workdir: Path, config: config_lib.Config) -> None:
    """Makes the directory, or checks that the run in it has this config. Raises UserError with the differences."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}") from None
    path = workdir / "config.json"
    if not os.access(workdir, os.W_OK):
        raise UserError(f"--workdir={workdir} is not writable")
    if not path.exists():
        return
    old = config_lib.from_json(path.read_text())
    differences = []
    for name in config_lib.flat_options():
        before, now = (_value(c, name) for c in (old, config))
        if before != now and not name.startswith(FREE_OPTIONS):
            differences.append(f"  {name}: {before!r} there, {now!r} now")
    if differences:
        raise UserError(
            f"{workdir} holds a run of another config; use a new --workdir, or the old values:\n" + "\n".join(differences)
        )


def _value(config: config_lib.Config, path: str):
    for key in path.split("."):
        config = config[key]
    return config


def _same_data(workdir: Path, identity: dict) -> None:
    recorded = json.loads((workdir / "manifest.json").read_text())["data"]
    for key in ("source_fingerprint", "tokenizer"):
        if recorded[key] != identity[key]:
            raise UserError(
                f"the {key.replace('_', ' ')} of {identity['source']} is not the one {workdir} was trained on; "
                "restore the data or use a new --workdir"
            )


def _initialise_from(path: str, state, abstract_params, mesh, tokenizer):
    from gptjax.parallel import partition
    from gptjax.training import checkpoints

    trained = checkpoints.load(
        Path(path), shardings=lambda abstract: partition.parameter_shardings(abstract, mesh), like=abstract_params
    )
    if trained.tokenizer.sha256 != tokenizer.sha256:
        raise UserError(
            f"init_from={path} was trained with another tokenizer; add --config.tokenizer=hf:{path} to use its own"
        )
    ema_params = None if state.ema_params is None else trained.params
    return state.replace(params=trained.params, ema_params=ema_params)


def _describe(mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"


def _summary(status: str, workdir: Path, best: float) -> None:
    print(f"{status}; best validation loss {best:.4f}, perplexity {math.exp(min(best, 700)):.2f}")
    print(f"curves:   {workdir / 'report.html'}")
    print(f"evaluate: python -m gptjax.evaluate --workdir={workdir}")
    print(f"generate: python -m gptjax.generate --workdir={workdir} --prompt='...'")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
