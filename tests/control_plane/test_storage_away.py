"""A bucket that is not there: said as what it is, nothing accepted, and all well when it is back."""

from __future__ import annotations

from pathlib import Path

from live_server import Server, graph
from runpod_house import eventually
from services import BUCKET, s3_server
from storage.faulty import Kind, Proxy, Seen, proxy


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


class Wayward(Proxy):
    """Refuses everything while it is told to, or lets the capsules go between the first look at one and the next."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.refuses = False
        self.folder: Path | None = None
        self.looks = 0

    def take(self, seen: Seen, body: bytes) -> Kind | None:
        """Meet a request."""
        if self.folder is not None and seen.path.endswith(".mv2"):
            self.looks += 1
            if self.looks == 2:
                for found in self.folder.rglob("*.mv2"):
                    found.unlink()
        return "403" if self.refuses else super().take(seen, body)


def test_a_store_that_refuses_or_loses_a_file_while_it_is_asked_for_is_told_as_that(tmp_path: Path) -> None:
    with s3_server(tmp_path / "s3") as s3, proxy(s3.endpoint, Wayward) as store:
        env = {**s3.env, "AWS_ENDPOINT_URL_S3": store.url}
        server = Server(tmp_path / "root", env=env, storage_url=s3.url, s3_addressing="path")
        try:
            server.start()
            job = server.submit(graph())
            assert server.wait(job)["type"] == "job_completed"
            store.refuses = True  # as with credentials that have expired
            for kind in ("download", "sidecar", "manifest"):
                answer = server.client.get(f"/v1/exports/{job}/{kind}")
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "STORAGE_FAILED"), kind
                assert answer.headers["retry-after"]
            store.refuses = False
            store.folder = tmp_path / "s3" / BUCKET
            answer = server.client.get(f"/v1/exports/{job}/download", headers={"range": "bytes=0-9"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (410, "ARTIFACT_MISSING")
            assert store.looks == 2
        finally:
            server.close()
