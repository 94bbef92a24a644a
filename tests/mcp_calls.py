"""One call of each read tool that the example graph of this repository has an answer to."""

from __future__ import annotations

from typing import Any

CLASS = "Class:common/progress.py:ProgressReporter"
METHOD = "Method:common/progress.py:ProgressReporter.report"
CALLER = "Method:common/pipeline.py:_Export.run#1"
CALLS: dict[str, dict[str, Any]] = {
    "symbol_lookup": {"query": "ProgressReporter"},
    "node_get": {"nodeId": CLASS},
    "neighbors_get": {"nodeId": CLASS, "limit": 5},
    "edge_get": {"edgeId": f"File:common/progress.py_DEFINES_{CLASS}"},
    "text_search": {"query": "progress of an export", "limit": 3},
    "call_trace": {"fromNodeId": CALLER, "toNodeId": METHOD, "maxDepth": 2},
    "callers_of": {"nodeId": METHOD},
    "callees_of": {"nodeId": CALLER},
    "process_list": {"limit": 2},
    "process_get": {"processId": "proc_0_follow"},
    "impact_analysis": {"nodeId": CLASS, "maxDepth": 2},
    "file_outline": {"filePath": "common/progress.py"},
    "file_snippet": {"nodeId": CLASS},
    "community_list": {"limit": 2},
    "manifest_get": {},
    "query_explain": {"task": "what breaks if this changes", "query": "ProgressReporter"},
}
