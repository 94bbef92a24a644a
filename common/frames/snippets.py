"""A symbol's own lines, found in texts whose line numbers may have moved.

GitNexus numbers lines from 0 with an inclusive end, other clients from 1, and the web client sends compacted texts:
parts of a file, joined by a line ``...``, sometimes repeated, cut at the end. So no line number is trusted. Each part
is a run of the file's lines with one shift, and the symbols of the file vote for it: a line that declares a symbol's
name, and the symbol's start, give a shift. The shift with the most votes places every symbol of that part.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from itertools import accumulate, pairwise
from typing import NamedTuple

from common.graph.model import Graph, Node, WarningCounter

FILE_LINES = 80
DEFAULT_LINES = 40
MIN_SNIPPET_CHARS = 80
TRUNCATED = "...[truncated]"

_JOINT = "..."
_LEAD_LINES = 12
"""Decorators, comments and modifiers that may stand between a symbol's first line and its name."""
_SEARCH_CHARS = 64_000_000
"""Characters looked through for names in one file: names beyond that stay without a snippet."""
_MAX_CANDIDATES = 64
"""Places of one name looked at in one file."""
_MAX_LINE_CHARS = 1_000
"""Longer lines (minified code) declare nothing that a snippet could show."""
_MAX_LINES = 500_000
"""Lines of one text that are looked at: 60 MB of memory."""
_MAX_IN_LINE = 8
"""Places of one name looked at in one line."""

_SECTION, _VALUE, _CODE = "section", "value", "code"
_KIND_OF_LABEL = {
    "Section": _SECTION,
    **dict.fromkeys(
        ("Property", "Variable", "Const", "Constant", "Static", "Field", "EnumMember", "EnumVariant", "Parameter"),
        _VALUE,
    ),
}
_COMMON_KEYWORDS = frozenset({"def", "class", "async def", "function", "export function", "func", "fn", "pub fn"})
_KEYWORD = re.compile(
    r"(?:^|[^\w.$])(?:def|defp|defmodule|defmacro|class|function\*?|func|fn|fun|sub|struct|interface|enum|trait|type|"
    r"impl|mod|module|namespace|package|object|record|protocol|extension|union|typedef|macro_rules!|macro|const|let|"
    r"var|val|static|actor|concept|contract|library|event|modifier|procedure|proc|define|table|view)"
    r"\s+(?:\([^()]*\)\s*|<[^<>]*>\s*)?(?:[\w$<>]+(?:::|\.))*[&*#]?$"
)
_KEYWORD_EXTENSIONS = frozenset({"py", "pyi", "rs", "go", "rb", "swift", "kt", "kts", "lua", "ex", "exs", "php", "jl"})
"""Languages in which a name before a parenthesis is a call unless a keyword stands before it."""
_ASSIGNED = re.compile(r"\s*(?::[^=]*)?=(?![=>])")
_OPENED = re.compile(r"\s*(?:<[^()]*>)?\s*[({:?!=]")
_TYPED = re.compile(r"[\w\s*&<>,\[\]?:.~#-]*$")
_STATEMENT = re.compile(
    r"\s*(?:(?:return|await|if|while|for|foreach|raise|throw|yield|new|assert|import|from|else|elif|not|print|del|case|"
    r"switch|with|in|and|or|delete|goto|typeof|using)\b|[@.])"
)
_COMMENT = re.compile(r"\s*(?://|#(?!define)|\*|/\*|--|<!--)")
_VALUE_OPENED = re.compile(r"\s*(?:[,)\]};]|[?!]?:(?!:)|=(?![=>])|:=|\[|in\b|of\b|$)")
_OWNER = re.compile(r"(?:^|[^\w$])(?:self|this|cls)(?:\.|->)$")
_LEAD = re.compile(r"\s*(?:[@#/*\[\])}\"'<-]|(?:template|export|public|private|protected|static|default|pub)\b|$)")
_ANNOTATION = re.compile(r"\s*(?:@|#\[|\[|//|/\*|\*|template\b)")
_SLACK_CHARS = 1_000
"""Taken beyond the maximum, so that white space at the end is not what makes a snippet look cut."""
_SIGNATURE_END = re.compile(r"\n|\s{3,}")


