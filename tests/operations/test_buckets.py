"""How often a client may ask, and which pages may."""

from __future__ import annotations

import pytest

from common.settings import Settings
from control_plane.errors import HostRefused, OriginRefused
from control_plane.operations.limits import MAX_BURST, USUAL, Rate, TokenBuckets
from control_plane.operations.origins import Origins

LOCAL = {"MEMVID_EXPORT_BIND_ADDR": "127.0.0.1:8080"}
KEY = {"MEMVID_EXPORT_API_KEY": "key"}


def test_a_bucket_is_emptied_and_fills_steadily() -> None:
    buckets = TokenBuckets(per_minute=60, burst=3)
    assert [buckets.take("a", 100).remaining for _ in range(3)] == [2, 1, 0]
    refused = buckets.take("a", 100.2)
    assert (refused.remaining, refused.retry_after_seconds, refused.limit) == (0, 1, 3)
    assert buckets.take("a", 101.01).retry_after_seconds is None
    assert buckets.take("a", 101.02).retry_after_seconds == 1
    full = buckets.take("a", 1_000)
    assert (full.remaining, full.reset_seconds, full.retry_after_seconds) == (2, 1, None)


def test_a_key_says_as_much_of_its_rate_as_it_likes() -> None:
    def limits(own: Rate) -> tuple[int, int]:
        buckets = TokenBuckets(per_minute=60, burst=20)
        first = buckets.take("a", 0, own)
        return first.limit, first.reset_seconds

    assert limits(USUAL) == (20, 1)
    assert limits(Rate(burst=3)) == (3, 1)
    assert limits(Rate(per_minute=30)) == (30, 2)
    assert limits(Rate(per_minute=30, burst=5)) == (5, 2)
    assert limits(Rate(per_minute=60_000_000)) == (MAX_BURST, 1)


def test_in_any_hour_no_more_is_answered_than_the_rate_and_one_burst() -> None:
    buckets = TokenBuckets(per_minute=90, burst=10)
    answered = sum(buckets.take("a", 1e6 + step / 10).retry_after_seconds is None for step in range(36_000))
    assert 90 * 60 <= answered <= 90 * 60 + 10


def test_clients_have_a_bucket_each_and_the_oldest_is_forgotten() -> None:
    buckets = TokenBuckets(per_minute=1, burst=1, clients=2)
    for client in ("a", "b"):
        assert buckets.take(client, 0).retry_after_seconds is None
        assert buckets.take(client, 0).retry_after_seconds == 60
    assert buckets.take("c", 0).retry_after_seconds is None
    assert buckets.take("b", 0).retry_after_seconds == 60
    assert buckets.take("a", 0).retry_after_seconds is None


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost:8080", "[::1]:8080", "app.localhost", "192.0.2.7"])
def test_a_server_on_this_machine_answers_to_its_own_names(host: str) -> None:
    for dev in (True, False):
        origins = Origins.of(Settings.read(LOCAL if dev else {**LOCAL, **KEY}, dev=dev))
        origins.check(host, None)
        origins.check(host, f"http://{host}")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "", "["]
)
def test_a_name_made_to_point_at_this_machine_is_refused(host: str) -> None:
    for settings in (Settings.read(LOCAL, dev=True), Settings.read({**LOCAL, **KEY})):
        with pytest.raises(HostRefused):
            Origins.of(settings).check(host, f"http://{host}")


def test_a_server_without_a_key_is_as_careful_on_every_address() -> None:
    with pytest.raises(HostRefused):
        Origins.of(Settings.read({"MEMVID_EXPORT_BIND_ADDR": "0.0.0.0:8080"}, dev=True)).check("evil.example", None)


def test_a_server_on_the_network_has_names_that_it_is_not_told() -> None:
    origins = Origins.of(Settings.read(KEY))
    origins.check("exports.example", None)
    origins.check("exports.example", "https://exports.example")
    origins.check("exports.example:443", "https://exports.example")
    for origin in ("https://evil.example", "null", "https://exports.example:8443", "https://exports.example.evil"):
        with pytest.raises(OriginRefused):
            origins.check("exports.example", origin)


def test_names_and_origins_can_be_told() -> None:
    told = {
        "MEMVID_EXPORT_PUBLIC_URL": "https://exports.example/api",
        "MEMVID_EXPORT_CORS_ORIGINS": "https://app.example,http://localhost:5173",
    }
    origins = Origins.of(Settings.read({**LOCAL, **KEY, **told}))
    origins.check("exports.example", "https://exports.example")
    for origin in ("https://app.example", "http://localhost:5173", "https://exports.example"):
        origins.check("127.0.0.1:8080", origin)
    for origin in ("http://app.example", "http://localhost:5174"):
        with pytest.raises(OriginRefused):
            origins.check("127.0.0.1:8080", origin)
    Origins.of(Settings.read({**LOCAL, **KEY, "MEMVID_EXPORT_CORS_ORIGINS": "*"})).check(
        "localhost", "https://any.example"
    )
