"""What is stored is read again: damage is noted, nobody is given it, and a file that is whole again clears the note."""

from __future__ import annotations

from pathlib import Path

import pytest
from live_server import Server, StartServer, graph
from runpod_house import eventually


def _done(server: Server, name: str) -> str:
    job_id = server.submit(graph(name=name))
    assert server.wait(job_id)["type"] == "job_completed"
    return job_id


def _metric(server: Server, name: str) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def _file(server: Server, job_id: str, ending: str) -> Path:
    return next((server.root / "artifacts" / job_id).glob(f"*/*{ending}"))


@pytest.mark.parametrize(
    ("ending", "harm"),
    [(".mv2", "flipped"), (".manifest.json", "flipped"), (".mv2", "removed")],
)
def test_damage_is_noted_and_the_note_goes_when_the_file_is_whole_again(
    start_server: StartServer, ending: str, harm: str
) -> None:
    server = start_server(scrub_seconds=1)
    job_id, other = _done(server, "struck"), _done(server, "whole")
    path = _file(server, job_id, ending)
    good = path.read_bytes()
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes(good[:600] + bytes([good[600] ^ 1]) + good[601:])
    eventually(lambda: server.job(job_id)["artifact"] is None)
    assert "damaged" in server.job(job_id)["message"]
    answer = server.client.get(f"/v1/exports/{job_id}/download")
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "ARTIFACT_MISSING")
    assert server.client.get(f"/v1/exports/{job_id}/search", params={"q": "call_1"}).status_code == 410
    assert server.client.get(f"/v1/exports/{other}/download").status_code == 200
    eventually(lambda: _metric(server, "memvid_export_damaged_total") >= 1)
    eventually(lambda: _metric(server, "memvid_export_scrubbed_bytes_total") > 0)  # of the other
    path.write_bytes(good)
    eventually(lambda: server.job(job_id)["artifact"])
    assert server.client.get(f"/v1/exports/{job_id}/download").status_code == 200


def test_a_damaged_sidecar_is_told_and_made_anew_by_whoever_reads_it(start_server: StartServer) -> None:
    server = start_server(scrub_seconds=1)
    job_id = _done(server, "struck")
    path = _file(server, job_id, ".sqlite")
    good = path.read_bytes()
    path.write_bytes(good[:600] + bytes([good[600] ^ 1]) + good[601:])
    eventually(lambda: _metric(server, 'memvid_export_damaged_total{file="sidecar"}') >= 1)
    assert server.job(job_id)["artifact"] is not None
    assert server.client.get(f"/v1/exports/{job_id}/search", params={"q": "call_1"}).json()["hits"]
    assert path.read_bytes() == good


def test_a_pass_over_what_is_whole_notes_nothing(start_server: StartServer) -> None:
    server = start_server(scrub_seconds=1)
    job_id = _done(server, "whole")
    size = server.job(job_id)["artifact"]["sizeBytes"]
    eventually(lambda: _metric(server, "memvid_export_scrubbed_bytes_total") > 2 * size)
    assert _metric(server, "memvid_export_damaged_total") == 0
    assert server.job(job_id)["artifact"] is not None


def test_with_no_seconds_nothing_is_read(start_server: StartServer) -> None:
    server = start_server(scrub_seconds=0)
    job_id = _done(server, "whole")
    _file(server, job_id, ".mv2").write_bytes(b"other")
    assert server.client.get(f"/v1/exports/{job_id}/download").status_code == 410  # a download looks for itself
    assert _metric(server, "memvid_export_scrubbed_bytes_total") == 0
