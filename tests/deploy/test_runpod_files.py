"""What Runpod and its Hub look for in a repository, and the job that an image can run by itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import msgspec
import pytest
from images import environment, last, stages
from processes import COMMAND, REPOSITORY

from common.contract import ExportOptions, JobInput
from common.settings import WorkerSettings

WORKER = {str(field.validation_alias) for field in WorkerSettings.model_fields.values()}
KNOWN = WORKER | {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"}
GPU = stages("Dockerfile.gpu")
CUDA = tuple(int(part) for part in GPU["worker"].base.partition("cuda:")[2].split(".")[:2])
POOLS = {"AMPERE_16", "AMPERE_24", "ADA_24", "AMPERE_48", "ADA_48_PRO", "AMPERE_80", "ADA_80_PRO", "HOPPER_141"}

TEXT = {"type": "string", "minLength": 1}
VERSIONS = {"type": "array", "minItems": 1, "items": {"type": "string", "pattern": r"^\d+\.\d+$"}}
INPUT = {
    "type": "object",
    "required": ["name", "type"],
    "additionalProperties": False,
    "properties": {
        "name": TEXT,
        "type": {"enum": ["string", "number", "boolean", "huggingface"]},
        "description": TEXT,
        "default": {},
        "required": {"type": "boolean"},
        "advanced": {"type": "boolean"},
        "min": {"type": "number"},
        "max": {"type": "number"},
        "trueValue": TEXT,
        "falseValue": TEXT,
        "options": {
            "type": "array",
            "items": {"type": "object", "required": ["label", "value"], "additionalProperties": False,
                      "properties": {"label": TEXT, "value": TEXT}},
        },
    },
}  # fmt: skip
HUB = {
    "type": "object",
    "required": ["title", "description", "type", "category", "config"],
    "additionalProperties": False,
    "properties": {
        "title": TEXT,
        "description": TEXT,
        "type": {"const": "serverless"},
        "category": {"enum": ["audio", "embedding", "language", "video", "image"]},
        "iconUrl": TEXT,
        "config": {
            "type": "object",
            "required": ["runsOn", "containerDiskInGb", "gpuCount", "gpuIds"],
            "additionalProperties": False,
            "properties": {
                "runsOn": {"const": "GPU"},
                "containerDiskInGb": {"type": "integer", "minimum": 1},
                "gpuCount": {"type": "integer", "minimum": 1},
                "gpuIds": TEXT,
                "allowedCudaVersions": VERSIONS,
                "presets": {
                    "type": "array",
                    "items": {"type": "object", "required": ["name", "defaults"], "additionalProperties": False,
                              "properties": {"name": TEXT, "defaults": {"type": "object"}}},
                },
                "env": {
                    "type": "array",
                    "items": {"type": "object", "required": ["key"], "additionalProperties": False,
                              "properties": {"key": TEXT, "value": TEXT, "input": INPUT}},
                },
            },
        },
    },
}  # fmt: skip
"""The tables of https://docs.runpod.io/hub/publishing-guide, for a worker with a GPU."""
TESTS = {
    "type": "object",
    "required": ["tests", "config"],
    "additionalProperties": False,
    "properties": {
        "tests": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "required": ["name", "input"], "additionalProperties": False,
                      "properties": {"name": TEXT, "input": {"type": "object"},
                                     "timeout": {"type": "integer", "minimum": 1000}}},
        },
        "config": {
            "type": "object",
            "required": ["gpuTypeId", "gpuCount"],
            "additionalProperties": False,
            "properties": {
                "gpuTypeId": TEXT,
                "gpuCount": {"type": "integer", "minimum": 1},
                "allowedCudaVersions": VERSIONS,
                "env": {
                    "type": "array",
                    "items": {"type": "object", "required": ["key", "value"], "additionalProperties": False,
                              "properties": {"key": TEXT, "value": TEXT}},
                },
            },
        },
    },
}  # fmt: skip


def read(name: str) -> Any:
    return json.loads((REPOSITORY / name).read_text(encoding="utf-8"))


TOML = tomllib.loads((REPOSITORY / "runpod.toml").read_text(encoding="utf-8"))
JOBS = [test["input"] for test in read(".runpod/tests.json")["tests"]] + [read("test_input.json")["input"]]


def test_the_files_of_the_hub_have_the_fields_that_its_guide_names() -> None:
    jsonschema.validate(read(".runpod/hub.json"), HUB)
    jsonschema.validate(read(".runpod/tests.json"), TESTS)


def test_the_hub_offers_variables_that_the_worker_knows_and_presets_of_these() -> None:
    config = read(".runpod/hub.json")["config"]
    keys = [entry["key"] for entry in config["env"]]
    assert len(set(keys)) == len(keys)
    assert set(keys) - KNOWN == set()
    for preset in config["presets"]:
        assert set(preset["defaults"]) <= set(keys)
    tests = read(".runpod/tests.json")["config"]["env"]
    assert {entry["key"] for entry in tests} - KNOWN == set()


def test_what_the_hub_sets_by_default_is_a_setting_that_starts() -> None:
    config = read(".runpod/hub.json")["config"]
    defaults = {entry["key"]: str(entry["input"].get("default", "")) for entry in config["env"]}
    for preset in config["presets"]:
        WorkerSettings.read(defaults | {"MEMVID_EXPORT_STORAGE_URL": "s3://bucket/prefix"} | preset["defaults"])


