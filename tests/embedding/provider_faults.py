"""Every provider against every fault: how it ends, how often it asks, what it costs, and that nothing else happens.

``scripts/faults providers`` prints the table; the tests run each row once.
"""

from __future__ import annotations

import argparse
import logging
import random
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from provider_server import KEY, Fault, ProviderServer, provider_server

from common.embedding.choice import Choice, Engines
from common.embedding.port import Embedded
from common.embedding.providers import Patience, open_provider
from common.errors import ExportError

PROVIDERS = ("openai", "nvidia", "voyage", "ollama")
MODEL = {
    # A model of NVIDIA's that is not in the catalog may have vectors as short as a test likes.
    "openai": ("text-embedding-3-small", 8),
    "nvidia": ("nvidia/of-eight-numbers", 8),
    "voyage": ("voyage-3.5-lite", 256),
    "ollama": ("of-eight-numbers", 8),
}
TEXTS = {"openai": 2_100, "nvidia": 550, "voyage": 1_100, "ollama": 150}
"""Two or three requests each."""
PATIENCE = Patience(tries=8, first_wait=0.004)
QUICK = 0.25
"""Seconds of a request where one is to run out."""
FAILED, REJECTED, DONE = "EMBEDDING_FAILED", "PROVIDER_REJECTED", "done"


class Row(NamedTuple):
    """A line of the table."""

    name: str
    faults: tuple[Fault, ...] = ()
    """Met in turn by the first requests, one that is drawn by chance of them where there are two or more batches."""
    always: Fault | None = None
    ends: str = DONE
    headers: dict[str, str] = {}  # noqa: RUF012  of a tuple: nothing writes to it
    most_tries: int = 2
    """Of any one text."""
    most_cost: float = 2.0
    """Tokens paid for, as a multiple of those of a run without a fault."""
    seconds: float = 30.0
    but: dict[str, str] = {}  # noqa: RUF012
    """Providers for which it ends in another way."""
    only: tuple[str, ...] = PROVIDERS
    drawn: int = 0
    """So many more faults that another try gets over, drawn by chance."""


GOT_OVER: tuple[Fault, ...] = (
    "429",
    "503",
    "529",
    "500",
    "slow",
    "dribbling",
    "lost",
    "cut",
    "garbage",
    "out of order",
)
REFUSED = "connection refused"
LONGEST_STORM = 6
_STORM: tuple[Fault, ...] = ("429",) * LONGEST_STORM
_COUNTED = ("openai", "nvidia", "voyage")
ROWS = (
    Row("none", most_tries=1, most_cost=1),
    Row("429 storm, no Retry-After", _STORM, most_tries=7, most_cost=1),
    Row("429 storm, Retry-After", _STORM, headers={"retry_after": "0.01"}, most_tries=7, most_cost=1),
    Row("429 storm, retry-after-ms", _STORM, headers={"retry_after_ms": "10"}, most_tries=7, most_cost=1),
    Row("429 for good", always="429", ends=FAILED, most_tries=8, most_cost=0),
    Row("429 and 500 by turns", ("429", "500") * 3, most_tries=7, most_cost=1),
    Row("503", ("503",), most_cost=1),
    Row("529", ("529",), most_cost=1),
    Row("500", ("500",), most_cost=1),
    Row("500 for good", always="500", ends=FAILED, most_tries=8, most_cost=0),
    Row("quota spent", always="quota", ends=REJECTED, most_tries=1, most_cost=0, only=("openai",)),
    Row("payment required", always="payment", ends=REJECTED, most_tries=1, most_cost=0, only=_COUNTED),
    Row("expired key", always="expired key", ends=REJECTED, most_tries=1, most_cost=0),
    Row("expired key, repeated by the API", always="echoed key", ends=REJECTED, most_tries=1, most_cost=0),
    Row("forbidden", always="forbidden", ends=REJECTED, most_tries=1, most_cost=0),
    Row("unknown model", always="unknown model", ends=REJECTED, most_tries=1, most_cost=0),
    Row("bad request", always="bad request", ends=REJECTED, most_tries=1, most_cost=0),
    Row("redirect", always="redirect", ends=REJECTED, most_tries=1, most_cost=0),
    Row("too many tokens in a request", ("too large", "too large"), most_tries=3, most_cost=1),
    Row("text too long, found by the API", ("too long",), most_tries=2, most_cost=1),
    # Halves down to one text, which is cut five times.
    Row("too long for good", always="too long", ends=REJECTED, most_tries=17, most_cost=0),
    Row("no answer in time", ("slow",), seconds=QUICK, most_cost=1),
    Row("no answer for good", always="slow", ends=FAILED, seconds=0.1, most_tries=8, most_cost=0),
    Row("a byte at a time", ("dribbling",), seconds=QUICK),
    Row("cut body", ("cut",)),
    Row("cut body for good", always="cut", ends=FAILED, most_tries=8, most_cost=8),
    Row("cut body without a length", ("cut without length",)),
    Row("connection lost", ("lost",), most_cost=1),
    Row("connection lost for good", always="lost", ends=FAILED, most_tries=8, most_cost=0),
    Row(REFUSED, ends=FAILED, most_tries=8, most_cost=0),
    Row("not JSON", ("garbage",), most_cost=1),
    Row("not JSON for good", always="garbage", ends=FAILED, most_tries=8, most_cost=0),
    Row("64 MiB body", ("huge",), most_cost=1),
    Row("64 MiB body for good", always="huge", ends=REJECTED, most_cost=0),
    Row("a vector too few", ("short of one",)),
    Row("a vector too few for good", always="short of one", ends=REJECTED),
    Row("a vector too many", ("one too many",)),
    Row("out of order", always="out of order", most_tries=1, most_cost=1, only=_COUNTED),
    Row("a number twice", ("twice the same",), only=_COUNTED),
    Row("NaN", ("NaN",)),
    Row("NaN for good", always="NaN", ends=REJECTED),
    Row("null in a vector", ("null",)),
    Row("infinite", ("infinite",)),
    Row("wrong dimension", ("dimension",)),
    Row("wrong dimension for good", always="dimension", ends=REJECTED),
    Row("zero vector", ("zero",)),
    Row("zero vector for good", always="zero", ends=REJECTED),
    Row("length 40", ("length",)),
    Row("length 40 for good", always="length", ends=REJECTED, but={"nvidia": DONE}),
    Row("base64 that is none", ("base64",), only=_COUNTED),
    # A drawn one may strike one batch seven times over, a cut answer costs each time.
    Row("seven at random", drawn=7, seconds=QUICK, most_tries=8, most_cost=8),
    Row("another model", always="other model", ends=REJECTED, most_tries=1, most_cost=1),
    Row("no usage", always="uncounted", most_tries=1, most_cost=1),
)


