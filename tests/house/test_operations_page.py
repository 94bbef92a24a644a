"""The operator's page names tests that exist."""

from __future__ import annotations

import re

from processes import REPOSITORY


def test_each_threat_has_a_test() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    section = page.partition("\n## Threats\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    tests = {
        name
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= tests, row
