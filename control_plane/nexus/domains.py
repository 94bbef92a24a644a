"""The domain of a document, by rules: points for its collection's name, its type and the words of its text.

The most points win; of equal ones the domain that comes first: those built in (legal, financial, hr, engineering), then
those of the file in its order. Without a point it is ``GENERAL``. A file of one's own (an example lies in
``examples/domains.toml``) adds domains, and replaces a built-in one of the same name in its place.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Hashable, Iterable, Sequence
from fnmatch import translate
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from common.errors import InvalidSettings
from control_plane.nexus.entities import composed

GENERAL = "general"
"""Where no rule gives a point."""
COLLECTION_POINTS = 50
"""Once, where any of the patterns matches."""
DOC_TYPE_POINTS = 30
KEYWORD_POINTS = 10
"""For each keyword that the text has, however often."""
MAX_COUNTED = 10
"""Keywords that count for a domain: a long text has some of every one."""
MAX_CHARS = 100_000
"""Characters of a text that are read."""
MAX_FILE_BYTES = 1 << 20
MAX_DOMAINS = 100
"""In a file."""
MAX_KEYWORD_WORDS = 5
COLLECTIONS_KEPT = 1_024
"""Collections whose points are remembered."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_PLAIN = re.compile(r"[\w-]{1,64}")
_NOTHING = "(?!)"
_WORD = re.compile(r"[^\W_]+")
_SPACES = {code: " " for code in range(128) if not chr(code).isalnum()}


class Rule(NamedTuple):
    """What speaks for a domain; upper and lower case are one."""

    name: str
    collections: Sequence[str] = ()
    """Patterns of collection names: ``*`` is any text, ``?`` one character, ``[-_]`` one of these."""
    doc_types: Sequence[str] = ()
    keywords: Sequence[str] = ()
    """Words, or up to ``MAX_KEYWORD_WORDS`` of them in a row. A word is a run of letters and digits."""


