"""What a worker understands as a job, and what it says of what it does not."""

from __future__ import annotations

from typing import Any

import pytest

from common.contract import EXPORT_SCHEMA, ExportOptions, Links, Source
from common.errors import InvalidRequest
from handler.job import MAX_ATTEMPT, decode_input, with_options

LEAST = {"job_id": "job", "payload_ref": "file:///payload", "output_prefix": "file:///out/1/"}


def test_a_job_needs_no_more_than_its_name_its_payload_and_its_place() -> None:
    job = decode_input(LEAST)
    assert (job.schema_version, job.attempt, job.options, job.links) == (EXPORT_SCHEMA, 1, {}, {})
    assert (job.payload_size, job.payload_sha256, job.timeout_seconds, job.source) == (None, None, None, None)


def test_all_that_a_job_may_say_is_taken_as_it_is_said() -> None:
    given: dict[str, Any] = {
        **LEAST,
        "job_id": "a.B_c-9" + "x" * 121,
        "attempt": MAX_ATTEMPT,
        "payload_size": 0,
        "payload_sha256": "Ab" * 32,
        "timeout_seconds": 0.5,
        "trace": f"00-{'0a' * 16}-{'0b' * 8}-01",
        "created_at": "2026-11-21T10:00:00.000Z",
        "options": {"maxNodeFrames": 1, "semanticEnabled": True},
        "source": {"baseName": "engine"},
        "links": {"file:///payload": {"get": "https://host/signed"}},
        "a field of a later version": 1,
    }
    job = decode_input(given)
    told = ("job_id", "attempt", "payload_size", "payload_sha256", "timeout_seconds", "trace", "created_at", "options")
    assert {name: getattr(job, name) for name in told} == {name: given[name] for name in told}
    assert job.source == Source(base_name="engine")
    assert job.links == {"file:///payload": Links(get="https://host/signed")}


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"job_id": 7}, "job_id", "job_id: expected `str`, got `int`"),
        ({"job_id": ""}, "job_id", "job_id must be letters, digits, dots, - and _, at most 128"),
        ({"job_id": "x" * 129}, "job_id", "at most 128"),
        ({"job_id": "job\n"}, "job_id", "at most 128"),
        ({"attempt": 0}, "attempt", "attempt must be a number from 1 to 1,000,000"),
        ({"attempt": MAX_ATTEMPT + 1}, "attempt", "1,000,000"),
        ({"attempt": 1.5}, "attempt", "expected `int`, got `float`"),
        ({"output_prefix": "file:///out/1"}, "output_prefix", "must be a ref that ends in /"),
        ({"payload_size": -1}, "payload_size", "must be a number of bytes"),
        ({"payload_sha256": "0" * 63}, "payload_sha256", "must be 64 hex digits"),
        ({"timeout_seconds": 0}, "timeout_seconds", "must be a number of seconds above 0"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds", "above 0"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds", "above 0"),
        ({"trace": "0a"}, "trace", "must be a W3C traceparent"),
        ({"created_at": "yesterday"}, "created_at", "must be a time in ISO 8601"),
        ({"schema_version": "v9" * 100}, "schema_version", f"schema_version '{'v9' * 50}' is not known here"),
        ({"source": {"baseName": 7}}, "source.baseName", "expected `str"),
        ({"links": {"a": {"get": 7}}}, "links[...].get", "expected `str"),
        ({"embedding_what": ["nodes", 7]}, "embedding_what[1]", "expected `str"),
        ({"options": {"colour": "red"}}, "options.colour", "options.colour is not an option"),
        ({"options": {"x" * 500: 1}}, f"options.{'x' * 100}", "is not an option"),
        ({"options": {"maxNodeFrames": "many"}}, "options.maxNodeFrames", "expected `int`, got `str`"),
        ({"options": {"maxNodeFrames": -1}}, "options.maxNodeFrames", "must be a whole number from "),
        ({"options": {"profile": "\ud800"}}, "options", "whole characters"),
        ({"options": {"maxNodeFrames": 10**30}}, "options.maxNodeFrames", "options.maxNodeFrames"),
        ({"ollama_host": "\ud800"}, "ollama_host", "whole characters"),
    ],
)
def test_what_is_wrong_with_a_job_is_said_with_the_name_of_the_field(
    changes: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode_input({**LEAST, **changes})
    assert caught.value.details["field"] == field
    assert says.lower() in caught.value.message.lower()
    assert len(caught.value.message) < 1_000


@pytest.mark.parametrize("missing", sorted(LEAST))
def test_a_field_that_is_missing_is_named(missing: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{missing}: .*missing") as caught:
        decode_input({name: value for name, value in LEAST.items() if name != missing})
    assert caught.value.details["field"] == missing


def test_options_that_are_nested_too_deeply_are_no_options() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRequest) as caught:
        decode_input({**LEAST, "options": {"profile": deep}})
    assert str(caught.value.details["field"]).startswith("options")


def test_options_of_a_job_replace_those_of_the_payload_and_no_others() -> None:
    options = ExportOptions(max_node_frames=7, profile="quick")
    changed = with_options(options, {"maxNodeFrames": 9, "semanticEnabled": True})
    assert (changed.max_node_frames, changed.semantic_enabled, changed.profile) == (9, True, "quick")
    assert options.max_node_frames == 7
    with pytest.raises(InvalidRequest, match="not an option") as caught:
        with_options(options, {"colour": "red"})
    assert "maxNodeFrames" in str(caught.value.details["allowed"])
