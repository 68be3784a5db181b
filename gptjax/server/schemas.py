"""Schemas of request bodies. Other parameters are accepted and ignored.

`stop`, `seed` and `n` are never ignored.
"""

from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from gptjax import foreign
from gptjax.foreign import Schema
from gptjax.json_text import parse_json
from gptjax.server.errors import ApiError

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
# Role names of clients -> role names of templates.
ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
S = TypeVar("S", bound=Schema)


class StreamOptions(Schema):
    include_usage: bool | None = None


class ResponseFormat(Schema):
    """`type` is text, json_object or json_schema; the schema is in `json_schema.schema`."""

    type: str
    json_schema: dict[str, Any] | None = None


class Sampling(Schema):
    """Fields of all generating requests. The second half is not from OpenAI, but from vLLM or llama.cpp."""

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    guided_regex: str | None = None
    guided_json: dict[str, Any] | None = None


class Message(Schema):
    role: str = Field(json_schema_extra={"enum": list(ROLES)})
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Chat(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None


class Completion(Sampling):
    prompt: str | list[Token] | list[str] | list[list[Token]]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None


class Responses(Schema):
    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stream: bool | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    metadata: dict[str, Any] | None = None


class Embeddings(Schema):
    model: str | None = None
    input: str | list[Token] | list[str] | list[list[Token]]
    encoding_format: str | None = None
    dimensions: int | None = None


class Tokenize(Schema):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None


class Detokenize(Schema):
    model: str | None = None
    tokens: list[Token]


class Preference(Schema):
    prompt: Annotated[list[Message], Field(min_length=1)]
    chosen: Annotated[list[Message], Field(min_length=1)]
    rejected: Annotated[list[Message], Field(min_length=1)]
    models: list[str] | None = None


class ApplyTemplate(Schema):
    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None


def read(schema: type[S], body: bytes) -> S:
    """A body, validated by its schema. Raises ApiError with the wrong parameter, UserError if it is not JSON."""
    value = parse_json(body, "the body")
    try:
        return foreign.check(schema, value, "the request")
    except foreign.UserError as error:
        raise ApiError(str(error), param=_param(schema, value), code="invalid_value") from None


def _param(schema: type[S], value: Any) -> str | None:
    """The name of the first field that is wrong."""
    try:
        schema.model_validate(value)
    except (pydantic.ValidationError, RecursionError) as error:
        if isinstance(error, pydantic.ValidationError) and error.errors()[0]["loc"]:
            return str(error.errors()[0]["loc"][0])
    return None


def foreign_message(value: dict[str, Any], where: str) -> Message:
    """A message inside a request. Raises ApiError."""
    try:
        return foreign.check(Message, value, where)
    except foreign.UserError as error:
        raise ApiError(str(error), param="input", code="invalid_value") from None
