"""Loads `serve.py` on this machine, with "flashinfer" and with plain sdpa: requests per second, p50 and p99.

    python examples/load_test.py --model PATH --json serving.json
    python examples/load_test.py --shape bge-base --json serving.json  # random weights, nothing to download

Clients send a request, wait for the answer, and send the next. Both servers are up all the time and take turns; the
answers of both to the same texts are compared before anything is timed, and any answer but 200 fails the test.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np

SERVER = Path(__file__).with_name("serve.py")
# Of embeddings of length one, between two ways to compute them in float16; a wrong row is off by about 1.
MAX_DIFFERENCE = 2e-2


@dataclass(frozen=True, slots=True)
class Load:
    """What one process of clients sends.

    Args:
        url: Of the server.
        bodies: JSON of requests, sent in turn.
        clients: That wait for an answer at a time.
        seconds: For how long, after a warm-up that is not counted.
        first: Of the bodies, where to begin.
        warm_up: Seconds before those.
    """

    url: str
    bodies: tuple[bytes, ...]
    clients: int
    seconds: float
    first: int
    warm_up: float


def send(load: Load) -> list[tuple[float, float]]:
    """Runs clients in this process; returns beginning and length of each request, in seconds.

    Raises:
        RuntimeError: If an answer is not 200.
    """
    return asyncio.run(_send(load))


async def _send(load: Load) -> list[tuple[float, float]]:
    taken: list[tuple[float, float]] = []
    turn, end = load.first, time.time() + load.warm_up + load.seconds
    limits = httpx.Limits(max_connections=load.clients, max_keepalive_connections=load.clients)
    async with httpx.AsyncClient(limits=limits, timeout=120, trust_env=False) as client:

        async def one_client() -> None:
            nonlocal turn
            while (start := time.time()) < end:
                body, turn = load.bodies[turn % len(load.bodies)], turn + 1
                clock = time.perf_counter()
                answer = await client.post(
                    f"{load.url}/v1/embeddings", content=body, headers={"content-type": "application/json"}
                )
                if answer.status_code != 200:
                    raise RuntimeError(f"{answer.status_code}: {answer.text[:500]}")
                taken.append((start, time.perf_counter() - clock))

        await asyncio.gather(*(one_client() for _ in range(load.clients)))
    return taken


@contextmanager
def server(arguments: Sequence[str], *, timeout: float = 900) -> Iterator[str]:
    """Starts `serve.py` and waits until it is ready; yields its address, and ends it.

    Raises:
        RuntimeError: If it ends or is not ready in time, or does not end by itself when asked to.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, str(SERVER), "--port", str(port), *arguments])
    try:
        end = time.monotonic() + timeout
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"serve.py {' '.join(arguments)} was not ready; exit status {process.returncode}.")
            try:
                if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield url
        process.terminate()
        if process.wait(60) not in (0, -15):
            raise RuntimeError(f"serve.py ended with {process.returncode}.")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def get(url: str) -> Any:
    return httpx.get(url, timeout=60, trust_env=False).raise_for_status().json()


def request_body(url: str, texts: Sequence[str], encoding: str = "base64") -> dict[str, Any]:
    """Makes a request for embeddings by the server's model."""
    name = get(f"{url}/v1/models")["data"][0]["id"]
    return {"model": name, "input": list(texts), "encoding_format": encoding}


def ask(url: str, texts: Sequence[str]) -> np.ndarray:
    """Returns embeddings of some texts, float32, shape `(texts, hidden_size)`."""
    answer = httpx.post(f"{url}/v1/embeddings", json=request_body(url, texts), timeout=120, trust_env=False)
    rows = answer.raise_for_status().json()["data"]
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows])


def statistics(url: str) -> dict[str, Any]:
    found: dict[str, Any] = get(f"{url}/statistics")["/v1/embeddings"]
    return found


