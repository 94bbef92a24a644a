"""What a job leads to, and the rules that every choice keeps, whoever made it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from common.contract import JobInput
from common.embedding import routing
from common.embedding.catalog import DEFAULTS, MODELS
from common.embedding.choice import MODES, PROVIDERS, Choice, Engines, Mode, Provider
from common.embedding.routing import CATALOG, check_choice, check_question, choice_of, fields_of, switch, tier_of
from common.errors import InvalidRequest

HOST = "http://127.0.0.1:11434"
OPENAI = Choice(mode="external_api", provider="openai", model="text-embedding-3-large")


def job(**fields: Any) -> JobInput:
    return JobInput(job_id="j", payload_ref="file:///p", output_prefix="file:///o/", **fields)


def check(choice: Choice, engines: Engines = Engines(), *, runs_here: bool = False, **allowed: Any) -> None:  # noqa: B008
    check_choice(choice, engines, runs_here=runs_here, **{"allowed": CATALOG, **allowed})


def refused(choice: Choice, engines: Engines = Engines(), **more: Any) -> InvalidRequest:  # noqa: B008
    with pytest.raises(InvalidRequest) as caught:
        check(choice, engines, **more)
    assert caught.value.message.startswith(f"{caught.value.details['field']} must ")
    return caught.value


# --- jobs ---


@pytest.mark.parametrize(
    "choice",
    [
        Choice(),
        OPENAI,
        Choice(
            mode="external_api",
            provider="voyage",
            model="voyage-code-3",
            dimension=512,
            layout="code-v1",
            what=("files", "relations"),
            max_tokens=7,
            max_usd=0.25,
        ),
    ],
)
def test_a_choice_comes_through_a_job_as_it_was(choice: Choice) -> None:
    sent = msgspec.json.encode(job(**fields_of(choice)))
    for default in (Choice(), OPENAI):
        assert choice_of(msgspec.json.decode(sent, type=JobInput), default) == choice


def test_a_job_that_says_nothing_gets_the_default() -> None:
    default = msgspec.structs.replace(OPENAI, dimension=256, max_usd=1.0, what=("nodes",))
    assert choice_of(job(), default) == default


@pytest.mark.parametrize(
    ("fields", "default", "engine"),
    [
        ({"embedding_mode": "runpod_gpu"}, Choice(), ("torch", "all-MiniLM-L6-v2")),
        ({"embedding_mode": "local_cpu"}, OPENAI, ("static", "wordllama-l2-supercat-256")),
        ({"embedding_provider": "voyageai"}, OPENAI, ("voyage", "voyage-code-3")),
        ({"embedding_provider": "local"}, Choice(), ("ollama", "nomic-embed-text")),
        ({"embedding_mode": "external_api"}, OPENAI, ("openai", "text-embedding-3-large")),
        ({"embedding_model": "text-embedding-3-small"}, OPENAI, ("openai", "text-embedding-3-small")),
    ],
)
def test_what_a_job_leaves_out_suits_what_it_says(
    fields: dict[str, Any], default: Choice, engine: tuple[str, str]
) -> None:
    choice = choice_of(job(**fields), default)
    assert (choice.provider, choice.model) == engine
    check(choice)


def test_a_job_gets_no_more_than_the_worker_allows() -> None:
    default = Choice(max_tokens=100, max_usd=1.0)
    asked = choice_of(job(embedding_max_tokens=1_000, embedding_max_usd=0.5), default)
    assert (asked.max_tokens, asked.max_usd) == (100, 0.5)


def test_kinds_that_are_embedded_are_taken_once_and_in_one_order() -> None:
    assert choice_of(job(embedding_what=["relations", "files", "files"]), Choice()).what == ("files", "relations")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"embedding_mode": "psychic"}, "embedding_mode"),
        ({"embedding_mode": "external_api"}, "embedding_provider"),
        ({"embedding_provider": "cohere"}, "embedding_provider"),
        ({"embedding_provider": "x" * 10_000}, "embedding_provider"),
        ({"embedding_provider": "openai"}, "embedding_provider"),
        ({"embedding_model": "../../etc"}, "embedding_model"),
        ({"embedding_dimension": 128}, "embedding_dimension"),
        ({"embedding_layout": "verse-v9"}, "embedding_layout"),
        ({"embedding_layout": "code-v1"}, "embedding_layout"),
        ({"embedding_what": []}, "embedding_what"),
        ({"embedding_what": ["nodes", "comments"]}, "embedding_what"),
        ({"embedding_max_tokens": -1}, "embedding_max_tokens"),
        ({"embedding_max_usd": -0.5}, "embedding_max_usd"),
        ({"ollama_host": "http://169.254.169.254"}, "ollama_host"),
        ({"ollama_host": "http://127.0.0.1:11435"}, "ollama_host"),
        ({"ollama_host": "http://[::1"}, "ollama_host"),
    ],
)
def test_a_job_with_a_wrong_field_is_refused_by_its_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(choice_of(job(**fields), Choice(), ollama_host=HOST))
    assert caught.value.details["field"] == field
    assert caught.value.message.startswith(f"{field} must ")
    assert len(caught.value.message) < 400


def test_a_job_may_name_the_host_that_the_worker_calls_anyway() -> None:
    for same in (HOST, f"{HOST}/", "127.0.0.1:11434", "127.0.0.1"):
        assert choice_of(job(ollama_host=same), Choice(), ollama_host=HOST) == Choice()
    with pytest.raises(InvalidRequest, match="a job does not say whom it calls"):
        choice_of(job(ollama_host=HOST), Choice())


# --- rules ---


def test_a_mode_has_its_providers_and_no_others() -> None:
    for mode in MODES:
        for provider, model in DEFAULTS.items():
            choice = Choice(mode=mode, provider=provider, model=model)
            if provider in PROVIDERS[mode]:
                check(choice)
            else:
                assert refused(choice).details == {"field": "embedding_provider", "allowed": list(PROVIDERS[mode])}


def test_every_model_of_the_catalog_may_run_and_a_list_of_ones_own_replaces_it() -> None:
    for provider, name in MODELS:
        mode: Mode = "external_api" if provider in PROVIDERS["external_api"] else "local_cpu"
        check(Choice(mode=mode, provider=provider, model=name))
    small = msgspec.structs.replace(OPENAI, model="text-embedding-3-small")
    for allowed in (["text-embedding-3-small"], ["openai/text-embedding-3-small"]):
        check(small, allowed=allowed)
        assert refused(OPENAI, allowed=allowed).details == {"field": "embedding_model", "allowed": allowed}
    check(Choice(), allowed=["text-embedding-3-small"])


@pytest.mark.parametrize(("provider", "model"), [("ollama", "bge-m3:567m"), ("torch", "all-MiniLM-L6-v2@c9745ed")])
def test_an_entry_of_the_list_holds_for_all_sizes_and_revisions(provider: Provider, model: str) -> None:
    check(Choice(mode="local_cpu", provider=provider, model=model))
    check(Choice(mode="local_cpu", provider=provider, model=model), allowed=[model])
    other = Choice(mode="local_cpu", provider=provider, model=model[:-1])
    assert refused(other, allowed=[model]).details["field"] == "embedding_model"


def test_a_dimension_is_one_that_the_model_has() -> None:
    check(msgspec.structs.replace(OPENAI, dimension=256))
    assert refused(msgspec.structs.replace(OPENAI, dimension=3_073)).details["field"] == "embedding_dimension"
    own = msgspec.structs.replace(OPENAI, model="own")
    assert "must be set: 'own' is not known here" in refused(own, allowed=["own"]).message
    check(msgspec.structs.replace(own, dimension=64), allowed=["own"])


@pytest.mark.parametrize("name", ["n" * 201, "own\n", ""])
@pytest.mark.parametrize("dimension", [None, 64])
def test_a_name_that_no_model_can_have_is_named_as_what_is_wrong(name: str, dimension: int | None) -> None:
    error = refused(msgspec.structs.replace(OPENAI, model=name, dimension=dimension), allowed=[name])
    assert error.details["field"] == "embedding_model"
    assert "1 to 200 printable characters" in error.message


def test_a_ceiling_in_dollars_needs_a_price() -> None:
    own = msgspec.structs.replace(OPENAI, model="own", dimension=64, max_usd=1.0)
    assert refused(own, allowed=["own"]).details["field"] == "embedding_max_usd"
    check(msgspec.structs.replace(own, max_usd=None, max_tokens=1), allowed=["own"])
    for wrong in (float("nan"), float("inf"), -1.0):
        assert refused(msgspec.structs.replace(OPENAI, max_usd=wrong)).details["field"] == "embedding_max_usd"


def test_the_machine_that_calls_a_paid_provider_needs_its_key_and_no_other() -> None:
    check(OPENAI, Engines(keys={"openai": "sk-x"}), runs_here=True)
    error = refused(OPENAI, Engines(keys={"voyage": "pa-secret"}), runs_here=True)
    assert error.details["setting"] == "OPENAI_API_KEY"
    assert "pa-secret" not in error.message
    check(OPENAI)


@pytest.mark.parametrize("mode", ["local_cpu", "runpod_gpu"])
def test_a_question_goes_to_a_paid_provider_only_where_texts_may_leave_this_machine(mode: Mode) -> None:
    engines = Engines(keys={"openai": "sk-x"})
    check_question(OPENAI, engines, mode="external_api", allowed=CATALOG)
    with pytest.raises(InvalidRequest) as caught:
        check_question(OPENAI, engines, mode=mode, allowed=CATALOG)
    assert caught.value.details["setting"] == "MEMVID_EMBEDDING_MODE"


def test_a_question_is_embedded_by_an_allowed_model_or_not_at_all() -> None:
    choice = routing.choose("local_cpu", "ollama")
    check_question(choice, Engines(), mode="external_api", allowed=CATALOG)
    with pytest.raises(InvalidRequest):
        check_question(choice, Engines(), mode="external_api", allowed={"another"})


# --- tiers ---


@pytest.mark.parametrize(
    ("default", "speed", "quality"),
    [
        (Choice(), ("static", "wordllama-l2-supercat-256"), ("torch", "all-MiniLM-L6-v2")),
        (
            routing.choose("runpod_gpu"),
            ("static", "wordllama-l2-supercat-256"),
            ("torch", "all-MiniLM-L6-v2"),
        ),
        (OPENAI, ("openai", "text-embedding-3-small"), ("openai", "text-embedding-3-large")),
        (
            routing.choose("external_api", "voyage"),
            ("voyage", "voyage-3.5-lite"),
            ("voyage", "voyage-code-3"),
        ),
        (routing.choose("local_cpu", "ollama"), ("ollama", "all-minilm"), ("ollama", "nomic-embed-text")),
    ],
)
def test_a_tier_is_the_fast_or_the_good_model_of_the_mode_and_provider(
    default: Choice, speed: tuple[str, str], quality: tuple[str, str]
) -> None:
    tiers = [tier_of(default, "speed"), tier_of(default, "quality")]
    assert [(tier.mode, tier.provider, tier.model) for tier in tiers] == [
        (default.mode, *speed),
        (default.mode, *quality),
    ]
    for tier in tiers:
        check(tier)


def test_a_dimension_goes_along_only_with_a_model_that_has_it() -> None:
    default = msgspec.structs.replace(OPENAI, dimension=2_000, layout="static-v2")
    assert switch(default, model="text-embedding-3-small").dimension is None
    assert switch(msgspec.structs.replace(default, dimension=512), model="text-embedding-3-small").dimension == 512
    assert switch(default, "voyage").dimension is None
    assert switch(default, model="text-embedding-3-small").layout is None
    assert switch(default, dimension=1).layout == "static-v2"
