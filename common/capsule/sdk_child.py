"""The process that writes a capsule with memvid-sdk, so that a hung or crashed put ends with it.

``python -m common.capsule.sdk_child PATH VECTORS``; each message is ``(timestamp, [(frame, vector), …])``, an empty
list finishes the file.
"""

from __future__ import annotations

import sys
from typing import Any

import memvid_sdk
import msgspec

from common.capsule.process import serve
from common.capsule.sdk import SdkAnswer

WAL_BYTES = 40 * 1024
"""What one put_many may take; see ``common.capsule.sdk``."""
_MANY = {"no_raw": False, "enable_embedding": False, "auto_tag": False, "extract_dates": False}
_ONE = {"labels": [], **_MANY}

_Document = tuple[list[Any], list[float] | None]


class _File:
    def __init__(self, path: str, *, vectors: bool) -> None:
        self._memory = memvid_sdk.create(path, enable_vec=vectors, enable_lex=True)
        self._waiting: list[tuple[dict[str, Any], list[float]]] = []
        self._bytes = 0

    def put(self, frame: list[Any], vector: list[float] | None, timestamp: int) -> None:
        uri, title, track, kind, tags, text, _, _, extra = frame
        document = {
            "uri": uri,
            "title": title,
            "label": kind,
            "labels": [],
            "tags": tags,
            "text": text,
            "metadata": msgspec.json.decode(extra),
        }
        # The public put drops no_raw and takes no vector; the binding below it takes both.
        if vector is None:
            self.flush()
            self._memory._core.put({**document, **_ONE, "track": track, "kind": kind, "timestamp": timestamp})
            return
        size = 2 * len(text.encode()) + len(extra.encode()) + 4 * len(vector) + 512
        if self._bytes + size > WAL_BYTES:
            self.flush()
        self._waiting.append((document, vector))
        self._bytes += size

    def flush(self) -> None:
        if self._waiting:
            documents, vectors = zip(*self._waiting, strict=True)
            self._memory._core.put_many(list(documents), list(vectors), _MANY)
            self._waiting.clear()
            self._bytes = 0

    def finish(self) -> None:
        self.flush()
        self._memory.commit()
        self._memory.close()


def main() -> None:
    """Serve one file."""
    file = _File(sys.argv[1], vectors=sys.argv[2] == "1")
    decode = msgspec.msgpack.Decoder(tuple[int, list[_Document]]).decode

    def answer(message: bytes) -> bytes:
        timestamp, documents = decode(message)
        try:
            for frame, vector in documents:
                file.put(frame, vector, timestamp)
            if not documents:
                file.finish()
            return msgspec.msgpack.encode(SdkAnswer("ok"))
        except memvid_sdk.CapacityExceededError as error:
            return msgspec.msgpack.encode(SdkAnswer("capacity", str(error)))
        except memvid_sdk.MemvidError as error:
            outcome = "storage" if "os error" in str(error).lower() else "failed"
            return msgspec.msgpack.encode(SdkAnswer(outcome, str(error)))

    serve(answer)


if __name__ == "__main__":
    main()
