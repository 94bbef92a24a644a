"""What the store of collections says to the database: conditions, and the statements that change rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Float,
    Integer,
    LargeBinary,
    Select,
    TextClause,
    and_,
    bindparam,
    case,
    column,
    delete,
    func,
    literal_column,
    or_,
    select,
    table,
    text,
    true,
    update,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from control_plane.jobs.database import db_now
from control_plane.nexus.tables import collections, document_contents, documents, mentions, spaces

NEVER = 2**62
"""When a document that was given up is tried again by itself."""
QUERY_WORDS, WORD_LENGTH = 64, 256
"""Words of a question that are looked for, and characters of one; what is beyond is left out."""

UNRELATED = documents.c.related < documents.c.version
UNGRAPHED = documents.c.graphed < documents.c.wanted
PENDING = or_(UNRELATED, UNGRAPHED)
GIVEN_UP = and_(UNGRAPHED, documents.c.next_at == NEVER)
TOMBSTONE = documents.c.deleted == true()
LIVES = and_(~documents.c.deleted, ~collections.c.deleted)
INSIDE = collections.c.id == documents.c.collection
ROWS = (
    documents.join(spaces, spaces.c.id == documents.c.space)
    .join(collections, INSIDE)
    .outerjoin(document_contents, document_contents.c.document == documents.c.id)
)
"""Documents with all that belongs to each; of a deleted one there are no contents."""

NEXT_VERSIONS = text("UPDATE last_version SET version = version + :count RETURNING version")
_PUT_DOCUMENT = """
INSERT INTO documents (
    collection, space, doc_id, doc_type, permissions, exported, created_at, updated_at, deleted, version, first_version,
    related, domain, wanted, graphed, distrusted, announced, changed_at, attempts, next_at, near, graphed_near
)
SELECT
    id, space, :doc_id, :doc_type, :permissions, :exported, :now, :now, false, :version, :version,
    0, '', 0, 0, 0, 0, :now, 0, 0, :nothing, :nothing
FROM collections WHERE id = :collection AND NOT deleted
ON CONFLICT (collection, doc_id) WHERE deleted = 0 DO UPDATE SET
    doc_type = excluded.doc_type,
    permissions = excluded.permissions,
    exported = excluded.exported,
    updated_at = excluded.updated_at,
    changed_at = CASE
        WHEN documents.related < documents.version OR documents.graphed < documents.wanted THEN documents.changed_at
        ELSE excluded.changed_at
    END,
    version = excluded.version,
    attempts = 0,
    next_at = 0,
    error = NULL
WHERE (:key = '' OR documents.permissions = '[]' OR instr(documents.permissions, :key) > 0)
    AND (excluded.exported = '' OR documents.exported <> '')
"""
WRITTEN = text("""
SELECT version, id, first_version FROM documents
WHERE space = (SELECT space FROM collections WHERE id = :collection) AND version > :base
""")
"""What was written since the version ``base`` was taken, in the transaction that took it."""
PUT_CONTENTS = text("""
INSERT INTO document_contents (document, vector, title, payload, text)
VALUES (:document, :vector, :title, :payload, :text)
ON CONFLICT (document) DO UPDATE SET
    vector = excluded.vector, title = excluded.title, payload = excluded.payload, text = excluded.text
""")
BURY = text("""
UPDATE documents SET
    deleted = true,
    version = :version,
    updated_at = :now,
    changed_at = CASE WHEN related < version OR graphed < wanted THEN changed_at ELSE :now END,
    doc_type = '',
    exported = '',
    domain = '',
    near = :nothing,
    attempts = 0,
    next_at = 0,
    error = NULL
