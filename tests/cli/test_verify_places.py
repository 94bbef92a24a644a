"""``memvid-export verify`` over a folder and over a bucket."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from processes import COMMAND, command
from services import S3

from common.settings import Settings
from control_plane.reading.verify import verify_all

GRAPH = {
    "nodes": [{"id": f"Function:a:{n}", "label": "Function", "properties": {"name": f"f{n}"}} for n in range(3)],
    "relationships": [
        {"id": "r", "sourceId": "Function:a:0", "targetId": "Function:a:1", "type": "CALLS", "confidence": 1}
    ],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one export."""
    folder = tmp_path_factory.mktemp("made")
    assert command("export", "-", "--out", folder, stdin=json.dumps(GRAPH).encode()).returncode == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _harmed(made: dict[str, bytes]) -> dict[str, bytes]:
    """A whole export, one with a flipped byte, one without its sidecar, one without its manifest, and a stray."""
    sidecar, manifest = f"{_capsule(made)}.index.v1.sqlite", f"{_capsule(made)}.manifest.json"
    flipped = bytearray(made[sidecar])
    flipped[700] ^= 4
    return {
        **{f"whole/1/{name}": data for name, data in made.items()},
        **{f"flipped/1/{name}": bytes(flipped) if name == sidecar else data for name, data in made.items()},
        **{f"short/1/{name}": data for name, data in made.items() if name != sidecar},
        **{f"plain/{name}": data for name, data in made.items() if name != manifest},
        "whole/1/claim.json": b"{}",
    }


def _capsule(made: dict[str, bytes]) -> str:
    return next(name for name in made if name.endswith(".mv2"))


def _right(output: bytes) -> None:
    lines = [json.loads(line) for line in output.splitlines()]
    states = {line["ref"].rpartition("places/")[2]: line["state"] for line in lines if "state" in line}
    assert sorted((ref.partition("/")[0], state) for ref, state in states.items()) == [
        ("flipped", "damaged"),
        ("plain", "whole"),
        ("short", "damaged"),
        ("whole", "stray"),
        ("whole", "whole"),
    ]
    total = next(line for line in lines if "capsules" in line)
    assert (total["capsules"], total["damaged"], total["withoutManifest"], total["strays"]) == (4, 2, 1, 1)


def test_a_folder_says_which_capsules_are_damaged(tmp_path: Path, made: dict[str, bytes]) -> None:
    for name, data in _harmed(made).items():
        path = tmp_path / "places" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    done = command("verify", tmp_path / "places", "--json")
    assert done.returncode == 3
    _right(done.stdout)
    people = command("verify", (tmp_path / "places").as_uri() + "/")
    assert people.returncode == 3
    assert b"4 capsules" in people.stdout
    assert b"is missing" in people.stdout
    assert command("verify", tmp_path / "places" / "whole").returncode == 0


def test_a_bucket_is_read_without_copies(tmp_path: Path, s3: S3, made: dict[str, bytes]) -> None:
    client = boto3.client("s3", endpoint_url=s3.endpoint, config=Config(s3={"addressing_style": "path"}))
    for name, data in _harmed(made).items():
        client.put_object(Bucket=s3.bucket, Key=f"places/{name}", Body=data)
    client.close()
    env = {**s3.env, "MEMVID_EXPORT_S3_ADDRESSING": "path", "TMPDIR": str(tmp_path)}
    done = command("verify", f"{s3.url}/places/", "--json", env=env)
    assert done.returncode == 3, done.stderr
    _right(done.stdout)
    assert list(tmp_path.iterdir()) == []
    one = command("verify", f"{s3.url}/places/whole/1/{_capsule(made)}", env=env)
    assert one.returncode == 0, one.stderr
    assert command("verify", f"{s3.url}/nothing/", env=env).returncode == 2


UNPRIVILEGED = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []


@pytest.mark.skipif(bool(UNPRIVILEGED and not shutil.which("setpriv")), reason="root may write everywhere")
def test_a_folder_that_may_only_be_read_is_verified(tmp_path: Path, made: dict[str, bytes]) -> None:
    place = tmp_path / "backup"
    place.mkdir()
    for name, data in made.items():
        (place / name).write_bytes(data)
    place.chmod(0o555)
    done = subprocess.run([*UNPRIVILEGED, COMMAND, "verify", place, "--json"], capture_output=True, check=False)
    place.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["state"] == "whole"
    place.chmod(0)
    done = subprocess.run([*UNPRIVILEGED, COMMAND, "verify", place, "--json"], capture_output=True, check=False)
    place.chmod(0o755)
    assert done.returncode == 3
    assert b"Permission denied" in done.stderr


def test_what_expires_while_a_folder_is_verified_is_left_out(tmp_path: Path, made: dict[str, bytes]) -> None:
    for job in ("1", "2", "3", "4", "5"):
        (tmp_path / job).mkdir()
        for name, data in made.items():
            (tmp_path / job / name).write_bytes(data)
    manifest = f"{_capsule(made)}.manifest.json"
    (tmp_path / "4" / manifest).unlink()

    def lose(job: str, *kept: str) -> None:
        for name in made:
            if name not in kept:
                (tmp_path / job / name).unlink(missing_ok=True)

    # While the first is read, the third, the fourth, the fifth; the second has gone before its turn.
    meanwhile = iter([lambda: lose("2"), lambda: lose("3"), lambda: None, lambda: lose("5", manifest)])

    def amount(_name: str) -> Callable[[int, int], None]:
        lose_now = next(meanwhile)
        return lambda _got, _total: lose_now()

    verified = verify_all(str(tmp_path), Settings.read({}, dev=True), amount)
    found = [next(verified)]
    (tmp_path / "4" / _capsule(made)).unlink()
    found += verified
    states = {one.ref.removeprefix(tmp_path.as_uri() + "/").partition("/")[0]: one.state for one in found}
    assert states == {"1": "whole", "5": "damaged"}


@pytest.mark.parametrize("place", ["https://host/x.mv2", "nowhere", "file:///nowhere/", "s3://"])
def test_a_place_where_nothing_is_found_is_bad_input(place: str, tmp_path: Path) -> None:
    done = command("verify", place, cwd=tmp_path)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
