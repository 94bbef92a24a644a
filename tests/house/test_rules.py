"""The rules of the house that a linter does not hold."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from processes import COMMAND, EXAMPLE, REPOSITORY

from common.graph.read import read_graph
from common.settings import Settings

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SHELL_BLOCKS = re.findall(r"^```(?:sh|bash|console|shell)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [
    line.removeprefix("$ ").split(" #")[0].strip()
    for block in SHELL_BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
]
CLOCK_AND_ENVIRONMENT = {
    ("os", "environ"), ("os", "getenv"), ("time", "time"), ("time", "time_ns"), ("datetime", "now"),
    ("datetime", "utcnow"), ("date", "today"),
}  # fmt: skip


def python_files(room: str) -> list[Path]:
    return sorted((REPOSITORY / room).rglob("*.py"))


@pytest.mark.parametrize("path", python_files("common"), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_common_reads_neither_the_environment_nor_the_clock(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # A child process is given this one's environment: that reads nothing out of it.
    handed_on = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "env"
        for inner in ast.walk(node)
    }
    uses = [
        f"line {node.lineno}: {node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and id(node) not in handed_on
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in CLOCK_AND_ENVIRONMENT
    ]
    assert uses == []


@pytest.mark.parametrize("room", ["common", "handler", "control_plane"])
def test_no_exception_is_swallowed(room: str) -> None:
    """``except Exception: pass`` and its like; a handler for a named error may be empty, and says why."""
    silent = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for path in python_files(room)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
        and all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
    ]
    assert silent == []


def test_help_loads_nothing_heavy() -> None:
    heavy = ["httpx", "litestar", "memvid_sdk", "numpy", "pydantic", "sqlalchemy", "tokenizers", "wordllama"]
    script = f"import sys, control_plane.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_example_graph_goes_through_and_names_no_machine() -> None:
    request = read_graph(EXAMPLE)
    assert len(request.nodes) > 100
    paths = {str(node.properties.get("filePath") or "") for node in request.nodes}
    assert not [path for path in paths if path.startswith(("/", "~")) or ".." in path]


def test_every_script_in_the_readme_is_there_and_can_be_run() -> None:
    scripts = {word for line in COMMANDS for word in shlex.split(line)[:1] if word.startswith("scripts/")}
    assert {"scripts/demo", "scripts/test"} <= scripts
    for script in scripts:
        assert (REPOSITORY / script).stat().st_mode & 0o111, script


@pytest.mark.parametrize("line", sorted({line for line in COMMANDS if line.startswith("memvid-export ")}))
def test_every_command_in_the_readme_knows_its_options(line: str) -> None:
    words = shlex.split(re.split(r" [|>&] ", line)[0])
    done = subprocess.run(
        [COMMAND, words[1], "--help"], capture_output=True, text=True, env={"COLUMNS": "200"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [word for word in words[2:] if word.startswith("--") and word not in done.stdout] == []


def test_the_readme_names_every_setting() -> None:
    settings = {str(field.validation_alias) for field in Settings.model_fields.values() if field.validation_alias}
    assert sorted(name for name in settings if name not in README) == []
