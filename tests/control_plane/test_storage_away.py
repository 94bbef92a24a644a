"""A bucket that is not there: said as what it is, nothing accepted, and all well when it is back."""

from __future__ import annotations

from pathlib import Path

from live_server import Server, graph
from runpod_house import eventually
from services import BUCKET, s3_server


def test_a_bucket_that_goes_is_told_as_an_outage_of_ours_and_jobs_go_on_when_it_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "s3"
    with s3_server(folder) as store:
        server = Server(tmp_path / "root", env=store.env, storage_url=store.url, s3_addressing="path")
        try:
            server.start()
            (folder / BUCKET).rename(tmp_path / "away")
            answer = server.post(graph())
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "STORAGE_FAILED")
            assert answer.headers["retry-after"]
            ready = eventually(lambda: None if (found := server.client.get("/readyz")).is_success else found)
            assert ready.status_code == 503
            assert BUCKET in ready.json()["error"]["details"]["checks"]["storage"]
            (tmp_path / "away").rename(folder / BUCKET)
            assert server.wait(server.submit(graph()))["type"] == "job_completed"
        finally:
            server.close()
