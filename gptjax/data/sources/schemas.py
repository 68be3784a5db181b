"""Schemas of dialogue records, by format, and the keys that are not used."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from gptjax.data.sources.base import Faults
from gptjax.data.sources.record import Damaged
from gptjax.foreign import Schema
from gptjax.json_text import show

# {key that would change the text or the loss: why it is refused}.
_REFUSED = {
    **dict.fromkeys(
        ("image", "images", "image_url", "audio", "audios", "video", "videos", "files", "attachments", "documents"),
        "only text is read",
    ),
    **dict.fromkeys(
        ("reasoning", "reasoning_content", "thinking", "refusal"),
        "this text of the assistant would be lost; put it into the content",
    ),
    **dict.fromkeys(
        ("mask", "loss_mask", "labels", "weight", "sample_weight", "loss_weight", "train", "prefix", "train_detail"),
        "the loss is controlled by weight (0 or 1), train, training or loss (true or false) of a message",
    ),
}
# Keys with information about records and turns that is not part of the dialogue.
ABOUT = frozenset(
    """
    id idx index uid uuid conversation_id dialogue_id dialog_id session_id message_id turn_id source dataset url split
    lang language title date time timestamp created created_at updated_at model score rating category categories tag
    tags topic domain metadata meta attrs annotations logprobs parallel_tool_calls n_turns num_turns tokens license
    type kind name rank message_tree_id tree_state prompt_id chosen_score rejected_score score_chosen score_rejected
    chosen_rating rejected_rating chosen_model rejected_model
    """.split()  # noqa: SIM905
)


class _Entry(Schema):
    """A record or a turn; `check_keys` treats keys without a field here."""

    IGNORED: ClassVar[frozenset[str]] = ABOUT

    def check_keys(self, where: str, faults: Faults) -> None:
        """Notes unused keys. Raises `Damaged` for one that would change the text or the loss."""
        if not self.model_extra:
            return
        for key in self.unknown():
            value = self.model_extra[key]
            if value in ("", [], {}) or (key.endswith("weight") and value == 1) or (key == "prefix" and value is False):
                continue  # no effect
            if key in _REFUSED:
                raise Damaged(f"{where}{key} is {show(value)}, which is not read: {_REFUSED[key]}")
            faults.note(f"key {key[:60]!r} of records, which is not used")


class Part(_Entry):
    """A part of a content, as the OpenAI API has it."""

    type: str = "text"
    text: str | None = None


class Turn(_Entry):
    """A message of OpenAI's format, or a turn of ShareGPT's."""

    role: str | None = None
    speaker: str | None = Field(None, alias="from")
    content: str | list[Part] | None = None
    value: str | None = None
    weight: float | None = None
    train: bool | None = None
    training: bool | None = None
    loss: bool | None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def learnt(self) -> bool | None:
        """Whether the record says that the turn counts in the loss; None if it does not say."""
        said = [self.train, self.training, self.loss]
        if self.weight is not None:
            if self.weight not in (0, 1):
                raise Damaged(f"weight is {self.weight:g}, but must be 0 (no loss) or 1")
            said.append(self.weight == 1)
        said = [one for one in said if one is not None]
        if len(set(said)) > 1:
            raise Damaged("weight, train, training and loss contradict each other")
        return said[0] if said else None


class Dialogue(_Entry):
    """A record of OpenAI's or ShareGPT's format."""

    messages: list[Turn] | None = None
    conversations: list[Turn] | None = None
    system: str | None = None
    system_prompt: str | None = None
    tools: list[dict[str, Any]] | str | None = None
    functions: list[dict[str, Any]] | str | None = None


class Reply(_Entry):
    """A message of OpenAssistant's trees, with the replies to it; rank 0 is the best."""

    text: str
    role: str = "prompter"
    rank: int | None = None
    deleted: bool | None = None
    replies: "list[Reply] | None" = None


class Preference(_Entry):
    """A record that ranks answers, or judges one answer; see `preferences`."""

    prompt: str | list[Turn] | Reply | None = None
    question: str | None = None
    query: str | None = None
    instruction: str | None = None
    input: str | None = None
    history: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = None
    messages: list[Turn] | None = None
    conversations: list[Turn] | None = None
    system: str | None = None
    system_prompt: str | None = None
    chosen: str | Turn | list[Turn] | None = None
    rejected: str | Turn | list[Turn] | None = None
    completion: str | list[Turn] | None = None
    output: str | list[str] | None = None
    label: bool | int | str | None = None
    kto_tag: bool | int | str | None = None
    tools: list[dict[str, Any]] | str | None = None
    functions: list[dict[str, Any]] | str | None = None
    margin: float | None = None


class KdTurn(_Entry):
    message: str


class KdDialogue(_Entry):
    """A record of KdConv."""

    messages: list[KdTurn]
    system: str | None = None
    system_prompt: str | None = None


class Alpaca(_Entry):
    """An instruction with its answer, and the earlier turns."""

    instruction: str
    input: str | None = None
    output: str
    system: str | None = None
    system_prompt: str | None = None
    history: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = None


class Pair(_Entry):
    """The other keys of a record with a prompt and a response."""
