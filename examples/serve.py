"""Serves an embedding model and a reranker over HTTP, to clients of OpenAI's API and of text-embeddings-inference.

    python examples/serve.py --model PATH --reranker PATH --name my-model --port 8000
    curl localhost:8000/v1/embeddings -H 'content-type: application/json' -d '{"model": "my-model", "input": "a text"}'

Requests that arrive together share a forward. `batched` forms the batches; README.md says why.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import sys
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StringConstraints, field_validator
from pydantic_core import to_json
from served_model import Limits, Loading, RequestError, ServedModel, load_embedder, load_reranker
from starlette.exceptions import HTTPException

Text = Annotated[str, StringConstraints(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
# Answers to fewer texts are written in the event loop, since a thread takes longer to start.
MANY_TEXTS = 8


class EmbeddingRequest(BaseModel):
    """Body of OpenAI's `POST /v1/embeddings`."""

    model_config = {"extra": "forbid"}

    input: Texts
    model: str
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, strict=True)] | None = None
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _as_list(cls, value: object) -> object:
        if isinstance(value, list) and any(isinstance(one, (int, list)) for one in value):
            raise ValueError("token ids are not supported; expected a string or a list of strings")
        return [value] if isinstance(value, str) else value


class RerankRequest(BaseModel):
    """Body of text-embeddings-inference's `POST /rerank`."""

    model_config = {"extra": "forbid"}

    query: Text
    texts: Texts
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool = False


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """Makes an error of OpenAI's API."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {503: {"Retry-After": "1"}, 408: {"Connection": "close"}}.get(status)
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status, headers)


class WholeBody:
    """ASGI middleware: reads a body before the application runs; refuses large, slow and undecodable ones."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced, seconds = int(dict(scope["headers"]).get(b"content-length", b"0")), self._limits.client_seconds
        try:
            body = await asyncio.wait_for(self._read(receive, announced), seconds)
            if body is None:
                return None
            body.decode()
        except asyncio.TimeoutError:
            return await error_response(408, f"no whole body within {seconds} seconds")(scope, receive, send)
        except RequestError as error:
            return await error_response(error.status, error.message)(scope, receive, send)
        except UnicodeDecodeError as error:
            return await error_response(400, f"the body is not UTF-8: {error}")(scope, receive, send)
        unread = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return unread.pop() if unread else await receive()

        return await self._app(scope, replay, send)

    async def _read(self, receive: Any, announced: int) -> bytearray | None:
        """Returns the body; None if the client has gone."""
        limit, body = self._limits.max_body_bytes, bytearray()
        while (size := max(announced, len(body))) <= limit:
            piece = await receive()
            if piece["type"] == "http.disconnect":
                return None
            body += piece.get("body", b"")
            if not piece.get("more_body") and len(body) <= limit:
                return body
        raise RequestError(413, f"the body has {size} bytes or more; expected at most {limit}")


def write_embeddings(vectors: np.ndarray, request: EmbeddingRequest, tokens: int) -> bytes:
    """Writes the answer of `/v1/embeddings`, with vectors of length 1."""
    vectors = vectors[:, : request.dimensions]
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if request.encoding_format == "base64":
        rows: list[Any] = [base64.b64encode(row.tobytes()).decode() for row in vectors.astype("<f4", copy=False)]
    else:
        rows = vectors.tolist()
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return to_json({"object": "list", "data": data, "model": request.model, "usage": usage})


async def answer_embeddings(request: EmbeddingRequest, name: str, model: ServedModel | None) -> Response:
    """Answers `/v1/embeddings` with the model of that name."""
    if model is None or request.model != name:
        served = "there is no embedding model" if model is None else f"expected {name!r}"
        raise RequestError(404, f"model={request.model!r}; {served}", "model", "model_not_found")
    if (request.dimensions or 1) > model.dimensions:
        message = f"dimensions={request.dimensions}; expected at most {model.dimensions}"
        raise RequestError(400, message, "dimensions")
    vectors, tokens = await model(request.input)
    write = functools.partial(write_embeddings, vectors, request, tokens)
    return Response(
        write() if len(vectors) < MANY_TEXTS else await asyncio.to_thread(write), media_type="application/json"
    )


