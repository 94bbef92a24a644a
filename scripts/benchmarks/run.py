"""``scripts/bench``: every figure with what it is compared with, the goal, and the peer's version."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
sys.path.insert(0, str(ROOT))
os.environ.update(MEMVID_TELEMETRY="0", MEMVID_OFFLINE="1", PYTHONPATH=str(ROOT))

from common.capsule.native import NativeWriter  # noqa: E402
from common.frames.model import Frame  # noqa: E402
from common.sidecar.build import SidecarBuilder  # noqa: E402
from scripts.benchmarks import nexus as sync  # noqa: E402
from scripts.benchmarks.control_plane import cold_start, files, overhead, servers  # noqa: E402
from scripts.benchmarks.embedding import compare, static_rate  # noqa: E402
from scripts.benchmarks.frames import DIMENSION, SHARED, real_frames, store, stored  # noqa: E402
from scripts.benchmarks.reading import CLIENTS, PACE, Times, measure, synthetic  # noqa: E402
from scripts.benchmarks.retrieval import evaluate  # noqa: E402
from scripts.benchmarks.storage import HASHED, ratio, transfer_rates  # noqa: E402
from scripts.benchmarks.vector_cache import engine, largest, rates, repeats, times_faster  # noqa: E402

TODAY_SECONDS = 282.5
"""Today's service for runpod-python, measured on 2 cores (7,542 frames, 68.7 MB)."""


Row = dict[str, Any]


def row(
    name: str,
    value: float,
    unit: str,
    note: str = "",
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Row:
    """One figure, its goal and whether it is reached."""
    goal, reached = "", None
    if at_most is not None:
        goal, reached = f"≤ {at_most:,g}", value <= at_most
    if at_least is not None:
        goal, reached = f"≥ {at_least:,g}", value >= at_least
    return {"name": name, "value": value, "unit": unit, "goal": goal, "reached": reached, "note": note}


def write(folder: Path, *, short: bool) -> list[Row]:
    """Native writer against memvid-sdk's put_many: the same frames and vectors, in turn."""
    count, peer_count, rounds = (2_000, 25, 1) if short else (20_000, 100, 5)
    batches = list(stored(*store(folder, count)))
    pairs = [pair for batch, vectors in batches for pair in zip(batch, vectors, strict=True)][:peer_count]
    ours, theirs = [], []
    for turn in range(rounds):
        path = folder / "ours.mv2"
        path.unlink(missing_ok=True)
        started = time.perf_counter()
        writer = NativeWriter().open(
            path, timestamp=1_767_312_000, model="benchmark", dimension=DIMENSION, expected_frames=count
        )
        for batch, vectors in batches:
            writer.add(batch, vectors)
        writer.finish()
        ours.append(count / (time.perf_counter() - started))
        theirs.append(peer_count / _put_many(folder / f"theirs-{turn}.mv2", pairs))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    what = f"write {count:,} frames with lexical index and {DIMENSION}-d vectors"
    peer = f"put_many of {version('memvid-sdk')}, {peer_count} of the same frames"
    return [
        row(what, statistics.median(ours), "frames/s", f"native writer, median of {rounds}", at_least=40_000),
        row("the same through memvid-sdk", statistics.median(theirs), "frames/s", f"{peer}, median of {rounds}"),
        row("ratio", ratio, "times", "turn by turn", at_least=1_500),
    ]


def _put_many(path: Path, pairs: list[tuple[Frame, NDArray[np.float32]]]) -> float:
    """Seconds that memvid-sdk takes for frames with their vectors."""
    import memvid_sdk

    started = time.perf_counter()
    memory = memvid_sdk.create(str(path), enable_vec=True)
    for start in range(0, len(pairs), 25):  # above some 25 frames a call it loses vectors, above 512 it hangs
        documents = [
            {
                "title": frame.title,
                "label": frame.kind,
                "text": frame.text,
                "uri": frame.uri,
                "tags": frame.tags,
                "metadata": json.loads(frame.extra),
            }
            for frame, _ in pairs[start : start + 25]
        ]
        memory.put_many(documents, embeddings=[vector.tolist() for _, vector in pairs[start : start + 25]])
    memory.close()
    return time.perf_counter() - started


def growth(folder: Path, *, short: bool) -> list[Row]:
    """Time, memory and size from 10,000 to 170,000 frames, each written again and again by processes of their own."""
    counts, rounds = ([1_000, 4_000], 2) if short else ([10_000, 40_000, 170_000], 5)
    rows, seconds = [], {}
    for count in counts:
        frames_path, vectors_path = store(folder, count)
        out = folder / f"growth-{count}.mv2"
        command = [
            sys.executable,
            ROOT / "scripts/benchmarks/write_once.py",
            frames_path,
            vectors_path,
            out,
            str(count),
        ]
        runs, digests = [], set()
        for _ in range(rounds):
            out.unlink(missing_ok=True)
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout))
            digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
        if len(digests) != 1:
            raise SystemExit(f"{count} frames gave {len(digests)} different files in {rounds} runs")
        seconds[count] = statistics.median(run["seconds"] for run in runs)
        peak = max(run["peak_bytes"] for run in runs)
        goal = count == 170_000
        rate = f"{count / seconds[count]:,.0f} frames/s, streamed from a file, median of {rounds}"
        vectors = f"{count * DIMENSION * 4 / 1e6:,.0f} MB of it vectors; byte-equal in {rounds} runs"
        rows += [
            row(f"write {count:,} frames", seconds[count], "s", rate, at_most=5 if goal else None),
            row("  peak memory", peak / 1e6, "MB", "of the writing process", at_most=1_000 if goal else None),
            row("  file", runs[0]["file_bytes"] / 1e6, "MB", vectors, at_most=420 if goal else None),
        ]
    rows.append(_first_result(out))
    exponent = math.log(seconds[counts[-1]] / seconds[counts[0]]) / math.log(counts[-1] / counts[0])
    return [*rows, row(f"growth exponent {counts[0]:,} → {counts[-1]:,}", exponent, "", at_most=1.05)]


