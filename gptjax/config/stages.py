"""Numbers of batches per update that grow during a run, as people write them: "50%:2, 80%:4"."""

from gptjax.config.durations import EXAMPLES, resolve_duration

MOST_BATCHES = 65_536
EXAMPLE = "'50%:2,80%:4' (two batches per update from half of the run on, four from 80% on)"


def read(text: str) -> list[tuple[str, int]]:
    """[(beginning, batches per update)] of `schedule.batch_stages`; a beginning is a duration. Raises ValueError."""
    stages = []
    for part in text.split(",") if text.strip() else []:
        begin, colon, batches = (piece.strip() for piece in part.partition(":"))
        try:
            resolve_duration(begin, total=100, tokens_per_step=1, steps_per_epoch=1.0)
        except ValueError:
            colon = ""
        if not colon or not (batches.isascii() and batches.isdigit() and 1 <= int(batches[:9]) <= MOST_BATCHES):
            raise ValueError(
                f"has {part.strip()[:60]!r}, which is not BEGINNING:BATCHES, such as {EXAMPLE}; a beginning is "
                f"{EXAMPLES}, batches are 1 to {MOST_BATCHES}"
            )
        stages.append((begin, int(batches)))
    return stages


def resolve(text: str, *, total: int, tokens_per_step: int, steps_per_epoch: float) -> str:
    """The same text with beginnings in steps. Raises ValueError if they do not increase."""
    units = {"total": total, "tokens_per_step": tokens_per_step, "steps_per_epoch": steps_per_epoch}
    stages = [(resolve_duration(begin, **units), batches) for begin, batches in read(text)]
    begins = [begin for begin, _ in stages]
    if begins != sorted(set(begins)):
        raise ValueError(f"begins at the steps {begins}; every stage must begin after the one before it")
    return ",".join(f"{begin}:{batches}" for begin, batches in stages)
