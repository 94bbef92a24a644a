"""docs/mcp.md: its session is one of today, its commands, settings, tools and prompts are those that there are."""

from __future__ import annotations

import json
import re
import shlex
import subprocess

from processes import COMMAND, REPOSITORY

from common.frames.guide import PLAYBOOKS, TOOLS
from common.settings import Settings
from control_plane.reading.tools import Locator

PAGE = (REPOSITORY / "docs" / "mcp.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_session_shown_is_what_a_session_gives() -> None:
    done = subprocess.run(
        [REPOSITORY / "scripts" / "transcript", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_command_is_one_and_knows_its_options() -> None:
    lines = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    configured = [json.loads(text)["mcpServers"]["code-graph"] for _, text in BLOCKS if "mcpServers" in text]
    lines += [shlex.join([it["command"], *it["args"]]) for it in configured if "command" in it]
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line)
        if words[0] == "npx":
            pinned = json.loads((REPOSITORY / "scripts" / "npm" / "package.json").read_text())["dependencies"]
            name, _, version = words[1].rpartition("@")
            assert pinned[name] == version
            words = words[words.index("--cli") + 1 : words.index("--method")]
        if words[0] != "memvid-export":
            continue
        shown = subprocess.run([COMMAND, words[1], "--help"], capture_output=True, text=True, check=False)
        assert shown.returncode == 0, shown.stderr
        assert [word for word in words if word.startswith("--") and word not in shown.stdout] == []


def test_every_setting_has_the_default_that_is_said() -> None:
    defaults = {str(it.validation_alias): it.default for it in Settings.model_fields.values() if it.validation_alias}
    assert set(re.findall(r"\bMEMVID_\w+", PAGE)) <= set(defaults)
    said = re.findall(r"`([A-Z][A-Z0-9_]+)` = `([^`]+)`", PAGE)
    assert len(said) == 2
    assert [(name, value) for name, value in said if str(defaults[name]) != value] == []


def test_every_tool_and_prompt_is_named() -> None:
    assert [tool.name for tool in TOOLS if f"`{tool.name}`" not in PAGE] == []
    assert [playbook.name for playbook in PLAYBOOKS if f"`{playbook.name}`" not in PAGE] == []
    assert {"job_id", "capsule_path"} == set(Locator.__struct_fields__)
