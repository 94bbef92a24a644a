"""Which engine the settings lead to; what cannot run stops the start and names its variable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import REPOSITORY

from common.embedding.choice import WHAT, Choice
from common.embedding.routing import CATALOG
from common.errors import InvalidSettings
from common.settings import Settings, WorkerSettings

KEY = "sk-never-shown-1234"
PAID = {
    "MEMVID_EMBEDDING_MODE": "external_api",
    "MEMVID_EMBED_PROVIDER": "openai",
    "OPENAI_API_KEY": KEY,
}
RUNPOD = {
    "MEMVID_EXPORT_BACKEND_MODE": "runpod_queue",
    "RUNPOD_ENDPOINT_ID": "abc",
    "RUNPOD_API_KEY": "r-456",
}


def choice(**env: str) -> Choice:
    return WorkerSettings.read(env).choice()


def refused(env: dict[str, str], kind: type[WorkerSettings] = WorkerSettings) -> InvalidSettings:
    with pytest.raises(InvalidSettings) as caught:
        Settings.read(env, dev=True) if kind is Settings else WorkerSettings.read(env)
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith(f"{caught.value.details['field']} must ")
    assert KEY not in caught.value.message
    return caught.value


def test_without_a_word_static_vectors_of_everything_but_relations_are_made() -> None:
    assert choice() == Choice(mode="local_cpu", provider="static", model="wordllama-l2-supercat-256", what=WHAT)


@pytest.mark.parametrize(
    ("env", "engine"),
    [
        ({**PAID}, ("openai", "text-embedding-3-large")),
        ({**PAID, "MEMVID_EMBED_MODEL": "text-embedding-3-small"}, ("openai", "text-embedding-3-small")),
        ({**PAID, "MEMVID_EMBED_PROVIDER": "nvidia", "NVIDIA_API_KEY": KEY}, ("nvidia", "nvidia/nv-embed-v1")),
        ({**PAID, "MEMVID_EMBED_PROVIDER": "voyageai", "VOYAGE_API_KEY": KEY}, ("voyage", "voyage-code-3")),
        ({**PAID, "MEMVID_EMBED_PROVIDER": "local"}, ("ollama", "nomic-embed-text")),
        ({"MEMVID_EMBED_PROVIDER": "ollama", "MEMVID_EMBED_MODEL": "bge-m3:567m"}, ("ollama", "bge-m3:567m")),
    ],
)
def test_a_provider_brings_its_default_model_and_other_names_of_it_are_known(
    env: dict[str, str], engine: tuple[str, str]
) -> None:
    found = choice(**env)
    assert (found.provider, found.model) == engine


def test_a_dimension_is_the_one_of_the_provider_that_embeds() -> None:
    voyage = {**PAID, "MEMVID_EMBED_PROVIDER": "voyage", "VOYAGE_API_KEY": KEY, "VOYAGE_OUTPUT_DIMENSION": "512"}
    assert choice(**voyage).dimension == 512
    assert choice(**PAID, VOYAGE_OUTPUT_DIMENSION="512").dimension is None
    assert choice(**PAID, MEMVID_EMBED_DIMENSION="256").dimension == 256


def test_ceilings_are_part_of_the_choice() -> None:
    found = choice(MEMVID_EMBED_MAX_TOKENS="1000", MEMVID_EMBED_MAX_USD="0.5")
    assert (found.max_tokens, found.max_usd) == (1_000, 0.5)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (
            {"MEMVID_EMBEDDING_MODE": "external_api"},
            "MEMVID_EMBED_PROVIDER must be set (openai, nvidia, voyage or ollama) where the mode is external_api",
        ),
        (
            {"MEMVID_EMBED_PROVIDER": "openai", "OPENAI_API_KEY": KEY},
            "MEMVID_EMBED_PROVIDER must be static, torch or ollama where the mode is local_cpu; it is 'openai'",
        ),
        (
            {"MEMVID_EMBEDDING_MODE": "runpod_gpu", "MEMVID_EMBED_PROVIDER": "ollama"},
            "MEMVID_EMBED_PROVIDER must be torch or static where the mode is runpod_gpu; it is 'ollama'",
        ),
        ({**PAID, "OPENAI_API_KEY": ""}, "OPENAI_API_KEY must be set: openai is what embeds"),
        ({**PAID, "MEMVID_EMBED_PROVIDER": "nvidia"}, "NVIDIA_API_KEY must be set: nvidia is what embeds"),
        ({**PAID, "MEMVID_EMBED_PROVIDER": "voyage"}, "VOYAGE_API_KEY must be set: voyage is what embeds"),
        ({**PAID, "MEMVID_EMBED_MODEL": "gpt-x"}, "MEMVID_EMBED_MODEL must be one that is allowed here for openai ("),
        (
            {**PAID, "MEMVID_EMBED_ALLOWED_MODELS": "openai/text-embedding-3-small"},
            "allowed here for openai (openai/text-embedding-3-small); it is 'text-embedding-3-large'",
        ),
        (
            {**PAID, "MEMVID_EMBED_ALLOWED_MODELS": "voyage/voyage-4"},
            "allowed here for openai (none is); it is 'text-embedding-3-large'",
        ),
        ({"MEMVID_EMBED_MODEL": "all-MiniLM-L6-v2"}, "MEMVID_EMBED_MODEL must be wordllama-l2-supercat-256; it is"),
        ({"MEMVID_EMBED_DIMENSION": "128"}, "MEMVID_EMBED_DIMENSION must be another: "),
        (
            {**PAID, "MEMVID_EMBED_PROVIDER": "voyage", "VOYAGE_API_KEY": KEY, "VOYAGE_OUTPUT_DIMENSION": "333"},
            "VOYAGE_OUTPUT_DIMENSION must be another: voyage-code-3 has no vectors of dimension 333",
        ),
        (
            {**PAID, "MEMVID_EMBED_MODEL": "own", "MEMVID_EMBED_ALLOWED_MODELS": "own"},
            "MEMVID_EMBED_DIMENSION must be set: 'own' is not known here",
        ),
        (
            {
                **PAID,
                "MEMVID_EMBED_MODEL": "own",
                "MEMVID_EMBED_ALLOWED_MODELS": "own",
                "MEMVID_EMBED_DIMENSION": "64",
                "MEMVID_EMBED_MAX_USD": "1",
            },
            "MEMVID_EMBED_MAX_USD must be left out: the price of 'own' is not known here",
        ),
        (
            {"MEMVID_EMBEDDING_MODE": "runpod_gpu", "MEMVID_EMBED_MODEL": "nowhere", "MEMVID_EMBED_MODELS": "/nowhere",
             "MEMVID_EMBED_ALLOWED_MODELS": "nowhere"},
            "MEMVID_EMBED_MODEL must be one that is here: ",
        ),
    ],
)  # fmt: skip
def test_a_combination_that_cannot_run_stops_the_start_with_one_line(env: dict[str, str], words: str) -> None:
    assert words in refused(env).message
    assert words in refused(env, Settings).message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MEMVID_EMBEDDING_MODE", "psychic"),
        ("MEMVID_EMBED_PROVIDER", "cohere"),
        ("MEMVID_EMBED_MODEL", "two words"),
        ("MEMVID_EMBED_MODEL", "a,b"),
        ("MEMVID_EMBED_DIMENSION", "0"),
        ("MEMVID_EMBED_ALLOWED_MODELS", ","),
        ("MEMVID_EMBED_ALLOWED_MODELS", "a b"),
        ("OPENAI_API_KEY", f"{KEY} {KEY}"),
        ("NVIDIA_API_KEY", f"{KEY}\u00fc"),
        ("VOYAGE_API_KEY", f"{KEY}\n{KEY}"),
        ("OPENAI_EMBED_BASE_URL", "http://api.openai.com/v1"),
        ("NVIDIA_EMBED_BASE_URL", "http://8.8.8.8/v1"),
        ("NVIDIA_EMBED_BASE_URL", "http://[::ffff:8.8.8.8]/v1"),
        ("VOYAGE_EMBED_BASE_URL", f"https://user:{KEY}@api.voyageai.com"),
        ("VOYAGE_EMBED_BASE_URL", f"https://api.voyageai.com/v1?key={KEY}"),
        ("OPENAI_EMBED_BASE_URL", "api.openai.com"),
        ("OPENAI_EMBED_BASE_URL", "https://[api.openai.com"),
        ("VOYAGE_INPUT_TYPE", "image"),
        ("VOYAGE_OUTPUT_DIMENSION", "-1"),
        ("VOYAGE_OUTPUT_DTYPE", "int8"),
        ("VOYAGE_TRUNCATION", "perhaps"),
        ("OLLAMA_HOST", "ftp://host"),
        ("OLLAMA_HOST", "host:99999"),
        ("MEMVID_EMBED_REQUEST_TIMEOUT_SECONDS", "0"),
        ("MEMVID_EMBED_MODELS", "models"),
        ("MEMVID_EMBED_DOWNLOADS", "sometimes"),
        ("MEMVID_EMBED_PRECISION", "int4"),
        ("MEMVID_EMBED_DEVICES", "cuda"),
        ("MEMVID_EMBED_DEVICES", "cuda:0,cuda:0"),
        ("MEMVID_EMBED_DEVICES", "cpu,cuda:0"),
        ("MEMVID_EMBED_CACHE", "vectors.sqlite"),
        ("MEMVID_EMBED_CACHE", "/folder/"),
        ("MEMVID_EMBED_CACHE", "s3://bucket/vectors/"),
        ("MEMVID_EMBED_CACHE_BYTES", "1"),
        ("MEMVID_EMBED_MAX_TOKENS", "-1"),
        ("MEMVID_EMBED_MAX_USD", "-0.01"),
        ("MEMVID_EMBED_MAX_USD", "nan"),
        ("MEMVID_EMBED_MAX_USD", "inf"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed_and_not_shown(name: str, value: str) -> None:
    error = refused({name: value})
    assert error.details == {"field": name}
    assert error.message.startswith(f"{name} must be ")


def test_what_runpod_runs_needs_neither_key_nor_model_nor_torch_here(tmp_path: Path) -> None:
    paid = Settings.read({**RUNPOD, **PAID, "OPENAI_API_KEY": ""}, dev=True)
    assert paid.choice().provider == "openai"
    gpu = {**RUNPOD, "MEMVID_EMBEDDING_MODE": "runpod_gpu", "MEMVID_EMBED_MODELS": str(tmp_path)}
    assert Settings.read(gpu, dev=True).choice().provider == "torch"
    assert "MEMVID_EMBED_MODEL must" in refused({**gpu, "MEMVID_EMBED_MODEL": "own"}, Settings).message


def test_a_key_is_in_no_text_of_the_settings_or_the_engines() -> None:
    settings = WorkerSettings.read({**PAID, "NVIDIA_API_KEY": KEY, "VOYAGE_API_KEY": KEY})
    engines = settings.engines()
    assert engines.keys == dict.fromkeys(("nvidia", "openai", "voyage"), KEY)
    assert all(KEY not in text for text in (repr(settings), str(settings), repr(engines), str(engines)))


def test_gpus_go_with_the_mode_that_uses_them() -> None:
    error = refused({"MEMVID_EMBED_DEVICES": "cuda:0"})
    assert error.details["field"] == "MEMVID_EMBED_DEVICES"
    assert "runpod_gpu" in error.message


def test_engines_have_what_the_settings_say(tmp_path: Path) -> None:
    engines = WorkerSettings.read(
        {
            "MEMVID_EMBED_MODELS": f"/opt/models:{tmp_path}",
            "MEMVID_EMBED_DOWNLOADS": "true",
            "MEMVID_EMBED_PRECISION": "float16",
            "MEMVID_EMBEDDING_MODE": "runpod_gpu",
            "MEMVID_EMBED_DEVICES": "cuda:0, cuda:1",
            "MEMVID_EMBED_REQUEST_TIMEOUT_SECONDS": "7.5",
            "MEMVID_EMBED_CACHE_BYTES": "2000000",
            "VOYAGE_INPUT_TYPE": "query",
            "VOYAGE_TRUNCATION": "false",
            "OPENAI_EMBED_BASE_URL": "http://127.0.0.1:9/v1/",
            "NVIDIA_EMBED_BASE_URL": "http://nim:8000/v1",
        }
    ).engines()
    assert engines.model_folders == ("/opt/models", str(tmp_path))
    assert (engines.model_downloads, engines.precision, engines.devices) == (True, "float16", ("cuda:0", "cuda:1"))
    assert (engines.request_timeout_seconds, engines.cache_bytes) == (7.5, 2_000_000)
    assert (engines.voyage_input_type, engines.voyage_truncation) == ("query", False)
    assert engines.urls["openai"] == "http://127.0.0.1:9/v1"
    assert engines.urls["nvidia"] == "http://nim:8000/v1"
    assert "voyage" not in engines.urls


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("gpu-box", "http://gpu-box:11434"),
        ("10.0.0.7:8080", "http://10.0.0.7:8080"),
        ("[::1]", "http://[::1]:11434"),
        ("https://ollama.example/base/", "https://ollama.example/base"),
    ],
)
def test_the_host_of_ollama_is_read_as_its_own_clients_read_it(given: str, url: str) -> None:
    assert WorkerSettings.read({"OLLAMA_HOST": given}).engines().urls["ollama"] == url


@pytest.mark.parametrize(
    ("env", "cache"),
    [
        ({}, "/srv/root/vectors.sqlite"),
        ({"MEMVID_EXPORT_STORAGE_URL": "file:///srv/shared"}, "/srv/root/vectors.sqlite"),
        ({"MEMVID_EXPORT_STORAGE_URL": "s3://bucket/exports/"}, "s3://bucket/exports/vectors/"),
        (
            {"MEMVID_EXPORT_STORAGE_URL": "file:///srv/shared", "MEMVID_EMBED_CACHE": "file:///srv/shared/v/"},
            "file:///srv/shared/v/",
        ),
        ({"MEMVID_EXPORT_STORAGE_URL": "s3://bucket", "MEMVID_EMBED_CACHE": "off"}, None),
        ({"MEMVID_EXPORT_STORAGE_URL": "s3://bucket", "MEMVID_EMBED_CACHE": "/var/v.db"}, "/var/v.db"),
        ({"MEMVID_EXPORT_STORAGE_URL": "s3://bucket", "MEMVID_EMBED_CACHE": "s3://bucket/a/b/"}, "s3://bucket/a/b/"),
    ],
)
def test_the_cache_lies_where_the_storage_does_unless_said_otherwise(env: dict[str, str], cache: str | None) -> None:
    assert WorkerSettings.read({"MEMVID_EXPORT_ROOT": "/srv/root", **env}).engines().cache == cache


@pytest.mark.parametrize(
    "ref",
    [
        "s3://bucket/x/",
        "s3://bucket/x/payloads/",
        "s3://bucket/x/artifacts/v/",
        "s3://bucket/y/",
        "s3://other/x/v/",
        "s3://bucket/x/v",
        "s3://bucket/x/../v/",
    ],
)
def test_a_cache_is_not_put_where_jobs_have_their_files(ref: str) -> None:
    error = refused({"MEMVID_EXPORT_STORAGE_URL": "s3://bucket/x", "MEMVID_EMBED_CACHE": ref})
    assert error.details == {"field": "MEMVID_EMBED_CACHE"}


def test_the_allow_list_is_the_catalog_unless_there_is_one() -> None:
    assert WorkerSettings.read({}).allowed_models() == CATALOG
    own = WorkerSettings.read({"MEMVID_EMBED_ALLOWED_MODELS": "openai/text-embedding-3-small, own"}).allowed_models()
    assert own == {"openai/text-embedding-3-small", "own"}


def test_torch_that_is_not_installed_is_named() -> None:
    """In a process whose import system has no torch, as in a base install."""
    script = """
import sys
sys.modules["torch"] = None
from common.errors import InvalidSettings
from common.settings import Settings
assert Settings.read({}, dev=True).choice().provider == "static"
try:
    Settings.read({"MEMVID_EMBEDDING_MODE": "runpod_gpu"}, dev=True)
except InvalidSettings as error:
    print(error.message)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.startswith("MEMVID_EMBEDDING_MODE must be one that is installed: torch needs the package torch")


def test_settings_are_read_without_loading_torch() -> None:
    script = """
import sys
from common.settings import Settings
Settings.read({"MEMVID_EMBEDDING_MODE": "runpod_gpu", "MEMVID_EMBED_DOWNLOADS": "true"}, dev=True)
print([name for name in ("torch", "transformers", "sentence_transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "[]"
