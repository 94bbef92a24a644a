"""Loaded by Schemathesis: gives the cases ids of exports that are there, so that they come further than a 404, and
looks at what its own checks do not know of."""

from __future__ import annotations

import json
import os
from typing import Any

import schemathesis
from schemathesis.core.parameters import ParameterLocation

IDS = json.loads(os.environ["FUZZ_IDS"])


@schemathesis.hook  # type: ignore[untyped-decorator]
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """Most of the ids and names that may be any text become known ones."""
    given = case.path_parameters or {}
    meta = case.meta
    if case.operation.label == "DELETE /v1/collections/{collection}":
        case.path_parameters["collection"] = "another"  # other operations go on with the known one
        return
    if meta is not None and meta.is_negative_at(ParameterLocation.PATH):
        return
    if "collection" in given:
        known = {"collection": "books", "doc_id": "a"}
        case.path_parameters.update({name: known[name] for name in given if len(str(given[name])) % 4})
    if "job_id" in given:
        turn = sum(str(given["job_id"]).encode()) % (len(IDS) + 1)
        if turn < len(IDS):
            case.path_parameters["job_id"] = IDS[turn]


@schemathesis.check  # type: ignore[untyped-decorator]
def refused_messages(_context: Any, response: Any, case: Any) -> None:
    """A JSON-RPC message that breaks its schema has an error for an answer, or none where it asks for none."""
    wrong = case.meta is not None and case.meta.is_negative_at(ParameterLocation.BODY)
    if wrong and case.operation.label == "POST /mcp" and response.status_code == 200:
        assert "error" in response.json(), "a message that breaks the schema was answered with a result"


@schemathesis.check  # type: ignore[untyped-decorator]
def stated_503(_context: Any, response: Any, _case: Any) -> None:
    """A 503 says its code, and when to come again."""
    if response.status_code == 503:
        assert response.json()["error"]["code"] not in ("", "INTERNAL")
        assert int(response.headers["retry-after"][0]) >= 1
