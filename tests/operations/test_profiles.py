"""Profiles and the schedule come from one file; a wrong line names itself, and every moment has one answer."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from processes import REPOSITORY

from common.embedding.choice import Choice
from common.embedding.routing import EVERYTHING
from common.errors import InvalidRequest, InvalidSettings
from common.settings import Settings
from control_plane.operations.profiles import Profile, Profiles

SETTINGS = Settings.read(
    {"RUNPOD_EXECUTION_TIMEOUT_MS": "300000", "RUNPOD_TTL_MS": "3600000", "MEMVID_EXPORT_QUEUE_CAPACITY": "64"},
    dev=True,
)
DEFAULT = Profile(
    name="default", execution_timeout_ms=300_000, ttl_ms=3_600_000, queue_depth=64, queue_age_seconds=3_600
)
OPENAI = Settings.read(
    {
        "MEMVID_EMBEDDING_MODE": "external_api",
        "MEMVID_EMBED_PROVIDER": "openai",
        "OPENAI_API_KEY": "sk-never-shown",
        "MEMVID_EMBED_MAX_TOKENS": "1000000",
        "MEMVID_EMBED_MAX_USD": "2",
    },
    dev=True,
)
WITHOUT_TORCH = Settings.read({"MEMVID_EMBED_ALLOWED_MODELS": "nomic-embed-text"}, dev=True)
"""Where the quality tier may not run."""
WORKERS = "[workers]\nworkers_min = 0\nworkers_max = 0\n"


def load(folder: Path, text: str, settings: Settings = SETTINGS) -> Profiles:
    file = folder / "profiles.toml"
    file.write_text(text)
    return Profiles.load(file, settings)


def schedule(folder: Path, *entries: str, zone: str = "Europe/Berlin") -> Profiles:
    """A file with these entries; the first one allows 1 worker, the second 2, …, none of them 0."""
    tables = [f"[[schedule]]\nworkers_min = 0\nworkers_max = {n}\n{entry}\n" for n, entry in enumerate(entries, 1)]
    return load(folder, f'time_zone = "{zone}"\n{WORKERS}{"".join(tables)}')


def workers(profiles: Profiles, moment: datetime) -> int:
    wanted = profiles.workers_at(moment)
    assert wanted is not None
    assert wanted.place == (f"schedule[{wanted.workers.workers_max - 1}]" if wanted.workers.workers_max else "workers")
    return wanted.workers.workers_max


# --- profiles ---


def test_without_a_file_there_is_the_default_made_of_the_settings() -> None:
    profiles = Profiles.load(None, SETTINGS)
    assert profiles.get(None) == profiles.get("default") == DEFAULT
    assert profiles.workers_at(datetime.now(UTC)) is None


def test_what_a_profile_leaves_out_comes_from_the_settings(tmp_path: Path) -> None:
    profiles = load(tmp_path, "[profiles.quick]\nttl_ms = 600_000\n[profiles.default]\nqueue_depth = 3\n")
    quick = profiles.get("quick")
    assert (quick.execution_timeout_ms, quick.ttl_ms, quick.queue_depth) == (300_000, 600_000, 64)
    assert quick.queue_age_seconds == 600
    assert profiles.get(None).queue_depth == 3


def test_a_profile_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    profiles = load(tmp_path, "[profiles.bulk]\n", OPENAI)
    with pytest.raises(InvalidRequest, match="there is bulk, default, quality, speed") as caught:
        profiles.get("Bulk")
    assert caught.value.details == {"field": "options.profile", "allowed": ["bulk", "default", "quality", "speed"]}
    assert profiles.of_job("Bulk") == profiles.get("default")


def test_the_example_file_is_in_order() -> None:
    profiles = Profiles.load(REPOSITORY / "examples" / "profiles.toml", SETTINGS)
    assert profiles.get("interactive").queue_age_seconds == 60
    assert profiles.get("bulk").execution_timeout_ms == 3_600_000
    assert profiles.get("bulk").embedding.what == EVERYTHING
    assert profiles.get("interactive").embedding.provider == "static"
    assert profiles.time_zone == "Europe/Berlin"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("profiles = 3", "profiles must be tables [profiles.NAME]; it is 3"),
        ("profiles.x = 3", "profiles.x must be a table; it is 3"),
        ('[profiles."a b"]', "profiles must be named by at most 64 letters, digits, - and _; it is 'a b'"),
        ("[profiles.x]\nqueue_depth = 0", "profiles.x.queue_depth must be a number of jobs, 1 to 100000; it is 0"),
        ("[profiles.x]\nqueue_depth = 1.5", "profiles.x.queue_depth must be a number of jobs"),
        ("[profiles.x]\nqueue_depth = '9'", "profiles.x.queue_depth must be a number of jobs, 1 to 100000; it is '9'"),
        ("[profiles.x]\nqueue_depth = true", "profiles.x.queue_depth must be a number of jobs"),
        ("[profiles.x]\nqueue_age_seconds = nan", "profiles.x.queue_age_seconds must be a number of seconds"),
        ("[profiles.x]\nqueue_age_seconds = inf", "profiles.x.queue_age_seconds must be a number of seconds"),
        ("[profiles.x]\nttl_ms = 9_999", "profiles.x.ttl_ms must be a number of milliseconds, 10000 to"),
        ("[profiles.x]\nttl_ms = 20_000", "profiles.x.ttl_ms must be at least the 300000 milliseconds of its"),
        ("[profiles.x]\nexecution_timeout_ms = 1", "profiles.x.execution_timeout_ms must be a number of milliseconds"),
        (
            "[profiles.x]\nqueue-depth = 1",
            "profiles.x.queue-depth is not known; there is dimension, embed, execution_timeout_ms",
        ),
        ('[profiles.x]\n"a\\nb" = 1', "profiles.x.'a\\nb' is not known"),
        ("[profile.x]", "profile is not known; there is profiles, schedule, tiers, time_zone, workers"),
        ("time_zone = 'Mars/Olympus'", "time_zone must be the name of an IANA time zone"),
        ("time_zone = 'Europe'", "time_zone must be the name of an IANA time zone"),
        ("time_zone = '../../etc/passwd'", "time_zone must be the name of an IANA time zone"),
        ("time_zone = ''", "time_zone must be the name of an IANA time zone"),
        ("workers = []", "workers must be a table [workers]; it is []"),
        ("[workers]\nworkers_min = 1", "workers.workers_max is missing"),
        (
            "[workers]\nworkers_min = 3\nworkers_max = 2",
            "workers.workers_min must be at most its workers_max, 2; it is 3",
        ),
        ("[workers]\nworkers_min = -1\nworkers_max = 2", "workers.workers_min must be a number of workers, 0 to 1000"),
        (f"{WORKERS}idle_timeout_seconds = 0", "workers.idle_timeout_seconds must be a number of seconds, 1 to 3600"),
        ("schedule = 1", "schedule must be tables [[schedule]]; it is 1"),
        ("[[schedule]]\nworkers_min = 0\nworkers_max = 1", "[workers] is missing"),
        (f"{WORKERS}[[schedule]]\nworkers_min = 0", "schedule[0].workers_max is missing"),
        ("queue_depth", "the file is not TOML: "),
        ("# " + "x" * (1 << 20), "the file has more than 1,048,576 bytes"),
        ("x = " + "[" * 5_000, "the file is nested too deeply"),
    ],
)
def test_a_wrong_line_is_named_with_what_it_is_and_what_is_allowed(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        load(tmp_path, text)
    assert words in caught.value.message
    assert caught.value.message.startswith(f"{tmp_path / 'profiles.toml'}: ")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("days", ["'monday'", "'mon-'", "'-fri'", "'mon-fri-sun'", "'MON'", "''"])
def test_days_that_are_none_are_refused(tmp_path: Path, days: str) -> None:
    with pytest.raises(InvalidSettings, match=r"schedule\[0\]\.days must be days"):
        schedule(tmp_path, f"days = [{days}]")


@pytest.mark.parametrize(
    "hours", ["8:00-9:00", "08:00", "08:00-08:00", "08:00-25:00", "24:00-08:00", "08:00-24:01", "x"]
)
def test_hours_that_are_none_are_refused(tmp_path: Path, hours: str) -> None:
    with pytest.raises(InvalidSettings, match=r"schedule\[0\]\.hours must be hours such as"):
        schedule(tmp_path, f"hours = '{hours}'")


def test_a_file_that_is_not_there_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"the file cannot be read: No such file"):
        Profiles.load(tmp_path / "nowhere.toml", SETTINGS)
    (tmp_path / "latin").write_bytes(b"# \xe9")
    with pytest.raises(InvalidSettings, match="the file is not UTF-8"):
        Profiles.load(tmp_path / "latin", SETTINGS)


def test_a_file_that_a_setting_names_is_refused_by_the_name_of_that_setting(tmp_path: Path) -> None:
    file = tmp_path / "nowhere.toml"
    settings = Settings.read({"MEMVID_EXPORT_PROFILES_FILE": str(file)}, dev=True)
    with pytest.raises(
        InvalidSettings, match=r"^MEMVID_EXPORT_PROFILES_FILE, .*nowhere\.toml: the file cannot be read"
    ):
        Profiles.load(settings.profiles_file, settings)


# --- what is embedded ---


def engine(profiles: Profiles, name: str) -> tuple[str, str, int | None]:
    choice = profiles.get(name).embedding
    return choice.provider, choice.model, choice.dimension


def test_without_a_file_a_client_may_choose_speed_or_quality() -> None:
    profiles = Profiles.load(None, OPENAI)
    assert profiles.get(None).embedding == OPENAI.choice()
    assert engine(profiles, "speed") == ("openai", "text-embedding-3-small", None)
    assert engine(profiles, "quality") == ("openai", "text-embedding-3-large", None)
    assert profiles.get("speed").embedding.max_usd == 2


def test_tiers_of_the_file_replace_the_catalogs_and_profiles_name_them(tmp_path: Path) -> None:
    profiles = load(
        tmp_path,
        """
        [tiers.speed]
        dimension = 256
        [tiers.quality]
        provider = "voyageai"
        dimension = 2048
        layout = "code-v1"
        [profiles.nightly]
        tier = "quality"
        embed = ["relations", "nodes"]
        max_tokens = 500_000
        max_usd = 1
        [profiles.speed]
        queue_depth = 3
        """,
        Settings.read(
            {
                "MEMVID_EMBEDDING_MODE": "external_api",
                "MEMVID_EMBED_PROVIDER": "openai",
                "OPENAI_API_KEY": "sk-x",
                "VOYAGE_API_KEY": "pa-x",
                "MEMVID_EMBED_MAX_USD": "2",
            },
            dev=True,
        ),
    )
    assert profiles.get("nightly").embedding == Choice(
        mode="external_api",
        provider="voyage",
        model="voyage-code-3",
        dimension=2_048,
        layout="code-v1",
        what=("nodes", "relations"),
        max_tokens=500_000,
        max_usd=1,
    )
    assert engine(profiles, "quality") == ("voyage", "voyage-code-3", 2_048)
    assert engine(profiles, "speed") == ("openai", "text-embedding-3-small", 256)
    assert profiles.get("speed").queue_depth == 3
    assert profiles.get("quality").embedding.max_usd == 2


def test_a_profile_may_have_an_engine_of_its_own(tmp_path: Path) -> None:
    text = """
        [profiles.small]
        model = "text-embedding-3-small"
        dimension = 128
        [profiles.quality]
        model = "text-embedding-ada-002"
        [profiles.here]
        provider = "local"
    """
    profiles = load(tmp_path, text, OPENAI)
    assert engine(profiles, "small") == ("openai", "text-embedding-3-small", 128)
    assert engine(profiles, "quality") == ("openai", "text-embedding-ada-002", None)
    assert engine(profiles, "here") == ("ollama", "nomic-embed-text", None)


def test_a_built_in_tier_that_cannot_run_is_refused_by_request_and_stops_no_start(tmp_path: Path) -> None:
    for profiles in (
        Profiles.load(None, WITHOUT_TORCH),
        load(tmp_path, "[profiles.quality]\nqueue_depth = 1\n", WITHOUT_TORCH),
    ):
        with pytest.raises(InvalidRequest) as caught:
            profiles.get("quality")
        assert caught.value.message.startswith("options.profile: quality cannot run here: model must be one that is ")
        assert caught.value.details == {"field": "options.profile", "allowed": ["default", "speed"]}
        assert [profile.name for profile in profiles] == ["default", "speed"]
        assert profiles.of_job("quality") == profiles.get("default")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tiers = 1", "tiers must be tables [tiers.speed] and [tiers.quality]; it is 1"),
        ("[tiers.luxury]", "tiers.luxury is not known; there is speed, quality"),
        ("[tiers.speed]\nembed = ['nodes']", "tiers.speed.embed is not known; there is dimension, layout, model, "),
        (
            "[tiers.speed]\nprovider = 'torch'",
            "tiers.speed.provider must be openai, nvidia, voyage or ollama where the",
        ),
        ("[tiers.speed]\nprovider = 'cohere'", "tiers.speed.provider must be a provider: static, torch, openai, "),
        ("[tiers.speed]\nprovider = 'voyage'", "tiers.speed.provider must be one whose key is set: VOYAGE_API_KEY is"),
        ("[tiers.quality]\nmodel = 'gpt-x'", "tiers.quality.model must be one that is allowed here for openai ("),
        ("[tiers.quality]\ndimension = 4000", "tiers.quality.dimension must be another: text-embedding-3-large has no"),
        ("[tiers.quality]\ndimension = 0", "tiers.quality.dimension must be a number, at least 1; it is 0"),
        ("[tiers.quality]\nlayout = 'verse'", "tiers.quality.layout must be code-v1 or static-v2; it is 'verse'"),
        ("[profiles.x]\ntier = 'luxury'", "profiles.x.tier must be a tier: speed or quality; it is 'luxury'"),
        (
            "[profiles.x]\ntier = 'speed'\nmodel = 'own'",
            "profiles.x.tier must be the only word on the engine; the profile has model too; it is 'speed'",
        ),
        ("[profiles.x]\nmodel = 'gpt-x'", "profiles.x.model must be one that is allowed here for openai ("),
        ("[profiles.x]\nmodel = ''", "profiles.x.model must be the name of a model; it is ''"),
        ("[profiles.x]\nembed = []", "profiles.x.embed must be a list of some of nodes, files, communities, processes"),
        ("[profiles.x]\nembed = ['nodes', 'jokes']", "profiles.x.embed must be a list of some of nodes, files, "),
        ("[profiles.x]\nmax_tokens = -1", "profiles.x.max_tokens must be a number of tokens, at least 0; it is -1"),
        ("[profiles.x]\nmax_usd = nan", "profiles.x.max_usd must be a number of US dollars, 0 to 1000000; it is nan"),
        (
            "[profiles.x]\nmax_tokens = 1_000_001",
            "profiles.x.max_tokens must be at most the 1000000 of MEMVID_EMBED_MAX_TOKENS; it is 1000001",
        ),
        (
            "[profiles.x]\nmax_usd = 2.5",
            "profiles.x.max_usd must be at most the 2.0 of MEMVID_EMBED_MAX_USD; it is 2.5",
        ),
    ],
)
def test_an_engine_that_cannot_run_is_named_by_its_place_in_the_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        load(tmp_path, text, OPENAI)
    assert words in caught.value.message
    assert caught.value.message.startswith(f"{tmp_path / 'profiles.toml'}: ")
    assert "never-shown" not in caught.value.message
    assert "\n" not in caught.value.message


def test_a_tier_that_the_file_wishes_for_must_run(tmp_path: Path) -> None:
    for text, place in (
        ("[profiles.x]\ntier = 'quality'", "profiles.x.tier must be one that is allowed here for torch"),
        ("[tiers.quality]\nprovider = 'torch'", "tiers.quality.model must be one that is allowed here for torch"),
    ):
        with pytest.raises(InvalidSettings) as caught:
            load(tmp_path, text, WITHOUT_TORCH)
        assert place in caught.value.message


def test_what_runpod_runs_is_not_looked_for_here(tmp_path: Path) -> None:
    env = {
        "MEMVID_EXPORT_BACKEND_MODE": "runpod_queue",
        "RUNPOD_ENDPOINT_ID": "e",
        "RUNPOD_API_KEY": "k",
        "MEMVID_EMBEDDING_MODE": "external_api",
        "MEMVID_EMBED_PROVIDER": "nvidia",
    }
    profiles = load(tmp_path, "[profiles.x]\nprovider = 'voyage'", Settings.read(env, dev=True))
    assert engine(profiles, "x") == ("voyage", "voyage-code-3", None)
    assert engine(profiles, "speed") == ("nvidia", "nvidia/nv-embedqa-e5-v5", None)


# --- the schedule; 2 March 2026 is a Monday ---


@pytest.mark.parametrize(
    ("entry", "inside", "outside"),
    [
        (
            "days = ['mon-fri']\nhours = '08:00-20:00'",
            ["2026-03-02T08:00", "2026-03-02T19:59:59", "2026-03-06T12:00"],
            ["2026-03-02T07:59:59", "2026-03-02T20:00", "2026-03-07T12:00"],
        ),
        # Over midnight: the hours belong to the day on which they begin.
        (
            "days = ['fri']\nhours = '22:00-06:00'",
            ["2026-03-06T22:00", "2026-03-06T23:59", "2026-03-07T00:00", "2026-03-07T05:59"],
            ["2026-03-06T05:59", "2026-03-06T21:59", "2026-03-07T06:00", "2026-03-07T22:00"],
        ),
        # The week is a circle: Sunday night goes on into Monday, and a range may pass it.
        ("days = ['sun']\nhours = '22:00-06:00'", ["2026-03-09T05:59"], ["2026-03-08T05:59", "2026-03-09T22:00"]),
        ("days = ['sat-mon']", ["2026-03-07T00:00", "2026-03-08T12:00", "2026-03-09T23:59"], ["2026-03-10T00:00"]),
        ("hours = '18:00-00:00'", ["2026-03-02T18:00", "2026-03-02T23:59"], ["2026-03-02T00:00", "2026-03-02T17:59"]),
        ("hours = '18:00-24:00'", ["2026-03-02T18:00", "2026-03-02T23:59"], ["2026-03-02T00:00", "2026-03-02T17:59"]),
        ("days = ['tue', 'thu']", ["2026-03-03T12:00", "2026-03-05T12:00"], ["2026-03-04T12:00"]),
    ],
)
def test_an_entry_holds_on_its_days_and_hours(
    tmp_path: Path, entry: str, inside: list[str], outside: list[str]
) -> None:
    profiles = schedule(tmp_path, entry)
    zone = ZoneInfo("Europe/Berlin")
    held = {time: workers(profiles, datetime.fromisoformat(time).replace(tzinfo=zone)) for time in inside + outside}
    assert held == dict.fromkeys(inside, 1) | dict.fromkeys(outside, 0)


def test_of_entries_that_overlap_the_first_holds(tmp_path: Path) -> None:
    noon = datetime(2026, 3, 2, 12, tzinfo=ZoneInfo("Europe/Berlin"))
    wide, narrow = "days = ['mon-fri']", "days = ['mon']\nhours = '10:00-14:00'"
    assert workers(schedule(tmp_path, wide, narrow), noon) == 1
    assert workers(schedule(tmp_path, narrow, wide), noon) == 1
    assert workers(schedule(tmp_path, narrow, wide), noon + timedelta(hours=2)) == 2


@pytest.mark.parametrize(
    ("utc", "count"),
    [
        # In winter Berlin's 08:00 is 07:00 UTC, in summer 06:00: the clock moved on 29 March and on 25 October 2026.
        ("2026-03-28T06:59", 0),
        ("2026-03-28T07:00", 1),
        ("2026-03-29T05:59", 0),
        ("2026-03-29T06:00", 1),
        ("2026-10-24T06:00", 1),
        ("2026-10-25T06:00", 0),
        ("2026-10-25T07:00", 1),
    ],
)
def test_hours_are_those_on_the_wall_when_the_clock_changes(tmp_path: Path, utc: str, count: int) -> None:
    profiles = schedule(tmp_path, "hours = '08:00-20:00'")
    assert workers(profiles, datetime.fromisoformat(utc).replace(tzinfo=UTC)) == count


@pytest.mark.parametrize(("day", "minutes"), [("2026-03-28", 60), ("2026-03-29", 0), ("2026-10-25", 120)])
def test_a_skipped_hour_does_not_come_and_one_that_comes_twice_counts_twice(
    tmp_path: Path, day: str, minutes: int
) -> None:
    profiles = schedule(tmp_path, "hours = '02:00-03:00'")
    midnight = datetime.fromisoformat(day).replace(tzinfo=UTC)
    assert sum(workers(profiles, midnight + timedelta(minutes=n)) for n in range(-120, 600)) == minutes


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"])
@pytest.mark.parametrize("start", ["2026-03-05", "2026-03-26", "2026-04-02", "2026-10-01", "2026-10-22", "2026-10-29"])
def test_every_minute_of_a_week_has_the_one_answer_of_the_clock_on_the_wall(
    tmp_path: Path, zone: str, start: str
) -> None:
    """Weeks around the days on which clocks change, against a plain reading of the entries."""
    profiles = schedule(
        tmp_path,
        "days = ['fri-sun']\nhours = '21:30-03:15'",
        "days = ['mon-thu', 'sat']\nhours = '01:00-12:00'",
        "days = ['wed-mon']\nhours = '11:00-23:00'",
        zone=zone,
    )
    moment = datetime.fromisoformat(start).replace(tzinfo=UTC)
    for _ in range(7 * 24 * 60):
        wall = moment.astimezone(ZoneInfo(zone))
        day, clock = wall.strftime("%a").lower(), wall.strftime("%H:%M")
        before = (wall.replace(tzinfo=None) - timedelta(days=1)).strftime("%a").lower()
        night = {"fri", "sat", "sun"}
        if (day in night and clock >= "21:30") or (before in night and clock < "03:15"):
            expected = 1
        elif day in {"mon", "tue", "wed", "thu", "sat"} and "01:00" <= clock < "12:00":
            expected = 2
        elif day != "tue" and "11:00" <= clock < "23:00":
            expected = 3
        else:
            expected = 0
        assert workers(profiles, moment) == expected, wall
        moment += timedelta(minutes=1)
