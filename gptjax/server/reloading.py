"""Replaces served models by newer checkpoints of their runs."""

import logging
import threading
import time

from gptjax.artifacts import integrity, mirror
from gptjax.artifacts import models as locations
from gptjax.server.models import Models

log = logging.getLogger("gptjax.server")


class Reloader:
    """Looks for better checkpoints in its own thread. If one cannot be loaded, it is logged and the old one stays."""

    def __init__(self, models: Models, *, every: float, patience: float):
        """
        Args:
          every: seconds between two looks.
          patience: seconds that requests have to finish with the old parameters; see `Served.replace`.
        """
        self._models, self._every, self._patience = models, every, patience
        self._seen: dict[str, list[int]] = {}  # at the last look; empty at first: newer ones may exist already
        self._thread = threading.Thread(target=self._run, name="reloader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def look(self) -> list[str]:
        """Replaces models whose work directory now has a better checkpoint; returns their names."""
        return [name for name in self._models.workdirs if self._changed(name) and self._replace(name)]

    def _run(self) -> None:
        while True:
            time.sleep(self._every)
            self.look()

    def _steps(self, name: str) -> list[int]:
        mirror.pull(self._models.workdirs[name])
        return integrity.finished_steps(self._models.workdirs[name] / "checkpoints")

    def _changed(self, name: str) -> bool:
        """Whether the checkpoints changed since the last look; reading their checksums would take longer."""
        try:
            steps = self._steps(name)
        except Exception as error:  # a bucket that does not answer; the next look tries again
            log.warning("%s: could not look for a better checkpoint: %s", name, error)
            return False
        before, self._seen[name] = self._seen.get(name), steps
        return before != steps

    def _replace(self, name: str) -> bool:
        model = self._models.find(name)
        try:
            location = locations.find(str(self._models.workdirs[name]))
            if location.path == model.path:
                return False
            trained = location.load(merge=self._models.merged)
            others = [other for other in self._models if other is not model]
            log.info("%s: %s replaces %s", name, *map(mirror.shown, (location.path, model.path)))
            model.replace(trained, self._patience, others=others)
        except Exception as error:  # a checkpoint deleted meanwhile, or no memory left: the present one stays
            log.warning("%s: cannot load a better checkpoint, %s stays: %s", name, mirror.shown(model.path), error)
            return False
        return True
