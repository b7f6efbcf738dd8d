"""Bodies become requests: bounded before they are parsed, and refused at their first fault.

The event loop waits while a body is read, so that no body may take long, whatever is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.requests import Request

from internalrl.serving.api.openai_requests import Body
from internalrl.serving.api.problems import Problem, unfit

VALUES = 1 << 17
"""Most values in the lists and objects of a body; the tokens of a prompt are such."""
PARTS = 1 << 14
"""Most lists, objects and members of objects in a body; they take longer than other values."""
REF = "#/components/schemas/{model}"

B = TypeVar("B", bound=Body)


def reading(model: type[B]) -> Callable[[Request], Coroutine[Any, Any, B]]:
    """A dependency: the request's body as `model`. FastAPI's own reads bodies of any shape, and all their faults."""

    async def read(request: Request) -> B:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise Problem(400, "Send the body as JSON, with the header Content-Type: application/json.")
        return parse(model, await request.body())

    return read


def parse(model: type[B], body: bytes) -> B:
    """The body as `model`; Problem where it does not fit."""
    body = body.removeprefix(b"\xef\xbb\xbf")
    _check_size(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise unfit(error.errors(include_url=False, include_input=False)) from None


def described(model: type[Body]) -> dict[str, Any]:
    """The body in the description of the API; `schemas` has what it refers to."""
    content = {"application/json": {"schema": {"$ref": REF.format(model=model.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def schemas(models: Sequence[type[Body]]) -> dict[str, Any]:
    """What `described` refers to."""
    _, schema = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    found: dict[str, Any] = schema["$defs"]
    return found


def _check_size(body: bytes) -> None:
    """Count what stands between the texts, all of it at the speed of a search."""
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    fits = bare.count(b'"') <= 4 * PARTS  # a member is two texts at most
    if fits:
        outside = b"".join(bare.split(b'"')[::2])
        fits = outside.count(b",") <= VALUES and sum(map(outside.count, (b"{", b"[", b":"))) <= PARTS
    if not fits:
        message = f"The body holds more than {PARTS} lists and members of objects, or {VALUES} values; send less."
        raise Problem(400, message, code="body_too_large")
