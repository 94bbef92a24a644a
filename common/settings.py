"""Settings: a pure function of a mapping, such as the environment.

Every variable is read here and nowhere else; a wrong one raises InvalidSettings with one line that names it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit

import msgspec
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator

from common.contract import WriterName
from common.embedding import routing
from common.embedding.choice import Choice, Engines, Mode, Provider
from common.errors import InvalidRequest, InvalidSettings
from common.frames.build import RESPONSE_BUDGET_BYTES
from common.storage.port import S3Config, StorageConfig

GIB = 1 << 30
MAX_PREFIX_BYTES = 512
"""Of the path in the storage URL: what is put below it has names of up to 500 bytes, and a key has 1,024."""
_KEY = "a key of the provider's API"
_BASE_URL = "an https URL of an API, without a password; http only for hosts of one's own network"
_BIND = re.compile(r"^(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\s]+):(?P<port>\d{1,5})$")


_VARIABLES = {
    "embedding_mode": "MEMVID_EMBEDDING_MODE",
    "embedding_provider": "MEMVID_EMBED_PROVIDER",
    "embedding_model": "MEMVID_EMBED_MODEL",
    "embedding_max_usd": "MEMVID_EMBED_MAX_USD",
}
"""Of the fields of a choice that a setting decides and that may not fit together."""


class WorkerSettings(BaseModel):
    """What a worker runs with; the control plane has these too."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    root: Path = Field(
        Path("/data/exports"), validation_alias="MEMVID_EXPORT_ROOT", description="a folder that can be written"
    )
    staging_root: Path = Field(
        Path("/data/exports/staging"),
        validation_alias="MEMVID_EXPORT_STAGING_ROOT",
        description="a folder that can be written",
    )
    writer: WriterName | None = Field(
        None, validation_alias="MEMVID_EXPORT_WRITER", description="a writer: native, sdk or cli"
    )
    """None: the best one that is installed."""
    worker_memory_bytes: int = Field(
        4 * GIB,
        ge=256 << 20,
        validation_alias="MEMVID_EXPORT_WORKER_MEMORY_BYTES",
        description="a number of bytes, at least 268435456",
    )
    stage_seconds: float = Field(
        1_800,
        gt=0,
        le=7 * 86_400,
        validation_alias="MEMVID_EXPORT_STAGE_SECONDS",
        description="a number of seconds a stage of a job may take",
    )
    max_payload_bytes: int = Field(
        500_000_000, ge=1, validation_alias="MEMVID_EXPORT_MAX_PAYLOAD_BYTES", description="a number of bytes"
    )
    storage_url: str = Field(
        "",
        validation_alias="MEMVID_EXPORT_STORAGE_URL",
        description="s3://bucket/prefix, or file:///folder that servers and workers share",
    )
    """Where payloads and artifacts lie; empty: in the staging root and the root."""
    s3_addressing: Literal["auto", "path", "virtual"] = Field(
        "auto", validation_alias="MEMVID_EXPORT_S3_ADDRESSING", description="auto, path or virtual"
    )
    s3_encryption: str | None = Field(
        None,
        pattern=r"^(AES256|aws:kms(:.+)?)$",
        validation_alias="MEMVID_EXPORT_S3_ENCRYPTION",
        description="AES256, aws:kms or aws:kms:KEY-ID",
    )
    fetch_hosts: tuple[str, ...] = Field(
        (),
        validation_alias="MEMVID_EXPORT_FETCH_HOSTS",
        description="host names parted by commas, *.example.com for all below",
    )
    """Hosts that a worker may fetch ``https://`` refs from."""
    fetch_private: bool = Field(False, validation_alias="MEMVID_EXPORT_FETCH_PRIVATE", description="true or false")
    """Also from private addresses, and by plain HTTP."""
    embedding_mode: Mode = Field(
        "local_cpu",
        validation_alias="MEMVID_EMBEDDING_MODE",
        description="a mode: local_cpu, runpod_gpu or external_api",
    )
    embed_provider: Provider | None = Field(
        None,
        validation_alias="MEMVID_EMBED_PROVIDER",
        description="a provider: static, torch, openai, nvidia, voyage or ollama",
    )
    """None: the one that the mode has by default; ``external_api`` has none."""
    embed_model: str | None = Field(
        None,
        pattern=r"^[!-+\--~]{1,200}$",
        validation_alias="MEMVID_EMBED_MODEL",
        description="the name of a model, without spaces and commas",
    )
    """None: the provider's default."""
    embed_dimension: int | None = Field(
        None, ge=1, validation_alias="MEMVID_EMBED_DIMENSION", description="a dimension that the model has"
    )
    """None: the model's own; a model that is not in the catalog needs it."""
    embed_allowed_models: tuple[str, ...] = Field(
        (),
        validation_alias="MEMVID_EMBED_ALLOWED_MODELS",
        description="models parted by commas, as MODEL or PROVIDER/MODEL",
    )
    """These and no others; empty: those of the catalog."""
    nvidia_api_key: SecretStr | None = Field(None, validation_alias="NVIDIA_API_KEY", description=_KEY)
    openai_api_key: SecretStr | None = Field(None, validation_alias="OPENAI_API_KEY", description=_KEY)
    voyage_api_key: SecretStr | None = Field(None, validation_alias="VOYAGE_API_KEY", description=_KEY)
    nvidia_base_url: str | None = Field(None, validation_alias="NVIDIA_EMBED_BASE_URL", description=_BASE_URL)
    openai_base_url: str | None = Field(None, validation_alias="OPENAI_EMBED_BASE_URL", description=_BASE_URL)
    voyage_base_url: str | None = Field(None, validation_alias="VOYAGE_EMBED_BASE_URL", description=_BASE_URL)
    voyage_input_type: Literal["document", "query", "none"] | None = Field(
        None, validation_alias="VOYAGE_INPUT_TYPE", description="document, query or none"
    )
    voyage_output_dimension: int | None = Field(
        None, ge=1, validation_alias="VOYAGE_OUTPUT_DIMENSION", description="a dimension that the model has"
    )
    voyage_output_dtype: Literal["float"] = Field(
        "float", validation_alias="VOYAGE_OUTPUT_DTYPE", description="float, the only format that a capsule holds"
    )
    voyage_truncation: bool = Field(True, validation_alias="VOYAGE_TRUNCATION", description="true or false")
    ollama_host: str = Field(
        "http://127.0.0.1:11434", validation_alias="OLLAMA_HOST", description="HOST, HOST:PORT or an http(s) URL"
    )
    embed_request_seconds: float = Field(
        60,
        ge=1,
        le=3_600,
        validation_alias="MEMVID_EMBED_REQUEST_TIMEOUT_SECONDS",
        description="a number of seconds, 1 to 3600",
    )
    """One request to a provider may take so long."""
    embed_models: tuple[Path, ...] = Field(
        (Path("/opt/models"),),
        validation_alias="MEMVID_EMBED_MODELS",
        description="folders parted by colons, from the root on",
    )
    """Where models for ``torch`` lie, each in a folder of its name."""
    embed_downloads: bool = Field(False, validation_alias="MEMVID_EMBED_DOWNLOADS", description="true or false")
    """Take models from the Hugging Face hub too."""
    embed_precision: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, validation_alias="MEMVID_EMBED_PRECISION", description="float32, bfloat16 or float16"
    )
    embed_devices: tuple[str, ...] = Field(
        (), validation_alias="MEMVID_EMBED_DEVICES", description="cpu, or GPUs parted by commas: cuda:0,cuda:1"
    )
    embed_cache: str = Field(
        "",
        validation_alias="MEMVID_EMBED_CACHE",
        description="off, a file from the root on, or a ref that ends in / in MEMVID_EXPORT_STORAGE_URL, beside "
        "payloads/ and artifacts/",
    )
    """Empty: ``vectors/`` below an ``s3://`` storage URL, else ``vectors.sqlite`` in the root."""
    embed_cache_bytes: int = Field(
        4 * GIB,
        ge=1 << 20,
        validation_alias="MEMVID_EMBED_CACHE_BYTES",
        description="a number of bytes, at least 1048576",
    )
    embed_max_tokens: int | None = Field(
        None, ge=0, validation_alias="MEMVID_EMBED_MAX_TOKENS", description="a number of tokens, at least 0"
    )
    """Ceilings of one export: more is refused before the first call."""
    embed_max_usd: float | None = Field(
        None,
        ge=0,
        le=1_000_000,
        validation_alias="MEMVID_EMBED_MAX_USD",
        description="a number of US dollars, 0 to 1000000",
    )

    @field_validator("storage_url")
    @classmethod
    def _check_storage(cls, value: str) -> str:
        if value and not re.match(r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#]*)?|file:///[^?#]+)$", value):
            raise ValueError("not a place that is known here")
        value = value.rstrip("/")
        folder = unquote(value.partition("://")[2].partition("/")[2])
        if folder and any(part in ("", ".", "..") for part in folder.split("/")):
            raise ValueError("a part of the path is empty or dots")
        if not folder.isprintable() or len(folder.encode()) > MAX_PREFIX_BYTES:
            raise ValueError("a path that no object could lie under")
        return value

    @field_validator("fetch_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: str) -> object:
        hosts = tuple(host.strip().lower() for host in value.split(",") if host.strip())
        if any(not re.match(r"^(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?$|^\[?[0-9a-f:.]+\]?$", host) for host in hosts):
            raise ValueError("not a host name")
        return hosts

    @field_validator("embed_provider", mode="before")
    @classmethod
    def _check_provider(cls, value: object) -> object:
        return routing.ALIASES.get(value, value) if isinstance(value, str) else value

    @field_validator("embed_allowed_models", mode="before")
    @classmethod
    def _split_models(cls, value: str) -> object:
        models = tuple(model.strip() for model in value.split(",") if model.strip())
        if not models or any(not re.fullmatch(r"[!-~]{1,200}", model) for model in models):
            raise ValueError("not a name of a model")
        return models

    @field_validator("nvidia_api_key", "openai_api_key", "voyage_api_key", "runpod_api_key", check_fields=False)
    @classmethod
    def _check_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(r"[!-~]+", value.get_secret_value()):
            raise ValueError("a key is printable ASCII without spaces")
        return value

    @field_validator("nvidia_base_url", "openai_base_url", "voyage_base_url")
    @classmethod
    def _check_base_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        url = _host_url(value)
        if not value.startswith("https://") and not _is_near(urlsplit(url).hostname or ""):
            raise ValueError("a key would cross the internet in the clear")
        return url

    @field_validator("ollama_host")
    @classmethod
    def _check_ollama(cls, value: str) -> str:
        return _host_url(routing.ollama_url(value))

    @field_validator("embed_models", mode="before")
    @classmethod
    def _split_folders(cls, value: str) -> object:
        folders = tuple(folder.strip() for folder in value.split(":") if folder.strip())
        if not folders or not all(folder.startswith("/") for folder in folders):
            raise ValueError("not a folder from the root on")
        return folders

    @field_validator("embed_devices", mode="before")
    @classmethod
    def _split_devices(cls, value: str) -> object:
        devices = tuple(device.strip() for device in value.split(","))
        gpus = all(re.fullmatch(r"cuda:\d{1,2}", device) for device in devices)
        if devices != ("cpu",) and (not gpus or len(set(devices)) < len(devices)):
            raise ValueError("not devices")
        return devices

    @field_validator("embed_cache")
    @classmethod
    def _check_cache(cls, value: str, info: ValidationInfo) -> str:
        if value in ("", "off") or (value.startswith("/") and not value.endswith("/")):
            return value
        url = info.data.get("storage_url", "")
        if not url or not value.startswith(f"{url}/") or not value.endswith("/") or "/../" in value:
            raise ValueError("not a place for vectors")
        # What nobody speaks for in the folders of jobs is swept, and so is what is too old in a cache.
        if any(value.startswith(f"{url}/{room}/") or value == f"{url}/" for room in ("payloads", "artifacts")):
            raise ValueError("the place of payloads and artifacts")
        return value

    def storage(self, *folders: Path) -> StorageConfig:
        """What may be read and written: the storage URL, and these folders."""
        url = urlsplit(self.storage_url)
        roots = [str(folder) for folder in folders] + ([unquote(url.path)] if url.scheme == "file" else [])
        s3 = None
        if url.scheme == "s3":
            s3 = S3Config(bucket=url.netloc, addressing=self.s3_addressing, encryption=self.s3_encryption)
        return StorageConfig(roots=roots, s3=s3, fetch_hosts=list(self.fetch_hosts), fetch_private=self.fetch_private)

    def engines(self) -> Engines:
        """What this machine has to embed with: keys, addresses, models, a cache."""
        keys = {"nvidia": self.nvidia_api_key, "openai": self.openai_api_key, "voyage": self.voyage_api_key}
        urls = {"nvidia": self.nvidia_base_url, "openai": self.openai_base_url, "voyage": self.voyage_base_url}
        cache: str | None = self.embed_cache
        if cache == "off":
            cache = None
        elif not cache:
            bucket = self.storage_url.startswith("s3://")
            cache = f"{self.storage_url}/vectors/" if bucket else str(self.root / "vectors.sqlite")
        return Engines(
            keys={provider: key.get_secret_value() for provider, key in keys.items() if key is not None},
            urls={provider: url for provider, url in urls.items() if url is not None} | {"ollama": self.ollama_host},
            request_timeout_seconds=self.embed_request_seconds,
            voyage_input_type=self.voyage_input_type,
            voyage_output_dtype=self.voyage_output_dtype,
            voyage_truncation=self.voyage_truncation,
            model_folders=tuple(map(str, self.embed_models)),
            model_downloads=self.embed_downloads,
            devices=self.embed_devices,
            precision=self.embed_precision,
            cache=cache,
            cache_bytes=self.embed_cache_bytes,
        )

    def choice(self) -> Choice:
        """What is embedded, and with what, where nobody says otherwise. Raises InvalidRequest, but not for settings
        that were read."""
        choice = routing.choose(self.embedding_mode, self.embed_provider, self.embed_model)
        dimension = self.embed_dimension
        if choice.provider == "voyage":
            dimension = self.voyage_output_dimension or dimension
        return msgspec.structs.replace(
            choice, dimension=dimension, max_tokens=self.embed_max_tokens, max_usd=self.embed_max_usd
        )

    def allowed_models(self) -> frozenset[str]:
        """Models that may be used here, as ``MODEL`` or ``PROVIDER/MODEL``."""
        return frozenset(self.embed_allowed_models) or routing.CATALOG

    @property
    def embeds_here(self) -> bool:
        """Engines run on this machine."""
        return True

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Self:
        """Settings from variables; an empty one counts as not set. Raises InvalidSettings."""
        settings = cls._validated(_given(env))
        settings._check_choice()
        return settings

    def _check_choice(self) -> None:
        """Raise InvalidSettings where the default engine could not run."""
        if self.embedding_mode == "local_cpu" and any(device != "cpu" for device in self.embed_devices):
            name = "MEMVID_EMBED_DEVICES"
            message = f"{name} must be cpu where MEMVID_EMBEDDING_MODE is local_cpu; runpod_gpu uses GPUs"
            raise InvalidSettings(message, field=name)
        try:
            choice = self.choice()
            routing.check_choice(choice, self.engines(), runs_here=self.embeds_here, allowed=self.allowed_models())
        except InvalidRequest as error:
            field = str(error.details["field"])
            name, what = self._variable(field), error.message.removeprefix(field)
            if "setting" in error.details:
                name, what = str(error.details["setting"]), f" must be set: {choice.provider} is what embeds"
            raise InvalidSettings(f"{name}{what}", field=name) from error

    def _variable(self, field: str) -> str:
        """The setting that decides a field of the choice."""
        voyage = self.embed_provider == "voyage" and self.voyage_output_dimension is not None
        if field == "embedding_dimension":
            return "VOYAGE_OUTPUT_DIMENSION" if voyage else "MEMVID_EMBED_DIMENSION"
        if field == "embedding_provider" and self.embed_provider is None and self.embedding_mode != "external_api":
            return "MEMVID_EMBEDDING_MODE"
        return _VARIABLES[field]

    @classmethod
    def _validated(cls, given: dict[str, str], **more: object) -> Self:
        try:
            return cls.model_validate({**given, **more})
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            name = str(first["loc"][0])
            shape = next(f.description for f in cls.model_fields.values() if f.validation_alias == name)
            raise InvalidSettings(
                f"{name} must be {shape}; it is {_shape_of(given.get(name, ''))} ({_reason(first)})", field=name
            ) from error


class Settings(WorkerSettings):
    """What the control plane runs with."""

    api_key: SecretStr | None = None
    """A key that may do everything; with ``--dev`` there may be no key at all."""
    api_key_file: Path | None = Field(
        None, validation_alias="MEMVID_EXPORT_API_KEY_FILE", description="a text file that can be read"
    )
    """Where that key came from; read again when it changes."""
    keys: str = Field(
        "",
        repr=False,
        validation_alias="MEMVID_EXPORT_KEYS",
        description="the text of a keys file (TOML), where there is no MEMVID_EXPORT_KEYS_FILE",
    )
    keys_file: Path | None = Field(
        None, validation_alias="MEMVID_EXPORT_KEYS_FILE", description="a keys file (TOML) that can be read"
    )
    """Named keys with scopes; the file is read again when it changes."""
    rate_limit_per_minute: int = Field(
        60_000,
        ge=1,
        le=60_000_000,
        validation_alias="MEMVID_EXPORT_RATE_LIMIT_PER_MINUTE",
        description="a number of requests, 1 to 60000000",
    )
    """Of one key to ``/v1``, unless the keys file says otherwise of it."""
    rate_limit_burst: int = Field(
        5_000,
        ge=1,
        le=1_000_000,
        validation_alias="MEMVID_EXPORT_RATE_LIMIT_BURST",
        description="a number of requests, 1 to 1000000",
    )
    bind_addr: str = Field(
        "0.0.0.0:8080", validation_alias="MEMVID_EXPORT_BIND_ADDR", description="HOST:PORT, port 0 to 65535"
    )
    database_url: str = Field(
        "",
        validation_alias="MEMVID_EXPORT_DATABASE_URL",
        description="sqlite+aiosqlite:///FILE or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE",
        repr=False,
    )
    retention_seconds: int = Field(
        86_400,
        ge=1,
        le=10 * 365 * 86_400,
        validation_alias="MEMVID_EXPORT_RETENTION_SECONDS",
        description="a whole number of seconds",
    )
    history_seconds: int = Field(
        7 * 86_400,
        ge=1,
        le=10 * 365 * 86_400,
        validation_alias="MEMVID_EXPORT_HISTORY_SECONDS",
        description="a whole number of seconds",
    )
    """How long the record of a job is kept after its end, beyond its artifacts."""
    queue_capacity: int = Field(
        128, ge=1, le=100_000, validation_alias="MEMVID_EXPORT_QUEUE_CAPACITY", description="a number of jobs"
    )
    backend_mode: Literal["legacy_vps", "runpod_queue"] = Field(
        "legacy_vps", validation_alias="MEMVID_EXPORT_BACKEND_MODE", description="a backend: legacy_vps or runpod_queue"
    )
    runpod_api_base: str = Field(
        "https://api.runpod.ai/v2",
        pattern=r"^https?://[^\s?#]+$",
        validation_alias="RUNPOD_API_BASE",
        description="an http(s) URL",
    )
    runpod_rest_base: str = Field(
        "https://rest.runpod.io/v1",
        pattern=r"^https?://[^\s?#]+$",
        validation_alias="RUNPOD_REST_BASE",
        description="an http(s) URL",
    )
    """Where endpoints are read and changed, for ``memvid-export scale``."""
    runpod_endpoint_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        validation_alias="RUNPOD_ENDPOINT_ID",
        description="the id of an endpoint: letters, digits, - and _",
    )
    runpod_api_key: SecretStr | None = Field(
        None, validation_alias="RUNPOD_API_KEY", description="a key of the Runpod API"
    )
    runpod_poll_seconds: float = Field(
        5,
        ge=0.05,
        le=600,
        validation_alias="RUNPOD_POLL_INTERVAL_SECONDS",
        description="a number of seconds, 0.05 to 600",
    )
    runpod_execution_timeout_ms: int = Field(
        600_000,
        ge=5_000,
        le=7 * 86_400_000,
        validation_alias="RUNPOD_EXECUTION_TIMEOUT_MS",
        description="a number of milliseconds, 5000 to 604800000",
    )
    runpod_ttl_ms: int = Field(
        86_400_000,
        ge=10_000,
        le=7 * 86_400_000,
        validation_alias="RUNPOD_TTL_MS",
        description="a number of milliseconds, 10000 to 604800000",
    )
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        validation_alias="MEMVID_EXPORT_PUBLIC_URL",
        description="the http(s) URL under which Runpod reaches this server",
    )
    """For webhooks; without it jobs are polled only."""
    worker_links: bool = Field(False, validation_alias="MEMVID_EXPORT_WORKER_LINKS", description="true or false")
    """Give workers signed links, so that they need no credentials for the bucket."""
    profiles_file: Path | None = Field(
        None, validation_alias="MEMVID_EXPORT_PROFILES_FILE", description="a TOML file that can be read"
    )
    stray_seconds: int = Field(
        3_600,
        ge=1,
        validation_alias="MEMVID_EXPORT_STRAY_SECONDS",
        description="a number of seconds",
    )
    """What lies in storage for so long without a job that speaks for it is removed."""
    worker_slots: int = Field(
        2, ge=1, le=256, validation_alias="MEMVID_EXPORT_WORKER_SLOTS", description="a number of jobs run at once"
    )
    small_job_frames: int = Field(
        20_000,
        ge=0,
        validation_alias="MEMVID_EXPORT_SMALL_JOB_FRAMES",
        description="a number of nodes and relationships",
    )
    """A job of at most so many nodes and relationships is small; of two slots or more, one is kept for small jobs."""
    deadline_seconds: float = Field(
        3_600,
        gt=0,
        le=7 * 86_400,
        validation_alias="MEMVID_EXPORT_DEADLINE_SECONDS",
        description="a number of seconds a job may run",
    )
    max_attempts: int = Field(
        3, ge=1, le=100, validation_alias="MEMVID_EXPORT_MAX_ATTEMPTS", description="a number of attempts"
    )
    max_streams: int = Field(
        2_000, ge=1, validation_alias="MEMVID_EXPORT_MAX_STREAMS", description="a number of open event streams"
    )
    max_downloads: int = Field(
        128, ge=1, le=100_000, validation_alias="MEMVID_EXPORT_MAX_DOWNLOADS", description="a number of downloads"
    )
    """That run at once."""
    disk_floor_bytes: int = Field(
        GIB, ge=0, validation_alias="MEMVID_EXPORT_DISK_FLOOR_BYTES", description="a number of bytes, at least 0"
    )
    """With less free on a disk that exports are written to, no new ones are taken."""
    scrub_seconds: float = Field(
        86_400,
        ge=0,
        le=365 * 86_400,
        validation_alias="MEMVID_EXPORT_SCRUB_SECONDS",
        description="a number of seconds, 0 to 31536000",
    )
    """Within so long every stored artifact is read and compared with its hash once; 0: never."""
    canary_seconds: float = Field(
        0,
        ge=0,
        le=7 * 86_400,
        validation_alias="MEMVID_EXPORT_CANARY_SECONDS",
        description="a number of seconds, 0 to 604800",
    )
    """Between two canary exports; 0: none."""
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#]+$",
        validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        description="the http(s) URL of an OpenTelemetry collector",
    )
    """Where traces go; without it none are made."""
    cors_origins: tuple[str, ...] = Field(
        (), validation_alias="MEMVID_EXPORT_CORS_ORIGINS", description="origins parted by commas (https://host), or *"
    )
    mcp_response_budget_bytes: int = Field(
        RESPONSE_BUDGET_BYTES,
        ge=4_096,
        le=16 << 20,
        validation_alias="MEMVID_MCP_RESPONSE_BUDGET_BYTES",
        description="a number of bytes, at least 4096",
    )
    mcp_rate_limit_per_minute: int = Field(
        240_000,
        ge=1,
        le=60_000_000,
        validation_alias="MEMVID_MCP_RATE_LIMIT_PER_MINUTE",
        description="a number of requests, 1 to 60000000",
    )
    """Of one key that has no rate of its own, or of all together where there is no key. The default is more than one
    process answers: it keeps nobody waiting, and a loop that went wrong shows in the headers."""
    mcp_rate_limit_burst: int = Field(
        8_000,
        ge=1,
        le=1_000_000,
        validation_alias="MEMVID_MCP_RATE_LIMIT_BURST",
        description="a number of requests, 1 to 1000000",
    )
    """Requests that may come at once."""
    mcp_allow_external_capsules: bool = Field(
        False, validation_alias="MEMVID_MCP_ALLOW_EXTERNAL_CAPSULES", description="true or false"
    )
    mcp_cache_capacity: int = Field(
        16, ge=1, le=1_024, validation_alias="MEMVID_MCP_CACHE_CAPACITY", description="a number of open capsules"
    )
    mcp_cache_bytes: int = Field(
        8 * GIB,
        ge=1 << 20,
        validation_alias="MEMVID_MCP_CACHE_BYTES",
        description="a number of bytes, at least 1048576",
    )
    """Copies of capsules that lie in a bucket, for read tools."""
    nexus_url: str | None = Field(
        None, validation_alias="MEMVID_NEXUS_URL", description="an http(s) URL of a Nexus server, without a password"
    )
    """None: the graph lies in a file of its own below the root, and this server alone keeps it."""
    nexus_api_key: SecretStr | None = Field(
        None, validation_alias="MEMVID_NEXUS_API_KEY", description="a key of the Nexus server"
    )
    vectorizer_url: str | None = Field(
        None,
        validation_alias="MEMVID_VECTORIZER_URL",
        description="an http(s) URL of a Vectorizer server, without a password",
    )
    """None: vectors are compared in memory alone."""
    vectorizer_api_key: SecretStr | None = Field(
        None, validation_alias="MEMVID_VECTORIZER_API_KEY", description="a key of the Vectorizer server"
    )
    nexus_domains_file: Path | None = Field(
        None, validation_alias="MEMVID_NEXUS_DOMAINS_FILE", description="a TOML file that can be read"
    )
    nexus_verify_seconds: float = Field(
        86_400,
        ge=0,
        le=365 * 86_400,
        validation_alias="MEMVID_NEXUS_VERIFY_SECONDS",
        description="a number of seconds, 0 to 31536000",
    )
    """Between two comparisons of the graph with the documents; 0: only after a start."""
    nexus_memory_bytes: int = Field(
        2 * GIB,
        ge=64 << 20,
        validation_alias="MEMVID_NEXUS_MEMORY_BYTES",
        description="a number of bytes, at least 67108864",
    )
    """For the vectors of collections that are asked for; one that is larger is held all the same."""
    nexus_documents_per_minute: int = Field(
        120_000,
        ge=1_000,
        le=60_000_000,
        validation_alias="MEMVID_NEXUS_DOCUMENTS_PER_MINUTE",
        description="a number of documents, 1000 to 60000000",
    )
    """That a client may write and delete; so many may come at once."""
    nexus_max_pending: int = Field(
        100_000,
        ge=1_000,
        validation_alias="MEMVID_NEXUS_MAX_PENDING",
        description="a number of documents, at least 1000",
    )
    """Of a client, that wait for the sync; then it takes no more of them."""
    nexus_webhook_secret: SecretStr | None = Field(
        None,
        min_length=16,
        validation_alias="MEMVID_NEXUS_WEBHOOK_SECRET",
        description="a text of at least 16 characters that both sides know",
    )
    """Without it no webhook is taken and none is sent."""
    nexus_outbound_url: str | None = Field(
        None, validation_alias="MEMVID_NEXUS_OUTBOUND_URL", description="an http(s) URL, without a password"
    )
    """Who is told what changes in collections and their graph."""
    metrics_need_key: bool = Field(
        False, validation_alias="MEMVID_EXPORT_METRICS_NEED_KEY", description="true or false"
    )

    @field_validator("bind_addr")
    @classmethod
    def _check_bind(cls, value: str) -> str:
        match = _BIND.match(value)
        if not match or int(match["port"]) > 65_535:
            raise ValueError("not HOST:PORT")
        return value

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: str) -> object:
        origins = tuple(origin.strip() for origin in value.split(",") if origin.strip())
        if "*" in origins and len(origins) > 1:
            raise ValueError("* stands alone")
        if any(origin != "*" and not re.match(r"^https?://[^/\s]+$", origin) for origin in origins):
            raise ValueError("not an origin")
        return origins

    @field_validator("database_url")
    @classmethod
    def _check_database(cls, value: str) -> str:
        if value and not value.startswith(("sqlite+aiosqlite:///", "postgresql+psycopg://")):
            raise ValueError("not a database that this version uses")
        return value

    @field_validator("nexus_url", "nexus_outbound_url", "vectorizer_url")
    @classmethod
    def _check_nexus(cls, value: str | None) -> str | None:
        return None if value is None else _host_url(value)

    @field_validator("runpod_api_base", "runpod_rest_base", "public_url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        try:
            whole = value is None or (urlsplit(value).hostname and urlsplit(value).port != 0)
        except ValueError:
            whole = False
        if not whole:
            raise ValueError("not a URL of a host")
        return value

    @property
    def asks_for_key(self) -> bool:
        """Requests need a key."""
        return bool(self.api_key or self.keys or self.keys_file)

    @property
    def embeds_here(self) -> bool:
        """Engines run on this machine, not on Runpod's."""
        return self.backend_mode == "legacy_vps"

    @property
    def host(self) -> str:
        """The address to listen on."""
        return self.bind_addr.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port to listen on; 0 takes a free one."""
        return int(self.bind_addr.rpartition(":")[2])

    @staticmethod
    def read_key_file(path: Path) -> str:
        """The key in ``MEMVID_EXPORT_API_KEY_FILE``. Raises InvalidSettings."""
        name = "MEMVID_EXPORT_API_KEY_FILE"
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSettings(f"{name} must be a text file that can be read", field=name) from error
        if not key:
            raise InvalidSettings(f"{name} must hold the key; the file is empty", field=name)
        _check_api_key(key)
        return key

    @classmethod
    def read(cls, env: Mapping[str, str], *, dev: bool = False) -> Self:
        """Settings from variables; an empty one counts as not set. Reads the key's file where one is named.

        ``dev`` allows running without a key, on 127.0.0.1:8080 and in ``.memvid-export`` unless said otherwise.
        Raises InvalidSettings.
        """
        given = _given(env)
        if dev:
            given.setdefault("MEMVID_EXPORT_BIND_ADDR", "127.0.0.1:8080")
            given.setdefault("MEMVID_EXPORT_ROOT", ".memvid-export")
        root = Path(os.path.abspath(given.get("MEMVID_EXPORT_ROOT", "/data/exports")))  # noqa: PTH100  resolve() follows links
        given["MEMVID_EXPORT_ROOT"] = str(root)
        given.setdefault("MEMVID_EXPORT_STAGING_ROOT", str(root / "staging"))
        given.setdefault("MEMVID_EXPORT_DATABASE_URL", f"sqlite+aiosqlite:///{root / 'jobs.sqlite'}")
        settings = cls._validated(given, api_key=_read_key(given, dev=dev))
        if settings.backend_mode == "runpod_queue":
            for name, value in (
                ("RUNPOD_ENDPOINT_ID", settings.runpod_endpoint_id),
                ("RUNPOD_API_KEY", settings.runpod_api_key),
            ):
                if value is None:
                    raise InvalidSettings(
                        f"{name} must be set where MEMVID_EXPORT_BACKEND_MODE is runpod_queue", field=name
                    )
        if settings.worker_links and not settings.storage_url.startswith("s3://"):
            raise InvalidSettings(
                "MEMVID_EXPORT_WORKER_LINKS needs a MEMVID_EXPORT_STORAGE_URL of s3://…; files have no links",
                field="MEMVID_EXPORT_WORKER_LINKS",
            )
        if settings.nexus_outbound_url is not None and settings.nexus_webhook_secret is None:
            raise InvalidSettings(
                "MEMVID_NEXUS_OUTBOUND_URL needs MEMVID_NEXUS_WEBHOOK_SECRET, with which events are signed",
                field="MEMVID_NEXUS_WEBHOOK_SECRET",
            )
        settings._check_choice()
        return settings


def _given(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value.strip() for name, value in env.items() if value.strip()}


def _read_key(given: Mapping[str, str], *, dev: bool) -> str | None:
    key, file = given.get("MEMVID_EXPORT_API_KEY"), given.get("MEMVID_EXPORT_API_KEY_FILE")
    if key and file:
        raise InvalidSettings(
            "MEMVID_EXPORT_API_KEY and MEMVID_EXPORT_API_KEY_FILE are both set; set one of them",
            field="MEMVID_EXPORT_API_KEY",
        )
    if file:
        key = Settings.read_key_file(Path(file))
    if key:
        _check_api_key(key)
    named = "MEMVID_EXPORT_KEYS" in given, "MEMVID_EXPORT_KEYS_FILE" in given
    if all(named):
        raise InvalidSettings(
            "MEMVID_EXPORT_KEYS and MEMVID_EXPORT_KEYS_FILE are both set; set one of them", field="MEMVID_EXPORT_KEYS"
        )
    if not key and not any(named) and not dev:
        raise InvalidSettings(
            "MEMVID_EXPORT_API_KEY must be set (or MEMVID_EXPORT_API_KEY_FILE, MEMVID_EXPORT_KEYS_FILE); "
            "only `serve --dev` runs without a key",
            field="MEMVID_EXPORT_API_KEY",
        )
    return key


def _check_api_key(key: str) -> None:
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InvalidSettings(
            "MEMVID_EXPORT_API_KEY must be printable ASCII without spaces", field="MEMVID_EXPORT_API_KEY"
        )


def _host_url(value: str) -> str:
    """A URL of a host without a slash at its end. Raises ValueError, also for a password in it."""
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname or url.port == 0 or not re.fullmatch(r"[!-~]+", value):
        raise ValueError("not a URL of a host")
    if url.username is not None or url.query or url.fragment:
        raise ValueError("more than host and path")
    return value.rstrip("/")


def _is_near(host: str) -> bool:
    """A host of one's own machine or network, as far as its name tells."""
    from common.storage.https import is_public  # with httpx, which few who read settings need

    try:
        return not is_public(host)
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal"))


def _shape_of(value: str) -> str:
    if re.fullmatch(r"[+-]?\d+", value):
        return f"the number {value}" if len(value) <= 20 else f"a number of {len(value)} digits"
    return f"a text of {len(value)} characters"


def _reason(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
