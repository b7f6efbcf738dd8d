"""The API: OpenAI's addresses and a few of our own, as a FastAPI application behind the `Guard`."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from internalrl.errors import InternalRLError
from internalrl.serving.api import problems
from internalrl.serving.api.guard import Guard
from internalrl.serving.api.metrics import CONTENT_TYPE
from internalrl.serving.api.openai_answers import (
    ChatAnswer,
    ErrorAnswer,
    FeedbackAnswer,
    Health,
    Model,
    ModelList,
    Routed,
    TextAnswer,
)
from internalrl.serving.api.openai_requests import (
    REQUEST_ID,
    ChatRequest,
    CompletionRequest,
    FeedbackRequest,
    PromoteRequest,
    SplitRequest,
)
from internalrl.serving.api.problems import Problem
from internalrl.serving.api.reading import described, reading, schemas
from internalrl.serving.api.security import Key, Scope
from internalrl.serving.api.service import Service
from internalrl.serving.api.whole import Whole
from internalrl.serving.audit import page as audit_page
from internalrl.serving.audit.store import Query as AuditQuery
from internalrl.serving.registry.versions import NAME

log = logging.getLogger(__name__)

KEYS_EVERY = 1.0
"""Seconds until a key that was made or revoked elsewhere is known here."""

AdapterName = Annotated[str, Path(pattern=f"^{NAME.pattern}$")]
Filter = Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$")]


def application(service: Service) -> Guard:
    """The whole of it, for uvicorn."""
    app = FastAPI(
        title="internalrl",
        version=importlib.metadata.version("internalrl"),
        docs_url=None,  # their pages fetch scripts from elsewhere
        redoc_url=None,
        lifespan=lambda _: _following(service),
        responses={status: {"model": ErrorAnswer} for status in ("4XX", "5XX")},
    )
    app.exception_handler(Problem)(problems.answer_problem)
    app.exception_handler(HTTPException)(problems.answer_http)
    app.exception_handler(RequestValidationError)(problems.answer_invalid)
    app.exception_handler(Exception)(problems.answer_failure)
    _add_generation(app, service)
    _add_operation(app, service)
    _add_admin(app, service)
    _add_audit(app, service)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return Guard(app, service)


@asynccontextmanager
async def _following(service: Service) -> AsyncIterator[None]:
    """While the server runs, it follows the registry and the keys."""
    await service.live.follow()

    async def follow_keys() -> None:
        while True:
            await asyncio.sleep(KEYS_EVERY)
            try:
                await service.in_database(service.keys.refresh)
                service.keys_lost = False
            except Exception as error:  # those that are known stay in force
                if not service.keys_lost:
                    log.error("the keys cannot be followed: %s", error)
                service.keys_lost = True

    tasks = [asyncio.create_task(work) for work in (service.live.keep_following(), follow_keys())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await service.close()


def may(scope: Scope) -> Callable[[Request], Key]:
    """A dependency: the caller's key, which must have this scope."""

    def caller(request: Request) -> Key:
        key: Key = request.state.caller
        if scope not in key.scopes:
            raise Problem(403, f"The key may not do this; it needs the scope {scope}.", code="missing_scope")
        return key

    return caller


Generator = Annotated[Key, Depends(may("generate"))]
Chat = Annotated[ChatRequest, Depends(reading(ChatRequest))]
Completion = Annotated[CompletionRequest, Depends(reading(CompletionRequest))]
Feedback = Annotated[FeedbackRequest, Depends(reading(FeedbackRequest))]
Promotion = Annotated[PromoteRequest, Depends(reading(PromoteRequest))]
Split = Annotated[SplitRequest, Depends(reading(SplitRequest))]


def _add_generation(app: FastAPI, service: Service) -> None:
    streamed: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}

    @app.get("/v1/models", response_model=ModelList, response_model_exclude_none=True)
    async def models(caller: Generator) -> ModelList:
        return ModelList(data=_models(service))

    @app.get("/v1/models/{model:path}", response_model=Model, response_model_exclude_none=True)
    async def model(model: str, caller: Generator) -> Model:
        service.check_model(model)
        known = {entry.id: entry for entry in _models(service)}
        return known.get(model) or Model(id=model, created=service.started, parent=service.name)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatAnswer,
        responses={200: streamed},
        openapi_extra=described(ChatRequest),
    )
    async def chat(caller: Generator, body: Chat) -> Response:
        return await _generate(service, body, caller)

    @app.post(
        "/v1/completions",
        response_model=TextAnswer,
        responses={200: streamed},
        openapi_extra=described(CompletionRequest),
    )
    async def completions(caller: Generator, body: Completion) -> Response:
        return await _generate(service, body, caller)

    @app.post("/v1/feedback", response_model=FeedbackAnswer, openapi_extra=described(FeedbackRequest))
    async def feedback(caller: Annotated[Key, Depends(may("feedback"))], body: Feedback) -> FeedbackAnswer:
        if (body.reward is None) == (body.thumbs is None):
            raise Problem(400, "Give either a reward or thumbs.", param="reward")
        version = await _in_registry(
            service, lambda: service.registry.feedback(body.request_id, reward=body.reward, thumbs=body.thumbs)
        )
        return FeedbackAnswer(request_id=body.request_id, version=version)


