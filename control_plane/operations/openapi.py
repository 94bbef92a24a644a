"""What the OpenAPI document says where the framework cannot see it."""

from __future__ import annotations

from dataclasses import dataclass

from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIResponse, Operation, PathItem, Reference, RequestBody, Schema
from litestar.openapi.spec.enums import OpenAPIType
from litestar.status_codes import HTTP_500_INTERNAL_SERVER_ERROR

from common.contract import ErrorBody
from control_plane.errors import STATUS


@dataclass
class OpenOperation(Operation):
    """A route that wants no key."""

    def __post_init__(self) -> None:
        self.security = []


REFUSALS = ("UNAUTHORIZED", "FORBIDDEN", "ORIGIN_REFUSED", "HOST_REFUSED", "RATE_LIMITED")
"""What any route under ``/v1`` may answer to whoever asks."""


def error_specs(*codes: str) -> dict[int, ResponseSpec]:
    """The answers with these codes, by status."""
    found: dict[int, list[str]] = {}
    for code in dict.fromkeys(codes):
        found.setdefault(STATUS.get(code, HTTP_500_INTERNAL_SERVER_ERROR), []).append(code)
    return {
        status: ResponseSpec(data_container=ErrorBody, description=" or ".join(names), generate_examples=False)
        for status, names in found.items()
    }


_STRING = Schema(type=OpenAPIType.STRING)
_OBJECT = Schema(type=OpenAPIType.OBJECT)
_VERSION = Schema(type=OpenAPIType.STRING, const="2.0")
_ID = Schema(type=[OpenAPIType.STRING, OpenAPIType.INTEGER, OpenAPIType.NULL])
_ERROR = Reference(ref="#/components/schemas/ErrorBody")
_REQUEST = Schema(
    type=OpenAPIType.OBJECT,
    title="JsonRpcRequest",
    description="A request, or a notification where `id` is missing.",
    required=["jsonrpc", "method"],
    properties={
        "jsonrpc": _VERSION,
        "id": Schema(type=[OpenAPIType.STRING, OpenAPIType.INTEGER]),
        "method": Schema(type=OpenAPIType.STRING, examples=["initialize", "tools/list", "tools/call"]),
        "params": _OBJECT,
    },
)
_ANSWER = Schema(
    type=OpenAPIType.OBJECT,
    title="JsonRpcResponse",
    required=["jsonrpc", "id"],
    properties={
        "jsonrpc": _VERSION,
        "id": _ID,
        "result": _OBJECT,
        "error": Schema(
            type=OpenAPIType.OBJECT,
            required=["code", "message"],
            properties={"code": Schema(type=OpenAPIType.INTEGER), "message": _STRING},
        ),
    },
    any_of=[Schema(required=["result"]), Schema(required=["error"])],
)


def _json(description: str, schema: Schema | Reference) -> OpenAPIResponse:
    return OpenAPIResponse(description=description, content={"application/json": OpenAPIMediaType(schema=schema)})


MCP = PathItem(
    post=Operation(
        operation_id="mcp",
        tags=["reading"],
        summary="Ask a capsule, over the Model Context Protocol",
        description=(
            "Streamable HTTP without sessions: one JSON-RPC message per request, one JSON answer; no event stream. "
            "`Accept` must allow `application/json`. `tools/list` names the tools that read a capsule and their "
            "arguments, `tools/call` asks one."
        ),
        request_body=RequestBody(content={"application/json": OpenAPIMediaType(schema=_REQUEST)}, required=True),
        responses={
            "200": _json("The JSON-RPC answer; an error of a tool stands in `result`", _ANSWER),
            "202": OpenAPIResponse(description="A notification was taken"),
            "400": _json("Not a JSON-RPC message, or an unknown protocol version", _ANSWER),
            "401": _json("UNAUTHORIZED", _ERROR),
            "403": _json("FORBIDDEN or ORIGIN_REFUSED", _ERROR),
            "406": _json("NOT_ACCEPTABLE", _ERROR),
            "413": _json("PAYLOAD_TOO_LARGE", _ERROR),
            "415": _json("UNSUPPORTED_MEDIA_TYPE", _ERROR),
            "421": _json("HOST_REFUSED", _ERROR),
            "429": _json("RATE_LIMITED, in `data` of the JSON-RPC error", _ANSWER),
            "500": _json("INTERNAL", _ERROR),
        },
    )
)
"""``POST /mcp``."""
