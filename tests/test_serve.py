"""`examples/serve.py` in a process of its own, with the client of OpenAI and with requests that it must refuse."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import load_test
import numpy as np
import openai
import psutil
import pytest
import serve
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from test_examples import TOLERANCE, environment, tiny_config
from transformers import AutoTokenizer, BertForSequenceClassification

from random_model import save_random_model

PROMPT = "a b "
EAGER = {"attn_implementation": "eager"}
LIMITS = {
    "max-texts": 40, "max-characters": 600, "max-body-bytes": 40_000, "max-waiting": 40, "client-seconds": 5,
    "wait-ms": 300, "rows-per-batch": 16,
}  # fmt: skip


class Models(NamedTuple):
    """A folder of models, and random texts."""

    folder: Path
    texts: list[str]

    def vectors(self, texts: list[str], prompt: str | None = "") -> np.ndarray:
        model = SentenceTransformer(str(self.folder / "sentence_transformer"), device="cpu", model_kwargs=EAGER)
        return model.encode(texts, prompt=prompt, normalize_embeddings=True)

    def scores(self, query: str, texts: list[str], **arguments: Any) -> np.ndarray:
        model = CrossEncoder(str(self.folder / "reranker"), device="cpu", model_kwargs=EAGER)
        return model.predict([(query, text) for text in texts], **arguments)

    def count_tokens(self, texts: list[str]) -> int:
        return sum(map(len, AutoTokenizer.from_pretrained(self.folder / "encoder")(texts)["input_ids"]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder, config = tmp_path_factory.mktemp("models"), tiny_config()
    save_random_model(folder / "encoder", config)
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    modules = [Transformer(str(folder / "encoder")), Pooling(config.hidden_size, "mean")]
    prompts = {"prompts": {"document": PROMPT}, "default_prompt_name": "document"}
    SentenceTransformer(modules=modules, device="cpu", **prompts).save(str(folder / "sentence_transformer"))
    for name, labels in (("reranker", 1), ("classifier", 3)):
        config.num_labels = labels
        BertForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    seed = torch.seed() % 2**31
    print(f"texts of seed {seed}")
    generator = np.random.default_rng(seed)
    words = np.array([word for word in tokenizer.get_vocab() if len(word) > 2 and word.isalpha()], dtype=object)
    return Models(folder, [" ".join(generator.choice(words, length)) for length in generator.integers(1, 25, 40)])


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
            patch.setenv(name, environment()[name])
        yield


def start(*arguments: object, **limits: object) -> AbstractContextManager[str]:
    options = [*arguments, "--device", "cpu", "--name", "tiny"]
    options += [f"--{name}={value}" for name, value in {**LIMITS, **limits}.items()]
    return load_test.server(list(map(str, options)), timeout=120)


@pytest.fixture(scope="module")
def server(models: Models) -> Iterator[str]:
    """A server of an encoder with `--pooling`, and of a reranker."""
    paths = models.folder / "encoder", models.folder / "reranker"
    with start("--model", paths[0], "--pooling", "mean", "--reranker", paths[1]) as url:
        yield url


def connect(url: str, *, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=retries, timeout=60)


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with connect(server) as found:
        yield found


def embed(client: openai.OpenAI, texts: str | list[str], **arguments: Any) -> np.ndarray:
    answer = client.embeddings.create(model="tiny", input=texts, **arguments)
    assert [row.index for row in answer.data] == list(range(len(answer.data)))
    return np.array([row.embedding for row in answer.data])


# By default, the client asks for base64.
@pytest.mark.parametrize("given", [{}, {"encoding_format": "float"}, {"encoding_format": "float", "user": "someone"}])
def test_openai_client_gets_the_vectors_of_the_model(models: Models, client: openai.OpenAI, given: Any) -> None:
    np.testing.assert_allclose(embed(client, models.texts, **given), models.vectors(models.texts), atol=TOLERANCE)


def test_usage_counts_tokens(models: Models, client: openai.OpenAI) -> None:
    tokens = models.count_tokens(models.texts)
    answer = client.embeddings.create(model="tiny", input=models.texts)
    assert (answer.object, answer.model) == ("list", "tiny")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)


def test_fewer_dimensions_have_length_one(models: Models, client: openai.OpenAI) -> None:
    expected = models.vectors(models.texts[:1])[:, :7]
    expected /= np.linalg.norm(expected)
    for encoding in ({}, {"encoding_format": "float"}):
        np.testing.assert_allclose(embed(client, models.texts[0], dimensions=7, **encoding), expected, atol=TOLERANCE)


def test_openai_client_lists_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_requests_share_forwards(models: Models, server: str, client: openai.OpenAI) -> None:
    before = load_test.statistics(server)
    with ThreadPoolExecutor(len(models.texts)) as threads:
        answers = list(threads.map(lambda text: embed(client, text)[0], models.texts))
    np.testing.assert_allclose(np.stack(answers), models.vectors(models.texts), atol=TOLERANCE)
    after = load_test.statistics(server)
    assert after["texts"] - before["texts"] == len(models.texts)
    assert after["forwards"] - before["forwards"] < len(models.texts) / 4
    assert 1 < after["largest_batch"] <= LIMITS["rows-per-batch"]


def test_load_test_measures(models: Models, server: str) -> None:
    measured = load_test.measure(
        server, models.texts, clients=6, texts_per_request=2, seconds=1.5, processes=2, warm_up=0.5
    )
    assert measured["requests"] > 6
    assert 0 < measured["p50_ms"] <= measured["p99_ms"]
    assert measured["texts_per_forward"] > 2


def rerank(url: str, query: str, texts: list[str], **arguments: Any) -> httpx.Response:
    body = {"query": query, "texts": texts, **arguments}
    return httpx.post(f"{url}/rerank", json=body, timeout=60, trust_env=False)


@pytest.mark.parametrize("raw", [False, True])
def test_rerank_sorts_by_the_scores_of_the_model(models: Models, server: str, raw: bool) -> None:
    query, *texts = models.texts[:20]
    expected = models.scores(query, texts, activation_fn=torch.nn.Identity() if raw else torch.nn.Sigmoid())
    ranks = rerank(server, query, texts, raw_scores=raw, return_text=True).json()
    assert sorted(rank["index"] for rank in ranks) == list(range(len(texts)))
    assert ranks == sorted(ranks, key=lambda rank: -rank["score"])
    assert all(rank["text"] == texts[rank["index"]] for rank in ranks)
    for rank in ranks:
        assert rank["score"] == pytest.approx(expected[rank["index"]], abs=1e-5)


def test_rerank_truncates_only_if_asked_to(models: Models, server: str) -> None:
    query, text = models.texts[0], " ".join(models.texts)[:500]
    refused = rerank(server, query, ["a", text])
    assert refused.status_code == 400
    assert "text 1 has" in refused.json()["error"]["message"]
    (rank,) = rerank(server, query, [text], truncate=True).json()
    assert rank == {"index": 0, "score": pytest.approx(models.scores(query, [text])[0], abs=1e-5)}


BAD = openai.BadRequestError


@pytest.mark.parametrize(
    ("arguments", "error", "param", "message"),
    [
        ({"input": []}, BAD, "input", "at least 1 item"),
        ({"input": ""}, BAD, "input", "input.0: .* at least 1 character"),
        ({"input": ["a", ""]}, BAD, "input", "input.1: .* at least 1 character"),
        ({"input": ["a"] * 41}, BAD, "input", "41 texts; expected at most 40"),
        ({"input": ["a", "b" * 601]}, BAD, "input", "text 1 has 601 characters; .* at most 600"),
        ({"input": "a " * 70}, BAD, "input", "text 0 has 72 tokens; expected 1 to 64"),
        ({"input": [1, 2]}, BAD, "input", "token ids are not supported"),
        ({"input": [[1], [2]]}, BAD, "input", "token ids are not supported"),
        ({"input": "a", "dimensions": 49}, BAD, "dimensions", "49; expected at most 48"),
        ({"input": "a", "dimensions": 0}, BAD, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "encoding_format": "hex"}, BAD, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "extra_body": {"task": "query"}}, BAD, "task", "not permitted"),
        ({"input": "a", "model": "other"}, openai.NotFoundError, "model", "'other'; expected 'tiny'"),
        ({"input": "a" * 50_000}, openai.APIStatusError, None, "bytes or more; expected at most 40000"),
    ],
)
def test_openai_client_raises_its_own_errors(client: openai.OpenAI, arguments, error, param, message) -> None:
    with pytest.raises(error, match=message) as caught:
        client.embeddings.create(**{"model": "tiny", **arguments})
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", param)


def test_too_many_tokens_have_openais_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        embed(client, "a " * 70)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/rerank"])
@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b'{"model": "tiny", "input": "a"', 400, "JSON decode error: Expecting"),
        (b"", 400, "Field required"),
        (b"[1]", 400, "JSON object"),
        (b'{"query": "\xff"}', 400, "not UTF-8: .* position 11"),
        (b'{"input": "\\ud800", "query": "\\ud800"}', 400, "unicode"),
        (b"[" * 30_000, 400, "body"),
        (b'{"query": "a", "texts": [1], "input": [null], "model": "tiny"}', 400, "valid string"),
        (b" " * 40_001, 413, "40001 bytes or more; expected at most 40000"),
        # In pieces.
        ([b" " * 1_000] * 60, 413, "expected at most 40000"),
    ],
)
def test_bodies_that_cannot_be_read_are_named(server: str, path: str, content, status: int, message: str) -> None:
    body, headers = content if isinstance(content, bytes) else iter(content), {"content-type": "application/json"}
    answer = httpx.post(server + path, content=body, timeout=60, trust_env=False, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error


def test_errors_of_routes_have_the_same_shape(server: str) -> None:
    with httpx.Client(base_url=server, timeout=60, trust_env=False) as http:
        answers = [http.get("/v1/engines"), http.get("/rerank"), http.post("/rerank", content=b'{"query": "a"}')]
    assert [answer.status_code for answer in answers] == [404, 405, 400]
    assert all(answer.json()["error"]["type"] == "invalid_request_error" for answer in answers)
    # Without the header, a body is not read as JSON.
    assert "content-type: application/json" in answers[2].json()["error"]["message"]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_turns_requests_away(models: Models, server: str, client: openai.OpenAI) -> None:
    refused: list[openai.InternalServerError] = []

    def fill_queue() -> None:
        end = time.monotonic() + 60
        while not refused and time.monotonic() < end:
            try:
                embed(client, models.texts)
            except openai.InternalServerError as error:
                refused.append(error)

    with ThreadPoolExecutor(3) as threads:
        for filling in [threads.submit(fill_queue) for _ in range(3)]:
            filling.result()
        assert {error.status_code for error in refused} == {503}
        assert "40 texts are waiting; expected at most 40" in str(refused[0])
        assert refused[0].response.headers["retry-after"] == "1"
        # The client waits as long as it was told to, and tries again.
        with connect(server, retries=30) as patient:
            answers = list(threads.map(lambda _: embed(patient, models.texts), range(3)))
    for answer in answers:
        np.testing.assert_allclose(answer, models.vectors(models.texts), atol=TOLERANCE)
    assert load_test.statistics(server)["waiting"] == 0


def begin_request(url: str, body: bytes) -> socket.socket:
    """Connects and sends all of a request but its body."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    # Before it connects, or the size has no effect.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    connection.settimeout(60)
    connection.connect((host, int(port)))
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def test_clients_that_send_slowly_do_not_hold_up_others(models: Models, server: str, client: openai.OpenAI) -> None:
    body = json.dumps({"model": "tiny", "input": "a"}).encode()
    with ExitStack() as stack:
        slow = [stack.enter_context(begin_request(server, body)) for _ in range(50)]
        for at in range(5):
            for connection in slow:
                connection.sendall(body[at : at + 1])
        assert len(embed(client, models.texts)) == len(models.texts)
        # One of them comes to an end in time.
        for at in range(5, len(body)):
            slow[0].sendall(body[at : at + 1])
        assert slow[0].recv(12) == b"HTTP/1.1 200"
        slow[1].setblocking(False)
        with pytest.raises(BlockingIOError):
            slow[1].recv(1)
        slow[1].settimeout(60)
        for connection in slow[1:]:
            answer = read_to_end(connection)
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"no whole body within 5 seconds" in answer


