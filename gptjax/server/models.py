"""The models of a server, by name."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from gptjax.artifacts import mirror, models
from gptjax.errors import UserError
from gptjax.server import memory
from gptjax.server.errors import ApiError
from gptjax.server.served import EngineOptions, Served


class Models:
    """The models by name. The first one answers requests that name no model.

    Attributes:
      workdirs: those of models that are runs.
      merged: whether adapters were merged into the kernels.
    """

    def __init__(
        self, served: Sequence[Served], *, workdirs: Mapping[str, Path] = MappingProxyType({}), merged: bool = True
    ):
        self._served = {model.name: model for model in served}
        self.workdirs, self.merged = dict(workdirs), merged

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    @property
    def taken(self) -> list[memory.Taken]:
        """The memory of each model, given that those before it are loaded."""
        served, found = list(self), []
        for place, model in enumerate(served):
            size = {"slots": model.load[2], "capacity": model.context_length}
            others = [other.model for other in served[:place]]
            found.append(memory.taken(model.name, model.model, **size, others=others))
        return found

    def find(self, name: str | None) -> Served:
        """Raises ApiError for an unknown name."""
        if not name:
            return next(iter(self._served.values()))
        if name not in self._served:
            known = ", ".join(self._served)
            raise ApiError(
                f"the model {name[:100]!r} is not served here; choose from {known}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self._served[name]


def parse(text: str) -> tuple[str, str]:
    """(name, directory) of --model=NAME=DIR, or of --model=DIR, named after the directory. Raises UserError."""
    name, equals, directory = text.partition("=")
    if not equals:
        name, directory = Path(text.removeprefix("hf:")).name, text
    if not name or not directory:
        raise UserError(f"--model={text}: expected NAME=DIR, such as --model=mine=runs/quickstart")
    return name, directory


def load(texts: Sequence[str], options: EngineOptions, memory_limit: float = 0, *, reload: bool = False) -> Models:
    """Loads the models of the --model flags.

    With several models adapters stay separate from the kernels, and equal arrays are in memory once, so that models
    that were fine-tuned by adapters share their base. A single model has its adapters merged.

    Args:
      memory_limit: GiB of all models together; 0: no limit.
      reload: whether newer checkpoints will replace these; the memory must suffice for that, too.

    Raises UserError.
    """
    pairs = [parse(text) for text in texts]
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--model: two models are called {twice[0]}; give each a name: --model=NAME=DIR")
    found = [(name, models.find(directory)) for name, directory in pairs]  # find all before loading one
    merged = len(found) == 1
    places = {name: mirror.place(text) for name, text in pairs if not text.startswith(models.HUGGING_FACE)}
    workdirs = {name: path for name, path in places.items() if (path / "checkpoints").is_dir()}
    if reload and not workdirs:
        raise UserError(f"--reload: {', '.join(names)} are not work directories of runs: they get no new checkpoints")
    served: list[Served] = []
    for name, location in found:
        served.append(Served(name, location.load(merge=merged), options, others=served))
        taken = Models(served).taken
        # While one model is replaced, its parameters and caches are in memory twice.
        need = sum(one.own for one in taken) + max((one.own for one in taken if reload), default=0)
        if memory_limit and need > memory_limit * memory.GIB:
            twice = ", one of them twice while it is replaced" if reload else ""
            raise UserError(
                f"--memory_limit={memory_limit:g}: the models up to {name} need {need / memory.GIB:.2f} GiB for "
                f"weights and caches{twice} ({'; '.join(map(str, taken))}); raise the limit, or serve fewer models, "
                "--slots or a smaller --context_length"
            )
    return Models(served, workdirs=workdirs, merged=merged)
