-- The sidecar of a capsule: `<capsule>.index.v1.sqlite`.
--
-- A row of `nodes`, `edges` or `documents` has as its id the position of its frame in the capsule (over all parts, from
-- 0; `parts` maps it to a frame id), so texts and properties stay in the capsule and are not stored twice.
-- Frames come in canonical order, hence ordering by `nodes.id` is ordering by the node's own id.
-- Indexes are in indexes.sql, made when all rows are in.

CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- Frames of `part` start at position `first`.
CREATE TABLE parts (part INTEGER PRIMARY KEY, first INTEGER NOT NULL, frames INTEGER NOT NULL);

-- Frames of kind `meta`: the manifest and the agent guide.
CREATE TABLE documents (id INTEGER PRIMARY KEY, uri TEXT NOT NULL, title TEXT NOT NULL);

-- `nodes` has the ids of the nodes that have a label, lie in a file, or have a relationship of a type, in or out: in
-- order, each as four bytes, little-endian. A filter reads these, not the nodes.
CREATE TABLE labels (id INTEGER PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL, nodes BLOB NOT NULL);
CREATE TABLE types (id INTEGER PRIMARY KEY, name TEXT NOT NULL, nodes BLOB NOT NULL);
-- Paths that nodes name; `node` is the node of the file itself, NULL for a folder.
CREATE TABLE files (id INTEGER PRIMARY KEY, path TEXT NOT NULL, node INTEGER REFERENCES nodes, nodes BLOB NOT NULL);

-- `key` is the CRC-32 of `node_id`: an index over it is a quarter of one over the text.
CREATE TABLE nodes (
    id INTEGER PRIMARY KEY,
    key INTEGER NOT NULL,
    node_id TEXT NOT NULL,
    name TEXT NOT NULL,
    label INTEGER NOT NULL REFERENCES labels,
    file INTEGER REFERENCES files,
    start_line INTEGER,
    end_line INTEGER
);

-- What relations name and the graph lacks; ids are negative.
CREATE TABLE missing (id INTEGER PRIMARY KEY, node_id TEXT NOT NULL);

-- Names as one lower-case word: `getUserById`, `get_user_by_id` and `GetUserByID` meet at `getuserbyid`.
CREATE TABLE symbols (name TEXT, node INTEGER REFERENCES nodes, PRIMARY KEY (name, node)) WITHOUT ROWID;

CREATE TABLE evidence (id INTEGER PRIMARY KEY, confidence REAL NOT NULL, reason TEXT);

-- `source` and `target` are of `nodes` or `missing`. `edge_id` is NULL where it is `<source>_<TYPE>_<target>`, which it is for nearly all.
CREATE TABLE edges (
    id INTEGER PRIMARY KEY,
    source INTEGER NOT NULL,
    target INTEGER NOT NULL,
    type INTEGER NOT NULL REFERENCES types,
    evidence INTEGER NOT NULL REFERENCES evidence,
    step INTEGER,
    edge_id TEXT
);

CREATE TABLE processes (
    id INTEGER PRIMARY KEY REFERENCES nodes,
    process_type TEXT,
    step_count INTEGER NOT NULL,
    entry INTEGER REFERENCES nodes,
    terminal INTEGER REFERENCES nodes
);
CREATE TABLE process_steps (
    process INTEGER REFERENCES nodes, step INTEGER, node INTEGER REFERENCES nodes, PRIMARY KEY (process, step, node)
) WITHOUT ROWID;

CREATE TABLE communities (
    id INTEGER PRIMARY KEY REFERENCES nodes, cohesion REAL, symbol_count INTEGER, members INTEGER NOT NULL
);
CREATE TABLE members (
    community INTEGER REFERENCES nodes, node INTEGER REFERENCES nodes, PRIMARY KEY (community, node)
) WITHOUT ROWID;

-- Nodes by the calls that they take part in, busiest first.
CREATE TABLE hotspots (
    rank INTEGER PRIMARY KEY, node INTEGER NOT NULL, calls_in INTEGER NOT NULL, calls_out INTEGER NOT NULL
);

-- Full text over nodes: the stems of their words, how many nodes hold each, and which, with its weight: see words.py.
CREATE TABLE words (word TEXT PRIMARY KEY, nodes INTEGER NOT NULL, postings BLOB NOT NULL) WITHOUT ROWID;
