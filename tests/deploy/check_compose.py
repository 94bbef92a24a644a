"""The services of compose.yaml as processes of this machine: their commands and variables, with other host names.

Takes half a minute: scripts/check-images runs it, scripts/test does not.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from processes import COMMAND, EXAMPLE, free_port
from services import S3, s3_server
from test_compose import SERVICES


@contextmanager
def running(words: list[str], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A service; its command is the image's or compose's."""
    with log.open("wb") as output:
        process = subprocess.Popen(words, env=dict(env), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            assert process.wait(timeout=30) == 0, log.read_text(errors="replace")
        finally:
            process.kill()
            process.wait()


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until something listens there."""
    for _ in range(600):
        assert process.poll() is None, log.read_text(errors="replace")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(log.read_text(errors="replace"))


def test_the_services_find_each_other_and_an_export_goes_through(tmp_path: Path, postgres_url: str) -> None:
    ports = {"runpod": free_port(), "api": free_port()}
    with s3_server(tmp_path / "buckets") as s3:
        env = {name: here(SERVICES[name]["environment"], ports, s3) for name in ports}
        bucket = urlsplit(SERVICES["api"]["environment"]["MEMVID_EXPORT_STORAGE_URL"]).netloc
        (tmp_path / "buckets" / bucket).mkdir()
        root = {name: {"MEMVID_EXPORT_ROOT": str(tmp_path / name), "RUNPOD_SKIP_GPU_CHECK": "true"} for name in ports}
        runpod = [
            word.replace("0.0.0.0:8600", f"127.0.0.1:{ports['runpod']}") for word in SERVICES["runpod"]["command"]
        ]
        logs = {name: tmp_path / f"{name}.log" for name in ports}
        address = {
            "MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{ports['api']}",
            "MEMVID_EXPORT_DATABASE_URL": postgres_url,
        }
        with running([str(COMMAND), *runpod[1:]], env["runpod"] | root["runpod"], logs["runpod"]) as platform:
            wait_for(ports["runpod"], platform, logs["runpod"])
            with running([str(COMMAND), "serve"], env["api"] | root["api"] | address, logs["api"]) as api:
                wait_for(ports["api"], api, logs["api"])
                url = f"http://127.0.0.1:{ports['api']}"
                assert httpx.get(f"{url}/readyz").is_success
                done = subprocess.run(
                    [COMMAND, "submit", EXAMPLE, "--url", url, "--wait", "--out", tmp_path / "out", "--json"],
                    env={"MEMVID_EXPORT_API_KEY": SERVICES["api"]["environment"]["MEMVID_EXPORT_API_KEY"]},
                    capture_output=True,
                    text=True,
                    timeout=240,
                    check=False,
                )
                assert done.returncode == 0, done.stderr + logs["runpod"].read_text(errors="replace")
    report = json.loads(done.stdout)
    assert report["backend"] == "runpod_queue"
    assert [path.suffix for path in (tmp_path / "out").glob("*.mv2")] == [".mv2"]


def here(environment: Mapping[str, str], ports: Mapping[str, int], s3: S3) -> dict[str, str]:
    """The variables of a service, with the places of this machine and the keys of the test's S3 server."""
    moved = {
        key: value.replace("//runpod:8600", f"//127.0.0.1:{ports['runpod']}").replace(
            "//api:8080", f"//127.0.0.1:{ports['api']}"
        )
        for key, value in environment.items()
    }
    return {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]} | moved | dict(s3.env)
