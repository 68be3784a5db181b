"""Texts sampled while a model trains."""

from pathlib import Path

from gptjax.config import Config
from gptjax.data.opening import RunData
from gptjax.generation.completion import Generator, encode
from gptjax.generation.model import Model, check_prompt
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt
from gptjax.processes import distributed
from gptjax.training import metrics
from gptjax.training.program import Program


class Sampler:
    """Writes a few continuations to WORKDIR/samples.jsonl at each evaluation."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        program: Program,
        data: RunData,
        *,
        start: int,
    ):
        """Drops the samples of steps after `start` if the run is resumed.

        Raises UserError for a prompt that does not fit, before anything is trained.
        """
        (prompt,) = encode([config.logging.sample_prompt], data.tokenizer, data.template, data.tokenizer.begin_ids)
        check_prompt(
            "the prompt of samples (logging.sample_prompt; none with logging.samples=0)", prompt, program.architecture
        )
        self.config, self.path = config, workdir / "samples.jsonl"
        self._writes = distributed.current().index == 0
        if self._writes:
            metrics.drop_after(self.path, start)
        self._architecture, self._mesh = program.architecture, program.mesh
        self._tokenizer, self._template = data.tokenizer, data.template
        self._sampling = SamplingParams(
            max_new_tokens=config.logging.sample_tokens, temperature=0.8, top_k=200, seed=config.seed
        )

    def sample(self, step: int, params: gpt.Params) -> None:
        """Every process takes part; the first writes."""
        prompt = self.config.logging.sample_prompt
        model = Model.prepare(self._architecture, params)  # a copy for decoding, freed at the end
        generator = Generator(model, self._tokenizer, self._template, mesh=self._mesh)
        completions = generator.complete([prompt] * self.config.logging.samples, self._sampling)
        if not self._writes:
            return
        metrics.append(
            self.path, *({"step": step, "prompt": prompt, "text": completion.text} for completion in completions)
        )