@dataclass
class Outcome:
    """How one provider met one fault."""

    provider: str
    row: Row
    ended: str = ""
    tries: int = 0
    """The most that any text was sent."""
    requests: int = 0
    paid: int = 0
    """Tokens, by the server's count."""
    cost: float = 0.0
    """US dollars."""
    seconds: float = 0.0
    said: str = ""
    broken: list[str] = field(default_factory=list)
    """Promises that were not kept."""


def strike(provider: str, row: Row, seed: int) -> Outcome:
    """One provider, one fault."""
    chance = random.Random(f"{seed} {provider} {row.name}")
    name, dimension = MODEL[provider]
    texts = [f"{chance.randbytes(6).hex()} text {n} of {provider}" for n in range(TEXTS[provider])]
    texts[chance.randrange(len(texts))] = " "
    outcome = Outcome(provider, row)
    with provider_server(provider, dimension) as server, _listening() as heard:
        storm = len(row.faults) > 3
        server.fault(*(row.faults[: chance.randint(3, LONGEST_STORM)] if storm else row.faults), **row.headers)
        server.fault(*(chance.choice(GOT_OVER) for _ in range(row.drawn)))
        if row.always:
            server.always(row.always, **row.headers)
        url = f"http://127.0.0.1:{_closed_port()}" if row.name == REFUSED else server.url
        engines = Engines(keys=KEY, urls={provider: url}, request_timeout_seconds=row.seconds)
        choice = Choice(mode="external_api", provider=provider, model=name, dimension=dimension)  # type: ignore[arg-type]
        started = time.monotonic()
        price = 0.0
        try:
            embedder = open_provider(choice, engines, layout=None, patience=PATIENCE)
            price = embedder.model.price_per_million_tokens
            heard(repr(embedder) + repr(embedder.model) + repr(engines))
            try:
                _check_done(outcome, server, texts, embedder.embed(texts))
            finally:
                outcome.seconds = time.monotonic() - started
                embedder.close()
        except ExportError as error:
            outcome.ended, outcome.said = error.code, error.message
            outcome.tries = int(str(error.details.get("tries", 0))) if row.name == REFUSED else 0
            heard("".join(traceback.format_exception(error)) + repr(error) + repr(error.details))
            _check_failed(outcome, error)
        if [thread.name for thread in threading.enumerate() if thread.name.startswith(f"embed-{provider}")]:
            outcome.broken.append("threads go on after the end")
        outcome.requests, outcome.paid = len(server.seen), server.paid
        sent = Counter(text for seen in server.seen for text in seen.body["input"])
        outcome.tries = max(outcome.tries, *sent.values(), 0)
        outcome.cost = server.paid * price / 1e6
        _check(outcome, server, texts, heard(""))
    return outcome