def _first_result(capsule: Path) -> Row:
    import memvid_sdk

    times = []
    for _ in range(5):
        started = time.perf_counter()
        memory = memvid_sdk.use("basic", str(capsule), read_only=True, enable_vec=True)
        hits = memory.find("handler", k=10, mode="lex")["hits"]
        times.append(time.perf_counter() - started)
        memory.close()
        if not hits:
            raise SystemExit("the search found nothing")
    return row("  open to the first search result", statistics.median(times), "s", "memvid-sdk, lexical", at_most=0.7)


def sidecar(folder: Path, *, short: bool) -> list[Row]:
    """Building the sidecar alone."""
    count, rounds = (5_000, 1) if short else (50_000, 5)
    frames = list(itertools.islice(real_frames(), count))
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        builder = SidecarBuilder(folder / "bench.sqlite")
        for start in range(0, count, 512):
            builder.add(frames[start : start + 512], start, 0)
        builder.finish("0" * 64)
        rates.append(_rows(folder / "bench.sqlite") / (time.perf_counter() - started))
    note = f"rows of all tables, {count:,} frames, median of {rounds}"
    return [row("sidecar", statistics.median(rates), "rows/s", note, at_least=100_000)]


def _rows(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return sum(database.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0] for table in tables)  # noqa: S608


def storage(folder: Path, *, short: bool) -> list[Row]:
    """Our storage, sizes and SHA-256 checked, against plain boto3 in turn, on an S3 server of this machine."""
    rows = []
    for megabytes, rounds in [(20, 2)] if short else [(64, 5), (400, 5)]:
        found = transfer_rates(folder / f"{megabytes}", megabytes, rounds)
        for ours, theirs, what in (("put", "upload_file", "upload"), ("local", "download_file", "download")):
            size, of = f"{megabytes} MB", f"median of {rounds}"
            peer = f"boto3 {version('boto3')}, {theirs}, {of}"
            rows += [
                row(f"{what} {size}", statistics.median(found[ours]), "MB/s", f"{ours}, SHA-256 checked, {of}"),
                row(f"  {what} {size} by plain boto3", statistics.median(found[theirs]), "MB/s", peer),
                row(f"  ratio, {what} {size}", ratio(found, ours, theirs), "times", "turn by turn"),
            ]
        note = "the file's SHA-256 has to be found first"
        rows.append(row(f"  ratio, upload {megabytes} MB unhashed", ratio(found, HASHED, "upload_file"), "times", note))
    return rows


