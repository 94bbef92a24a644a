"""Embedding APIs against a local server that speaks as they do: what is sent, what is made of the answer, what of a
fault."""

from __future__ import annotations

import json
import logging
import ssl
import subprocess
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import answering
from provider_faults import PROVIDERS, rows_of, strike
from provider_server import KEY, ProviderServer, provider_server

from common.embedding.cache import CachedEmbedder
from common.embedding.cache.sqlite import SqliteCache
from common.embedding.catalog import DEFAULTS, MODE_TIERS, MODELS, TIERS, find_model
from common.embedding.choice import PROVIDERS as OF_MODE
from common.embedding.choice import Choice, Engines
from common.embedding.port import Embedder
from common.embedding.providers import Patience, open_provider
from common.embedding.providers.pace import Pace, asked_wait
from common.errors import EmbeddingFailed, InvalidRequest, ProviderRejected
from common.frames.build import frames
from common.frames.embed_text import LAYOUTS
from common.graph.canonical import canonical
from common.graph.read import read_graph

MODEL = {
    "openai": "text-embedding-3-small",
    "nvidia": "nvidia/nv-embedqa-e5-v5",
    "voyage": "voyage-code-3",
    "ollama": "all-minilm",
}
OWN = {"openai": 1_536, "nvidia": 1_024, "voyage": 1_024, "ollama": 384}
IMPATIENT = Patience(tries=3, first_wait=0.001)
FOREVER = Patience(first_wait=1_000.0, total=1e9)
"""Whoever waits with this waits until it is told to stop."""


