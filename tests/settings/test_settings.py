"""Settings come from a mapping; a wrong one names itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import InvalidSettings
from common.settings import Settings, WorkerSettings

KEY = {"MEMVID_EXPORT_API_KEY": "k-123"}


def test_defaults_are_those_of_the_contract() -> None:
    settings = Settings.read(KEY)
    assert (settings.host, settings.port) == ("0.0.0.0", 8080)
    assert settings.root == Path("/data/exports")
    assert settings.staging_root == Path("/data/exports/staging")
    assert (settings.retention_seconds, settings.queue_capacity) == (86_400, 128)
    assert settings.backend_mode == "legacy_vps"
    assert settings.max_payload_bytes == 500_000_000


def test_without_a_key_only_dev_starts() -> None:
    with pytest.raises(InvalidSettings, match="MEMVID_EXPORT_API_KEY must be set"):
        Settings.read({"MEMVID_EXPORT_API_KEY": "  "})
    assert Settings.read({}, dev=True).api_key is None
    assert Settings.read({}, dev=True).host == "127.0.0.1"


def test_the_key_comes_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    key = Settings.read({"MEMVID_EXPORT_API_KEY_FILE": str(file)}).api_key
    assert key is not None
    assert key.get_secret_value() == "from-file"
    with pytest.raises(InvalidSettings, match="MEMVID_EXPORT_API_KEY_FILE"):
        Settings.read({"MEMVID_EXPORT_API_KEY_FILE": str(tmp_path / "nowhere")})
    with pytest.raises(InvalidSettings, match="both set"):
        Settings.read({**KEY, "MEMVID_EXPORT_API_KEY_FILE": str(file)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MEMVID_EXPORT_BIND_ADDR", "8080"),
        ("MEMVID_EXPORT_BIND_ADDR", "0.0.0.0:99999"),
        ("MEMVID_EXPORT_RETENTION_SECONDS", "0"),
        ("MEMVID_EXPORT_RETENTION_SECONDS", "a day"),
        ("MEMVID_EXPORT_QUEUE_CAPACITY", "-1"),
        ("MEMVID_EXPORT_BACKEND_MODE", "kubernetes"),
        ("MEMVID_EMBEDDING_MODE", "psychic"),
        ("MEMVID_EXPORT_WRITER", "word"),
        ("MEMVID_EXPORT_WORKER_SLOTS", "0"),
        ("MEMVID_EXPORT_WORKER_MEMORY_BYTES", "1"),
        ("MEMVID_EXPORT_CORS_ORIGINS", "*,https://a.example"),
        ("MEMVID_EXPORT_CORS_ORIGINS", "a.example/path"),
        ("MEMVID_EXPORT_METRICS_NEED_KEY", "perhaps"),
        ("MEMVID_EXPORT_DATABASE_URL", "mysql://x"),
        ("MEMVID_EXPORT_STORAGE_URL", "gs://bucket"),
        ("MEMVID_EXPORT_STORAGE_URL", "s3://B/x"),
        ("MEMVID_EXPORT_STORAGE_URL", "/srv/exports"),
        ("MEMVID_EXPORT_S3_ADDRESSING", "postal"),
        ("MEMVID_EXPORT_S3_ENCRYPTION", "rot13"),
        ("MEMVID_EXPORT_FETCH_HOSTS", "https://a.example"),
        ("MEMVID_EXPORT_STRAY_SECONDS", "0"),
        ("MEMVID_EXPORT_PUBLIC_URL", "a.example"),
        ("RUNPOD_API_BASE", "api.runpod.ai"),
        ("MEMVID_EXPORT_STORAGE_URL", "s3://bucket/a//b"),
        ("MEMVID_EXPORT_STORAGE_URL", "s3://bucket/../b"),
        ("MEMVID_EXPORT_STORAGE_URL", "s3://bucket/a%00b"),
        ("MEMVID_EXPORT_STORAGE_URL", "s3://bucket/" + "a" * 600),
        ("MEMVID_EXPORT_STORAGE_URL", "file:///srv/../etc"),
        ("MEMVID_EXPORT_PUBLIC_URL", "https://[a.example"),
        ("RUNPOD_API_BASE", "http://a.example:99999/v2"),
        ("RUNPOD_REST_BASE", "http://:80/v1"),
        ("RUNPOD_API_KEY", "schlüssel"),
        ("RUNPOD_API_KEY", "two\nlines"),
        ("RUNPOD_ENDPOINT_ID", "an endpoint"),
        ("RUNPOD_POLL_INTERVAL_SECONDS", "0"),
        ("RUNPOD_EXECUTION_TIMEOUT_MS", "10"),
        ("RUNPOD_TTL_MS", "10"),
    ],
)
def test_a_wrong_setting_stops_with_one_line_that_names_it(name: str, value: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.read({**KEY, name: value})
    assert caught.value.message.startswith(f"{name} must be ")
    assert "\n" not in caught.value.message
    assert caught.value.details == {"field": name}


def test_a_secret_never_shows() -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.read({"MEMVID_EXPORT_API_KEY": "se cret"})
    assert "se cret" not in caught.value.message
    assert "k-123" not in repr(Settings.read(KEY))


def test_the_same_mapping_gives_the_same_settings() -> None:
    env = {**KEY, "MEMVID_EXPORT_CORS_ORIGINS": "https://a.example, https://b.example"}
    assert Settings.read(env) == Settings.read(env)
    assert Settings.read(env).cors_origins == ("https://a.example", "https://b.example")


@pytest.mark.parametrize("name", ["RUNPOD_ENDPOINT_ID", "RUNPOD_API_KEY"])
def test_runpod_needs_an_endpoint_and_a_key(name: str) -> None:
    env = {**KEY, "MEMVID_EXPORT_BACKEND_MODE": "runpod_queue", "RUNPOD_ENDPOINT_ID": "abc", "RUNPOD_API_KEY": "r-456"}
    settings = Settings.read(env)
    assert (settings.backend_mode, settings.runpod_poll_seconds) == ("runpod_queue", 5)
    assert "r-456" not in repr(settings)
    with pytest.raises(InvalidSettings, match=f"{name} must be set"):
        Settings.read({**env, name: ""})


def test_links_need_a_bucket() -> None:
    env = {**KEY, "MEMVID_EXPORT_WORKER_LINKS": "true"}
    assert Settings.read({**env, "MEMVID_EXPORT_STORAGE_URL": "s3://bucket/exports/"}).worker_links
    with pytest.raises(InvalidSettings, match="MEMVID_EXPORT_WORKER_LINKS"):
        Settings.read(env)


def test_storage_is_what_the_settings_say(tmp_path: Path) -> None:
    bucket = Settings.read({**KEY, "MEMVID_EXPORT_STORAGE_URL": "s3://exports-1/some/prefix/"})
    assert bucket.storage_url == "s3://exports-1/some/prefix"
    assert bucket.storage(tmp_path).s3 is not None
    assert bucket.storage(tmp_path).roots == [str(tmp_path)]
    shared = WorkerSettings.read({"MEMVID_EXPORT_STORAGE_URL": "file:///srv/shared%20exports"}).storage()
    assert (shared.roots, shared.s3) == (["/srv/shared exports"], None)


def test_the_password_of_the_database_does_not_show() -> None:
    settings = Settings.read({**KEY, "MEMVID_EXPORT_DATABASE_URL": "postgresql+psycopg://u:hidden@db/exports"})
    assert "hidden" not in repr(settings)
