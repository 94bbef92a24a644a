"""Collections for the page, with documents that resemble each other as much as their angles say."""

from __future__ import annotations

import math
import time
from typing import Any

import httpx
from browsing import DONE, KEY

TEXTS = {
    "lease": "The lease agreement between the landlord and {0} is under the jurisdiction of the court; the tenant has "
    "the liability for damage, and the clause on arbitration binds both.",
    "invoice": "The invoice to {0} is due in thirty days; revenue, tax and the payable balance are in the ledger, as "
    "write_ledger in src/ledger.py has it.",
    "payroll": "The payroll of {0} lists each employee with salary, overtime and annual leave for the month.",
    "runbook": "The backend of {0} runs in docker; the database endpoint is in config.yaml, and latency is watched.",
    "letter": "Dear friends of {0}, the garden is open again from spring to autumn, and there is tea.",
}
PAPERS = {  # degrees
    "lease/acme": 0,
    "lease/borealis": 6,
    "lease/cedar": -9,
    "invoice/acme": 12,
    "invoice/dune": 17,
    "payroll/acme": -15,
    "runbook/ember": 24,
    "letter/grove": -28,
    "invoice/fjord": 33,
    "letter/harbor": 60,
    "runbook/iris": 170,
}
ARCHIVE = {"lease/acme": 3, "payroll/dune": -21, "runbook/ember": 38, "letter/cedar": -36}


def client_of(url: str, key: str = KEY) -> httpx.Client:
    """With a key of the server."""
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def put(client: httpx.Client, collection: str, documents: list[dict[str, Any]], **settings: object) -> None:
    """A collection with documents in it."""
    client.put(f"/v1/collections/{collection}", json=settings).raise_for_status()
    if documents:
        answer = client.post(f"/v1/collections/{collection}/documents", json={"documents": documents})
        assert answer.is_success, answer.text


def settled(client: httpx.Client, *collections: str) -> None:
    """Wait until the graph has all of them."""
    end = time.monotonic() + DONE / 1_000
    for collection in collections:
        while client.get(f"/v1/collections/{collection}").raise_for_status().json()["sync"]["pending"]:
            assert time.monotonic() < end
            time.sleep(0.05)


def office_papers(client: httpx.Client) -> None:
    """Two collections of one space, and one whose texts are embedded; all in the graph."""
    for collection, angles in (("papers", PAPERS), ("archive", ARCHIVE)):
        put(client, collection, [_paper(name, angle) for name, angle in angles.items()], dimension=2, model="compass")
    notes = [
        {"id": f"{kind}-{party}", "text": text.format(party.title())}
        for kind, text in TEXTS.items()
        for party in ("acme", "dune")
    ]
    put(client, "notes", notes)
    settled(client, "papers", "archive", "notes")


def _paper(name: str, angle: float) -> dict[str, Any]:
    kind, _, party = name.partition("/")
    return {
        "id": name,
        "title": f"{kind.title()} of {party.title()}",
        "text": TEXTS[kind].format(party.title()),
        "vector": [math.cos(math.radians(angle)), math.sin(math.radians(angle))],
        "docType": kind,
        "payload": {"party": party, "degrees": angle},
    }