def cache(folder: Path, *, short: bool) -> list[Row]:
    """The vector cache: its rates, and a repeat export with 1% of the nodes changed."""
    rows, count = [], 2_000 if short else 170_000
    for place, found in rates(folder / "rates", count).items():
        note = f"{count:,} vectors of {DIMENSION} values, {found.megabytes:,.0f} MB"
        rows += [
            row(f"vector cache, {place}: put and flush", found.put, "vectors/s", note),
            row(f"vector cache, {place}: get", found.get, "vectors/s", "by another instance, in the same order"),
        ]
    graph = largest(short=short)
    for name in ["static"] if short else ["static", "torch"]:
        embedder = engine(name)
        if embedder is None:
            continue
        rounds = 5 if name == "static" and not short else 1
        goal = 10 if name == "torch" else None  # static vectors are made about as fast as they are read
        texts, first, places = repeats(folder / name, embedder, graph, rounds)
        of = f"{graph.name.partition('.')[0]}, {texts:,} texts, {embedder.model.name}, {embedder.model.layout}"
        rows.append(row(f"embed with an empty cache: {name}", first, "s", f"{of}, SQLite"))
        for place, found in places.items():
            share, again = min(one.share for one in found), statistics.median(one.again for one in found)
            what = f"  1% of nodes changed, {place}"
            rows += [
                row(f"{what}: from the cache", share, "%", f"least of {rounds}", at_least=95),
                row(f"{what}: embed", again, "s", f"median of {rounds}, read and write included"),
                row(f"{what}: times faster", times_faster(found), "times", "than without a cache", at_least=goal),
            ]
    return rows


def embedding(folder: Path, *, short: bool) -> list[Row]:
    """The engines that run here; the torch engine against sentence-transformers, in turn."""
    rates = static_rate(short=short)
    rows = [row("static embedding", statistics.median(rates), "texts/s", f"median of {len(rates)}", at_least=5_000)]
    if not all(importlib.util.find_spec(name) for name in ("torch", "sentence_transformers")):
        return rows
    for found in compare(folder, short=short):
        shape, seconds = found.shape, statistics.median(found.ours)
        on_gpu, minilm = found.device != "CPU", not shape.kind
        how = "padding-free" if found.packed else "padded"
        of = f"{shape.texts:,} texts of {found.tokens_per_text:.0f} tokens, {found.precision}, {how}, {found.device}"
        peer = f"encode of {version('sentence-transformers')}, batches of {found.batch} (its best)"
        theirs = shape.peer_texts / statistics.median(found.theirs)
        goal = (5 if minilm else None) if on_gpu else 1
        far, near = "the farthest of 1,000 texts, same precision", 10 if found.precision == "float32" else 500
        rows += [
            row(f"torch embedding: {shape.name}", seconds, "s", of, at_most=3 if on_gpu and minilm else None),
            row("  texts", shape.texts / seconds, "texts/s", f"median of {len(found.ours)}"),
            row("  the same by sentence-transformers", theirs, "texts/s", peer),
            row("  ratio to sentence-transformers", found.ratio, "times", "turn by turn", at_least=goal),
            row("  tokens", shape.texts * found.tokens_per_text / seconds, "tokens/s"),
            row("  arithmetic", found.flops / 1e12, "TFLOP/s"),
            row("  1 − cosine to sentence-transformers", 1e6 * (1 - found.cosine), "millionths", far, at_most=near),
            row("  device idle", 100 * (1 - found.busy), "%", "of the phase", at_most=10 if on_gpu else None),
        ]
        if found.peak is not None:
            base = shape.name == "shape of bge-base"
            rows.append(row("  share of peak", 100 * found.peak, "%", found.device, at_least=50 if base else None))
    return rows


class Posted(NamedTuple):
    """A graph to post."""

    name: str
    path: Path
    semantic: bool
    seconds: float
    """The goal."""


