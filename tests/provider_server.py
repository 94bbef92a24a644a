"""A local HTTP server that speaks as OpenAI, NVIDIA, Voyage or Ollama do, and fails as told."""

from __future__ import annotations

import base64
import hashlib
import json
import select
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from processes import answering

Fault = Literal[
    "429", "503", "500", "529", "quota", "payment", "expired key", "forbidden", "unknown model", "too long",
    "too large", "bad request", "echoed key", "redirect", "slow", "dribbling", "cut", "lost", "cut without length",
    "garbage", "huge", "short of one", "one too many", "out of order", "twice the same", "NaN", "null", "infinite",
    "dimension", "zero", "length", "other model", "base64", "uncounted", "late",
]  # fmt: skip
KEY = {"openai": "sk-proj-T3BlbkFJ0123456789", "nvidia": "nvapi-0123456789abcdef", "voyage": "pa-0123456789abcdef"}
FIELDS = {
    "openai": {"input", "model", "encoding_format", "dimensions"},
    "nvidia": {"input", "model", "encoding_format", "dimensions", "input_type", "truncate"},
    "voyage": {
        "input", "model", "encoding_format", "input_type", "truncation", "output_dimension", "output_dtype",
    },
    "ollama": {"input", "model", "truncate", "dimensions"},
}  # fmt: skip
OLLAMA = ("all-minilm", "bge-m3", "nomic-embed-text", "of-eight-numbers")
PATHS = {"openai": "/v1/embeddings", "nvidia": "/v1/embeddings", "voyage": "/v1/embeddings", "ollama": "/api/embed"}


class Seen(NamedTuple):
    """A request that came."""

    path: str
    headers: dict[str, str]
    """Names in lower case."""
    raw: bytes
    body: dict[str, Any]
    fault: Fault | None
    at: float
    """On the monotonic clock."""


class Told(NamedTuple):
    """A fault to come."""

    fault: Fault
    headers: dict[str, str]


