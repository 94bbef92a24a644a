"""Schemathesis over the OpenAPI document of a real server; prints a table, ends with 1 on a finding.

Cases fit the document or break it in one place; what is sent goes by routes that know some finished exports. Every
answer must be one that the document says: no 500, its status, content type, headers and body, bad input refused,
methods and keys checked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "control_plane"))
from live_server import KEY, Server, graph

HERE = Path(__file__).parent
METHOD_NOT_ALLOWED = 405


class Found(NamedTuple):
    """What came of a run."""

    seconds: float
    statuses: dict[str, Counter[str]]
    """By operation: how often each status was answered; ``503 CODE`` where it was that."""
    failures: list[str]
    """Each once."""
    said: str
    """What Schemathesis printed."""


@contextmanager
def exports_there(root: Path) -> Iterator[tuple[Server, list[str]]]:
    """A server with two finished exports and a canceled one, their ids, and the collection ``books``."""
    unlimited = {"MEMVID_MCP_RATE_LIMIT_PER_MINUTE": "1000000", "MEMVID_MCP_RATE_LIMIT_BURST": "1000000"}
    server = Server(root, env=unlimited, queue_capacity=100_000).start()
    try:
        ids = [server.submit(graph(name=name)) for name in ("one", "two")]
        for job_id in ids:
            server.wait(job_id)
        ids.append(server.submit(graph(name="three")))
        server.client.delete(f"/v1/exports/{ids[-1]}")
        for path, body in (("", {}), ("/documents/a", {"text": "one"})):
            server.client.put(f"/v1/collections/books{path}", json=body).raise_for_status()
        yield server, ids
    finally:
        server.close()


def run(server: Server, ids: list[str], folder: Path, *, cases: int, seed: int, phases: str = "") -> Found:
    """Send about so many cases, spread over the operations."""
    document = httpx.get(f"{server.url}/schema/openapi.json").raise_for_status().json()
    operations = [(path, method) for path, item in document["paths"].items() for method in item]
    events = folder / "events.ndjson"
    began = time.monotonic()
    done = subprocess.run(
        [
            *(
                Path(sys.executable).parent / "schemathesis",
                "--config-file",
                HERE / "schemathesis.toml",
                "run",
                f"{server.url}/schema/openapi.json",
            ),
            *("--header", f"Authorization: Bearer {KEY}", "--checks", "all", "--continue-on-failure"),
            # DELETE cancels an export; the export stays, and answers how it ended.
            *("--exclude-checks", "use_after_free"),
            *("--max-examples", str(max(1, cases // len(operations))), "--seed", str(seed)),
            *("--suppress-health-check", "all", "--generation-database", "none", "--no-color", "--warnings", "off"),
            *("--report", "ndjson", "--report-ndjson-path", events, "--request-timeout", "30"),
            *(("--phases", phases) if phases else ()),
        ],
        env={**os.environ, "SCHEMATHESIS_HOOKS": "openapi_hooks", "PYTHONPATH": str(HERE), "FUZZ_IDS": json.dumps(ids)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    statuses, failures = _read(events)
    if done.returncode not in (0, 1):  # 1: it has findings
        failures.append(f"schemathesis ended with {done.returncode}: {said[-1_000:]}")
    return Found(time.monotonic() - began, statuses, failures, said)


def _read(events: Path) -> tuple[dict[str, Counter[str]], list[str]]:
    """The statuses of each operation, and each failure once."""
    statuses: defaultdict[str, Counter[str]] = defaultdict(Counter)
    failures: dict[tuple[str, str], str] = {}
    with events.open() as lines:
        for line in lines:
            scenario = json.loads(line).get("ScenarioFinished")
            if scenario is None:
                continue
            recorder = scenario["recorder"]
            for case_id, interaction in recorder.get("interactions", {}).items():
                case = recorder["cases"][case_id]["value"]
                answer = interaction.get("response")
                label = f"{case['method']} {case['path']}"
                if case["method"] == "OPTIONS" or (answer and answer["status_code"] == METHOD_NOT_ALLOWED):
                    label = "methods that a path has not, and OPTIONS"
                statuses[label][str(answer["status_code"]) if answer else "no answer"] += 1
                if answer is None:
                    text = f"{label}: {case['method']}: no answer: the connection was cut, or nothing came in time"
                    failures.setdefault((label, "no answer"), f"{text}\n  {interaction['request']['uri']}")
                for check in recorder.get("checks", {}).get(case_id, []):
                    if check["status"] != "success":
                        failure = check["failure_info"]["failure"]
                        uri = urlsplit(interaction["request"]["uri"])
                        status = answer["status_code"] if answer else "no answer"
                        what = f"{case['method']}: {failure['title']}: {failure['message']}"
                        text = f"{label}: {what}\n  {uri.path}?{uri.query}: {status}"
                        failures.setdefault((label, failure["title"] + failure["message"][:60]), text[:1_500])
    return dict(statuses), list(failures.values())


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with exports_there(folder / "root") as (server, ids):
            sent, rounds = 0, []
            while sent < given.cases:
                left = given.cases - sent
                rounds.append(run(server, ids, folder, cases=left, seed=given.seed + len(rounds)))
                now = sum(sum(found.values()) for found in rounds[-1].statuses.values())
                if now == 0:
                    print(rounds[-1].said)
                    return 2
                sent += now
            faults = server.log.read_text(errors="replace").count('"level":"error"')
    statuses: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for found in rounds:
        for label, counts in found.statuses.items():
            statuses[label] += counts
    failures = {failure.partition("\n")[0]: failure for found in rounds for failure in found.failures}
    seconds = sum(found.seconds for found in rounds)
    print(f"{datetime.now(UTC):%Y-%m-%d}, seed {given.seed}: {sent:,} cases in {seconds:.0f} s\n")
    print("| operation | cases | answers | findings |")
    print("| --- | --- | --- | --- |")
    for label, counts in sorted(statuses.items()):
        answers = ", ".join(f"{count:,} × {status}" for status, count in counts.most_common())
        findings = sum(failure.startswith(f"{label}: ") for failure in failures)
        print(f"| {label} | {sum(counts.values()):,} | {answers} | {findings} |")
    print(f"\nErrors in the server's log: {faults}")
    for failure in failures.values():
        print(f"\n{failure}")
    return 1 if failures or faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