def service(folder: Path, *, short: bool) -> list[Row]:
    """POST to download_ready over HTTP, with the server up: gate and sidecar are inside."""
    graphs = [
        Posted("runpod-python", SHARED / "runpod-python.export.json.gz", False, 1),
        Posted("litestar", SHARED / "litestar.export.json.gz", True, 7),
    ]
    graphs = [graph for graph in graphs if graph.path.exists()]
    if short or not graphs:
        graphs = [Posted("the example", ROOT / "examples/memvid-export.graph.ndjson.gz", False, 1)]
    environment = {
        **os.environ,
        "MEMVID_EXPORT_BIND_ADDR": "127.0.0.1:0",
        "MEMVID_EXPORT_ROOT": str(folder / "root"),
        "MEMVID_EMBED_CACHE": "off",  # each round embeds everything
    }
    command = [ROOT / ".venv/bin/memvid-export", "serve", "--dev"]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=_listening(folder / "server.log", server), timeout=120) as client:
            return [figure for graph in graphs for figure in _over_http(client, graph, rounds=2 if short else 5)]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def _listening(log: Path, server: subprocess.Popen[bytes]) -> str:
    for _ in range(300):
        for line in log.read_text().splitlines():
            if line.startswith("memvid-export listens on "):
                time.sleep(3)  # the first worker imports meanwhile
                return line.rpartition(" ")[2]
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")


def _over_http(client: httpx.Client, graph: Posted, *, rounds: int) -> list[Row]:
    body = gzip.decompress(graph.path.read_bytes())
    if graph.semantic:
        request = json.loads(body)
        request["options"]["semanticEnabled"] = True
        body = json.dumps(request).encode()
    headers = {"Content-Type": "application/x-ndjson" if "ndjson" in graph.path.name else "application/json"}
    accepted, ready, reports = [], [], []
    for _ in range(rounds):
        started = time.perf_counter()
        job = client.post("/v1/exports", content=body, headers=headers).raise_for_status().json()["jobId"]
        accepted.append(time.perf_counter() - started)
        with client.stream("GET", f"/v1/exports/{job}/events/stream") as stream:
            last = [line for line in stream.iter_lines() if line.startswith("event:")][-1]
        ready.append(time.perf_counter() - started)
        if not last.endswith("job_completed"):
            raise SystemExit(f"{graph.name}: {last}: {client.get(f'/v1/exports/{job}').text}")
        reports.append(client.get(f"/v1/exports/{job}/report").json())
        time.sleep(1)
    small = graph.name == "runpod-python"
    frames = f"{reports[0]['capsule']['frames']:,} frames{', static vectors' if graph.semantic else ''}"
    size, beside = (max(report[kind]["sizeBytes"] for report in reports) / 1e6 for kind in ("capsule", "sidecar"))
    peak = max(report["peakMemoryBytes"] for report in reports) / 1e6
    value = statistics.median(ready)
    rows = [
        row(
            f"POST to download_ready: {graph.name} ({frames})",
            value,
            "s",
            f"median of {rounds}, {len(body) / 1e6:.1f} MB posted",
            at_most=graph.seconds,
        ),
        row("  POST to 202", statistics.median(accepted), "s", at_most=0.3),
        row("  capsule", size, "MB", at_most=7 if small else None),
        row("  sidecar", beside, "MB"),
        row("  peak memory of the worker", peak, "MB"),
    ]
    if small:
        note = f"today's service: {TODAY_SECONDS} s on 2 cores, measured before, not in this run"
        rows.insert(1, row("  times faster than today", TODAY_SECONDS / value, "times", note, at_least=280))
    return rows


