"""Writes stored frames into a capsule in a process of its own: ``write_once.py FRAMES VECTORS OUT COUNT`` prints JSON.

Reading the frames back from the file is inside the measured time, and both cores are shared with it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from common.capsule.native import NativeWriter
from common.memory import peak_memory_bytes
from scripts.benchmarks.frames import DIMENSION, stored


def main() -> None:
    frames_path, vectors_path, out, count = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    started = time.perf_counter()
    writer = NativeWriter().open(
        out, timestamp=1_767_312_000, model="benchmark", dimension=DIMENSION, expected_frames=count
    )
    for batch, vectors in stored(frames_path, vectors_path):
        writer.add(batch, vectors)
    writer.finish()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_memory_bytes(), "file_bytes": out.stat().st_size}))


if __name__ == "__main__":
    main()
