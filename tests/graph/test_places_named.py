"""Where a payload is wrong, far behind its beginning."""

from __future__ import annotations

import io

import pytest

from common.errors import InvalidRequest
from common.graph.read import read_graph


def test_a_place_beyond_64_mib_is_told_as_a_byte() -> None:
    payload = b'{"nodes": [' + b" " * (64 << 20) + b'{"id": NaN}]}'
    with pytest.raises(InvalidRequest, match="NaN is not allowed") as caught:
        read_graph(io.BytesIO(payload))
    assert caught.value.details["field"] == f"byte {payload.index(b'NaN')}"