class Ask:
    """Opens servers and engines for one test, and closes them."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def server(self, provider: str, dimension: int | None = None, **more: Any) -> ProviderServer:
        return self._open.enter_context(provider_server(provider, dimension or OWN[provider], **more))

    def engine(
        self,
        server: ProviderServer,
        model: str | None = None,
        *,
        dimension: int | None = None,
        patience: Patience = IMPATIENT,
        **engines: Any,
    ) -> Embedder:
        engine = open_provider(
            choice(server.provider, model, dimension=dimension),
            Engines(keys=KEY, urls={server.provider: server.url}, **engines),
            layout=None,
            patience=patience,
        )
        self._open.callback(engine.close)
        return engine

    def close(self) -> None:
        self._open.close()


@pytest.fixture
def ask() -> Iterator[Ask]:
    opened = Ask()
    yield opened
    opened.close()


def choice(provider: str, model: str | None = None, **more: Any) -> Choice:
    return Choice(mode="external_api", provider=provider, model=model or MODEL[provider], **more)  # type: ignore[arg-type]


def some(count: int) -> list[str]:
    return [f"text {n} of some" for n in range(count)]


# --- what is sent, and what comes back ------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "purpose", "path", "body"),
    [
        (
            "openai", "document", "/v1/embeddings",
            b'{"input":["a","\xc3\xa9 \\"b\\""],"model":"text-embedding-3-small","encoding_format":"base64"}',
        ),
        (
            "openai", "query", "/v1/embeddings",
            b'{"input":["a","\xc3\xa9 \\"b\\""],"model":"text-embedding-3-small","encoding_format":"base64"}',
        ),
        (
            "nvidia", "document", "/v1/embeddings",
            b'{"input":["a","\xc3\xa9 \\"b\\""],"input_type":"passage","model":"nvidia/nv-embedqa-e5-v5",'
            b'"truncate":"END","encoding_format":"float"}',
        ),
        (
            "nvidia", "query", "/v1/embeddings",
            b'{"input":["a","\xc3\xa9 \\"b\\""],"input_type":"query","model":"nvidia/nv-embedqa-e5-v5",'
            b'"truncate":"END","encoding_format":"float"}',
        ),
        (
            "voyage", "document", "/v1/embeddings",
            b'{"input":["a","\xc3\xa9 \\"b\\""],"input_type":"document","model":"voyage-code-3","truncation":true,'
            b'"output_dtype":"float","encoding_format":"base64"}',
        ),
        (
            "voyage", "query", "/v1/embeddings",
            b'{"input":["a","\xc3\xa9 \\"b\\""],"input_type":"query","model":"voyage-code-3","truncation":true,'
            b'"output_dtype":"float","encoding_format":"base64"}',
        ),
        (
            "ollama", "document", "/api/embed",
            b'{"input":["a","\xc3\xa9 \\"b\\""],"model":"all-minilm","truncate":true}',
        ),
        (
            "ollama", "query", "/api/embed",
            b'{"input":["a","\xc3\xa9 \\"b\\""],"model":"all-minilm","truncate":true}',
        ),
    ],
)  # fmt: skip
def test_each_api_is_sent_these_very_bytes(provider: str, purpose: Any, path: str, body: bytes, ask: Ask) -> None:
    server = ask.server(provider)
    texts = ["a", 'é "b"']
    embedded = ask.engine(server).embed(texts, purpose=purpose)
    (seen,) = server.seen
    assert (seen.path, seen.raw) == (path, body)
    key = KEY.get(provider)
    assert seen.headers == {
        "host": server.url.split("/")[2],
        "content-type": "application/json",
        "accept": "application/json",
        "accept-encoding": "identity",
        "user-agent": "memvid-export",
        "content-length": str(len(body)),
        **({"authorization": f"Bearer {key}"} if key else {}),
    }
    assert np.abs(embedded.vectors - [server.vector(text) for text in texts]).max() < 1e-6
    assert (embedded.tokens, embedded.batches, embedded.retries, embedded.truncated) == (server.paid, 1, 0, [])


@pytest.mark.parametrize(
    ("provider", "model", "dimension", "name"),
    [
        ("openai", "text-embedding-3-large", 256, "dimensions"),
        ("nvidia", "nvidia/llama-3.2-nv-embedqa-1b-v2", 384, "dimensions"),
        ("voyage", "voyage-3.5", 512, "output_dimension"),
        ("ollama", "nomic-embed-text", 128, "dimensions"),
    ],
)
def test_a_dimension_is_asked_for_only_where_it_is_not_the_models_own(
    provider: str, model: str, dimension: int, name: str, ask: Ask
) -> None:
    own = find_model(provider, model).dimension  # type: ignore[arg-type]
    server = ask.server(provider, own)
    assert ask.engine(server, model, dimension=dimension).embed(["a"]).vectors.shape == (1, dimension)
    assert ask.engine(server, model, dimension=own).embed(["a"]).vectors.shape == (1, own)
    assert [seen.body.get(name) for seen in server.seen] == [dimension, None]


def test_voyage_is_told_what_its_settings_say_and_the_model_is_another_by_it(ask: Ask) -> None:
    server = ask.server("voyage")
    plain = ask.engine(server)
    told = ask.engine(server, voyage_input_type="none", voyage_truncation=False)
    for engine in (plain, told):
        engine.embed(["a"])
        engine.embed(["a"], purpose="query")
    sent = [(seen.body["input_type"], seen.body["truncation"]) for seen in server.seen]
    assert sent == [("document", True), ("query", True), (None, False), ("query", False)]
    assert plain.model.revision.startswith("voyage-code-3 at ")
    assert told.model.revision.startswith("voyage-code-3 input_type=none at ")


def test_a_name_at_another_address_is_another_model(ask: Ask) -> None:
    servers = [ask.server("openai"), ask.server("openai")]
    revisions = {ask.engine(server).model.revision for server in [*servers, *servers]}
    assert len(revisions) == 2
    assert not any(server.url.partition("//")[2] in "".join(revisions) for server in servers)
    for urls in ({}, {"openai": "https://api.openai.com/v1/"}):
        with closing(open_provider(choice("openai"), Engines(keys=KEY, urls=urls), layout=None)) as engine:
            assert engine.model.revision == "text-embedding-3-small"


def test_a_model_of_ollama_sees_the_words_that_it_was_trained_with(ask: Ask) -> None:
    server = ask.server("ollama", 768)
    server.digests["nomic-embed-text:v1.5"] = "0a109f422b47e3a30ba2b10eca18548e944e8a23073ee3f3e947efcf3c45e59f"
    engine = ask.engine(server, "nomic-embed-text:v1.5")
    assert engine.model.revision == "0a109f422b47"
    engine.embed(["a"])
    engine.embed(["a"], purpose="query")
    assert [seen.body["input"] for seen in server.seen] == [["search_document: a"], ["search_query: a"]]
    assert {seen.body["model"] for seen in server.seen} == {"nomic-embed-text:v1.5"}


def test_a_model_of_ollama_is_another_once_other_weights_were_pulled_under_its_name(ask: Ask) -> None:
    server = ask.server("ollama")
    before = ask.engine(server).model
    server.digests["all-minilm:latest"] = "b" * 64
    after = ask.engine(server).model
    assert (before.name, before == after, after.revision) == (after.name, False, "b" * 12)


def test_a_model_that_ollama_lacks_is_refused_before_the_first_text_with_what_to_do(ask: Ask) -> None:
    server = ask.server("ollama")
    server.digests.clear()
    with pytest.raises(ProviderRejected, match=r"^ollama does not have the model all-minilm: ollama pull all-minilm$"):
        ask.engine(server)


def test_vectors_that_an_api_leaves_long_are_made_unit_length(ask: Ask) -> None:
    server = ask.server("nvidia")
    vectors = ask.engine(server).embed(some(9)).vectors
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6


def test_a_text_without_a_word_is_not_sent_and_gets_the_first_axis(ask: Ask) -> None:
    server = ask.server("openai", 8)
    embedded = ask.engine(server, dimension=8).embed(["", "a", " \n\t"])
    assert [seen.body["input"] for seen in server.seen] == [["a"]]
    assert embedded.vectors[[0, 2]].tolist() == [[1.0, *[0.0] * 7]] * 2
    nothing = ask.engine(server, dimension=8).embed([])
    assert (nothing.vectors.shape, nothing.tokens, nothing.batches, len(server.seen)) == ((0, 8), 0, 0, 1)


def test_what_an_api_may_refuse_in_a_text_is_replaced(ask: Ask) -> None:
    server = ask.server("voyage")
    ask.engine(server).embed(["half \ud83d\tof 🙂", "a\0b\x1b\x7f\r\nc", "\0\x1f"])
    assert server.seen[0].body["input"] == ["half ?\tof 🙂", "a b  \r\nc"]


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("text-embedding-ada-002", "text-embedding-ada-002-v2"),
        ("nvidia/nv-embedqa-e5-v5", "nv-embedqa-e5-v5"),
        ("nvidia/nv-embedqa-e5-v5", "nvidia/nv-embedqa-e5-v5-passage"),
        ("bge-m3", "bge-m3:latest"),
    ],
)
def test_a_model_may_answer_under_its_fuller_name(asked: str, answered: str, ask: Ask) -> None:
    provider = next(known.provider for known in MODELS.values() if known.name == asked)
    server = ask.server(provider, find_model(provider, asked).dimension)
    server.answers_as = answered
    assert ask.engine(server, asked).embed(["a"]).batches == 1


@pytest.mark.parametrize("answered", ["text-embedding-3-large", "text-embedding-3-small-turbo", "", "gpt-9"])
def test_an_answer_of_another_model_is_refused_and_named(answered: str, ask: Ask) -> None:
    server = ask.server("openai", 8)
    server.answers_as = answered
    engine = ask.engine(server, dimension=8)
    if not answered:  # an API that does not say is believed
        assert engine.embed(["a"]).batches == 1
        return
    with pytest.raises(ProviderRejected, match=f"answered with another model, '{answered}'"):
        engine.embed(["a"])


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "model", "texts", "words", "batches"),
    [
        ("openai", None, 4_097, 2, [2_048, 2_048, 1]),  # 2,048 texts
        ("openai", None, 500, 2_000, [149, 149, 149, 53]),  # 300,000 tokens, of 2,002 each
        ("nvidia", None, 520, 2, [259, 259, 2]),  # 259 texts
        ("nvidia", "nvidia/llama-3.2-nv-embedqa-1b-v2", 100, 2_000, [65, 35]),  # 131,072 tokens
        ("voyage", "voyage-3.5-lite", 1_001, 2, [1_000, 1]),  # 1,000 texts
        ("voyage", "voyage-code-3", 100, 2_000, [59, 41]),  # 120,000 tokens, with ten more of its own words to each
        ("voyage", "voyage-3.5", 200, 2_000, [159, 41]),  # 320,000 tokens
        ("ollama", None, 130, 2, [64, 64, 2]),  # 64 texts
        ("ollama", "bge-m3", 20, 2_000, [8, 8, 4]),  # 16,384 tokens
    ],
)
def test_batches_hold_what_the_api_takes_by_texts_and_by_tokens(
    provider: str, model: str | None, texts: int, words: int, batches: list[int], ask: Ask
) -> None:
    known = find_model(provider, model or MODEL[provider])  # type: ignore[arg-type]
    server = ask.server(provider, known.dimension)
    server.max_texts, server.max_tokens, server.max_text_tokens = (
        known.request_texts, known.request_tokens, known.max_tokens
    )  # fmt: skip
    embedded = ask.engine(server, model).embed(["abc " * words] * texts)
    assert sorted((len(seen.body["input"]) for seen in server.seen), reverse=True) == sorted(batches, reverse=True)
    assert (embedded.batches, embedded.retries, embedded.truncated) == (len(batches), 0, [])


def test_a_request_that_is_too_large_after_all_goes_in_halves(ask: Ask) -> None:
    server = ask.server("voyage", 8)
    server.max_texts = 30
    embedded = ask.engine(server, "voyage-new", dimension=8).embed(some(100))
    assert sorted(len(seen.body["input"]) for seen in server.seen) == [25, 25, 25, 25, 50, 50, 100]
    assert (embedded.batches, embedded.retries, embedded.truncated) == (4, 3, [])
    assert np.abs(embedded.vectors - [server.vector(text) for text in some(100)]).max() < 1e-6


def test_openai_is_sent_no_text_longer_than_its_model_takes_and_each_cut_one_is_named(ask: Ask) -> None:
    server = ask.server("openai", 8)
    embedded = ask.engine(server, dimension=8).embed(["a", "word " * 9_000, "b", "x" * 99_999])
    sent = server.seen[0].body["input"]
    assert embedded.truncated == [1, 3]
    assert "word " * 9_000 != sent[1] == "word " * (len(sent[1]) // 5) + "word "[: len(sent[1]) % 5]
    assert all(server.tokens(text) <= 8_191 for text in sent)
    assert (sent[0], sent[2], sent[3]) == ("a", "b", "x" * 24_567)  # a third of a token a letter, and two more


def test_a_text_that_the_api_still_finds_too_long_is_halved_alone(ask: Ask) -> None:
    server = ask.server("openai", 8)
    server.max_text_tokens = 50
    texts = [*some(3), "in other words " * 40]
    embedded = ask.engine(server, dimension=8).embed(texts)
    assert embedded.truncated == [3]
    (kept,) = {seen.body["input"][0] for seen in server.seen[-1:]}
    assert texts[3].startswith(kept)
    assert server.tokens(kept) <= 50 < 2 * server.tokens(kept) + 5
    assert np.abs(embedded.vectors - [server.vector(text) for text in [*texts[:3], kept]]).max() < 1e-6


def test_what_an_api_cuts_itself_is_sent_and_named(ask: Ask) -> None:
    server = ask.server("nvidia")
    embedded = ask.engine(server).embed(["a", "word " * 600])
    assert server.seen[0].body["input"] == ["a", "word " * 600]
    assert embedded.truncated == [1]


def test_voyage_without_truncation_refuses_a_long_text_rather_than_cut_it(ask: Ask) -> None:
    server = ask.server("voyage")
    server.max_text_tokens = 32_000
    engine = ask.engine(server, voyage_truncation=False)
    with pytest.raises(ProviderRejected, match="maximum context length"):
        engine.embed(["a", "word " * 33_000])
    assert server.seen[-1].body["input"] == ["word " * 33_000]


def test_tokens_are_estimated_rather_too_high_on_a_real_graph(real_graphs: dict[str, Path], ask: Ask) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    wordllama = pytest.importorskip("wordllama")
    config = Path(wordllama.__file__).parent / "tokenizers" / "l2_supercat_tokenizer_config.json"
    llama = tokenizers.Tokenizer.from_file(str(config))
    llama.no_padding()
    graph = canonical(read_graph(real_graphs["memvid-export.graph.ndjson.gz"]))
    made = frames(graph, generated_at="2026-01-02T00:00:00.000Z", layout="code-v1")
    texts = [frame.embed_text for frame in made if frame.embed_text is not None]
    real = sum(len(encoded.ids) for encoded in llama.encode_batch_fast(texts))
    assert real < ask.engine(ask.server("openai")).count_tokens(texts) < 1.5 * real


def test_the_estimate_counts_what_would_be_read_and_paid(ask: Ask) -> None:
    counted = {name: ask.engine(ask.server(name)).count_tokens(["", "abc", "x" * 99_999]) for name in PROVIDERS}
    assert counted == {
        "openai": 3 + 8_191,
        "nvidia": 3 + 512,
        "voyage": 13 + 32_010,  # with its own words before each
        "ollama": 3 + 256,
    }


# --- pace -----------------------------------------------------------------------------------------


def test_requests_at_once_start_at_four_grow_with_success_and_have_a_bound(ask: Ask) -> None:
    server = ask.server("ollama", 8)
    server.seconds = 0.02
    ask.engine(server, "of-eight-numbers", dimension=8).embed(some(64 * 40))
    assert server.most_at_once == 4  # Ollama's bound
    server = ask.server("nvidia", 8)
    server.seconds = 0.05
    engine = ask.engine(server, "nvidia/tiny", dimension=8)
    engine.embed(some(259 * 4))
    assert server.most_at_once <= 4
    engine.embed(some(259 * 60))
    assert 4 < server.most_at_once <= 32


def test_a_server_with_room_for_two_is_found_out_and_served_by_two_threads_alike(ask: Ask) -> None:
    server = ask.server("nvidia", 8)
    server.room, server.seconds = 2, 0.01
    engine = ask.engine(server, "nvidia/tiny", dimension=8, patience=Patience(tries=30, first_wait=0.02))
    texts = [some(259 * 8), [f"other {n}" for n in range(259 * 8)]]
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(engine.embed, texts))
    for given, embedded in zip(texts, both, strict=True):
        assert np.abs(embedded.vectors - [server.vector(text) for text in given]).max() < 1e-6
        assert embedded.batches == 8
    assert sum(embedded.retries for embedded in both) == server.faults_met()["429"] < len(server.seen) / 2


def test_answers_that_take_three_times_as_long_as_at_best_halve_the_requests_at_once() -> None:
    pace = Pace(32)

    def eight(seconds: float) -> int:
        for _ in range(8):
            turn = pace.enter(lambda: None)
            pace.leave()
            pace.answered(turn, seconds, tokens=1_000)
            pace.answered(turn, 100.0, tokens=10)  # the last few texts of a call say little
        return pace.limit

    assert [eight(1.0), eight(2.9), eight(3.1), eight(3.1)] == [4, 4, 2, 2]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "86400"}, 60.0),  # the bound
        ({"retry-after": "-1"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after-ms": "x", "retry-after": "9"}, 9.0),
        ({"retry-after": "Sat, 21 Nov 2026 19:00:30 GMT", "date": "Sat, 21 Nov 2026 19:00:10 GMT"}, 20.0),
        ({"retry-after": "Sat, 21 Nov 2026 19:00:30 GMT", "date": "Sat, 21 Nov 2026 19:00:40 GMT"}, 0.0),
        ({"retry-after": "Sat, 21 Nov 2026 19:00:30 GMT"}, None),
        ({"retry-after": "Sat, 21 Nov 2026 19:00:30", "date": "Sat, 21 Nov 2026 19:00:10 GMT"}, None),
    ],
)
def test_a_wait_that_is_asked_for_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert asked_wait(headers) == seconds


@pytest.mark.parametrize("headers", [{"retry_after": "0.01"}, {"retry_after_ms": "10"}])
def test_the_wait_that_a_server_asks_for_takes_the_place_of_our_own(headers: dict[str, str], ask: Ask) -> None:
    server = ask.server("openai", 8)
    server.fault("429", "429", "503", **headers)
    assert ask.engine(server, dimension=8, patience=FOREVER).embed(["a"]).retries == 3


def test_a_wait_that_does_not_fit_into_the_time_of_a_request_is_not_begun(ask: Ask) -> None:
    server = ask.server("openai", 8)
    server.always("429", retry_after="30")
    engine = ask.engine(server, dimension=8, patience=Patience(total=20.0))
    with pytest.raises(EmbeddingFailed, match="openai failed 1 times, at last so: openai answered 429: Rate limit"):
        engine.embed(["a"])
    assert len(server.seen) == 1


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_fault_ends_as_promised_at_the_promised_cost(provider: str) -> None:
    """A short form of ``scripts/faults providers``: what never gets better, for one provider each."""
    place = PROVIDERS.index(provider)
    rows = [
        row
        for number, row in enumerate(rows_of(provider))
        if "for good" not in row.name or number % len(PROVIDERS) == place
    ]
    outcomes = [strike(provider, row, seed=5) for row in rows]
    assert {outcome.row.name: outcome.broken for outcome in outcomes if outcome.broken} == {}
    assert len(outcomes) > 30


def test_a_refusal_repeats_the_providers_own_words(ask: Ask) -> None:
    server = ask.server("ollama")
    server.always("unknown model")
    with pytest.raises(ProviderRejected) as raised:
        ask.engine(server).embed(["a"])
    assert raised.value.message == 'ollama answered 404: model "it" not found, try pulling it first'
    assert raised.value.details == {"provider": "ollama", "model": "all-minilm", "tries": 1, "status": 404}


@pytest.mark.parametrize(
    ("said", "shown"),
    [(b'{"error":"caf\xe9 is closed"}', '{"error":"caf\ufffd is closed"}'), (b"[" * 60_000, "[" * 300 + "…")],
)
def test_a_refusal_that_nothing_can_read_is_shown_as_it_is(said: bytes, shown: str) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(400)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None:
            pass

    with answering(Refusing) as url:
        engines = Engines(keys=KEY, urls={"openai": url})
        engine = open_provider(choice("openai"), engines, layout=None, patience=IMPATIENT)
        with closing(engine), pytest.raises(ProviderRejected) as raised:
            engine.embed(["a"])
    assert raised.value.message == f"openai answered 400: {shown}"


def test_a_quota_that_is_spent_is_no_rate_limit(ask: Ask) -> None:
    server = ask.server("openai")
    server.always("quota", retry_after="1")
    with pytest.raises(ProviderRejected, match="answered 429: You exceeded your current quota"):
        ask.engine(server).embed(["a"])
    assert len(server.seen) == 1


def test_only_the_vectors_of_no_use_are_asked_for_again(ask: Ask) -> None:
    server = ask.server("voyage")
    server.fault("NaN")
    ask.engine(server).embed(some(9))
    assert [seen.body["input"] for seen in server.seen] == [some(9), [some(9)[4]]]


def test_one_batch_that_fails_for_good_ends_the_others(ask: Ask) -> None:
    server = ask.server("nvidia", 8)
    server.fault("slow", "slow", "slow", "expired key")
    engine = ask.engine(server, "nvidia/tiny", dimension=8)
    with pytest.raises(ProviderRejected, match="answered 401"):
        engine.embed(some(259 * 9))
    engine.close()
    assert len(server.seen) < 9
    until(lambda: server.hung_up == server.faults_met()["slow"])


class Enough(Exception):
    pass


@pytest.mark.parametrize("fault", ["slow", "429", "dribbling"])
def test_a_call_can_be_stopped_while_it_waits_for_an_answer_or_for_another_try(fault: Any, ask: Ask) -> None:
    server = ask.server("openai", 1_536)
    server.always(fault)
    engine = ask.engine(server, patience=FOREVER)
    asked_by = []

    def should_stop() -> None:
        asked_by.append(threading.get_ident())
        if len(server.seen) and len(asked_by) > 5:
            raise Enough

    with pytest.raises(Enough):
        engine.embed(["a"], should_stop=should_stop)
    assert set(asked_by) == {threading.get_ident()}
    engine.close()  # waits for its threads
    if fault == "slow":
        until(lambda: server.hung_up == 1)


def test_an_engine_that_is_closed_ends_what_is_under_way(ask: Ask) -> None:
    server = ask.server("ollama")
    server.always("slow")
    engine = ask.engine(server)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(engine.embed, some(64 * 20))
        until(lambda: len(server.seen) == 4)
        engine.close()
        for later in (call.result, lambda: engine.embed(["a"])):
            with pytest.raises(EmbeddingFailed, match="closed while it was at work"):
                later()


def until(holds: Callable[[], bool]) -> None:
    """Wait for what is about to happen in another thread."""
    pause = threading.Event()
    for _ in range(1_000):
        if holds():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come about in ten seconds")


# --- keys, addresses, certificates ----------------------------------------------------------------


@pytest.mark.parametrize("provider", ["openai", "nvidia", "voyage"])
def test_a_key_is_nowhere_in_what_is_said_even_where_the_api_repeats_it(
    provider: str, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = ask.server(provider)
    engine = ask.engine(server)
    engine.embed(["a"])
    said = repr(engine) + str(engine) + repr(engine.model)
    for fault in ("expired key", "echoed key", "forbidden"):
        server.fault(fault)  # type: ignore[arg-type]
        with pytest.raises(ProviderRejected) as raised:
            engine.embed(["a"])
        said += (
            "".join(traceback.format_exception(raised.value)) + repr(raised.value) + json.dumps(raised.value.details)
        )
    said += caplog.text + "".join(repr(vars(record)) for record in caplog.records)
    assert "send_request_headers" in said  # the level is low enough to show the most that anyone logs
    key = KEY[provider]
    assert [part for part in (key, key[:10], key[-6:]) if part in said] == []


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-secret one", "sk-geheim-ä", ""])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        open_provider(choice("openai"), Engines(keys={"openai": key}), layout=None)
    assert raised.value.details["field"] == "embedding_provider"
    assert "secret" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    "url",
    ["ftp://h/v1", "https://", "api.openai.com/v1", "https://u:secret@h/v1", "https://h/v1?k=secret", "http://h:x/v1"],
)
def test_an_address_that_cannot_be_one_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        open_provider(choice("openai"), Engines(keys=KEY, urls={"openai": url}), layout=None)
    assert "secret" not in "".join(traceback.format_exception(raised.value))


def test_a_proxy_of_the_environment_plays_no_part(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ask.engine(ask.server("openai")).embed(["a"]).batches == 1


def test_a_certificate_is_verified(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "localhost.pem"
    what = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", path, "-out", path]
    subprocess.run(["openssl", *what.split(), *names], check=True, capture_output=True)
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving.load_cert_chain(path)
    server = ask.server("openai", tls=serving)
    with pytest.raises(ProviderRejected, match=r"certificate of localhost:\d+ is not trusted"):
        ask.engine(server).embed(["a"])
    assert server.seen == []
    monkeypatch.setenv("SSL_CERT_FILE", str(path))  # as an operator makes OpenSSL trust an authority
    assert ask.engine(server).embed(some(300)).batches == 1


# --- the catalog ----------------------------------------------------------------------------------


def test_every_default_and_tier_is_a_known_model_with_a_layout() -> None:
    named = {(provider, name) for provider, name in DEFAULTS.items()}
    named |= {(provider, name) for provider, tiers in TIERS.items() for name in tiers.values()}
    assert named <= MODELS.keys()
    assert set(DEFAULTS) == set(TIERS) == {provider for providers in OF_MODE.values() for provider in providers}
    assert all(provider in OF_MODE[mode] for mode, tiers in MODE_TIERS.items() for provider in tiers.values())
    assert {model.layout for model in MODELS.values()} <= set(LAYOUTS)
    assert all(model.dimension in model.dimensions for model in MODELS.values())


def test_a_model_that_is_not_known_needs_its_dimension_said(ask: Ask) -> None:
    server = ask.server("openai", 24)
    with pytest.raises(InvalidRequest, match="its dimension must be said") as raised:
        ask.engine(server, "text-embedding-9")
    assert raised.value.details["field"] == "embedding_model"
    engine = ask.engine(server, "text-embedding-9", dimension=24)
    assert engine.embed(["a"]).vectors.shape == (1, 24)
    assert "dimensions" not in server.seen[0].body


@pytest.mark.parametrize(
    ("given", "engines", "field"),
    [
        (choice("openai", dimension=2_000), {}, "embedding_dimension"),
        (choice("openai", dimension=0), {}, "embedding_dimension"),
        (choice("voyage", dimension=100), {}, "embedding_dimension"),
        (choice("openai", "new", dimension=70_000), {}, "embedding_dimension"),
        (choice("openai", "new\n", dimension=8), {}, "embedding_model"),
        (choice("openai"), {"keys": {}}, "embedding_provider"),
        (choice("static", "wordllama-l2-supercat-256"), {}, "embedding_provider"),
        (choice("voyage"), {"voyage_output_dtype": "int8"}, "voyage_output_dtype"),
        (choice("voyage"), {"voyage_input_type": "passage"}, "voyage_input_type"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    given: Choice, engines: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        open_provider(given, Engines(**{"keys": KEY, **engines}), layout=None)
    assert raised.value.details["field"] == field


def test_a_layout_that_is_named_replaces_the_models_own(ask: Ask) -> None:
    server = ask.server("ollama")
    engine = open_provider(choice("ollama"), Engines(urls={"ollama": server.url}), layout="static-v2")
    engine.close()
    assert (engine.model.layout, ask.engine(server).model.layout) == ("static-v2", "code-v1")


def test_what_was_paid_for_before_a_call_failed_is_not_paid_for_again(ask: Ask, tmp_path: Path) -> None:
    server = ask.server("openai")
    cached = CachedEmbedder(ask.engine(server), SqliteCache(tmp_path / "vectors.sqlite", 1 << 26))
    texts = [f"text number {number} of many" for number in range(6_000)]
    server.max_text_tokens = 64
    with pytest.raises(ProviderRejected):
        cached.embed([*texts, "far too long " * 2_000])
    again = cached.embed(texts)
    assert again.cache_hits > 2_000
    assert server.paid == sum(map(server.tokens, texts))
    cached.close()