WHERE id = :id
""")
MERGE_WORDS = "INSERT INTO document_words (document_words, rank) VALUES ('merge', -250)"
"""Write so many pages (4 KB) of SQLite's word index anew. Words of a deleted document are not found from the first
moment on, but only so do they leave the file."""

_THIS = documents.c.id == bindparam("row")
PUT_NEAR = (
    update(documents)
    .where(_THIS)
    .values(
        near=bindparam("list"),
        wanted=documents.c.wanted + 1,
        changed_at=case((PENDING, documents.c.changed_at), else_=db_now()),
    )
)
PUT_RELATED = (
    update(documents)
    .where(_THIS)
    .values(
        related=bindparam("of"),
        domain=bindparam("kind"),
        wanted=documents.c.wanted + 1,
    )
)
PUT_INTENDED = update(documents).where(_THIS).values(graphed_near=bindparam("list"))
PUT_GRAPHED = (
    update(documents)
    .where(_THIS)
    .values(
        graphed=bindparam("of"),
        # Where somebody found since that the graph holds something else, this is not known either.
        graphed_near=case((documents.c.distrusted > bindparam("of"), None), else_=bindparam("list", type_=LargeBinary)),
        announced=case((documents.c.announced < bindparam("told"), bindparam("told")), else_=documents.c.announced),
        synced_at=bindparam("now"),
        changed_at=case(
            (
                or_(documents.c.related < documents.c.version, documents.c.wanted > bindparam("of")),
                bindparam("now", type_=BigInteger),
            ),
            else_=documents.c.changed_at,
        ),
        attempts=0,
        next_at=0,
        error=None,
    )
)
DISTRUSTED: Mapping[str, Any] = {
    "wanted": documents.c.wanted + 1,
    "distrusted": documents.c.wanted + 1,
    "graphed_near": None,
    "attempts": 0,
    "next_at": 0,
    "error": None,
    "changed_at": case((PENDING, documents.c.changed_at), else_=db_now()),
}
_MENTION = and_(mentions.c.document == bindparam("row"), mentions.c.entity == bindparam("name"))
CHANGE_MENTION = update(mentions).where(_MENTION).values(wanted=bindparam("is_wanted"), held=bindparam("is_held"))
DROP_MENTION = delete(mentions).where(_MENTION)
_PUT_MENTION = """
INSERT INTO mentions (document, entity, wanted, held, space)
VALUES (:row, :name, :is_wanted, :is_held, (SELECT space FROM documents WHERE id = :row))
"""
PUT_MENTION = text(_PUT_MENTION)
NOTE_MENTION = text(_PUT_MENTION + "ON CONFLICT (document, entity) DO UPDATE SET held = excluded.held")
NOTE_CHANGE = text("""
INSERT INTO client_changes (client, changes) VALUES (:client, 1)
ON CONFLICT (client) DO UPDATE SET changes = client_changes.changes + 1
""")
_WORD = re.compile(r"[^\W_]+")


class Place(FunctionElement[int]):
    """Where a text stands in another one, from 1 on, letters as they are; 0: nowhere."""

    type = Integer()
    inherit_cache = True


@compiles(Place, "sqlite")
def _sqlite_place(element: Place, compiler: SQLCompiler, **more: Any) -> str:
    return f"instr({compiler.process(element.clauses, **more)})"


@compiles(Place, "postgresql")
def _postgres_place(element: Place, compiler: SQLCompiler, **more: Any) -> str:
    return f"strpos({compiler.process(element.clauses, **more)})"


def spaces_with(condition: ColumnElement[bool]) -> Select[Any]:
    """Ids of spaces with documents that an index finds by this condition and the space: a step in it for each."""
    first = select(func.min(documents.c.space).label("space")).where(condition)
    found = first.cte("waiting", recursive=True)
    following = select(func.min(documents.c.space)).where(condition, documents.c.space > found.c.space)
    found = found.union_all(select(following.correlate(found).scalar_subquery()).where(found.c.space.is_not(None)))
    return select(found.c.space).where(found.c.space.is_not(None))


def put_document(*, postgres: bool) -> tuple[TextClause, TextClause]:
    """Writes documents that a key sees, or that are new; ``key`` is its quoted name, or empty: sees all. One for many
    documents, and one for a single document that answers what ``WRITTEN`` does."""
    put = _PUT_DOCUMENT
    if postgres:
        put = put.replace("instr", "strpos").replace("deleted = 0", "deleted = false")
    return text(put), text(put + "RETURNING version, id, first_version")


def lexical(query: str, *, postgres: bool) -> Select[Any] | None:
    """Documents with any word of a question in title or text: ids, and as ``score`` how well they fit (more is better,
    and no other scale). A word counts about five times in a title, and less in long texts; signs separate words and
    mean nothing. None for a question without words."""
    asked = [word for word in dict.fromkeys(_WORD.findall(query)) if len(word) <= WORD_LENGTH][:QUERY_WORDS]
    if not asked:
        return None
    index = table("document_words", column("rowid"), column("document"))
    if postgres:
        words: ColumnElement[Any] = literal_column("document_words.words")
        question = func.to_tsquery(literal_column("'simple'"), " | ".join(f"'{word}'" for word in asked))
        score = func.ts_rank(literal_column("'{0.2,0.2,0.2,1}'::float4[]"), words, question, 1).label("score")
        of, fits = index.c.document, words.op("@@", is_comparison=True)(question)
    else:
        either = " OR ".join(f'"{word}"' for word in asked)
        score = literal_column("-bm25(document_words, 5.0, 1.0)", Float()).label("score")
        of, fits = index.c.rowid, literal_column("document_words").op("MATCH", is_comparison=True)(either)
    # As a sum no index knows the collection: SQLite might read all its documents, and ask for the words of each.
    found = index.join(documents, documents.c.id == of).join(
        collections, collections.c.id == documents.c.collection + 0
    )
    return select(documents.c.id, score).select_from(found).where(fits).order_by(score.desc(), documents.c.id)
