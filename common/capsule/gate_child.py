"""The process that reads capsules back: ``python -m common.capsule.gate_child``, a plan a message."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import memvid_sdk
import msgspec

from common.capsule.cli import COMMAND, run
from common.capsule.gate import FrameDigest, GateAnswer, GatePlan
from common.capsule.native import native
from common.capsule.process import serve
from common.capsule.reader import CapsuleReader
from common.errors import CapsuleUnreadable

HITS = 100
"""A probe's frame must be among this many hits: relation frames that name a symbol can come before it."""


class _ProbeFailedError(Exception):
    def __init__(self, probe: str, message: str) -> None:
        super().__init__(message)
        self.probe = probe


def _expect(held: bool, probe: str, message: str) -> None:
    if not held:
        raise _ProbeFailedError(probe, message)


def _pages(memory: Any, uri: str) -> str:
    """The text of a document that memvid cut into chunk frames."""
    pages: list[str] = []
    try:
        while True:
            pages.append(memory.blob(f"{uri}#page-{len(pages) + 1}").decode())
    except memvid_sdk.FrameNotFoundError:
        return "".join(pages)


def _letters(text: str) -> str:
    """What memvid's normalising leaves of a text, whatever it does to white space."""
    kept = (char for char in unicodedata.normalize("NFKC", text) if unicodedata.category(char) != "Cc")
    return "".join("".join(kept).split())


def _document(uri: str) -> str:
    return uri.partition("#page-")[0]


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
            text: bytes = memory.blob(frame.uri)
            same = text == frame.text.encode()
            if not plan.exact and not text:
                same = _letters(_pages(memory, frame.uri)) == _letters(frame.text)
            _expect(same, "frame:text", f"{frame.uri} has another text")
        for probe in plan.word_probes:
            hits = memory.find(probe.word, k=HITS, mode="lex", snippet_chars=80)["hits"]
            held = any(_document(hit["uri"]) == _document(probe.uri) for hit in hits)
            _expect(held, "lexical", f"the word {probe.word!r} misses {probe.uri}")
        for vector in plan.vector_probes:
            hits = memory.find("", k=5, mode="sem", query_embedding=vector.values, snippet_chars=80)["hits"]
            _expect(any(hit["uri"] == vector.uri for hit in hits), "vector", f"{vector.uri} is not nearest to itself")
    finally:
        memory.close()
    return 2 + len(plan.frame_probes) + len(plan.word_probes) + len(plan.vector_probes)


def _check_all(plan: GatePlan) -> int:
    """Compare every frame and every vector with what was written; memvid checks no hash of theirs when it reads."""
    with CapsuleReader(Path(plan.path)) as reader:
        if plan.exact:
            reader.verify()
        digest = FrameDigest()
        for batch in reader.all_frames():
            digest.add((frame.uri, frame.title, frame.track, frame.tags, frame.text) for frame in batch)
        _expect(digest.hexdigest() == plan.frames_sha256, "frames", "it does not hold the frames that were written")
        vectors = reader.vectors()
        found = hashlib.sha256(vectors[1].data if vectors else b"").hexdigest()
        _expect(found == plan.vectors_sha256, "vectors", "it does not hold the vectors that were written")
    return 2


def _check_cli(plan: GatePlan) -> int:
    report = run("verify", plan.path)
    said = report.strip().rpartition("\n")[2][:300] or "it was not said to be whole"
    _expect("Overall: Passed" in report, "verify", said)
    counted = re.match(r"(\d+) total", json.loads(run("stats", plan.path, "--json"))["summary"]["frames"])
    count = int(counted[1]) if counted else -1
    _expect(count >= plan.frames, "frame_count", f"it holds {count} frames, {plan.frames} were written")
    for frame in plan.frame_probes:
        shown: dict[str, Any] = json.loads(
            run("view", plan.path, "--uri", frame.uri, "--json", "--page-size", "1000000")
        )
        same = _letters(frame.text) in _letters(str(shown.get("content")))
        _expect(same, "frame:text", f"{frame.uri} has another text")
    for probe in plan.word_probes:
        found = run("find", plan.path, "--query", probe.word, "--mode", "lex", "--top-k", str(HITS), "--json")
        hits = json.loads(found[found.index("{") :])["hits"]
        _expect(any(hit["uri"] == probe.uri for hit in hits), "lexical", f"the word {probe.word!r} misses {probe.uri}")
    return 2 + len(plan.frame_probes) + len(plan.word_probes)


def check(plan: GatePlan) -> GateAnswer:
    """Run all probes of a plan."""
    try:
        if native is not None and plan.frames_sha256 is not None:
            with ThreadPoolExecutor(1) as beside:
                all_of_it = beside.submit(_check_all, plan)
                probes = _check_sdk(plan) + all_of_it.result()
        else:
            probes = _check_sdk(plan) if plan.reader == "sdk" else _check_cli(plan)
    except CapsuleUnreadable as error:
        return GateAnswer(probe="checksum", message=error.message, probes=0)
    except _ProbeFailedError as error:
        return GateAnswer(probe=error.probe, message=str(error), probes=0)
    except (memvid_sdk.MemvidError, OSError, KeyError, ValueError) as error:
        return GateAnswer(probe="open", message=f"{type(error).__name__}: {error}"[:500], probes=0)
    except subprocess.SubprocessError as error:
        return GateAnswer(probe=COMMAND, message=str(error)[:500], probes=0)
    return GateAnswer(probe=None, message="", probes=probes)


def _answer(message: bytes) -> bytes:
    return msgspec.msgpack.encode(check(msgspec.msgpack.decode(message, type=GatePlan)))


if __name__ == "__main__":
    serve(_answer)