class Snippets:
    """Finds the snippets of one graph; a file's text is cut into lines once."""

    def __init__(self, graph: Graph, found: WarningCounter) -> None:
        self._files = graph.files
        self._found = found
        self._max_chars = max(MIN_SNIPPET_CHARS, graph.options.max_snippet_chars)
        self._symbols: dict[str, list[Node]] = defaultdict(list)
        self._placed: dict[str, _Span] = {}
        for node in graph.nodes:
            properties = node.properties
            if not properties.get("content") and properties.get("startLine") is not None and node.label != "File":
                path = properties.get("filePath")
                if path in graph.files:
                    self._symbols[path].append(node)

    def of(self, node: Node) -> tuple[str, str]:
        """Snippet and signature (the first line of the declaration) of a node; empty strings where it has none."""
        properties = node.properties
        content = properties.get("content")
        path = properties.get("filePath")
        if node.label == "File":
            return self._cut(self._head(content or self._files.get(path or "", ""))), ""
        if content:
            return self._of_content(node, content)
        if not path or properties.get("startLine") is None:
            return "", ""
        if path in self._symbols:
            self._place(path, self._symbols.pop(path))
        span = self._placed.pop(node.id, None)
        if span is None:
            self._found.add("SNIPPET_NOT_FOUND", node.id)
            return "", ""
        text = self._files[path]
        end = min(span.end, span.start + self._max_chars + _SLACK_CHARS)
        return self._cut(text[span.start : end]), text[span.declared : span.declared_end].strip()

    def _of_content(self, node: Node, content: str) -> tuple[str, str]:
        if node.label == "Section":
            content = content[max(0, content.find(f"# {node.name}")) :]  # GitNexus puts lines of context before it
        start = content[: self._max_chars + _SLACK_CHARS]
        return self._cut(start), _SIGNATURE_END.split(start.lstrip(), maxsplit=1)[0]

    def _head(self, text: str) -> str:
        return "\n".join(text[: self._max_chars + _SLACK_CHARS].split("\n", FILE_LINES)[:FILE_LINES])

    def _cut(self, text: str) -> str:
        if "\r" in text:
            text = text.replace("\r\n", "\n")
        text = text.rstrip()
        return text if len(text) <= self._max_chars else text[: self._max_chars] + TRUNCATED

    def _place(self, path: str, symbols: list[Node]) -> None:
        text = _Text(self._files[path], path)
        wanted = [_Symbol.of(node) for node in symbols]
        for node, place in zip(symbols, text.places(wanted), strict=True):
            if place:
                self._placed[node.id] = text.span(place)


class _Span(NamedTuple):
    """Offsets into a file's text."""

    start: int
    end: int
    declared: int
    declared_end: int


class _Symbol(NamedTuple):
    name: str
    kind: str
    start: int
    length: int

    @classmethod
    def of(cls, node: Node) -> _Symbol:
        properties = node.properties
        name: str = properties["name"]
        kind = _KIND_OF_LABEL.get(node.label, _CODE)
        if kind is not _SECTION and "." in name:
            name = name.rsplit(".", 1)[1] or name
        start: int = properties["startLine"]
        end = properties.get("endLine")
        return cls(name, kind, start, max(1, end - start + 1) if end is not None else DEFAULT_LINES)


class _Place(NamedTuple):
    first: int
    end: int
    declared: int
    """The line with the name."""


