"""Convert models: Hugging Face directory -> work directory, and back, without torch.

The layouts are those of GPT-2, Llama, Mistral, Qwen2 and Qwen3.

  python -m gptjax.convert --from=hf:models/gpt2 --to=runs/gpt2
  python -m gptjax.convert --from=runs/mine --to=hf:models/mine --dtype=bfloat16
  python -m gptjax.convert --from=runs/lora --to=peft:adapters/mine
  python -m gptjax.convert --from=hf:models/gpt2 --adapter=adapters/mine --to=runs/both

hf:NAME is a directory, or a name on the hub where there is a cache or a network. The work directory holds one
checkpoint, which evaluate, generate and `--config.init_from` read like any other. Adapters (model.lora_rank) are
merged into hf:DIR; peft:DIR has them alone, in PEFT's format.
"""

import sys
from pathlib import Path

from absl import flags

from gptjax import cli
from gptjax.errors import UserError
from gptjax.files import write_whole


def main(argv: list[str]) -> None:
    flag_values = flags.FlagValues()
    define = {"flag_values": flag_values}
    flags.DEFINE_string("from", None, "hf:DIR_OR_NAME or a work directory, e.g. --from=hf:models/gpt2", **define)
    flags.DEFINE_string("to", None, "hf:DIR, peft:DIR or a work directory, e.g. --to=runs/gpt2", **define)
    flags.DEFINE_string("checkpoint", "best", "to export: best, last or a step, e.g. --checkpoint=last", **define)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "to export, e.g. --dtype=bfloat16", **define)
    flags.DEFINE_string("max_shard_size", "5GB", "of a file to export, e.g. --max_shard_size=500MB", **define)
    flags.DEFINE_bool(
        "allow_pickle",
        False,
        "import .bin files, which can run code when they are opened, e.g. --allow_pickle (needs torch)",
        **define,
    )
    flags.DEFINE_string("adapter", "", "to import: adapters of PEFT for hf:DIR, e.g. --adapter=adapters/mine", **define)
    cli.parse(flag_values, argv, __doc__)
    source, target = flag_values["from"].value, flag_values["to"].value
    for name, value in (("from", source), ("to", target)):
        if not value:
            raise UserError(f"--{name} is missing; {flag_values[name].help}")
    if source.startswith("hf:") == target.startswith(("hf:", "peft:")):
        raise UserError(
            f"--from={source} --to={target}: exactly one of the two is a work directory, the other hf:DIR or peft:DIR"
        )
    if flag_values.adapter and not source.startswith("hf:"):
        raise UserError(f"--adapter={flag_values.adapter} belongs to a model of --from=hf:DIR, not to {source}")
    place = Path(target.removeprefix("hf:").removeprefix("peft:"))
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"--to={target} exists; remove it or name a new directory")
    if source.startswith("hf:"):
        adapter, allow_pickle = flag_values.adapter, flag_values.allow_pickle
        import_model(source.removeprefix("hf:"), place, adapter=adapter, allow_pickle=allow_pickle)
    elif target.startswith("peft:"):
        export_adapter(Path(source), flag_values.checkpoint, place)
    else:
        from gptjax.model.huggingface.files import parse_size

        size = parse_size(flag_values.max_shard_size)
        export_model(Path(source), flag_values.checkpoint, place, dtype=flag_values.dtype, max_shard_bytes=size)


def import_model(name: str, workdir: Path, *, adapter: str = "", allow_pickle: bool = False) -> None:
    """Writes the model, the tokenizer and the chat template of a Hugging Face directory as a checkpoint of step 0.

    With `adapter`, a directory or name of PEFT, it has these adapters.
    """
    from gptjax import config as config_lib
    from gptjax.artifacts import checkpoints
    from gptjax.data.tokenization import huggingface as tokenizer_files
    from gptjax.model import gpt
    from gptjax.model.architecture import Architecture
    from gptjax.model.huggingface import adapters as huggingface_adapters
    from gptjax.model.huggingface import files as huggingface_files
    from gptjax.model.huggingface import weights as huggingface

    directory = huggingface_files.locate(name, allow_pickle=allow_pickle)
    config = config_lib.get_default()
    config.model.update(huggingface.read_config(directory))
    config.tokenizer = f"hf:{name}"
    tokenizer = tokenizer_files.read_tokenizer(directory)
    try:
        template = tokenizer_files.read_template(directory, tokenizer)
    except UserError as error:
        template = None
        print(f"the chat template is left out: {error}", file=sys.stderr)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model only {config.model.vocab_size}"
        )
    architecture = Architecture.from_config(config.model, 0)
    params = huggingface.read_parameters(directory, architecture, allow_pickle=allow_pickle)
    if adapter:
        place = huggingface_files.locate(adapter)
        options, params = huggingface_adapters.read_adapter(place, architecture, params)
        config.model.update(options)
    generation = huggingface_files.read_generation_config(directory)
    generation["begin_token_ids"] = tokenizer_files.begin_ids(tokenizer, template)
    path = checkpoints.write_parameters(
        workdir,
        params,
        config=config,
        tokenizer=tokenizer,
        template=template,
        generation=generation,
    )
    write_whole(workdir / "config.json", config_lib.to_json(config))
    tokenizer.save(workdir / "tokenizer.json")
    print(f"{gpt.parameter_count(params):,} parameters; written: {path}")


def export_model(workdir: Path, which: str, directory: Path, *, dtype: str, max_shard_bytes: int) -> None:
    """Writes a checkpoint in the Hugging Face layout that has all its options."""
    from gptjax.artifacts import loading
    from gptjax.data.tokenization import huggingface as tokenizer_files
    from gptjax.model import gpt
    from gptjax.model.huggingface import files as huggingface_files
    from gptjax.model.huggingface import weights as huggingface

    trained = loading.load(workdir, which)
    tokenizer, template = trained.tokenizer, trained.template
    tokenizer_files.check_exportable(tokenizer)
    huggingface.write_directory(
        directory,
        trained.architecture,
        trained.params,
        eot_id=tokenizer.eot_id,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    tokenizer_files.write(directory, tokenizer, template, context_length=trained.architecture.context_length)
    ends = list(trained.generation.get("eos_token_ids") or [tokenizer.eot_id])
    if template is not None and (turn := tokenizer.special_tokens[template.end_of_turn]) not in ends:
        ends.append(turn)
    generation = trained.generation | {"eos_token_ids": ends}
    huggingface_files.write_generation_config(directory, generation, eot_id=tokenizer.eot_id)
    print(f"{gpt.parameter_count(trained.params):,} parameters of step {trained.step}; written: {directory}")


def export_adapter(workdir: Path, which: str, directory: Path) -> None:
    """Writes the adapters of a checkpoint in PEFT's format."""
    from gptjax.artifacts import loading
    from gptjax.model import gpt, lora
    from gptjax.model.huggingface import adapters as huggingface_adapters

    trained = loading.load(workdir, which, merge=False)
    origin = trained.config.init_from
    base = origin.removeprefix("hf:") if origin.startswith("hf:") else None
    huggingface_adapters.write_adapter(directory, trained.architecture, trained.params, base=base)
    count = gpt.parameter_count(lora.split(trained.params)[0])
    of = base or "the model that the run began with"
    print(f"{count:,} parameters of step {trained.step}, adapters of {of}; written: {directory}")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
