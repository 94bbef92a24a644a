"""The process that writes a capsule with memvid-sdk, so that a hung or crashed put ends with it.

``python -m common.capsule.sdk_child PATH VECTORS``; reads length-prefixed msgpack from stdin: lists of
``(frame, vector, timestamp)``, then ``"finish"``; answers each with ``{"outcome": …, "message": …}``.
"""

from __future__ import annotations

import sys
from typing import Any

import memvid_sdk
import msgspec

WAL_BYTES = 40 * 1024
"""Vectors put before a WAL checkpoint inside one batch are in the file but are not found; below 48 KiB none comes."""


def _put(memory: Any, frame: list[Any], vector: list[float] | None, timestamp: int) -> int:
    uri, title, track, kind, tags, text, _, _, extra = frame
    payload = {
        "uri": uri,
        "title": title,
        "label": kind,
        "labels": [],
        "track": track,
        "kind": kind,
        "tags": tags,
        "text": text,
        "metadata": msgspec.json.decode(extra),
        "timestamp": timestamp,
        "auto_tag": False,
        "extract_dates": False,
        "no_raw": False,
        "enable_embedding": vector is not None,
    }
    # The public put drops no_raw and takes no vector; the binding below it takes both.
    if vector is None:
        memory._core.put(payload)
    else:
        chunks = memory._core.preview_chunks(text=text) or [text]
        memory._core.put_with_chunk_embeddings(payload, [vector] * len(chunks))
    return 2 * len(text.encode()) + len(extra.encode()) + 8 * len(vector or ()) + 512


def _answer(outcome: str, message: str = "") -> None:
    data = msgspec.msgpack.encode({"outcome": outcome, "message": message})
    sys.stdout.buffer.write(len(data).to_bytes(4, "little") + data)
    sys.stdout.buffer.flush()


def main() -> None:
    """Serve one file, then end."""
    path, vectors = sys.argv[1], sys.argv[2] == "1"
    memory = memvid_sdk.create(path, enable_vec=vectors, enable_lex=True)
    written = 0
    while head := sys.stdin.buffer.read(4):
        message = msgspec.msgpack.decode(sys.stdin.buffer.read(int.from_bytes(head, "little")))
        try:
            if message == "finish":
                memory.commit()
                memory.close()
                _answer("ok")
                return
            for frame, vector, timestamp in message:
                written += _put(memory, frame, vector, timestamp)
                if written > WAL_BYTES:
                    memory.commit()
                    written = 0
            _answer("ok")
        except memvid_sdk.CapacityExceededError as error:
            _answer("capacity", str(error))
        except memvid_sdk.MemvidError as error:
            _answer("storage" if "os error" in str(error).lower() else "failed", str(error))


if __name__ == "__main__":
    main()
