"""Engines that several share: which stay open, and what happens to those that do not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest
from provider_server import KEY, ProviderServer, provider_server

from common.embedding.choice import Choice, Engines
from common.embedding.engine import KEPT, OpenEngines
from common.errors import EmbeddingFailed, InvalidRequest


@pytest.fixture
def openai() -> Iterator[ProviderServer]:
    with provider_server("openai") as server:
        yield server


def open_engines(server: ProviderServer) -> closing[OpenEngines]:
    return closing(OpenEngines(Engines(keys=KEY, urls={server.provider: server.url})))


def of(dimension: int) -> Choice:
    return Choice(mode="external_api", provider="openai", model="text-embedding-3-small", dimension=dimension)


def test_an_engine_that_gave_way_to_others_opens_again_when_it_is_used(openai: ProviderServer) -> None:
    with open_engines(openai) as opened:
        engines = [opened.get(of(dimension)) for dimension in range(8, 8 + KEPT + 2)]
        for dimension, engine in enumerate(engines, start=8):
            (vector,) = engine.embed(["a text"]).vectors
            assert np.allclose(vector, openai.vector("a text", dimension), atol=1e-6)


def test_an_engine_at_work_is_not_closed_by_those_that_come_after_it(openai: ProviderServer) -> None:
    openai.seconds = 0.5  # that an answer takes
    with open_engines(openai) as opened, ThreadPoolExecutor(1) as thread:
        working = thread.submit(opened.get(of(8)).embed, ["a text"])
        while not openai.seen:
            threading.Event().wait(0.01)
        for dimension in range(9, 9 + 2 * KEPT):
            opened.get(of(dimension))
        assert np.allclose(working.result().vectors[0], openai.vector("a text", 8), atol=1e-6)


def test_an_engine_that_cannot_be_opened_is_asked_for_anew() -> None:
    opened = OpenEngines(Engines())
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="key"):
            opened.get(of(8))


def test_a_model_that_became_another_makes_no_vectors_for_the_old_one() -> None:
    with provider_server("ollama", 384) as ollama, open_engines(ollama) as opened:
        engine = opened.get(Choice(mode="external_api", provider="ollama", model="all-minilm"))
        for layout in ("code-v1", "static-v2"):
            opened.get(Choice(mode="external_api", provider="ollama", model="all-minilm", layout=layout))
        ollama.digests["all-minilm:latest"] = "f" * 64
        with pytest.raises(EmbeddingFailed, match="became another"):
            engine.embed(["a text"], purpose="query")
