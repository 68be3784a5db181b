"""Talk to a model at the terminal.

  python -m gptjax.chat --workdir=runs/chat
  python -m gptjax.chat --workdir=hf:models/qwen3 --system="Answer in one sentence." --temperature=0.7 --top_k=50
  python -m gptjax.chat --workdir=runs/chat --prompt="What is a decorator?"
  python -m gptjax.chat --workdir=runs/chat < questions.txt > answers.txt

A model trained on dialogues answers in its own chat template. One without a template continues the text so far, with a
warning. When the context is full the oldest turns are left out, never the system text. With the same --seed the same
questions get the same answers. From a pipe each line is a turn, and only answers are written to standard output.

  /regenerate           another answer to the last question
  /reset                forget the turns, not the system text
  /system TEXT          set the system text; without TEXT, remove it
  /set NAME VALUE       change a sampling flag, e.g. /set temperature 0.7
  /save FILE.jsonl      save the conversation in the format of data.source=messages:FILE.jsonl
  /load FILE.jsonl      continue a saved conversation
  /stats                tokens, tokens per second, how full the context is
  /help, /quit

To send a message that begins with a slash, write two slashes. At the terminal, a \\ at the end of a line continues the
message on the next line. Ctrl-C ends an answer; Ctrl-C twice, or Ctrl-D, ends the program. The history of lines is a
file in the cache directory that only you can read.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from gptjax import cli, failures, interrupts
from gptjax.config import suggestion
from gptjax.errors import RunError, UserError
from gptjax.generation import flags as sampling_flags
from gptjax.generation.params import SamplingParams

if TYPE_CHECKING:
    from gptjax.generation.conversation import Answer, Conversation

MAX_NEW_TOKENS = 512
HISTORY_LINES = 1000
HELP = (__doc__ or "")[(__doc__ or "").find("  /regenerate") :].rstrip()


def main(argv: Sequence[str]) -> None:
    flag_values = flags.FlagValues()
    define = {"flag_values": flag_values}
    sampling_flags.define_model(flag_values)
    flags.DEFINE_string(
        "prompt", None, "ask one question, print the answer, and end, e.g. --prompt='Who are you?'", **define
    )
    flags.DEFINE_string("system", "", "text before all turns, e.g. --system='Answer in French.'", **define)
    sampling_flags.define_draft(flag_values)
    sampling_flags.define(flag_values, SamplingParams(max_new_tokens=MAX_NEW_TOKENS))
    cli.parse(flag_values, argv, __doc__)
    if not flag_values.workdir:
        raise UserError("--workdir is missing; e.g. --workdir=runs/chat or --workdir=hf:models/qwen3")
    for name in ("prompt", "system"):
        _check_text(flag_values[name].value or "", f"--{name}")
    params = sampling_flags.read(flag_values)

    at_terminal = flag_values.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    # A pipe gets UTF-8. A terminal gets its own encoding, with ? for characters that it lacks, instead of an error.
    with contextlib.suppress(AttributeError):  # standard output was replaced by an object that cannot do this
        sys.stdout.reconfigure(**({"errors": "replace"} if sys.stdout.isatty() else {"encoding": "utf-8"}))
    conversation, described, history = _open(flag_values, params)
    session = Session(conversation, flag_values)
    if flag_values.prompt is not None:
        session.answer(lambda on_text: conversation.ask(flag_values.prompt, on_text))
    elif at_terminal:
        _tell(f"{described}; /help lists the commands")
        with _line_editing(history):
            _converse(session)
    else:
        _answer_lines(session)


def _open(options: flags.FlagValues, params: SamplingParams) -> tuple["Conversation", str, Path]:
    """(the conversation with the model of the command line, a description of the model, the history file)."""
    import jax

    from gptjax.artifacts import models
    from gptjax.config import cache_directory, get_default
    from gptjax.generation.completion import Generator
    from gptjax.generation.conversation import Conversation
    from gptjax.model import gpt
    from gptjax.processes import runtime

    place = models.find(options.workdir, options.checkpoint, adapter=options.adapter)
    draft = models.find(options.draft) if options.draft else None
    cache = cache_directory(place.config)
    runtime.start(get_default().mesh, rows=1, cache_dir=cache)
    trained = place.load()
    size = gpt.parameter_count(trained.params)
    drafts = draft.load() if draft else None
    generator = Generator.from_trained(trained, draft=drafts, draft_tokens=options.draft_tokens)
    conversation = Conversation(
        generator, sampling_flags.with_published(options, params, trained.generation), system=options.system
    )
    if trained.template is None:
        _tell("warning: this model has no chat template: it continues what you write instead of answering")
    template = "none" if trained.template is None else "its own" if trained.template.jinja else "ChatML"
    where = f"{options.workdir}{'' if place.is_published else f', step {trained.step}'}"
    context = trained.architecture.context_length
    described = f"{where}: {size:,} parameters, a context of {context:,} tokens, chat template: {template}"
    return conversation, f"{described}, on {jax.local_devices()[0].platform}", cache / "chat_history"


class Session:
    """Carries out the lines that a person types: questions and commands."""

    def __init__(self, conversation: "Conversation", options: flags.FlagValues):
        self.conversation = conversation
        self.answering = False
        self._options = options
        self._commands: dict[str, Callable[[str], Any]] = {
            "/regenerate": lambda _: self.answer(conversation.regenerate),
            "/reset": lambda _: conversation.reset(),
            "/system": conversation.set_system,
            "/set": self._set,
            "/save": lambda name: self._with_file("/save", name, conversation.save),
            "/load": lambda name: self._with_file("/load", name, conversation.load),
            "/stats": lambda _: print(self._statistics()),
            "/help": lambda _: print(HELP),
            "/quit": lambda _: None,
        }

    def take(self, line: str) -> bool:
        """Carries out one line; returns whether the conversation goes on. Raises UserError or RunError."""
        text = line.strip()
        _check_text(text, "the message")
        if not text:
            return True
        if not text.startswith("/") or text.startswith("//"):
            question = text.removeprefix("/") if text.startswith("//") else text
            self.answer(lambda on_text: self.conversation.ask(question, on_text))
            return True
        name, _, rest = text.partition(" ")
        if name not in self._commands:
            raise UserError(f"there is no command {name[:60]}{suggestion(name, self._commands)}; /help lists them")
        self._commands[name](rest.strip())
        return name != "/quit"

    def answer(self, ask: Callable[[Callable[[str], None]], "Answer"]) -> None:
        """Writes the answer that `ask` gives, piece by piece, and notes about it on standard error."""
        self.answering = True
        try:
            answer = ask(_write)
        finally:
            self.answering = False
        print(flush=True)
        limit = self.conversation.params.max_new_tokens
        if answer.lacking:
            _tell(f"({answer.lacking})")
        if answer.left_out:
            _tell(f"(the context is full: the {answer.left_out} oldest messages are left out from here on)")
        if not answer.text.strip():
            _tell("(the answer is empty, so the question is not kept; /regenerate asks it again)")
        elif answer.finish_reason == "length":
            reason = f"max_new_tokens is {limit}" if answer.tokens >= limit else "the context is full"
            _tell(f"(cut: {reason})")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        names = [field.name for field in dataclasses.fields(SamplingParams) if field.name in self._options]
        if name not in names:
            raise UserError(f"/set {name[:60]}: choose from {', '.join(names)}{suggestion(name, names)}")
        try:
            parsed = self._options[name].parser.parse(value.strip())
        except ValueError as error:
            raise UserError(f"/set {name} {value[:60]}: {error}") from None
        params = dataclasses.replace(self.conversation.params, **{name: (parsed,) if name == "stop" else parsed})
        params.validate()
        self.conversation.params = params

    def _with_file(self, command: str, name: str, act: Callable[[str], None]) -> None:
        if not name:
            raise UserError(f"{command} needs the name of a file: {command} FILE.jsonl")
        act(name)

    def _statistics(self) -> str:
        answers, conversation = self.conversation.answers, self.conversation
        tokens, seconds = sum(a.tokens for a in answers), sum(a.seconds for a in answers)
        speed = f"{tokens / seconds:.1f} tokens per second" if seconds else "no answer yet"
        return (
            f"{len(answers)} answers, {tokens:,} tokens, {speed}; the context holds "
            f"{conversation.context_used:,} of {conversation.context_length:,} tokens"
        )


def _converse(session: Session) -> None:
    """Takes lines from the terminal until Ctrl-D, /quit or Ctrl-C twice."""

    def interrupted(*_: Any) -> None:
        if not session.answering:
            raise KeyboardInterrupt
        session.conversation.stop()

    before = False
    with interrupts.answered_by(interrupted):
        while True:
            try:
                if not session.take(_read_message()):
                    return
                before = False
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if before:
                    return
                before = True
                _tell("(Ctrl-C again, Ctrl-D or /quit ends the program)")
            except UnicodeDecodeError as error:
                _tell(f"error: the line is not UTF-8: {error.reason} at byte {error.start}")
            except BrokenPipeError:
                raise
            except Exception as error:  # an answer that fails does not end the conversation
                _tell(failures.describe(error)[1])


def _read_message() -> str:
    message = input("> ")
    while message.endswith("\\"):
        message = f"{message[:-1]}\n{input('. ')}"
    return message


def _answer_lines(session: Session) -> None:
    """Takes each line of standard input. Raises UserError at the end if any of them failed."""
    failed = number = 0
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"it is not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}") from None
            if not session.take(text):
                break
        except (UserError, RunError) as error:
            failed += 1
            _tell(f"line {number} of standard input: {error}")
    if failed:
        raise UserError(f"{failed} of {number} lines of standard input failed")


@contextlib.contextmanager
def _line_editing(history: Path) -> Iterator[None]:
    """Line editing, and the history of earlier sessions, if Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError):  # without a writable cache there is no history
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
        history.chmod(0o600)
        readline.read_history_file(history)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(history)
            history.chmod(0o600)


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not UTF-8 text: character {error.start + 1} is half a character") from None


def _write(text: str) -> None:
    """Writes a piece of an answer; at a terminal, which would obey them, control characters are escaped."""
    if sys.stdout.isatty():
        text = "".join(c if c in "\n\t" or not (c < " " or "\x7f" <= c < "\xa0") else ascii(c)[1:-1] for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
