"""The commands ``memvid-export nexus …``: what an operator does with the sync of documents and the graph, and a file
of documents for a collection. They talk to a server."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from common.errors import ExportError, InvalidRequest

if TYPE_CHECKING:
    from control_plane.client import ExportClient
    from control_plane.nexus.messages import CollectionView, SyncCounts
    from control_plane.nexus.overview import Kind, LookReport, Overview
    from control_plane.terminal import Show

nexus = typer.Typer(
    name="nexus",
    help="Keeps a graph database in step with the collections of a server.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

FAILURES = 20
"""Documents that were given up that ``stats`` shows, and events that ``events`` does."""
POLL_SECONDS = 0.5
SKEW_SECONDS = 5.0
"""That the clocks of server and database may differ."""
PATIENCE = 12
"""Requests with the same documents: a server may be away for two minutes. One that says when to come again (429) is
waited for as long as it says so."""

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
SERVER = "http://127.0.0.1:8080"
Url = Annotated[str, typer.Option(help="The server.")]
Wait = Annotated[bool, typer.Option("--wait", help="Follow it until the graph has everything.")]


@nexus.command()
def enable(url: Url = SERVER, json: JsonFlag = False) -> None:
    """Keep the graph in step; the key is taken from MEMVID_EXPORT_API_KEY or MEMVID_EXPORT_API_KEY_FILE."""
    _switch(url, on=True, json=json)


@nexus.command()
def disable(url: Url = SERVER, json: JsonFlag = False) -> None:
    """Leave the graph as it is; documents are taken and wait."""
    _switch(url, on=False, json=json)


def _switch(url: str, *, on: bool, json: bool) -> None:
    with _server(url, json=json) as (show, client):
        show.data(client.nexus_enable(on=on))
        show.result("The graph is kept in step." if on else "The graph stays as it is; documents wait.")


@nexus.command()
def status(url: Url = SERVER, json: JsonFlag = False) -> None:
    """Show how the sync stands."""
    with _server(url, json=json) as (show, client):
        now = client.nexus()
        show.data(now)
        show.result(*(f"{name:<11}{value}" for name, value in _screen(now).items() if value))


@nexus.command()
def stats(url: Url = SERVER, json: JsonFlag = False) -> None:
    """Show how far each collection is, and the documents that were given up."""
    with _server(url, json=json) as (show, client):
        now, failures = client.nexus(), client.nexus_failures(FAILURES)
        show.data({"collections": now.collections, "failures": failures})
        heads = ("client", "collection", "documents", "pending", "failed", "oldest")
        rows = [
            (
                one.client,
                one.name,
                f"{one.documents:,}",
                f"{one.pending:,}",
                f"{one.failed:,}",
                _seconds(one.oldest_pending_seconds),
            )
            for one in now.collections
        ]
        show.result(*_table(heads, rows), *([] if rows else ["There are no collections."]))
        for lost in failures:
            tried = _attempts(lost.attempts)
            show.result(f"given up: {lost.client}/{lost.collection} {lost.id}, after {tried}: {lost.error}")


@nexus.command()
def trigger(
    collection: Annotated[
        str | None, typer.Argument(metavar="COLLECTION", help="Only documents of collections with this name.")
    ] = None,
    *,
    url: Url = SERVER,
    json: JsonFlag = False,
) -> None:
    """Try documents again that were given up."""
    with _server(url, json=json) as (show, client):
        found = client.nexus_trigger(collection)
        show.data(found)
        show.result(f"{_documents(found.retried)} tried again.")


@nexus.command()
def events(
    url: Url = SERVER,
    retry: Annotated[bool, typer.Option("--retry", help="Send them again.")] = False,
    json: JsonFlag = False,
) -> None:
    """Show events for outside that were given up, the oldest first, or send them again."""
    with _server(url, json=json) as (show, client):
        if retry:
            found = client.nexus_retry_events()
            show.data(found)
            show.result("1 event is sent again." if found.retried == 1 else f"{found.retried:,} events are sent again.")
            return
        lost = client.nexus_events(FAILURES)
        show.data({"events": lost})
        show.result(
            *(
                f"{_time(one.created_at)}  {one.event.get('kind')} of {one.event.get('client')}, "
                f"after {_attempts(one.attempts)}: {one.error}"
                for one in lost
            ),
            *([] if lost else ["No event was given up."]),
        )


@nexus.command()
def verify(url: Url = SERVER, wait: Wait = False, json: JsonFlag = False) -> None:
    """Compare the graph with the documents, and repair what differs."""
    _look("verify", url, wait=wait, json=json)


@nexus.command()
def rebuild(url: Url = SERVER, wait: Wait = False, json: JsonFlag = False) -> None:
    """Make the graph empty, and tell it everything anew."""
    _look("rebuild", url, wait=wait, json=json)


def _look(kind: Kind, url: str, *, wait: bool, json: bool) -> None:
    from control_plane.nexus.batch import NexusFailed

    with _server(url, json=json) as (show, client):
        if not wait:
            asked = client.nexus_look(kind)
            show.data(asked)
            show.result("It begins soon; memvid-export nexus status shows what it found.")
            return
        before = _until_idle(client, show)
        client.nexus_look(kind)
        found = _found(client, show, before)
        show.data(found)
        if found.kind != kind:
            raise NexusFailed(f"The {kind} was broken off with the replica that did it; ask for it again")
        if found.error is not None:
            raise NexusFailed(f"The {kind} did not come to its end: {found.error}")
        show.result(f"{found.kind}: {_said(found)}")
        _until_told(client, show)


def _until_idle(client: ExportClient, show: Show) -> int | None:
    """Wait for a look that goes on; answers when the last one began."""
    now = _enabled(client)
    if now.progress is not None:
        show.note(f"Another one goes on: {now.progress.kind}")
    while now.progress is not None:
        time.sleep(POLL_SECONDS)
        now = _enabled(client)
    return now.last.started_at if now.last else None


def _found(client: ExportClient, show: Show, before: int | None) -> LookReport:
    """What the look found that was asked for when the last one had begun ``before``."""
    moved, trouble = show.amount("Comparing", "documents"), None
    while True:
        now = _enabled(client)
        if now.progress is None and now.last is not None and now.last.started_at != before:
            if now.last.documents:
                moved(now.last.documents, now.last.documents)
            return now.last
        if now.progress is not None and now.progress.done < now.progress.total:
            moved(now.progress.done, now.progress.total)
        if now.trouble is not None and now.trouble != trouble:
            show.note(f"It waits: {now.trouble}")
        trouble = now.trouble
        time.sleep(POLL_SECONDS)


def _until_told(client: ExportClient, show: Show) -> None:
    """Wait until the graph has been told all that was to be told by now. Raises NexusFailed where it did not take
    everything."""
    from control_plane.nexus.batch import NexusFailed

    moved, begun, waited = show.amount("Telling the graph", "documents"), time.monotonic(), False
    while True:
        now = _enabled(client)
        seconds = time.monotonic() - begun - SKEW_SECONDS
        if now.oldest_pending_seconds is None or now.oldest_pending_seconds < seconds:
            break
        waited = True
        if now.documents > now.pending > 0:
            moved(now.documents - now.pending, now.documents)
        time.sleep(POLL_SECONDS)
    if waited:
        moved(now.documents, now.documents)
    if now.failed:
        raise NexusFailed(
            f"{_documents(now.failed)} given up, and the graph does not have them as they are: memvid-export nexus "
            "stats says why, memvid-export nexus trigger tries them again"
        )


def _enabled(client: ExportClient) -> Overview:
    """How the sync stands. Raises NexusFailed where nothing is going to happen."""
    from control_plane.nexus.batch import NexusFailed

    now = client.nexus()
    if not now.enabled:
        raise NexusFailed("The sync is disabled; memvid-export nexus enable starts it")
    return now


@nexus.command()
def batch(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Lines {id, title, text or vector, payload, docType, permissions} (.gz and .zst too); - is standard "
            "input.",
        ),
    ],
    *,
    url: Url = SERVER,
    collection: Annotated[str, typer.Option(help="Where they go; it is made where it is missing.")],
    dimension: Annotated[
        int | None, typer.Option(min=1, help="Of a new collection whose documents bring vectors along.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --dimension: whose vectors they are; the collection's name by default.")
    ] = None,
    size: Annotated[
        int, typer.Option("--batch-size", min=100, max=1_000, help="Documents of a request, 8 MiB at most.")
    ] = 500,
    max_wrong: Annotated[int, typer.Option(min=0, max=10_000, help="Lines that may be wrong; one more ends it.")] = 100,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report (JSON) there.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="From the first line, whatever was sent before.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until the graph has every document of the collection.")] = False,
    json: JsonFlag = False,
) -> None:
    """Send a file of documents to a collection. Broken off at any moment, the same command goes on with what is left;
    FILE.nexus-batch.json beside the file says how far it was.
    """
    from common.graph.payload import opened
    from control_plane.client import ExportClient, api_key
    from control_plane.nexus.batch import NexusFailed, Sending, StateFile, write_whole

    stdin = str(file) == "-"
    if model is not None and dimension is None:
        raise typer.BadParameter("--model goes with --dimension", param_hint="--model")
    if restart and stdin:
        raise typer.BadParameter("standard input always begins anew", param_hint="--restart")
    if stdin and sys.stdin is None:
        raise InvalidRequest("-: standard input is closed", field="FILE")
    kept = None if stdin else StateFile(file)
    with _server(url, json=json) as (show, client), opened(sys.stdin.buffer if stdin else file) as stream:
        if kept is not None and restart:
            kept.remove()
        moved = show.amount(f"Sending {'standard input' if stdin else file.name}")
        sending = Sending(stream, kept, url, collection, moved)
        if sending.resumed_after:
            show.note(f"Going on behind line {sending.resumed_after:,}")
        sync, error = None, None
        try:
            made = _collection(client, collection, dimension, model)
            with ExportClient(url, api_key(os.environ), tries=PATIENCE, waits=_said_once(show)) as patient:
                sending.run(patient, made, size=size, max_wrong=max_wrong)
            sync = _until_synced(client, collection, show) if wait else None
        except ExportError as failure:
            error = failure
        told = sending.report(str(file), sync, error)
        if report is not None:
            write_whole(report, msgspec.json.format(msgspec.json.encode(told)) + b"\n")
        show.data(told)
        show.result(
            f"{_documents(told.sent)} sent in {told.seconds:,.1f} s, {told.documents_per_second:,.0f} a second: "
            f"{told.created:,} new, {told.updated:,} replaced",
            *(f"  not sent: {wrong}" for wrong in told.failed),
        )
        if error is not None:
            raise error
        if kept is not None:
            kept.remove()
    if told.failed:
        raise NexusFailed(f"{_lines(len(told.failed))} not sent, such as {told.failed[0]}")
    if sync is not None and sync.failed:
        raise NexusFailed(f"{_documents(sync.failed)} given up by the sync; memvid-export nexus stats says why")


def _said_once(show: Show) -> Callable[[str], None]:
    """Says why a server is waited for, each reason once."""
    known: set[str] = set()

    def waits(why: str) -> None:
        if why not in known:
            known.add(why)
            show.note(f"It waits: {why}")

    return waits


def _collection(client: ExportClient, name: str, dimension: int | None, model: str | None) -> CollectionView:
    """The collection, which is made where it is missing. Raises InvalidRequest where it has another dimension."""
    found = client.collection(name) or client.put_collection(name, dimension, model)
    for option, wished, has in (("--dimension", dimension, found.dimension), ("--model", model, found.model)):
        if wished is not None and wished != has:
            raise InvalidRequest(f"{option}: collection {name} has {has}", field=option, allowed=has)
    return found


def _until_synced(client: ExportClient, name: str, show: Show) -> SyncCounts:
    """Wait until nothing of a collection is pending. Raises InvalidRequest where it was deleted."""
    moved = show.amount("Telling the graph", "documents")
    while found := client.collection(name):
        if not found.sync.pending:
            moved(found.documents, found.documents)
            return found.sync
        moved(found.documents - found.sync.pending, found.documents)
        time.sleep(POLL_SECONDS)
    raise InvalidRequest(f"Collection {name} was deleted meanwhile", field="--collection")


# --- what is shown ---------------------------------------------------------------------------------------------------


@contextmanager
def _server(url: str, *, json: bool) -> Iterator[tuple[Show, ExportClient]]:
    from control_plane.client import ExportClient, api_key
    from control_plane.terminal import Show

    with Show(json=json) as show, ExportClient(url, api_key(os.environ)) as client:
        yield show, client


def _screen(now: Overview) -> dict[str, str]:
    """What ``status`` says, by heading; an empty text is not shown."""
    by = "by the replica that answers" if now.leads else f"by replica {now.owner}" if now.owner else "by nobody yet"
    look = now.progress
    begun = f", {look.done:,} of {look.total:,} documents" if look and look.total else ""
    return {
        "sync": f"on, {by}" if now.enabled else "off",
        "graph": now.graph or "not asked yet",
        "trouble": now.trouble or "",
        "documents": f"{now.documents:,}: {now.pending:,} pending, {now.failed:,} given up",
        "lag": _seconds(now.oldest_pending_seconds),
        "going on": f"{look.kind}{begun}" if look else "",
        "last look": f"{now.last.kind} of {_time(now.last.started_at)}: {_said(now.last)}" if now.last else "none yet",
        "spaces": f"{now.spaces.count:,}, {now.spaces.bytes / 1e6:,.1f} MB in memory",
        "events": f"{now.outbound.waiting:,} waiting, {now.outbound.dead:,} given up",
    }


def _said(found: LookReport) -> str:
    """What a look found, in a line."""
    if found.error is not None:
        return f"it did not come to its end: {found.error}"
    took = f"{found.seconds:,.1f} s"
    if found.kind == "rebuild":
        return f"{found.repaired:,} documents are told anew, after {took}"
    if not found.different:
        return f"nothing different in {found.documents:,} documents, {took}"
    what = ", ".join(f"{count:,} x {kind}" for kind, count in sorted(found.different.items()))
    return f"{what} different in {found.documents:,} documents, {found.repaired:,} of them repaired, {took}"


def _documents(count: int) -> str:
    return "1 document was" if count == 1 else f"{count:,} documents were"


def _attempts(count: int) -> str:
    return "1 attempt" if count == 1 else f"{count:,} attempts"


def _lines(count: int) -> str:
    return "1 line was" if count == 1 else f"{count:,} lines were"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:,.1f} s"


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns; the first two lean left, figures right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heads, *rows)
    ]
