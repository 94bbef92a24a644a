"""Places for uploads, streams and downloads: in all, and a fair share for each client."""

from __future__ import annotations

import re
from contextlib import ExitStack

import pytest

from control_plane.errors import QueueUnavailable, RateLimited
from control_plane.operations.metrics import Metrics
from control_plane.operations.shares import Shares


def _refusals(metrics: Metrics, limit: str) -> float:
    text = metrics.text(None, streams=0, free={}, troubles={}).decode()
    found = re.search(rf'memvid_export_refused_total\{{limit="{limit}"\}} (\S+)', text)
    return float(found[1]) if found else 0.0


def test_a_client_that_is_alone_may_have_all_places_and_no_more() -> None:
    metrics = Metrics()
    shares = Shares("downloads", 3, metrics, several=False, full=QueueUnavailable)
    with ExitStack() as taken:
        for _ in range(3):
            taken.enter_context(shares.place("only"))
        with pytest.raises(QueueUnavailable), shares.place("only"):
            pass
        assert shares.taken == 3
    assert shares.taken == 0
    assert _refusals(metrics, "downloads") == 1


def test_one_of_several_clients_never_takes_the_room_of_the_next_one() -> None:
    metrics = Metrics()
    shares = Shares("uploads", 12, metrics, several=True)
    with ExitStack() as taken:

        def take_all(client: str) -> int:
            count = 0
            while True:
                try:
                    taken.enter_context(shares.place(client))
                except RateLimited:
                    return count
                count += 1

        # Half of what is left, each time: whoever comes next finds room until there is one place left for the last.
        clients = ("first", "second", "third", "fourth", "fifth")
        assert [take_all(client) for client in clients] == [6, 3, 1, 1, 1]
        assert take_all("first") == 0
    assert _refusals(metrics, "client_uploads") == 4
    assert _refusals(metrics, "uploads") == 2  # for the fifth and then for the first no place was left at all
    assert shares.taken == 0


def test_a_place_is_free_again_however_its_use_ends() -> None:
    shares = Shares("streams", 2, Metrics(), several=True)
    for _ in range(5):
        with pytest.raises(ValueError, match="broken"), shares.place("client"):
            raise ValueError("broken")
    assert shares.taken == 0


def test_the_smallest_share_is_one_place() -> None:
    shares = Shares("streams", 2, Metrics(), several=True)
    with shares.place("first"), shares.place("second"):
        assert shares.of("third") == 1
        with pytest.raises(RateLimited, match="2 streams run"), shares.place("third"):
            pass
