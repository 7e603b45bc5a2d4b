"""Serves embeddings over HTTP: FastAPI in front, requests that come together in one forward, CUDA graphs behind.

    python examples/serve.py --model PATH --port 8000
    curl -s localhost:8000/embed -H 'content-type: application/json' -d '{"texts": ["a text", "another one"]}'

Why `batched` forms the batches: see README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import uvicorn
from batched.aio import AsyncBatchProcessor
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StringConstraints

import hf_flashinfer_attn
from encoder import Encoder, Rows
from hf_flashinfer_attn.unpadding.graph_options import token_bucket


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server takes, and how it batches.

    Args:
        max_texts: In one request.
        max_characters: In one text; a cheap look before tokenisation.
        max_waiting: Texts that wait for a forward; beyond that, requests are turned away with 503.
        max_body_bytes: Of a request.
        rows_per_batch: Texts in one forward.
        tokens_per_batch: Tokens in one forward, more only if a single text has them.
        wait_ms: How long the first text of a batch waits for others.
        warm_up_tokens: Of a text, on average, up to which graphs are captured before the first request.
    """

    max_texts: int = 64
    max_characters: int = 20_000
    max_waiting: int = 4_096
    max_body_bytes: int = 4_000_000
    rows_per_batch: int = 128
    tokens_per_batch: int = 16_384
    wait_ms: float = 1.0
    warm_up_tokens: int = 128


class EmbedRequest(BaseModel):
    """`encoding="base64"` is for float32, little-endian, and spares both sides the writing and reading of numbers."""

    model_config = {"extra": "forbid"}

    texts: Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1)]
    encoding: Literal["float", "base64"] = "float"


class EmbedResponse(BaseModel):
    embeddings: list[list[float]] | list[str]
    tokens: int


