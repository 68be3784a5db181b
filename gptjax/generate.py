"""Complete prompts with a trained model.

  python -m gptjax.generate --workdir=runs/quickstart --prompt="The with statement" --temperature=0.8
  python -m gptjax.generate --workdir=runs/quickstart --prompts=prompts.jsonl --output=completions.jsonl
  python -m gptjax.generate --workdir=runs/large --draft=runs/small --prompt="Once upon a time"
  python -m gptjax.generate --workdir=hf:models/gpt2 --prompt="Once upon a time" --top_k=50
  python -m gptjax.generate --workdir=hf:models/gpt2 --prompt="Once upon a time" --beams=4 --num_best=2
  python -m gptjax.generate --workdir=runs/chat --prompts=questions.jsonl --best_of=8 --reward=model:runs/reward

A prompt is taken as the beginning of a document, or, by a model trained on dialogues, as what the user says. Each
line of --prompts is an object with "prompt"; in the output it also has "completion" and "finish_reason" ("stop" or
"length"), and with --logprobs "tokens" and "logprobs". A search (--beams) adds "score", which is the sum of the
log-probabilities ("logprob") / number of tokens ** length_penalty, and with --num_best "best", a list of these.
With --best_of=N the completion is that of N with the highest "reward"; --reward takes the values of objective.reward.
--prompts also takes FILE.txt with a prompt on each line, and FILE.csv#PROMPT, FILE.tsv#PROMPT and
FILE.parquet#PROMPT, plain or compressed, and - for standard input. Many prompts are spread over all local devices.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from gptjax import cli, outputs
from gptjax.buckets import is_url
from gptjax.errors import UserError
from gptjax.generation import flags as sampling_flags

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from gptjax.artifacts.loading import Trained
    from gptjax.generation.beam import Hypothesis
    from gptjax.generation.completion import Generator
    from gptjax.generation.events import Completion
    from gptjax.rewards.rewards import Reward


def main(argv: Sequence[str]) -> None:
    flag_values = flags.FlagValues()
    define = {"flag_values": flag_values}
    sampling_flags.define_model(flag_values)
    flags.DEFINE_string("prompt", None, "text to complete, e.g. --prompt='The with statement'", **define)
    flags.DEFINE_string("prompts", None, "file of prompts, e.g. --prompts=prompts.jsonl or test.csv#mr", **define)
    flags.DEFINE_string("output", None, "file of JSON lines; default: the terminal, e.g. --output=out.jsonl", **define)
    sampling_flags.define_number(
        flag_values, "num_samples", 1, "completions of each prompt, e.g. --num_samples=3", (1, 100_000)
    )
    sampling_flags.define_number(
        flag_values, "batch_size", 32, "prompts completed at a time, e.g. --batch_size=8", (1, 4096)
    )
    flags.DEFINE_bool("logprobs", False, "tokens and their log-probabilities, as JSON lines, e.g. --logprobs", **define)
    sampling_flags.define_number(
        flag_values, "best_of", 1, "completions drawn per prompt; the best one is kept, e.g. --best_of=8", (1, 100_000)
    )
    flags.DEFINE_string("reward", "", "reward by which --best_of chooses, e.g. --reward=model:runs/reward", **define)
    sampling_flags.define_draft(flag_values)
    sampling_flags.define(flag_values)
    sampling_flags.define_search(flag_values)
    cli.parse(flag_values, argv, __doc__)

    # Every flag and file is checked before the model is loaded, which takes longest.
    if not flag_values.workdir:
        raise UserError("--workdir is missing; e.g. --workdir=runs/quickstart")
    if (flag_values.prompt is None) == (flag_values.prompts is None):
        raise UserError("give either --prompt=TEXT or --prompts=FILE.jsonl")
    params = sampling_flags.read(flag_values)
    beams = sampling_flags.read_search(flag_values)
    if flag_values.best_of > 1 or flag_values.reward:
        from gptjax.evaluation import best_of

        best_of.check(
            flag_values.best_of,
            flag_values.reward,
            beams=flag_values.beams,
            temperature=flag_values.temperature,
        )
    if flag_values.prompt is not None:
        requests = [{"prompt": flag_values.prompt}]
    else:
        from gptjax.evaluation.prompts import read_prompts

        requests = read_prompts(flag_values.prompts, references=False)
    output = flag_values.output
    if output:
        if not is_url(output) and not Path(output).absolute().parent.is_dir():
            raise UserError(f"--output={output}: there is no directory {Path(output).absolute().parent}; make it first")
        outputs.claim(output)

    # Each sample of a prompt is a request: its place in the list seeds its draws.
    requests = [request for request in requests for _ in range(flag_values.num_samples * flag_values.best_of)]
    trained, generator, mesh = _load(flag_values, many=len(requests) > 1)
    if lacking := trained.tokenizer.lacking(dict.fromkeys(request["prompt"] for request in requests)):
        print(f"warning: {lacking}", file=sys.stderr)
    reward = best_of.open_reward(flag_values.reward, trained, requests) if flag_values.best_of > 1 else None
    if beams:
        from gptjax.generation.beam import search

        if trained.generation.get("repetition_penalty", 1.0) != 1.0:
            print("warning: the model's published repetition_penalty has no effect with --beams", file=sys.stderr)
        prompts = generator.encode([request["prompt"] for request in requests])
        found = search(generator, prompts, beams, mesh=mesh)
        _tell_found(requests, found, output, as_lines=bool(output or flag_values.prompts))
        return
    params = sampling_flags.with_published(flag_values, params, trained.generation)
    as_lines = bool(output or flag_values.prompts or flag_values.logprobs)
    # Text is shown while it is generated only for one prompt, in plain text, at a terminal.
    streaming = len(requests) == 1 and not as_lines and sys.stdout.isatty()
    completions = generator.complete(
        [request["prompt"] for request in requests], params, on_text=_show if streaming else None
    )
    if reward:
        requests, completions = _best(flag_values, trained, generator, requests, completions, reward)
    if streaming:
        print()
    elif output:
        write_lines(output, _lines(requests, completions, logprobs=flag_values.logprobs))
        print(f"wrote {len(completions)} completions to {output}")
    elif as_lines:
        print(*_lines(requests, completions, logprobs=flag_values.logprobs), sep="\n")
    else:
        for i, completion in enumerate(completions, start=1):
            if len(completions) > 1:
                print(f"--- {i} of {len(completions)}")
            print(completion.text)
    if flag_values.draft:
        counts = generator.statistics
        print(
            f"draft: {counts.accepted} of {counts.proposed} proposals accepted; "
            f"{counts.tokens / max(counts.passes, 1):.2f} tokens per pass of the model",
            file=sys.stderr,
        )


def _best(
    options: flags.FlagValues,
    trained: "Trained",
    generator: "Generator",
    requests: Sequence[dict[str, Any]],
    completions: "Sequence[Completion]",
    reward: "Reward",
) -> "tuple[list[dict[str, Any]], list[Completion]]":
    """The best of every --best_of completions, and its request with its reward added."""
    from gptjax.evaluation import best_of

    each = requests[:: options.best_of]
    asked = generator.encode([request["prompt"] for request in each])
    chosen = best_of.choose(reward, trained, asked, each, completions)
    kept = [request | {"reward": round(one.reward, 6)} for request, one in zip(each, chosen, strict=True)]
    return kept, [completions[one.place] for one in chosen]


def write_lines(place: str, lines: Sequence[str]) -> None:
    """Writes a whole text file or nothing. Raises RunError."""
    outputs.write(place, (line + "\n" for line in lines), "the completions", errors="strict")


def _load(options: flags.FlagValues, *, many: bool) -> tuple["Trained", "Generator", "Mesh | None"]:
    """The model of the command line, on all local devices if there are many prompts."""
    import jax

    from gptjax.artifacts import models
    from gptjax.config import cache_directory, get_default
    from gptjax.generation.completion import Generator
    from gptjax.parallel import mesh as mesh_lib
    from gptjax.parallel import partition
    from gptjax.processes import runtime

    place = models.find(options.workdir, options.checkpoint, adapter=options.adapter)
    draft = models.find(options.draft) if options.draft else None
    # rows=1 makes a CPU one device. Its matrix products use all cores; two devices would both read every parameter.
    runtime.start(get_default().mesh, rows=1, cache_dir=cache_directory(place.config))
    mesh = (
        mesh_lib.make_mesh(get_default().mesh, jax.local_devices()) if many and jax.local_device_count() > 1 else None
    )
    shardings = partial(partition.parameter_shardings, mesh=mesh) if mesh else None
    trained = place.load(shardings=shardings)
    generator = Generator.from_trained(
        trained,
        draft=draft.load(shardings=shardings) if draft else None,
        draft_tokens=options.draft_tokens,
        batch_size=options.batch_size,
        mesh=mesh,
    )
    return trained, generator, mesh


def _lines(requests: Sequence[dict[str, Any]], completions: Sequence["Completion"], *, logprobs: bool) -> list[str]:
    lines = []
    for request, completion in zip(requests, completions, strict=True):
        line = {**request, "completion": completion.text, "finish_reason": completion.finish_reason}
        if logprobs:
            line["tokens"] = completion.tokens.tolist()
            line["logprobs"] = [round(value, 6) for value in completion.log_probabilities.tolist()]
        lines.append(json.dumps(line, ensure_ascii=False))
    return lines


def _tell_found(
    requests: Sequence[dict[str, Any]], found: "Sequence[Sequence[Hypothesis]]", output: str | None, *, as_lines: bool
) -> None:
    """Writes or prints what a search has found."""
    if not as_lines:
        for i, hypothesis in enumerate(found[0], start=1):
            if len(found[0]) > 1:
                print(f"--- {i} of {len(found[0])}, score {hypothesis.score:.4f}")
            print(hypothesis.text)
        return
    lines = []
    for request, own in zip(requests, found, strict=True):
        best = [
            {"completion": h.text, "finish_reason": h.finish_reason, "score": h.score, "logprob": h.log_probability}
            for h in own
        ]
        line = request | best[0] | ({"best": best} if len(best) > 1 else {})
        lines.append(json.dumps(line, ensure_ascii=False))
    if output:
        write_lines(output, lines)
        print(f"wrote the completions of {len(found)} prompts to {output}")
    else:
        print(*lines, sep="\n")


def _show(_: int, text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
