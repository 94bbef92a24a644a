"""Paths and graphs that the tests of several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from postgres import postgres_server, postgres_url
from services import s3

__all__ = ["fixtures", "postgres_server", "postgres_url", "real_graphs", "s3"]

ROOT = Path(__file__).resolve().parents[1]
SHARED_GRAPHS = ROOT.parent / "shared" / "data" / "gitnexus"


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Commands that tests start keep their vectors apart from those of whoever runs the tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="session")
def real_graphs() -> dict[str, Path]:
    """Graphs that GitNexus made, by file name: the example of this repository, and larger ones where they lie beside
    it (``runpod-python.export.json.gz``, ``litestar.export.json.gz``, and raw forms of the first)."""
    found = [*(ROOT / "examples").glob("*.gz"), *(SHARED_GRAPHS.glob("*.gz") if SHARED_GRAPHS.is_dir() else [])]
    return {path.name: path for path in sorted(found)}


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of small input files."""
    return ROOT / "tests" / "fixtures"
