"""A server's start: a root that it cannot use, a storage that is away, and a local Runpod beside it."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
from processes import COMMAND, command, free_port, running
from runpod_house import bucket_env, eventually
from services import BUCKET, s3_server

from common.errors import InvalidSettings, WorkerLost
from common.settings import Settings
from control_plane.jobs.layout import Layout
from control_plane.runpod_local import local_platform


def layout(root: Path, **env: str) -> tuple[Settings, Layout]:
    """Settings over a root, and where its files lie."""
    settings = Settings.read({"MEMVID_EXPORT_ROOT": str(root), "MEMVID_EXPORT_DISK_FLOOR_BYTES": "0", **env}, dev=True)
    return settings, Layout(settings)


@pytest.mark.parametrize("name", ["MEMVID_EXPORT_ROOT", "MEMVID_EXPORT_STAGING_ROOT"])
def test_a_folder_that_is_none_is_named_by_its_setting(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    _, places = layout(tmp_path / "root", **{name: str(tmp_path / "file" / "below")})
    with pytest.raises(InvalidSettings, match="must be a folder that can be written") as caught:
        places.prepare()
    assert caught.value.details["field"] == name


def test_a_root_is_one_servers_until_it_ends(tmp_path: Path) -> None:
    _, places = layout(tmp_path)
    held = places.prepare()
    with pytest.raises(InvalidSettings, match="another one uses"):
        places.prepare()
    os.close(held)
    os.close(places.prepare())


def test_what_belongs_to_no_job_goes_at_a_start_and_all_else_stays(tmp_path: Path) -> None:
    _, places = layout(tmp_path)
    os.close(places.prepare())
    outside = tmp_path / "outside"
    kept = ["payloads/running", "payloads/failed", "artifacts/running/1/a", "artifacts/done/2/a"]
    gone = ["payloads/gone", "artifacts/gone/1/a", "artifacts/done/1/a", "incoming/half"]
    folders = {"payloads": places.payloads, "artifacts": places.artifacts, "incoming": places.incoming}
    paths = {name: folders[name.partition("/")[0]] / name.partition("/")[2] for name in [*kept, *gone]}
    for path in [*paths.values(), outside / "file"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (places.scratch / "link").symlink_to(outside)
    removed = places.clear(in_flight={"running": 1}, completed={"done": 2}, kept=["failed"])
    assert {name for name, path in paths.items() if path.exists()} == set(kept)
    assert removed == len(gone) + 1
    assert list(places.scratch.iterdir()) == []
    assert (outside / "file").exists()


def test_a_server_starts_before_its_bucket_and_is_ready_when_that_is_there(tmp_path: Path) -> None:
    with s3_server(tmp_path / "s3") as store:
        place, away = tmp_path / "s3" / BUCKET, tmp_path / "away"
        place.rename(away)
        url = f"http://127.0.0.1:{(port := free_port())}"
        env = {
            **os.environ,
            **bucket_env(store),
            "MEMVID_EXPORT_ROOT": str(tmp_path / "root"),
            "MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{port}",
            "MEMVID_EXPORT_STORAGE_URL": store.url,
            "MEMVID_EXPORT_SCRUB_SECONDS": "0",
        }
        with running([COMMAND, "serve", "--dev"], tmp_path / "log", env, f"{url}/healthz"):
            answer = httpx.get(f"{url}/readyz")
            assert answer.status_code == 503
            assert BUCKET in answer.json()["error"]["details"]["checks"]["storage"]
            away.rename(place)
            assert eventually(lambda: httpx.get(f"{url}/readyz").is_success)
        assert b"the storage cannot be listed yet" in (tmp_path / "log").read_bytes()


def test_a_server_whose_folder_of_artifacts_is_a_file_does_not_start_and_removes_nothing(tmp_path: Path) -> None:
    capsule = tmp_path / "name.mv2"
    capsule.touch()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "artifacts").symlink_to(capsule)
    env = {"MEMVID_EXPORT_ROOT": str(tmp_path / "root"), "MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{free_port()}"}
    done = command("serve", "--dev", env=env)
    assert done.returncode == 2
    assert b"MEMVID_EXPORT_ROOT must be a folder that can be written" in done.stderr
    assert capsule.exists()


@pytest.mark.parametrize("port", [0, 18_123])
def test_a_local_runpod_takes_jobs_while_it_is_wanted_and_no_longer(tmp_path: Path, port: int) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEMVID_", "RUNPOD_"))}
    env = {**kept, "MEMVID_EXPORT_ROOT": str(tmp_path / "root"), "MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{port}"}
    with local_platform(env) as driven:
        settings = Settings.read(driven, dev=True)
        assert settings.backend_mode == "runpod_queue"
        assert settings.public_url == (f"http://127.0.0.1:{port}" if port else None)
        assert settings.runpod_api_key is not None
        url = f"{settings.runpod_api_base}/{settings.runpod_endpoint_id}/health"
        key = settings.runpod_api_key.get_secret_value()
        assert httpx.get(url, headers={"Authorization": f"Bearer {key}"}).json()["jobs"]["inQueue"] == 0
        assert httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 401
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_a_local_runpod_that_does_not_come_up_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    env = {"MEMVID_EXPORT_ROOT": str(tmp_path), "PYTHONHOME": str(tmp_path / "none")}
    with pytest.raises(WorkerLost, match="did not start"), local_platform(env):
        pass
    assert "Python path configuration" in capfd.readouterr().err
