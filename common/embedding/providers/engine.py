"""The engine over an embedding API: batches within its bounds, answers checked, failures told apart."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.embedding.catalog import find_model
from common.embedding.choice import PAID, Choice, Engines, Provider
from common.embedding.port import Embedded, Embedder, Keep, Model, Purpose
from common.embedding.providers.channel import Channel, Lost, Reply, TimedOut, TooLong
from common.embedding.providers.formats import (
    URLS,
    Answer,
    Format,
    Garbled,
    format_of,
    read_digest,
    read_refusal,
    same_model,
    scrubbed,
)
from common.embedding.providers.pace import (
    MOST_REQUESTS,
    POLL_SECONDS,
    Pace,
    Patience,
    asked_wait,
    cut_to,
    estimated_tokens,
)
from common.errors import EmbeddingFailed, ExportError, InvalidRequest, ProviderRejected

END_SECONDS = 1.0
"""That a call which failed or was stopped waits for its requests to end; all but a connection that is being made, and
a name that is being looked up, do within a twentieth."""
_MOST_REQUESTS: dict[Provider, int] = {"ollama": 4}
"""At once, where fewer than elsewhere: Ollama runs a batch's texts side by side already."""
_TYPICAL_TOKENS = 100
"""Of a text of ``code-v1``, as estimated; only for how many texts fill the engine."""
_GROUP_NUMBERS = 16 << 20
"""In the vectors of one group: 64 MiB."""
_MOST_CUTS = 5
"""Halvings of a text that an API says is too long: none is a 32nd of what was estimated to fit."""
_MAX_LIST_BYTES, _LIST_SECONDS = 4 << 20, 10.0
"""For Ollama's list of models; an entry takes about 400 bytes."""
_UNIT = 0.01
"""How far a vector's length may be from 1 where the API promises 1; float32 and base64 keep it within 1e-6."""
_CONTROL = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127), " ")
_CLOSED = "the embedding engine was closed while it was at work"
_FOR_NOW = (408, 409, 425, 429)
"""Statuses beside those from 500 on that another try may change (openai-python's own list, and "too early")."""
_OVERLOADED = (429, 503, 529)


def open_provider(
    choice: Choice, engines: Engines, *, layout: str | None, patience: Patience | None = None
) -> Embedder:
    """The engine of a provider's API. Nothing is sent before the first text, but that Ollama is asked which weights the
    model's name stands for.

    ``layout`` replaces the one that suits the model. Raises InvalidRequest for a model, dimension, key, address or
    setting that cannot work, with ``field``; EmbeddingFailed and ProviderRejected where Ollama does not answer, or
    does not have the model.
    """
    if choice.provider not in URLS:
        raise InvalidRequest(f"{choice.provider} is not a provider with an API", field="embedding_provider")
    known = find_model(choice.provider, choice.model, choice.dimension)
    key = engines.keys.get(choice.provider) if choice.provider in PAID else None
    if choice.provider in PAID and not key:
        raise InvalidRequest(f"{choice.provider} needs a key, and this machine has none", field="embedding_provider")
    dimension = choice.dimension or known.dimension
    spoken = format_of(known, dimension, engines)
    most = _MOST_REQUESTS.get(known.provider, MOST_REQUESTS)
    url = engines.urls.get(known.provider) or URLS[known.provider]
    channel = Channel(url, key, most, field="embedding_provider")
    seconds = engines.request_timeout_seconds
    if known.provider == "ollama":
        revision = _ollama_digest(channel, known.name, seconds)
    else:
        revision = _revision(spoken.revision, url, URLS[known.provider])
    model = Model(
        provider=known.provider,
        name=known.name,
        revision=revision,
        dimension=dimension,
        precision="float",
        layout=layout or known.layout,
        max_tokens=known.max_tokens,
        price_per_million_tokens=known.price or 0.0,
    )
    limits = Limits(known.request_texts, known.request_tokens, most, seconds)
    return ProviderEmbedder(model, spoken, channel, limits, patience=patience or Patience(), key=key)


def _revision(own: str, url: str, usual: str) -> str:
    """Who serves a name at another address (a gateway, a NIM, a stand-in for tests) decides which weights it stands
    for; the address itself is nobody's business who reads a manifest."""
    elsewhere = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
    return own if url.rstrip("/") == usual else f"{own} at {elsewhere}"