class Domains:
    """Rules, made ready: the time for a text grows with its length, and not with the number of rules."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        """``rules``: of two that give equal points the first wins. A keyword has 1 to ``MAX_KEYWORD_WORDS`` words."""
        self._names = [rule.name for rule in rules]
        self._patterns = [
            re.compile("|".join(translate(_folded(one)) for one in rule.collections) or _NOTHING) for rule in rules
        ]
        self._doc_types = _places([map(_folded, rule.doc_types) for rule in rules])
        self._keywords = _places([(tuple(_words(one)) for one in rule.keywords) for rule in rules])
        self._first_words = frozenset(keyword[0] for keyword in self._keywords)
        self._phrases = {
            length: frozenset(keyword for keyword in self._keywords if len(keyword) == length)
            for length in sorted({len(keyword) for keyword in self._keywords} - {1})
        }
        self._phrase_starts = {n: frozenset(phrase[0] for phrase in held) for n, held in self._phrases.items()}
        self._of_collection = lru_cache(COLLECTIONS_KEPT)(self._collection_points)

    @classmethod
    def load(cls, path: Path | None) -> Domains:
        """The built-in rules, and those of a TOML file. Raises InvalidSettings, which names the place in the file."""
        rules = {rule.name: rule for rule in BUILT_IN}
        if path is not None:
            try:
                rules |= {rule.name: rule for rule in _read(path)}
            except InvalidSettings as error:
                raise InvalidSettings(f"{path}: {error.message}", **error.details) from error
        return cls(list(rules.values()))

    def of(self, collection: str, doc_type: str, text: str) -> str:
        """The domain of a document of this collection and type."""
        points = list(self._of_collection(collection))
        for place in self._doc_types.get(_folded(doc_type), ()):
            points[place] += DOC_TYPE_POINTS
        counted = [0] * len(points)
        for keyword in self._found(_words(text[:MAX_CHARS])):
            for place in self._keywords[keyword]:
                counted[place] += 1
        totals = [held + KEYWORD_POINTS * min(count, MAX_COUNTED) for held, count in zip(points, counted, strict=True)]
        best = max(totals)
        return self._names[totals.index(best)] if best else GENERAL

    def _found(self, words: list[str]) -> list[tuple[str, ...]]:
        """The keywords of all rules that stand among these words, each once."""
        first = self._first_words.intersection(words)
        found: list[tuple[str, ...]] = [(word,) for word in first if (word,) in self._keywords]
        for length, phrases in self._phrases.items():
            if not first.isdisjoint(self._phrase_starts[length]):
                found += phrases.intersection(zip(*(words[start:] for start in range(length)), strict=False))
        return found

    def _collection_points(self, collection: str) -> tuple[int, ...]:
        name = _folded(collection)
        return tuple(COLLECTION_POINTS if patterns.match(name) else 0 for patterns in self._patterns)


def _folded(text: str) -> str:
    return composed(text).casefold()


def _words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    text = _folded(text)
    # Three times as fast as the pattern, and the same.
    return text.translate(_SPACES).split() if text.isascii() else _WORD.findall(text)


Key = TypeVar("Key", bound=Hashable)


def _places(keys: Iterable[Iterable[Key]]) -> dict[Key, list[int]]:
    """Which of the lists each key stands in."""
    places: dict[Key, list[int]] = {}
    for place, held in enumerate(keys):
        for key in set(held):
            places.setdefault(key, []).append(place)
    return places


# --- a file of one's own ---


class _Field(NamedTuple):
    """A list of texts in a rule."""

    most: int
    chars: int
    allowed: str


_FIELDS = {
    "collections": _Field(100, 128, "a pattern of collection names, 1 to 128 characters"),
    "doc_types": _Field(100, 64, "a type of documents, 1 to 64 characters"),
    "keywords": _Field(1_000, 100, f"1 to {MAX_KEYWORD_WORDS} words, 100 characters at most"),
}


def _read(path: Path) -> list[Rule]:
    tables = _document(path)
    if unknown := sorted(tables.keys() - {"domains"}):
        raise _unknown(_shown(unknown[0]), "domains")
    domains = tables.get("domains", {})
    if not isinstance(domains, dict) or len(domains) > MAX_DOMAINS:
        raise _wrong("domains", f"at most {MAX_DOMAINS} tables [domains.NAME]", domains)
    return [_rule(name, table) for name, table in domains.items()]


def _document(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InvalidSettings(f"the file must have at most {MAX_FILE_BYTES:,} bytes", field="file")
        return tomllib.loads(data.decode())
    except OSError as error:
        raise InvalidSettings(f"the file cannot be read: {error.strerror}", field="file") from error
    except UnicodeDecodeError as error:
        raise InvalidSettings("the file is not UTF-8", field="file") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
        raise InvalidSettings(f"the file is not TOML: {error}", field="file") from error


def _rule(name: str, table: object) -> Rule:
    if not _NAME.fullmatch(name) or name == GENERAL:
        allowed = f"named by at most 64 small letters, digits, - and _, and not {GENERAL}"
        raise _wrong("domains", allowed, name)
    place = f"domains.{name}"
    if not isinstance(table, dict):
        raise _wrong(place, f"a table [{place}]", table)
    if unknown := sorted(table.keys() - _FIELDS.keys()):
        raise _unknown(f"{place}.{_shown(unknown[0])}", ", ".join(_FIELDS))
    return Rule(name, **{field: _texts(f"{place}.{field}", value, _FIELDS[field]) for field, value in table.items()})


def _texts(place: str, value: object, field: _Field) -> list[str]:
    if not isinstance(value, list) or len(value) > field.most:
        raise _wrong(place, f"a list of at most {field.most:,} texts", value)
    for number, text in enumerate(value):
        fits = isinstance(text, str) and text.strip() and len(text) <= field.chars
        if not fits or (field is _FIELDS["keywords"] and not 1 <= len(_words(text)) <= MAX_KEYWORD_WORDS):
            raise _wrong(f"{place}[{number}]", field.allowed, text)
    return value


def _unknown(place: str, known: str) -> InvalidSettings:
    return InvalidSettings(f"{place} is not known; there is {known}", field=place)


def _wrong(place: str, allowed: str, value: object) -> InvalidSettings:
    if isinstance(value, str):
        seen = _cut(repr(value))
    elif isinstance(value, list | dict):
        seen = f"a {'list' if isinstance(value, list) else 'table'} with {len(value):,} entries"
    else:
        seen = "neither a text nor a list nor a table"
    return InvalidSettings(f"{place} must be {allowed}; it is {seen}", field=place, allowed=allowed)


def _shown(name: str) -> str:
    return name if _PLAIN.fullmatch(name) else _cut(repr(name))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- what is built in ---


def _named(*words: str) -> list[str]:
    """Patterns of names that have one of the words whole."""
    return [pattern for one in words for pattern in (one, f"{one}[-_.]*", f"*[-_.]{one}", f"*[-_.]{one}[-_.]*")]


# fmt: off
BUILT_IN: Sequence[Rule] = (
    Rule(
        "legal",
        _named("legal", "law", "contract", "contracts", "agreements", "litigation", "compliance"),
        ["contract", "agreement", "nda", "policy", "terms", "statute", "ruling", "pleading", "license", "patent"],
        [
            "agreement", "agreements", "appellant", "arbitration", "attorney", "claimant", "clause", "contract",
            "contracts", "counsel", "court", "covenant", "defendant", "gdpr", "hereby", "herein", "hereinafter",
            "hereto", "indemnification", "indemnify", "indemnity", "injunction", "jurisdiction", "lawsuit", "legal",
            "liability", "licensee", "licensor", "litigation", "plaintiff", "statute", "statutory", "subpoena",
            "thereof", "tort", "tribunal", "breach of contract", "force majeure", "governing law",
            "intellectual property", "non disclosure", "power of attorney", "terms and conditions",
            "without prejudice",
        ],
    ),
    Rule(
        "financial",
        _named("finance", "financial", "financials", "accounting", "invoices", "billing", "treasury", "tax", "budget"),
        ["invoice", "receipt", "budget", "ledger", "statement", "forecast", "balance_sheet", "purchase_order"],
        [
            "accounting", "accruals", "amortization", "auditor", "bookkeeping", "budget", "creditors", "debtors",
            "depreciation", "dividend", "dividends", "earnings", "ebitda", "equity", "expenditure", "fiscal", "ifrs",
            "invoice", "invoices", "ledger", "liabilities", "loan", "mortgage", "payable", "profit", "receivable",
            "revenue", "revenues", "shareholders", "solvency", "tax", "taxes", "treasury", "vat", "accounts payable",
            "accounts receivable", "balance sheet", "cash flow", "exchange rate", "gross margin", "income statement",
            "interest rate", "net income", "profit and loss", "working capital",
        ],
    ),
    Rule(
        "hr",
        _named("hr", "human-resources", "people", "recruiting", "recruitment", "payroll", "personnel", "onboarding"),
        ["resume", "cv", "job_description", "employee_handbook", "payslip", "performance_review", "offer_letter"],
        [
            "absenteeism", "applicant", "applicants", "appraisal", "bonus", "coworkers", "employee", "employees",
            "employer", "headcount", "hiring", "internship", "interviewer", "jobseeker", "maternity", "onboarding",
            "overtime", "paternity", "payroll", "personnel", "recruiter", "recruiting", "recruitment", "resignation",
            "salaries", "salary", "severance", "staffing", "timesheet", "vacation", "wages", "workforce",
            "annual leave", "cover letter", "employee benefits", "employment contract", "exit interview",
            "human resources", "job description", "notice period", "parental leave", "performance review", "sick leave",
        ],
    ),
    Rule(
        "engineering",
        _named("engineering", "code", "source", "src", "repo", "repos", "backend", "frontend", "devops", "api"),
        [
            # Labels of symbols in an exported graph; a file, a section or a process may be of any domain.
            "class", "code", "const", "constructor", "enum", "function", "impl", "interface", "macro", "method",
            "module", "namespace", "property", "struct", "trait", "typealias", "typedef", "variable",
            "adr", "api", "changelog", "design_doc", "postmortem", "readme", "rfc", "runbook", "source_code",
        ],
        [
            "api", "apis", "async", "backend", "boolean", "codebase", "compiler", "const", "cpu", "css", "database",
            "def", "docker", "elif", "endpoint", "endpoints", "enum", "filepath", "frontend", "gpu", "html", "http",
            "json", "kubernetes", "latency", "linux", "microservice", "microservices", "nullable", "param", "params",
            "postgresql", "pytest", "python", "refactor", "refactoring", "regex", "runtime", "rust", "sql", "sqlite",
            "stderr", "stdout", "struct", "typescript", "javascript", "yaml", "code review", "data structure",
            "load balancer", "pull request", "source code", "stack trace", "technical debt", "unit test", "unit tests",
        ],
    ),
)
# fmt: on
"""In order of precedence."""
