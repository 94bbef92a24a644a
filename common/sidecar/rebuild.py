"""Builds the sidecar of a finished capsule from the capsule alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from common.capsule.reader import CapsuleReader
from common.errors import CapsuleUnreadable, StorageFailed
from common.sidecar.build import SidecarBuilder
from common.storage.file import sha256_of

_READ_BATCH = 4096


def capsule_sha256(capsule_paths: Sequence[Path]) -> str:
    """SHA-256 of the only part, or of the parts' hex digests joined in order.

    Raises CapsuleUnreadable.
    """
    digests = []
    for path in capsule_paths:
        try:
            digests.append(sha256_of(path))
        except OSError as error:
            raise CapsuleUnreadable(f"Cannot read {path.name}: {error.strerror}") from error
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def rebuild(capsule_paths: Sequence[Path], path: Path) -> None:
    """Build the sidecar of a capsule (its parts in order) from the capsule alone; it appears at ``path`` whole.

    Raises CapsuleUnreadable, StorageFailed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    builder = SidecarBuilder(temporary)
    try:
        for part, capsule_path in enumerate(capsule_paths):
            reader = CapsuleReader(capsule_path)
            try:
                for start in range(0, reader.frame_count, _READ_BATCH):
                    builder.add(reader.frames(start, _READ_BATCH), start, part)
            finally:
                reader.close()
        builder.finish(capsule_sha256(capsule_paths))
        temporary.replace(path)
    except OSError as error:
        builder.abort()
        raise StorageFailed(f"Cannot write the sidecar {path.name}: {error.strerror}") from error
    except BaseException:
        builder.abort()
        raise
