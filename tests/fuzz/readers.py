"""Feeds damaged files to all that reads foreign bytes, and prints what came of it; ends with 1 on a finding.

Each case is put through its door in a child process with bounds of time and memory. What is found is made smaller and
kept under ``tests/fixtures/fuzz``, where ``test_findings.py`` tries it again.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import zstandard
from doors import Outcome, Reading, digest
from samples import damaged, write

KEPT = Path(__file__).parents[1] / "fixtures" / "fuzz"
KEPT_BYTES = 50_000
"""A finding that stays larger, compressed, is reported and not kept."""
WEIGHTS = {
    "json": 4,
    "gzip": 2,
    "zstd": 2,
    "ndjson": 4,
    "sidecar": 4,
    "tools": 1,
    "capsule": 4,
    "gate": 1,
    "manifest": 2,
    "profiles": 1,
    "keys": 1,
}
"""Turns that a door has, of about the same time each."""
TURN_SECONDS = 2.0


def case(door: str, sample: bytes, seed: int, number: int) -> bytes:
    """The case of a number: the same for the same seed."""
    return damaged(door, sample, random.Random(f"{seed} {door} {number}"))


def smaller(reading: Reading, door: str, data: bytes, outcome: Outcome, seconds: float = 30.0) -> bytes:
    """The least that still comes out so, as far as cutting pieces gets within the time."""
    until = time.monotonic() + seconds
    piece = len(data) // 2
    while piece:
        at = 0
        while at < len(data):
            if time.monotonic() > until:
                return data
            shorter = data[:at] + data[at + piece :]
            if reading.read(door, shorter) == outcome:
                data = shorter
            else:
                at += piece
        piece //= 2
    return data


def main() -> int:
    """Run until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--door", action="append", choices=sorted(WEIGHTS), help="only these")
    given = parser.parse_args()
    began = time.monotonic()
    cases: Counter[str] = Counter()
    outcomes: dict[str, Counter[str]] = {door: Counter() for door in given.door or WEIGHTS}
    findings: dict[tuple[str, Outcome], str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        samples = write(Path(temporary))
        turns = [door for door in outcomes for _ in range(WEIGHTS[door])]
        with Reading(Path(temporary)) as reading:
            while time.monotonic() < began + given.minutes * 60:
                for door in turns:
                    until = time.monotonic() + TURN_SECONDS
                    while time.monotonic() < until:
                        data = case(door, samples[door], given.seed, cases[door])
                        cases[door] += 1
                        outcome = reading.read(door, data)
                        outcomes[door][
                            f"{outcome.kind} {outcome.what}".strip() if not outcome.is_finding else outcome.kind
                        ] += 1
                        if outcome.is_finding and (door, outcome) not in findings:
                            findings[door, outcome] = _keep(reading, door, data, outcome)
                    if time.monotonic() > began + given.minutes * 60:
                        break
    minutes = (time.monotonic() - began) / 60
    print(f"{datetime.now(UTC):%Y-%m-%d}, seed {given.seed}: {sum(cases.values()):,} cases in {minutes:.0f} minutes\n")
    print("| reader | cases | outcomes | findings |")
    print("| --- | --- | --- | --- |")
    for door, count in cases.items():
        came = ", ".join(f"{number:,} {what}" for what, number in outcomes[door].most_common())
        found = sum(1 for where, _ in findings if where == door)
        print(f"| {door} | {count:,} | {came} | {found} |")
    for (door, outcome), where in findings.items():
        print(f"\n{door}: {outcome.kind}: {outcome.what}: {where}")
    return 1 if findings else 0


def _keep(reading: Reading, door: str, data: bytes, outcome: Outcome) -> str:
    if outcome.kind != "hung" and door not in ("sidecar", "tools", "gate"):  # which no cut leaves in order
        data = smaller(reading, door, data, outcome)
    kept = zstandard.compress(data, 19)
    if len(kept) > KEPT_BYTES:
        return f"{len(data):,} bytes, too large to keep"
    KEPT.mkdir(parents=True, exist_ok=True)
    what = "".join(char if char.isalnum() else "-" for char in outcome.what.split(" in ")[0].lower())
    path = KEPT / f"{door}-{what}-{digest(data)}.bin.zst"
    path.write_bytes(kept)
    return f"{path.name}, {len(data):,} bytes"


if __name__ == "__main__":
    raise SystemExit(main())
