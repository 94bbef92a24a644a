"""The command line: ``memvid-export …``.

The boundary on a terminal: the environment, the clock and signals are read here and nowhere below; errors become one
line and an exit code (0 done, 2 bad usage or input, 3 export failed, 130 interrupted). What a command needs is
imported when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, NamedTuple
from uuid import UUID

import msgspec
import typer

from common.contract import MALFORMED
from common.errors import CanaryFailed, Canceled, ExportError, InvalidRequest, InvalidSettings
from control_plane.nexus.commands import SERVER, Url, nexus

if TYPE_CHECKING:
    from common.capsule.gate import Gate
    from common.contract import Job, Source, WriterName
    from common.embedding.choice import Choice, Engines
    from common.embedding.engine import OpenEngines
    from common.embedding.port import Embedder
    from common.settings import Settings
    from control_plane.client import ExportClient
    from control_plane.terminal import Show

app = typer.Typer(
    name="memvid-export",
    help="Turns GitNexus code graphs into searchable Memvid capsules (.mv2).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(nexus)


class Writer(StrEnum):
    """The capsule writers."""

    native = "native"
    sdk = "sdk"
    cli = "cli"


class Mode(StrEnum):
    """The ways to search."""

    lexical = "lexical"
    semantic = "semantic"
    hybrid = "hybrid"


MAX_ALSO = 7
"""Capsules searched together with the first one."""
MAX_RANKED = 100
"""Ids in an answer to a line of --queries."""
MAX_LINE_BYTES = 1 << 20
_BY_WORDS = "--mode lexical needs no engine"

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Capsule = Annotated[Path, typer.Argument(metavar="CAPSULE", help="A .mv2 file; its sidecar lies beside it.")]


@app.command()
def export(
    graphs: Annotated[
        list[str] | None,
        typer.Argument(metavar="GRAPH…", help="Graph files (.gz and .zst too); - is standard input."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the capsule, its sidecar and its manifest.")] = Path(),
    semantic: Annotated[bool, typer.Option("--semantic", help="Also search by meaning (adds vectors).")] = False,
    profile: Annotated[
        str | None, typer.Option(help="What is embedded, by which engine: default, speed, quality, or your own.")
    ] = None,
    writer: Annotated[Writer | None, typer.Option(help="Which writer; the best installed one by default.")] = None,
    gitnexus: Annotated[str | None, typer.Option(metavar="URL", help="Read from a running GitNexus server.")] = None,
    repo: Annotated[str | None, typer.Option(help="With --gitnexus: the repository's name or path.")] = None,
    json: JsonFlag = False,
) -> None:
    """Turn graphs into capsules on this machine."""
    from control_plane.terminal import Show

    if bool(graphs) == bool(gitnexus):
        raise typer.BadParameter("give graph files, or --gitnexus URL", param_hint="GRAPH…")
    if repo and not gitnexus:
        raise typer.BadParameter("--repo goes with --gitnexus", param_hint="--repo")
    from common.capsule.gate import Gate

    with Show(json=json) as show, Gate() as gate:
        options = _Options(out, semantic, profile, writer.value if writer else None, gate, _Engines(os.environ), set())
        if not gitnexus:
            for graph in graphs or []:
                _export(*_local(graph), options, show)
            return
        from control_plane.client import GitNexus

        with GitNexus(gitnexus) as server:
            found = server.find(repo)
            with server.graph(found) as body:
                _export(body, server.source(found), options, show)


class _Options(NamedTuple):
    out: Path
    semantic: bool
    profile: str | None
    writer: WriterName | None
    gate: Gate
    engines: _Engines
    made: set[str]
    """File names of the capsules that this command has made."""


class _Engines:
    """The engines of this command, as the settings and the profiles have them; the settings are read when one is
    wanted."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env

    def choice(self, profile: str | None) -> Choice:
        """What a profile embeds. Raises InvalidRequest for one that there is not, or that cannot run here."""
        from common.embedding.routing import check_choice
        from control_plane.operations.profiles import Profiles

        settings = self._settings
        choice = Profiles.load(settings.profiles_file, settings).get(profile).embedding
        check_choice(choice, settings.engines(), runs_here=True, allowed=settings.allowed_models())
        return choice

    def open(self, choice: Choice) -> Embedder:
        """The engine of a choice."""
        return self._open.get(choice)

    def ask(self, choice: Choice) -> Embedder:
        """The engine of a capsule's vectors, for questions. Raises InvalidRequest where it may not be used here."""
        from common.embedding.routing import check_question

        settings = self._settings
        try:
            check_question(choice, settings.engines(), mode=settings.embedding_mode, allowed=settings.allowed_models())
        except InvalidRequest as error:
            field = str(error.details["field"])
            name = str(error.details.get("setting") or field)
            what = " must be set" if name.endswith("_API_KEY") else error.message.removeprefix(field)
            message = f"The vectors are of {choice.provider} {choice.model}: {name}{what}"
            raise InvalidRequest(message, **error.details) from error
        return self.open(choice)

    @cached_property
    def _open(self) -> OpenEngines:
        from common.embedding.engine import OpenEngines
        from common.storage import open_storage

        return OpenEngines(engines_of(self._settings, self._env), open_storage(self._settings.storage()))

    @cached_property
    def _settings(self) -> Settings:
        from common.settings import Settings

        return Settings.read(self._env, dev=True)  # the key of our own API is not needed here


