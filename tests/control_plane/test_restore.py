"""A job store that is put back from a backup, with the storage as it is now: every job ends in a stated state."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from live_server import ENDED, Server, graph, large_graph
from postgres import Postgres
from processes import command
from runpod_house import Bucket, RunpodServer, bucket_env, eventually, real_workers
from services import S3


def _ended(server: Server, job_id: str) -> dict[str, Any]:
    return dict(eventually(lambda: job if (job := server.job(job_id))["status"] in ENDED else None, seconds=120))


def _hash(server: Server, job_id: str) -> str:
    assert server.wait(job_id)["type"] == "job_completed"
    return str(server.job(job_id)["artifact"]["sha256"])


def _lives_through(
    server: Server, save: Callable[[], None], put_back: Callable[[], None], lose: Callable[[str], None]
) -> None:
    """Jobs of every kind, a backup in the middle, more of their lives, and the backup put back."""
    server.start()
    before, lost = server.submit(graph(name="before")), server.submit(graph(name="lost"))
    hashes = {job: _hash(server, job) for job in (before, lost)}
    running = server.submit(large_graph("running", nodes=4_000))
    waiting, canceled = (server.submit(graph(name=name)) for name in ("waiting", "canceled"))
    save()
    server.client.delete(f"/v1/exports/{canceled}")
    was_canceled = _ended(server, canceled)["status"] == "canceled"
    hashes |= {job: _hash(server, job) for job in (running, waiting)}
    after = server.submit(graph(name="after"))
    hashes[after] = _hash(server, after)
    lose(lost)
    server.stop()
    put_back()
    server.start()
    for job_id in (before, running, waiting, after):
        job = _ended(server, job_id)
        assert (job["status"], job["artifact"]["sha256"]) == ("completed", hashes[job_id]), job
        assert server.client.get(f"/v1/exports/{job_id}/download").status_code == 200
        events = server.events(job_id)
        assert [event["seq"] for event in events] == list(range(1, job["lastEventSeq"] + 1))
        assert events[-1]["type"] == "job_completed"
    assert server.job(after)["metadata"]["client"] == "recovered"
    end = _ended(server, canceled)
    assert end["status"] == ("failed" if was_canceled else "completed"), end
    if was_canceled:
        assert end["error"]["code"] == "OBJECT_MISSING"
        assert "send it again" in end["error"]["message"]
    assert eventually(lambda: server.job(lost)["artifact"] is None)
    assert server.client.get(f"/v1/exports/{lost}/download").status_code == 410


def test_sqlite_and_files(tmp_path: Path) -> None:
    server = Server(tmp_path / "root", worker_slots=1, scrub_seconds=1)
    store, copy = server.root / "jobs.sqlite", tmp_path / "backup.sqlite"

    def save() -> None:
        env = {name: value for name, value in server.env.items() if name.startswith("MEMVID_EXPORT_")}
        done = command("backup", copy, env=env)
        assert done.returncode == 0, done.stderr
        assert sqlite3.connect(copy).execute("PRAGMA integrity_check").fetchone() == ("ok",)

    def put_back() -> None:
        for path in server.root.glob("jobs.sqlite*"):
            path.unlink()
        shutil.copy(copy, store)

    try:
        _lives_through(server, save, put_back, lambda job: shutil.rmtree(server.root / "artifacts" / job))
    finally:
        server.close()


def test_a_job_whose_payload_is_gone_and_whose_manifest_is_damaged_ends_as_one_to_send_again(tmp_path: Path) -> None:
    server = Server(tmp_path / "root", worker_slots=1)
    try:
        server.start()
        job_id = server.submit(graph(name="damaged"))
        _hash(server, job_id)
        server.stop()
        (manifest,) = (server.root / "artifacts" / job_id / "1").glob("*.manifest.json")
        manifest.write_bytes(b"{\x00")
        with closing(sqlite3.connect(server.root / "jobs.sqlite")) as database, database:
            database.execute("delete from events where job_id = ? and seq > 1", (job_id,))
            database.execute(
                "update jobs set status = 'queued', stage = 'queued', progress = 0, attempt = 0, last_seq = 1,"
                " output = null, manifest = null, owner = null, finished_at = null, expires_at = null where id = ?",
                (job_id,),
            )
        server.start()
        end = _ended(server, job_id)
        assert (end["status"], end["error"]["code"]) == ("failed", "OBJECT_MISSING"), end
        assert "send it again" in end["error"]["message"]
    finally:
        server.close()


def test_postgres_and_a_bucket_before_runpod(
    tmp_path: Path, s3: S3, postgres_server: Postgres, postgres_url: str
) -> None:
    dump = tmp_path / "jobs.dump"
    url = postgres_url.replace("+psycopg", "")
    programs = postgres_server.programs
    bucket = Bucket(s3, "restored")

    def call(program: str, *arguments: object) -> None:
        done = subprocess.run([programs / program, *map(str, arguments)], capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr

    def put_back() -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        call("pg_restore", "--no-owner", "--dbname", url, dump)

    def lose(job_id: str) -> None:
        for key in bucket.keys(job_id):
            bucket.remove(key)

    with real_workers(s3, tmp_path / "worker", workers="1:1") as platform:
        server = RunpodServer(
            *(tmp_path / "root", platform),
            env=bucket_env(s3),
            storage_url=bucket.url,
            database_url=postgres_url,
            scrub_seconds=1,
        )
        try:
            _lives_through(server, lambda: call("pg_dump", "-Fc", "--file", dump, url), put_back, lose)
        finally:
            server.close()
            bucket.close()


def test_a_backup_of_postgresql_names_its_own_tool(tmp_path: Path) -> None:
    env = {"MEMVID_EXPORT_DATABASE_URL": "postgresql+psycopg://user:secret@127.0.0.1:1/jobs"}
    done = command("backup", tmp_path / "copy", env=env)
    assert done.returncode == 2
    assert b"pg_dump" in done.stderr
    assert b"secret" not in done.stderr
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("store", ["missing", "letter", "cut"])
def test_a_store_that_is_not_whole_gives_no_backup(tmp_path: Path, store: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    if store == "letter":
        (root / "jobs.sqlite").write_bytes(b"dear reader" * 1_000)
    elif store == "cut":
        with sqlite3.connect(root / "jobs.sqlite") as database:
            database.execute("CREATE TABLE jobs (id TEXT)")
            database.executemany("INSERT INTO jobs VALUES (?)", [("x" * 500,)] * 200)
        os.truncate(root / "jobs.sqlite", 40_960)
    copy = tmp_path / "copy"
    copy.write_bytes(b"the last one")
    done = command("backup", copy, env={"MEMVID_EXPORT_ROOT": str(root)})
    assert done.returncode in (2, 3), done.stdout
    assert b"Traceback" not in done.stderr
    assert copy.read_bytes() == b"the last one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "root"]
