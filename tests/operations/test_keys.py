"""Keys come, go and expire while a server runs; what is wrong with them is told by its place, and never shown."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from keyring import Keyed, entry, keyed, text_of
from live_server import graph
from processes import REPOSITORY, command

from common.errors import InvalidSettings
from common.settings import Settings
from control_plane.operations.keys import Keys

EXAMPLE = REPOSITORY / "examples" / "keys.toml"
ALWAYS = entry("always", "export", "read")


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Keyed]:
    with keyed(tmp_path, ALWAYS + entry("old", "read", client="'team'"), retention_seconds=3600) as found:
        yield found


def _status(house: Keyed, name: str, text: str | None = None) -> int:
    with house.as_(name, text) as client:
        return client.get("/v1/exports").status_code


def _until(condition: Callable[[], bool]) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it did not come to pass")


def _note(house: Keyed) -> str:
    return str(httpx.get(f"{house.server.url}/readyz").json()["notes"]["keys"])


def test_keys_come_and_go_while_the_server_runs(house: Keyed) -> None:
    assert (_status(house, "old"), _status(house, "new")) == (200, 401)
    house.file.write_text(ALWAYS + entry("old", "read", client="'team'") + entry("new", "read", client="'team'"))
    _until(lambda: _status(house, "new") == 200)
    assert _status(house, "old") == 200
    house.file.write_text(ALWAYS + entry("new", "read", client="'team'"))
    _until(lambda: _status(house, "old") == 401)
    assert (_status(house, "new"), _note(house)) == (200, "ok")


def test_a_file_with_a_mistake_changes_nothing_and_is_told_of(house: Keyed) -> None:
    for wrong, told in (
        (entry("late", "read").replace('sha256 = "', 'sha256 = "x'), "keys[0].sha256 must be 64 hex digits"),
        ("[[keys]\n", "is not TOML (line 1"),
        ("", "must have tables [[keys]]"),
    ):
        house.file.write_text(wrong)
        _until(lambda told=told: told in _note(house))  # type: ignore[misc]
        assert httpx.get(f"{house.server.url}/readyz").status_code == 200
        assert (_status(house, "old"), _status(house, "late")) == (200, 401)
    house.file.unlink()
    _until(lambda: "can be read" in _note(house))
    assert _status(house, "old") == 200
    house.file.write_text(ALWAYS)
    _until(lambda: _note(house) == "ok")
    assert _status(house, "old") == 401
    assert "the keys of before are kept" in house.server.log.read_text()


def test_links_that_are_swapped_are_followed(tmp_path: Path) -> None:
    """As Kubernetes does with mounted secrets: the name stays, a link on the way to it changes."""
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys.toml").write_text(ALWAYS + entry(version, "read"))
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "linked.toml").symlink_to("..data/keys.toml")
    with keyed(tmp_path, keys_file=tmp_path / "linked.toml") as house:
        assert (_status(house, "one"), _status(house, "two")) == (200, 401)
        (tmp_path / "next").symlink_to("two")
        (tmp_path / "next").rename(tmp_path / "..data")
        _until(lambda: _status(house, "two") == 200)
        assert _status(house, "one") == 401


def test_the_key_of_the_environment_is_one_more_and_its_file_is_read_again(tmp_path: Path) -> None:
    alone = tmp_path / "key"
    alone.write_text("the-first\n")
    with keyed(tmp_path, ALWAYS, api_key_file=alone) as house:
        assert _status(house, "default", "the-first") == 200
        assert _status(house, "always") == 200
        job_id = house.submit("always", graph(name="seen"))
        alone.write_text("the-second\n")
        _until(lambda: _status(house, "default", "the-second") == 200)
        assert _status(house, "default", "the-first") == 401
        with house.as_("default", "the-second") as admin:
            assert admin.get(f"/v1/exports/{job_id}").json()["metadata"]["client"] == "always"
            assert admin.get("/v1/stats").status_code == 200


def test_an_expired_key_is_refused_and_says_so(tmp_path: Path) -> None:
    keys = entry("past", "read", expires="2020-01-01T00:00:00Z") + entry(
        "future", "read", expires="2999-01-01T00:00:00Z"
    )
    with keyed(tmp_path, keys) as house:
        with house.as_("past") as client:
            refused = client.get("/v1/exports")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "UNAUTHORIZED")
        assert "expired" in refused.json()["error"]["message"]
        assert refused.headers["www-authenticate"] == "Bearer"
        assert _status(house, "future") == 200


def test_the_rate_of_a_key_is_told_and_held(tmp_path: Path) -> None:
    keys = ALWAYS + entry("slow", "read", requests_per_minute=1, burst=3)
    with keyed(tmp_path, keys) as house, house.as_("slow") as slow, house.as_("always") as always:
        answers = [
            slow.get("/v1/exports"),
            slow.get("/v1/exports/none"),
            slow.get("/v1/stats"),
            slow.get("/v1/exports"),
        ]
        assert [answer.status_code for answer in answers] == [200, 404, 403, 429]
        assert {answer.headers["x-ratelimit-limit"] for answer in answers} == {"3"}
        assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["2", "1", "0", "0"]
        assert all(0 < int(answer.headers["x-ratelimit-reset"]) <= 180 for answer in answers)
        assert answers[-1].json()["error"]["code"] == "RATE_LIMITED"
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert always.get("/v1/exports").headers["x-ratelimit-limit"] == "5000"
        assert not any(name.startswith("x-ratelimit") for name in slow.get("/healthz").headers)
        figures = httpx.get(f"{house.server.url}/metrics").text
        assert 'memvid_export_refused_total{limit="requests"} 1.0' in figures
        headers = {"accept": "application/json"}
        asked = [
            slow.post("/mcp", json={"jsonrpc": "2.0", "id": n, "method": "tools/list"}, headers=headers)
            for n in range(4)
        ]
        assert [answer.status_code for answer in asked] == [200, 200, 200, 429]
        assert asked[-1].json()["error"]["data"]["code"] == "RATE_LIMITED"
        figures = httpx.get(f"{house.server.url}/metrics").text
        assert 'memvid_export_refused_total{limit="mcp_requests"} 1.0' in figures


def test_wrong_keys_are_soon_refused_unlooked_at_and_known_ones_go_on(tmp_path: Path) -> None:
    with keyed(tmp_path, ALWAYS + "".join(entry(f"new-{n}", "read") for n in range(20))) as house:
        assert _status(house, "always") == 200
        url = f"{house.server.url}/v1/exports"
        with httpx.Client() as guesser:

            def guess() -> httpx.Response:
                return guesser.get(url, headers={"authorization": "Bearer a-guess"})

            answers = [guess() for _ in range(60)]
            assert {answer.status_code for answer in answers} == {401}
            while answers[-1].status_code == 401 and len(answers) < 5_000:
                answers.append(guess())
            assert answers[-1].status_code == 429
            assert int(answers[-1].headers["retry-after"]) >= 1
            assert not any(name.startswith("x-ratelimit") for answer in answers for name in answer.headers)
            # A key that came from this address before goes on; a guess that is right is refused like any other.
            assert _status(house, "always") == 200
            assert httpx.get(url).status_code == 401
            tried = []
            for n in range(20):  # each second one more guess is looked at
                while guess().status_code != 429:
                    pass
                tried.append(_status(house, f"new-{n}"))
            assert 429 in tried


def test_neither_keys_nor_their_hashes_are_in_the_log(house: Keyed) -> None:
    house.finish("always", house.submit("always", graph(name="quiet")))
    wrong = "a-key-that-nobody-has"
    assert _status(house, "nobody", wrong) == 401
    house.file.write_text(entry("always", "read").replace("sha256", "sha265"))
    _until(lambda: _note(house) != "ok")
    house.server.stop()
    log = house.server.log.read_text()
    assert '"key": "always"' in log
    for text in (text_of("always"), text_of("old"), wrong):
        assert text not in log
        assert hashlib.sha256(text.encode()).hexdigest() not in log


# --- quotas -------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> dict[str, str]:
    """Settings of a server on each kind of database."""
    return {} if request.param == "sqlite" else {"database_url": request.getfixturevalue("postgres_url")}


def test_many_posts_at_once_never_pass_a_quota(tmp_path: Path, database: dict[str, str]) -> None:
    keys = (
        entry("some", "export", "read", active_jobs=5)
        + entry("daily", "export", "read", jobs_per_day=7)
        + entry("daily-too", "export", "read", client="'daily'", jobs_per_day=7)
    )
    body = json.dumps(graph(name="quota")).encode()
    with keyed(tmp_path, keys, small_job_frames=0, **database) as house:

        def post(name: str) -> httpx.Response:
            with house.as_(name) as client:
                return client.post("/v1/exports", content=body, headers={"content-type": "application/json"})

        with ThreadPoolExecutor(50) as threads:
            answers = list(threads.map(post, ["daily", "daily-too"] * 25))
        taken = [answer for answer in answers if answer.status_code == 202]
        # Some are refused because one client does not get all places for uploads.
        refused = [answer for answer in answers if "quota" in answer.json().get("error", {}).get("details", {})]
        assert len(taken) == 7
        assert refused
        assert {answer.status_code for answer in answers} == {202, 429}
        assert sorted(answer.headers["x-quota-jobs-per-day"] for answer in taken)[0] == "limit=7, remaining=0"
        error = refused[0].json()["error"]
        assert (error["code"], error["details"]["quota"], error["details"]["limit"]) == (
            "RATE_LIMITED",
            "jobs_per_day",
            7,
        )
        assert {answer.headers["x-quota-jobs-per-day"] for answer in refused} == {"limit=7, remaining=0"}
        assert all(86_000 < int(answer.headers["retry-after"]) <= 86_400 for answer in refused)
        with house.as_("daily") as client:
            assert len(client.get("/v1/exports").json()["jobs"]) == 7
        figures = httpx.get(f"{house.server.url}/metrics").text
        assert f'memvid_export_refused_total{{limit="jobs_per_day"}} {len(refused)}.0' in figures


def test_a_place_is_free_again_once_an_export_has_ended(tmp_path: Path) -> None:
    keys = entry("one", "export", "read", active_jobs=1) + entry("all", "export", "read")
    with keyed(tmp_path, keys) as house, house.as_("one") as one:
        body = graph(20_000, name="long", lines=8)
        headers = {"idempotency-key": "the-first"}
        first = one.post("/v1/exports", json=body, headers=headers)
        assert first.headers["x-quota-active-jobs"] == "limit=1, remaining=0"
        refused = one.post("/v1/exports", json=graph(name="second"))
        assert (refused.status_code, refused.headers["x-quota-active-jobs"]) == (429, "limit=1, remaining=0")
        assert refused.json()["error"]["details"]["quota"] == "active_jobs"
        again = one.post("/v1/exports", json=body, headers=headers)
        assert (again.status_code, again.json()["jobId"]) == (202, first.json()["jobId"])
        assert one.delete(f"/v1/exports/{first.json()['jobId']}").json()["status"] == "canceled"
        assert one.post("/v1/exports", json=graph(name="third")).status_code == 202
        with house.as_("all") as unbound:
            answer = unbound.post("/v1/exports", json=graph(name="fourth"))
        assert not any(name.startswith("x-quota") for name in answer.headers)


# --- the file -----------------------------------------------------------------------------------------


def _load(text: str, folder: Path, **settings: str) -> Keys:
    file = folder / "keys.toml"
    file.write_text(text)
    more = {f"MEMVID_EXPORT_{name.upper()}": value for name, value in settings.items()}
    return Keys(Settings.read({"MEMVID_EXPORT_KEYS_FILE": str(file), **more}))


def test_the_example_is_taken_with_what_its_comments_say(tmp_path: Path) -> None:
    keys = _load(EXAMPLE.read_text(), tmp_path)
    assert keys.asked
    assert keys.trouble is None
    names = re.findall(r'^name = "(.*?)"', EXAMPLE.read_text(), re.MULTILINE)
    digests = re.findall(r'^sha256 = "(.*?)"', EXAMPLE.read_text(), re.MULTILINE)
    assert len(names) == len(set(digests)) == 4
    text = EXAMPLE.read_text().replace(digests[0], hashlib.sha256(b"mine").hexdigest())
    found = _load(text, tmp_path).find(b"mine")
    assert found is not None
    assert (found.name, found.client, found.scopes) == ("ci-2026", "ci", {"export", "read"})
    assert (found.rate, found.quota) == ((600, 100), (10, 500))
    assert found.expires is not None
    assert found.digest.hex() not in repr(found)
    assert keys.find(b"another") is None


GOOD = entry("good", "read")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must have tables [[keys]] and nothing else"),
        ("keys = 3", "must have tables [[keys]] and nothing else"),
        ("more = 1\n" + GOOD, "must have tables [[keys]] and nothing else"),
        (GOOD + "[[keys]]\n", "keys[1].name must be given"),
        (GOOD.replace("good", "no spaces"), "keys[0].name must be 1 to 64 letters"),
        (GOOD.replace('sha256 = "', 'sha256 = "0'), "keys[0].sha256 must be 64 hex digits"),
        (GOOD.replace("read", "write"), "keys[0].scopes must be a list of some of export, read, admin"),
        (entry("good"), "keys[0].scopes must be a list"),
        (GOOD + "scope = 1", "keys[0].scope is unknown"),
        (GOOD + f"mvx_{'A' * 43} = 1", "a field of MEMVID_EXPORT_KEYS_FILE: keys[0] is unknown"),
        (GOOD + "burst = 0", "keys[0].burst must be a number of requests"),
        (GOOD + "requests_per_minute = true", "keys[0].requests_per_minute must be a number"),
        (GOOD + "active_jobs = 1.5", "keys[0].active_jobs must be a number of jobs"),
        (GOOD + "expires = 2027-01-01T00:00:00", "keys[0].expires must be a date and time with a zone"),
        (GOOD + "expires = 'soon'", "keys[0].expires must be a date and time with a zone"),
        (GOOD + entry("good", "read", text="another"), "The keys good and good have the same name"),
        (GOOD + entry("other", "read", text=text_of("good")), "The keys good and other have the same sha256"),
        (GOOD + "# " + "x" * (1 << 20), "must have at most 1,048,576 bytes"),
        (GOOD + "\x00", "is not TOML (line"),
    ],
)
def test_a_start_with_a_wrong_file_is_refused_with_the_place(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=re.escape(told)) as caught:
        _load(text, tmp_path)
    assert caught.value.message.count("\n") == 0
    assert not re.search(r"[0-9a-f]{60}", caught.value.message)


def test_a_pipe_or_a_folder_is_no_keys_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "."):
        with pytest.raises(InvalidSettings, match="MEMVID_EXPORT_KEYS_FILE must be a text file"):
            Keys(Settings.read({"MEMVID_EXPORT_KEYS_FILE": str(tmp_path / name)}))


def test_a_daily_quota_needs_a_history_of_a_day(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="MEMVID_EXPORT_HISTORY_SECONDS must be 86400 at least"):
        _load(entry("daily", "export", jobs_per_day=1), tmp_path, history_seconds="3600")


def test_keys_come_from_one_place_and_a_server_without_any_does_not_start(tmp_path: Path) -> None:
    both = {"MEMVID_EXPORT_KEYS": GOOD, "MEMVID_EXPORT_KEYS_FILE": str(tmp_path / "keys.toml")}
    with pytest.raises(InvalidSettings, match="are both set"):
        Settings.read(both)
    with pytest.raises(InvalidSettings, match="only `serve --dev` runs without a key"):
        Settings.read({})
    from_text = Settings.read({"MEMVID_EXPORT_KEYS": GOOD})
    found = Keys(from_text).find(text_of("good").encode())
    assert found is not None
    assert found.name == "good"
    assert hashlib.sha256(text_of("good").encode()).hexdigest() not in repr(from_text)
    assert not Keys(Settings.read({}, dev=True)).asked


def test_a_server_refuses_to_start_with_one_line(tmp_path: Path) -> None:
    env = {"MEMVID_EXPORT_ROOT": str(tmp_path / "root"), "MEMVID_EXPORT_KEYS": GOOD + "burst = -1"}
    ended = command("serve", env=env)
    assert ended.returncode == 2
    [line] = ended.stderr.decode().strip().splitlines()
    assert "MEMVID_EXPORT_KEYS: keys[0].burst must be a number of requests" in line


def test_the_command_makes_a_key_that_a_server_takes(tmp_path: Path) -> None:
    made = [
        json.loads(command("key", "ci", "--scope", "export", "--scope", "read", "--client", "team", "--json").stdout)
        for _ in range(2)
    ]
    assert made[0]["key"] != made[1]["key"]
    found = _load(made[0]["entry"], tmp_path).find(made[0]["key"].encode())
    assert found is not None
    assert (found.name, found.client, found.scopes) == ("ci", "team", {"export", "read"})
    told = command("key", "ci", "--scope", "admin")
    text = re.findall(r"mvx_[\w-]{43}", told.stderr.decode())
    assert len(text) == 1
    assert text[0] not in told.stdout.decode()
    assert _load(told.stdout.decode(), tmp_path).find(text[0].encode()) is not None
    wrong_ones = (
        ("two words", "--scope", "read"),
        ("ci", "--scope", "write"),
        ("ci", "--scope", "read", "--client", "a'"),
    )
    for wrong in wrong_ones:
        assert command("key", *wrong).returncode == 2


def test_many_keys_are_all_found(tmp_path: Path) -> None:
    keys = _load("".join(entry(str(n), "read") for n in range(5_000)), tmp_path)
    for n in (0, 2_500, 4_999):
        found = keys.find(text_of(str(n)).encode())
        assert found is not None
        assert found.name == str(n)
