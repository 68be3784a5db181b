"""Convert models: Hugging Face directory -> work directory, and back, without torch.

The layouts are those of GPT-2, Llama, Mistral, Qwen2 and Qwen3.

  python -m gptjax.convert --from=hf:models/gpt2 --to=runs/gpt2
  python -m gptjax.convert --from=runs/mine --to=hf:models/mine --dtype=bfloat16
  python -m gptjax.convert --from=runs/lora --to=peft:adapters/mine
  python -m gptjax.convert --from=hf:models/gpt2 --adapter=adapters/mine --to=runs/both

Each directory may be in a bucket: --from=gs://BUCKET/runs/mine --to=hf:gs://BUCKET/models/mine.
hf:NAME is a directory, or the name of a model on the hub (from the local cache or the network). The work directory
holds one checkpoint, which evaluate, generate and `--config.init_from` read like any other. Adapters (model.lora_rank)
are merged into hf:DIR; peft:DIR has them alone, in PEFT's format.

A result appears whole or not at all: after a kill, the same command starts anew; if the result is complete, it says so
and does nothing. Whatever else is at --to is never overwritten. Whether prompts begin with the beginning-of-text token
is read from the model's tokenizer (add_bos_token); --add_bos_token=true or false overrides it.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from gptjax import cli, files
from gptjax.buckets import Bucket, cache, is_url
from gptjax.errors import RunError, UserError

RECORD = "conversion.json"  # in every result: what it was made from, so that repeating the command succeeds
BEGUN = f".{RECORD}"  # in a bucket, while a result is copied there
_SMALL = 16 << 20  # bytes; of larger inputs, size and time of change are compared instead of the content


def main(argv: list[str]) -> None:
    flag_values = flags.FlagValues()
    define = {"flag_values": flag_values}
    flags.DEFINE_string("from", None, "hf:DIR_OR_NAME or a work directory, e.g. --from=hf:models/gpt2", **define)
    flags.DEFINE_string("to", None, "hf:DIR, peft:DIR or a work directory, e.g. --to=runs/gpt2", **define)
    flags.DEFINE_string("checkpoint", "best", "to export: best, last or a step, e.g. --checkpoint=last", **define)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "of exported weights, e.g. --dtype=bfloat16", **define
    )
    flags.DEFINE_string("max_shard_size", "5GB", "largest exported file, e.g. --max_shard_size=500MB", **define)
    flags.DEFINE_bool(
        "allow_pickle",
        False,
        "import .bin files, which can run code when they are opened, e.g. --allow_pickle (needs torch)",
        **define,
    )
    flags.DEFINE_string("adapter", "", "imported PEFT adapters of hf:DIR, e.g. --adapter=adapters/mine", **define)
    flags.DEFINE_enum(
        "add_bos_token",
        "auto",
        ["auto", "true", "false"],
        "imported models: whether prompts begin with the beginning-of-text token; auto = as the tokenizer says, e.g. "
        "--add_bos_token=false",
        **define,
    )
    cli.parse(flag_values, argv, __doc__)
    source, target = flag_values["from"].value, flag_values["to"].value
    for name, value in (("from", source), ("to", target)):
        if not value:
            raise UserError(f"--{name} is missing; {flag_values[name].help}")
    if source.startswith("hf:") == target.startswith(("hf:", "peft:")):
        raise UserError(
            f"--from={source} --to={target}: one of them must be a work directory, and the other hf:DIR or peft:DIR"
        )
    if flag_values.adapter and not source.startswith("hf:"):
        raise UserError(f"--adapter={flag_values.adapter} needs --from=hf:DIR, not --from={source}")
    place = target.removeprefix("hf:").removeprefix("peft:")
    if source.startswith("hf:"):
        name, adapter, allow_pickle = source.removeprefix("hf:"), flag_values.adapter, flag_values.allow_pickle
        begin = flag_values.add_bos_token
        import_model(name, place, adapter=adapter, allow_pickle=allow_pickle, add_bos_token=begin)
    elif target.startswith("peft:"):
        export_adapter(_source(source), flag_values.checkpoint, place)
    else:
        from gptjax.model.huggingface.files import parse_size

        size = parse_size(flag_values.max_shard_size)
        workdir = _source(source)
        export_model(workdir, flag_values.checkpoint, place, dtype=flag_values.dtype, max_shard_bytes=size)


def _source(text: str) -> Path:
    """The work directory of --from, or the mirror of a URL."""
    if not is_url(text):
        return _path("from", text)
    from gptjax.artifacts import mirror

    return mirror.opened(text)


def _path(flag: str, text: str) -> Path:
    """A path that a flag gives, ~ expanded and links followed."""
    try:
        path = Path(text).expanduser() if text else None
        if path is not None:
            return path.resolve()
    except (RuntimeError, ValueError, OSError):  # ~nobody, a NUL, links in a circle
        pass
    raise UserError(f"--{flag}={text[:200]!r} is not a path of a directory")


# ---- A result is whole ---------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a result appears.

    Attributes:
      path: the directory; for a bucket, its mirror, which has only the lock.
      name: the path or URL, for messages.
    """

    path: Path
    name: str
    bucket: Bucket | None = None

    @classmethod
    def of(cls, text: str | Path) -> "_Place":
        """The place of --to, a path or a URL."""
        if not is_url(text):
            path = _path("to", str(text))
            return cls(path, str(path))
        from gptjax.artifacts import mirror

        path = mirror.place(text, part="converted")
        bucket = mirror.bucket_of(path)
        return cls(path, bucket.url, bucket)