def engines_of(settings: Settings, env: Mapping[str, str]) -> Engines:
    """The engines of a command. It has no root of its own: its cache lies with those of its user."""
    engines = settings.engines()
    if settings.embed_cache or settings.storage_url:
        return engines
    caches = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    return msgspec.structs.replace(engines, cache=str(caches / "memvid-export" / "vectors.sqlite"))


def _local(graph: str) -> tuple[BinaryIO | Path, Source]:
    from common.contract import Source
    from common.graph import base_name_of

    if graph == "-":
        if sys.stdin is None:
            raise InvalidRequest("-: standard input is closed", field="GRAPH")
        return sys.stdin.buffer, Source(base_name="graph")
    path = Path(graph)
    shown = _text(path.name)
    return path, Source(base_name=base_name_of(shown), original_file_name=shown)


def _text(argument: str) -> str:
    """An argument as text: bytes that are not UTF-8, which file names may hold, become U+FFFD."""
    return os.fsencode(argument).decode(errors="replace")


def _folder(path: Path, option: str) -> None:
    if _text(str(path)) != str(path):
        raise InvalidRequest(f"{option}: Memvid needs a folder whose name is UTF-8", field=option)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{option}: the folder cannot be made: {error.strerror}", field=option) from error


def _export(source: BinaryIO | Path, defaults: Source, options: _Options, show: Show) -> None:
    from common.embedding.choice import Choice
    from common.graph.names import capsule_file_name
    from common.graph.read import read_graph
    from common.pipeline import export as run

    stages = show.stages(defaults.original_file_name or defaults.base_name)
    started = time.perf_counter()
    request = read_graph(source, defaults=defaults)
    read_seconds = time.perf_counter() - started
    request.options.semantic_enabled |= options.semantic
    request.options.profile = options.profile or request.options.profile
    now = _now(os.environ)
    name = capsule_file_name(request.source.base_name, now)
    if name in options.made:
        message = f"{defaults.original_file_name}: its capsule would replace that of an earlier graph, {name}"
        raise InvalidRequest(f"{message}; export it into another folder", field="source.baseName")
    options.made.add(name)
    profile = request.options.profile
    choice = options.engines.choice(profile) if request.options.semantic_enabled or profile else None
    if options.profile and not request.options.semantic_enabled:
        show.note("note: a profile says what is embedded; no vectors are made without --semantic")
    _folder(options.out, "--out")
    result = run(
        request,
        out_dir=options.out,
        writer=options.writer,
        embedder=options.engines.open(choice) if choice and request.options.semantic_enabled else None,
        choice=choice or Choice(),
        gate=options.gate,
        on_progress=stages,
        should_stop=lambda: None,
        generated_at=now,
    )
    report = result.report
    report.timings.read = read_seconds
    report.timings.total += read_seconds
    show.report(
        report,
        *(("capsule", path) for path in result.capsule_paths),
        ("sidecar", result.sidecar_path),
        ("manifest", result.manifest_path),
    )