def control_plane(folder: Path, *, short: bool) -> list[Row]:
    """What a job on a local Runpod takes beside its run."""
    jobs = 3 if short else 60
    places = {"SQLite, files": files} if short else {"SQLite, files": files, "PostgreSQL, S3": servers}
    rows = []
    for name, place in places.items():
        with place(folder / place.__name__) as where:
            for told, hooks, poll in (("webhooks, polls every 5 s", True, 5.0), ("polls every 1 s", False, 1.0)):
                found = overhead(folder / "work", where, jobs=jobs, hooks=hooks, poll=poll)
                note = f"median of {jobs} tiny jobs in turn, a worker that takes no time"
                rows += [
                    row(f"POST to submitted: {name}, {told}", statistics.median(found.submitted), "s", note),
                    row("  p95", _p95(found.submitted), "s"),
                    row(
                        "  result to download_ready",
                        statistics.median(found.ready),
                        "s",
                        "as a streaming client sees it",
                    ),
                    row("  p95", _p95(found.ready), "s"),
                    row("  polls per job", found.polls, ""),
                ]
    times = [cold_start(folder / f"cold{number}") for number in range(1 if short else 5)]
    note = f"median of {len(times)}, a worker of a local Runpod without a GPU"
    return [*rows, row("cold start of a worker to its first job", statistics.median(times), "s", note, at_most=5)]


def reading(folder: Path, *, short: bool) -> list[Row]:
    """The read tools of a server, over HTTP: alone, by many at a pace, and by many back to back."""
    graphs = {"synthetic": synthetic(*((2_000, 4_800) if short else (50_000, 120_000)))}
    litestar = SHARED / "litestar.export.json.gz"
    if litestar.exists() and not short:
        graphs["litestar"] = json.loads(gzip.decompress(litestar.read_bytes()))
        graphs["litestar"]["options"]["semanticEnabled"] = True
    rows = []
    for name, graph in graphs.items():
        found = measure(folder / name, graph, count=64 if short else 2_000)
        of = f"{found.nodes:,} nodes, {found.relationships:,} relationships"
        for tool in found.tools:
            rows += [
                _asked(f"{tool.tool}: {name}, {CLIENTS} clients back to back", tool.crowd, tool.goal),
                _asked(f"  {CLIENTS} clients, {PACE:.0f} questions/s each", tool.paced, tool.goal),
                _asked("  alone", tool.alone, tool.goal),
            ]
        more = f"{of}, static vectors; {found.before:,.0f} MB before the first question"
        rows.append(row(f"memory for questions: {name}", found.after - found.before, "MB", more, at_most=300))
    return rows


def _asked(name: str, times: Times, goal: float) -> Row:
    note = f"p95 of {len(times.seconds):,}; p50 {times.at(0.5):.1f}, p99 {times.at(0.99):.1f}; {times.rate:,.0f}/s"
    return row(name, times.at(0.95), "ms", note, at_most=goal)


RETRIEVAL_GOALS = {
    "runpod-python": {"hybrid, static": 75, "hybrid, MiniLM": 77},
    "litestar": {"hybrid, static": 52, "hybrid, MiniLM": 58},
}


def retrieval(folder: Path, *, short: bool, graphs: list[Path] | None = None) -> list[Row]:
    """Docstrings as questions: how early the symbol comes that each was taken from."""
    if not graphs:
        example = ROOT / "examples/memvid-export.graph.ndjson.gz"
        real = [SHARED / "runpod-python.graph.json.gz", SHARED / "litestar.export.json.gz"]
        graphs = [example] if short else [*(path for path in real if path.exists()), example]
    embedders = {"static": engine("static"), "MiniLM": None if short else engine("torch")}
    rows = []
    for graph in graphs:
        name = graph.name.partition(".")[0]
        running = {kind: embedder for kind, embedder in embedders.items() if embedder is not None}
        for found in evaluate(graph, folder, running, most=60 if short else None):
            whole, library = found.everything, found.library
            note = (
                f"NDCG@10; recall@10 {100 * whole.recall:.1f}, MRR {100 * whole.reciprocal_rank:.1f}; "
                f"library only: NDCG@10 {100 * library.ndcg:.1f}; {found.questions:,} questions"
            )
            goal = RETRIEVAL_GOALS.get(name, {}).get(found.system)
            rows.append(row(f"{name}: {found.system}", 100 * whole.ndcg, "%", note, at_least=goal))
    return rows


