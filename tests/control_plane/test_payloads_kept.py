"""The sweep of what no job speaks for, beside jobs that come while it looks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from live_server import graph
from runpod_house import Bucket, RunpodServer, bucket_env
from runpod_local import local_runpod
from services import s3_server
from storage.faulty import Kind, Proxy, Seen, proxy

STRAY_SECONDS = 2


class SlowList(Proxy):
    """Holds the lists of payloads back while it is told to."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.go = threading.Event()
        self.waiting = threading.Event()
        self.lists = threading.Semaphore(0)

    def take(self, seen: Seen, body: bytes) -> Kind | None:
        """Wait with a list."""
        if "list-type=2" in seen.path and "payloads" in seen.path:
            self.waiting.set()
            self.go.wait()
            self.lists.release()
        return super().take(seen, body)


def test_the_payload_of_a_job_that_comes_during_a_sweep_stays(tmp_path: Path) -> None:
    with (
        s3_server(tmp_path / "s3") as s3,
        proxy(s3.endpoint, SlowList) as store,
        local_runpod(workers="0:0") as platform,
    ):
        env = {**bucket_env(s3), "AWS_ENDPOINT_URL_S3": store.url}
        server = RunpodServer(
            tmp_path / "root", platform, env=env, storage_url=f"{s3.url}/here", stray_seconds=STRAY_SECONDS
        )
        bucket = Bucket(s3, "here")
        try:
            server.start()
            assert store.waiting.wait(30)
            job = server.submit(graph(2))
            time.sleep(STRAY_SECONDS + 1.5)  # the store tells times in whole seconds
            store.go.set()
            for _ in range(3):
                assert store.lists.acquire(timeout=30)
            assert bucket.keys("payloads/") == [f"payloads/{job}"]
        finally:
            store.go.set()
            bucket.close()
            server.close()
