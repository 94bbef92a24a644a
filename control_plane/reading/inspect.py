"""Capsules on disk: their parts, what is in them, and whether they are whole."""

from __future__ import annotations

import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from common.capsule.gate import FrameProbe, Gate, GatePlan, VectorProbe
from common.capsule.reader import CapsuleReader, properties
from common.contract import MALFORMED, Manifest, Wire
from common.embedding.choice import MODES, PROVIDERS, Choice, Provider
from common.embedding.port import Embedder
from common.embedding.static import StaticEmbedder
from common.errors import CapsuleUnreadable, GateFailed, InvalidRequest
from common.sidecar.open import Sidecar
from common.sidecar.rebuild import capsule_sha256, rebuild
from common.storage.file import sha256_of
from control_plane.reading.search import Vectors

META_URI = "mv2://meta/manifest"
_SAMPLES = 100
"""Frames and vectors of each part that are read back."""
MAX_NAME_BYTES = 255
"""What a file system takes."""
_META_FRAMES = 16
"""Frames at the start of a capsule that are looked at for its manifest."""


class Files:
    """A capsule's files: ``manifest`` and ``sidecar`` are None where they do not lie beside it."""

    def __init__(self, capsule: Path, *, whole: bool = True) -> None:
        """``capsule`` is the capsule or any of its parts. Raises CapsuleUnreadable for a file that is not there; not
        ``whole`` is a capsule of which only the manifest has to be there."""
        if whole and not capsule.is_file():
            raise CapsuleUnreadable(f"There is no capsule {capsule}")
        self.manifest = _manifest(capsule)
        self.parts = [capsule]
        self.sidecar_path = capsule.with_name(f"{capsule.name}.index.v1.sqlite")
        if self.manifest:
            self.parts = [capsule.with_name(part.file_name) for part in self.manifest.parts]
            self.sidecar_path = capsule.with_name(self.manifest.sidecar_file_name)
        missing = [path.name for path in self.parts if whole and not path.is_file()]
        if missing:
            raise CapsuleUnreadable(f"{capsule.name} has a part that is not here: {missing[0]}")

    @property
    def sidecar(self) -> Path | None:
        """The sidecar, if it is there."""
        return self.sidecar_path if self.sidecar_path.is_file() else None


def _manifest(capsule: Path) -> Manifest | None:
    own = capsule.with_name(f"{capsule.name}.manifest.json")
    for path in [own] if own.is_file() else sorted(capsule.parent.glob("*.mv2.manifest.json")):
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        except (OSError, *MALFORMED) as error:
            if path == own:
                raise CapsuleUnreadable(f"The manifest {path.name} is damaged: {error}") from error
            continue  # of another capsule in the same folder
        if any(part.file_name == capsule.name for part in manifest.parts):
            for name in (manifest.sidecar_file_name, *(part.file_name for part in manifest.parts)):
                if not is_plain(name) or len(name.encode()) > MAX_NAME_BYTES:
                    raise CapsuleUnreadable(f"The manifest {path.name} names a file that is not beside it")
            return manifest
        if path == own:
            raise CapsuleUnreadable(f"The manifest {path.name} is not this capsule's")
    return None


def is_plain(name: str) -> bool:
    """Whether what a manifest names can only lie beside it."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


@contextmanager
def opened_sidecar(files: Files) -> Iterator[Sidecar]:
    """The capsule's sidecar; one that is missing, damaged or of other bytes is rebuilt from the capsule, for this
    reading alone. Raises CapsuleUnreadable."""
    sidecar = current_sidecar(files, files.manifest)
    if sidecar:
        try:
            with closing(sidecar):
                yield sidecar
        except sqlite3.DatabaseError as error:
            name = sidecar.path.name
            raise CapsuleUnreadable(f"{name} is damaged ({error}); without it, it is built anew") from error
        return
    with tempfile.TemporaryDirectory(prefix="memvid-export-") as folder:
        path = Path(folder) / "rebuilt.sqlite"
        rebuild(files.parts, path)
        with closing(Sidecar.open(path)) as sidecar:
            yield sidecar


def current_sidecar(files: Files, published: Manifest | None) -> Sidecar | None:
    """The sidecar beside a capsule, as it was ``published``; None where it is missing, damaged, of another version, of
    other bytes or of another capsule: then it is rebuilt."""
    try:
        sidecar = Sidecar.open(files.sidecar_path)
    except CapsuleUnreadable:
        return None
    try:
        if sidecar.capsule_sha256 == _expected(files) and _is_whole(sidecar, published):
            return sidecar
    except BaseException:
        sidecar.close()
        raise
    sidecar.close()
    return None


def belongs(sidecar: Path, manifest: Manifest | None) -> bool:
    """Whether it may lie beside the capsule: what was published is replaced by the same bytes only, which another
    version's sidecar has not."""
    return manifest is None or sha256_of(sidecar) == manifest.sidecar_sha256