@contextlib.contextmanager
def _result(place: _Place, request: dict[str, Any]) -> Iterator[Path | None]:
    """A directory to write into, which becomes `place` at the end, with a record of `request` in it.

    None if `place` holds the finished result of the same request. Raises UserError if it holds anything else.
    """
    if place.bucket:
        with _published(place, place.bucket, request) as directory:
            yield directory
        return
    path = place.path
    files.sweep(path.parent)
    if path.exists() and not path.is_dir():
        raise UserError(f"--to={place.name} exists and is not a directory; name a new one")
    if _is_done(place, request, _sizes(path)):
        yield None
        return
    try:
        with files.whole_directory(path) as directory:
            yield directory
            files.write_json(directory / RECORD, request | {"outputs": _sizes(directory)})
    except (RunError, OSError) as error:
        raise _of_the_place(error, directory if "directory" in locals() else path, path) from None
    if not (path / RECORD).is_file():
        raise RunError(f"{path} was written by another process at the same time; look at what is there")


@contextlib.contextmanager
def _published(place: _Place, bucket: Bucket, request: dict[str, Any]) -> Iterator[Path | None]:
    """`_result` for a bucket: it has BEGUN while files are copied there, and RECORD once all are."""
    from gptjax.artifacts.lock import Lock

    begun = (json.dumps(request) + "\n").encode()
    lock = Lock.take(place.path)
    try:
        there = {name: about.size for name, about in bucket.list().items() if not name.startswith(".")}
        if bucket.read(BEGUN) != begun and _is_done(place, request, there):
            yield None
            return
        # Not below the mirror, where Orbax would write to the bucket.
        built = cache() / f"converted-{place.path.parent.name}"
        files.sweep(built.parent)
        try:
            with files.whole_directory(built, replace=True) as directory:
                yield directory
                files.write_json(directory / RECORD, request | {"outputs": _sizes(directory)})
        except (RunError, OSError) as error:
            raise _of_the_place(error, directory if "directory" in locals() else built, place.name) from None
        bucket.write(BEGUN, begun)
        bucket.put(_sizes(built).keys() - {RECORD}, built)
        bucket.put([RECORD], built)
        bucket.remove([BEGUN])
        shutil.rmtree(built, ignore_errors=True)
    finally:
        lock.release()


