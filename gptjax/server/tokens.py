"""Endpoints that generate nothing: embeddings, tokens, templates, models."""

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from gptjax.data.tokenization.templates import CHATML
from gptjax.server import completions, messages, schemas
from gptjax.server.context import context_of
from gptjax.server.errors import JSON, ApiError
from gptjax.server.served import Served


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: the mean of the final hidden states, normalised to length 1."""
    context = context_of(request)
    body = schemas.read(schemas.Embeddings, await context.body(request))
    model = context.models.find(body.model)
    if body.encoding_format not in (None, "float", "base64"):
        raise ApiError("encoding_format: choose float or base64", param="encoding_format")
    width = model.model.architecture.embed_dim
    if body.dimensions not in (None, width):
        raise ApiError(f"dimensions is {body.dimensions}; those of this model have {width}", param="dimensions")
    prompts = await asyncio.to_thread(completions.encode, model, body.input, "input")
    for prompt in prompts:
        model.check_length(prompt, "input", scored=True)
        _check_ids(model, prompt, "input")
    data = []
    for index, prompt in enumerate(prompts):
        vector = await asyncio.to_thread(model.embed, prompt)
        written: Any = vector.tolist()
        if body.encoding_format == "base64":
            written = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": written})
    count = sum(map(len, prompts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSON({"object": "list", "data": data, "model": model.name, "usage": usage})


async def tokenize(request: Request) -> Response:
    """POST /tokenize: {"prompt", "add_special_tokens"} or {"messages"} -> {"tokens"}.

    A text that consists of one special token becomes that token: lm-eval asks for its id this way.
    """
    context = context_of(request)
    body = schemas.read(schemas.Tokenize, await context.body(request))
    model = context.models.find(body.model)
    ids = await asyncio.to_thread(_tokens_of, model, body)
    return JSON({"tokens": ids, "count": len(ids), "max_model_len": model.context_length})


def _tokens_of(model: Served, body: schemas.Tokenize) -> list[int]:
    if body.messages:
        return messages.encode(model, messages.normal(body.messages)).tolist()
    if body.prompt is None:
        raise ApiError("prompt or messages is missing", param="prompt")
    if body.prompt in model.tokenizer.special_tokens:
        return [model.tokenizer.special_tokens[body.prompt]]
    return (model.tokenizer.encode if body.add_special_tokens is False else model.encode)(body.prompt).tolist()


async def detokenize(request: Request) -> Response:
    """POST /detokenize: {"tokens"} -> {"prompt"}."""
    context = context_of(request)
    body = schemas.read(schemas.Detokenize, await context.body(request))
    model = context.models.find(body.model)
    _check_ids(model, np.array(body.tokens, np.int64), "tokens")
    return JSON({"prompt": model.tokenizer.decode(body.tokens)})


async def tokenizer_info(request: Request) -> Response:
    """GET /tokenizer_info: the special tokens and the template, as lm-eval reads them."""
    model = context_of(request).models.find(request.query_params.get("model"))
    names = {number: text for text, number in model.tokenizer.special_tokens.items()}
    begin = model.begin_ids[-1] if model.begin_ids else None
    template = model.template and (model.template.jinja or CHATML)
    return JSON(
        {
            "tokenizer_class": model.tokenizer.kind,
            "vocab_size": model.tokenizer.vocab_size,
            "eos_token": model.tokenizer.eot_token,
            "bos_token": names.get(begin, model.tokenizer.eot_token),
            "pad_token": model.tokenizer.eot_token,
            "chat_template": template,
        }
    )


async def apply_template(request: Request) -> Response:
    """POST /apply-template: {"messages"} -> {"prompt"}, the text that the model reads."""
    context = context_of(request)
    body = schemas.read(schemas.ApplyTemplate, await context.body(request))
    model = context.models.find(body.model)
    return JSON({"prompt": messages.render(model, messages.normal(body.messages), messages.functions(body.tools))})


async def models(request: Request) -> Response:
    """GET /v1/models and /v1/models/NAME."""
    served = context_of(request).models
    if name := request.path_params.get("name"):
        return JSON(_card(served.find(name)))
    return JSON({"object": "list", "data": [_card(model) for model in served]})


def _card(model: Served) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "gptjax",
        "max_model_len": model.context_length,
        "chat": model.template is not None,
    }


def _check_ids(model: Served, ids: np.ndarray, param: str) -> None:
    vocab = model.model.architecture.vocab_size
    if len(ids) and int(ids.max()) >= vocab:
        raise ApiError(f"{param} has the id {int(ids.max())}, outside 0 to {vocab - 1}", param=param)