def _p95(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def nexus(folder: Path, *, short: bool, documents: list[int] | None = None) -> list[Row]:
    """Collections and their graph: the embedded one, or the Nexus server that MEMVID_NEXUS_URL names."""
    count, rate, held = (40, 20, 200) if short else (3_000, 50, 10_000)
    graph = "Nexus" if os.environ.get("MEMVID_NEXUS_URL") else "embedded graph"
    found = sync.inserts(folder / "inserts", count=count, rate=rate, held=held)
    note = f"{graph}, {count:,} each way at {rate}/s over {held:,} documents"
    median = {on: sync.percentile(times, 0.5) for on, times in ((True, found.with_sync), (False, found.without))}
    late = {on: sync.percentile(times, 0.99) for on, times in ((True, found.with_sync), (False, found.without))}
    in_time = 100 * sum(seconds <= 5 for seconds in found.out) / len(found.out)
    rows = [
        row("insert with sync: added, median", 1e3 * (median[True] - median[False]), "ms", note, at_most=2),
        row("insert with sync: p99", 1e3 * late[True], "ms", f"without {1e3 * late[False]:.1f} ms", at_most=10),
        row("inserts that the graph has within 5 s", in_time, "%", note, at_least=99),
        row("lag, insert to event of its sync: p99", sync.percentile(found.out, 0.99), "s", note, at_most=1),
        row("lag, webhook to payload: p99", sync.percentile(found.back, 0.99), "s", note, at_most=1),
    ]
    sizes = sorted(documents or ((500, 1_000) if short else (10_000, 100_000)))
    times = {}
    for size in sizes:
        bulk = sync.bulk(folder / f"bulk-{size}", size)
        times[size] = bulk.synced
        rows += [
            row(f"{size:,} documents accepted", bulk.accepted, "s", f"batches of {sync.BATCH:,}, {graph}"),
            row(f"{size:,} documents in the graph", bulk.synced, "s", f"{bulk.pairs:,} pairs, {graph}"),
            row(f"{size:,} documents: memory", bulk.memory / 1e6, "MB", "peak of the server"),
            row(f"{size:,} documents: disk", bulk.disk / 1e6, "MB", "database and graph"),
            row(f"{size:,} documents compared with the graph", bulk.verified, "s", "every edge"),
            row(f"{size:,} documents: differences", bulk.different, "", at_most=0),
        ]
    for less, more in itertools.pairwise(sizes):
        exponent = math.log(times[more] / times[less]) / math.log(more / less)
        rows.append(row(f"growth exponent of sync, {less:,} → {more:,}", exponent, "", "1 is linear"))
    return rows


BENCHMARKS: dict[str, Callable[..., list[Row]]] = {
    "write": write,
    "growth": growth,
    "sidecar": sidecar,
    "service": service,
    "control-plane": control_plane,
    "reading": reading,
    "retrieval": retrieval,
    "storage": storage,
    "cache": cache,
    "embedding": embedding,
    "nexus": nexus,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks of memvid-export; see docs/benchmarks.md.")
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], metavar=f"{{{','.join(BENCHMARKS)}}}")
    parser.add_argument("--short", action="store_true", help="small inputs, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--graph", type=Path, action="append", help="graphs for retrieval, in place of those here")
    parser.add_argument(
        "--documents", type=int, action="append", help="sizes of collections for nexus, in place of 10000 and 100000"
    )
    arguments = parser.parse_args()
    rows: list[Row] = []
    BENCHMARKS["retrieval"] = partial(retrieval, graphs=arguments.graph)
    BENCHMARKS["nexus"] = partial(nexus, documents=arguments.documents)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    CACHE.mkdir(exist_ok=True)
    for name in arguments.names or BENCHMARKS:
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="bench-") as folder:
            print(f"measuring: {name}", file=sys.stderr, flush=True)
            rows += BENCHMARKS[name](Path(folder), short=arguments.short)
    machine = f"{len(os.sched_getaffinity(0))} cores, {_cpu()}, Python {platform.python_version()}"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    head = f"{datetime.now(UTC):%Y-%m-%d}, commit {commit.stdout.strip() or 'unknown'}, {machine}"
    table = Table("what", "value", "unit", "goal", "", "note", title=head, title_justify="left")
    for figure in rows:
        mark = {True: "yes", False: "NO", None: ""}[figure["reached"]]
        table.add_row(figure["name"], _number(figure["value"]), figure["unit"], figure["goal"], mark, figure["note"])
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"run": head, "figures": rows}, indent=2))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


if __name__ == "__main__":
    main()
