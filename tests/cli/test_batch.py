"""``scripts/batch``: many graphs at once, on child processes of this machine and over Runpod, and going on after it was
stopped. Real children, a real S3 server, a local Runpod; GitNexus by its wire format."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import zstandard
from processes import answering, command, on_a_terminal
from runpod_local import local_runpod, wait_for
from services import S3
from small_batch import PLAN, batch_of
from storage.faulty import proxy

from common.contract import Progress, Report, Source
from common.errors import DeviceFailed, ExportError, WorkerLost
from common.storage import Storage, StorageConfig, open_storage
from common.storage.file import FileStorage
from control_plane.backends.runpod_api import RunpodApi
from control_plane.batch.run import Summary
from control_plane.batch.runpod import Endpoint, RunpodSlot
from control_plane.batch.slots import Kept, Work
from control_plane.batch.sources import Graph, Payload
from control_plane.errors import PlatformUnavailable
from control_plane.operations.metrics import Metrics

BATCH = [sys.executable, "-m", "control_plane.batch"]
LIGHT = ("--workers", 1, "--no-semantic")
"""One child without an engine: enough where neither is what a test is about."""


def graph(name: str, nodes: int = 6, *, lines: int = 1) -> bytes:
    """A raw graph of functions that call each other."""
    return json.dumps(
        {
            "nodes": [
                {
                    "id": f"Function:{name}.py:{name}_{n}",
                    "label": "Function",
                    "properties": {
                        "name": f"{name}_{n}",
                        "filePath": f"{name}.py",
                        "content": f"def {name}_{n}():\n" + f"    return compute_{n}(argument)\n" * lines,
                    },
                }
                for n in range(nodes)
            ],
            "relationships": [
                {
                    "id": f"r{n}",
                    "sourceId": f"Function:{name}.py:{name}_{n}",
                    "targetId": f"Function:{name}.py:{name}_{(n + 1) % nodes}",
                    "type": "CALLS",
                    "confidence": 1,
                }
                for n in range(nodes)
            ],
        }
    ).encode()


def stream(name: str, nodes: int = 6) -> bytes:
    """The same as GitNexus streams it."""
    whole = json.loads(graph(name, nodes))
    records = [("node", node) for node in whole["nodes"]] + [("relationship", it) for it in whole["relationships"]]
    return b"".join(json.dumps({"type": kind, "data": data}).encode() + b"\n" for kind, data in records)


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MEMVID_", "RUNPOD_", "AWS_"))}
    return {**kept, "MEMVID_EMBED_CACHE": "off", **(more or {})}


def batch(*arguments: object, code: int = 0, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run the command to its end with ``--json -``, answer its summary."""
    done = subprocess.run(
        [*BATCH, *map(str, arguments), "--json", "-"],
        capture_output=True,
        env=environment(env),
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr.decode()
    return dict(json.loads(done.stdout))


@contextmanager
def started(*arguments: object, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """The command while it runs; ended at the end of the block if it still does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*BATCH, *map(str, arguments)], env=environment(env), **pipes)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def statuses(summary: Mapping[str, Any]) -> dict[str, str]:
    return {it["name"]: it["status"] for it in summary["perGraph"]}


def journal(out: Path) -> dict[str, str]:
    """Status of each graph that has ended, by its name."""
    path = out / "batch.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return {it["name"]: it["status"] for it in map(json.loads, lines)}


def running(out: Path) -> list[Path]:
    """Folders of graphs that children are at work on."""
    return list((out / ".batch").glob("????????????????-1"))


def children(process: subprocess.Popen[bytes]) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == process.pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def graphs(tmp_path: Path) -> Path:
    """A folder of graphs in several forms, and of other files."""
    folder = tmp_path / "graphs"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "plain.export.json").write_bytes(graph("plain", 30))
    (folder / "deep" / "packed.json.gz").write_bytes(gzip.compress(graph("packed", 20)))
    (folder / "deep" / "er" / "lines.graph.ndjson.zst").write_bytes(zstandard.compress(stream("lines", 10)))
    for other in ("notes.txt", "plain.mv2.manifest.json", ".hidden/secret.json"):
        (folder / other).write_bytes(graph("no"))
    return folder


def test_every_graph_of_a_folder_becomes_a_whole_capsule_and_a_second_run_does_nothing(
    graphs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = batch(graphs, "--out", out, "--workers", 2)
    assert statuses(summary) == dict.fromkeys(("plain", "deep-packed", "deep-er-lines"), "completed")
    for figure in ("frames", "vectors", "tokens", "cacheHits"):
        assert summary[figure] == sum(it[figure] for it in summary["perGraph"])
    assert summary["vectors"] == 60
    assert (summary["graphs"], summary["completed"], summary["failed"], summary["skipped"]) == (3, 3, 0, 0)
    assert summary["framesPerSecond"] == pytest.approx(summary["frames"] / summary["seconds"], rel=0.01)
    assert summary["devices"] == ["cpu"]
    for name in ("plain", "deep-packed", "deep-er-lines"):
        (capsule,) = (out / name).glob("*.mv2")
        assert command("verify", capsule).returncode == 0
        assert len(list((out / name).iterdir())) == 3
    assert {path.name for path in out.iterdir()} == {"plain", "deep-packed", "deep-er-lines", "batch.jsonl"}

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = batch(graphs, "--out", out)
    assert (again["completed"], again["skipped"], again["frames"]) == (0, 3, 0)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_only_what_has_changed_is_run_again(graphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    batch(graphs, "--out", out, *LIGHT)
    (graphs / "plain.export.json").write_bytes(graph("plain", 31))
    (graphs / "new.json").write_bytes(graph("new"))
    next((out / "deep-packed").glob("*.sqlite")).unlink()
    changed = batch(graphs, "--out", out, *LIGHT)
    assert statuses(changed) == {
        "plain": "completed",
        "new": "completed",
        "deep-packed": "completed",
        "deep-er-lines": "skipped",
    }
    assert len(list((out / "plain").iterdir())) == 3
    assert changed["vectors"] == 0
    with_vectors = batch(graphs, "--out", out, "--workers", 1)
    assert with_vectors["completed"] == 4
    assert with_vectors["vectors"] > 0


def test_a_bad_graph_among_good_ones_fails_alone_and_is_tried_again_only_on_request(
    graphs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (graphs / "bad.json").write_bytes(b'{"nodes": [], "relationships": []}')
    first = batch(graphs, "--out", out, *LIGHT, code=3)
    assert statuses(first)["bad"] == "failed"
    assert (first["completed"], first["failed"]) == (3, 1)
    (error,) = first["errors"]
    assert error["code"] == "INVALID_EXPORT_REQUEST"
    assert error["details"] == {"name": "bad"}

    second = batch(graphs, "--out", out, *LIGHT, code=3)
    assert (second["failed"], second["skipped"], second["errors"]) == (1, 3, first["errors"])
    assert [it["endedAt"] for it in second["perGraph"]] == [it["endedAt"] for it in first["perGraph"]]
    third = batch(graphs, "--out", out, *LIGHT, "--retry-failed", code=3)
    ended = {it["name"]: it["endedAt"] for it in third["perGraph"]}
    assert ended["bad"] > error_time(second)
    (graphs / "bad.json").write_bytes(graph("bad"))
    assert statuses(batch(graphs, "--out", out, *LIGHT))["bad"] == "completed"


def error_time(summary: Mapping[str, Any]) -> str:
    return next(str(it["endedAt"]) for it in summary["perGraph"] if it["name"] == "bad")


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Graphs that take a second or so each."""
    folder = tmp_path / "slow"
    folder.mkdir()
    for name in SLOW:
        (folder / f"{name}.json").write_bytes(graph(name, 6_000, lines=4))
    return folder


SLOW = ("a", "b", "c", "d")


def test_after_kill_9_of_the_whole_command_the_next_run_goes_on(slow: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(slow, "--out", out, *LIGHT) as process:
        wait_for(lambda: journal(out), bool)
        pids = children(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: pids, lambda pids: not any(map(alive, pids)))
    done = journal(out)
    assert len(done) < len(SLOW)
    stamps = {path: path.stat().st_mtime_ns for name in done for path in (out / name).iterdir()}
    summary = batch(slow, "--out", out, *LIGHT)
    assert summary["skipped"] == len(done)
    assert summary["completed"] == len(SLOW) - len(done)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert all(len(list((out / name).glob("*.manifest.json"))) == 1 for name in SLOW)
    assert not (out / ".batch").exists()


def test_a_graph_whose_record_was_lost_with_the_last_second_is_made_again(graphs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    batch(graphs, "--out", out, *LIGHT)
    lines = (out / "batch.jsonl").read_bytes().splitlines(keepends=True)
    (out / "batch.jsonl").write_bytes(b"".join(line for line in lines if json.loads(line)["name"] != "plain"))
    assert statuses(batch(graphs, "--out", out, *LIGHT)) == {
        "plain": "completed",
        "deep-packed": "skipped",
        "deep-er-lines": "skipped",
    }
    assert len(list((out / "plain").iterdir())) == 3
    assert set(journal(out)) == {"plain", "deep-packed", "deep-er-lines"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_batch_that_is_interrupted_ends_with_130_and_keeps_what_is_done(
    number: signal.Signals, slow: Path, tmp_path: Path
) -> None:
    out, told = tmp_path / "out", tmp_path / "summary.json"
    with started(slow, "--out", out, *LIGHT, "--json", told) as process:
        wait_for(lambda: journal(out), bool)
        pids = children(process)
        process.send_signal(number)
        assert process.wait(timeout=30) == 130
        assert not any(map(alive, pids))
    summary = json.loads(told.read_bytes())
    assert summary["interrupted"] is True
    assert summary["left"] == len(SLOW) - len(journal(out)) > 0
    assert summary["completed"] == len(journal(out))
    assert {path.name for path in out.iterdir()} == {*journal(out), "batch.jsonl"}


@pytest.mark.parametrize("kills", [1, 2])
def test_a_child_that_is_killed_is_replaced_and_its_graph_has_one_more_try(
    kills: int, slow: Path, tmp_path: Path
) -> None:
    out, told = tmp_path / "out", tmp_path / "summary.json"
    with started(slow, "--out", out, *LIGHT, "--json", told) as process:
        seen: set[Path] = set()
        for _ in range(kills):
            at_work = wait_for(lambda: set(running(out)), lambda found: bool(found - seen))  # noqa: B023
            seen |= at_work
            for pid in children(process):
                os.kill(pid, signal.SIGKILL)
        assert process.wait(timeout=60) == (0 if kills == 1 else 3)
    summary = json.loads(told.read_bytes())
    (hit,) = (it for it in summary["perGraph"] if it["attempts"] == 2)
    assert hit["status"] == ("completed" if kills == 1 else "failed")
    assert (hit["error"] or {}).get("code") == (None if kills == 1 else "WORKER_LOST")
    assert summary["completed"] == len(SLOW) - (kills == 2)


def test_what_is_no_file_fails_alone_and_is_not_waited_for(graphs: Path, tmp_path: Path) -> None:
    os.mkfifo(graphs / "pipe.json")
    summary = batch(graphs, "--out", tmp_path / "out", *LIGHT, code=3)
    assert {status for name, status in statuses(summary).items() if name != "pipe"} == {"completed"}
    assert statuses(summary)["pipe"] == "failed"


def test_a_graph_that_cannot_be_fetched_for_once_is_not_run_again_while_it_is_unchanged(
    graphs: Path, tmp_path: Path
) -> None:
    out, plain = tmp_path / "out", graphs / "plain.export.json"
    batch(graphs, "--out", out, *LIGHT)
    content = plain.read_bytes()
    plain.unlink()
    os.mkfifo(plain)
    away = batch(graphs, "--out", out, *LIGHT, code=3)
    assert statuses(away)["plain"] == "failed"
    plain.unlink()
    plain.write_bytes(content)
    assert set(statuses(batch(graphs, "--out", out, *LIGHT)).values()) == {"skipped"}


def test_names_are_unique_and_safe_whatever_the_files_are_called(tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    (folder / "x").mkdir(parents=True)
    for name in ("x/y.json", "x-y.json", "x-y.ndjson", "odd : name\x1b[31m?.json"):
        (folder / name).write_bytes(graph("g"))
    names = set(statuses(batch(folder, "--out", tmp_path / "out", *LIGHT)))
    assert len(names) == 4
    assert sum(name.startswith("x-y-") for name in names) == 3
    assert all(name.isprintable() and "/" not in name and ":" not in name for name in names)
    assert set(statuses(batch(folder, "--out", tmp_path / "out", *LIGHT))) == names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{in}"], "--out"),
        (["{in}/none", "--out", "{out}"], "none"),
        (["{in}", "--out", "{in}"], "another place"),
        (["{out}", "--out", "{out}"], "another place"),
        (["{in}/empty", "--out", "{out}"], "no graphs"),
        (["{in}", "--out", "{out}", "--workers", "0"], "--workers"),
        (["{in}", "--out", "{out}", "--profile", "nightly"], "no profile of that name"),
        (["{in}", "--out", "{out}", "--devices", "gpu"], "--devices"),
        (["{in}", "--out", "{out}", "--profile", "quality", "--devices", "cuda:77"], "--devices must be cpu"),
        (["{in}", "--out", "{out}", "--json", "{in}/none/summary"], "--json"),
        (["{in}", "--out", "{out}", "--runpod"], "S3"),
        (["{in}", "--out", "s3://exports/x", "--runpod"], "RUNPOD_ENDPOINT_ID"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_line(arguments: list[str], words: str, graphs: Path, tmp_path: Path) -> None:
    (graphs / "empty").mkdir()
    given = [word.format(**{"in": graphs, "out": tmp_path / "out"}) for word in arguments]
    done = subprocess.run([*BATCH, *given], capture_output=True, env=environment(), text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.rglob(".batch"))


def test_a_destination_takes_one_batch_at_a_time(slow: Path, tmp_path: Path) -> None:
    with started(slow, "--out", tmp_path / "out", *LIGHT):
        wait_for(lambda: running(tmp_path / "out"), bool)
        done = subprocess.run(
            [*BATCH, slow, "--out", tmp_path / "out"], capture_output=True, env=environment(), check=False
        )
    assert done.returncode == 2
    assert b"another batch" in done.stderr


def test_on_a_terminal_a_table_moves_and_standard_output_is_pure_json(graphs: Path, tmp_path: Path) -> None:
    arguments = [*BATCH, graphs, "--out", tmp_path / "out", *LIGHT, "--json", "-"]
    stdout, drawn = on_a_terminal(arguments, environment({"TERM": "xterm", "COLUMNS": "120"}))
    assert json.loads(stdout)["completed"] == 3
    assert b"frames/s" in drawn
    assert b"3 of 3 graphs" in drawn
    assert b"\x1b" in drawn


# --- S3, GitNexus, Runpod ---------------------------------------------------------------------------


class Bucket:
    """Objects below a prefix of the S3 server's bucket."""

    def __init__(self, s3: S3, prefix: str) -> None:
        self.url = f"{s3.url}/{prefix}/"
        self.env = {**s3.env, "MEMVID_EXPORT_S3_ADDRESSING": "path"}
        self._storage = open_storage(s3.config())

    def sizes(self) -> dict[str, int]:
        return {it.ref.removeprefix(self.url): it.size for it in self._storage.found(self.url)}

    def tags(self, prefix: str) -> dict[str, str]:
        return {it.ref: it.tag for it in self._storage.found(self.url + prefix)}

    def read(self, key: str) -> bytes:
        return b"".join(self._storage.read(self.url + key, 0, self.sizes()[key]))

    def write(self, key: str, data: bytes) -> None:
        self._storage.write(self.url + key, data)

    def delete(self, key: str) -> None:
        self._storage.delete(self.url + key)


def test_graphs_under_a_prefix_in_s3_become_capsules_under_another(s3: S3) -> None:
    source, out = Bucket(s3, "graphs"), Bucket(s3, "graphs/capsules")
    source.write("one.json", graph("one"))
    source.write("deep/two.json.gz", gzip.compress(graph("two", 12)))
    source.write("readme.md", b"no graph")
    first = batch(source.url, "--out", out.url, *LIGHT, env=out.env)
    assert statuses(first) == {"one": "completed", "deep-two": "completed"}
    for it in first["perGraph"]:
        assert {key: size for key, size in out.sizes().items() if key.startswith(it["folder"])} == {
            it["folder"] + name: size for name, size in it["files"].items()
        }
    again = batch(source.url, "--out", out.url, *LIGHT, env=out.env)
    assert (again["skipped"], again["completed"]) == (2, 0)
    (manifest,) = (key for key in out.sizes() if key.startswith("one/") and key.endswith(".manifest.json"))
    out.delete(manifest)
    assert statuses(batch(source.url, "--out", out.url, *LIGHT, env=out.env)) == {
        "one": "completed",
        "deep-two": "skipped",
    }
    assert manifest in out.sizes()


def test_every_repository_of_a_gitnexus_server_becomes_a_capsule(tmp_path: Path) -> None:
    repos = {"tiny": stream("tiny"), "broken": stream("broken")[:-30], "batch.jsonl": stream("odd", 40)}
    with gitnexus(repos) as url:
        first = batch(url, "--out", tmp_path / "out", *LIGHT, code=3)
        odd = next(name for name in statuses(first) if name.startswith("batch.jsonl-"))
        assert statuses(first) == {"tiny": "completed", "broken": "failed", odd: "completed"}
        assert "cut" in first["errors"][0]["message"]
        repos["broken"] = stream("broken")
        second = batch(url, "--out", tmp_path / "out", *LIGHT)
    assert statuses(second) == {"tiny": "skipped", "broken": "completed", odd: "skipped"}


def test_a_gitnexus_server_that_is_away_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [*BATCH, "http://127.0.0.1:9", "--out", tmp_path / "out"], capture_output=True, env=environment(), check=False
    )
    assert done.returncode == 3
    assert b"http://127.0.0.1:9" in done.stderr
    assert b"Traceback" not in done.stderr


@contextmanager
def gitnexus(repos: Mapping[str, bytes]) -> Iterator[str]:
    """A server that answers like GitNexus 1.6."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/api/repos":
                body = json.dumps(
                    [
                        {"name": name, "path": f"/repos/{name}", "branch": "main", "stats": {"nodes": len(lines)}}
                        for name, lines in repos.items()
                    ]
                ).encode()
            else:
                asked = parse_qs(url.query)
                assert (asked["stream"], asked["includeContent"]) == (["true"], ["true"])
                body = repos[asked["repo"][0].removeprefix("/repos/")]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with answering(Handler) as url:
        yield url


@contextmanager
def endpoint(s3: S3, root: Path, bucket: Bucket) -> Iterator[dict[str, str]]:
    """A local Runpod with our workers, and the environment with which a batch runs over it."""
    env = {
        **bucket.env,
        "MEMVID_EMBED_CACHE": "off",
        "MEMVID_EXPORT_ROOT": str(root),
        "MEMVID_EXPORT_STAGING_ROOT": str(root),
        "MEMVID_EXPORT_STORAGE_URL": s3.url,
    }
    with local_runpod(workers="1:2", env=env, idle_seconds=120.0, ping_seconds=1) as platform:
        yield {
            **bucket.env,
            "RUNPOD_API_BASE": platform.api_base,
            "RUNPOD_ENDPOINT_ID": platform.endpoint,
            "RUNPOD_API_KEY": platform.key,
            "RUNPOD_POLL_INTERVAL_SECONDS": "0.2",
        }


def test_a_batch_over_runpod_stages_runs_and_checks_and_goes_on_after_kill_9(
    s3: S3, graphs: Path, tmp_path: Path
) -> None:
    out = Bucket(s3, "runpod")
    (graphs / "bad.json").write_bytes(b'{"nodes": [], "relationships": []}')
    (graphs / "large.json").write_bytes(graph("large", 8_000, lines=4))
    with endpoint(s3, tmp_path / "workers", out) as env:
        with started(graphs, "--out", out.url, "--runpod", *LIGHT[2:], "--workers", 4, env=env) as process:
            wait_for(out.sizes, lambda keys: any(key.startswith("large/") for key in keys))
            process.kill()
        first = batch(graphs, "--out", out.url, "--runpod", *LIGHT[2:], "--workers", 4, env=env, code=3)
        assert set(statuses(first)) == {"plain", "deep-packed", "deep-er-lines", "bad", "large"}
        assert [name for name, status in statuses(first).items() if status == "failed"] == ["bad"]
        assert first["errors"][0]["code"] == "INVALID_EXPORT_REQUEST"
        (large,) = (it for it in first["perGraph"] if it["name"] == "large")
        assert large["folder"].endswith("-1/"), "the second batch has taken over the job of the first"
        tags = out.tags("large/")
        lines = out.read("batch.jsonl").splitlines(keepends=True)
        out.write("batch.jsonl", b"".join(line for line in lines if json.loads(line)["name"] != "large"))
        lost = batch(graphs, "--out", out.url, "--runpod", *LIGHT[2:], env=env, code=3)
        again = batch(graphs, "--out", out.url, "--runpod", *LIGHT[2:], env=env, code=3)
    assert (again["skipped"], again["completed"], again["failed"]) == (4, 0, 1)
    whole = {f"{it['folder']}{name}": size for it in again["perGraph"] for name, size in it["files"].items()}
    left = {key: size for key, size in out.sizes().items() if key not in whole}
    assert {key for key in left if not key.startswith("bad/")} == {"batch.jsonl"}
    assert whole.items() <= out.sizes().items()
    assert lost["completed"] == 1
    assert out.tags("large/") == tags, "what was lost with the last second of records is found, and not run again"


def test_a_wrong_key_of_runpod_ends_the_batch_before_anything_is_staged(s3: S3, graphs: Path, tmp_path: Path) -> None:
    out = Bucket(s3, "unpaid")
    with local_runpod(workers="0:0") as platform:
        env = {
            **out.env,
            "RUNPOD_API_BASE": platform.api_base,
            "RUNPOD_ENDPOINT_ID": platform.endpoint,
            "RUNPOD_API_KEY": "stolen",
        }
        done = subprocess.run(
            [*BATCH, graphs, "--out", out.url, "--runpod"], capture_output=True, env=environment(env), check=False
        )
    assert done.returncode == 3
    assert b"RUNPOD_API_KEY" in done.stderr
    assert b"stolen" not in done.stderr
    assert out.sizes() == {}


def test_payloads_that_cannot_be_removed_at_the_end_cost_no_summary(s3: S3, graphs: Path) -> None:
    out = Bucket(s3, "uncleared")
    batch(graphs, "--out", out.url, *LIGHT, env=out.env)
    with local_runpod(workers="0:0") as platform, proxy(s3.endpoint) as faulty:
        env = {
            **out.env,
            "AWS_ENDPOINT_URL_S3": faulty.url,
            "RUNPOD_API_BASE": platform.api_base,
            "RUNPOD_ENDPOINT_ID": platform.endpoint,
            "RUNPOD_API_KEY": platform.key,
        }
        faulty.fault("403", "GET", ".batch", times=99)
        summary = batch(graphs, "--out", out.url, "--runpod", "--no-semantic", env=env)
    assert any(".batch" in seen.path for seen in faulty.seen)
    assert (summary["skipped"], summary["failed"]) == (3, 0)


# --- slots that fail --------------------------------------------------------------------------------


class Few:
    """A source of so many graphs."""

    def __init__(self, count: int, sha256: str = "0" * 64) -> None:
        self._count = count
        self._sha256 = sha256

    def graphs(self) -> list[Graph]:
        return [Graph(f"g{n}", f"g{n}", 100 - n, Source(), str(n)) for n in range(self._count)]

    def fetch(self, graph: Graph, folder: Path, limit: int) -> Payload:
        return Payload(folder / graph.name, 1, self._sha256)


class Place:
    """A slot that does nothing, or only fails."""

    def __init__(
        self, label: str, fail: ExportError | None = None, *, up: bool = True, files: tuple[str, ...] = ()
    ) -> None:
        self.label = self.device = label
        self.strikes = 0
        self._fail = fail
        self._up = up
        self._files = dict.fromkeys(files, 1)
        self.asked: list[str] = []

    async def ready(self) -> None:
        if not self._up:
            self.strikes += 1
            raise WorkerLost("it does not start")

    async def run(self, work: Work, tell: Callable[[Progress], None]) -> Callable[[], Kept]:
        self.asked.append(work.graph.name)
        await asyncio.sleep(0.01)
        if self._fail is not None:
            self.strikes += isinstance(self._fail, DeviceFailed)
            raise self._fail
        return lambda: Kept(f"{work.graph.name}/", self._files, Report())

    async def close(self) -> None:
        """Nothing to end."""


def run(
    tmp_path: Path, *places: Place, source: Few | None = None, storage: Storage | None = None
) -> tuple[Summary, ExportError | None]:
    async def go() -> tuple[Summary, ExportError | None]:
        job = batch_of(source or Few(12), tmp_path, *places, storage=storage)
        try:
            await job.run()
        except ExportError as error:
            return job.summary(error), error
        return job.summary(), None

    return asyncio.run(go())


@pytest.mark.parametrize("broken", [Place("gpu 1", DeviceFailed("poisoned")), Place("gpu 1", up=False)])
def test_a_broken_device_takes_no_graph_with_it_and_is_given_up(broken: Place, tmp_path: Path) -> None:
    summary, error = run(tmp_path, broken, Place("gpu 2"))
    assert error is None
    assert (summary.completed, summary.failed) == (12, 0)
    assert len(broken.asked) <= 3
    assert {it.device for it in summary.per_graph} == {"gpu 2"}


def test_the_largest_graphs_are_begun_first(tmp_path: Path) -> None:
    place = Place("gpu 1")
    run(tmp_path, place)
    assert {"g0", "g1", "g2"} <= set(place.asked[:6])
    assert {"g9", "g10", "g11"} <= set(place.asked[6:])


def test_a_batch_with_no_working_device_left_ends_and_says_why(tmp_path: Path) -> None:
    summary, error = run(tmp_path, Place("gpu 1", DeviceFailed("poisoned")))
    assert error is not None
    assert "poisoned" in error.message
    assert summary.failed <= 2
    assert summary.left == 12 - summary.failed
    assert summary.errors[-1].code == "WORKER_LOST"


def test_an_error_that_no_second_try_helps_against_has_none(tmp_path: Path) -> None:
    from common.errors import EmbeddingFailed, EmbeddingRefused

    for error, tries in ((EmbeddingRefused("too dear"), 1), (EmbeddingFailed("500"), 2)):
        place = Place("gpu 1", error)
        summary, _ = run(tmp_path / error.code, place, source=Few(3))
        assert (summary.failed, len(place.asked)) == (3, 3 * tries)


class Counting(FileStorage):
    """Files of a folder, and how often one was written."""

    writes = 0

    def write(self, ref: str, data: bytes, *, only_new: bool = False) -> bool:
        self.writes += 1
        return super().write(ref, data, only_new=only_new)


def test_many_small_graphs_share_the_writes_of_the_journal(tmp_path: Path) -> None:
    storage = Counting([tmp_path])
    summary, error = run(tmp_path, Place("gpu 1"), source=Few(100), storage=storage)
    assert error is None
    assert summary.completed == len(journal(tmp_path)) == 100
    assert storage.writes < 50


def test_a_batch_whose_journal_cannot_be_written_ends_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "batch.jsonl").mkdir()
    _, error = run(tmp_path, Place("gpu 1"))
    assert error is not None
    assert error.code == "STORAGE_FAILED"


class Held(Place):
    """A slot whose files are put only when they may be."""

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self.done: list[str] = []
        self.may = threading.Event()

    async def run(self, work: Work, tell: Callable[[Progress], None]) -> Callable[[], Kept]:
        keep = await super().run(work, tell)
        self.done.append(work.graph.name)

        def later() -> Kept:
            assert self.may.wait(60)
            return keep()

        return later


def test_what_is_done_when_a_batch_is_stopped_is_put_where_it_belongs(tmp_path: Path) -> None:
    async def go() -> Summary:
        place = Held("gpu 1")
        job = batch_of(Few(12), tmp_path, place)
        running = asyncio.create_task(job.run())
        while len(place.done) < 2:
            await asyncio.sleep(0.001)
        job.stop()
        place.may.set()
        await running
        return job.summary()

    summary = asyncio.run(go())
    assert [it.name for it in summary.per_graph] == ["g0", "g1"]
    assert (summary.completed, summary.left, summary.interrupted) == (2, 10, True)
    assert set(journal(tmp_path)) == {"g0", "g1"}


def test_a_file_of_an_earlier_export_that_cannot_be_removed_is_removed_by_a_later_one(tmp_path: Path) -> None:
    old = tmp_path / "g0" / "old.mv2"
    run(tmp_path, Place("gpu 1", files=("old.mv2",)), source=Few(1))
    old.mkdir(parents=True)  # what is no file cannot be removed as one
    summary, error = run(tmp_path, Place("gpu 1", files=("new.mv2",)), source=Few(1, "1" * 64))
    assert error is None
    assert (summary.completed, summary.per_graph[0].left) == (1, ["g0/old.mv2"])

    old.rmdir()
    old.write_bytes(b"old")
    summary, _ = run(tmp_path, Place("gpu 1", files=("newer.mv2",)), source=Few(1, "2" * 64))
    assert summary.per_graph[0].left == []
    assert not old.exists()


class Impatient(RunpodApi):
    """Takes every request without an answer for a platform that has been away for long."""

    @property
    def away_seconds(self) -> float:
        return math.inf


def test_outages_of_runpod_with_good_answers_between_them_retire_no_slot(tmp_path: Path) -> None:
    away = iter([True, False] * 4)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if next(away):
                self.send_error(503)
            else:
                self._say("IN_QUEUE")

        def do_GET(self) -> None:
            self._say("COMPLETED")

        def _say(self, status: str) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"id": "one", "status": status}).encode())

        def log_message(self, *_: object) -> None:
            """Quiet."""

    async def go(url: str) -> list[int]:
        storage = open_storage(StorageConfig(roots=[str(tmp_path)]))
        api = Impatient(url, "endpoint", "key", Metrics())
        slot = RunpodSlot(1, Endpoint(api, storage, tmp_path.as_uri() + "/", PLAN, 1_000, 1_000, 0.01))
        (tmp_path / "payload").write_bytes(b"1")
        (graph,) = Few(1).graphs()
        strikes = []
        for ends in [PlatformUnavailable, WorkerLost] * 4:
            with pytest.raises(ends):
                await slot.run(Work(graph, Payload(tmp_path / "payload", 1, "0" * 64), None), lambda _: None)
            strikes.append(slot.strikes)
        await api.close()
        return strikes

    with answering(Handler) as url:
        assert asyncio.run(go(url)) == [1, 0] * 4
