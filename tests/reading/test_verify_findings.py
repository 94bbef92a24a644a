"""What ``verify`` finds in capsules that are not as they were published, each by its name."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import msgspec
import numpy as np
import pytest
from botocore.config import Config
from services import S3

from common.capsule.gate import Gate
from common.capsule.native import NativeWriter
from common.capsule.reader import CapsuleReader
from common.capsule.sdk import SdkWriter
from common.embedding.port import Embedder
from common.embedding.static import StaticEmbedder
from common.errors import CapsuleUnreadable, InvalidRef, InvalidRequest, StorageFailed
from common.frames.guide import guide_pages
from common.frames.model import Frame
from common.settings import Settings
from control_plane.reading.inspect import Check, Contents, Files, inspect, opened_sidecar, vectors, verify
from control_plane.reading.search import Vectors
from control_plane.reading.verify import Sum, Verified, verify_all
from tests.storage.faulty import Kind, Proxy, Seen, proxy
from tests.test_pipeline import run, small

SETTINGS = Settings.read({"MEMVID_EXPORT_S3_ADDRESSING": "path"}, dev=True)


class Made(NamedTuple):
    """The files of an export, by name, and which is which."""

    files: dict[str, bytes]
    capsule: str
    sidecar: str
    manifest: str

    def put(self, folder: Path, **changed: bytes | None) -> Path:
        """Write them, the ``capsule``, the ``sidecar`` or the ``manifest`` with other bytes or not at all; the path of
        the capsule."""
        folder.mkdir(parents=True, exist_ok=True)
        for kind, name in (("capsule", self.capsule), ("sidecar", self.sidecar), ("manifest", self.manifest)):
            data = changed.get(kind, self.files[name])
            if data is not None:
                (folder / name).write_bytes(data)
        return folder / self.capsule

    def said(self, **changed: Any) -> bytes:
        """The manifest with other fields."""
        return json.dumps(json.loads(self.files[self.manifest]) | changed).encode()


def make(folder: Path, name: str) -> Made:
    with Gate() as gate:
        result = run(small(6, projectName=name, source={"baseName": name}), folder, gate, vectors=True)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Made(files, result.capsule_paths[0].name, result.sidecar_path.name, result.manifest_path.name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"), "one")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("other"), "two")


def silent(_name: str) -> Callable[[int, int], None]:
    return lambda _read, _total: None


def below(place: object) -> list[Verified]:
    return list(verify_all(str(place), SETTINGS, silent))


def spoiled(path: Path, find: bytes) -> None:
    """Change one byte where ``find`` stands."""
    content = bytearray(path.read_bytes())
    content[content.index(find)] ^= 0xFF
    path.write_bytes(content)


# --- a folder or a bucket -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, "a manifest of 0 bytes"),
        ({"parts": "none"}, "the manifest is damaged"),
        ({"sidecarFileName": "../other.sqlite"}, "names a file that is not beside it"),
    ],
)
def test_a_manifest_that_cannot_be_followed_is_the_damage_of_its_capsule(
    made: Made, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    capsule = made.put(tmp_path, manifest=made.said(**change) if change else b"")
    [found] = below(tmp_path)
    assert (found.ref, found.state, found.manifest) == (capsule.as_uri(), "damaged", True)
    [said] = found.problems
    assert said.startswith(made.manifest)
    assert problem in said
    total = Sum()
    total.add(found)
    assert (total.capsules, total.damaged, total.without_manifest) == (1, 1, 0)


def test_a_file_of_another_size_is_told_with_both_sizes(made: Made, tmp_path: Path) -> None:
    sidecar = made.files[made.sidecar]
    made.put(tmp_path, sidecar=sidecar + b"x")
    [found] = below(tmp_path)
    assert found.problems == [f"{made.sidecar} has {len(sidecar) + 1:,} bytes, {len(sidecar):,} were published"]
    assert (found.state, found.size_bytes) == ("damaged", len(made.files[made.capsule]))


def test_a_capsule_alone_that_memvid_cannot_read_is_damaged(made: Made, tmp_path: Path) -> None:
    whole, cut = made.files[made.capsule], made.files[made.capsule][:-100]
    made.put(tmp_path / "cut", capsule=cut, sidecar=None, manifest=None)
    flipped = made.put(tmp_path / "flipped", sidecar=None, manifest=None)
    spoiled(flipped, _first_text(flipped))
    made.put(tmp_path / "whole", sidecar=None, manifest=None)
    found = {Path(one.ref).parent.name: one for one in below(tmp_path)}
    assert {name: one.state for name, one in found.items()} == {
        "cut": "damaged",
        "flipped": "damaged",
        "whole": "whole",
    }
    assert {one.manifest for one in found.values()} == {False}
    assert made.capsule in found["cut"].problems[0]
    assert made.capsule in found["flipped"].problems[0]
    assert found["whole"].size_bytes == len(whole)


def test_a_capsule_whose_name_is_but_an_ending_is_read_and_left_as_it_is(made: Made, tmp_path: Path) -> None:
    made.put(tmp_path).rename(tmp_path / ".mv2")
    for name in (made.sidecar, made.manifest):
        (tmp_path / name).unlink()
    assert [(found.ref.rpartition("/")[2], found.state) for found in below(tmp_path)] == [(".mv2", "whole")]
    assert [path.name for path in tmp_path.iterdir()] == [".mv2"]


def _first_text(capsule: Path) -> bytes:
    """A piece of the first vector, which lies in the file as it is."""
    with CapsuleReader(capsule) as reader:
        found = reader.vectors()
    assert found is not None
    first: bytes = found[1][0].tobytes()
    return first[:32]


def test_one_capsule_of_a_bucket_is_looked_at_and_no_other_beside_it(
    s3: S3, made: Made, other: Made, tmp_path: Path
) -> None:
    client = boto3.client("s3", endpoint_url=s3.endpoint, config=Config(s3={"addressing_style": "path"}))
    beside = {other.manifest: b"{", other.capsule: b"x", "third.mv2.manifest.json": other.said(), "stray.txt": b""}
    for name, data in {**made.files, **beside}.items():
        client.put_object(Bucket=s3.bucket, Key=f"{tmp_path.name}/{name}", Body=data)
    client.close()
    place = f"{s3.url}/{tmp_path.name}/"
    [found] = below(place + made.capsule)
    assert (found.ref, found.state, found.files) == (place + made.capsule, "whole", 3)
    [broken] = below(place + other.capsule)[:1]
    assert (broken.ref, broken.state) == (place + other.capsule, "damaged")
    assert {one.state for one in below(place)} == {"whole", "damaged", "stray"}


class Tired(Proxy):
    """Says how large a manifest is, and does not give it."""

    def take(self, seen: Seen, _body: bytes) -> Kind | None:
        wanted = seen.method == "GET" and seen.path.endswith(".manifest.json")
        return "500" if wanted and seen.headers.get("range") != "bytes=0-0" else None


def test_a_store_that_fails_while_it_is_read_damages_nothing_and_ends_the_look(
    s3: S3, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = boto3.client("s3", endpoint_url=s3.endpoint, config=Config(s3={"addressing_style": "path"}))
    for name, data in made.files.items():
        client.put_object(Bucket=s3.bucket, Key=f"{tmp_path.name}/{name}", Body=data)
    client.close()
    with proxy(s3.endpoint, Tired) as tired:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", tired.url)
        with pytest.raises(StorageFailed, match=made.manifest):
            below(f"{s3.url}/{tmp_path.name}/")


@pytest.mark.parametrize("place", ["https://host/folder/", "gs://bucket/folder/"])
def test_a_place_of_another_kind_is_refused_by_its_name(place: str) -> None:
    with pytest.raises(InvalidRequest, match=place):
        below(place)


def test_a_bucket_that_is_not_there_is_bad_input(s3: S3) -> None:
    with pytest.raises(InvalidRef, match="NoSuchBucket"):
        below("s3://no-such-bucket/exports/")


# --- one capsule ----------------------------------------------------------------------------------


def wrong(capsule: Path) -> list[Check]:
    return [check for check in verify(capsule) if not check.ok]


@pytest.mark.parametrize("writer", ["native", "sdk"])
def test_a_whole_capsule_passes_every_check(made: Made, tmp_path: Path, writer: str) -> None:
    checks = list(verify(made.put(tmp_path, manifest=made.said(writer=writer))))
    assert [check.ok for check in checks] == [True] * 4
    assert "probes over 17 frames" in checks[2].detail


@pytest.mark.parametrize("with_vectors", [False, True])
def test_a_capsule_that_memvid_wrote_itself_is_read_whole(tmp_path: Path, with_vectors: bool) -> None:
    with Gate() as gate:
        result = run(small(6), tmp_path, gate, vectors=with_vectors, writers={"sdk": SdkWriter})
    (capsule,) = result.capsule_paths
    assert result.report.writer == "sdk"
    assert wrong(capsule) == []
    assert inspect(capsule).vectors == result.report.capsule.vectors == (6 if with_vectors else 0)
    with CapsuleReader(capsule) as reader:
        texts = {frame.uri: frame.text for frame in reader.frames(0, reader.frame_count)}
    # memvid cut it into chunks, and keeps the document without a text.
    written = next(text for name, _, text, _ in guide_pages() if name == "tool-matrix").split()
    assert texts["mv2://meta/ai-bible/tool-matrix"].split()[: len(written)] == written


def test_a_byte_of_the_capsule_that_changed_is_found_by_its_hash_and_by_memvid(made: Made, tmp_path: Path) -> None:
    capsule = made.put(tmp_path)
    spoiled(capsule, _first_text(capsule))
    found = {check.name: check.detail for check in wrong(capsule)}
    assert "expected" in found[f"manifest: {made.capsule}"]
    assert f"memvid-sdk reads {made.capsule}" in found


@pytest.mark.parametrize(
    ("sidecar", "detail"),
    [(None, "the file is missing"), (b"no index", "it is damaged"), ("other", "it differs from the capsule")],
)
def test_a_sidecar_that_is_not_the_capsule_s_is_named(
    made: Made, other: Made, tmp_path: Path, sidecar: bytes | str | None, detail: str
) -> None:
    content = other.files[other.sidecar] if sidecar == "other" else sidecar
    capsule = made.put(tmp_path, sidecar=content)  # type: ignore[arg-type]
    found = {check.name: check.detail for check in wrong(capsule)}
    assert set(found) == {f"manifest: {made.sidecar}", "sidecar: equal to one built from the capsule alone"}
    assert found["sidecar: equal to one built from the capsule alone"].startswith(detail)


def test_a_sidecar_with_a_row_too_many_differs(made: Made, tmp_path: Path) -> None:
    capsule = made.put(tmp_path, manifest=None)
    with closing(sqlite3.connect(tmp_path / made.sidecar)) as db:
        db.execute("UPDATE nodes SET name = 'another' WHERE id = (SELECT min(id) FROM nodes)")
        db.commit()
    assert [(check.name, check.detail) for check in wrong(capsule)] == [
        ("sidecar: equal to one built from the capsule alone", "it differs from the capsule")
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"{", "is damaged"),
        ({"sidecarFileName": "/etc/passwd"}, "names a file that is not beside it"),
        ({"sidecarFileName": "a" * 300}, "names a file that is not beside it"),
    ],
)
def test_a_capsule_whose_own_manifest_is_of_no_use_is_refused(
    made: Made, tmp_path: Path, change: bytes | dict[str, Any], message: str
) -> None:
    capsule = made.put(tmp_path, manifest=change if isinstance(change, bytes) else made.said(**change))
    with pytest.raises(CapsuleUnreadable, match=message):
        inspect(capsule)


def test_a_manifest_by_the_name_of_this_capsule_that_is_another_one_s_is_refused(
    made: Made, other: Made, tmp_path: Path
) -> None:
    capsule = made.put(tmp_path, manifest=other.files[other.manifest])
    with pytest.raises(CapsuleUnreadable, match="is not this capsule's"):
        inspect(capsule)
    with pytest.raises(CapsuleUnreadable, match=r"There is no capsule .*gone\.mv2"):
        inspect(tmp_path / "gone.mv2")


def test_a_manifest_of_another_capsule_in_the_folder_says_nothing_about_this_one(
    made: Made, other: Made, tmp_path: Path
) -> None:
    capsule = made.put(tmp_path, manifest=None)
    (tmp_path / "0-damaged.mv2.manifest.json").write_bytes(b"{")
    other.put(tmp_path)
    found: Contents = inspect(capsule)
    assert (found.content_digest, found.readers, found.vectors) == (None, None, 6)
    assert found.manifest is not None
    assert found.manifest["projectName"] == "one"


def test_a_part_that_is_missing_is_named(made: Made, tmp_path: Path) -> None:
    parts = json.loads(made.files[made.manifest])["parts"]
    second = {**parts[0], "fileName": "second.mv2"}
    capsule = made.put(tmp_path, manifest=made.said(parts=[*parts, second]))
    with pytest.raises(CapsuleUnreadable, match=r"a part that is not here: second\.mv2"):
        inspect(capsule)


def test_a_capsule_without_vectors_is_looked_into_and_verified(tmp_path: Path) -> None:
    with Gate() as gate:
        capsule = run(small(3), tmp_path, gate).capsule_paths[0]
    found = inspect(capsule)
    assert (found.vectors, found.dimension, found.model, found.frames) == (0, None, None, 11)
    assert wrong(capsule) == []


# --- the vectors of a capsule ---------------------------------------------------------------------


class Other(StaticEmbedder):
    """The static engine by another name, as if a provider had it."""

    model = msgspec.structs.replace(StaticEmbedder.model, provider="ollama", name="other")


class Newer(Other):
    """The same after its maker has changed it."""

    model = msgspec.structs.replace(Other.model, revision="newer")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A capsule whose vectors another engine made."""
    folder = tmp_path_factory.mktemp("foreign")
    with Gate() as gate:
        result = run(small(3), folder, gate, engine=Other())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Made(files, result.capsule_paths[0].name, result.sidecar_path.name, result.manifest_path.name)


