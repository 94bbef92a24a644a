"""Collections, their documents, what the graph knows of them, and what graphs told."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """All of it is new, but for what an export says of the collection that it is to become."""
    _jobs()
    _collections()
    _documents()
    _back_channel()
    op.create_table(
        "sync_state",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("enabled", sa.Boolean, nullable=False),
        sa.Column("owner", sa.String(36)),
        sa.Column("lease_until", sa.BigInteger, nullable=False),
        sa.Column("graph", sa.String(64)),
        sa.Column("asked", sa.String(16)),
        sa.Column("progress", sa.Text),
        sa.Column("verified_at", sa.BigInteger),
        sa.Column("report", sa.Text),
    )
    op.create_table(
        "last_version",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.execute("INSERT INTO sync_state (id, enabled, lease_until) VALUES (1, true, 0)")
    op.execute("INSERT INTO last_version (id, version) VALUES (1, 0)")
    for statement in _SQLITE_WORDS if op.get_bind().dialect.name == "sqlite" else _POSTGRES_WORDS:
        op.execute(statement)


def _some(name: str, table: str, columns: list[str], condition: str, *, unique: bool = False) -> None:
    on_sqlite = condition.replace("false", "0").replace("true", "1")
    op.create_index(
        name, table, columns, unique=unique, sqlite_where=sa.text(on_sqlite), postgresql_where=sa.text(condition)
    )


def _jobs() -> None:
    with op.batch_alter_table("jobs") as table:
        table.add_column(sa.Column("collection", sa.String(128)))
        table.add_column(sa.Column("import_state", sa.String(9)))
        table.add_column(sa.Column("import_at", sa.BigInteger))
        table.add_column(sa.Column("import_attempts", sa.Integer))
        table.add_column(sa.Column("import_documents", sa.BigInteger))
        table.add_column(sa.Column("import_error", sa.Text))
    _some("ix_jobs_import", "jobs", ["import_at"], "import_at IS NOT NULL")
    _some("ix_jobs_collection", "jobs", ["client", "collection"], "collection IS NOT NULL")


def _collections() -> None:
    op.create_table(
        "spaces",
        sa.Column("id", _Id, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("dimension", sa.Integer, nullable=False),
        sa.UniqueConstraint("name", name="uq_spaces_name"),
    )
    op.create_table(
        "collections",
        sa.Column("id", _Id, primary_key=True),
        sa.Column("client", sa.String(64), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("space", sa.BigInteger, sa.ForeignKey("spaces.id"), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("dimension", sa.Integer, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
        sqlite_autoincrement=True,
    )
    _some("ux_collections_client_name", "collections", ["client", "name"], "deleted = false", unique=True)
    op.create_index("ix_collections_space", "collections", ["space"])


def _documents() -> None:
    op.create_table(
        "documents",
        sa.Column("id", _Id, primary_key=True),
        sa.Column("collection", sa.BigInteger, sa.ForeignKey("collections.id"), nullable=False),
        sa.Column("space", sa.BigInteger, sa.ForeignKey("spaces.id"), nullable=False),
        sa.Column("doc_id", sa.String(256), nullable=False),
        sa.Column("doc_type", sa.String(64), nullable=False),
        sa.Column("permissions", sa.Text, nullable=False),
        sa.Column("exported", sa.String(64), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("first_version", sa.BigInteger, nullable=False),
        sa.Column("related", sa.BigInteger, nullable=False),
        sa.Column("domain", sa.String(64), nullable=False),
        sa.Column("wanted", sa.BigInteger, nullable=False),
        sa.Column("graphed", sa.BigInteger, nullable=False),
        sa.Column("distrusted", sa.BigInteger, nullable=False),
        sa.Column("announced", sa.BigInteger, nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
        sa.Column("synced_at", sa.BigInteger),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", sa.BigInteger, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("near", sa.LargeBinary, nullable=False),
        sa.Column("graphed_near", sa.LargeBinary),
        sqlite_autoincrement=True,
    )
    _some("ux_documents_collection_doc_id", "documents", ["collection", "doc_id"], "deleted = false", unique=True)
    op.create_index("ix_documents_collection", "documents", ["collection", "id", "deleted"])
    _some("ix_documents_open", "documents", ["collection"], "deleted = false AND permissions = '[]'")
    _some("ix_documents_restricted", "documents", ["collection"], "deleted = false AND permissions <> '[]'")
    op.create_index("ix_documents_space_version", "documents", ["space", "version"])
    op.create_index("ix_documents_space_id", "documents", ["space", "id"])
    _some("ix_documents_unrelated", "documents", ["space", "version"], "related < version")
    _some("ix_documents_ungraphed", "documents", ["next_at", "space", "id"], "graphed < wanted")
    _some("ix_documents_deleted", "documents", ["updated_at", "id"], "deleted = true")
    op.create_table(
        "document_contents",
        sa.Column(
            "document", _Id, sa.ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
        ),
        sa.Column("vector", sa.LargeBinary, nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.create_table(
        "mentions",
        sa.Column("document", sa.BigInteger, sa.ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("entity", sa.String(256), primary_key=True),
        sa.Column("wanted", sa.Boolean, nullable=False),
        sa.Column("held", sa.Integer, nullable=False),
        sa.Column("space", sa.BigInteger, nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_mentions_entity", "mentions", ["entity", "space", "document"])
    op.create_table(
        "client_changes",
        sa.Column("client", sa.String(64), primary_key=True),
        sa.Column("changes", sa.BigInteger, nullable=False),
    )


def _back_channel() -> None:
    op.create_table(
        "relations",
        sa.Column("id", _Id, primary_key=True),
        sa.Column("source", sa.BigInteger, sa.ForeignKey("documents.id", ondelete="CASCADE"), nullable=False),
        sa.Column("target", sa.BigInteger, sa.ForeignKey("documents.id", ondelete="CASCADE"), nullable=False),
        sa.Column("type", sa.String(64), nullable=False),
        sa.Column("properties", sa.Text, nullable=False),
        sa.Column("origin", sa.String(64), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("source", "target", "type", name="uq_relations_pair"),
    )
    op.create_index("ix_relations_target", "relations", ["target"])
    op.create_table(
        "node_changes",
        sa.Column(
            "document", _Id, sa.ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True, autoincrement=False
        ),
        sa.Column("properties", sa.Text, nullable=False),
        sa.Column("origin", sa.String(64), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "webhook_nonces",
        sa.Column("nonce", sa.String(64), primary_key=True),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_webhook_nonces_seen", "webhook_nonces", ["seen_at"])
    op.create_table(
        "outbound",
        sa.Column("id", _Id, primary_key=True),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", sa.BigInteger, nullable=False),
        sa.Column("dead", sa.Boolean, nullable=False),
        sa.Column("error", sa.Text),
    )
    op.create_index("ix_outbound_due", "outbound", ["dead", "next_at", "id"])


# The first 200,000 characters of a text are found by their words: PostgreSQL takes 1 MiB of words, and these are 0.8 MB
# at most. SQLite's table has no texts of its own: what a document said is told again when it is to be taken out.
_SQLITE_WORDS = (
    """
    CREATE VIRTUAL TABLE document_words
    USING fts5(title, text, content='', tokenize="unicode61 remove_diacritics 0")
    """,
    """
    CREATE TRIGGER document_contents_come AFTER INSERT ON document_contents BEGIN
        INSERT INTO document_words (rowid, title, text) VALUES (new.document, new.title, substr(new.text, 1, 200000));
    END
    """,
    """
    CREATE TRIGGER document_contents_go AFTER DELETE ON document_contents BEGIN
        INSERT INTO document_words (document_words, rowid, title, text)
        VALUES ('delete', old.document, old.title, substr(old.text, 1, 200000));
    END
    """,
    """
    CREATE TRIGGER document_contents_change AFTER UPDATE OF title, text ON document_contents
    WHEN old.title <> new.title OR old.text <> new.text BEGIN
        INSERT INTO document_words (document_words, rowid, title, text)
        VALUES ('delete', old.document, old.title, substr(old.text, 1, 200000));
        INSERT INTO document_words (rowid, title, text) VALUES (new.document, new.title, substr(new.text, 1, 200000));
    END
    """,
)
# Its parser knows paths, addresses and numbers as words of their own kinds; here they are their parts, as on SQLite.
_POSTGRES_WORDS = (
    "CREATE TABLE document_words (document BIGINT PRIMARY KEY "
    "REFERENCES document_contents (document) ON DELETE CASCADE, words TSVECTOR NOT NULL)",
    "CREATE INDEX ix_document_words_words ON document_words USING gin (words)",
    r"""
    CREATE FUNCTION words_of(said TEXT) RETURNS TSVECTOR LANGUAGE sql IMMUTABLE AS $$
        SELECT to_tsvector('pg_catalog.simple', translate(said, '!"#$%&''()*+,-./:;<=>?@[\]^_`{|}~', repeat(' ', 32)))
    $$
    """,
    """
    CREATE FUNCTION keep_document_words() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'UPDATE' AND old.title = new.title AND old.text = new.text THEN
            RETURN NULL;
        END IF;
        INSERT INTO document_words (document, words) VALUES (
            new.document, setweight(words_of(new.title), 'A') || setweight(words_of(left(new.text, 200000)), 'D')
        ) ON CONFLICT (document) DO UPDATE SET words = excluded.words;
        RETURN NULL;
    END $$
    """,
    "CREATE TRIGGER document_contents_change AFTER INSERT OR UPDATE OF title, text ON document_contents "
    "FOR EACH ROW EXECUTE FUNCTION keep_document_words()",
)
