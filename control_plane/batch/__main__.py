"""``scripts/batch``: the boundary on a terminal. The environment, the clock and signals are read here and nowhere
below; exit codes: 0 all graphs are done, 2 bad usage or input, 3 some failed, 130 interrupted."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import typer

from common.embedding.routing import check_choice
from common.errors import ExportError, InvalidRequest, InvalidSettings
from common.graph.model import GraphLimits
from common.settings import Settings
from common.storage import S3Config, Storage, StorageConfig, open_storage
from control_plane.batch.board import Board, table_of
from control_plane.batch.journal import Journal
from control_plane.batch.run import Batch, Summary
from control_plane.batch.slots import Plan, Slot
from control_plane.batch.sources import FolderSource, GitNexusSource, GraphSource, S3Source
from control_plane.cli import engines_of
from control_plane.client import GitNexus
from control_plane.operations.profiles import Profile, Profiles

if TYPE_CHECKING:
    from control_plane.backends.runpod_api import RunpodApi
    from control_plane.batch.local import LocalSlot
    from control_plane.batch.runpod import RunpodSlot

IN_FLIGHT = 16
"""Jobs on Runpod at once, unless --workers says otherwise."""
MAX_WORKERS = 256
FIRST_TRIES = 4
"""Of asking Runpod whether it is there."""
INTERRUPTED = 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Place(NamedTuple):
    """Where capsules go, or where graphs come from."""

    prefix: str
    storage: Storage
    folder: Path | None
    """None: it is a bucket."""


class Given(NamedTuple):
    """The command line."""

    source: str
    out: str
    workers: int | None
    devices: tuple[str, ...]
    runpod: bool
    retry_failed: bool


@app.command()
def batch(  # noqa: PLR0917 - typer calls it
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, s3://bucket/prefix/, or the URL of a GitNexus server.")
    ],
    out: Annotated[str, typer.Option(metavar="DEST", help="A folder or s3://bucket/prefix/; each graph gets its own.")],
    profile: Annotated[str | None, typer.Option(help="What is embedded, by which engine.")] = None,
    semantic: Annotated[
        bool, typer.Option("--semantic/--no-semantic", help="With vectors, to search by meaning.")
    ] = True,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_WORKERS,
            help="Graphs at once: one a GPU, as many as this machine runs without GPUs, or 16 jobs on Runpod.",
        ),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(metavar="cuda:0,cuda:1", help="Use these; all GPUs, or the CPU, by default.")
    ] = None,
    runpod: Annotated[
        bool, typer.Option("--runpod", help="Run on the endpoint of RUNPOD_ENDPOINT_ID; DEST must be in S3.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also run unchanged graphs that failed before.")
    ] = False,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write a summary; - is standard output.")
    ] = None,
) -> None:
    """Turn many graphs into capsules. What is done and unchanged is skipped: run it again to go on."""
    if json not in (None, "-") and not Path(json).absolute().parent.is_dir():
        raise InvalidRequest(f"--json {json}: there is no such folder", field="--json")
    settings = Settings.read(os.environ, dev=True)  # the key of our own API is not needed here
    given = Given(source, out, workers, _devices(devices, settings), runpod, retry_failed)
    if runpod and (devices or settings.worker_links):
        option = "--devices" if devices else "MEMVID_EXPORT_WORKER_LINKS"
        raise InvalidRequest(f"{option} does not go with --runpod: its workers need their own", field=option)
    chosen = Profiles.load(settings.profiles_file, settings).get(profile)
    check_choice(
        chosen.embedding,
        settings.engines(),
        runs_here=semantic and not runpod,
        allowed=settings.allowed_models(),
    )
    plan = _plan(chosen, profile, settings, semantic=semantic, runs_here=not runpod)
    summary, error = asyncio.run(_batch(given, settings, chosen, plan))
    _tell(summary, json)
    if error is not None:
        print(f"error: {error.message}", file=sys.stderr)
    if summary.interrupted:
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # a fetch that is under way in a thread would hold up the end
    if error is not None or summary.failed:
        sys.exit(ExportError.exit_code)


def _devices(given: str | None, settings: Settings) -> tuple[str, ...]:
    if given is None:
        return settings.embed_devices
    try:
        return Settings.read({**os.environ, "MEMVID_EMBED_DEVICES": given}, dev=True).embed_devices
    except InvalidSettings as error:
        message = error.message.replace("MEMVID_EMBED_DEVICES", "--devices")
        raise InvalidRequest(message, field="--devices") from error


def _plan(chosen: Profile, profile: str | None, settings: Settings, *, semantic: bool, runs_here: bool) -> Plan:
    options = {"semanticEnabled": semantic, **({"profile": profile} if profile else {})}
    embedding = msgspec.structs.replace(chosen.embedding, max_tokens=None, max_usd=None) if semantic else None
    decides: list[object] = [options, embedding, settings.writer, settings.embed_precision, version("memvid-export")]
    if embedding is not None and embedding.provider == "voyage":
        decides += [settings.voyage_input_type, settings.voyage_output_dtype, settings.voyage_truncation]
    if embedding is not None and embedding.provider == "torch" and runs_here:
        from common.embedding.torch_engine import find_model, revision_of

        decides.append(revision_of(find_model(embedding.model, settings.engines())))
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    digest = hashlib.sha256(msgspec.json.encode(decides, order="deterministic")).hexdigest()
    return Plan(options, chosen.embedding, now, digest)


def _tell(summary: Summary, json: str | None) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(summary))
    if json == "-":
        print(encoded.decode(), flush=True)
    elif json is not None:
        try:
            Path(json).write_bytes(encoded + b"\n")
        except OSError as error:
            raise InvalidRequest(f"--json {json}: {error.strerror}", field="--json") from error
    lines = table_of(summary.per_graph)
    lines.append(
        f"{summary.graphs:,} graphs: {summary.completed:,} completed, {summary.failed:,} failed, "
        f"{summary.skipped:,} unchanged{f', {summary.left:,} left' if summary.left else ''}; "
        f"{summary.frames:,} frames, {summary.vectors:,} vectors, {summary.tokens:,} tokens "
        f"(${summary.cost_estimate:,.4f}) in {summary.seconds:.1f} s, {summary.frames_per_second:,.0f} frames/s"
    )
    for line in lines:
        print(line, file=sys.stderr if json == "-" else sys.stdout, flush=True)


# --- putting it together ------------------------------------------------------------------------------


async def _batch(given: Given, settings: Settings, chosen: Profile, plan: Plan) -> tuple[Summary, ExportError | None]:
    out = _place(given.out, settings, "--out")
    async with AsyncExitStack() as stack:
        scratch = stack.enter_context(_scratch(out))
        slots: Sequence[Slot]
        if given.runpod:
            slots = await stack.enter_async_context(_endpoint(given, settings, chosen, plan, out))
        else:
            slots = _local(given, settings, plan, out, scratch)
        source = _source(given.source, out, settings, stack)
        graphs = source.graphs()
        board = stack.enter_context(Board(graphs))
        job = Batch(
            source,
            graphs,
            slots[: len(graphs)],
            plan=plan,
            journal=Journal(out.storage, out.prefix),
            destination=out.storage,
            prefix=out.prefix,
            there={found.ref: found.size for found in out.storage.found(out.prefix)},
            folder=scratch / "payloads",
            max_payload_bytes=settings.max_payload_bytes,
            retry_failed=given.retry_failed,
            board=board,
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, job.stop)
        try:
            await job.run()
        except ExportError as error:
            return job.summary(error), error
        return job.summary(), None


def _place(text: str, settings: Settings, option: str) -> Place:
    if text.startswith("s3://"):
        bucket = text[5:].partition("/")[0]
        s3 = S3Config(bucket=bucket, addressing=settings.s3_addressing, encryption=settings.s3_encryption)
        return Place(text.rstrip("/") + "/", open_storage(StorageConfig(roots=[], s3=s3)), None)
    folder = Path(os.path.abspath(text))  # noqa: PTH100  resolve() follows links
    if option == "--out":
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(f"{option}: the folder cannot be made: {error.strerror}", field=option) from error
    if not folder.is_dir():
        raise InvalidRequest(f"{option}: there is no folder {text}", field=option)
    return Place(folder.as_uri() + "/", open_storage(StorageConfig(roots=[str(folder)])), folder)


def _source(text: str, out: Place, settings: Settings, stack: AsyncExitStack) -> GraphSource:
    if text.startswith(("http://", "https://")):
        return GitNexusSource(stack.enter_context(GitNexus(text)), text)
    place = _place(text, settings, "SOURCE")
    if place.prefix == out.prefix:
        raise InvalidRequest("--out must be another place than SOURCE", field="--out")
    if place.folder is not None:
        return FolderSource(place.folder, out.folder)
    return S3Source(place.storage, place.prefix, out.prefix if out.prefix.startswith(place.prefix) else None)


@contextmanager
def _scratch(out: Place) -> Iterator[Path]:
    """A folder for what is under way, beside what it becomes where that is a folder; what a batch that was killed left
    is removed. Held by one batch at a time: raises InvalidRequest while another one of this machine has the same
    destination."""
    if out.folder is not None:
        held, scratch = out.folder, out.folder / ".batch"
    else:
        name = f"memvid-export-batch-{os.getuid()}-{hashlib.sha256(out.prefix.encode()).hexdigest()[:16]}"
        held = scratch = Path(tempfile.gettempdir()) / name
    try:
        scratch.mkdir(mode=0o700, exist_ok=True)
        status = scratch.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise InvalidRequest(f"{scratch} must be a folder of this user", field="--out")
        handle = os.open(held, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InvalidRequest(f"--out: {scratch} cannot be used: {error.strerror}", field="--out") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InvalidRequest("--out: another batch runs into it", field="--out") from error
        if not os.fstat(handle).st_nlink:  # that batch has ended this moment
            raise InvalidRequest(f"--out: {scratch} is being removed; try again", field="--out")
        for left in scratch.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(handle)


def _local(given: Given, settings: Settings, plan: Plan, out: Place, scratch: Path) -> list[LocalSlot]:
    from control_plane.batch.local import LocalSlot
    from handler.protocol import ChildConfig
    from handler.worker import concurrency

    engines = engines_of(settings, os.environ)
    devices = _usable(given.devices, plan)
    if given.workers is not None:
        count = given.workers
    elif devices == ("cpu",):
        count = concurrency(settings.worker_memory_bytes)
    else:
        count = len(devices)
    folders = [scratch] if out.folder is None else [scratch, out.folder]
    source = Path(os.path.abspath(given.source))  # noqa: PTH100
    if source.is_dir():
        folders.append(source)
    config = ChildConfig(
        parent_pid=os.getpid(),
        storage=settings.storage(*folders),
        scratch=str(scratch),
        writer=settings.writer,
        memory_limit=settings.worker_memory_bytes,
        limits=GraphLimits(max_payload_bytes=settings.max_payload_bytes),
        choice=plan.choice,
        engines=engines,
        preload=bool(plan.options["semanticEnabled"]),
    )
    made = open_storage(StorageConfig(roots=[str(scratch)]))
    return [
        LocalSlot(
            number + 1,
            msgspec.structs.replace(
                config, engines=msgspec.structs.replace(engines, devices=(devices[number % len(devices)],))
            ),
            plan,
            scratch=made,
            destination=out.storage,
            prefix=out.prefix,
            deadline_seconds=settings.deadline_seconds,
        )
        for number in range(count)
    ]


def _usable(wanted: tuple[str, ...], plan: Plan) -> tuple[str, ...]:
    """The devices that are wanted, all GPUs where none is; only torch uses any, and not in the mode local_cpu. Raises
    InvalidRequest."""
    if plan.choice.provider != "torch" or plan.choice.mode == "local_cpu" or not plan.options["semanticEnabled"]:
        return ("cpu",)
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = tuple(f"cuda:{number}" for number in range(found))
    if lacking := [device for device in wanted if device not in (*there, "cpu")]:
        has = ", ".join((*there, "cpu"))
        raise InvalidRequest(f"--devices: there is no {', '.join(lacking)} here; there are {has}", field="--devices")
    return wanted or there or ("cpu",)


async def _answers(api: RunpodApi) -> None:
    """A key that is wrong is told of before anything is staged. Raises PlatformUnavailable."""
    from control_plane.errors import PlatformUnavailable

    for last in (False,) * (FIRST_TRIES - 1) + (True,):
        try:
            await api.status("none")
            return
        except PlatformUnavailable:
            if last:
                raise


@asynccontextmanager
async def _endpoint(
    given: Given, settings: Settings, chosen: Profile, plan: Plan, out: Place
) -> AsyncIterator[list[RunpodSlot]]:
    """Slots over the endpoint, once it has answered. Raises InvalidSettings, PlatformUnavailable."""
    from control_plane.backends.runpod_api import RunpodApi
    from control_plane.batch.runpod import Endpoint, RunpodSlot
    from control_plane.operations.metrics import Metrics

    if out.folder is not None:
        raise InvalidRequest("--out must be a prefix in S3 with --runpod: workers put files there", field="--out")
    if settings.runpod_endpoint_id is None or settings.runpod_api_key is None:
        name = "RUNPOD_API_KEY" if settings.runpod_endpoint_id else "RUNPOD_ENDPOINT_ID"
        raise InvalidSettings(f"{name} must be set for --runpod", field=name)
    key = settings.runpod_api_key.get_secret_value()
    api = RunpodApi(settings.runpod_api_base, settings.runpod_endpoint_id, key, Metrics())
    try:
        await _answers(api)
        endpoint = Endpoint(
            api,
            out.storage,
            out.prefix,
            plan,
            chosen.execution_timeout_ms,
            chosen.ttl_ms,
            settings.runpod_poll_seconds,
        )
        yield [RunpodSlot(number + 1, endpoint) for number in range(given.workers or IN_FLIGHT)]
        try:
            await asyncio.to_thread(endpoint.clear)
        except ExportError as error:  # the next batch does that; what this one did has to be told
            print(f"note: payloads could not be removed: {error.message}", file=sys.stderr)
    finally:
        await api.close()


def main() -> None:
    """The entry point: runs the command, turns its error into one line and an exit code."""
    # Until the batch runs, ended by another program as by Ctrl-C: temporary files are removed on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(prog_name="scripts/batch")
    except ExportError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - the boundary: what nobody foresaw is one line and an exit code too
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        print(f"error: {type(error).__name__} at {where}: {error}", file=sys.stderr)
        sys.exit(ExportError.exit_code)


if __name__ == "__main__":
    main()
