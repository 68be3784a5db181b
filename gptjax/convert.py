"""Convert models: Hugging Face directory -> work directory, and back. GPT-2, Llama and Qwen3 layouts, without torch.

  python -m gptjax.convert --from=hf:models/gpt2 --to=runs/gpt2
  python -m gptjax.convert --from=runs/mine --to=hf:models/mine

The work directory holds one checkpoint, which evaluate, generate and `--config.init_from` read like any other.
"""

from pathlib import Path

from absl import flags

from gptjax import cli
from gptjax.errors import UserError


def main(argv: list[str]) -> None:
    flag_values = flags.FlagValues()
    define = {"flag_values": flag_values}
    flags.DEFINE_string("from", None, "hf:DIR or a work directory, e.g. --from=hf:models/gpt2", **define)
    flags.DEFINE_string("to", None, "hf:DIR or a work directory, e.g. --to=runs/gpt2", **define)
    flags.DEFINE_string("checkpoint", "best", "to export: best, last or a step, e.g. --checkpoint=last", **define)
    cli.parse(flag_values, argv, __doc__)
    source, target = flag_values["from"].value, flag_values["to"].value
    for name, value in (("from", source), ("to", target)):
        if not value:
            raise UserError(f"--{name} is missing; {flag_values[name].help}")
    if source.startswith("hf:") == target.startswith("hf:"):
        raise UserError(f"--from={source} --to={target}: exactly one of the two is a Hugging Face directory, hf:DIR")
    place = Path(target.removeprefix("hf:"))
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"--to={target} exists; remove it or name a new directory")
    if source.startswith("hf:"):
        import_model(Path(source.removeprefix("hf:")), place)
    else:
        export_model(Path(source), flag_values.checkpoint, place)


def import_model(directory: Path, workdir: Path) -> None:
    """Writes the model and the tokenizer of a Hugging Face directory as a checkpoint of step 0."""
    from gptjax import config as config_lib
    from gptjax.data.tokenizers import build_tokenizer
    from gptjax.model import gpt, huggingface
    from gptjax.training import checkpoints
    from gptjax.training import workdir as workdir_lib

    config, params = huggingface.read_directory(directory)
    tokenizer = build_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.model.vocab_size}"
        )
    path = checkpoints.write_parameters(workdir, params, config=config, tokenizer=tokenizer)
    workdir_lib.write_whole(workdir / "config.json", config_lib.to_json(config))
    tokenizer.save(workdir / "tokenizer.json")
    print(f"{gpt.parameter_count(params):,} parameters; written: {path}")


def export_model(workdir: Path, which: str, directory: Path) -> None:
    """Writes a checkpoint in the Hugging Face layout that has all its options."""
    from gptjax.model import gpt, huggingface
    from gptjax.training import checkpoints

    trained = checkpoints.load(workdir, which)
    tokenizer = trained.tokenizer
    huggingface.write_directory(directory, trained.architecture, trained.params, eot_id=tokenizer.eot_id)
    tokenizer.save(directory / "tokenizer.json")
    print(f"{gpt.parameter_count(trained.params):,} parameters of step {trained.step}; written: {directory}")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