def _ollama_digest(channel: Channel, name: str, seconds: float) -> str:
    """Which weights a name stands for: a pull may change that, and old vectors must not be taken for new ones."""
    details = {"provider": "ollama", "model": name, "tries": 1}
    try:
        reply = channel.send("/api/tags", seconds=min(seconds, _LIST_SECONDS), most_bytes=_MAX_LIST_BYTES)
        if reply.status != 200:
            raise Lost(f"status {reply.status}: {read_refusal(reply.body, None).message}")
        digest = read_digest(reply.body, name)
    except (Lost, TooLong, Garbled) as error:
        raise EmbeddingFailed(f"ollama does not say which models it has: {error}", **details) from error
    finally:
        channel.close()  # it opens again by itself; what fails here leaves nothing open
    if digest is None:
        raise ProviderRejected(f"ollama does not have the model {name}: ollama pull {name}", **details)
    return digest


class Limits(NamedTuple):
    """Bounds of one request, and of requests at once."""

    texts: int
    tokens: int
    requests: int
    seconds: float
    """For one request, from its first byte to its answer's last."""


class _Text(NamedTuple):
    place: int
    """In the call."""
    text: str
    tokens: int
    """Estimated."""
    cuts: int = 0
    """How often it was halved, as the API found it too long."""


class _Stopped(Exception):
    """The call has ended already, by a failure elsewhere or by its caller."""


class _Call:
    """One call of ``embed``: what its requests have in common."""

    def __init__(self, vectors: NDArray[np.float32], purpose: Purpose, keep: Keep | None) -> None:
        self.vectors, self.purpose, self.keep = vectors, purpose, keep
        self.stop = threading.Event()
        self.truncated: set[int] = set()
        self.tokens = self.batches = self.retries = 0
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise if the call has ended."""
        if self.stop.is_set():
            raise _Stopped

    def count(self, *, tokens: int = 0, batches: int = 0, retries: int = 0) -> None:
        """Add to the totals."""
        with self._lock:
            self.tokens += tokens
            self.batches += batches
            self.retries += retries


class _Tries:
    """What was spent on one batch and its parts."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self.failed = self.useless = 0
        self.until = time.monotonic() + patience.total


