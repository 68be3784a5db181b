"""Prompts to completions with a trained model, all at once or streaming."""

from collections.abc import Callable, Sequence

import numpy as np

from gptjax.artifacts.loading import Trained
from gptjax.data.tokenization.templates import ChatTemplate
from gptjax.data.tokenization.tokenizer import Tokenizer
from gptjax.errors import UserError
from gptjax.generation import decoding
from gptjax.generation.engine import Engine, Statistics
from gptjax.generation.events import Completion, Event
from gptjax.generation.model import Model, check_prompt
from gptjax.generation.params import SamplingParams

OnText = Callable[[int, str], None]

BATCH_SIZE = 32
STREAMING_ROUNDS = 4  # tokens between two pieces of streamed text


class Generator:
    """Completes prompts with a model.

    Attributes:
      statistics: counts of the last call, or None before the first.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        *,
        begin_ids: Sequence[int] | None = None,
        end_ids: Sequence[int] = (),
        batch_size: int = BATCH_SIZE,
        **engine_options,
    ):
        """With a template, a prompt is a user's message, and a completion is the assistant's turn.

        A text ends with an end-of-text token, the end of the assistant's turn, or one of `end_ids`. `begin_ids` are put
        before a prompt; default: those of the tokenizer. `engine_options`: mesh, draft and draft_tokens of `Engine`.
        """
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.statistics: Statistics | None = None
        end_of_turn = [tokenizer.special_tokens[template.end_of_turn]] if template else []
        self.end_ids = tuple(dict.fromkeys([tokenizer.eot_id, *end_of_turn, *end_ids]))
        self.begin_ids = tokenizer.begin_ids if begin_ids is None else tuple(begin_ids)
        self._batch_size, self._engine_options = batch_size, engine_options

    @classmethod
    def from_trained(cls, trained: Trained, *, draft: Trained | None = None, **options) -> "Generator":
        """A generator for a checkpoint; another checkpoint may be its draft.

        Raises:
          UserError: the draft has another tokenizer, or one of both is a reward model.
        """
        for model in filter(None, (trained, draft)):
            if model.config.objective.name == "reward_model":
                raise UserError(
                    f"{model.path} is a reward model: it judges answers and writes none; use it to choose answers: "
                    "`gptjax generate --workdir=WRITER --best_of=8 --reward=model:WORKDIR`"
                )
        if draft is not None:
            if draft.tokenizer.to_str() != trained.tokenizer.to_str():
                raise UserError(
                    f"the draft {draft.path} has another tokenizer ({draft.tokenizer.vocab_size} tokens) than "
                    f"{trained.path} ({trained.tokenizer.vocab_size} tokens); a draft needs the same"
                )
            options["draft"] = Model.prepare(draft.architecture, draft.params, f"the draft {draft.path}")
        return cls(
            Model.prepare(trained.architecture, trained.params, str(trained.path)),
            trained.tokenizer,
            trained.template,
            begin_ids=trained.generation.get("begin_token_ids"),
            end_ids=trained.generation.get("eos_token_ids", ()),
            **options,
        )

    def engine(self, **options) -> Engine:
        """An engine for the same model, for requests that arrive one by one. Options: see `Engine`."""
        return Engine(self.model, self.tokenizer, end_ids=self.end_ids, **self._engine_options, **options)

    def complete(
        self,
        prompts: Sequence[str],
        params: SamplingParams,
        *,
        on_text: OnText | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Completion]:
        """`complete_tokens` for texts; each is the beginning of a document, after `begin_ids`."""
        return self.complete_tokens(self.encode(prompts), params, on_text=on_text, indices=indices)

    def encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        """The tokens that `complete` continues."""
        return encode(prompts, self.tokenizer, self.template, self.begin_ids)

    def complete_tokens(
        self,
        prompts: Sequence[np.ndarray],
        params: SamplingParams,
        *,
        on_text: OnText | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Continues each prompt, exactly as given, until its text ends or the context is full.

        A completion depends on the tokens of its prompt, its index and `params`, but not on the other prompts.

        Args:
          prompts: token ids.
          params: how to sample, and where to end.
          on_text: called with the index of a prompt and a new piece of its text, as soon as the piece is final. Joined,
            the pieces are the text of the completion; no piece has half a character.
          indices: give equal prompts different samples; default: the indices in `prompts`.

        Raises:
          UserError: `params` are out of range; a prompt is empty, longer than the context, or has an id that
            is not in the vocabulary.
          Exception: the error that ended the work on a prompt.
        """
        params.validate()
        for place, prompt in enumerate(prompts):
            check_prompt(f"prompt {place}", np.asarray(prompt), self.model.architecture)
        indices = range(len(prompts)) if indices is None else indices
        engine = self.engine(
            slots=min(1 << max(len(prompts) - 1, 0).bit_length(), self._batch_size),
            max_waiting=len(prompts),
            rounds=STREAMING_ROUNDS if on_text else decoding.ROUNDS,
        )
        # Sorted by length, so that prompts of similar length are read together. The longest come first, so that no
        # cache has to grow, and too little memory shows at once.
        requests = sorted(enumerate(zip(prompts, indices, strict=True)), key=lambda request: -len(request[1][0]))
        places = {engine.submit(prompt, params, index=index): place for place, (prompt, index) in requests}
        events: list[list[Event]] = [[] for _ in prompts]
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise event.error
                place = places[event.handle]
                events[place].append(event)
                if on_text and event.text:
                    on_text(place, event.text)
        self.statistics = engine.statistics
        return [Completion.of(own) for own in events]


def encode(
    prompts: Sequence[str], tokenizer: Tokenizer, template: ChatTemplate | None, begin_ids: Sequence[int]
) -> list[np.ndarray]:
    """The tokens of texts to complete, each after `begin_ids`; with a template, each is a user's message."""
    if template is None:
        encoded = tokenizer.encode_batch(prompts)
    else:
        questions = [[{"role": "user", "content": prompt}] for prompt in prompts]
        encoded = [template.encode_prompt(messages, tokenizer) for messages in questions]
    tokens = [np.concatenate([np.array(begin_ids, np.int32), ids]) for ids in encoded]
    alone = np.array([tokenizer.eot_id], np.int32)  # a model needs one token to begin with
    return [ids if len(ids) else alone for ids in tokens]
