"""A graph of one node, as a staged payload, and what a child is started with to read it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from common.graph.model import GraphLimits
from common.storage import StorageConfig
from handler.protocol import ChildConfig

GRAPH = {
    "sessionId": "s",
    "projectName": "p",
    "nodes": [{"id": "a", "label": "Function", "properties": {"name": "first"}}],
    "relationships": [{"id": "e", "sourceId": "a", "targetId": "a", "type": "CALLS", "confidence": 1.0}],
}


def config_of(root: Path, **more: Any) -> ChildConfig:
    """May read and write below ``root``; ``more`` are further fields."""
    return ChildConfig(
        parent_pid=os.getpid(),
        storage=StorageConfig(roots=[str(root)]),
        scratch=str(root / "scratch"),
        writer=None,
        memory_limit=4 << 30,
        limits=GraphLimits(),
        **more,
    )


def payload(root: Path, body: Any = GRAPH) -> str:
    """The ref of a payload below ``root``."""
    path = root / "payload"
    path.write_text(json.dumps(body))
    return path.as_uri()
