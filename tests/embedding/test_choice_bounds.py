"""Choices of engines that are told apart before anything is opened, and an engine without its weights."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec

import pytest
from processes import REPOSITORY

from common.embedding.choice import Choice, Engines
from common.embedding.engine import OpenEngines
from common.embedding.routing import check_choice
from common.embedding.static import StaticEmbedder
from common.errors import InvalidRequest

HUB = "organisation/name@" + "0" * 40


def test_a_dimension_of_a_model_that_only_its_own_files_know_is_a_positive_number() -> None:
    choice = Choice(mode="local_cpu", provider="torch", model="own", dimension=0)
    with pytest.raises(InvalidRequest, match="embedding_dimension must be at least 1"):
        check_choice(choice, Engines(), runs_here=False, allowed=["own"])


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="needs the extra gpu")
def test_a_model_of_the_hub_is_looked_for_when_it_is_opened_and_not_before() -> None:
    choice = Choice(mode="local_cpu", provider="torch", model=HUB)
    check_choice(choice, Engines(model_downloads=True), runs_here=True, allowed=[HUB])
    with pytest.raises(InvalidRequest, match="embedding_model must be one that is here: "):
        check_choice(choice, Engines(), runs_here=True, allowed=[HUB])


def test_an_engine_that_several_share_counts_and_embeds_as_the_one_behind_it_does() -> None:
    texts = ["class Handler", "reads the graph"]
    with closing(OpenEngines(Engines())) as shared:
        engine, own = shared.get(Choice()), StaticEmbedder()
        assert (engine.model, engine.group) == (own.model, own.group)
        assert engine.count_tokens(texts) == own.count_tokens(texts) > 0
        engine.close()  # which closes it for nobody
        assert engine.embed(texts).vectors.tobytes() == own.embed(texts).vectors.tobytes()
        assert engine.flush() is None


def test_weights_that_are_not_installed_are_named() -> None:
    """In a process whose import system has no wordllama."""
    script = """
import sys
sys.modules["wordllama"] = None
from common.embedding.static import StaticEmbedder
from common.errors import EmbeddingFailed
try:
    StaticEmbedder().embed(["a text"])
except EmbeddingFailed as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "the package wordllama, which holds the static model, is not installed"
