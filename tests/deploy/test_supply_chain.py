"""What this project is made of: all of it locked with hashes, under licences that are allowed, and listed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from processes import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))
import supply_chain
from supply_chain import Package

PACKAGES = supply_chain.locked()
AUDIT = REPOSITORY / "scripts" / "supply_chain.py"


def test_every_dependency_is_locked_with_a_hash() -> None:
    assert {package.kind for package in PACKAGES} == {"pypi", "cargo", "npm"}
    assert supply_chain.without_hash(PACKAGES) == []


def test_a_dependency_without_a_hash_is_found() -> None:
    bare = Package("pypi", "bare", "1.0", ())
    half = Package("pypi", "half", "1.0", ("sha256:00", ""))
    assert supply_chain.without_hash([bare, half, PACKAGES[0]]) == [bare, half]


def test_every_dependency_has_a_licence_that_is_allowed() -> None:
    found = supply_chain.licences(PACKAGES)
    assert [package for package in PACKAGES if not supply_chain.is_allowed(package, found[package])] == []


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("AGPL-3.0-only", False),
        ("LicenseRef-Own", False),
        ("no such licence", False),
        ("", False),
    ],
)
def test_a_licence_is_allowed_by_the_list_alone(expression: str, allowed: bool) -> None:
    assert supply_chain.is_allowed(Package("pypi", "some", "1.0", ()), expression) is allowed


def test_the_page_of_licences_lists_what_is_locked() -> None:
    assert set(supply_chain.on_page()) == {package[:3] for package in PACKAGES}, "run scripts/audit --write"


def test_the_bill_of_materials_is_cyclonedx_and_whole() -> None:
    bill = supply_chain.sbom(supply_chain.licences(PACKAGES))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill)) is None
    assert len(bill["components"]) == len({package[:3] for package in PACKAGES})
    assert all("licenses" in component for component in bill["components"])


def test_what_could_not_be_asked_is_said_and_is_no_success(tmp_path: Path) -> None:
    nobody = {"PATH": "/usr/bin:/bin", "HTTPS_PROXY": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, AUDIT, "--sbom", tmp_path / "bill.json"],
        env=nobody,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "NOT CHECKED: advisories, Python" in done.stdout
    assert "NOT CHECKED: advisories, Rust" in done.stdout
    assert json.loads((tmp_path / "bill.json").read_text())["bomFormat"] == "CycloneDX"


@pytest.mark.parametrize("arguments", [["--write"], []], ids=["written", "checked"])
def test_a_crate_from_a_repository_is_named_as_locked_without_a_hash(arguments: list[str], tmp_path: Path) -> None:
    for name in ("scripts/supply_chain.py", "scripts/npm/package-lock.json", "pyproject.toml", "uv.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    for folder in ("docs", "native"):
        (tmp_path / folder).mkdir()
    shutil.copy(REPOSITORY / "docs/licences.md", tmp_path / "docs")
    lock = (REPOSITORY / "native/Cargo.lock").read_text()
    entry = '[[package]]\nname = "forked"\nversion = "0.1.0"\nsource = "git+https://github.com/some/forked#0a"\n'
    (tmp_path / "native/Cargo.lock").write_text(f"{lock}\n{entry}")
    done = subprocess.run(
        [sys.executable, tmp_path / "scripts/supply_chain.py", *arguments],
        env={"PATH": "/usr/bin:/bin", "HTTPS_PROXY": "http://127.0.0.1:9", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FINDING: cargo forked 0.1.0 is locked without a hash" in done.stdout


def test_locks_name_the_public_registries_alone() -> None:
    hosts = {"pypi.org", "files.pythonhosted.org", "registry.npmjs.org", "github.com"}
    for lock in ("uv.lock", "native/Cargo.lock", "scripts/npm/package-lock.json"):
        text = (REPOSITORY / lock).read_text()
        found = set(
            re.findall(
                r'"(?:resolved": "|registry\+)?(?:git\+)?https?://([^/"]+)/[^"]*(?:\.whl|\.gz|\.tgz|index|simple)"',
                text,
            )
        )
        assert found <= hosts, lock