def _is_whole(sidecar: Sidecar, published: Manifest | None) -> bool:
    """Whether it is as it was built: by its hash, or where nobody knows that, by a look at every row. A byte that
    changed in a table is an answer that is wrong."""
    if published is not None:
        return belongs(sidecar.path, published)
    try:
        sidecar.check()
    except CapsuleUnreadable:
        return False
    return True


def _expected(files: Files) -> str:
    manifest = files.manifest
    sizes = [path.stat().st_size if path.is_file() else None for path in files.parts]
    if manifest and all(size in (None, part.size_bytes) for part, size in zip(manifest.parts, sizes, strict=True)):
        return manifest.capsule_sha256  # a part that is not here yet was not changed here either
    return capsule_sha256(files.parts)


def vectors(files: Files, sidecar: Sidecar, engine: Callable[[Choice], Embedder]) -> Vectors | None:
    """The vectors of all parts, with the engine that made them, which ``engine`` opens; None for a capsule without.

    Raises InvalidRequest for a model that this machine does not have, and what opening an engine does.
    """
    manifest = files.manifest
    if manifest is not None and manifest.vectors == 0:
        return None
    positions, matrices = [], []
    embedder = None
    for part, path in enumerate(files.parts):
        with CapsuleReader(path) as reader:
            if embedder is None and reader.model is not None:
                # First, as it may not be here; vectors are large.
                embedder = _engine(manifest, reader.model, manifest.dimension if manifest else None, engine)
            found = reader.vectors()
        if found is not None:
            at = found[0] + sidecar.position(part, 0)
            kept = sidecar.of_nodes(at)  # a search answers with nodes
            positions.append(at[kept])
            matrices.append(found[1] if kept.all() else found[1][kept])
    if not any(map(len, positions)):
        return None
    if embedder is None:
        raise InvalidRequest("The vectors are of an unknown model", field="mode")
    matrix = matrices.pop() if len(matrices) == 1 else np.concatenate(matrices)  # a copy would double the memory
    return Vectors(np.concatenate(positions), matrix, embedder)


def _engine(
    manifest: Manifest | None, model: str, dimension: int | None, engine: Callable[[Choice], Embedder]
) -> Embedder:
    """The engine for questions to vectors of a model."""
    provider = manifest.embedding_provider if manifest else None
    if model == StaticEmbedder.model.name:
        return StaticEmbedder()
    if provider is None:
        message = f"The vectors are of model {model}, and nothing says which engine made them"
        raise InvalidRequest(message, field="mode")
    mode = next((mode for mode in MODES if provider in PROVIDERS[mode]), None)
    if mode is None:
        raise InvalidRequest(f"The vectors are of a provider that is not known here: {provider}", field="mode")
    choice = Choice(
        mode=mode,
        provider=cast(Provider, provider),
        model=model,
        dimension=dimension,
        layout=manifest.embedding_layout if manifest else None,
    )
    embedder = engine(choice)
    revision = manifest.embedding_revision if manifest else None
    if revision is not None and embedder.model.revision != revision:
        message = f"The vectors are of {model}, revision {revision}; this machine has {embedder.model.revision}"
        raise InvalidRequest(message, field="mode")
    return embedder


class Part(Wire, kw_only=True):
    """One file."""

    path: str
    size_bytes: int
    frames: int
    vectors: int


class Contents(Wire, kw_only=True):
    """What ``inspect`` shows."""

    parts: list[Part]
    frames: int
    vectors: int
    dimension: int | None
    model: str | None
    manifest: dict[str, Any] | None
    """Metadata of the capsule's own manifest frame; None for a capsule that is not of this project's kind."""
    sidecar: str | None
    content_digest: str | None
    readers: str | None


