"""Reading graphs and bringing them into canonical form."""

from common.graph.canonical import canonical, content_digest
from common.graph.model import ExportRequest, Graph, GraphLimits, Node, Relation, Totals, WarningCounter
from common.graph.names import base_name_of, capsule_file_name, safe_base_name
from common.graph.read import read_graph

__all__ = [
    "ExportRequest",
    "Graph",
    "GraphLimits",
    "Node",
    "Relation",
    "Totals",
    "WarningCounter",
    "base_name_of",
    "canonical",
    "capsule_file_name",
    "content_digest",
    "read_graph",
    "safe_base_name",
]