class BodyTooLarge:
    """ASGI middleware: refuses bodies above a size, announced or not, before they are read whole."""

    def __init__(self, app: Any, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        message = f"a body has at most {self._limit} bytes"
        if int(dict(scope["headers"]).get(b"content-length", b"0")) > self._limit:
            return await JSONResponse({"detail": message}, 413)(scope, receive, send)
        read = 0

        async def counted() -> Any:
            nonlocal read
            piece = await receive()
            read += len(piece.get("body", b""))
            if read > self._limit:
                raise HTTPException(413, message)
            return piece

        return await self._app(scope, counted, send)


class Service:
    """The model, and the queue before it.

    Args:
        encoder: That does not cut texts.
        limits: Of what it takes.
    """

    def __init__(self, encoder: Encoder, limits: Limits) -> None:
        self.encoder, self.limits = encoder, limits
        self.forwards = self.embedded = self.waiting = self.largest_batch = 0
        self.ready = False
        # One forward at a time, in a thread of its own. An item's length is its number of tokens.
        self._batches: AsyncBatchProcessor[list[int], np.ndarray] = AsyncBatchProcessor(
            self._forward,
            batch_size=limits.rows_per_batch,
            timeout_ms=limits.wait_ms,
            max_batch_length=limits.tokens_per_batch,
        )

    def _forward(self, texts: list[list[int]]) -> list[np.ndarray]:
        embeddings = self.encoder.embed(Rows.of(texts)).cpu().numpy()
        self.forwards, self.embedded = self.forwards + 1, self.embedded + len(texts)
        self.largest_batch = max(self.largest_batch, len(texts))
        return list(embeddings)

    def warm_up(self) -> int:
        """Captures CUDA graphs of the sizes that batches will mostly have; returns how many there are.

        Others are captured when they first come.
        """
        limits, shapes = self.limits, []
        rows = 8
        while rows <= max(limits.rows_per_batch, 8):
            size = token_bucket(rows * 4)
            while size <= min(rows * limits.warm_up_tokens, limits.tokens_per_batch):
                shapes.append((rows, size))
                size = token_bucket(size + 1)
            rows *= 2
        return self.encoder.capture(shapes)

    async def embed(self, request: EmbedRequest) -> Response:
        """Answers a request, with the JSON of an `EmbedResponse`.

        Raises:
            HTTPException: 422 if it is above a limit, 503 if too much is waiting.
        """
        limits, encoder = self.limits, self.encoder
        if len(request.texts) > limits.max_texts:
            raise HTTPException(422, f"{len(request.texts)} texts; expected at most {limits.max_texts} in one request")
        for at, text in enumerate(request.texts):
            if len(text) > limits.max_characters:
                raise HTTPException(
                    422, f"text {at} has {len(text)} characters; expected at most {limits.max_characters}"
                )
        if self.waiting + len(request.texts) > limits.max_waiting:
            raise HTTPException(503, f"{self.waiting} texts are waiting; try again", headers={"Retry-After": "1"})
        self.waiting += len(request.texts)
        try:
            tokens = await asyncio.to_thread(encoder.tokenise, request.texts)
            for at, ids in enumerate(tokens):
                if not 1 <= len(ids) <= encoder.max_length:
                    raise HTTPException(
                        422, f"text {at} has {len(ids)} tokens; expected 1 to {encoder.max_length}: send it in pieces"
                    )
            embeddings = await self._batches(tokens)
        finally:
            self.waiting -= len(request.texts)
        if request.encoding == "base64":
            found: Any = [base64.b64encode(one.astype("<f4").tobytes()).decode() for one in embeddings]
        else:
            found = [one.tolist() for one in embeddings]
        answer = EmbedResponse.model_construct(embeddings=found, tokens=sum(map(len, tokens)))
        # As it is: FastAPI would check each number once more.
        return Response(answer.model_dump_json(), media_type="application/json")

    def statistics(self) -> dict[str, Any]:
        """What was done so far, for `/statistics` and the load test."""
        graphs = hf_flashinfer_attn.graph_statistics(self.encoder.model)
        return {
            "forwards": self.forwards, "embedded": self.embedded, "waiting": self.waiting,
            "largest_batch": self.largest_batch, "graphs_captured": graphs.captured, "graphs_replayed": graphs.replayed,
            "device": str(self.encoder.device), "max_length": self.encoder.max_length,
            "hidden_size": self.encoder.hidden_size,
        }  # fmt: skip


def make_app(service: Service) -> FastAPI:
    """Makes the application; the model is warmed up before the first request is taken."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        captured = await asyncio.to_thread(service.warm_up)
        print(f"ready, {captured} CUDA graphs captured", flush=True)
        service.ready = True
        yield
        # uvicorn has answered what was under way by now.
        service.ready = False

    app = FastAPI(title="embeddings", lifespan=lifespan)
    app.add_middleware(BodyTooLarge, limit=service.limits.max_body_bytes)

    @app.exception_handler(RequestValidationError)
    async def name_fault(_: Request, error: RequestValidationError) -> JSONResponse:
        # Without the input, which may be large, or no valid text at all.
        return JSONResponse({"detail": [{"loc": one["loc"], "msg": one["msg"]} for one in error.errors()]}, 422)

    @app.post("/embed", response_model=EmbedResponse)
    async def embed(request: EmbedRequest) -> Response:
        return await service.embed(request)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not service.ready:
            raise HTTPException(503, "not ready")
        return {"status": "ok"}

    @app.get("/statistics")
    async def statistics() -> dict[str, Any]:
        return service.statistics()

    return app


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="path or name of an encoder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", default="flashinfer", help="sdpa, to compare: no unpadding and no graphs")
    parser.add_argument("--pooling", default="mean", choices=["mean", "cls"])
    parser.add_argument("--max-length", type=int, help="longer texts are refused, in tokens")
    for name, default in ((name, getattr(Limits(), name)) for name in Limits.__dataclass_fields__):
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = parser.parse_args(command_line)
    # The thread that launches kernels should not wait 5 ms each time for the one that reads and writes requests.
    sys.setswitchinterval(5e-4)
    limits = Limits(**{name: getattr(arguments, name) for name in Limits.__dataclass_fields__})
    encoder = Encoder(
        arguments.model, torch.device(arguments.device), pooling=arguments.pooling, max_length=arguments.max_length,
        truncate=False, attention=arguments.attention,
    )  # fmt: skip
    # On SIGTERM or SIGINT: no new connections, an answer to what is under way, then an end.
    uvicorn.run(
        make_app(Service(encoder, limits)), host=arguments.host, port=arguments.port, log_level="warning",
        timeout_graceful_shutdown=30,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