def _now(env: Mapping[str, str]) -> str:
    """The time of this export, ISO 8601 in UTC. ``SOURCE_DATE_EPOCH`` (seconds, reproducible-builds.org) fixes it: the
    same graph then gives the same bytes on any day."""
    fixed = env.get("SOURCE_DATE_EPOCH", "")
    wrong = InvalidSettings("SOURCE_DATE_EPOCH must be a whole number of seconds", field="SOURCE_DATE_EPOCH")
    if fixed and not fixed.isdecimal():
        raise wrong
    try:
        now = datetime.fromtimestamp(int(fixed), UTC) if fixed else datetime.now(UTC)
    except (ValueError, OverflowError, OSError) as error:  # a year that no date has
        raise wrong from error
    return now.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@app.command()
def serve(
    dev: Annotated[
        bool, typer.Option("--dev", help="Without a key, on 127.0.0.1:8080, files in .memvid-export (unless set).")
    ] = False,
    runpod_local: Annotated[
        bool, typer.Option("--runpod-local", help="With --dev: run jobs on a local Runpod, which is started too.")
    ] = False,
) -> None:
    """Run the server; settings come from the environment (MEMVID_EXPORT_…)."""
    from common.settings import Settings
    from control_plane.runpod_local import local_platform
    from control_plane.server import serve as run

    if runpod_local and not dev:
        raise typer.BadParameter("--runpod-local goes with --dev", param_hint="--runpod-local")
    # The server stops in order on SIGTERM and then gets the signal again: that is a good end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with local_platform(os.environ) if runpod_local else nullcontext(os.environ) as env:
        run(Settings.read(env, dev=dev))


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the copy goes; a file there is replaced.")],
    json: JsonFlag = False,
) -> None:
    """Copy the job store (SQLite) of this machine's server, which may run; settings come from the environment."""
    from common.settings import Settings
    from control_plane.operations.backup import backup as copy
    from control_plane.terminal import Show

    settings = Settings.read(os.environ, dev=True)  # the key of our own API is not needed here
    with Show(json=json) as show:
        size = copy(settings.database_url, file, show.amount("Copying"))
        show.data({"file": str(file), "sizeBytes": size})
        show.result(f"{file}: {size / 1e6:.1f} MB, integrity checked")


