"""Of all runs of one attempt, one may publish; a closed attempt stays closed."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from common.contract import JobError
from common.storage import FileStorage
from handler import claim


class Place:
    """A prefix over files."""

    def __init__(self, root: Path) -> None:
        self.storage = FileStorage([root])
        self.prefix = (root / "out" / "1").as_uri() + "/"
        self._folder = root / "out" / "1"

    def age(self, seconds: float) -> None:
        """Make all that is there so much older."""
        for path in self._folder.iterdir():
            written = path.stat().st_mtime - seconds
            os.utime(path, (written, written))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_of_many_runs_at_once_one_takes_the_attempt(place: Place) -> None:
    ready = Barrier(8)

    def take(run: str) -> bool:
        ready.wait()
        return claim.take(place.storage, place.prefix, run)

    runs = [f"run{n}" for n in range(8)]
    with ThreadPoolExecutor(8) as threads:
        took = dict(zip(runs, threads.map(take, runs), strict=True))
    assert sum(took.values()) == 1
    assert [run for run in runs if claim.holds(place.storage, place.prefix, run)] == [r for r in runs if took[r]]


def test_a_claim_is_held_while_it_is_renewed_and_stale_when_it_is_not(place: Place) -> None:
    assert claim.state(place.storage, place.prefix) == "free"
    assert claim.take(place.storage, place.prefix, "run")
    assert claim.state(place.storage, place.prefix) == "held"
    place.age(claim.STALE_SECONDS + 1)
    assert claim.state(place.storage, place.prefix) == "stale"
    assert claim.renew(place.storage, place.prefix, "run")
    assert claim.state(place.storage, place.prefix) == "held"
    assert not claim.renew(place.storage, place.prefix, "another")


@pytest.mark.parametrize("taken", [False, True])
def test_a_closed_attempt_is_not_taken_renewed_or_published(place: Place, taken: bool) -> None:
    if taken:
        assert claim.take(place.storage, place.prefix, "run")
        assert not claim.close(place.storage, place.prefix)
        assert claim.holds(place.storage, place.prefix, "run")
    assert claim.close(place.storage, place.prefix, force=taken)
    assert claim.state(place.storage, place.prefix) == "closed"
    assert not claim.take(place.storage, place.prefix, "run")
    assert not claim.renew(place.storage, place.prefix, "run")
    assert not claim.holds(place.storage, place.prefix, "run")
    assert claim.close(place.storage, place.prefix)


def test_an_attempt_whose_run_is_dead_is_closed_without_force(place: Place) -> None:
    assert claim.take(place.storage, place.prefix, "run")
    place.age(claim.STALE_SECONDS + 1)
    assert claim.close(place.storage, place.prefix)
    assert not claim.holds(place.storage, place.prefix, "run")


def test_closing_wins_against_a_run_that_renews_all_the_time(place: Place) -> None:
    assert claim.take(place.storage, place.prefix, "run")
    with ThreadPoolExecutor(1) as threads:
        until = time.monotonic() + 5
        renewing = threads.submit(_renew_until_lost, place, until)
        assert claim.close(place.storage, place.prefix, force=True)
        assert renewing.result() is False
    assert claim.state(place.storage, place.prefix) == "closed"


def _renew_until_lost(place: Place, until: float) -> bool:
    while time.monotonic() < until:
        if not claim.renew(place.storage, place.prefix, "run"):
            return False
    return True


def test_what_a_run_ended_in_is_kept_however_long_it_is(place: Place) -> None:
    error = JobError(
        code="INVALID_EXPORT_REQUEST", message="é" * 9_000, retryable=False, details={"field": "x" * 9_000}
    )
    assert claim.close(place.storage, place.prefix, error=error)
    found = claim.read(place.storage, place.prefix)
    assert found is not None
    assert found.error is not None
    assert (found.error.code, found.error.message[:3]) == ("INVALID_EXPORT_REQUEST", "ééé")


@pytest.mark.parametrize("taken", [False, True])
def test_a_damaged_claim_is_held_by_nobody_and_can_be_closed(place: Place, taken: bool) -> None:
    if taken:
        assert claim.take(place.storage, place.prefix, "run")
    place.storage.write(place.prefix + claim.CLAIM_NAME, b"?".ljust(4_096))
    assert not claim.renew(place.storage, place.prefix, "run")
    assert not claim.take(place.storage, place.prefix, "another")
    place.age(claim.STALE_SECONDS + 1)
    assert claim.close(place.storage, place.prefix)
    assert claim.state(place.storage, place.prefix) == "closed"