def _models(service: Service) -> list[Model]:
    adapters = [
        Model(
            id=name,
            created=int(max(arm.version.added for arm in arms)),
            parent=service.name,
            versions={arm.version.key: arm.share for arm in arms},
        )
        for name, arms in sorted(service.live.routing.arms.items())
    ]
    return [Model(id=service.name, created=service.started), *adapters]


async def _generate(service: Service, body: ChatRequest | CompletionRequest, caller: Key) -> Response:
    service.check_model(body.model)
    prompts = await service.prompts(body, caller)
    if body.stream:
        return _Streamed(service, body, prompts, caller)
    async with service.generating(body, prompts, caller) as (answer, events):
        whole = Whole(answer)
        async for index, event in events:
            if part := answer.add(index, event):
                whole.add(part)
        return await whole.response()


class _Streamed(Response):
    """Server-sent events. What fails before the first is an answer with its own status, later it is an event."""

    media_type = "text/event-stream"

    def __init__(
        self, service: Service, body: ChatRequest | CompletionRequest, prompts: list[tuple[int, ...]], caller: Key
    ):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._work = service, body, prompts, caller

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        service, body, prompts, caller = self._work

        async def tell(content: dict[str, Any]) -> None:
            data = json.dumps(content, separators=(",", ":")).encode()
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

        started = False
        try:
            async with service.generating(body, prompts, caller) as (answer, events):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                started = True
                for choice in answer.opening():
                    await tell(answer.chunk([choice]))
                async for index, event in events:
                    if part := answer.add(index, event):
                        await tell(answer.chunk([part]))
                if body.stream_options and body.stream_options.include_usage:
                    await tell(answer.chunk([], usage=True))
        except Problem as problem:
            if not started:
                await problem.response()(scope, receive, send)
                return
            await tell(problem.content)
        except Exception as error:
            if not started:
                raise
            log.error("an answer broke off", exc_info=error)
            await tell(problems.failed().content)
        else:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _add_operation(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=Health)
    async def health() -> Health:
        if service.audit and service.audit.failure:
            raise Problem(503, "The audit cannot be written; steered answers are not given.", code="no_audit")
        return Health(status="ok")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE: {}}}})
    async def metrics(caller: Annotated[Key, Depends(may("metrics"))]) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_admin(app: FastAPI, service: Service) -> None:
    admin = Depends(may("admin"))

    async def changed(name: str, change: Callable[[], Any]) -> Routed:
        await _in_registry(service, change)
        try:
            await service.live.follow()
        except InternalRLError as error:
            raise _no_database(error) from error
        arms = service.live.routing.arms.get(name, ())
        return Routed(model=name, versions={arm.version.key: arm.share for arm in arms})

    @app.post(
        "/v1/admin/adapters/{name}/promote",
        response_model=Routed,
        dependencies=[admin],
        openapi_extra=described(PromoteRequest),
    )
    async def promote(name: AdapterName, body: Promotion) -> Routed:
        return await changed(name, lambda: service.registry.promote(f"{name}@{body.version}"))

    @app.post("/v1/admin/adapters/{name}/rollback", response_model=Routed, dependencies=[admin])
    async def rollback(name: AdapterName) -> Routed:
        return await changed(name, lambda: service.registry.rollback(name))

    @app.post(
        "/v1/admin/adapters/{name}/split",
        response_model=Routed,
        dependencies=[admin],
        openapi_extra=described(SplitRequest),
    )
    async def split(name: AdapterName, body: Split) -> Routed:
        weights = {int(number): weight for number, weight in body.weights.items()}
        return await changed(name, lambda: service.registry.split(name, weights))


def _add_audit(app: FastAPI, service: Service) -> None:
    if (audit := service.audit) is None:
        return
    auditor = Depends(may("audit"))
    headers = {"Content-Security-Policy": audit_page.POLICY, "X-Content-Type-Options": "nosniff"}

    @app.get("/audit", response_class=HTMLResponse, dependencies=[auditor])
    async def answers(adapter: Filter = None, strategy: Filter = None, violation: Filter = None) -> Response:
        query = AuditQuery(adapter=adapter or None, strategy=strategy or None, violation=violation or None)
        return HTMLResponse(
            await _in_registry(service, lambda: audit_page.audit_list(audit.store, query)), headers=headers
        )

    @app.get("/audit/{request_id}", response_class=HTMLResponse, dependencies=[auditor])
    async def one(request_id: Annotated[str, Path(pattern=REQUEST_ID)]) -> Response:
        page = await _in_registry(service, lambda: audit_page.audit_page(audit.store, request_id))
        if page is None:
            raise Problem(404, "The audit has no such answer.")
        return HTMLResponse(page, headers=headers)


async def _in_registry(service: Service, work: Callable[[], Any]) -> Any:
    """Do what needs the database. What it refuses is the caller's mistake, unless it has failed."""
    try:
        return await service.in_database(work)
    except InternalRLError as error:
        if isinstance(error.__cause__, SQLAlchemyError | OSError):
            raise _no_database(error) from error
        raise Problem(404, str(error)) from error


def _no_database(error: InternalRLError) -> Problem:
    log.error("%s", error)
    return Problem(503, "The database cannot be reached; try again later.", code="no_database")


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description of the API. FastAPI would add its own form of errors, and knows nothing of the guard."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for address, methods in schema["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                operation["security"] = [] if address == "/health" else [{"key": []}]
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        read = (ChatRequest, CompletionRequest, FeedbackRequest, PromoteRequest, SplitRequest)
        schema["components"]["schemas"].update(schemas(read))
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = schema
    return app.openapi_schema