class _Text:
    """One file's text, cut into lines and parts."""

    def __init__(self, text: str, path: str) -> None:
        self._lines = text.split("\n", _MAX_LINES)[:_MAX_LINES]
        self._starts = list(accumulate((len(line) + 1 for line in self._lines), initial=0))
        self._text = text[: self._starts[-1]]
        self._keywords_only = path.rsplit(".", 1)[-1].lower() in _KEYWORD_EXTENSIONS
        joints = [
            i for i, line in enumerate(self._lines) if line.startswith(_JOINT) and line.rstrip() in (_JOINT, TRUNCATED)
        ]
        edges = [-1, *joints, len(self._lines)]
        self._parts = [(a + 1, b) for a, b in pairwise(edges) if b > a + 1]

    def places(self, symbols: list[_Symbol]) -> list[_Place | None]:
        """Where each symbol stands, or None."""
        if not self._parts:  # a text of nothing but joints
            return [None] * len(symbols)
        if len(self._parts) == 1 and (shift := self._plain_shift(symbols)) is not None:
            shifts: list[int | None] = [shift]
        else:
            shifts = self._vote(symbols)
        return [self._best(symbol, shifts) for symbol in symbols]

    def span(self, place: _Place) -> _Span:
        """A place in characters, without the line feed at the end."""
        starts = self._starts
        return _Span(starts[place.first], starts[place.end] - 1, starts[place.declared], starts[place.declared + 1] - 1)

    def _plain_shift(self, symbols: list[_Symbol]) -> int | None:
        """0 or 1 for a whole text in which nearly all symbols stand at their line numbers, counted from there."""
        for shift in (0, 1):
            hits = sum(self._declared(symbol, symbol.start - shift, len(self._lines)) is not None for symbol in symbols)
            if hits and hits * 10 >= len(symbols) * 9:
                return shift
        return None

    def _vote(self, symbols: list[_Symbol]) -> list[int | None]:
        """The shift of each part (line number in the file = line of the text + shift), or None where it is not clear.

        Two symbols have to agree, or one class, function or heading whose name no other symbol of the file has, or
        one symbol at its line number in the first part.
        """
        firsts = [first for first, _ in self._parts]
        names = Counter(symbol.name for symbol in symbols)
        votes: list[Counter[int]] = [Counter() for _ in self._parts]
        direct: list[Counter[int]] = [Counter() for _ in self._parts]
        strong: list[set[int]] = [set() for _ in self._parts]
        budget = _SEARCH_CHARS // max(1, len(self._text))
        candidates: dict[tuple[str, str], list[int]] = {}
        for symbol in symbols:
            key = (symbol.name, symbol.kind)
            if key not in candidates:
                candidates[key] = self._candidates(symbol) if len(candidates) < budget else []
            by_part: dict[int, list[int]] = defaultdict(list)
            for line in candidates[key]:
                by_part[bisect_right(firsts, line) - 1].append(symbol.start - line)
            for part, shifts in by_part.items():
                direct[part].update(shifts)
                for shift in shifts:
                    votes[part].update(range(shift, shift + 1 + self._annotations(symbol.start - shift)))
                if symbol.kind is not _VALUE and names[symbol.name] == 1 and len(shifts) == 1:
                    strong[part].add(shifts[0])
        strong[0].add(0)
        return [_winner(votes[i], direct[i], strong[i]) for i in range(len(self._parts))]

    def _annotations(self, line: int) -> int:
        """How many lines above a declaration may be counted to it."""
        above = 0
        while above < min(_LEAD_LINES, line) and _ANNOTATION.match(self._lines[line - above - 1]):
            above += 1
        return above

    def _candidates(self, symbol: _Symbol) -> list[int]:
        """Lines that declare the symbol's name."""
        found: list[int] = []
        position = self._text.find(symbol.name)
        for _ in range(_MAX_CANDIDATES):
            if position < 0:
                break
            line = bisect_right(self._starts, position) - 1
            if self._declares(self._lines[line], symbol):
                found.append(line)
            position = self._text.find(symbol.name, self._starts[line + 1])
        return found

    def _best(self, symbol: _Symbol, shifts: list[int | None]) -> _Place | None:
        """The place with the most lines among the parts that hold the symbol."""
        best: _Place | None = None
        for (first, end), shift in zip(self._parts, shifts, strict=True):
            if shift is None or not first <= symbol.start - shift < end:
                continue
            line = symbol.start - shift
            declared = self._declared(symbol, line, end)
            if declared is None:
                continue
            place = _Place(line, max(declared + 1, min(end, line + symbol.length)), declared)
            if best is None or place.end - place.first > best.end - best.first:
                best = place
        return best

    def _declared(self, symbol: _Symbol, first: int, end: int) -> int | None:
        """The line with the symbol's name: ``first``, or one below decorators, comments and modifiers."""
        if first < 0:
            return None
        for line in range(first, min(end, len(self._lines), first + min(_LEAD_LINES, symbol.length))):
            text = self._lines[line]
            if self._declares(text, symbol):
                return line
            if not _LEAD.match(text):
                return None
        return None

    def _declares(self, line: str, symbol: _Symbol) -> bool:
        name = symbol.name
        at = line.find(name)
        if at < 0 or len(line) > _MAX_LINE_CHARS:
            return False
        if symbol.kind is _SECTION:
            stripped = line.strip()
            return stripped == name or (stripped.startswith("#") and stripped.strip("# ") == name.strip("# "))
        for _ in range(_MAX_IN_LINE):
            if at < 0:
                break
            before, after = line[:at], line[at + len(name) :]
            at = line.find(name, at + 1)
            if before and (before[-1].isalnum() or before[-1] in "_$"):
                continue
            if after and (after[0].isalnum() or after[0] in "_$"):
                continue
            if symbol.kind is _VALUE:
                if _declares_value(line, before, after):
                    return True
            elif self._declares_code(line, before, after):
                return True
        return False

    def _declares_code(self, line: str, before: str, after: str) -> bool:
        if before.strip() in _COMMON_KEYWORDS or _KEYWORD.search(before):
            return not _COMMENT.match(line)
        if _STATEMENT.match(line) or _COMMENT.match(line):
            return False
        if _ASSIGNED.match(after):
            return not before.strip() or not self._keywords_only
        if self._keywords_only or not _OPENED.match(after) or not _TYPED.match(before) or before.endswith("."):
            return False
        last = line.rstrip()[-1]
        return last in "{(,:" or (bool(before.strip()) and before[-1] in " \t*&:~")


def _declares_value(line: str, before: str, after: str) -> bool:
    if _COMMENT.match(line) or not _VALUE_OPENED.match(after):
        return False
    if before.endswith((".", "->")):
        return bool(_OWNER.search(before))
    return True


def _winner(votes: Counter[int], direct: Counter[int], strong: set[int]) -> int | None:
    if not votes:
        return None
    most = max((count, direct[shift]) for shift, count in votes.items())
    leading = [shift for shift, count in votes.items() if (count, direct[shift]) == most]
    if len(leading) > 1:
        leading = [shift for shift in leading if shift in strong] or [shift for shift in leading if shift in (0, 1)]
    if len(leading) != 1:
        return None
    return leading[0] if most[0] > 1 or leading[0] in strong else None
