"""docs/deploy.md: every variable exists, every default is the one of the settings, every policy and rule is one."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from typing import Any

import botocore.session
import pytest
from botocore.validate import ParamValidator
from images import stages
from processes import COMMAND, REPOSITORY

from common.settings import Settings

PAGE = (REPOSITORY / "docs" / "deploy.md").read_text(encoding="utf-8")
DEFAULTS = {
    str(field.validation_alias): field.default for field in Settings.model_fields.values() if field.validation_alias
}
FOREIGN = {
    # boto3's
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL_S3",
    # the Runpod SDK's
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "RUNPOD_SKIP_GPU_CHECK", "RUNPOD_SECRET_name",
}  # fmt: skip
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
JSON = [json.loads(text) for language, text in BLOCKS if language == "json"]
COMMANDS = [
    line
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if not line.startswith("#")
]


def test_every_variable_is_one_that_something_reads() -> None:
    named = set(re.findall(r"\b(?:MEMVID|RUNPOD|AWS|POSTGRES)_[A-Za-z0-9_]*[A-Za-z0-9]", PAGE))
    assert sorted(named - set(DEFAULTS) - {"MEMVID_EXPORT_API_KEY"} - FOREIGN) == []


def test_every_default_is_the_one_of_the_settings() -> None:
    said = re.findall(r"`([A-Z][A-Z0-9_]+)` = `([^`]+)`", PAGE)
    assert len(said) > 10
    assert [(name, value) for name, value in said if str(DEFAULTS[name]).removesuffix(".0") != value] == []


def test_the_least_settings_of_the_control_plane_start() -> None:
    [text] = [text for language, text in BLOCKS if language == "ini"]
    settings = Settings.read(dict(line.split("=", 1) for line in text.splitlines()))
    assert settings.backend_mode == "runpod_queue"


def test_the_policies_are_policies_of_the_calls_that_are_made() -> None:
    policies = [document for document in JSON if "Statement" in document]
    assert len(policies) == 2
    for policy in policies:
        for statement in policy["Statement"]:
            assert statement["Effect"] == "Allow"
            assert not any("*" in action for action in statement["Action"])
            # A list is a right on the bucket, anything else one on objects.
            lists = all(action.startswith("s3:ListBucket") for action in statement["Action"])
            resources = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
            assert all(("/" not in resource) == lists for resource in resources)
    worker = {action for statement in policies[1]["Statement"] for action in statement["Action"]}
    server = {action for statement in policies[0]["Statement"] for action in statement["Action"]}
    assert worker <= server


def test_the_lifecycle_rules_are_taken_by_s3() -> None:
    [rules] = [document for document in JSON if "Rules" in document]
    service = botocore.session.get_session().get_service_model("s3")
    shape = service.operation_model("PutBucketLifecycleConfiguration").input_shape
    request: dict[str, Any] = {"Bucket": "bucket", "LifecycleConfiguration": rules}
    assert ParamValidator().validate(request, shape).generate_report() == ""
    expires = {rule["Filter"]["Prefix"]: rule["Expiration"]["Days"] for rule in rules["Rules"] if "Expiration" in rule}
    assert expires["exports/artifacts/"] * 86_400 > DEFAULTS["MEMVID_EXPORT_RETENTION_SECONDS"]
    assert expires["exports/payloads/"] > 7


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.search(r"(^| )memvid-export ", line)])
def test_every_command_knows_its_options(line: str) -> None:
    words = shlex.split(line)
    words = words[words.index("memvid-export") + 1 :] if "memvid-export" in words else words
    if words[0].startswith("-"):  # docker's name of a container
        return
    shown = subprocess.run(
        [COMMAND, words[0], "--help"], capture_output=True, text=True, env={"COLUMNS": "200"}, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert [word for word in words if word.startswith("--") and word not in shown.stdout] == []


def test_every_file_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`((?:scripts|examples|\.runpod)/[\w./-]+|(?:Dockerfile|compose|runpod)\.\w+)`", PAGE))
    assert {"Dockerfile.api", "Dockerfile.gpu", "compose.yaml", "runpod.toml", "scripts/check-images"} <= named
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []
    for name in re.findall(r"-f (Dockerfile\.\w+)", PAGE):
        assert stages(name)
