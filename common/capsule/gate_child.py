"""The process that reads capsules back: ``python -m common.capsule.gate_child``, one JSON plan a line on stdin."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import memvid_sdk
import msgspec

from common.capsule.cli import COMMAND, run
from common.capsule.gate import GateAnswer, GatePlan

HITS = 100
"""A probe's frame must be among this many hits: relation frames that name a symbol can come before it."""
SAME_VECTOR = 1e-4
"""Largest distance of a vector from itself after the way through float32 and JSON."""


class _ProbeFailedError(Exception):
    def __init__(self, probe: str, message: str) -> None:
        super().__init__(message)
        self.probe = probe


def _expect(held: bool, probe: str, message: str) -> None:
    if not held:
        raise _ProbeFailedError(probe, message)


def _check_sdk(plan: GatePlan) -> int:
    memvid_sdk.verify_single_file(plan.path)
    memory = memvid_sdk.use("basic", plan.path, mode="open", enable_vec=plan.vectors > 0, read_only=True)
    try:
        stats = memory.stats()
        count = stats["active_frame_count"]
        _expect(
            count == plan.frames or (not plan.exact and count > plan.frames),
            "frame_count",
            f"it holds {count} frames, {plan.frames} were written",
        )
        for frame in plan.frame_probes:
            found = memory.frame(frame.uri)
            for key in ("title", "track", "tags"):
                _expect(found[key] == getattr(frame, key), f"frame:{key}", f"{frame.uri} has another {key}")
            _expect(memory.blob(frame.uri) == frame.text.encode(), "frame:text", f"{frame.uri} has another text")
        for probe in plan.word_probes:
            hits = memory.find(probe.word, k=HITS, mode="lex", snippet_chars=80)["hits"]
            _expect(
                any(hit["uri"] == probe.uri for hit in hits), "lexical", f"the word {probe.word!r} misses {probe.uri}"
            )
        for vector in plan.vector_probes:
            hits = memory.find("", k=5, mode="sem", query_embedding=vector.values, snippet_chars=80)["hits"]
            _expect(any(hit["uri"] == vector.uri for hit in hits), "vector", f"{vector.uri} is not nearest to itself")
    finally:
        memory.close()
    return 2 + len(plan.frame_probes) + len(plan.word_probes) + len(plan.vector_probes)


def _check_cli(plan: GatePlan) -> int:
    report = run("verify", plan.path)
    _expect("Overall: Passed" in report, "verify", report.strip().splitlines()[-1][:300])
    counted = re.match(r"(\d+) total", json.loads(run("stats", plan.path, "--json"))["summary"]["frames"])
    count = int(counted[1]) if counted else -1
    _expect(count >= plan.frames, "frame_count", f"it holds {count} frames, {plan.frames} were written")
    for frame in plan.frame_probes:
        shown: dict[str, Any] = json.loads(
            run("view", plan.path, "--uri", frame.uri, "--json", "--page-size", "1000000")
        )
        _expect(frame.text in str(shown.get("content")), "frame:text", f"{frame.uri} has another text")
    for probe in plan.word_probes:
        found = run("find", plan.path, "--query", probe.word, "--mode", "lex", "--top-k", str(HITS), "--json")
        hits = json.loads(found[found.index("{") :])["hits"]
        _expect(any(hit["uri"] == probe.uri for hit in hits), "lexical", f"the word {probe.word!r} misses {probe.uri}")
    return 2 + len(plan.frame_probes) + len(plan.word_probes)


def check(plan: GatePlan) -> GateAnswer:
    """Run all probes of a plan."""
    try:
        probes = _check_sdk(plan) if plan.reader == "sdk" else _check_cli(plan)
    except _ProbeFailedError as error:
        return GateAnswer(probe=error.probe, message=str(error), probes=0)
    except (memvid_sdk.MemvidError, OSError, KeyError, ValueError) as error:
        return GateAnswer(probe="open", message=f"{type(error).__name__}: {error}"[:500], probes=0)
    except subprocess.SubprocessError as error:
        return GateAnswer(probe=COMMAND, message=str(error)[:500], probes=0)
    return GateAnswer(probe=None, message="", probes=probes)


def main() -> None:
    """Serve plans until stdin ends."""
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(msgspec.json.encode(check(msgspec.json.decode(line, type=GatePlan))) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
