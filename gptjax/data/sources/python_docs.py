"""The embedded corpus: the language reference and the docstrings that ship inside every Python installation.

About 2 MB of English that need no network. It differs between Python versions, so measured figures must name the
fingerprint of their store.
"""

import ast
import functools
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gptjax.data.documents import Document, in_parts
from gptjax.data.sources.base import Faults, Piece, Source

_LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idlelib",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_MIN_SUMMARY_WORDS = 3
_ABOUT_BYTES = 4_000_000


@dataclass(frozen=True)
class Docstring:
    """The docstring of one module, class or function.

    Attributes:
      name: dotted name from the top-level module, as in `textwrap.dedent`.
      signature: the name, with the arguments in parentheses if it is a function.
      text: the docstring with its common indentation removed.
      is_module: no question is asked about modules.
    """

    name: str
    signature: str
    text: str
    is_module: bool


@dataclass
class PythonDocs(Source):
    """The source `python_docs`, one piece, or a `part` of it.

    Attributes:
      part: "" for everything, "questions" for questions and answers as texts, "dialogues" for the same as dialogues.
    """

    part: str = ""
    faults: Faults = field(default_factory=Faults)

    @property
    def spec(self) -> str:
        return f"python_docs:{self.part}" if self.part else "python_docs"

    def key(self) -> str:
        return f"{self.spec} {sys.implementation.name} {sys.version}"

    def pieces(self) -> list[Piece]:
        return [Piece(self.spec, _ABOUT_BYTES, self.key())]

    def read(self, piece: Piece) -> Iterator[Document]:
        if self.part == "dialogues":
            yield from map(as_dialogue, question_answer_pairs())
            return
        if self.part == "questions":
            yield from question_answer_pairs()
            return
        from pydoc_data.topics import topics

        for topic in sorted(topics):
            yield from in_parts({"text": topics[topic], "id": f"topics/{topic}", "source": self.spec})
        for docstring in standard_library_docstrings():
            yield {
                "text": f"{docstring.signature}\n\n{docstring.text}\n",
                "id": f"docstrings/{docstring.name}",
                "source": self.spec,
                "split_key": docstring.text,
            }
        for pair in question_answer_pairs():
            yield {
                "text": pair["text"] + "\n",
                "id": pair["id"],
                "source": self.spec,
                "split_key": pair["split_key"],
            }


@functools.cache
def standard_library_docstrings() -> tuple[Docstring, ...]:
    """Every docstring of the standard library's Python files, in the order of the files; a name occurs once.

    Nothing is imported: the files are parsed. Tests, bundled programs and files that do not parse are
    left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Docstring] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT.intersection(parts):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for docstring in _docstrings(tree, module):
            # The getter of a property comes first and has the documentation of the property.
            found.setdefault(docstring.name, docstring)
    return tuple(found.values())


def _docstrings(node: ast.AST, name: str) -> Iterator[Docstring]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        # A docstring can escape half a surrogate pair, which no text file can contain.
        text = inspect.cleandoc(text).strip().encode(errors="replace").decode() if text else ""
        if text:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            signature = f"{name}({ast.unparse(node.args)})" if is_function else name
            yield Docstring(name, signature, text, isinstance(node, ast.Module))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _docstrings(child, name)


def question_answer_pairs() -> list[Document]:
    """One question for each function and class whose docstring begins with a sentence.

    Returns:
      Documents whose `text` is the `prompt` ("Question: What does textwrap.dedent do?\\nAnswer:"), a space,
      and the only entry of `references`. The `split_key` is the docstring, so a question is in the same split
      as its docstring.
    """
    pairs: list[Document] = []
    for docstring in standard_library_docstrings():
        answer = _summary(docstring.text)
        if docstring.is_module or len(answer.split()) < _MIN_SUMMARY_WORDS:
            continue
        prompt = f"Question: What does {docstring.name} do?\nAnswer:"
        pairs.append(
            {
                "text": f"{prompt} {answer}",
                "id": f"questions/{docstring.name}",
                "source": "python_docs:questions",
                "split_key": docstring.text,
                "prompt": prompt,
                "references": [answer],
            }
        )
    return pairs


def as_dialogue(pair: Document) -> Document:
    """A question and its answer as a dialogue of user and assistant."""
    question = pair["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
    (answer,) = pair["references"]
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "id": pair["id"].replace("questions/", "dialogues/"),
        "source": "python_docs:dialogues",
        "split_key": pair["split_key"],
        "prompt": question,
        "references": [answer],
    }


def _summary(text: str) -> str:
    """The first sentence, on one line; empty if the docstring begins with an example."""
    paragraph = " ".join(re.split(r"\n\s*\n|\n\s*>>>", text, maxsplit=1)[0].split())
    if paragraph.startswith(">>>"):
        return ""
    return re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.) (?=[A-Z])", paragraph, maxsplit=1)[0]
