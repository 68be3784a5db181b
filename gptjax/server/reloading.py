"""Newer checkpoints of runs that go on training, in the place of those that are served."""

import logging
import threading
import time

from gptjax.artifacts import integrity, mirror
from gptjax.artifacts import models as locations
from gptjax.server.models import Models

log = logging.getLogger("gptjax.server")


class Reloader:
    """Looks for better checkpoints, in a thread of its own. What cannot be loaded is told in the log, and left."""

    def __init__(self, models: Models, *, every: float, patience: float):
        """
        Args:
          every: seconds from one look to the next.
          patience: seconds that requests have to end with the parameters before; see `Served.replace`.
        """
        self._models, self._every, self._patience = models, every, patience
        self._seen: dict[str, list[int]] = {}  # at the last look; nothing, since a checkpoint may have come meanwhile
        self._thread = threading.Thread(target=self._run, name="reloader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def look(self) -> list[str]:
        """Replaces models whose work directory has a better checkpoint now; returns their names."""
        return [name for name in self._models.workdirs if self._changed(name) and self._replace(name)]

    def _run(self) -> None:
        while True:
            time.sleep(self._every)
            self.look()

    def _steps(self, name: str) -> list[int]:
        mirror.pull(self._models.workdirs[name])
        return integrity.finished_steps(self._models.workdirs[name] / "checkpoints")

    def _changed(self, name: str) -> bool:
        """Whether there are other checkpoints than at the last look; to read their checksums takes longer."""
        try:
            steps = self._steps(name)
        except Exception as error:  # a bucket that does not answer, or is gone: the next look asks again
            log.warning("%s: no look for a better checkpoint: %s", name, error)
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
            log.info("%s: %s answers from now on, after %s", name, *map(mirror.shown, (location.path, model.path)))
            model.replace(trained, self._patience, others=others)
        except Exception as error:  # a checkpoint that was deleted meanwhile, a full memory: the present one stays
            log.warning("%s: %s stays: %s", name, mirror.shown(model.path), error)
            return False
        return True
