"""``POST /mcp``: the read tools over the Model Context Protocol (streamable HTTP, stateless, JSON answers)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import anyio
import mcp_types
import msgspec
import structlog
from litestar import Litestar, asgi
from litestar.enums import ScopeType
from litestar.handlers import ASGIRouteHandler
from litestar.types import Receive, Scope, Send
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager

from common.embedding.choice import Choice
from common.embedding.port import Embedder
from common.errors import CapsuleUnreadable, ExportError, InvalidRequest, StorageFailed
from common.frames.guide import TOOLS
from control_plane.errors import IndexBuildInProgress, TimedOut
from control_plane.jobs.records import JobRecord
from control_plane.reading.artifacts import Artifacts
from control_plane.reading.library import Library
from control_plane.reading.tools import REGISTRY, Answer, Arguments, Locator, NotFound, Page

SCHEMA_VERSION = "gitnexus.mcp.v1"
MAX_REQUEST_BYTES = 1 << 20
THREADS = 4
"""Questions answered at once."""
SECONDS = 20.0
"""How long an answer may take."""
_PAGING = frozenset({"locator", "cursor", "limit", "max_chars"})
_SHORT = 200
"""Characters that the texts of an item keep which alone passes the budget."""

log = structlog.get_logger()


class Jobs(Protocol):
    """Where exports are looked up; ``control_plane.jobs.store.JobStore`` is one."""

    async def get(self, job_id: str) -> JobRecord | None:
        """The job of that id."""
        ...

    async def page(self, *, status: Any, before: tuple[int, str] | None, limit: int) -> list[JobRecord]:
        """Jobs, newest first."""
        ...


class McpRoute(NamedTuple):
    """What an application mounts: the route, and what has to run while it serves."""

    handler: ASGIRouteHandler
    lifespan: Callable[[Litestar], AbstractAsyncContextManager[None]]


def mcp_route(
    jobs: Jobs,
    root: Path,
    artifacts: Artifacts,
    engine: Callable[[Choice], Embedder],
    *,
    response_budget_bytes: int = 65_536,
    allow_external_capsules: bool = False,
    cache_capacity: int = 16,
) -> McpRoute:
    """The read tools at ``/mcp`` for ``jobs`` and for the capsules under ``root``; the application's bearer check
    stands before it. The files of jobs come through ``artifacts``, which the route closes in the end; ``engine``
    opens those that embed questions.

    An answer has at most ``response_budget_bytes``; capsules outside ``root`` are read only where
    ``allow_external_capsules``; ``cache_capacity`` of them are kept open.
    """
    library = Library(artifacts, engine, capacity=cache_capacity)
    reader = _Reader(jobs, root, library, response_budget_bytes, external=allow_external_capsules)
    server: Server[Any] = Server(
        "memvid-export",
        version=version("memvid-export"),
        instructions="Reads code graphs from Memvid capsules. Start with symbol_lookup or text_search.",
        on_list_tools=_list_tools,
        on_call_tool=reader.call,
    )
    manager = StreamableHTTPSessionManager(
        server, stateless=True, json_response=True, max_request_body_size=MAX_REQUEST_BYTES
    )

    @asgi("/mcp", copy_scope=True)
    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await send({"type": "websocket.close", "code": 1008, "reason": None})
            return
        if scope["method"] != "POST":
            # Stateless: there is no stream to listen to (GET) and no session to end (DELETE).
            await send({"type": "http.response.start", "status": 405, "headers": [(b"allow", b"POST")]})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        await manager.handle_request(scope, receive, send)  # type: ignore[arg-type]

    @asynccontextmanager
    async def lifespan(_app: Litestar) -> AsyncIterator[None]:
        try:
            async with manager.run():
                yield
        finally:
            artifacts.close()
            await anyio.to_thread.run_sync(library.close)

    return McpRoute(handler, lifespan)


def _schema(arguments: type[Arguments]) -> dict[str, Any]:
    (reference,), definitions = msgspec.json.schema_components([arguments], ref_template="#/$defs/{name}")
    own = dict(definitions.pop(reference["$ref"].rpartition("/")[2]))
    return {**own, "$defs": definitions}


_TOOLS = [
    mcp_types.Tool(
        name=tool.name,
        description=f"{tool.use} Answers {tool.answers}.",
        input_schema=_schema(REGISTRY[tool.name][0]),
        annotations=mcp_types.ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False),
    )
    for tool in TOOLS
]


async def _list_tools(
    _context: ServerRequestContext[Any], _params: mcp_types.PaginatedRequestParams | None
) -> mcp_types.ListToolsResult:
    return mcp_types.ListToolsResult(tools=_TOOLS)


class _Question(NamedTuple):
    tool: str
    given: Arguments
    place: Path | JobRecord
    trace_id: str
    started: float


class _Reader:
    def __init__(self, jobs: Jobs, root: Path, library: Library, budget: int, *, external: bool) -> None:
        self._jobs = jobs
        self._root = root
        self._library = library
        self._budget = budget
        self._external = external
        self._threads = anyio.CapacityLimiter(THREADS)

    async def call(
        self, _context: ServerRequestContext[Any], params: mcp_types.CallToolRequestParams
    ) -> mcp_types.CallToolResult:
        """Answer one call: the envelope, or an error ``{code, message, traceId, retryable}``."""
        trace_id = uuid.uuid4().hex
        started = time.perf_counter()
        try:
            if params.name not in REGISTRY:
                raise InvalidRequest(f"name: there is no tool {params.name[:100]}", field="name")
            given = _arguments(params.name, params.arguments or {})
            place = await self._locate(given.locator)
            question = _Question(params.name, given, place, trace_id, started)
            body = await anyio.to_thread.run_sync(self._answer, question, limiter=self._threads)
        except ExportError as error:
            return _failed(error, trace_id)
        except Exception as error:
            # The boundary: what nobody foresaw is logged and answered.
            log.error("read tool failed", tool=params.name, trace_id=trace_id, exc_info=error)
            return _failed(
                ExportError("Something went wrong on our side; the log has it under this trace id."), trace_id
            )
        return _result(body, is_error=False)

    async def _locate(self, locator: Locator | None) -> Path | JobRecord:
        """The capsule file or the completed export that a locator means. Raises NotFound, InvalidRequest."""
        if locator is not None and locator.capsule_path is not None:
            if locator.job_id is not None:
                raise InvalidRequest("locator: give jobId or capsulePath, not both", field="locator")
            return await anyio.to_thread.run_sync(self._inside, locator.capsule_path)
        if locator is not None and locator.job_id is not None:
            job = await self._jobs.get(locator.job_id)
            if job is None or job.status != "completed" or job.output is None:
                raise NotFound("There is no completed export of that jobId", field="locator.jobId")
        else:
            newest = await self._jobs.page(status="completed", before=None, limit=1)
            if not newest or newest[0].output is None:
                raise NotFound("There is no completed export yet; give a locator", field="locator")
            job = newest[0]
        return job

    def _inside(self, text: str) -> Path:
        path = Path(text)
        try:
            path = (path if path.is_absolute() else self._root / path).resolve()
            if not self._external and not path.is_relative_to(self._root.resolve()):
                raise InvalidRequest("locator.capsulePath: a file under the export root is needed", field="locator")
            if path.suffix != ".mv2" or not path.is_file():
                raise NotFound("There is no capsule at locator.capsulePath", field="locator.capsulePath")
        except (OSError, ValueError) as error:
            raise InvalidRequest("locator.capsulePath: not a path", field="locator.capsulePath") from error
        return path

    def _answer(self, question: _Question) -> bytes:
        try:
            with self._library.lease(question.place) as capsule:
                tag = _tag(question, capsule.sidecar.capsule_sha256)
                page = Page(_offset(question.given.cursor, tag))
                capsule.allow(SECONDS)
                answer = REGISTRY[question.tool][1](capsule, question.given, page)
        except sqlite3.OperationalError as error:
            if "interrupted" not in str(error):
                raise
            raise TimedOut("The answer took too long; ask for less, or for a smaller depth.") from error
        except sqlite3.DatabaseError as error:
            # A sidecar that turns out to be damaged is built anew for the next question.
            log.warning("damaged sidecar", trace_id=question.trace_id, exc_info=error)
            self._library.discard(question.place)
            raise IndexBuildInProgress("The index of this capsule is damaged and is built anew; ask again.") from error
        return _envelope(question, answer, page, tag, self._budget)


def _arguments(tool: str, given: Mapping[str, Any]) -> Arguments:
    try:
        return msgspec.convert(given, REGISTRY[tool][0])
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        field = place.strip("`").lstrip(".") or "arguments"
        raise InvalidRequest(f"{field}: {message}", field=field) from error


def _tag(question: _Question, capsule_sha256: str) -> str:
    """Ties a cursor to its question and capsule; how much a page holds may change from page to page."""
    asked = {name: getattr(question.given, name) for name in question.given.__struct_fields__ if name not in _PAGING}
    return hashlib.sha256(msgspec.json.encode([question.tool, capsule_sha256, asked])).hexdigest()[:16]


def _cursor(offset: int, tag: str) -> str:
    return base64.urlsafe_b64encode(f"{tag}{offset}".encode()).decode().rstrip("=")


def _offset(cursor: str | None, tag: str) -> int:
    if cursor is None:
        return 0
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    offset = text[len(tag) :]
    if not text.startswith(tag) or not offset.isdecimal() or len(offset) > 9:
        raise InvalidRequest("cursor: not one that this question was answered with", field="cursor")
    return int(offset)


def _envelope(question: _Question, answer: Answer, page: Page, tag: str, budget: int) -> bytes:
    """The answer as JSON of at most ``budget`` bytes: cut at an item, with a cursor that goes on there."""
    score = round(min(1.0, max(0.0, answer.score)), 4)
    tier = "high" if score >= 0.85 else "medium" if score >= 0.6 else "low"
    warnings = list(answer.warnings)
    found = answer.result[answer.items] if answer.items else None
    result = dict(answer.result)
    body = {
        "schemaVersion": SCHEMA_VERSION,
        "traceId": question.trace_id,
        "tool": question.tool,
        "confidence": {"score": score, "tier": tier, "factors": answer.factors, "warnings": warnings},
        "result": result,
        "pagination": {"nextCursor": _cursor(10**8, tag), "truncated": False, "returned": 0},
        "timingMs": 10**6,
    }
    warnings.append("RESULT_TRUNCATED")
    if answer.items:
        result[answer.items] = "" if isinstance(found, str) else []
    if answer.properties:
        result[answer.properties] = {}
    room = budget - len(msgspec.json.encode(body))
    warnings.pop()
    cut = False
    if answer.properties:
        result[answer.properties], cut = _fitting_properties(answer.result[answer.properties], room)
    returned = 1
    more = answer.more
    if found is not None:
        kept = _fitting_text(found, room) if isinstance(found, str) else _fitting_items(found, room, warnings)
        cut = len(kept) < len(found)
        more = more or cut
        returned = len(kept)
        result[answer.items or ""] = kept
    if cut:
        warnings.append("RESULT_TRUNCATED")
    body["pagination"] = {
        "nextCursor": _cursor(page.offset + returned, tag) if more and found is not None else None,
        "truncated": more or cut,
        "returned": returned,
    }
    body["timingMs"] = round(1000 * (time.perf_counter() - question.started))
    return msgspec.json.encode(body)


def _fitting_items(items: list[Any], room: int, warnings: list[str]) -> list[Any]:
    kept: list[Any] = []
    for item in items:
        room -= len(msgspec.json.encode(item)) + 1
        if room < 0:
            break
        kept.append(item)
    if items and not kept:
        warnings.append("ITEM_SHORTENED")
        return [_shortened(items[0])]
    return kept


def _shortened(value: Any) -> Any:
    """The value with long texts cut and long lists ended: one item that alone passes the budget."""
    if isinstance(value, str):
        return value if len(value) <= _SHORT else f"{value[:_SHORT]}...[truncated]"
    if isinstance(value, list):
        return [_shortened(item) for item in value[:20]]
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    return value


def _fitting_text(text: str, room: int) -> str:
    """The longest beginning whose JSON fits."""
    low, high = 0, min(len(text), max(0, room))
    while low < high:
        middle = (low + high + 1) // 2
        if len(msgspec.json.encode(text[:middle])) - 2 <= room:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def _fitting_properties(properties: dict[str, Any], room: int) -> tuple[dict[str, Any], bool]:
    """The properties without the largest ones that do not fit, and whether any had to go."""
    sizes = {key: len(msgspec.json.encode({key: value})) - 1 for key, value in properties.items()}
    total = sum(sizes.values())
    gone: set[str] = set()
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        if total <= room:
            break
        total -= sizes[key]
        gone.add(key)
    return {key: value for key, value in properties.items() if key not in gone}, bool(gone)


def _failed(error: ExportError, trace_id: str) -> mcp_types.CallToolResult:
    code = _CODES.get(type(error), "INTERNAL_ERROR")
    # Of our own failures the retryable ones say so; a wrong question stays wrong.
    retryable = code in ("INDEX_BUILD_IN_PROGRESS", "TIMEOUT", "INTERNAL_ERROR")
    body = {"code": code, "message": error.message, "traceId": trace_id, "retryable": retryable}
    return _result(msgspec.json.encode(body), is_error=True)


_CODES: dict[type[ExportError], str] = {
    InvalidRequest: "INVALID_ARGUMENT",
    NotFound: "NOT_FOUND",
    CapsuleUnreadable: "CAPSULE_INCOMPATIBLE",
    IndexBuildInProgress: "INDEX_BUILD_IN_PROGRESS",
    TimedOut: "TIMEOUT",
    StorageFailed: "INTERNAL_ERROR",
}


def _result(body: bytes, *, is_error: bool) -> mcp_types.CallToolResult:
    return mcp_types.CallToolResult(
        content=[mcp_types.TextContent(type="text", text=body.decode())],
        structured_content=msgspec.json.decode(body),
        is_error=is_error,
    )
