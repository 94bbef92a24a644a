"""What the command line does with names and places that are not as they should be."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from processes import COMMAND

GRAPH = {
    "nodes": [{"id": "a", "label": "Function", "properties": {"name": "_"}}],
    "relationships": [{"id": "r", "sourceId": "a", "targetId": "a", "type": "CALLS"}],
}


def run(*arguments: str | bytes | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command; the answer has its exit code and both streams."""
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A small raw graph."""
    path = tmp_path / "g.json"
    path.write_text(json.dumps(GRAPH))
    return path


@pytest.mark.parametrize("step", [2**63, 1e308, -(2**70), 1.5, "one"])
def test_a_step_that_is_no_small_whole_number_is_named(tmp_path: Path, step: object) -> None:
    wrong = {**GRAPH, "relationships": [{**GRAPH["relationships"][0], "step": step}]}
    (tmp_path / "g.json").write_text(json.dumps(wrong))
    done = run("export", tmp_path / "g.json", "--out", tmp_path / "out")
    assert (done.returncode, "relationships[0].step" in done.stderr) == (2, True)


@pytest.mark.parametrize("place", ["g.json/below", "name-\udcff"])
def test_a_folder_that_cannot_be_is_refused_by_its_option(graph: Path, tmp_path: Path, place: str) -> None:
    done = run("export", graph, "--out", os.fsencode(tmp_path / place))
    assert (done.returncode, done.stderr.splitlines()[-1].startswith("error: --out: ")) == (2, True)


def test_a_second_graph_of_the_same_name_does_not_replace_the_first(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "g.json").write_text(json.dumps({**GRAPH, "projectName": "other"}))
    out = tmp_path / "out"
    done = run("export", graph, tmp_path / "b" / "g.json", "--out", out)
    assert (done.returncode, "would replace" in done.stderr) == (2, True)
    (capsule,) = out.glob("*.mv2")
    assert run("verify", capsule).returncode == 0


def test_a_file_name_that_is_not_utf8_is_exported_and_shown(graph: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/bad\xff.json"
    Path(os.fsdecode(odd)).write_bytes(graph.read_bytes())
    done = run("export", odd, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["capsule"]["fileName"].startswith("bad\ufffd-gitnexus")


def test_a_name_of_punctuation_is_found(graph: Path, tmp_path: Path) -> None:
    run("export", graph, "--out", tmp_path / "out")
    (capsule,) = (tmp_path / "out").glob("*.mv2")
    hits = json.loads(run("search", capsule, "--json", "--", "_").stdout)["hits"]
    assert [hit["id"] for hit in hits] == ["a"]


def test_an_error_record_is_told_whatever_the_order_of_its_keys(tmp_path: Path) -> None:
    (tmp_path / "g.ndjson").write_text('{"error":"boom","type":"error"}\n')
    done = run("export", tmp_path / "g.ndjson", "--out", tmp_path / "out")
    assert (done.returncode, "boom" in done.stderr) == (2, True)


def test_closed_standard_input_and_a_full_standard_output_are_told_in_one_line(graph: Path, tmp_path: Path) -> None:
    shell = f"'{COMMAND}' export - --out '{tmp_path}/o' <&-"
    closed = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, timeout=60)
    assert (closed.returncode, closed.stderr.strip()) == (2, "error: -: standard input is closed")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [COMMAND, "export", graph, "--out", tmp_path / "o", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, "No space left on device" in done.stderr.splitlines()[-1]) == (3, True)
    assert len(list((tmp_path / "o").glob("*.manifest.json"))) == 1