def measure(
    url: str,
    texts: Sequence[str],
    *,
    clients: int,
    texts_per_request: int,
    seconds: float,
    processes: int,
    encoding: str = "base64",
    warm_up: float = 2.0,
) -> dict[str, Any]:
    """Measures one server under one load, with clients in several processes."""
    starts = range(0, len(texts) - texts_per_request + 1, texts_per_request)
    groups = [texts[at : at + texts_per_request] for at in starts]
    body = request_body(url, [], encoding)
    bodies = tuple(json.dumps({**body, "input": group}).encode() for group in groups)
    processes = min(processes, clients)
    loads = [
        Load(
            url,
            bodies,
            clients // processes + (at < clients % processes),
            seconds,
            at * len(bodies) // processes,
            warm_up,
        )
        for at in range(processes)
    ]
    before = statistics(url)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(send, loads))
    after = statistics(url)
    # While all clients of all processes were at work, warmed up.
    start = max(min(begun for begun, _ in one) for one in found) + warm_up
    stop = min(max(begun + length for begun, length in one) for one in found)
    milliseconds = np.array([length * 1e3 for one in found for begun, length in one if start <= begun + length <= stop])
    forwards = after["forwards"] - before["forwards"]
    return {
        "clients": clients, "texts_per_request": texts_per_request, "encoding": encoding,
        "requests": len(milliseconds), "seconds": stop - start,
        "requests_per_second": len(milliseconds) / (stop - start),
        "texts_per_second": len(milliseconds) * texts_per_request / (stop - start),
        "p50_ms": float(np.percentile(milliseconds, 50)), "p99_ms": float(np.percentile(milliseconds, 99)),
        "texts_per_forward": (after["texts"] - before["texts"]) / forwards,
        "graphs_captured_meanwhile": after["graphs_captured"] - before["graphs_captured"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path or name of an encoder")
    parser.add_argument("--shape", help="or a named shape with random weights")
    parser.add_argument("--layers", type=int, help="of that, instead of its own number")
    parser.add_argument("--texts", type=Path, help="one a line; default: random words")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--against", default="sdpa", help="to compare with")
    parser.add_argument("--clients", default="1,16,128", help="how many at a time, in turn")
    parser.add_argument("--texts-per-request", default="1,16")
    parser.add_argument("--encoding", default="base64", choices=["base64", "float"])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--processes", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)), help="of clients")
    parser.add_argument("--server", default="", help="further options of serve.py, for both, such as --pooling")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.shape is None):
        parser.error("expected one of --model and --shape")

    from hf_flashinfer_attn.tools.environment import describe_environment
    from random_model import random_lengths, random_texts, save_random_model

    report: dict[str, Any] = {
        "passed": False, "shape": arguments.shape, "model": arguments.model, "client_processes": arguments.processes,
        "server_options": arguments.server, "environment": describe_environment(),
        "versions": {name: version(name) for name in ("fastapi", "uvicorn", "httpx", "batched", "pydantic")},
        "cells": [],
    }  # fmt: skip
    for optional in ("uvloop", "httptools"):
        try:
            report["versions"][optional] = version(optional)
        except ModuleNotFoundError:
            report["versions"][optional] = None
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        model = arguments.model
        if arguments.shape is not None:
            from hf_flashinfer_attn.tools.bench.workload import shape_config

            model = stack.enter_context(tempfile.TemporaryDirectory())
            save_random_model(Path(model), shape_config(arguments.shape, arguments.layers))
        if arguments.texts is not None:
            texts = [line for line in arguments.texts.read_text().splitlines() if line.strip()]
        else:
            folder = Path(model)
            if arguments.shape is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                from transformers import AutoTokenizer

                AutoTokenizer.from_pretrained(model).save_pretrained(folder)
            # Words that are cut into pieces make for more tokens; no text is above 512.
            texts = list(random_texts(folder, [min(length, 350) for length in random_lengths(2_000)]))
        kinds = ["flashinfer", arguments.against]
        options = ["--model", model, *(["--pooling", "mean"] if arguments.shape else []), *arguments.server.split()]
        urls = {kind: stack.enter_context(server([*options, "--attention", kind])) for kind in kinds}
        sample = texts[:64]
        ours, theirs = (ask(urls[kind], sample) for kind in kinds)
        one_by_one = np.concatenate([ask(urls[kinds[0]], [text]) for text in sample[:16]])
        difference = max(float(np.abs(ours - theirs).max()), float(np.abs(ours[:16] - one_by_one).max()))
        report["max_difference"], report["max_difference_allowed"] = difference, MAX_DIFFERENCE
        # Written so that NaN fails as well.
        agree = difference <= MAX_DIFFERENCE
        for count in map(int, arguments.texts_per_request.split(",")) if agree else ():
            for clients in map(int, arguments.clients.split(",")):
                for kind in kinds:
                    cell = measure(
                        urls[kind], texts, clients=clients, texts_per_request=count, seconds=arguments.seconds,
                        processes=arguments.processes, encoding=arguments.encoding,
                    )  # fmt: skip
                    report["cells"].append({"attention": kind, **cell})
                    print(json.dumps(report["cells"][-1]), flush=True)
        report["server_statistics"] = {kind: statistics(url) for kind, url in urls.items()}
    report["passed"] = agree and all(cell["requests"] > 0 for cell in report["cells"])
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"answers differ by {difference:.1e} at most; {'passed' if report['passed'] else 'FAILED'}")
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
