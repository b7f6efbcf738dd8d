"""Errors as OpenAI's API words them: a status, one sentence, a type, the option it is about, a code.

What is said is ours alone: no file, no trace, and of the request at most the name of an option.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
_SENTENCES = {
    404: "There is nothing at this address; GET /openapi.json lists what there is.",
    405: "This address does not take this method; GET /openapi.json lists what it takes.",
}
_OPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")


class Problem(Exception):  # noqa: N818 (mostly the client's)
    """What a request is answered with instead of what it asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def body(self) -> bytes:
        """`content` as JSON."""
        return json.dumps(self.content).encode()

    def response(self) -> Response:
        """The whole answer."""
        return Response(self.body, self.status, self.headers, "application/json")


def busy(seconds: float = 1.0) -> Problem:
    """More is asked for than there is room for at the moment."""
    headers = {"Retry-After": str(max(1, round(seconds)))}
    return Problem(429, "The server is at its capacity; try again later.", code="busy", headers=headers)


def rate_limited(what: str, wait: float) -> Problem:
    """The key's limit of `what` per minute is used up for `wait` seconds."""
    if wait == float("inf"):
        return Problem(429, f"This asks for more {what} than the key may have per minute.", code="rate_limit_exceeded")
    headers = {"Retry-After": str(int(wait) + 1)}
    message = f"The key's limit of {what} per minute is used up; try again later."
    return Problem(429, message, code="rate_limit_exceeded", headers=headers)


def failed() -> Problem:
    """The server's own mistake; its log has the details."""
    message = "The server failed on this request; its log says why."
    return Problem(500, message, code="internal_error", headers={"Connection": "close"})  # uvicorn will close it


def stopping() -> Problem:
    """The server was told to stop, and does not wait any longer."""
    headers = {"Connection": "close", "Retry-After": "5"}
    return Problem(503, "The server is shutting down; try again later.", code="shutting_down", headers=headers)


async def answer_problem(_: Request, error: Exception) -> Response:
    """FastAPI's handler of `Problem`."""
    assert isinstance(error, Problem)
    return error.response()


async def answer_http(_: Request, error: Exception) -> Response:
    """Handles FastAPI's own errors and Starlette's: unknown addresses, wrong methods, bodies that are no JSON."""
    assert isinstance(error, HTTPException)
    message = _SENTENCES.get(error.status_code, "The request's body cannot be read; send one JSON object.")
    return Problem(error.status_code, message, headers=error.headers).response()


async def answer_invalid(_: Request, error: Exception) -> Response:
    """FastAPI's handler of addresses that do not fit: OpenAI answers them with 400."""
    assert isinstance(error, RequestValidationError)
    errors = [{**found, "loc": found["loc"][1:]} for found in error.errors()]  # behind "path" or "query"
    return unfit(errors).response()


def unfit(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """What pydantic says of a request that does not fit its model, in one sentence."""
    if errors[0]["type"] == "json_invalid":
        return Problem(400, "The body is not valid JSON, or nested too deeply.")
    # Of a union's types the one was meant that got furthest.
    about = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    first = max(about, key=lambda error: len(error["loc"]))
    path = list(first["loc"])
    if named := first.get("ctx", {}).get("param"):
        path.append(named)
    param = next((part for part in path if isinstance(part, str)), None)
    if param is None or not _OPTION.fullmatch(param):
        return Problem(400, "The body does not fit; send a JSON object of this address's options.")
    if first["type"] == "none_required":  # see `openai_requests.Body`
        return Problem(400, f"There is no option {_dotted(path)} here.", param=param, code="unknown_option")
    return Problem(400, f"{_dotted(path)}: {_complaint(first)}.", param=param)


async def answer_failure(_: Request, error: Exception) -> Response:
    """FastAPI's handler of everything else; Starlette hands the exception on to the log."""
    return failed().response()


def _dotted(path: Sequence[str | int]) -> str:
    """The option as one would write it: messages[0].content; what a union of types adds to the path is left out."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _OPTION.fullmatch(part) and part not in ("str", "float", "int"):
            text += f".{part}" if text else part
    return text


def _complaint(error: Mapping[str, Any]) -> str:
    """Pydantic's message; it names ranges and types, and never the value."""
    message: str = error["msg"].rstrip(".")
    return message[0].lower() + message[1:]
