"""Answers that the model writes for a step of training, and their rewards.

The answers depend only on the seed, the step and the parameters: a run that was killed and continues writes the same
answers. Several updates may use the same answers; checkpoints are saved only just before new answers are written, so
that no checkpoint needs to hold answers.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float64, Int64

from gptjax.data.opening import RunData
from gptjax.data.pipeline.prompts import Question, Questions
from gptjax.errors import UserError
from gptjax.generation import decoding
from gptjax.generation.completion import Generator
from gptjax.generation.engine import Model
from gptjax.generation.events import Completion
from gptjax.generation.params import SamplingParams
from gptjax.model import gpt
from gptjax.model.architecture import Architecture
from gptjax.objectives import policy_gradient
from gptjax.objectives.objective import Batch
from gptjax.parallel import partition
from gptjax.processes import distributed
from gptjax.rewards.processes import Item
from gptjax.rewards.rewards import Reward, Scores
from gptjax.training.program import Program
from gptjax.training.state import TrainState

MOST_SLOTS = 256  # answers that are written at the same time; refilling slots costs more than they save
_TILE = 8  # lengths of batches are multiples of it
_STREAM = 1  # keeps the random numbers of rollouts apart from others of the same seed


class Rollout(NamedTuple):
    """Answers and their rewards.

    Attributes:
      questions: each `group_size` times in a row.
      completions: one answer for each.
      scores: one reward for each.
    """

    questions: list[Question]
    completions: list[Completion]
    scores: Scores


class Rollouts:
    """Makes the batches of a run.

    Attributes:
      num_iterations: updates with the same answers.
      metrics: of the last batch: `reward`, `length` (tokens of an answer with its end token), `truncated` (share of
        answers cut off), `groups_without_signal` (share of questions whose answers all have the same reward, or one
        whose reward failed), `reward_failures`.
      texts: the last answers.
    """

    def __init__(self, program: Program, data: RunData, questions: Questions):
        """Raises UserError for an unknown reward, and in a run of several processes."""
        self._program, self._questions = program, questions
        self._objective, self._tokenizer, self._template = program.objective, data.tokenizer, data.template
        self.num_iterations = self._objective.num_iterations
        if distributed.current().size > 1:
            raise UserError(
                f"objective.name=reinforcement runs in one process, and this run has {distributed.current().size}; use "
                "the devices of one machine"
            )
        self.metrics: dict[str, float] = {}
        self.texts: list[str] = []
        self._prepare: tuple[Architecture, Callable[[gpt.Params], gpt.Params]] | None = None
        self._kept: tuple[int, Batch] | None = None  # (first step, batch) of the present answers
        longest = max(len(question.tokens) for question in questions.questions) + self._objective.max_new_tokens
        tile = _TILE * program.mesh.shape["context"]
        # Rows are as long as the longest question and answer need, rounded up to whole tiles.
        self._length = min(-(-longest // tile) * tile, program.config.model.context_length)
        self.reward = Reward(program.config, data.tokenizer)

    def batch(self, step: int, numbers: Int64[np.ndarray, " questions"], state: TrainState) -> Batch:
        """The batch of a step, on the devices: new answers, or those of the step before."""
        first = step - step % self.num_iterations
        if self._kept is None or self._kept[0] != first:
            asked = [self._questions.questions[number] for number in numbers.tolist()]
            rollout = self.write(first, asked, state.params)
            arrays = self.arrays(rollout)
            if self.num_iterations > 1:
                arrays["old"] = self._log_probabilities(state.params, arrays)
            self._kept = first, self._program.to_device(arrays)
        return self._kept[1]

    def write(self, step: int, asked: Sequence[Question], params: gpt.Params) -> Rollout:
        """`group_size` answers to each question, sampled at temperature 1 without top-k or top-p: the ratios in the
        loss are those of this distribution."""
        words = np.random.SeedSequence([self._program.config.seed, _STREAM, step]).generate_state(1)
        rows = [question for question in asked for _ in range(self._objective.group_size)]
        completions = self.answer(params, rows, temperature=1.0, seed=int(words[0]))
        self.texts = [completion.text for completion in completions]
        return Rollout(rows, completions, self.rewarded(rows, completions))

    def answer(
        self, params: gpt.Params, asked: Sequence[Question], *, temperature: float, seed: int = 0
    ) -> list[Completion]:
        """One answer to each question; equal questions get different samples."""
        model = self._model(params)
        generator = Generator(
            model,
            self._tokenizer,
            self._template,
            batch_size=MOST_SLOTS,
            mesh=self._program.mesh,
        )
        sampling = SamplingParams(max_new_tokens=self._objective.max_new_tokens, temperature=temperature, seed=seed)
        return generator.complete_tokens([question.tokens for question in asked], sampling)

    def rewarded(self, asked: Sequence[Question], completions: Sequence[Completion]) -> Scores:
        """The reward of each answer. Raises RunError as `Reward`."""
        pairs = zip(asked, completions, strict=True)
        items = [
            Item(q.prompt, completion.text, q.reference, np.concatenate([q.tokens, completion.tokens]))
            for q, completion in pairs
        ]
        return self.reward(items, [question.id for question in asked])

    def arrays(self, rollout: Rollout) -> dict[str, np.ndarray]:
        """All fields of a batch but `old`; also sets `metrics`."""
        config, size = self._program.config, self._objective.group_size
        rewards = rollout.scores.values.reshape(-1, size)
        advantages, has_signal = policy_gradient.advantages(rewards, config.objective.advantage)
        cut = np.array([completion.finish_reason == "length" for completion in rollout.completions])
        bears_loss = np.repeat(np.isfinite(rewards).all(1), size)
        if config.objective.truncated == "mask":
            bears_loss &= ~cut
        shape = (len(rollout.questions), self._length)
        arrays: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets")}
        arrays |= {name: np.zeros(shape, np.float32) for name in ("weights", "sampler")}
        for row, (question, completion) in enumerate(zip(rollout.questions, rollout.completions, strict=True)):
            text = np.concatenate([question.tokens, completion.tokens])
            answer = slice(len(question.tokens) - 1, len(text) - 1)
            arrays["tokens"][row, : len(text) - 1] = text[:-1]
            arrays["targets"][row, : len(text) - 1] = text[1:]
            arrays["weights"][row, answer] = bears_loss[row]
            arrays["sampler"][row, answer] = completion.log_probabilities
        share = 1.0 / max(float(arrays["weights"].sum()), 1.0)
        arrays |= {
            "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
            "advantages": advantages.reshape(-1).astype(np.float32),
            "token_share": np.full(shape[0], share, np.float32),
        }
        self.metrics = {
            "reward": _mean(rewards[np.isfinite(rewards)]),
            "length": _mean(np.array([len(completion.tokens) for completion in rollout.completions])),
            "truncated": _mean(cut),
            "groups_without_signal": _mean(~has_signal),
            "reward_failures": float(len(rollout.scores.failures)),
        }
        return arrays

    def _model(self, params: gpt.Params) -> Model:
        """The parameters in the form for decoding, made by one compiled program for each rollout.

        Waits until no step is running: on a CPU, two programs with collectives at the same time can deadlock.
        """
        jax.block_until_ready(params)
        if self._prepare is None:
            architecture = Model.prepare(self._program.architecture, params).architecture
            self._prepare = architecture, jax.jit(partial(decoding.prepare, architecture=architecture))
        architecture, prepare = self._prepare
        return Model(architecture, jax.block_until_ready(prepare(params)))

    @cached_property
    def _scored(self) -> Callable[[gpt.Params, Batch], jax.Array]:
        """From parameters and some fields of a batch to the log-probabilities of its targets, compiled."""
        program = self._program

        @partial(jax.jit, out_shardings=partition.replicated(program.mesh))
        def scored(params: gpt.Params, batch: Batch) -> jax.Array:
            with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
                model = gpt.bind(program.architecture, params)
                return program.objective.scores(model, batch).log_probability

        return scored

    def _log_probabilities(self, params: gpt.Params, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Those of the targets, float32 [rows, length], by the training form of the model, in micro-batches."""
        program = self._program
        values = []
        for part in np.split(np.arange(len(arrays["tokens"])), program.config.train.accumulation):
            batch = {name: arrays[name][part] for name in ("tokens", "targets", "positions")}
            placed = partition.to_device(batch, program.mesh, specs=program.batch_specs)
            values.append(np.asarray(self._scored(params, placed)))
        return np.concatenate(values)

    def close(self) -> None:
        """Ends the processes of the user's reward functions."""
        self.reward.close()


def _mean(values: Float64[np.ndarray, " n"] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