class ProviderEmbedder:
    """Vectors from an API. A text without a word (only white space) is not sent, as an API may refuse it: it gets the
    first axis, as the static engine's does."""

    def __init__(
        self, model: Model, spoken: Format, channel: Channel, limits: Limits, *, patience: Patience, key: str | None
    ) -> None:
        self.model = model
        self._format, self._channel, self._limits, self._patience, self._key = spoken, channel, limits, patience, key
        # Four requests at once are what a healthy API is sent at first; more in a call are fine.
        batch = min(limits.texts, limits.tokens // min(_TYPICAL_TOKENS, model.max_tokens))
        self.group = max(1, min(4 * batch, _GROUP_NUMBERS // model.dimension))
        self._pace = Pace(limits.requests)
        self._threads = ThreadPoolExecutor(limits.requests, thread_name_prefix=f"embed-{model.provider}")
        self._calls: set[_Call] = set()

    def embed(
        self,
        texts: Sequence[str],
        *,
        purpose: Purpose = "document",
        should_stop: Callable[[], None] = lambda: None,
        keep: Keep | None = None,
    ) -> Embedded:
        """See the port. ``tokens`` are those that the API says it read, also for answers that were of no use; cut texts
        are named by our estimate where the API cuts them, and exactly where we do.

        Raises EmbeddingFailed when the tries or the time of a request are spent; ProviderRejected for what no further
        try can change: a key, a quota, a model, a request that is refused, answers that are no vectors.
        """
        should_stop()
        vectors = np.zeros((len(texts), self.model.dimension), dtype=np.float32)
        call = _Call(vectors, purpose, keep)
        given: list[_Text] = []
        for place, text in enumerate(map(_clean, texts)):
            if text:
                given.append(self._prepared(call, place, text))
            else:
                vectors[place, 0] = 1
        self._calls.add(call)
        futures: list[Future[None]] = []
        try:
            futures.extend(self._submit(call, batch) for batch in self._batches(given))
            self._wait(futures, should_stop)
        finally:
            call.stop.set()
            self._calls.discard(call)
            for future in futures:
                future.cancel()
            wait(futures, END_SECONDS)
        return Embedded(vectors, call.tokens, sorted(call.truncated), call.batches, 0, call.retries)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """See the port: an estimate, 15 to 27% above real tokenizers' counts on the graphs that it was measured on."""
        return sum(self._estimate(text) for text in map(_clean, texts) if text)

    def flush(self, should_stop: Callable[[], None] = lambda: None) -> str | None:
        """See the port: nothing is kept here."""
        return None

    def close(self) -> None:
        """See the port; ends what is under way."""
        for call in list(self._calls):
            call.stop.set()
        self._threads.shutdown(cancel_futures=True)
        self._channel.close()

    # --- before a request -------------------------------------------------------------------------

    def _estimate(self, text: str) -> int:
        return min(estimated_tokens(text), self.model.max_tokens) + self._format.added_tokens

    def _prepared(self, call: _Call, place: int, text: str) -> _Text:
        most = self.model.max_tokens
        if estimated_tokens(text) > most and not self._format.strict:
            call.truncated.add(place)
            # Where the API cuts, it is still not sent what is sixteen times as long as it could read.
            text = cut_to(text, most if self._format.cut else 16 * most)
        return _Text(place, text, self._estimate(text))

    def _batches(self, texts: Sequence[_Text]) -> list[list[_Text]]:
        batches: list[list[_Text]] = []
        tokens = 0
        for text in texts:
            tokens += text.tokens
            if not batches or len(batches[-1]) == self._limits.texts or tokens > self._limits.tokens:
                batches.append([])
                tokens = text.tokens
            batches[-1].append(text)
        return batches

    def _submit(self, call: _Call, batch: list[_Text]) -> Future[None]:
        try:
            return self._threads.submit(self._embed, call, batch, None)
        except RuntimeError as error:
            raise EmbeddingFailed(_CLOSED) from error

    @staticmethod
    def _wait(futures: Sequence[Future[None]], should_stop: Callable[[], None]) -> None:
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, POLL_SECONDS, FIRST_EXCEPTION)
            try:
                for future in done:
                    future.result()
            except (_Stopped, CancelledError) as error:
                raise EmbeddingFailed(_CLOSED) from error
            should_stop()

    # --- one batch, on a thread of the pool -------------------------------------------------------

    def _embed(self, call: _Call, batch: list[_Text], spent: _Tries | None) -> None:
        """Embed a batch, in parts where it must be: requests until every text has its vector."""
        tries = spent or _Tries(self._patience)
        while batch:
            reply = self._tried(call, batch, tries)
            if isinstance(reply, list):
                for part in reply:
                    self._embed(call, part, tries)
                return
            if reply is not None:
                batch = self._taken(call, batch, reply, tries)

    def _tried(self, call: _Call, batch: list[_Text], tries: _Tries) -> Reply | list[list[_Text]] | None:
        """One request: its answer, or parts to embed instead of the batch, or None after a wait for another try."""
        body = self._format.body([text.text for text in batch], call.purpose)
        asked = time.monotonic()
        entered = self._pace.enter(call.check)
        started = time.monotonic()
        tries.until += started - asked  # a turn that is long in coming is nobody's failure
        failure: Lost | TooLong | None = None
        try:
            reply = self._channel.send(
                self._format.path,
                body,
                seconds=max(0.001, min(self._limits.seconds, tries.until - started)),
                most_bytes=self._most_bytes(len(batch)),
                check=call.check,
            )
        except (Lost, TooLong) as error:
            failure = error
        finally:
            self._pace.leave()
        if failure is None and reply.status == 200:
            self._pace.answered(entered, time.monotonic() - started, sum(text.tokens for text in batch))
            return reply
        if failure is None:
            return self._refused(call, batch, reply, tries, entered)
        if isinstance(failure, TooLong):
            self._useless(call, tries, f"{failure}, more than the vectors could take", failure)
            return None
        if isinstance(failure, TimedOut):
            self._pace.overloaded(entered)
        self._failed(call, tries, str(failure), failure)
        return _halves(batch) if isinstance(failure, TimedOut) and len(batch) > 1 else None

    def _refused(
        self, call: _Call, batch: list[_Text], reply: Reply, tries: _Tries, entered: int
    ) -> list[list[_Text]] | None:
        status, refusal = reply.status, read_refusal(reply.body, self._key)
        said = f"{self.model.provider} answered {status}" + (f": {refusal.message}" if refusal.message else "")
        if status == 413 or (refusal.too_large and status in (400, 422, 500)):
            if len(batch) > 1:
                call.count(retries=1)
                return _halves(batch)
            (text,) = batch
            if not self._format.strict and text.cuts < _MOST_CUTS and len(text.text) > 1:
                call.count(retries=1)
                call.truncated.add(text.place)
                shorter = cut_to(text.text, min(estimated_tokens(text.text), self.model.max_tokens) // 2)
                return [[_Text(text.place, shorter or text.text[:1], self._estimate(shorter), text.cuts + 1)]]
        elif (status in _FOR_NOW or status >= 500) and not (status == 429 and refusal.quota):
            asked = asked_wait(reply.headers)
            if status in _OVERLOADED:
                self._pace.overloaded(entered, asked or 0.0)
            self._failed(call, tries, said, None, asked)
            return None
        elif 300 <= status < 400:
            said += "; redirects are not followed: its address is set wrong"
        raise self._rejected(said, tries, status=status)

    def _taken(self, call: _Call, batch: list[_Text], reply: Reply, tries: _Tries) -> list[_Text]:
        """Keep the vectors of an answer; the texts that are still without one."""
        try:
            answer = self._format.read(reply.body, len(batch))
        except Garbled as error:
            self._failed(call, tries, str(error), error)
            return batch
        call.count(tokens=self._paid(answer, batch), batches=1)
        if answer.model and not same_model(self.model.name, answer.model):
            answered = scrubbed(answer.model, self._key)[:80]
            raise self._rejected(f"{self.model.provider} answered with another model, {answered!r}", tries)
        if answer.wrong:
            self._useless(call, tries, answer.wrong, None)
            return batch
        bad, reason = self._kept(call, batch, answer)
        if bad:
            self._useless(call, tries, f"{len(bad)} of {len(batch)} vectors of no use: {reason}", None)
        return bad

    def _paid(self, answer: Answer, batch: Sequence[_Text]) -> int:
        # A local server that does not count costs nothing, but what it read is worth a figure too.
        said = answer.tokens
        return said if said is not None and said >= 0 else sum(text.tokens for text in batch)

    def _kept(self, call: _Call, batch: Sequence[_Text], answer: Answer) -> tuple[list[_Text], str]:
        bad, reason = [], ""
        for text, row in zip(batch, answer.rows, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                length = 0.0 if row is None else float(np.linalg.norm(row.astype(np.float64)))
            if row is None:
                reason = "not numbers"
            elif len(row) != self.model.dimension:
                reason = f"{len(row)} numbers where {self.model.dimension} were asked for"
            elif not np.isfinite(length):
                reason = "a number that is not finite"
            elif length == 0:
                reason = "all numbers zero"
            elif self._format.unit and abs(length - 1) > _UNIT:
                reason = f"a length of {length:.3g} where the API promises 1"
            else:
                call.vectors[text.place] = row.astype(np.float64) / length
                if call.keep is not None:
                    call.keep(text.place, call.vectors[text.place], text.place in call.truncated)
                continue
            bad.append(text)
        return bad, reason

    # --- after a request that brought nothing -----------------------------------------------------

    def _failed(
        self, call: _Call, tries: _Tries, why: str, cause: Exception | None, asked: float | None = None
    ) -> None:
        """Count a failure for now and wait, or give up. Raises EmbeddingFailed."""
        tries.failed += 1
        seconds = tries.patience.wait(tries.failed) if asked is None else asked
        if tries.failed >= tries.patience.tries or time.monotonic() + seconds > tries.until:
            raise EmbeddingFailed(
                f"{self.model.provider} failed {tries.failed} times, at last so: {why}",
                provider=self.model.provider,
                model=self.model.name,
                tries=tries.failed + tries.useless,
            ) from cause
        self._pause(call, seconds)

    def _useless(self, call: _Call, tries: _Tries, why: str, cause: Exception | None) -> None:
        """Count an answer of no use, which was paid for, and wait, or give up. Raises ProviderRejected."""
        tries.useless += 1
        seconds = tries.patience.wait(tries.useless)
        if tries.useless >= tries.patience.useless_answers or time.monotonic() + seconds > tries.until:
            raise self._rejected(f"{self.model.provider} answered {why}, {tries.useless} times", tries, 0) from cause
        self._pause(call, seconds)

    def _pause(self, call: _Call, seconds: float) -> None:
        call.count(retries=1)
        call.stop.wait(seconds)
        call.check()

    def _rejected(self, why: str, tries: _Tries, last: int = 1, **details: object) -> ExportError:
        done = tries.failed + tries.useless + last
        return ProviderRejected(why, provider=self.model.provider, model=self.model.name, tries=done, **details)

    def _most_bytes(self, texts: int) -> int:
        # A number takes 25 characters at most ("-1.2345678901234567e-05, "), an item's frame a few hundred.
        return texts * (self.model.dimension * 32 + 1_024) + (64 << 10)


def _clean(text: str) -> str:
    """What any API takes: no half of a character, which JSON cannot hold, and no control characters, which some refuse
    with all of the request; the empty string where nothing is left to read."""
    text = text.encode(errors="replace").decode().translate(_CONTROL)
    return text if text.strip() else ""


def _halves(batch: list[_Text]) -> list[list[_Text]]:
    middle = (len(batch) + 1) // 2
    return [batch[:middle], batch[middle:]]
