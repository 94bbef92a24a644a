"""All build steps of Dockerfile.api, run by hand.

Compiling the crate takes minutes: scripts/check-images runs these, scripts/test does not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from images import PYTHON, Replay, last
from processes import EXAMPLE, REPOSITORY

NOBODY = 10001
AS_NOBODY = os.getuid() == 0 and all(path.stat().st_mode & 0o001 for path in (PYTHON, *PYTHON.resolve().parents))
"""Only root may become another user, and that user has to reach the Python that stands in for the image's."""


@pytest.fixture(scope="module")
def built() -> Iterator[Replay]:
    """Every stage that the images of Dockerfile.api take files from; readable for the user whom they run as."""
    root = Path(tempfile.mkdtemp(prefix="memvid-export-image-"))
    root.chmod(0o755)
    try:
        replay = Replay("Dockerfile.api", root)
        replay.build("program")
        yield replay
    finally:
        shutil.rmtree(root)


@pytest.fixture
def data() -> Iterator[Path]:
    """The image's /data: the one folder that its user may write to."""
    folder = Path(tempfile.mkdtemp(prefix="memvid-export-data-"))
    if AS_NOBODY:
        os.chown(folder, NOBODY, NOBODY)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def run(built: Replay, data: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a program of the image with its variables and no others, and as its user where that can be."""
    image = built.env("api")
    names = ("PATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")
    return subprocess.run(
        [built.here(f"/opt/memvid-export/bin/{words[0]}"), *map(str, words[1:])],
        env={name: image[name] for name in names}
        | {
            "HOME": str(data),
            "MEMVID_EXPORT_ROOT": str(data / "exports"),
            "MEMVID_EXPORT_STORAGE_URL": (data / "app" / "examples").as_uri(),
        },
        cwd=data,
        user=NOBODY if AS_NOBODY else None,
        group=NOBODY if AS_NOBODY else None,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_image_writes_capsules_with_its_own_crate(built: Replay, data: Path) -> None:
    graph = data / "graph.ndjson.gz"
    shutil.copyfile(EXAMPLE, graph)
    done = run(built, data, "memvid-export", "export", graph, "--out", data / "out", "--semantic", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["writer"] == "native"
    assert report["capsule"]["vectors"] > 0
    [capsule] = (data / "out").glob("*.mv2")
    assert run(built, data, "memvid-export", "verify", capsule).returncode == 0


def test_the_image_of_the_local_runpod_adds_the_sdk_and_nothing_of_torch(built: Replay, data: Path) -> None:
    find = "import importlib.util as u; print([n for n in ('runpod', 'torch', 'pytest') if u.find_spec(n)])"
    assert run(built, data, "python", "-c", find).stdout.strip() == "[]"
    built.build("program-with-runpod")
    assert run(built, data, "python", "-c", find).stdout.strip() == "['runpod']"
    assert run(built, data, "python", "-c", "import memvid_export_native").returncode == 0
    words = last(built.image, "local-runpod", "CMD").exec_form
    shown = run(built, data, *words[:2], "--help")
    assert shown.returncode == 0, shown.stderr
    assert [word for word in words if word.startswith("--") and word not in shown.stdout] == []


def test_the_test_input_runs_with_the_worker_of_the_image(built: Replay, data: Path) -> None:
    built.build("program-with-runpod")
    job = (REPOSITORY / "test_input.json").read_text(encoding="utf-8")
    shutil.copytree(REPOSITORY / "examples", data / "app" / "examples")
    (data / "test_input.json").write_text(job.replace("/data/", f"{data}/").replace("/app/", f"{data}/app/"))
    done = run(built, data, "memvid-export", "worker", "--test-input", data / "test_input.json")
    assert done.returncode == 0, done.stderr
    assert list((data / "exports" / "test-input" / "1").glob("*.manifest.json"))
