"""GET /openapi.json: OpenAPI 3.1 of the paths with a body, from the schemas that validate requests."""

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

import gptjax
from gptjax.foreign import Schema
from gptjax.server import schemas
from gptjax.server.context import context_of
from gptjax.server.errors import JSON

BODIES: dict[str, type[Schema]] = {
    "/v1/chat/completions": schemas.Chat,
    "/v1/completions": schemas.Completion,
    "/v1/responses": schemas.Responses,
    "/v1/embeddings": schemas.Embeddings,
    "/tokenize": schemas.Tokenize,
    "/detokenize": schemas.Detokenize,
    "/apply-template": schemas.ApplyTemplate,
    "/preferences": schemas.Preference,
}
READ = ("/v1/models", "/tokenizer_info", "/health", "/ready", "/metrics")
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
RESPONSES = {
    "200": {"description": "the answer; with stream: true, events of text/event-stream"},
    "default": {
        "description": "the error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    },
}


def document(names: Sequence[str]) -> dict[str, Any]:
    """The document for models of these names. Fields of a body that are not in its schema are ignored."""
    places, definitions = models_json_schema(
        [(schema, "validation") for schema in BODIES.values()], ref_template="#/components/schemas/{model}"
    )
    for definition in definitions["$defs"].values():
        if "model" in definition["properties"]:
            definition["properties"]["model"] |= {"examples": list(names), "anyOf": [{"enum": [*names, None]}]}
    paths: dict[str, Any] = {path: {"get": {"responses": RESPONSES}} for path in READ}
    for path, schema in BODIES.items():
        body = {"required": True, "content": {"application/json": {"schema": places[schema, "validation"]}}}
        paths[path] = {"post": {"requestBody": body, "responses": RESPONSES}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gptjax", "version": gptjax.__version__},
        "paths": paths,
        "components": {
            "schemas": {**definitions["$defs"], "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],  # the second only with --api_keys
    }


async def openapi(request: Request) -> Response:
    return JSON(document([model.name for model in context_of(request).models]))