def test_every_place_asks_for_machines_whose_driver_runs_the_image() -> None:
    hub, tests = read(".runpod/hub.json")["config"], read(".runpod/tests.json")["config"]
    for config in (hub, tests):
        assert all(tuple(int(part) for part in version.split(".")) >= CUDA for version in config["allowedCudaVersions"])
    assert set(hub["gpuIds"].split(",")) <= POOLS
    assert tests["gpuTypeId"] in TOML["project"]["gpu_types"]
    assert hub["containerDiskInGb"] == TOML["project"]["container_disk_size_gb"]


def test_the_torch_that_is_locked_is_built_for_the_cuda_of_the_base_image() -> None:
    lock = tomllib.loads((REPOSITORY / "uv.lock").read_text(encoding="utf-8"))
    versions = {package["name"]: package["version"] for package in lock["package"] if "version" in package}
    assert int(versions["cuda-toolkit"].split(".")[0]) == CUDA[0]


def test_the_project_file_has_its_four_tables_and_names_what_is_there() -> None:
    assert {"project", "template", "runtime"} <= set(TOML)
    assert {"uuid", "name", "base_image", "gpu_types", "gpu_count", "volume_mount_path", "ports"} <= set(
        TOML["project"]
    )
    assert set(TOML["project"]["env_vars"]) - KNOWN == {"POD_INACTIVITY_TIMEOUT", "RUNPOD_DEBUG_LEVEL"}
    assert environment(GPU, "dependencies")["UV_PYTHON"].startswith(TOML["runtime"]["python_version"] + ".")
    WorkerSettings.read(TOML["project"]["env_vars"])
    for path in (TOML["runtime"]["handler_path"], TOML["runtime"]["requirements_path"]):
        assert (REPOSITORY / path).is_file()
    assert f"VERSION={TOML['project']['base_image'].rpartition(':')[2]}" in [
        step.value for step in GPU["worker"].steps if step.name == "ARG"
    ]


def test_runpod_finds_a_dockerfile_and_a_handler_where_it_looks_for_them() -> None:
    assert (REPOSITORY / ".runpod" / "Dockerfile").resolve() == REPOSITORY / "Dockerfile.gpu"
    handler = [sys.executable, REPOSITORY / ".runpod" / "handler.py"]
    shown = [
        subprocess.run([*start, "--help"], capture_output=True, text=True, env={"COLUMNS": "100"}, check=True).stdout
        for start in (handler, [COMMAND, "worker"])
    ]
    assert "--test-input" in shown[0]
    assert _options(shown[0]) == _options(shown[1])


def _options(help_text: str) -> set[str]:
    return set(re.findall(r"--[a-z-]+", help_text))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["job_id"])
def test_every_job_is_one_that_a_worker_takes(job: dict[str, Any]) -> None:
    assert set(job) <= {field.name for field in msgspec.structs.fields(JobInput)}
    assert msgspec.convert(job, JobInput).output_prefix.endswith(f"/{job['job_id']}/{job['attempt']}/")
    known = {field.encode_name for field in msgspec.structs.fields(ExportOptions)}
    assert set(job.get("options", {})) <= known


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["job_id"])
def test_every_job_reads_and_writes_where_the_image_lets_it(job: dict[str, Any]) -> None:
    settings = WorkerSettings.read(environment(GPU, "worker"))
    places = settings.storage(settings.root, settings.staging_root).roots
    app = Path(last(GPU, "worker", "WORKDIR").value)
    assert [step.value for step in GPU["worker"].steps if step.name == "COPY"][-2:] == [
        "examples examples",
        "test_input.json ./",
    ]
    payload, output = (Path(urlsplit(job[key]).path) for key in ("payload_ref", "output_prefix"))
    assert (REPOSITORY / payload.relative_to(app)).is_file()
    assert output.is_relative_to(settings.root)
    assert all(any(path.is_relative_to(place) for place in places) for path in (payload, output))


def test_the_test_input_runs_for_real_as_the_worker_of_an_image_would_run_it(tmp_path: Path) -> None:
    """The image's folders lie under another root; nothing else differs."""
    job = (REPOSITORY / "test_input.json").read_text(encoding="utf-8")
    moved = job.replace("file:///app/", f"file://{REPOSITORY}/").replace("file:///data/", f"file://{tmp_path}/data/")
    (tmp_path / "test_input.json").write_text(moved, encoding="utf-8")
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "MEMVID_EXPORT_ROOT": str(tmp_path / "data" / "exports"),
        "MEMVID_EXPORT_STORAGE_URL": f"file://{REPOSITORY}/examples",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
    }
    done = subprocess.run(
        [COMMAND, "worker", "--test-input", tmp_path / "test_input.json"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "data" / "exports" / "test-input" / "1"
    [manifest] = folder.glob("*.manifest.json")
    named = json.loads(manifest.read_text(encoding="utf-8"))
    assert named["vectors"] > 0
    assert all((folder / part["fileName"]).stat().st_size == part["sizeBytes"] for part in named["parts"])
