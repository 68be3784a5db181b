"""Finds and loads the model that a command names: a run, a checkpoint, or `hf:` and a directory, also of adapters."""

import dataclasses
from pathlib import Path
from typing import Any

from gptjax import config as config_lib
from gptjax import files
from gptjax.artifacts import loading, mirror, published
from gptjax.errors import UserError
from gptjax.model.huggingface import adapter_config
from gptjax.model.huggingface import files as huggingface_files

HUGGING_FACE = "hf:"


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a model is. Finding it is cheap; `load` reads it.

    Attributes:
      path: of the checkpoint, or of the published model.
      config: of the run; for a published model, the default with its options of `model`.
      name: the name of a published model in the command, without hf:; None for a checkpoint.
      adapter: a directory of PEFT on top of a published model.
    """

    path: Path
    config: config_lib.Config
    name: str | None = None
    adapter: Path | None = None

    @property
    def is_published(self) -> bool:
        return self.name is not None

    def load(self, *, shardings: Any = None, merge: bool = True) -> loading.Trained:
        """The model. `shardings`, `merge`: as in `loading.load`."""
        if self.name is None:
            return loading.load(self.path, shardings=shardings, merge=merge)
        return published.load(self.path, self.name, adapter=self.adapter, shardings=shardings, merge=merge)


def find(name: str, which: str = "best", *, adapter: str = "") -> Location:
    """Where the model `name` is.

    Args:
      name: a work directory, the directory of one checkpoint, or hf:DIR_OR_NAME: a published model, or adapters of PEFT
        that name their base.
      which: best, last or a step, of a work directory.
      adapter: a directory of PEFT for hf:DIR.

    Raises UserError where there is no model.
    """
    if name.startswith(HUGGING_FACE):
        return _published(name.removeprefix(HUGGING_FACE), adapter)
    if adapter:
        raise UserError(f"--adapter={adapter} belongs to a published model, hf:DIR, not to {name}")
    directory = mirror.opened(name)
    if directory.is_dir() and not (directory / "checkpoints").exists() and _looks_published(directory):
        raise UserError(f"{name} is a Hugging Face directory; write {HUGGING_FACE}{name}")
    path = loading.find(directory, which)
    return Location(path, loading.read_config(path))


def _published(name: str, adapter: str) -> Location:
    directory = huggingface_files.locate(name)
    adapters = huggingface_files.locate(adapter) if adapter else None
    if (
        adapters is None
        and (directory / adapter_config.CONFIG).exists()
        and not (directory / huggingface_files.CONFIG).exists()
    ):
        adapters, (directory, name) = directory, _base(directory)
    return Location(directory, published.read_config(directory, name, adapters), name, adapters)


def _base(adapters: Path) -> tuple[Path, str]:
    """The base model of adapters, and its name: a directory, perhaps relative to the adapters, or a name on the hub."""
    path = adapters / adapter_config.CONFIG
    base = adapter_config.read(adapters).base_model_name_or_path
    if not base:
        raise UserError(f"{path} names no base_model_name_or_path; open the base: hf:BASE with --adapter={adapters}")
    try:
        beside = adapters / files.expand(base)
        if not files.expand(base).is_dir() and beside.is_dir():
            base = str(beside)
        return huggingface_files.locate(base), base
    except UserError as error:
        raise UserError(
            f"{path}: base_model_name_or_path: {error}; or open hf:BASE with --adapter={adapters}"
        ) from None


def _looks_published(directory: Path) -> bool:
    return (directory / adapter_config.CONFIG).exists() or any(directory.glob("*.safetensors"))