def _check_done(outcome: Outcome, server: ProviderServer, texts: list[str], embedded: Embedded) -> None:
    outcome.ended = DONE
    wanted = np.stack([server.vector(text) for text in texts])
    blank = next(place for place, text in enumerate(texts) if not text.strip())
    wanted[blank] = np.eye(1, server.dimension)
    if embedded.vectors.shape != wanted.shape or np.abs(embedded.vectors - wanted).max() > 1e-6:
        outcome.broken.append("a text has not its own unit vector")
    if embedded.tokens > server.paid and outcome.row.always != "uncounted":
        outcome.broken.append(f"{embedded.tokens} tokens reported, {server.paid} paid")
    lost = {"cut", "cut without length", "dribbling", "uncounted"} & {*server.faults_met()}
    if embedded.tokens != server.paid and not lost:
        outcome.broken.append(f"{embedded.tokens} tokens reported, {server.paid} paid")


def _check_failed(outcome: Outcome, error: ExportError) -> None:
    if error.retryable != (error.code == FAILED):
        outcome.broken.append("told wrong whether another try may help")
    if len(error.message) > 600 or not error.message.isprintable() or outcome.provider not in error.message:
        outcome.broken.append(f"not a message for people: {error.message[:200]!r}")
    if {"provider", "model", "tries"} - error.details.keys():
        outcome.broken.append(f"details are missing: {error.details}")


def _check(outcome: Outcome, server: ProviderServer, texts: list[str], heard: str) -> None:
    row = outcome.row
    ends = row.but.get(outcome.provider, row.ends)
    if outcome.ended != ends:
        outcome.broken.append(f"ends {outcome.ended}, not {ends}: {outcome.said}")
    if outcome.tries > row.most_tries:
        outcome.broken.append(f"a text was sent {outcome.tries} times, not {row.most_tries} at most")
    usual = sum(server.tokens(text) for text in texts if text.strip())
    if outcome.paid > usual * row.most_cost:
        outcome.broken.append(f"{outcome.paid} tokens paid, not {usual * row.most_cost:.0f} at most")
    key = KEY.get(outcome.provider)
    if key and (key in heard or key[-6:] in heard):
        outcome.broken.append("the key, or the end of it, was shown")
    if row.faults and not server.faults_met():
        outcome.broken.append("the fault was not met")


def _closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class _listening(logging.Handler):  # noqa: N801  read as a sentence
    """All that is logged by anyone, at any level; called, it also takes what else was said, and answers all of it."""

    def __enter__(self) -> Callable[[str], str]:
        self._heard: list[str] = []
        self._level = logging.root.level
        logging.root.addHandler(self)
        logging.root.setLevel(logging.DEBUG)
        return self._hear

    def __exit__(self, *_: object) -> None:
        logging.root.setLevel(self._level)
        logging.root.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._heard.append(record.getMessage() + repr(record.args))

    def _hear(self, said: str) -> str:
        self._heard.append(said)
        return "\n".join(self._heard)


def rows_of(provider: str) -> list[Row]:
    """The faults that a provider can meet."""
    return [row for row in ROWS if provider in row.only]


def main() -> int:
    """The command line of ``scripts/faults providers``."""
    parser = argparse.ArgumentParser(prog="scripts/faults providers", description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="for the same texts and storms again")
    seed = parser.parse_args().seed
    print(
        f"{'provider':9} {'fault':32} {'ends':18} {'tries':>5} {'requests':>8} {'tokens paid':>11} {'US$':>9} {'s':>6}"
    )
    broken = strikes = 0
    for provider in PROVIDERS:
        for row in rows_of(provider):
            met = strike(provider, row, seed)
            strikes += 1
            broken += len(met.broken)
            print(
                f"{provider:9} {row.name:32} {met.ended:18} {met.tries:>5} {met.requests:>8} {met.paid:>11,} "
                f"{met.cost:>9.6f} {met.seconds:>6.2f}",
                flush=True,
            )
            for what in met.broken:
                print(f"     BROKEN {what}", flush=True)
    print(f"{strikes} faults met (seed {seed}), broken promises: {broken}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