def test_sigterm_answers_what_is_under_way(models: Models) -> None:
    limits = {"max-texts": 10_000, "max-waiting": 20_000, "max-body-bytes": 100_000, "rows-per-batch": 1_024}
    own = {"max-length": 32, "wait-ms": 1_000, "client-seconds": 3}
    texts = models.texts[:3]
    expected = models.vectors(texts, prompt=None)
    path = models.folder / "sentence_transformer"
    with start("--model", path, **limits, **own) as url, connect(url) as client:
        (process,) = [child for child in psutil.Process().children() if url.rpartition(":")[2] in child.cmdline()]
        answer = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
        np.testing.assert_allclose([row.embedding for row in answer.data], expected, atol=TOLERANCE)
        assert answer.usage.total_tokens == models.count_tokens([PROMPT + text for text in texts])
        with pytest.raises(openai.BadRequestError, match="text 0 has 42 tokens; expected 1 to 32"):
            embed(client, "a " * 38)
        refused = rerank(url, "a", ["b"])
        assert refused.status_code == 404
        assert "start the server with --reranker" in refused.json()["error"]["message"]

        # A client that never reads its answer, which is larger than what sockets take.
        body = json.dumps({"model": "tiny", "input": ["a"] * 10_000}).encode()
        with begin_request(url, body) as deaf:
            deaf.sendall(body)
            wait_for(lambda: load_test.statistics(url)["texts"] >= 10_000 + len(texts))
            np.testing.assert_allclose(embed(client, texts), expected, atol=TOLERANCE)
            with ThreadPoolExecutor(1) as threads:
                # The wait for other texts began with the last answer.
                last = threads.submit(embed, client, texts)
                wait_for(lambda: load_test.statistics(url)["waiting"] == len(texts))
                process.terminate()
                np.testing.assert_allclose(last.result(60), expected, atol=TOLERANCE)
            wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)
            head, _, data = read_to_end(deaf).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert 0 < len(data) < 9_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --model, --reranker or both"),
        (["--model", "encoder"], "is no SentenceTransformer; expected --pooling mean, cls or last"),
        (["--model", "sentence_transformer", "--pooling", "cls"], "--pooling cls for .* with its own; expected none"),
        (["--reranker", "classifier"], "has 3 labels; expected a reranker, which has one"),
        (["--model", "encoder", "--pooling", "cls", "--max-length=2000000"], "expected --max-length, such as 512"),
    ],
)
def test_wrong_options_are_errors(models: Models, capsys, monkeypatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(models.folder)
    with pytest.raises(SystemExit, match="2"):
        serve.main([*arguments, "--device", "cpu"])
    assert re.search(message, capsys.readouterr().err)
