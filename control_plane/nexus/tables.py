"""The tables of collections, their documents, and what is known of both in the graph.

They lie in the job store's database: a document is the truth, its index and its place in the graph are made from it.
Times are milliseconds; JSON lies in text columns; vectors are float32, little-endian, of unit length.

What a document says lies apart from its row, which changes with every list that changes: a row is small, and a deleted
one says nothing. Beside these there is ``document_words``, the word index, which the database keeps in step with
``document_contents`` by triggers: on SQLite a table of FTS5 whose ``rowid`` is the document's, on PostgreSQL one with
the columns ``document`` and ``words``.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from control_plane.jobs.tables import metadata

_Id = BigInteger().with_variant(Integer, "sqlite")


def _some(name: str, condition: str, *columns: str, unique: bool = False) -> Index:
    """An index over some rows only; SQLite uses it where a query has the condition in the same words."""
    on_sqlite = condition.replace("false", "0").replace("true", "1")
    return Index(name, *columns, unique=unique, sqlite_where=text(on_sqlite), postgresql_where=text(condition))


spaces = Table(
    "spaces",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("name", Text, nullable=False),
    Column("dimension", Integer, nullable=False),
    UniqueConstraint("name", name="uq_spaces_name"),
)

collections = Table(
    "collections",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("client", String(64), nullable=False),
    Column("name", String(128), nullable=False),
    Column("space", BigInteger, ForeignKey("spaces.id"), nullable=False),
    Column("model", Text, nullable=False),
    Column("dimension", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("deleted", Boolean, nullable=False),
    # Of a deleted one the name is free, while its documents still go.
    _some("ux_collections_client_name", "deleted = false", "client", "name", unique=True),
    Index("ix_collections_space", "space"),
    sqlite_autoincrement=True,
)

documents = Table(
    "documents",
    metadata,
    # Never used again, on SQLite neither: the graph and the memory of other replicas know documents by it.
    Column("id", _Id, primary_key=True),
    Column("collection", BigInteger, ForeignKey("collections.id"), nullable=False),
    Column("space", BigInteger, ForeignKey("spaces.id"), nullable=False),
    Column("doc_id", String(256), nullable=False),
    Column("doc_type", String(64), nullable=False),
    Column("permissions", Text, nullable=False),
    # What an export wrote, as a hash; empty where a client did.
    Column("exported", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("first_version", BigInteger, nullable=False),
    # What the sync engine has made of it.
    Column("related", BigInteger, nullable=False),
    Column("domain", String(64), nullable=False),
    Column("wanted", BigInteger, nullable=False),
    Column("graphed", BigInteger, nullable=False),
    Column("distrusted", BigInteger, nullable=False),
    # The last version that outside was told to be in the graph.
    Column("announced", BigInteger, nullable=False),
    Column("changed_at", BigInteger, nullable=False),
    Column("synced_at", BigInteger),
    Column("attempts", Integer, nullable=False),
    Column("next_at", BigInteger, nullable=False),
    Column("error", Text),
    Column("near", LargeBinary, nullable=False),
    Column("graphed_near", LargeBinary),
    # A document that is written again once it was deleted is another row: the graph may not have heard of its end yet.
    _some("ux_documents_collection_doc_id", "deleted = false", "collection", "doc_id", unique=True),
    Index("ix_documents_collection", "collection", "id", "deleted"),
    # Those that every key of the client sees, and the others, for counting alone.
    _some("ix_documents_open", "deleted = false AND permissions = '[]'", "collection"),
    _some("ix_documents_restricted", "deleted = false AND permissions <> '[]'", "collection"),
    Index("ix_documents_space_version", "space", "version"),
    Index("ix_documents_space_id", "space", "id"),
    _some("ix_documents_unrelated", "related < version", "space", "version"),
    _some("ix_documents_ungraphed", "graphed < wanted", "next_at", "space", "id"),
    _some("ix_documents_deleted", "deleted = true", "updated_at", "id"),
    sqlite_autoincrement=True,
)

document_contents = Table(
    "document_contents",
    metadata,
    Column("document", _Id, ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("vector", LargeBinary, nullable=False),
    Column("title", Text, nullable=False),
    Column("payload", Text, nullable=False),
    Column("text", Text, nullable=False),
)

mentions = Table(
    "mentions",
    metadata,
    Column("document", BigInteger, ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True),
    Column("entity", String(256), primary_key=True),
    Column("wanted", Boolean, nullable=False),
    Column("held", Integer, nullable=False),
    Column("space", BigInteger, nullable=False),
    # Of a name that many clients have, those of one are read.
    Index("ix_mentions_entity", "entity", "space", "document"),
    sqlite_with_rowid=False,
)

relations = Table(
    "relations",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("source", BigInteger, ForeignKey("documents.id", ondelete="CASCADE"), nullable=False),
    Column("target", BigInteger, ForeignKey("documents.id", ondelete="CASCADE"), nullable=False),
    Column("type", String(64), nullable=False),
    Column("properties", Text, nullable=False),
    Column("origin", String(64), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("deleted", Boolean, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    UniqueConstraint("source", "target", "type", name="uq_relations_pair"),
    Index("ix_relations_target", "target"),
)

client_changes = Table(
    "client_changes",
    metadata,
    Column("client", String(64), primary_key=True),
    Column("changes", BigInteger, nullable=False),
)
"""How often anything changed that an answer about a client's documents may be made of. Whoever changes that counts it
last of all before the commit: so nobody waits for documents with this locked."""

node_changes = Table(
    "node_changes",
    metadata,
    Column("document", _Id, ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("properties", Text, nullable=False),
    Column("origin", String(64), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
)

webhook_nonces = Table(
    "webhook_nonces",
    metadata,
    Column("nonce", String(64), primary_key=True),
    Column("seen_at", BigInteger, nullable=False),
    Index("ix_webhook_nonces_seen", "seen_at"),
)

outbound = Table(
    "outbound",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("body", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", BigInteger, nullable=False),
    Column("dead", Boolean, nullable=False),
    Column("error", Text),
    Index("ix_outbound_due", "dead", "next_at", "id"),
)

sync_state = Table(
    "sync_state",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("enabled", Boolean, nullable=False),
    Column("owner", String(36)),
    Column("lease_until", BigInteger, nullable=False),
    Column("graph", String(64)),
    Column("asked", String(16)),
    Column("progress", Text),
    Column("verified_at", BigInteger),
    Column("report", Text),
)
"""One row: who syncs, which graph was told, and of looks at the graph which one is wanted, how far one is, and what the
last one found."""

last_version = Table(
    "last_version",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", BigInteger, nullable=False),
)
"""One row: the number of the last change of a document. Whoever writes documents has it locked."""
