"""A table of what the tests run: ``python tests/coverage_table.py FILE`` (what ``coverage json`` writes)."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

PACKAGES = ("common", "handler", "control_plane", "control_plane/nexus")
"""The last one is a part of the one before."""
WORST = 20
LEAST = 0.95


def _share(counted: Counter[str], kind: str) -> float:
    return counted[f"covered_{kind}"] / counted[f"num_{kind}"] if counted[f"num_{kind}"] else 1.0


def _of(summary: dict[str, Any]) -> Counter[str]:
    return Counter(
        covered_lines=summary["covered_lines"],
        num_lines=summary["num_statements"],
        covered_branches=summary["covered_branches"],
        num_branches=summary["num_branches"],
    )


def _row(name: str, counted: Counter[str]) -> str:
    cells = [
        f"{counted[f'covered_{kind}']:>7,} of {counted[f'num_{kind}']:>6,} {_share(counted, kind):>7.1%}"
        for kind in ("lines", "branches")
    ]
    return f"{name:<46}{cells[0]}   {cells[1]}"


def main() -> None:
    """Print the table; exit 1 below ``LEAST``."""
    files = {name: _of(found["summary"]) for name, found in json.loads(Path(sys.argv[1]).read_bytes())["files"].items()}
    print(f"{'':<46}{'lines':>25}   {'branches':>25}")
    packages = {
        package: sum((counted for name, counted in files.items() if name.startswith(f"{package}/")), Counter[str]())
        for package in PACKAGES
    }
    for package, counted in packages.items():
        print(_row(package, counted))
    total = sum(files.values(), Counter())
    print(_row("together", total))

    def missing(name: str) -> int:
        counted = files[name]
        return counted.total() - 2 * (counted["covered_lines"] + counted["covered_branches"])

    print(f"\nthe {WORST} files that lack most")
    for name in sorted(files, key=missing, reverse=True)[:WORST]:
        print(_row(name, files[name]))
    if min(_share(counted, kind) for counted in (*packages.values(), total) for kind in ("lines", "branches")) < LEAST:
        sys.exit(f"below {LEAST:.0%}")


if __name__ == "__main__":
    main()
