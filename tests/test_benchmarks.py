"""The benchmarks run, and print figures that were measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_short_form_of_every_benchmark_gives_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/benchmarks/run.py", "--short", "--json", out],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    figures = {figure["name"].strip(): figure for figure in json.loads(out.read_text())["figures"]}
    assert figures["write 2,000 frames with lexical index and 384-d vectors"]["value"] > 0
    assert figures["ratio"]["value"] > 1
    assert "put_many of 2" in figures["the same through memvid-sdk"]["note"]
    assert figures["growth exponent 1,000 → 4,000"]["goal"] == "≤ 1.05"
    assert figures["POST to submitted: SQLite, files, polls every 1 s"]["value"] > 0
    assert figures["result to download_ready"]["value"] > 0
    assert figures["polls per job"]["value"] >= 1
    assert figures["static embedding"]["value"] > 0
    assert figures["torch embedding: tiny shape"]["value"] > 0
    assert figures["1 − cosine to sentence-transformers"]["value"] < 500
    found = {system: figures[f"memvid-export: {system}"]["value"] for system in ("hybrid, static", "plain BM25")}
    assert found["hybrid, static"] > found["plain BM25"] > 0
    assert done.stdout.count("│") > 50