def vectors_of(capsule: Path, embedder: Embedder) -> Vectors | None:
    files = Files(capsule)
    with opened_sidecar(files) as sidecar:
        return vectors(files, sidecar, lambda _choice: embedder)


def test_vectors_come_with_the_engine_that_made_them(foreign: Made, tmp_path: Path) -> None:
    found = vectors_of(foreign.put(tmp_path), Other())
    assert found is not None
    assert (len(found.positions), found.embedder.model.name) == (3, "other")


def test_vectors_of_an_engine_that_has_changed_answer_no_question(foreign: Made, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"of other, revision 0\.4\.0; this machine has newer"):
        vectors_of(foreign.put(tmp_path), Newer())


@pytest.mark.parametrize(
    ("manifest", "told"), [(None, "nothing says which engine made them"), ("nobody", "not known here: nobody")]
)
def test_vectors_of_an_unknown_engine_answer_no_question(
    foreign: Made, tmp_path: Path, manifest: str | None, told: str
) -> None:
    said = None if manifest is None else foreign.said(embeddingProvider=manifest)
    with pytest.raises(InvalidRequest, match=told):
        vectors_of(foreign.put(tmp_path, manifest=said), Other())


def test_vectors_of_no_model_answer_no_question(tmp_path: Path) -> None:
    capsule, metadata = tmp_path / "c.mv2", '{"id":"a","label":"Function","name":"a"}'
    frame = Frame("mv2://nodes/a", "Function: a", "t", "node", [], f"a\nmetadata={metadata}", metadata, "a", metadata)
    part = NativeWriter().open(capsule, timestamp=1, model=None, dimension=4, expected_frames=2)
    part.add([frame, frame._replace(uri="mv2://nodes/b")], np.ones((2, 4), np.float32))
    part.finish()
    with pytest.raises(InvalidRequest, match="of an unknown model"):
        vectors_of(capsule, Other())
    # Vectors that are equal prove nothing of each other: no probe is made of them.
    assert [check.ok for check in verify(capsule)][:1] == [True]


def test_a_sidecar_that_is_damaged_while_it_is_read_is_told_by_its_name(made: Made, tmp_path: Path) -> None:
    capsule = made.put(tmp_path)
    with pytest.raises(CapsuleUnreadable, match=f"{made.sidecar} is damaged"), opened_sidecar(Files(capsule)):
        raise sqlite3.DatabaseError("database disk image is malformed")
