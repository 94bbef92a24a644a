"""Whether the capsules in a folder, or under a prefix of a bucket, are what was published.

A capsule with a manifest is compared with it byte by byte (size and SHA-256 of every file that the manifest names),
while it is read: nothing is copied. What passed the gate when it was made passes it again as long as its bytes are the
same. A capsule without a manifest is read through memvid instead; one from a bucket is fetched for that, one at a time.
What is held in memory is the listing, about 0.3 KB a file, and one piece of 1 MiB.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import msgspec

from common.contract import Manifest, Wire
from common.errors import CapsuleUnreadable, InvalidRequest, ObjectMissing, PayloadMismatch, StorageFailed
from common.settings import WorkerSettings
from common.storage import FileStorage, Found, S3Config, Storage, StorageConfig, open_storage
from control_plane.reading.inspect import is_plain, read_through_memvid
from handler.job import MANIFEST_ENDING, MAX_MANIFEST_BYTES, files_of, read_manifest, ref_of

CAPSULE_ENDING = ".mv2"
SIDECAR_ENDING = ".index.v1.sqlite"

Amount = Callable[[str], Callable[[int, int], None]]
"""Of a name, a sink for ``(bytes read, bytes in all)``."""


class Verified(Wire, kw_only=True):
    """What was found out about one capsule, or a file that belongs to none."""

    ref: str
    state: Literal["whole", "damaged", "stray"]
    manifest: bool
    """Whether it was compared with one."""
    files: int
    size_bytes: int
    problems: list[str] = msgspec.field(default_factory=list)


class Sum(Wire, kw_only=True):
    """Of all that was looked at."""

    capsules: int = 0
    damaged: int = 0
    without_manifest: int = 0
    strays: int = 0
    size_bytes: int = 0

    def add(self, found: Verified) -> None:
        """Count one more."""
        if found.state == "stray":
            self.strays += 1
            return
        self.capsules += 1
        self.damaged += found.state == "damaged"
        self.without_manifest += not found.manifest
        self.size_bytes += found.size_bytes


def single(place: str) -> Path | None:
    """The file that ``place`` (a path or a ``file://`` ref) names; None for a folder and for a bucket.

    Raises CapsuleUnreadable where nothing is there.
    """
    if place.startswith("s3://"):
        return None
    path = Path(unquote(urlsplit(place).path)) if place.startswith("file://") else Path(place)
    if not path.exists():
        raise CapsuleUnreadable(f"There is no capsule {path}")
    return None if path.is_dir() else path


def verify_all(place: str, settings: WorkerSettings, amount: Amount) -> Iterator[Verified]:
    """Look at every capsule below a folder (a path or a ``file://`` ref) or a prefix ``s3://bucket/prefix/``; one
    capsule of a bucket is a place too. What is removed meanwhile, as an export that expires is, is left out. Raises
    CapsuleUnreadable where there is none, InvalidRequest and InvalidRef for other places, AccessDenied, StorageFailed.
    """
    storage, prefix, only = _opened(place, settings)
    try:
        listing = storage.found(prefix)
    except ObjectMissing as error:
        raise CapsuleUnreadable(f"There is nothing at {place}: {error.message}") from error
    some = False
    for folder, files in groupby(sorted(listing, key=_folder), key=_folder):
        names = {unquote(found.ref.rpartition("/")[2]): found for found in files}
        for verified in _folder_of(storage, folder, names, amount, only):
            some = some or verified.state != "stray"
            yield verified
    if not some:
        raise CapsuleUnreadable(f"There is no capsule at {place}")


def _opened(place: str, settings: WorkerSettings) -> tuple[Storage, str, str | None]:
    """The storage, the prefix to list, and the only capsule that is asked for."""
    scheme, separator, rest = place.partition("://")
    if scheme == "s3" and separator:
        bucket, _, key = rest.partition("/")
        if not bucket:
            raise InvalidRequest(f"{place}: give s3://bucket/prefix/", field="CAPSULE")
        config = S3Config(bucket=bucket, addressing=settings.s3_addressing, encryption=settings.s3_encryption)
        only = unquote(key.rpartition("/")[2]) if key.endswith(CAPSULE_ENDING) else None
        prefix = f"s3://{bucket}/{key.rpartition('/')[0]}/" if only else f"{place.rstrip('/')}/"
        prefix = prefix.replace(f"s3://{bucket}//", f"s3://{bucket}/")
        return open_storage(StorageConfig(roots=[], s3=config)), prefix, only
    if separator and scheme != "file":
        raise InvalidRequest(f"{place}: a path, file:///folder/ or s3://bucket/prefix/ is needed", field="CAPSULE")
    folder = (Path(unquote(urlsplit(place).path)) if separator else Path(place)).resolve()
    return FileStorage([folder]), folder.as_uri() + "/", None


def _folder(found: Found) -> str:
    return found.ref.rpartition("/")[0] + "/"


def _folder_of(
    storage: Storage, folder: str, names: dict[str, Found], amount: Amount, only: str | None
) -> Iterator[Verified]:
    named: set[str] = set()
    for name in sorted(names):
        if not name.endswith(MANIFEST_ENDING):
            continue
        capsule = name.removesuffix(MANIFEST_ENDING)
        named |= {name, capsule, capsule + SIDECAR_ENDING}
        try:
            manifest = _manifest(storage, names[name])
        except (CapsuleUnreadable, ObjectMissing, StorageFailed) as error:
            if storage.size(names[name].ref) is None:
                continue
            if not isinstance(error, CapsuleUnreadable):
                raise
            if only in (None, capsule):
                problems = [f"{name}: {error.message}"]
                yield Verified(
                    ref=ref_of(folder, capsule),
                    state="damaged",
                    manifest=True,
                    files=1,
                    size_bytes=0,
                    problems=problems,
                )
            continue
        named |= {file for file, _, _ in files_of(manifest)}
        if only is None or only in {part.file_name for part in manifest.parts}:
            verified = _compared(storage, folder, names, manifest, amount)
            # A manifest that has gone too says that all of it was removed.
            if verified.state == "whole" or storage.size(names[name].ref) is not None:
                yield verified
    for name, found in sorted(names.items()):
        if name in named or only not in (None, name):
            continue
        beside = name.endswith(SIDECAR_ENDING) and name.removesuffix(SIDECAR_ENDING) in names
        if name.endswith(CAPSULE_ENDING):
            with contextlib.suppress(ObjectMissing):
                yield _read(storage, found, name, amount)
        elif not beside and storage.size(found.ref) is not None:  # else it went with an export that has expired
            yield Verified(ref=found.ref, state="stray", manifest=False, files=1, size_bytes=found.size)


def _manifest(storage: Storage, found: Found) -> Manifest:
    if not 0 < found.size <= MAX_MANIFEST_BYTES:
        raise CapsuleUnreadable(f"a manifest of {found.size:,} bytes")
    manifest = read_manifest(storage, found.ref)
    for name, _, _ in files_of(manifest):
        if not is_plain(name):
            raise CapsuleUnreadable("it names a file that is not beside it")
    return manifest


def _compared(storage: Storage, folder: str, names: dict[str, Found], manifest: Manifest, amount: Amount) -> Verified:
    files = files_of(manifest)
    total, done, problems = sum(size for _, size, _ in files), 0, []
    tell = amount(files[0][0])
    for name, size, sha256 in files:
        if name not in names:
            problems.append(f"{name} is missing")
        elif names[name].size != size:
            problems.append(f"{name} has {names[name].size:,} bytes, {size:,} were published")
        else:
            digest = hashlib.sha256()
            try:
                for piece in storage.read(names[name].ref, 0, size):
                    digest.update(piece)
                    done += len(piece)
                    tell(min(done, total - 1), total)
            except ObjectMissing:
                problems.append(f"{name} went away while it was read")
                continue
            if digest.hexdigest() != sha256:
                problems.append(f"{name} is not what was published (SHA-256)")
    tell(total, total)
    return Verified(
        ref=ref_of(folder, manifest.parts[0].file_name),
        state="damaged" if problems else "whole",
        manifest=True,
        files=len(files) + 1,
        size_bytes=done,
        problems=problems,
    )


def _read(storage: Storage, found: Found, name: str, amount: Amount) -> Verified:
    """A capsule without a manifest, through memvid. Raises ObjectMissing where it was removed meanwhile."""
    tell = amount(name)
    problems = []
    with tempfile.TemporaryDirectory(prefix="memvid-export-") as scratch:
        try:
            path = storage.local(found.ref, Path(scratch), size=found.size)
            if path.suffix != CAPSULE_ENDING:  # memvid reads files of such names only, and a bare ".mv2" is none
                path, named = Path(scratch) / f"capsule{CAPSULE_ENDING}", path
                path.symlink_to(named)
            check = read_through_memvid(path, exact=True)
            problems = [] if check.ok else [check.detail]
        except (CapsuleUnreadable, PayloadMismatch) as error:
            problems = [error.message]
    tell(found.size, found.size)
    state: Literal["whole", "damaged"] = "damaged" if problems else "whole"
    return Verified(ref=found.ref, state=state, manifest=False, files=1, size_bytes=found.size, problems=problems)
