"""What reads foreign bytes refuses damaged ones by name: everything that was ever found, and some new cases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from doors import Outcome, Reading
from readers import KEPT, WEIGHTS, case
from samples import write

FINDINGS = sorted(KEPT.glob("*.bin.zst"))
CASES = {"gate": 8, "tools": 4, "sidecar": 40, "capsule": 30, "manifest": 60}
"""Of the others there are 150."""


class Doors:
    """The samples, and a child that reads."""

    def __init__(self, folder: Path) -> None:
        self.samples = write(folder)
        self.reading = Reading(folder)


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    found = Doors(tmp_path_factory.mktemp("samples"))
    with found.reading:
        yield found


@pytest.mark.parametrize("door", WEIGHTS)
def test_a_sample_is_read(doors: Doors, door: str) -> None:
    assert doors.reading.read(door, doors.samples[door]) == Outcome("read", "")


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda path: path.name.removesuffix(".bin.zst"))
def test_what_was_found_once_is_refused_by_name(doors: Doors, finding: Path) -> None:
    door = finding.name.partition("-")[0]
    outcome = doors.reading.read(door, zstandard.decompress(finding.read_bytes()))
    assert not outcome.is_finding, outcome


@pytest.mark.parametrize("door", WEIGHTS)
def test_damaged_input_is_read_or_refused_by_name(doors: Doors, door: str) -> None:
    outcomes = [
        doors.reading.read(door, case(door, doors.samples[door], 1, number)) for number in range(CASES.get(door, 150))
    ]
    assert [outcome for outcome in outcomes if outcome.is_finding] == []
    assert "refused" in {outcome.kind for outcome in outcomes} or door == "tools"


def test_a_reader_that_ends_its_process_or_raises_anything_else_is_a_finding(doors: Doors) -> None:
    assert doors.reading.read("no such door", b"") == Outcome("raised", "KeyError in the reader")
    assert not doors.reading.read("json", b"{").is_finding