class ProviderServer:
    """One provider. ``faults`` are met by the next requests, one each; then all is well."""

    def __init__(self, provider: str, url: str, dimension: int) -> None:
        self.provider, self.dimension = provider, dimension
        self.url = url + PATHS[provider].rpartition("/embed")[0].removesuffix("/api")
        self.seen: list[Seen] = []
        self.paid = 0
        """Tokens of the answers of status 200."""
        self.digests = {f"{name}:latest": hashlib.sha256(name.encode()).hexdigest() for name in OLLAMA}
        """Of the models that Ollama has, by their full names."""
        self.most_at_once = 0
        self.answers_as: str | None = None
        """The model that it says it is; None: the one that was asked for, "": it does not say."""
        self.hung_up = 0
        """Clients that went away while this stayed silent."""
        self.seconds = 0.0
        """Of each good answer."""
        self.room: int | None = None
        """So many requests at once are served; a further one is answered 429."""
        self.max_texts, self.max_text_tokens, self.max_tokens = 2_048, 8_191, 300_000
        self.ended = threading.Event()
        self._told: list[Told] = []
        self._always: Told | None = None
        self._running = 0
        self._lock = threading.Lock()

    def fault(self, *faults: Fault, times: int = 1, **headers: str) -> None:
        """Let the next requests meet these faults in turn, ``times`` over, with headers (``retry_after="1"``)."""
        for _ in range(times):
            self._told += [Told(fault, _names(headers)) for fault in faults]

    def always(self, fault: Fault, **headers: str) -> None:
        """Let every request that meets no other fault meet this one."""
        self._always = Told(fault, _names(headers))

    def vector(self, text: str, dimension: int | None = None) -> NDArray[np.float32]:
        """The unit vector that a text has here."""
        drawn = hashlib.shake_128(text.encode()).digest(2 * (dimension or self.dimension))
        made = np.frombuffer(drawn, dtype=np.int16).astype(np.float32) + np.float32(0.5)  # never all zeros
        return made / np.float32(np.linalg.norm(made))

    @staticmethod
    def tokens(text: str) -> int:
        """How many tokens this server says that a text has."""
        return len(text.split()) + 2

    def faults_met(self) -> Counter[str]:
        """How often each fault was met."""
        return Counter(seen.fault for seen in self.seen if seen.fault)

    # --- what the handler calls -------------------------------------------------------------------

    @contextmanager
    def arrived(self, path: str, headers: dict[str, str], raw: bytes) -> Iterator[tuple[Seen, Told | None]]:
        """Note a request for as long as it is served."""
        with self._lock:
            told = self._told.pop(0) if self._told else self._always
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
            if told is None and self.room is not None and self._running > self.room:
                told = Told("429", {})
            seen = Seen(path, headers, raw, json.loads(raw), told.fault if told else None, time.monotonic())
            self.seen.append(seen)
        try:
            yield seen, told
        finally:
            with self._lock:
                self._running -= 1

    def wrong(self, seen: Seen) -> tuple[int, Any] | None:
        """What the provider finds wrong with a request, as it says it."""
        body, texts = seen.body, seen.body.get("input")
        if seen.path != PATHS[self.provider] or not isinstance(texts, list) or set(body) - FIELDS[self.provider]:
            return self._error(400, f"Unrecognized request: {sorted(set(body) - FIELDS[self.provider])}")
        key = KEY.get(self.provider)
        if key and seen.headers.get("authorization") != f"Bearer {key}":
            return self.failure("expired key")
        if self.provider != "ollama" and any(not text.strip() for text in texts):
            return self._error(400, "'$.input' is invalid")
        tokens = [self.tokens(text) for text in texts]
        cuts = body.get("truncate") in (True, "END") or body.get("truncation") is True
        if max(tokens, default=0) > self.max_text_tokens and not cuts:
            return self.failure("too long")
        if len(texts) > self.max_texts or sum(min(count, self.max_text_tokens) for count in tokens) > self.max_tokens:
            return self.failure("too large")
        return None

    def failure(self, fault: Fault) -> tuple[int, Any]:
        """Status and body of an error, in the provider's own words."""
        key = KEY.get(self.provider, "")
        shown = f"{key[:5]}***{key[-4:]}"
        said = {
            "429": (429, "Rate limit reached for requests per min (RPM): Limit 500, Used 500", "rate_limit_exceeded"),
            "503": (503, "server busy, please try again.  maximum pending requests exceeded", "overloaded"),
            "529": (529, "overloaded", "overloaded"),
            "500": (500, "The server had an error while processing your request. Sorry about that!", "server_error"),
            "quota": (429, "You exceeded your current quota, please check your plan.", "insufficient_quota"),
            "payment": (402, "Cloud credits expired - Please contact NVIDIA representatives", "payment_required"),
            "expired key": (
                401,
                f"Incorrect API key provided: {shown}. See your account.",
                "invalid_api_key",
            ),
            "echoed key": (401, f"The key Bearer {key} has expired.", "invalid_api_key"),
            "forbidden": (403, "Country, region, or territory not supported", "unsupported_country"),
            "unknown model": (404, 'model "it" not found, try pulling it first', "model_not_found"),
            "bad request": (400, "Invalid value for a parameter", "invalid_request_error"),
        }
        if fault == "too long":
            return {
                "openai": self._error(400, "This model's maximum context length is 8192 tokens."),
                "nvidia": (400, {"error": "Input length 1728 exceeds maximum allowed token size 512"}),
                "voyage": self._error(400, "Request failed. The example at index 0 has more tokens than the maximum "
                                           "context length of 32000."),
                "ollama": self._error(400, "the input length exceeds the context length"),
            }[self.provider]  # fmt: skip
        if fault == "too large":
            return {
                "openai": self._error(
                    400, "Requested 416735 tokens, max 300000 tokens per request", "max_tokens_per_request"
                ),
                "nvidia": (413, {"status": 413, "title": "Payload Too Large"}),
                "voyage": self._error(400, "The max allowed tokens per submitted batch is 120000. Your batch has "
                                           "121138 tokens after truncation."),
                "ollama": (413, {"error": "http: request body too large"}),
            }[self.provider]  # fmt: skip
        status, message, code = said[fault]
        return self._error(status, message, code)

    def _error(self, status: int, message: str, code: str = "invalid_request_error") -> tuple[int, Any]:
        if self.provider == "openai":
            return status, {"error": {"message": message, "type": code, "param": None, "code": code}}
        if self.provider == "nvidia":
            return status, {"status": status, "title": code, "detail": message}
        return status, {"detail": message} if self.provider == "voyage" else {"error": message}

    def answer(self, seen: Seen, fault: Fault | None) -> bytes:
        """A good answer, or one with a fault in it."""
        texts = seen.body["input"]
        asked = seen.body.get("dimensions") or seen.body.get("output_dimension") or self.dimension
        rows = [self.vector(text, asked).astype(np.float64) for text in texts]
        if self.provider == "nvidia":  # which does not promise unit vectors
            rows = [row * 7 for row in rows]
        if fault in ("NaN", "null", "infinite"):
            rows[len(rows) // 2][1] = np.inf if fault == "infinite" else np.nan
        elif fault == "dimension":
            rows = [row[:-1] for row in rows]
        elif fault == "zero":
            rows[0] = rows[0] * 0
        elif fault == "length":
            rows[-1] = rows[-1] * 40
        elif fault == "short of one":
            rows = rows[:-1]
        elif fault == "one too many":
            rows = [*rows, rows[0]]
        counted = sum(map(self.tokens, texts))
        self.paid += counted
        model = seen.body["model"] if self.answers_as is None else self.answers_as or None
        model = "another-model" if fault == "other model" else model
        if self.provider == "ollama":
            made: dict[str, Any] = {
                "model": model,
                "embeddings": [row.tolist() for row in rows],
                "total_duration": 14143917,
            }
            if fault != "uncounted":
                made["prompt_eval_count"] = counted
        else:
            as_text = seen.body.get("encoding_format") == "base64"
            data = [
                {
                    "object": "embedding",
                    "index": place,
                    "embedding": base64.b64encode(row.astype("<f4").tobytes()).decode() if as_text else row.tolist(),
                }
                for place, row in enumerate(rows)
            ]
            if fault == "base64":
                data[0]["embedding"] = "&" + str(data[0]["embedding"])[1:] if as_text else "&&&"
            if fault == "out of order":
                data.reverse()
            if fault == "twice the same":
                data[-1]["index"] = 0
            made = {"object": "list", "data": data, "model": model}
            if fault != "uncounted":
                made["usage"] = {"prompt_tokens": counted, "total_tokens": counted}
        text = json.dumps(made)
        if fault == "null":
            text = text.replace("NaN", "null")
        return text.encode()


def _names(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@contextmanager
def provider_server(provider: str, dimension: int = 8, tls: ssl.SSLContext | None = None) -> Iterator[ProviderServer]:
    """A server of one provider on a free port, whose vectors have this dimension unless a request asks for another."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            models = [
                {"name": name, "model": name, "size": 45_960_996, "digest": digest, "details": {"format": "gguf"}}
                for name, digest in known.digests.items()
            ]
            status = 200 if (known.provider, self.path) == ("ollama", "/api/tags") else 404
            self._send(status, {}, json.dumps({"models": models}).encode())

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with known.arrived(self.path, headers, raw) as (seen, told):
                fault = told.fault if told else None
                wrong = known.wrong(seen)
                if fault == "lost":
                    self.close_connection = True
                elif fault == "slow":
                    self._stay_silent()
                elif fault == "redirect":
                    self._send(307, {"Location": "http://127.0.0.1:1/elsewhere", **told.headers}, b"")
                elif fault == "garbage":
                    self._send(200, {}, b"<html><body>It works!</body></html>")
                elif fault == "huge":
                    self._send(200, {}, b'{"data": [' + b" " * (64 << 20))
                elif wrong is not None:
                    self._send(wrong[0], {}, json.dumps(wrong[1]).encode())
                elif fault in _ANSWERED:
                    known.ended.wait(known.seconds + (0.15 if fault == "late" else 0))
                    self._answer(known.answer(seen, fault), fault)
                else:
                    status, body = known.failure(fault)
                    self._send(status, told.headers, json.dumps(body).encode())

        def _stay_silent(self) -> None:
            """Until the client hangs up, or the test is over."""
            self.close_connection = True
            while not known.ended.wait(0.01):
                if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                    known.hung_up += 1
                    return

        def _answer(self, body: bytes, fault: Fault | None) -> None:
            if fault == "cut":
                self._send(200, {"Content-Length": str(len(body))}, body[: len(body) // 2])
                self.close_connection = True
            elif fault == "cut without length":
                self._send(200, {"Connection": "close", "Content-Length": ""}, body[: len(body) // 2])
                self.close_connection = True
            elif fault == "dribbling":
                self._send(200, {"Content-Length": str(len(body))}, b"")
                for at in range(len(body)):
                    if known.ended.wait(0.02):
                        break
                    self.wfile.write(body[at : at + 1])
            else:
                self._send(200, {}, body)

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    with answering(Handler, tls) as url:
        known = ProviderServer(provider, url.replace("127.0.0.1", "localhost") if tls else url, dimension)
        try:
            yield known
        finally:
            known.ended.set()


_ANSWERED = (
    None, "dribbling", "cut", "cut without length", "short of one", "one too many", "out of order", "twice the same",
    "NaN", "null", "infinite", "dimension", "zero", "length", "other model", "base64", "uncounted", "late",
)  # fmt: skip