def inspect(capsule: Path) -> Contents:
    """Look into a capsule. Raises CapsuleUnreadable."""
    files = Files(capsule)
    parts: list[Part] = []
    dimension, model, meta = None, None, None
    for path in files.parts:
        with CapsuleReader(path) as reader:
            found = reader.vectors()
            if found is not None:
                dimension, model = found[1].shape[1], reader.model
            rows = 0 if found is None else len(found[0])
            parts.append(Part(path=str(path), size_bytes=path.stat().st_size, frames=reader.frame_count, vectors=rows))
            for frame in [] if meta else reader.frames(0, _META_FRAMES):
                if frame.uri == META_URI:
                    meta = properties(frame)
    return Contents(
        parts=parts,
        frames=sum(part.frames for part in parts),
        vectors=sum(part.vectors for part in parts),
        dimension=dimension,
        model=model,
        manifest=meta,
        sidecar=str(files.sidecar) if files.sidecar else None,
        content_digest=files.manifest.content_digest if files.manifest else None,
        readers=files.manifest.readers if files.manifest else None,
    )


class Check(Wire, kw_only=True):
    """One thing that ``verify`` looked at."""

    name: str
    ok: bool
    detail: str


def verify(capsule: Path) -> Iterator[Check]:
    """Check a capsule and all that belongs to it, one finding after the other. Raises CapsuleUnreadable."""
    files = Files(capsule)
    if files.manifest:
        for part, path in zip(files.manifest.parts, files.parts, strict=True):
            yield _same_hash(f"manifest: {path.name}", path, part.sha256)
        yield _same_hash(f"manifest: {files.sidecar_path.name}", files.sidecar_path, files.manifest.sidecar_sha256)
    for path in files.parts:
        yield read_through_memvid(path, exact=files.manifest is None or files.manifest.writer == "native")
    yield _same_sidecar(files)


def _same_hash(name: str, path: Path, expected: str) -> Check:
    if not path.is_file():
        return Check(name=name, ok=False, detail="the file is missing")
    found = sha256_of(path)
    same = found == expected
    return Check(name=name, ok=same, detail=f"sha256 {found}" if same else f"sha256 {found}, expected {expected}")


def read_through_memvid(path: Path, *, exact: bool) -> Check:
    """Frames and vectors of one file as memvid-sdk reads them; ``exact`` also all its checksums. Raises
    CapsuleUnreadable."""
    with CapsuleReader(path) as reader, Gate() as gate:
        if exact:
            try:
                reader.verify()
            except CapsuleUnreadable as error:
                return Check(name=f"memvid-sdk reads {path.name}", ok=False, detail=error.message)
        count = reader.frame_count
        sampled = sorted({place * count // _SAMPLES for place in range(_SAMPLES)} | ({count - 1} if count else set()))
        frames = [reader.frames(place, 1)[0] for place in sampled]
        found = reader.vectors()
        probes = []
        if found is not None:
            # Equal texts have equal vectors, and then any of them may be the nearest: only single ones prove something.
            rows = [row.tobytes() for row in np.round(found[1], 3)]
            single = Counter(rows)
            for row in range(0, len(rows), max(1, len(rows) // _SAMPLES)):
                if single[rows[row]] > 1:
                    continue
                uri = reader.frames(int(found[0][row]), 1)[0].uri
                probes.append(VectorProbe(values=found[1][row].tolist(), uri=uri))
        plan = GatePlan(
            path=str(path),
            frames=count,
            exact=exact,
            vectors=0 if found is None else len(found[0]),
            reader="sdk",
            frame_probes=[
                FrameProbe(uri=f.uri, title=f.title, track=f.track or None, tags=f.tags, text=f.text) for f in frames
            ],
            word_probes=[],
            vector_probes=probes,
        )
        name = f"memvid-sdk reads {path.name}"
        try:
            held = gate.check(plan, lambda: None)
        except GateFailed as error:
            return Check(name=name, ok=False, detail=error.message)
    return Check(name=name, ok=True, detail=f"{held} probes over {count:,} frames")


def _same_sidecar(files: Files) -> Check:
    name = "sidecar: equal to one built from the capsule alone"
    if not files.sidecar:
        return Check(name=name, ok=False, detail="the file is missing")
    with tempfile.TemporaryDirectory(prefix="memvid-export-") as folder:
        again = Path(folder) / "rebuilt.sqlite"
        rebuild(files.parts, again)
        try:
            with closing(Sidecar.open(files.sidecar)) as kept, closing(Sidecar.open(again)) as built:
                same = kept.content_digest() == built.content_digest() and kept.capsule_sha256 == built.capsule_sha256
                detail = f"content digest {kept.content_digest()}" if same else "it differs from the capsule"
        except (CapsuleUnreadable, sqlite3.DatabaseError) as error:
            same, detail = False, f"it is damaged: {error}"
    return Check(name=name, ok=same, detail=detail)