async def answer_rerank(request: RerankRequest, model: ServedModel | None) -> Response:
    """Answers `/rerank`: the best text first."""
    if model is None:
        raise RequestError(404, "there is no reranker; start the server with --reranker", code="model_not_found")
    scores, _ = await model(request.texts, request.query, truncate=request.truncate)
    # With float64, no score overflows.
    scores = scores if request.raw_scores else 1 / (1 + np.exp(-scores.astype(np.float64)))
    ranks: list[dict[str, Any]] = []
    for index in np.argsort(-scores, kind="stable").tolist():
        ranks.append({"index": index, "score": float(scores[index])})
        if request.return_text:
            ranks[-1]["text"] = request.texts[index]
    return Response(to_json(ranks), media_type="application/json")


def add_error_handlers(app: FastAPI) -> None:
    """Gives every error the shape of OpenAI's API."""

    @app.exception_handler(RequestError)
    async def request_error(_: Request, error: RequestError) -> JSONResponse:
        return error_response(error.status, error.message, error.param, error.code)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def server_error(_: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"{type(error).__name__}; the server's log has more")

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        # The first error, without its input, which may be large or not valid text.
        first: dict[str, Any] = error.errors()[0]
        message = str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            return error_response(400, f"{message}: {first['ctx']['error']}")
        if first["type"] == "model_attributes_type":
            return error_response(400, "expected a JSON object, with the header content-type: application/json")
        place = [str(part) for part in first["loc"][1:]]
        return error_response(400, f"{'.'.join(place) or 'body'}: {message}", place[0] if place else None)


def make_app(name: str, embedder: ServedModel | None, reranker: ServedModel | None, limits: Limits) -> FastAPI:
    """Makes the application. It warms the models up before it takes requests.

    Args:
        name: Name of the embedding model in requests.
        embedder: The model of `/v1/embeddings`.
        reranker: The model of `/rerank`.
        limits: Limits of requests.
    """
    models = {path: model for path, model in (("/v1/embeddings", embedder), ("/rerank", reranker)) if model is not None}
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for model in models.values():
            await asyncio.to_thread(model.warm_up)
        captured = sum(model.statistics()["graphs_captured"] for model in models.values())
        print(f"ready, {captured} CUDA graphs captured", flush=True)
        yield

    app = FastAPI(title="embeddings", lifespan=lifespan)
    app.add_middleware(WholeBody, limits=limits)
    add_error_handlers(app)

    @app.post("/v1/embeddings")
    async def embeddings(request: EmbeddingRequest) -> Response:
        return await answer_embeddings(request, name, embedder)

    @app.post("/rerank")
    async def rerank(request: RerankRequest) -> Response:
        return await answer_rerank(request, reranker)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": started, "owned_by": "hf_flashinfer_attn"}
        return {"object": "list", "data": [] if embedder is None else [model]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/statistics")
    async def statistics() -> dict[str, Any]:
        return {path: model.statistics() for path, model in models.items()}

    return app


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path or id of an embedding model: a SentenceTransformer, or with --pooling")
    parser.add_argument("--pooling", choices=["mean", "cls", "last"], help="for a model that is no SentenceTransformer")
    parser.add_argument("--name", help="name of the embedding model in requests; default: --model")
    parser.add_argument("--reranker", help="path or id of a CrossEncoder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", default="flashinfer", help="sdpa, to compare: no unpadding and no graphs")
    parser.add_argument("--max-length", type=int, help="most tokens of a text, or of a query and a text")
    for field in Limits.__dataclass_fields__:
        default = getattr(Limits(), field)
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(default), default=default)
    arguments = parser.parse_args(command_line)
    if arguments.model is None and arguments.reranker is None:
        parser.error("expected --model, --reranker or both")
    limits = Limits(**{field: getattr(arguments, field) for field in Limits.__dataclass_fields__})
    thread = ThreadPoolExecutor(1, "forward")
    loading = Loading(arguments.device, arguments.attention, arguments.max_length, limits, thread)
    try:
        embedder = load_embedder(arguments.model, arguments.pooling, loading) if arguments.model else None
        reranker = load_reranker(arguments.reranker, loading) if arguments.reranker else None
    except ValueError as error:
        parser.error(str(error))
    app = make_app(arguments.name or arguments.model or "", embedder, reranker, limits)
    # The thread that launches kernels should not wait 5 ms each time for the one that reads and writes requests.
    sys.setswitchinterval(5e-4)
    # On SIGTERM or SIGINT, uvicorn takes no new connections, answers the requests under way, and ends.
    uvicorn.run(
        app, host=arguments.host, port=arguments.port, log_level="warning",
        timeout_graceful_shutdown=limits.client_seconds,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
