"""Complete prompts with a trained model.

  python -m gptjax.generate --workdir=runs/quickstart --prompt="The with statement" --temperature=0.8
  python -m gptjax.generate --workdir=runs/quickstart --prompts=prompts.jsonl --output=completions.jsonl

A prompt is taken as the beginning of a document, or, by a model trained on dialogues, as what the user says. Each
line of --prompts is an object with "prompt"; in the output it also has "completion" and "finish_reason" ("stop" or
"length").
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from gptjax import cli
from gptjax.errors import RunError, UserError
from gptjax.generation import flags as sampling_flags

if TYPE_CHECKING:
    from gptjax.generation.engine import Completion


def main(argv: Sequence[str]) -> None:
    flag_values = flags.FlagValues()
    define = {"flag_values": flag_values}
    flags.DEFINE_string("workdir", None, "a trained run, e.g. --workdir=runs/quickstart", **define)
    flags.DEFINE_string("checkpoint", "best", "best, last or a step, e.g. --checkpoint=2000", **define)
    flags.DEFINE_string("prompt", None, "text to complete, e.g. --prompt='The with statement'", **define)
    flags.DEFINE_string("prompts", None, "many prompts, e.g. --prompts=prompts.jsonl", **define)
    flags.DEFINE_string("output", None, "JSON lines; default: the terminal, e.g. --output=out.jsonl", **define)
    flags.DEFINE_integer("num_samples", 1, "completions of each prompt, e.g. --num_samples=3", **define)
    flags.DEFINE_integer("batch_size", 32, "prompts completed at a time, e.g. --batch_size=8", **define)
    sampling_flags.define(flag_values)
    cli.parse(flag_values, argv, __doc__)

    if not flag_values.workdir:
        raise UserError("--workdir is missing; e.g. --workdir=runs/quickstart")
    if (flag_values.prompt is None) == (flag_values.prompts is None):
        raise UserError("give either --prompt=TEXT or --prompts=FILE.jsonl")
    for name in ("num_samples", "batch_size"):
        if flag_values[name].value < 1:
            raise UserError(f"--{name} is {flag_values[name].value}; it must be at least 1")
    params = sampling_flags.read(flag_values)
    if flag_values.prompt is not None:
        requests = [{"prompt": flag_values.prompt}]
    else:
        requests = read_prompts(Path(flag_values.prompts))
    output = Path(flag_values.output) if flag_values.output else None
    if output and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UserError(f"--output={output} is a directory, or in one that does not exist; name a file")

    from gptjax.config import get_default
    from gptjax.data import corpus
    from gptjax.generation.engine import Generator
    from gptjax.parallel import runtime
    from gptjax.training import checkpoints

    path = checkpoints.find(Path(flag_values.workdir), flag_values.checkpoint)
    cache_dir = corpus.cache_directory(checkpoints.read_config(path))
    runtime.start(get_default().mesh, rows=1, cache_dir=cache_dir)  # one device
    trained = checkpoints.load(path)
    generator = Generator.from_trained(trained, batch_size=flag_values.batch_size)
    requests = [request for request in requests for _ in range(flag_values.num_samples)]
    streaming = len(requests) == 1 and flag_values.prompt is not None and not output and sys.stdout.isatty()
    completions = generator.complete(
        [request["prompt"] for request in requests], params, on_text=_show if streaming else None
    )
    if streaming:
        print()
    elif output:
        write_lines(output, _lines(requests, completions))
        print(f"wrote {len(completions)} completions to {output}")
    elif flag_values.prompts:
        print(*_lines(requests, completions), sep="\n")
    else:
        for i, completion in enumerate(completions, start=1):
            if len(completions) > 1:
                print(f"--- {i} of {len(completions)}")
            print(completion.text)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, empty lines left out. Raises UserError with a bad line's number."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read --prompts={path}: {error.strerror}") from None
    requests = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                requests.append(_parse_prompt(line))
            except ValueError as error:
                raise UserError(f'{path} line {number}: {error}; expected {{"prompt": "..."}}') from None
    if not requests:
        raise UserError(f'{path} has no prompts; each line is an object {{"prompt": "..."}}')
    return requests


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes a whole text file or nothing: it is written beside its place and renamed. Raises RunError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"{path} could not be written: {error.strerror}; give another --output") from None


def _parse_prompt(line: bytes) -> dict[str, Any]:
    """One line as an object with a "prompt". Raises ValueError."""
    request = json.loads(line.decode("utf-8"))
    if not isinstance(request, dict):
        raise ValueError(f"it is a {type(request).__name__}, not an object")
    if not isinstance(request.get("prompt"), str):
        raise ValueError('it has no text "prompt"')
    json.dumps(request, ensure_ascii=False).encode()  # half a surrogate pair could not be written back
    return request


def _lines(requests: Sequence[dict[str, Any]], completions: Sequence["Completion"]) -> list[str]:
    return [
        json.dumps(
            {**request, "completion": completion.text, "finish_reason": completion.finish_reason},
            ensure_ascii=False,
        )
        for request, completion in zip(requests, completions, strict=True)
    ]


def _show(_: int, text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
