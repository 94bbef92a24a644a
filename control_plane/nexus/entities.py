"""What a text names, by rules: identifiers, paths, URLs and names of people and things.

The rules would rather miss an entity than make one up. A text is read once from its beginning to its end: every
repetition in the patterns below is possessive or ends at a character that the next one cannot have, so that no text
makes them try a place twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple
from unicodedata import normalize

MAX_CHARS = 100_000
"""Characters of a text that are read; of a longer one only whole words."""
MAX_ENTITIES = 32
"""Of one text: those that it names most often, then those that it names first."""
MAX_KEY_CHARS = 256
"""An entity with a longer key is left out."""
MAX_DIGIT_RUNS = 3
"""An identifier with more is a hash, a token or a serial number."""


def entities(text: str) -> frozenset[str]:
    """The keys, ``kind:name``, of at most ``MAX_ENTITIES`` entities.

    - ``identifier``: ``snake_case``, ``camelCase``, ``PascalCase`` and ``SCREAMING_CASE`` of two parts at least, dotted
      names (without ``self.``, ``this.``, ``cls.``) and the ``name`` of ``name()``.
    - ``path``: ``src/a.py`` and ``a.py`` where the ending is one of a file, ``./x`` (as ``x``), ``../x``, ``~/x``,
      ``/etc/x``, and ``C:\\x`` as ``C:/x``.
    - ``url``: of http and https. Lower-case host; no user, password, fragment or parameter named like a secret.
    - ``name``: two or three capitalised words that stand within a sentence at least once.

    Keys are NFC and have no control characters. What is part of a URL is no path, of a path no identifier.
    """
    if len(text) > MAX_CHARS:
        end = max(text.rfind(" ", 0, MAX_CHARS), text.rfind("\n", 0, MAX_CHARS))
        text = text[: end if end > 0 else MAX_CHARS]
    text = composed(text)
    times: dict[str, int] = {}
    first: dict[str, int] = {}
    for place, key in chain(_marked(text), _names(text)):
        if len(key) <= MAX_KEY_CHARS and key.isprintable():
            times[key] = times.get(key, 0) + 1
            first.setdefault(key, place)
    chosen = sorted(times, key=lambda key: (-times[key], first[key], key))[:MAX_ENTITIES]
    return frozenset(normalize("NFC", key) for key in chosen)


_COMPOSED = re.compile(
    r"[\x00-\u02ff\u0400-\u0482\u048a-\u052f\u2010-\u2027\u2030-\u205e\u2190-\u21ff\u2500-\u27bf"
    r"\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3]*+\Z"
)
"""Most texts: in none of these characters NFC would change anything."""
_PIECE = re.compile(r"[\x00-\x7f]?[^\x00-\x7f]{1,64}")


def composed(text: str) -> str:
    """A text in NFC. Beyond 64 characters without an ASCII one it is composed piece by piece, as the time for one piece
    grows with the square of its length: 16,000 accents on one letter would take half a second."""
    if text.isascii() or _COMPOSED.match(text):
        return text
    return _PIECE.sub(lambda piece: normalize("NFC", piece[0]), text)


# --- what code and addresses look like ---

_CHARACTERS = r"[\w.$~/@+-]"
_TOKEN = re.compile(
    rf"""
    # Words of prose, numbers, and what stands between.
    (?: (?: [A-Z]?+[^\W\d_A-Z]++ | [A-Z]++ | [0-9]++ )\.?+ (?! {_CHARACTERS} | \(\) | :[\\/] )
      | [^\w.$~/@+:-]
      | :(?!//)
    )*+
    (?: (?P<drive> [A-Za-z]:(?:[\\/]++[\w.$~@+-]++)++ ) (?! \ [\w.()-]{{1,64}}\\ )
      | (?P<chunk> {_CHARACTERS}++ ) (?P<called> \(\) )?+
      # Up to what stands around addresses: spaces, controls, quotes, brackets, punctuation of other scripts.
      | (?P<address> :// [^\x00-\x20\x7f-\xa0<>"'`{{}}|\\^\[\]«»\u2000-\u206f\u3000-\u303f\ufeff\uff00-\uff0f]*+ )
      | \Z
    )
    """,
    re.VERBOSE,
)


def _marked(text: str) -> Iterator[tuple[int, str]]:
    """URLs, paths and identifiers, each with where it stands; one again for each time."""
    for found in _TOKEN.finditer(text):
        if found["chunk"] is not None:
            yield from _chunk(text, found)
        elif found["address"] is not None:
            place = found.start("address")
            filled_in = text[found.end() : found.end() + 1] == "{"
            if url := _url(text[max(0, place - 6) : place], found["address"], filled_in=filled_in):
                yield place, f"url:{url}"
        elif found["drive"] is not None and (path := _windows(found["drive"])):
            yield found.start("drive"), f"path:{path}"


def _chunk(text: str, found: re.Match[str]) -> Iterator[tuple[int, str]]:
    """A path, or the identifiers, of a run of ``_CHARACTERS``."""
    chunk, place, called = found["chunk"], found.start("chunk"), found["called"] is not None
    before, after = text[place - 1 : place], text[found.end() : found.end() + 1]
    if before == "\\":  # the letter of an escape stands at its beginning
        return
    if not called and ("." in chunk or "/" in chunk) and (path := _path(chunk, before, after)):
        yield place, f"path:{path}"
        return
    if "@" in chunk[1:]:  # an address of mail, or what follows a password
        return
    member, slashes = before in _CLOSING and chunk[0] == ".", "/" in chunk
    for name in _IDENTIFIER.finditer(chunk.removeprefix(".") if member else chunk):
        if slashes and _is_file(name[0]):
            continue  # the end of something that is no path
        at_end = name.end() + member == len(chunk)
        if key := _identifier(name[0], called=called and at_end and not member):
            yield place + name.start(), f"identifier:{key}"


# --- URLs ---

_SCHEME = re.compile(r"(?<![^\W_])https?\Z", re.IGNORECASE)
_HOST = re.compile(r"[^\W_][\w-]*+(?:\.[\w-]++)*+(?::[0-9]{1,5})?")
_BRACKET = re.compile("[()]")
_SECRET = re.compile(r"token|key|secret|sig|pass|pwd|auth|cred|session", re.IGNORECASE)


def _url(before: str, address: str, *, filled_in: bool) -> str | None:
    """A URL of ``://…`` and the few characters before it; ``filled_in``: its last part goes on with a variable."""
    scheme = _SCHEME.search(before)
    if scheme is None:
        return None
    rest = _balanced(address.removeprefix("://"))
    if filled_in:
        rest = rest.partition("?")[0] if "?" in rest else rest[: rest.rfind("/") + 1]
    rest = rest.rstrip(".,;:!?*@")
    before_query, _, query = rest.partition("#")[0].partition("?")
    authority, _, path = before_query.partition("/")
    host = authority.rpartition("@")[2].lower().removesuffix(".")
    if not _HOST.fullmatch(host):
        return None
    if "@" in rest[len(authority) :] and (":" in host or "." not in host):
        return None  # a password with a slash: what looks like the host is the user
    kept = "&".join(one for one in query.split("&") if one and not _SECRET.search(one.partition("=")[0]))
    return f"{scheme[0].lower()}://{host}{f'/{path}' if path or kept else ''}{f'?{kept}' if kept else ''}"


def _balanced(address: str) -> str:
    """Up to the first bracket that was opened before the address."""
    depth = 0
    for bracket in _BRACKET.finditer(address):
        depth += 1 if bracket[0] == "(" else -1
        if depth < 0:
            return address[: bracket.start()]
    return address


# --- paths ---

_TAIL = ".+-@~$"
"""No path ends with one of these: they belong to the sentence."""
_BEFORE_ROOT = frozenset(["", *" \t\r\n\"'`([=,:|"])
"""A slash after anything else closes a tag or a pattern, or divides."""
_CLOSING = frozenset(")]")
_GAP = frozenset("*{}<%")
_FLAGS = re.compile("[dgimsuvy]{1,4}")
_FILE = re.compile(r"[\w-]++(?:\.[\w-]++)*+")
_NO_ESCAPE = re.compile(r"\\\\|/")
_OBJECTS = frozenset({"self", "this", "cls"})

# fmt: off
_ENDINGS = frozenset({
    "bash", "bat", "bin", "bz2", "c", "cc", "cfg", "cjs", "clj", "cmd", "conf", "cpp", "cs", "css", "csv", "cts", "cxx",
    "dart", "dll", "doc", "docx", "env", "erl", "ex", "exe", "exs", "fs", "gif", "go", "gradle", "graphql", "groovy",
    "gz", "h", "hh", "hpp", "hs", "htm", "html", "hxx", "ini", "ipynb", "jar", "java", "jpeg", "jpg", "js", "json",
    "json5", "jsonl", "jsx", "kt", "kts", "less", "lock", "log", "lua", "md", "mdx", "mjs", "mts", "mv2", "ndjson",
    "odt", "parquet", "pdf", "php", "pl", "png", "ppt", "pptx", "proto", "ps1", "py", "pyi", "pyx", "rb", "rs", "rst",
    "sass", "scala", "scss", "sh", "so", "sql", "sqlite", "svelte", "svg", "swift", "tar", "tex", "tf", "toml", "ts",
    "tsv", "tsx", "txt", "vue", "wasm", "webp", "whl", "xls", "xlsx", "xml", "xsl", "yaml", "yml", "zip", "zsh", "zst",
})
_MEMBERS = frozenset({
    "bin", "cfg", "cmd", "conf", "doc", "env", "ex", "fs", "less", "lock", "log", "so", "tar",
})
"""Endings that are rather members of an object where no slash comes before."""
_FILES = _ENDINGS - _MEMBERS
_NO_FILES = frozenset({
    "alpine.js", "angular.js", "backbone.js", "chart.js", "d3.js", "ember.js", "express.js", "moment.js", "next.js",
    "node.js", "nuxt.js", "p5.js", "react.js", "socket.js", "three.js", "vue.js",
    "__init__.py", "index.html", "index.js", "index.ts", "index.tsx", "mod.rs",
})
"""Libraries that are called so, and files that are in every other folder."""
# fmt: on


def _path(chunk: str, before: str, after: str) -> str | None:
    """The path that a chunk is, with the characters around it."""
    body = chunk.rstrip(_TAIL)
    if "/" not in body:
        body = body.removeprefix("@")  # as curl has it
        whole = before not in _CLOSING and before not in _GAP and after != "["
        return body if whole and _is_file(body) else None
    if "$" in body or (after in _GAP and not body.endswith("/")):
        return None  # a part of it is not known
    body = body[2:] if body.startswith("//") else body  # a comment
    parts = [part for part in body.split("/") if part not in ("", ".")]
    named = [part for number, part in enumerate(parts) if part != ".." and (number or part != "~")]
    if not named or not all(part.strip(_TAIL) for part in named):
        return None
    path = "/".join(parts)
    if body.startswith("/"):
        return f"/{path}" if before in _BEFORE_ROOT and _is_rooted(parts) else None
    if body.startswith(("./", "../", "~/")):
        return path
    held = before in _GAP or "@" in parts[0][1:]  # by what is filled in later, or by a password
    return None if held else path if len(parts) > 1 and _has_ending(parts[-1], _ENDINGS) else None


def _is_rooted(parts: list[str]) -> bool:
    """Whether ``/a/b`` is a path: not a pattern of JavaScript with its flags, nor numbers that are divided."""
    if len(parts) == 1:
        return _has_ending(parts[0], _ENDINGS)
    return any(char.isalpha() for char in parts[0]) and not (len(parts) == 2 and _FLAGS.fullmatch(parts[1]))


def _has_ending(name: str, endings: frozenset[str]) -> bool:
    stem, _, ending = name.rpartition(".")
    return ending.lower() in endings and any(char.isalnum() for char in stem)


def _is_file(name: str) -> bool:
    """Whether a name without a slash is one of a file."""
    if not _has_ending(name, _FILES) or not _FILE.fullmatch(name):
        return False
    stem, _, ending = name.rpartition(".")
    if len(ending) == 1 and (len(stem) < _MIN_CHARS or "." in stem):
        return False  # ``x.c`` and ``a.b.c`` are rather members of objects; ``main.c`` is a file
    return name.partition(".")[0] not in _OBJECTS and name.lower() not in _NO_FILES


def _windows(drive: str) -> str | None:
    """``C:/x/y`` for ``C:\\x\\y``, also where the backslashes are written twice."""
    parts = [part for part in re.split(r"[\\/]+", drive[2:].rstrip(_TAIL)) if part.strip(_TAIL)]
    # ``Q:\nWhat`` is a question and a line feed.
    escapes = not _NO_ESCAPE.search(drive) and all(part[0] in "nrt" for part in parts)
    return None if escapes else f"{drive[0].upper()}:/{'/'.join(parts)}"


# --- identifiers ---

_IDENTIFIER = re.compile(r"(?<![\w.])[^\W\d]\w*+(?:\.[^\W\d]\w*+)*+")
_DIGITS = re.compile(r"\d+")
_HUMP = re.compile(r"[a-z][0-9]*+[A-Z][A-Za-z0-9]|[0-9][A-Z][a-z]|[A-Z]{2}[a-z]{2}")
"""Where a second part begins: ``getUser``, ``S3Client``, ``HTTPServer``; not ``URLs`` nor ``PhD``."""
_COUNTED = re.compile(r"comm_\d+|proc_\d+_\w+")
"""Ids of communities and processes in one graph; in another one they are others'."""
_SURNAME = re.compile("(?:Mc|Mac)[A-Z][a-z]+")
_MIN_CHARS = 3
"""Letters and digits of an identifier, and of the longer part of two that a dot joins."""
_DOMAINS = frozenset({"com", "edu", "gov", "org"})

# fmt: off
_PRODUCTS = frozenset({
    "BitBucket", "ChatGPT", "CloudFlare", "DevOps", "DockerHub", "GitHub", "GitLab", "GraphQL", "JavaScript",
    "LaTeX", "LinkedIn", "MongoDB", "MySQL", "OpenAI", "OpenSSL", "PayPal", "PostgreSQL", "PowerPoint", "PowerShell",
    "PyPI", "PyTorch", "SQLite", "TensorFlow", "TypeScript", "WebSocket", "WhatsApp", "WiFi", "WordPress", "YouTube",
    "macOS", "NumPy", "OAuth", "JetBrains", "IntelliJ", "McDonalds",
    # In every frame of its kind of an exported graph.
    "endLine", "entryPointId", "filePath", "heuristicLabel", "processType", "sourceId", "startLine", "stepCount",
    "symbolCount", "targetId", "terminalId", "cross_community", "intra_community",
})
"""Written like identifiers, and none; or in so many texts that they say nothing."""
_COMMON_MEMBERS = frozenset({
    "append", "clone", "close", "collect", "copy", "decode", "encode", "endswith", "extend", "filter", "format", "get",
    "into", "items", "iter", "join", "keys", "length", "lower", "map", "pop", "push", "read", "replace", "split",
    "startswith", "strip", "trim", "unwrap", "update", "upper", "values", "write",
})
"""Of objects of every kind: ``table.items`` says no more than ``table``."""
_COMMON_CALLS = _COMMON_MEMBERS | {
    "all", "any", "assert", "await", "bool", "bytes", "catch", "constructor", "default", "dict", "float", "for",
    "function", "if", "init", "int", "len", "list", "main", "new", "next", "object", "open", "print", "println",
    "range", "require", "return", "self", "set", "sleep", "some", "str", "string", "sum", "super", "switch", "this",
    "tuple", "type", "vec", "void", "while", "with", "yield", "zip",
}
"""Called everywhere."""
_SHORT_FORMS = frozenset({"a.k.a", "p.t.o", "q.e.d", "r.s.v.p", "w.r.t"})
# fmt: on


def _identifier(name: str, *, called: bool) -> str | None:
    """The identifier that a word is, or the dotted name that words are; ``called``: brackets follow."""
    parts = name.split(".")
    parts = [part for part in parts[parts[0] in _OBJECTS :] if not (part.startswith("__") and part.endswith("__"))]
    if len(parts) > 1 and parts[-1] in _COMMON_MEMBERS:
        parts.pop()
        called = False
    name = ".".join(parts)
    if name in _PRODUCTS or name.lower() in _NO_FILES or _COUNTED.fullmatch(name):
        return None
    if len(_DIGITS.findall(name)) > MAX_DIGIT_RUNS:
        return None
    if len(parts) > 1:
        return name if _is_dotted(parts) else None
    if _is_compound(name) or (called and len(name) >= _MIN_CHARS and name not in _COMMON_CALLS):
        return name
    return None


def _is_dotted(parts: list[str]) -> bool:
    """Whether parts between dots are a name: no short form, no host, no end of a sentence without its space."""
    if parts[0] == "www" or parts[-1] in _DOMAINS or parts[-1] in _NO_NAMES:
        return False
    longest = max(map(len, parts))
    if len(parts) == 2:
        return longest >= _MIN_CHARS
    name = ".".join(parts)
    return longest > 1 or (name.islower() and name not in _SHORT_FORMS)


def _is_compound(name: str) -> bool:
    """Whether a word has two parts or more, as no word of prose has."""
    if "_" in name:
        plain = name.replace("_", "")
        return len(plain) >= _MIN_CHARS and not plain.isdigit() and not (name[0] == name[-1] == "_")
    # ``eBay``, ``iPhone``, ``kHz`` begin with one small letter.
    begins = name[:1].isupper() or name[:2].islower()
    return begins and _HUMP.search(name) is not None and not _SURNAME.fullmatch(name)


# --- names ---

_CAPITAL = r"[^\W\d_a-z](?:['’][^\W\d_a-z])?+[^\W\d_A-Z]++(?:-[^\W\d_a-z][^\W\d_A-Z]++)*+(?!\w)"
_CAPITALS = re.compile(rf"(?<![\w.'’/\\@#$~+-]){_CAPITAL}(?:\ {_CAPITAL})++")
_AFTER_CODE = frozenset("([{=<_/\\@#$~+-")
_COMMAS = frozenset(",;")
_WORD_CHARS = 20
"""Characters before a name among which the last word is looked for."""

# fmt: off
_NO_NAMES = frozenset({
    "A", "About", "After", "All", "Also", "Although", "An", "And", "Another", "Any", "Appendix", "April", "Are", "As",
    "At", "August", "Be", "Because", "Before", "Both", "But", "By", "Can", "Chapter", "Could", "December", "Did", "Do",
    "Does", "Dr", "During", "Each", "Either", "Every", "Example", "False", "February", "Figure", "For", "Friday",
    "From", "Had", "Has", "Have", "He", "Her", "Here", "Hers", "His", "How", "However", "If", "In", "Into", "Is", "It",
    "Its", "January", "July", "June", "Just", "Let", "March", "May", "Monday", "More", "Most", "Mr", "Mrs", "Ms", "My",
    "Neither", "Never", "No", "None", "Nor", "Not", "Note", "November", "Now", "Null", "October", "Of", "On", "Once",
    "One", "Only", "Or", "Other", "Our", "Over", "Page", "Part", "Prof", "Saturday", "Section", "See", "September",
    "She", "Should", "Since", "So", "Some", "Step", "Such", "Sunday", "Table", "Than", "That", "The", "Their", "Then",
    "There", "Therefore", "These", "They", "This", "Those", "Though", "Thursday", "Thus", "To", "Today", "Tomorrow",
    "Too", "True", "Tuesday", "Under", "Until", "Upon", "Us", "Version", "Volume", "Was", "We", "Wednesday", "Were",
    "What", "When", "Where", "Whether", "Which", "While", "Who", "Whose", "Why", "Will", "With", "Within", "Without",
    "Would", "Yes", "Yesterday", "Yet", "You", "Your",
})
"""Capitalised, and part of no name."""
_BEFORE_CODE = frozenset({
    "abstract", "async", "class", "const", "def", "enum", "export", "extends", "final", "fn", "func", "function",
    "impl", "implements", "interface", "internal", "let", "mut", "new", "override", "private", "protected", "pub",
    "public", "readonly", "return", "sealed", "static", "struct", "throws", "trait", "typedef", "union", "var",
    "virtual", "void", "volatile",
})
"""After these words two capitalised ones are a type and what has it."""
# fmt: on


class _Run(NamedTuple):
    """Capitalised words in a row."""

    place: int
    name: str
    within: bool
    """The sentence did not begin with it: its first word is capitalised for its own sake."""


def _names(text: str) -> Iterator[tuple[int, str]]:
    runs = [run for found in _CAPITALS.finditer(text) for run in _runs(text, found)]
    certain = {run.name for run in runs if run.within}
    return ((run.place, f"name:{run.name}") for run in runs if run.name in certain)


def _runs(text: str, found: re.Match[str]) -> Iterator[_Run]:
    """Two or three words each, between those that are part of no name."""
    if text[found.end() : found.end() + 1] in _AFTER_CODE:
        return
    place, within = found.start(), _is_within(text, found.start())
    words: list[str] = []
    for word in (*found[0].split(" "), ""):
        if word.istitle() and word not in _NO_NAMES:
            words.append(word)
            continue
        name = " ".join(words)
        if 2 <= len(words) <= 3:
            yield _Run(place, name, within)
        place += len(name) + bool(words) + len(word) + 1
        words = []


def _is_within(text: str, place: int) -> bool:
    """Whether a word of the same sentence stands before this place."""
    before = text[max(0, place - _WORD_CHARS) : place]
    if before[-1:] != " ":
        return False
    word = before[:-1].rpartition(" ")[2]
    return word[-1:] in _COMMAS or (word[-1:].islower() and word not in _BEFORE_CODE)