@app.command()
def scale(
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The profiles file; MEMVID_EXPORT_PROFILES_FILE by default.")
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="As if it were then: ISO 8601, local to the file's time zone.")
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Change the endpoint; without it the plan is only shown.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Set the workers of the Runpod endpoint to what the schedule says; run it from cron, as often as you like."""
    import stamina

    from common.settings import Settings
    from control_plane.operations.profiles import Profiles
    from control_plane.operations.scaling import RunpodEndpoint, moment_of, plan
    from control_plane.terminal import Show

    # What this machine would embed with, and the key of our own API, do not matter here.
    settings = Settings.read({**os.environ, "MEMVID_EXPORT_BACKEND_MODE": "runpod_queue"}, dev=True)
    path = file or settings.profiles_file
    if path is None:
        raise InvalidSettings("Name a profiles file: --file, or MEMVID_EXPORT_PROFILES_FILE", field="--file")
    assert settings.runpod_endpoint_id is not None
    assert settings.runpod_api_key is not None
    profiles = Profiles.load(path, settings)
    moment = moment_of(at, profiles.time_zone) if at else datetime.now(UTC)
    endpoint_id, key = settings.runpod_endpoint_id, settings.runpod_api_key.get_secret_value()
    with Show(json=json) as show, RunpodEndpoint(settings.runpod_rest_base, endpoint_id, key) as endpoint:
        # Its own hook would print to standard output.
        stamina.instrumentation.set_on_retry_hooks(
            [lambda retry: show.note(f"Runpod did not answer; trying again in {retry.wait_for:.1f} s")]
        )
        found = plan(profiles, moment, endpoint.read())
        show.result(
            f"Endpoint {found.endpoint_id} {found.endpoint_name}".rstrip(),
            f"{found.place} of {path} holds at {found.at} ({found.time_zone})",
            f"  {'':<12}{'present':>8}{'wanted':>8}",
            *(
                f"  {change.setting:<12}{'?' if change.present is None else change.present:>8}{change.wanted:>8}"
                f"{'  changes' if change.needed else ''}"
                for change in found.settings
            ),
        )
        if apply and found.changes:
            endpoint.change(found.changes)
            found.applied = True
        show.data(found)
        if not found.changes:
            show.result("The endpoint is as it should be.")
        else:
            show.result("Done." if found.applied else "Nothing was changed; --apply changes it.")


@app.command()
def worker(
    test_input: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Run this one job (JSON: {input: {…}}) and end.")
    ] = None,
) -> None:
    """Run jobs of a Runpod endpoint; settings come from the environment (MEMVID_EXPORT_…, and Runpod's own).

    Outside of Runpod it runs the job in ./test_input.json, or that of --test-input.
    """
    from common.settings import WorkerSettings
    from handler.worker import start

    start(WorkerSettings.read(os.environ), _job_text(test_input) if test_input else None)


def _job_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        msgspec.json.decode(text, type=dict)
    except (OSError, *MALFORMED) as error:
        raise InvalidRequest(f"{path}: {error}", field="--test-input") from error
    return text


@app.command()
def key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the log calls it.")],
    scope: Annotated[list[str], typer.Option(help="What it may do: export, read, admin; may be repeated.")],
    client: Annotated[str | None, typer.Option(help="Whose exports it makes and sees; NAME by default.")] = None,
    json: JsonFlag = False,
) -> None:
    """Make a key for the server: shows it once, and prints the lines with its hash for the keys file."""
    from control_plane.operations.keys import key_entry, new_key
    from control_plane.terminal import Show

    made = new_key()
    entry = key_entry(name, made, scope, client)
    with Show(json=json) as show:
        if not json:
            show.note(f"The key, which is not shown again: {made}")
        show.result(entry)
        show.data({"key": made, "entry": entry})


@app.command("local-runpod")
def local_runpod(
    bind: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where it listens; port 0 is a free one.")] = (
        "127.0.0.1:8600"
    ),
    endpoint: Annotated[str, typer.Option(help="The endpoint's id.")] = "local",
    workers: Annotated[str, typer.Option(metavar="MIN:MAX", help="How many workers run.")] = "0:2",
    idle_seconds: Annotated[float, typer.Option(min=0, help="A worker without a job ends after that long.")] = 5.0,
    worker_command: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="What a worker runs instead of memvid-export worker.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Add to the environment of the workers.")
    ] = None,
    fault: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PROBABILITY", help="A fault that strikes by chance.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the chance repeatable.")] = None,
) -> None:
    """Run a local Runpod: an endpoint with workers on this machine; RUNPOD_API_KEY, where set, is its key."""
    try:
        import aiohttp  # noqa: F401
    except ImportError as error:
        raise InvalidSettings("local-runpod needs the worker extra: pip install 'memvid-export[worker]'") from error
    from handler.local import LocalConfig, serve, worker_environment

    host, _, port = bind.rpartition(":")
    least, _, most = workers.partition(":")
    if not (host and port.isdecimal()):
        raise InvalidSettings(f"--bind {bind}: give HOST:PORT", field="--bind")
    if not (least.isdecimal() and most.isdecimal()):
        raise InvalidSettings(f"--workers {workers}: give MIN:MAX", field="--workers")
    given: dict[str, object] = {
        "host": host.strip("[]"),
        "port": port,
        "endpoint": endpoint,
        "key": os.environ.get("RUNPOD_API_KEY") or None,
        "min_workers": least,
        "max_workers": most,
        "idle_seconds": idle_seconds,
        "env": worker_environment(os.environ, dict(_pair(it, "--env") for it in env or [])),
        "faults": dict(_pair(it, "--fault") for it in fault or []),
        "seed": seed,
    }
    if worker_command is not None:
        given["worker_command"] = _words(worker_command)
    try:
        config = msgspec.convert(given, LocalConfig, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidSettings(f"local-runpod: {error}") from error
    serve(config)


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InvalidSettings(f"--worker-command: {error}", field="--worker-command") from error
    if not words:
        raise InvalidSettings("--worker-command: give a command", field="--worker-command")
    return words


def _pair(given: str, option: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not (name and equals):
        raise InvalidSettings(f"{option} {given}: give NAME=VALUE", field=option)
    return name, value


@app.command()
def submit(
    graph: Annotated[Path, typer.Argument(metavar="GRAPH", help="A graph file (.gz and .zst too).")],
    url: Url = SERVER,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the export to its end and fetch the files.")] = False,
    out: Annotated[Path, typer.Option(help="With --wait: the folder for the files.")] = Path(),
    collection: Annotated[
        str | None, typer.Option(metavar="NAME", help="The collection on the server that the nodes are to be in.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Send a graph to a server; the key is taken from MEMVID_EXPORT_API_KEY or MEMVID_EXPORT_API_KEY_FILE."""
    from control_plane.client import ExportClient, api_key
    from control_plane.terminal import Show
    from handler.protocol import export_error

    if not graph.is_file():
        raise InvalidRequest(f"There is no file {graph}", field="GRAPH")
    with Show(json=json) as show, ExportClient(url, api_key(os.environ)) as client:
        created = client.submit(graph, show.amount(f"Sending {graph.name}"), collection=collection)
        if not wait:
            show.data(created)
            show.result(f"{created.job_id}: {created.message}")
            return
        job = _followed(client, created.job_id, graph.name, show)
        _folder(out, "--out")
        *capsules, sidecar, manifest = client.fetch(job.job_id, out, lambda name: show.amount(f"Fetching {name}"))
        files = [*(("capsule", path) for path in capsules), ("sidecar", sidecar), ("manifest", manifest)]
        if (imported := client.imported(job.job_id)) is not None:
            if imported.error is not None:
                raise export_error(imported.error)
            show.note(f"Collection {imported.name}: {imported.documents:,} documents")
        show.report(client.report(job.job_id), *files)


def _followed(client: ExportClient, job_id: str, name: str, show: Show) -> Job:
    """The job once it is completed. Raises the error that it ended in."""
    from common.contract import Progress
    from handler.protocol import export_error

    show.note(f"Job {job_id}")
    stages = show.stages(name)
    for event in client.events(job_id):
        if event.stage in ("failed", "canceled", "expired"):
            break
        stages(
            Progress(
                stage=event.stage,
                progress=event.progress,
                stage_progress=event.stage_progress,
                message=event.message,
            )
        )
    job = client.job(job_id)
    if job.error or not job.artifact:
        raise export_error(job.error) if job.error else Canceled(f"Job {job.job_id} was {job.status}")
    return job


@app.command()
def retry(
    job: Annotated[
        str | None, typer.Argument(metavar="JOB", help="The id of an export that failed; without it they are listed.")
    ] = None,
    *,
    url: Url = SERVER,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the new export to its end.")] = False,
    json: JsonFlag = False,
) -> None:
    """Start a failed export again from the payload that the server has kept; without JOB, list what was given up."""
    from control_plane.client import ExportClient, api_key
    from control_plane.terminal import Show

    if wait and job is None:
        raise typer.BadParameter("--wait goes with JOB", param_hint="--wait")
    with Show(json=json) as show, ExportClient(url, api_key(os.environ)) as client:
        if job is None:
            _given_up(client, show)
            return
        created = client.retry(_job_id(job))
        if not wait:
            show.data(created)
            show.result(f"{created.job_id}: {created.message}")
            return
        done = _followed(client, created.job_id, job, show)
        show.data(done)
        show.result(f"{done.job_id}: {done.message}")


def _job_id(given: str) -> str:
    try:
        return str(UUID(given))
    except ValueError as error:
        raise InvalidRequest(f"{_text(given)} is not the id of an export", field="JOB") from error


def _given_up(client: ExportClient, show: Show) -> None:
    """The failed exports that can be started again."""
    kept = [job for job in client.failed() if job.metadata.retry_until is not None]
    show.data(kept)
    for job in kept:
        code, message = (job.error.code, job.error.message) if job.error else ("INTERNAL", job.message)
        attempts = "1 attempt" if job.metadata.attempts == 1 else f"{job.metadata.attempts:,} attempts"
        show.result(
            f"{job.job_id}  {job.metadata.project_name}",
            f"  {code}: {message}",
            f"  {attempts}, failed {job.updated_at}, kept until {job.metadata.retry_until}",
        )
    if not kept:
        show.result("Nothing was given up.")


@app.command()
def canary(
    url: Url = SERVER,
    semantic: Annotated[bool, typer.Option("--semantic", help="Make vectors too, and search by meaning.")] = False,
    timeout: Annotated[float, typer.Option(min=1, max=86_400, help="Seconds that it may take in all.")] = 120.0,
    json: JsonFlag = False,
) -> None:
    """Send a small made-up graph through a server, check the capsule, and look for what was put into it."""
    import secrets

    from common.errors import DeadlineExceeded
    from control_plane.client import api_key
    from control_plane.operations.canary import Step, fly
    from control_plane.terminal import Show

    def late(*_: object) -> None:
        raise DeadlineExceeded(f"it did not end within {timeout:g} seconds", limit=timeout)

    def told(step: Step) -> None:
        show.note(f"{step.seconds:7.2f} s  {step.name}: {step.detail}")

    word = "".join(secrets.choice("bcdfghjklmnpqrstvwxz") for _ in range(16))
    with Show(json=json) as show:
        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        run = fly(url, api_key(os.environ), word, semantic=semantic, tell=told)
        signal.setitimer(signal.ITIMER_REAL, 0)
        show.data(run)
        if run.outcome == "ok":
            show.result(f"The canary came through in {run.seconds:.2f} s.")
    if run.outcome != "ok":
        raise CanaryFailed(f"The canary did not come through ({run.outcome}), at {run.step}: {run.message}")


@app.command()
def inspect(capsule: Capsule, json: JsonFlag = False) -> None:
    """Show what is in a capsule."""
    from control_plane.reading.inspect import inspect as look
    from control_plane.terminal import Show

    found = look(capsule)
    with Show(json=json) as show:
        show.data(found)
        meta = found.manifest or {}
        lines = {
            "project": meta.get("projectName"),
            "made": meta.get("generatedAt"),
            "frames": f"{found.frames:,}",
            "vectors": f"{found.vectors:,} of {found.dimension} numbers, {found.model}" if found.vectors else "none",
            "nodes": _tally(meta.get("nodeLabels")),
            "relations": _tally(meta.get("relationshipTypes")),
            "sidecar": found.sidecar or "none (it can be rebuilt from the capsule)",
            "digest": found.content_digest,
            "read by": found.readers,
        }
        show.result(*(f"{part.path}: {part.frames:,} frames, {part.size_bytes / 1e6:.1f} MB" for part in found.parts))
        show.result(*(f"  {name:<10}{value}" for name, value in lines.items() if value))


def _tally(counts: Mapping[str, int] | None) -> str | None:
    if not counts:
        return None
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {name}" for name, count in ordered)


@app.command()
def verify(
    place: Annotated[
        str,
        typer.Argument(metavar="CAPSULE", help="A .mv2 file, a folder, file:///folder/ or s3://bucket/prefix/."),
    ],
    json: JsonFlag = False,
) -> None:
    """Check a capsule, its sidecar and its manifest: hashes, structure, and reads through memvid-sdk.

    In a folder or a bucket, every capsule is compared with its manifest, byte by byte; one that has none is read
    through memvid-sdk. A bucket is reached as boto3 is told (AWS_…).
    """
    from common.errors import GateFailed
    from control_plane.reading.inspect import verify as check
    from control_plane.reading.verify import single
    from control_plane.terminal import Show

    capsule = single(place)
    with Show(json=json) as show:
        if capsule is None:
            _verify_all(place, show)
            return
        checks = []
        for found in check(capsule):
            checks.append(found)
            show.result(f"{'ok    ' if found.ok else 'WRONG '} {found.name}: {found.detail}")
        show.data({"ok": all(found.ok for found in checks), "checks": checks})
    wrong = [found.name for found in checks if not found.ok]
    if wrong:
        raise GateFailed(f"{capsule.name} is not whole: {', '.join(wrong)}")


def _verify_all(place: str, show: Show) -> None:
    from common.errors import GateFailed
    from common.settings import Settings
    from control_plane.reading.verify import Sum, verify_all

    total = Sum()
    settings = Settings.read(os.environ, dev=True)  # the key of our own API is not needed here
    words = {"whole": "ok    ", "damaged": "WRONG ", "stray": "stray "}
    for found in verify_all(place, settings, lambda name: show.amount(f"Reading {name}")):
        total.add(found)
        show.data(found)
        read = f"{found.files} files, {found.size_bytes / 1e6:.1f} MB"
        told = "; ".join(found.problems) or ("no manifest; memvid-sdk reads it" if not found.manifest else read)
        show.result(f"{words[found.state]} {found.ref}{': ' + told if found.state != 'stray' else ''}")
    show.data(total)
    show.result(
        f"{total.capsules:,} capsules, {total.size_bytes / 1e6:,.1f} MB: {total.capsules - total.damaged:,} whole, "
        f"{total.damaged:,} damaged; {total.without_manifest:,} without a manifest, {total.strays:,} strays"
    )
    if total.damaged:
        raise GateFailed(f"{total.damaged:,} of {total.capsules:,} capsules are damaged")


@app.command()
def search(
    capsule: Capsule,
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="Words, or a name.")] = None,
    *,
    also: Annotated[
        list[Path] | None, typer.Option(metavar="CAPSULE", help="Search this capsule too; seven more at most.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only nodes with one of these labels.")] = None,
    file: Annotated[str | None, typer.Option(metavar="PREFIX", help="Only nodes whose path begins so.")] = None,
    community: Annotated[str | None, typer.Option(metavar="ID", help="Only members of this community.")] = None,
    type_: Annotated[
        list[str] | None, typer.Option("--type", help="Only nodes with a relationship of one of these types.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="How to search.")] = Mode.hybrid,
    limit: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="The most hits: 10, with --queries 100, which are the most there."),
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lines {query_id, text}; prints lines {query_id, ranked}.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Search a capsule, or several together."""
    from common.errors import DeviceFailed, EmbeddingFailed, ProviderRejected
    from common.sidecar.open import Scope
    from control_plane.reading.ask import Names, check_scope, check_semantic
    from control_plane.reading.inspect import Files, opened_sidecar, vectors
    from control_plane.reading.search import Searched, rank_all
    from control_plane.reading.search import search as find
    from control_plane.terminal import Show

    if (query is None) == (queries is None):
        raise typer.BadParameter("give a query, or --queries FILE", param_hint="QUERY")
    if len(also or ()) > MAX_ALSO:
        raise typer.BadParameter(f"give it at most {MAX_ALSO} times", param_hint="--also")
    if queries is not None and limit is not None and limit > MAX_RANKED:
        raise typer.BadParameter(f"give {MAX_RANKED} at most with --queries", param_hint="--limit")
    scope = Scope(tuple(map(_text, label or ())), file or None, community or None, tuple(map(_text, type_ or ())))
    with Show(json=json) as show, ExitStack() as opened:
        engines = _Engines(os.environ)
        searched = []
        named: dict[Path, Path] = {}
        for path in (capsule, *(also or ())):
            named.setdefault(path.resolve(), path)
        for path in named.values():
            files = Files(path)
            sidecar = opened.enter_context(opened_sidecar(files))
            try:
                loaded = None if mode is Mode.lexical else vectors(files, sidecar, engines.ask)
            except InvalidRequest as error:
                raise InvalidRequest(f"{_text(path.name)}: {error.message}; {_BY_WORDS}", **error.details) from error
            searched.append(Searched(_text(str(path)), sidecar, loaded))
        check_scope([one.sidecar for one in searched], scope, Names("--label", "--file", "--community", "--type"))
        if mode is Mode.semantic:
            check_semantic(searched, "--mode")
        try:
            if queries is not None:
                asked = _queries(queries)
                for answer in rank_all(searched, asked, mode=mode.value, limit=limit or MAX_RANKED, scope=scope):
                    print(msgspec.json.encode(answer).decode())
                return
            query = _text(query or "")
            hits = find(searched, query, mode=mode.value, limit=limit or 10, scope=scope)
        except (EmbeddingFailed, ProviderRejected, DeviceFailed) as error:
            raise type(error)(f"{error.message}; {_BY_WORDS}", **error.details) from error
        several = len(searched) > 1
        found = [
            {
                "id": node.id,
                "uri": node.uri,
                "kind": node.kind,
                "title": node.title,
                "score": score,
                "why": why,
            }
            | ({"capsule": name} if several else {})
            for name, node, score, why in hits
        ]
        show.data({"query": query, "mode": mode.value, "hits": found})
        for name, node, score, why in hits:
            places = [node.id, name] if several else [node.id]
            show.result("\n        ".join([f"{score:6.3f}  {node.title}", *places, why]))
        if not hits:
            show.result("Nothing found.")


@app.command()
def mcp(
    capsules: Annotated[
        list[Path],
        typer.Argument(metavar="CAPSULE…", help="Capsules (.mv2); the first one answers where none is named."),
    ],
) -> None:
    """Answer read tools to an MCP client over standard input and output, from capsule files and without a server."""
    from common.settings import Settings
    from control_plane.reading.mcp_stdio import CapsuleFiles, serve
    from handler.logs import log_as_json

    log_as_json()
    settings = Settings.read(os.environ, dev=True)  # the key of our own API is not needed here
    serve(CapsuleFiles(capsules), _Engines(os.environ).ask, budget=settings.mcp_response_budget_bytes)


class _Query(msgspec.Struct):
    query_id: str | int
    text: str


def _queries(path: Path) -> Iterator[tuple[str | int, str]]:
    """Queries one by one: what stands before a bad line is answered before that line is refused."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if not line.strip():
                    continue
                try:
                    if len(line) > MAX_LINE_BYTES:
                        raise msgspec.ValidationError(f"it has more than {MAX_LINE_BYTES:,} bytes")
                    found = msgspec.json.decode(line, type=_Query)
                except MALFORMED as error:
                    raise InvalidRequest(f"{path.name}, line {number}: {error}", field=f"line {number}") from error
                yield found.query_id, found.text
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}", field="--queries") from error


def main() -> None:
    """The entry point: runs a command, turns its error into one line and an exit code."""
    # Ended by another program as by Ctrl-C: temporary files are removed on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except ExportError as error:
        if "--json" in sys.argv[1:]:
            print(
                msgspec.json.encode(
                    {"error": {"code": error.code, "message": error.message, "details": error.details}}
                ).decode()
            )
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the boundary: what nobody foresaw is one line and an exit code too
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        print(f"error: {type(error).__name__} at {where}: {error}", file=sys.stderr)
        sys.exit(ExportError.exit_code)