def _of_the_place(error: Exception, partial: Path, place: str | Path) -> Exception:
    """The error with the user's name of the directory in place of the temporary one, which is removed."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # TensorStore's futures would report the error again
    if isinstance(error, OSError):
        if isinstance(error.filename, str):
            error.filename = error.filename.replace(str(partial), str(place))
        return error
    return RunError(str(error).replace(str(partial), str(place)))


def _is_done(place: _Place, request: dict[str, Any], there: dict[str, int]) -> bool:
    """Whether the result is complete; `there`: sizes of all files. Raises UserError if anything else is there."""
    has_directories = not place.bucket and place.path.is_dir() and any(place.path.iterdir())
    if not there and not has_directories:
        return False
    record = None
    with contextlib.suppress(OSError, ValueError, TypeError):
        record = json.loads((place.bucket.read(RECORD) if place.bucket else (place.path / RECORD).read_bytes()) or b"")
    if not isinstance(record, dict) or not isinstance(record.get("outputs"), dict):
        raise UserError(f"--to={place.name} exists and is not a result of convert; remove it or name a new directory")
    if {name: record.get(name) for name in request} != request:
        changed = sorted(name for name in request if record.get(name) != request[name])
        raise UserError(
            f"--to={place.name} exists and was converted from something else ({', '.join(changed)} differ); remove it "
            "or name a new directory"
        )
    if lost := sorted(name for name, size in record["outputs"].items() if there.get(name) != size):
        raise UserError(
            f"--to={place.name} exists, but {lost[0]} was changed or removed; remove the directory and "
            "repeat this command"
        )
    print(f"{place.name} already is the finished result of this conversion; nothing was done")
    return True


def _sizes(directory: Path) -> dict[str, int]:
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in _files(directory)}


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _request(kind: str, directories: dict[str, Path], patterns: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """What a result is made from: input files, and options that change it."""
    inputs = {
        f"{name}/{path.relative_to(directory)}": _identity(path)
        for name, directory in directories.items()
        for path in _files(directory)
        if not patterns or any(path.relative_to(directory).match(pattern) for pattern in patterns)
    }
    return {"conversion": kind, "inputs": inputs, "options": options}


def _identity(path: Path) -> list[Any]:
    status = files.regular(path).stat()
    if status.st_size > _SMALL:
        return [status.st_size, status.st_mtime_ns]
    return [status.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]


# ---- Conversions ---------------------------------------------------------------------------------------------------


def import_model(
    name: str, workdir: str | Path, *, adapter: str = "", allow_pickle: bool = False, add_bos_token: str = "auto"
) -> None:
    """Writes the model, the tokenizer and the chat template of a Hugging Face directory as a checkpoint of step 0.

    `adapter`: directory or name of PEFT adapters that are imported with it.
    """
    from gptjax.model.huggingface import files as huggingface_files

    sources = {"model": huggingface_files.locate(name, allow_pickle=allow_pickle)}
    if adapter:
        sources["adapter"] = huggingface_files.locate(adapter)
    request = _request("import", sources, huggingface_files.PATTERNS, add_bos_token=add_bos_token)
    place = _Place.of(workdir)
    with _result(place, request) as directory:
        if directory is not None:
            _import(name, sources, directory, allow_pickle=allow_pickle, add_bos_token=add_bos_token)
            print(f"written: {place.name}/checkpoints/0")


def _import(name: str, sources: dict[str, Path], workdir: Path, *, allow_pickle: bool, add_bos_token: str) -> None:
    from gptjax import config as config_lib
    from gptjax.artifacts import checkpoints, published
    from gptjax.model import gpt

    model = published.read(
        sources["model"],
        name,
        adapter=sources.get("adapter"),
        allow_pickle=allow_pickle,
        add_bos_token=add_bos_token,
    )
    about = {"config": model.config, "tokenizer": model.tokenizer, "template": model.template}
    checkpoints.write_parameters(workdir, model.params, **about, generation=model.generation)
    files.write_whole(workdir / "config.json", config_lib.to_json(model.config))
    with files.about(workdir):
        model.tokenizer.save(workdir / "tokenizer.json")
    print(f"{gpt.parameter_count(model.params):,} parameters")


def export_model(workdir: Path, which: str, place: str | Path, *, dtype: str, max_shard_bytes: int) -> None:
    """Writes a checkpoint in the Hugging Face layout that supports all its options."""
    from gptjax.artifacts import loading
    from gptjax.data.tokenization import huggingface as tokenizer_files
    from gptjax.model import gpt
    from gptjax.model.huggingface import files as huggingface_files
    from gptjax.model.huggingface import weights as huggingface

    path = loading.find(workdir, which)
    options = {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
    to = _Place.of(place)
    with _result(to, _request("export", {"checkpoint": path}, (), **options)) as directory:
        if directory is None:
            return
        trained = loading.load(path)
        tokenizer, template = trained.tokenizer, trained.template
        tokenizer_files.check_exportable(tokenizer)
        begin = next(iter(trained.generation.get("begin_token_ids") or tokenizer.begin_ids))
        huggingface.write_directory(
            directory,
            trained.architecture,
            trained.params,
            eot_id=tokenizer.eot_id,
            bos_id=begin,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )
        own = [] if template is not None else tokenizer.begin_ids
        tokenizer_files.write(
            directory,
            tokenizer,
            template,
            context_length=trained.architecture.context_length,
            begins=bool(trained.generation.get("begin_token_ids", own)),
        )
        ends = list(trained.generation.get("eos_token_ids") or [tokenizer.eot_id])
        if template is not None and (turn := tokenizer.special_tokens[template.end_of_turn]) not in ends:
            ends.append(turn)
        generation = trained.generation | {"eos_token_ids": ends}
        huggingface_files.write_generation_config(directory, generation, eot_id=tokenizer.eot_id)
        print(f"{gpt.parameter_count(trained.params):,} parameters of step {trained.step}; written: {to.name}")


def export_adapter(workdir: Path, which: str, place: str | Path) -> None:
    """Writes the adapters of a checkpoint in PEFT's format."""
    from gptjax.artifacts import loading
    from gptjax.model import gpt, lora
    from gptjax.model.huggingface import adapters as huggingface_adapters

    path = loading.find(workdir, which)
    to = _Place.of(place)
    with _result(to, _request("adapter", {"checkpoint": path}, ())) as directory:
        if directory is None:
            return
        trained = loading.load(path, merge=False)
        origin = trained.config.init_from
        base = origin.removeprefix("hf:") if origin.startswith("hf:") else None
        huggingface_adapters.write_adapter(directory, trained.architecture, trained.params, base=base)
        count = gpt.parameter_count(lora.split(trained.params)[0])
        of = base or "the model that the run began with"
        print(f"{count:,} parameters of step {trained.step}, adapters of {of}; written: {to.name}")


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
