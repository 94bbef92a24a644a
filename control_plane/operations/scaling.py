"""What the schedule wants of the Runpod endpoint, what the endpoint has, and the change from one to the other.

Speaks Runpod's REST API (https://docs.runpod.io/api-reference, ``GET`` and ``PATCH /endpoints/{id}``).
"""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus
from zoneinfo import ZoneInfo

import httpx
import msgspec
import stamina

from common.contract import MALFORMED, Wire
from common.errors import InvalidRequest, InvalidSettings
from control_plane.errors import PlatformUnavailable
from control_plane.operations.profiles import Profiles

ATTEMPTS = 5
"""Tries of one request; the waits between them add up to at most 12 seconds, or 30 for each where Runpod asks so."""
_MAX_WAIT_SECONDS = 30.0
_SAID = 200
"""Characters of Runpod's own words in an error."""


class Endpoint(Wire, kw_only=True):
    """What Runpod says about an endpoint; of its many fields those that are read here."""

    id: str
    name: str = ""
    workers_min: int
    workers_max: int
    idle_timeout: int | None = None


class Change(Wire, kw_only=True):
    """One setting of the endpoint, under Runpod's name for it."""

    setting: str
    present: int | None
    wanted: int

    @property
    def needed(self) -> bool:
        """Whether it differs."""
        return self.present != self.wanted


class Plan(Wire, kw_only=True):
    """What ``memvid-export scale`` shows."""

    endpoint_id: str
    endpoint_name: str
    at: str
    """The moment, ISO 8601, in the schedule's time zone."""
    time_zone: str
    place: str
    """The entry of the file that holds then."""
    settings: list[Change]
    applied: bool = False
    """Whether the endpoint was changed."""

    @property
    def changes(self) -> dict[str, int]:
        """What has to be sent; empty where the endpoint is as it should be."""
        return {change.setting: change.wanted for change in self.settings if change.needed}


def moment_of(text: str, zone: str) -> datetime:
    """An ISO 8601 time; one without an offset is a local time of ``zone``. Raises InvalidRequest."""
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=ZoneInfo(zone))).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(
            f"--at must be a time such as 2026-03-02T08:00; it is {text[:40]!r}", field="--at"
        ) from error


def plan(profiles: Profiles, moment: datetime, endpoint: Endpoint) -> Plan:
    """What has to change for what the schedule says of a moment. Raises InvalidSettings where it says nothing."""
    wanted = profiles.workers_at(moment)
    if wanted is None:
        raise InvalidSettings("The profiles file says nothing about workers: it has no [workers]", field="workers")
    workers = wanted.workers
    settings = [
        Change(setting="workersMin", present=endpoint.workers_min, wanted=workers.workers_min),
        Change(setting="workersMax", present=endpoint.workers_max, wanted=workers.workers_max),
    ]
    if workers.idle_timeout_seconds is not None:
        settings.append(
            Change(setting="idleTimeout", present=endpoint.idle_timeout, wanted=workers.idle_timeout_seconds)
        )
    return Plan(
        endpoint_id=endpoint.id,
        endpoint_name=endpoint.name,
        at=moment.astimezone(ZoneInfo(profiles.time_zone)).isoformat(timespec="minutes"),
        time_zone=profiles.time_zone,
        place=wanted.place,
        settings=settings,
    )


class RunpodEndpoint:
    """One endpoint in Runpod's REST API.

    A request is tried again, at most ``ATTEMPTS`` times in all, on a broken connection, 429 and 5xx; ``Retry-After``
    is honoured. Both methods raise InvalidSettings for a key or an id that Runpod does not take, InvalidRequest for a
    change that it refuses, PlatformUnavailable where it does not answer, or not as its documentation says.
    """

    def __init__(self, base: str, endpoint_id: str, key: str) -> None:
        """``base`` is the API's URL, such as ``https://rest.runpod.io/v1``."""
        self._base = base.rstrip("/")
        self._id = endpoint_id
        self._http = httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=httpx.Timeout(15.0))

    def __enter__(self) -> RunpodEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def read(self) -> Endpoint:
        """The endpoint as it is."""
        return self._send("GET")

    def change(self, settings: dict[str, int]) -> Endpoint:
        """Set what is named, absolutely: sent twice it changes nothing more. The endpoint as it is then."""
        endpoint = self._send("PATCH", settings)
        now = msgspec.to_builtins(endpoint)
        if wrong := [name for name, value in settings.items() if now[name] != value]:
            raise PlatformUnavailable(
                f"Runpod took the change of {', '.join(wrong)}, but the endpoint does not show it.", changed=wrong
            )
        return endpoint

    def _send(self, method: str, body: dict[str, int] | None = None) -> Endpoint:
        url = f"{self._base}/endpoints/{self._id}"
        try:
            for attempt in stamina.retry_context(
                on=_wait, attempts=ATTEMPTS, timeout=None, wait_initial=0.2, wait_max=3.0, wait_jitter=0.2
            ):
                with attempt:
                    answer = self._http.request(method, url, json=body).raise_for_status()
        except httpx.HTTPStatusError as error:
            raise self._refused(error.response) from error
        except httpx.HTTPError as error:
            raise PlatformUnavailable(f"No Runpod API answers at {self._base}: {error}", url=self._base) from error
        try:
            return msgspec.json.decode(answer.content, type=Endpoint)
        except MALFORMED as error:
            text = f"{self._base} does not answer like Runpod's API: {error}"
            raise PlatformUnavailable(text, url=self._base) from error

    def _refused(self, answer: httpx.Response) -> Exception:
        status = answer.status_code
        said = " ".join(answer.text[:_SAID].split())
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return InvalidSettings(
                f"Runpod refuses the key ({status}): RUNPOD_API_KEY must be one that may read and change endpoints",
                field="RUNPOD_API_KEY",
            )
        if status == HTTPStatus.NOT_FOUND:
            return InvalidSettings(
                f"Runpod knows no endpoint {self._id} for this key; set RUNPOD_ENDPOINT_ID", field="RUNPOD_ENDPOINT_ID"
            )
        if answer.is_client_error and status != HTTPStatus.TOO_MANY_REQUESTS:
            return InvalidRequest(f"Runpod refuses the request ({status}): {said}", status=status)
        return PlatformUnavailable(f"Runpod answered {status}: {said}", status=status)


def _wait(error: Exception) -> bool | float:
    """Whether to try again, or after how many seconds."""
    if not isinstance(error, httpx.HTTPStatusError):
        return isinstance(error, httpx.TransportError)
    answer = error.response
    if answer.status_code != HTTPStatus.TOO_MANY_REQUESTS and not answer.is_server_error:
        return False
    asked = answer.headers.get("Retry-After", "")
    return min(float(asked), _MAX_WAIT_SECONDS) if asked.isdecimal() else True
