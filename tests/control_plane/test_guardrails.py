"""What a profile embeds, on a real server; what may not or cannot run is refused before there is a job."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import Server, graph
from processes import command

PROFILES = """
[profiles.files]
embed = ["files"]
[profiles.everything]
embed = ["nodes", "files", "communities", "processes", "relations"]
[profiles.thrifty]
max_tokens = 3
"""
SECRET = "sk-that-nobody-sees"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Static vectors only: the quality tier's model is not on the list. It has a key that nothing needs."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "profiles.toml").write_text(PROFILES)
    env = {"MEMVID_EMBED_ALLOWED_MODELS": "nomic-embed-text", "OPENAI_API_KEY": SECRET}
    server = Server(folder / "root", env=env, profiles_file=folder / "profiles.toml", worker_slots=1)
    try:
        yield server.start()
    finally:
        server.close()


def request(profile: str | None, *, semantic: bool = True, name: str = "guarded") -> dict[str, Any]:
    body = graph(5, name=name)
    properties = {"name": "guarded.py", "filePath": "src/guarded.py"}
    body["nodes"].append({"id": "File:src/guarded.py", "label": "File", "properties": properties})
    body["options"] |= {"semanticEnabled": semantic, "profile": profile}
    return body


def finished(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    job_id = server.submit(body)
    assert server.wait(job_id)["type"] == "job_completed"
    return dict(server.client.get(f"/v1/exports/{job_id}/report").json())


@pytest.mark.parametrize(("profile", "vectors"), [(None, 6), ("files", 1), ("everything", 11), ("speed", 6)])
def test_a_profile_says_what_is_embedded(guarded: Server, profile: str | None, vectors: int) -> None:
    report = finished(guarded, request(profile))
    assert report["capsule"]["vectors"] == vectors
    assert report["embedding"]["provider"] == "static"


def test_a_profile_whose_engine_may_not_run_is_refused_before_there_is_a_job(guarded: Server) -> None:
    before = guarded.client.get("/v1/exports").json()["jobs"]
    for semantic in (True, False):
        answer = guarded.post(request("quality", semantic=semantic))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "INVALID_EXPORT_REQUEST")
        assert error["details"]["field"] == "options.profile"
        assert error["details"]["allowed"] == ["default", "everything", "files", "speed", "thrifty"]
        assert error["message"].startswith(
            "options.profile: quality cannot run here: model must be one that is allowed"
        )
    assert guarded.client.get("/v1/exports").json()["jobs"] == before


def test_an_export_past_its_profiles_ceiling_fails_with_the_estimate(guarded: Server) -> None:
    job_id = guarded.submit(request("thrifty", name="costly"))  # texts that no cache has
    assert guarded.wait(job_id)["type"] == "job_failed"
    error = guarded.job(job_id)["error"]
    assert (error["code"], error["retryable"]) == ("EMBEDDING_REFUSED", False)
    assert "3 tokens" in error["message"]
    assert guarded.client.get(f"/v1/exports/{job_id}/report").json()["attempts"] == 1
    assert finished(guarded, request("thrifty", semantic=False))["capsule"]["vectors"] == 0


def test_what_was_embedded_is_counted_by_provider_and_model(guarded: Server) -> None:
    def figures() -> dict[str, float]:
        labels = '{model="wordllama-l2-supercat-256",provider="static"} '
        lines = [line for line in guarded.client.get("/metrics").text.splitlines() if labels in line]
        return {line.split("{")[0]: float(line.rpartition(" ")[2]) for line in lines if "_created" not in line}

    finished(guarded, request(None))
    before = figures()
    report = finished(guarded, request(None))["embedding"]
    after = figures()
    grown = {name: after[name] - before[name] for name in after if not name.endswith("_seconds_sum")}
    assert grown == {
        "memvid_export_embed_seconds_count": 1,
        "memvid_export_embed_retries_total": 0,
        "memvid_export_embed_texts_total": 6,
        "memvid_export_embed_tokens_total": report["tokens"],
        "memvid_export_embed_cache_hits_total": report["cacheHits"],
        "memvid_export_embed_cost_usd_total": 0,
    }


def test_a_key_is_in_no_log_figure_answer_or_command_line(guarded: Server) -> None:
    job_id = guarded.submit(request("everything"))
    guarded.wait(job_id)
    texts = [guarded.log.read_text(), guarded.client.get("/metrics").text]
    texts += [
        guarded.client.get(f"/v1/exports/{job_id}{part}").text for part in ("", "/events", "/report", "/manifest")
    ]
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "handler.child" in shown
    assert [text for text in (*texts, shown) if SECRET in text] == []


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"MEMVID_EMBEDDING_MODE": "external_api"}, "MEMVID_EMBED_PROVIDER"),
        ({"MEMVID_EMBEDDING_MODE": "external_api", "MEMVID_EMBED_PROVIDER": "voyage"}, "VOYAGE_API_KEY"),
        ({"MEMVID_EMBED_PROVIDER": "nvidia", "NVIDIA_API_KEY": SECRET}, "MEMVID_EMBED_PROVIDER"),
        ({"MEMVID_EMBED_MAX_USD": "-1"}, "MEMVID_EMBED_MAX_USD"),
    ],
)
def test_settings_that_lead_to_no_engine_stop_the_start(tmp_path: Path, env: dict[str, str], name: str) -> None:
    done = command("serve", "--dev", env={"MEMVID_EXPORT_ROOT": str(tmp_path / "root"), **env})
    assert done.returncode == 2
    [line] = done.stderr.decode().splitlines()
    assert name in line
    assert SECRET not in line


def test_a_tier_of_the_file_that_cannot_run_stops_the_start_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "profiles.toml"
    file.write_text("[tiers.quality]\nprovider = 'openai'\n")
    env = {"MEMVID_EXPORT_ROOT": str(tmp_path / "root"), "MEMVID_EXPORT_PROFILES_FILE": str(file)}
    done = command("serve", "--dev", env=env)
    assert done.returncode == 2
    [line] = done.stderr.decode().splitlines()
    assert f"{file}: tiers.quality.provider must be static, torch or ollama where the mode is local_cpu" in line
