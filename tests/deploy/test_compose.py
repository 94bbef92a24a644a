"""compose.yaml: valid, complete, and in step with the settings, the images and the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
import yaml
from images import last, stages
from processes import COMMAND, REPOSITORY
from services import s3_server

from common.settings import Settings, WorkerSettings
from control_plane.backends.checker import CHECKERS

FILE = REPOSITORY / "compose.yaml"
SETTINGS = {str(field.validation_alias) for field in Settings.model_fields.values() if field.validation_alias}
SETTINGS |= {"MEMVID_EXPORT_API_KEY", "MEMVID_EXPORT_API_KEY_FILE"}
BOTO3 = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"}
THEIRS = {
    "postgres": {"POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"},
    "s3": {"ROOT_ACCESS_KEY_ID", "ROOT_SECRET_ACCESS_KEY"},
}
"""What the images of others are configured with."""


def filled(value: Any) -> Any:
    """The file with the defaults of its ``${NAME:-default}``, as compose reads it where nothing is set."""
    if isinstance(value, dict):
        return {name: filled(item) for name, item in value.items()}
    if isinstance(value, list):
        return [filled(item) for item in value]
    return re.sub(r"\$\{[A-Z0-9_]+:-([^}]*)\}", r"\1", value) if isinstance(value, str) else value


RAW: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
COMPOSE: dict[str, Any] = filled(RAW)
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}


def size(text: str) -> int:
    """Bytes of ``512m`` or ``2g``."""
    return int(text[:-1]) << {"m": 20, "g": 30}[text[-1]]


def test_the_file_is_valid_by_the_compose_specification() -> None:
    checker = Path(sys.executable).parent / "check-jsonschema"
    done = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", FILE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_holds_everything_that_a_whole_needs() -> None:
    assert set(SERVICES) == {"api", "postgres", "s3", "bucket", "runpod"}


@pytest.mark.parametrize("name", SERVICES)
def test_no_variable_is_unknown(name: str) -> None:
    assert set(SERVICES[name]["environment"]) - SETTINGS - BOTO3 - THEIRS.get(name, set()) == set()


@pytest.mark.parametrize("name", SERVICES)
def test_every_secret_is_a_placeholder_that_can_be_seen_and_replaced(name: str) -> None:
    secrets = {
        key: text
        for key, text in RAW["services"][name]["environment"].items()
        if re.search("KEY$|PASSWORD|DATABASE_URL", key)
    }
    assert [key for key, text in secrets.items() if not re.search(r"\$\{[A-Z_]+:-[^}]*change-me[^}]*\}", text)] == []


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_and_bounded_and_hold_no_root_rights(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":v?\d+\.\d+", service["image"])
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert service["read_only"] is True
    assert any(place.split(":")[0] == "/tmp" for place in service["tmpfs"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    # The entry point of postgres makes its folder its own, then drops root.
    given = ["CHOWN", "DAC_READ_SEARCH", "FOWNER", "SETGID", "SETUID"] if name == "postgres" else []
    assert service.get("cap_add", []) == given
    assert not {"privileged", "pid", "network_mode", "devices", "user"} & set(service)


def test_every_service_that_stays_says_how_it_is() -> None:
    images = stages("Dockerfile.api")
    for name, service in SERVICES.items():
        if service["restart"] != "no":
            built = OURS.get(name, {}).get("build", {}).get("target")
            check = service.get("healthcheck") or (last(images, built, "HEALTHCHECK").value if built else None)
            assert check, name


def test_the_api_tries_itself_every_five_minutes() -> None:
    assert OURS["api"]["environment"]["MEMVID_EXPORT_CANARY_SECONDS"] == "300"


def test_nothing_listens_beyond_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:8080:8080"]


def test_a_service_waits_for_what_says_of_itself_that_it_is_ready() -> None:
    waits = [(name, *need) for name, service in SERVICES.items() for need in service.get("depends_on", {}).items()]
    assert len(waits) == 5
    for _, needed, how in waits:
        service = SERVICES[needed]
        if how["condition"] == "service_completed_successfully":
            assert service["restart"] == "no"
        else:
            build = service.get("build")
            assert "healthcheck" in service or last(stages(build["dockerfile"]), build["target"], "HEALTHCHECK")


def test_what_is_kept_lies_in_a_named_volume_at_the_place_where_the_image_writes() -> None:
    mounts = [volume.split(":") for service in SERVICES.values() for volume in service.get("volumes", [])]
    assert sorted(name for name, _ in mounts) == sorted(COMPOSE["volumes"])
    for service in (SERVICES["api"], SERVICES["runpod"]):
        image = stages(service["build"]["dockerfile"])
        assert last(image, service["build"]["target"], "VOLUME").exec_form == [service["volumes"][0].split(":")[1]]


@pytest.mark.parametrize("name", OURS)
def test_our_images_are_built_from_stages_that_exist_under_the_name_of_this_version(name: str) -> None:
    build = SERVICES[name]["build"]
    assert build["target"] in stages(build["dockerfile"])
    version = last(stages(build["dockerfile"]), build["target"], "ARG")
    assert SERVICES[name]["image"].endswith(":0.1.0")
    assert version.name == "ARG"


def test_the_api_starts_with_its_variables_and_finds_the_other_services() -> None:
    settings = Settings.read(SERVICES["api"]["environment"])
    assert settings.backend_mode == "runpod_queue"
    assert f":{settings.port}:{settings.port}" in SERVICES["api"]["ports"][0]
    database, runpod = urlsplit(settings.database_url), urlsplit(settings.runpod_api_base)
    postgres = SERVICES["postgres"]["environment"]
    assert database.hostname == "postgres"
    assert (database.username, database.password) == (postgres["POSTGRES_USER"], postgres["POSTGRES_PASSWORD"])
    assert database.path == "/" + postgres["POSTGRES_DB"]
    assert runpod.hostname == "runpod"
    assert f"0.0.0.0:{runpod.port}" in SERVICES["runpod"]["command"]
    assert settings.public_url == f"http://api:{settings.port}"


def test_the_workers_are_of_the_endpoint_and_the_bucket_that_the_api_uses() -> None:
    api, runpod = (SERVICES[name]["environment"] for name in ("api", "runpod"))
    for key in ("RUNPOD_ENDPOINT_ID", "RUNPOD_API_KEY", "MEMVID_EXPORT_STORAGE_URL", *BOTO3):
        assert api[key] == runpod[key]
    s3, keys = urlsplit(api["AWS_ENDPOINT_URL_S3"]), SERVICES["s3"]["environment"]
    assert s3.hostname == "s3"
    assert f":{s3.port}" in SERVICES["s3"]["command"]
    assert (keys["ROOT_ACCESS_KEY_ID"], keys["ROOT_SECRET_ACCESS_KEY"]) == (
        api["AWS_ACCESS_KEY_ID"],
        api["AWS_SECRET_ACCESS_KEY"],
    )


@pytest.mark.parametrize("name", ["api", "runpod", "bucket"])
def test_boto3_finds_all_of_its_variables(name: str) -> None:
    env = SERVICES[name]["environment"]
    script = (
        "import boto3; s = boto3.session.Session(); c = s.client('s3'); k = s.get_credentials(); "
        "print(s.region_name, c.meta.endpoint_url, k.access_key, k.secret_key)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        env["AWS_DEFAULT_REGION"],
        env["AWS_ENDPOINT_URL_S3"],
        env["AWS_ACCESS_KEY_ID"],
        env["AWS_SECRET_ACCESS_KEY"],
    ]


def test_all_jobs_that_the_workers_take_at_once_have_their_memory() -> None:
    """A worker takes as many as there are processors and memory for, and each thinks that it is alone."""
    service = SERVICES["runpod"]
    limits = service["deploy"]["resources"]["limits"]
    job = WorkerSettings.read(service["environment"]).worker_memory_bytes
    workers = int(service["command"][-1].partition(":")[2])
    at_once = workers * min(int(limits["cpus"]), size(limits["memory"]) // job)
    assert at_once * job < size(limits["memory"])


def test_graphs_that_are_checked_at_once_have_their_memory() -> None:
    service = SERVICES["api"]
    job = WorkerSettings.read(service["environment"]).worker_memory_bytes
    assert CHECKERS * job < size(service["deploy"]["resources"]["limits"]["memory"])


@pytest.mark.parametrize("name", ["api", "runpod"])
def test_every_command_of_ours_knows_its_options(name: str) -> None:
    build = SERVICES[name]["build"]
    default = last(stages(build["dockerfile"]), build["target"], "CMD").exec_form
    program, command, *words = SERVICES[name].get("command", default)
    assert program == "memvid-export"
    shown = subprocess.run(
        [COMMAND, command, "--help"], capture_output=True, text=True, env={"COLUMNS": "200"}, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert [word for word in words if word.startswith("--") and word not in shown.stdout] == []


def test_the_bucket_is_made_once_and_left_alone_after_that(tmp_path: Path) -> None:
    _, *words = SERVICES["bucket"]["command"]
    with s3_server(tmp_path / "buckets") as server:
        for _ in range(2):
            subprocess.run([sys.executable, *words], env=dict(server.env), check=True)
        s3 = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            region_name="us-east-1",
            aws_access_key_id=server.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=server.env["AWS_SECRET_ACCESS_KEY"],
        )
        names = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
        s3.close()
    assert names == {server.bucket, urlsplit(SERVICES["api"]["environment"]["MEMVID_EXPORT_STORAGE_URL"]).netloc}
