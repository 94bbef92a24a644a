"""A local Runpod with workers of the unmodified package, and that package as its client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import runpod
from noted import WORKER, Notes, Started
from runpod_local import Platform, local_runpod


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Notes:
    """What the workers of this module's tests noted."""
    return Notes(tmp_path_factory.mktemp("notes") / "notes.txt")


@pytest.fixture(scope="module")
def started(notes: Notes) -> Started:
    """Starts a local Runpod whose workers take notes."""

    @contextmanager
    def start(*, env: dict[str, str] | None = None, **config: Any) -> Iterator[Platform]:
        given = {"NOTES": str(notes.path), "GIVEN": "from the platform", **(env or {})}
        with local_runpod(worker_command=WORKER, env=given, **config) as platform:
            yield platform

    return start


@contextmanager
def _client(platform: Platform) -> Iterator[runpod.Endpoint]:
    runpod.endpoint_url_base = platform.api_base
    endpoint = runpod.Endpoint(platform.endpoint, api_key=platform.key)
    yield endpoint
    endpoint.rp_client.rp_session.close()


@pytest.fixture
def client() -> Callable[[Platform], AbstractContextManager[runpod.Endpoint]]:
    """``runpod.Endpoint`` of a platform."""
    return _client
