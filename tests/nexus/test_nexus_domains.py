"""A document gets the domain that its collection, type and words speak for most; a file brings other rules."""

from __future__ import annotations

import random
import re
import unicodedata
import warnings
from pathlib import Path

import pytest
from processes import EXAMPLE, REPOSITORY

from common.errors import InvalidSettings
from common.graph import read_graph
from control_plane.nexus.domains import (
    BUILT_IN,
    COLLECTIONS_KEPT,
    GENERAL,
    MAX_CHARS,
    MAX_COUNTED,
    MAX_DOMAINS,
    MAX_FILE_BYTES,
    MAX_KEYWORD_WORDS,
    Domains,
    Rule,
)

BUILT = Domains.load(None)
SMALL = Domains(
    [
        Rule("law", ["law-*"], ["deed"], ["court", "clause", "power of attorney", "of age"]),
        Rule("money", ["*-books"], ["bill"], ["ledger", "cash flow", "court fee", "fee"]),
        Rule("code", ["repo?", "src[-_]*"], ["class"], [f"word{n}" for n in range(30)]),
    ]
)


def load(folder: Path, text: str | bytes) -> Domains:
    file = folder / "domains.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Domains.load(file)


# --- points ---


@pytest.mark.parametrize(
    ("collection", "doc_type", "text", "domain"),
    [
        ("", "", "", GENERAL),
        ("notes", "memo", "nothing of it", GENERAL),
        ("law-2024", "", "", "law"),
        ("LAW-2024", "", "", "law"),
        ("law", "", "", GENERAL),
        ("by-law-x", "", "", GENERAL),
        ("old-books", "", "", "money"),
        ("repo1", "", "", "code"),
        ("repo12", "", "", GENERAL),
        ("src_a", "", "", "code"),
        ("src-a", "", "", "code"),
        ("src.a", "", "", GENERAL),
        ("", "deed", "", "law"),
        ("", "Deed", "", "law"),
        ("", "deeds", "", GENERAL),
        ("", "", "a ledger", "money"),
        # 50 against 30 and 10; against 30 and 30
        ("law-1", "bill", "ledger", "law"),
        ("law-1", "bill", "ledger cash flow court fee", "money"),
        # 30 against 30: the first; 30 against 20; against 40
        ("", "bill", "court clause of age", "law"),
        ("", "bill", "court clause", "money"),
        ("", "bill", "court clause of age power of attorney", "law"),
    ],
)
def test_the_most_points_win_and_of_equal_ones_the_first_domain(
    collection: str, doc_type: str, text: str, domain: str
) -> None:
    assert SMALL.of(collection, doc_type, text) == domain


@pytest.mark.parametrize(
    "text",
    [
        "court", "Court", "COURT", "the court.", "(court)", "court_room", "x/court/y", "court's", "«court»", "ﬀ court",
        "power of attorney", "Power-of\nAttorney", "power, of: attorney", "power_of_attorney",
    ],
)  # fmt: skip
def test_a_keyword_is_found_whole_in_any_case_and_between_any_signs(text: str) -> None:
    assert SMALL.of("", "", text) == "law"


@pytest.mark.parametrize(
    "text", ["courts", "xcourt", "court2", "courtéx", "power attorney of", "power of the attorney", "of", "power of"]
)
def test_a_part_of_a_word_or_of_a_phrase_is_no_keyword(text: str) -> None:
    assert SMALL.of("", "", text) == GENERAL


def test_a_keyword_counts_once_however_often_it_stands() -> None:
    assert SMALL.of("", "", "ledger " * 1_000 + "court clause") == "law"


def test_no_more_than_ten_keywords_count() -> None:
    words = " ".join(f"word{n}" for n in range(30))
    few = " ".join(f"word{n}" for n in range(MAX_COUNTED - 1))
    law = "law-1", "deed", "court clause"
    assert SMALL.of(*law) == "law"
    assert SMALL.of(*law[:2], f"{law[2]} {words}") == "law"  # 100 and 100
    assert SMALL.of(*law[:2], f"court {words}") == "code"  # 90 and 100
    assert SMALL.of(*law[:2], f"court {few}") == "law"  # 90 and 90


def test_a_keyword_of_two_domains_counts_for_both() -> None:
    domains = Domains([Rule("a", keywords=["shared", "shared", "SHARED"]), Rule("b", keywords=["shared", "own"])])
    assert domains.of("", "", "shared") == "a"
    assert domains.of("", "", "shared own") == "b"


def test_words_of_every_script_are_keywords_in_every_form_of_unicode() -> None:
    kept = ["Größe", "договор", "契約", "café au lait"]
    domains = Domains([Rule("words", ["Füße*"], ["Verträge"], kept)])
    for word in kept:
        for form in ("NFC", "NFD"):
            assert domains.of("", "", f"→ {unicodedata.normalize(form, word).upper()}.") == "words", (word, form)
    assert domains.of(unicodedata.normalize("NFD", "FÜSSE"), "", "") == "words"
    assert domains.of("", unicodedata.normalize("NFD", "VERTRÄGE"), "") == "words"
    assert domains.of("", "", "größer cafe au lait") == GENERAL


def test_only_the_beginning_of_a_long_text_is_read() -> None:
    assert SMALL.of("", "", " " * (MAX_CHARS - 5) + "court") == "law"
    assert SMALL.of("", "", " " * (MAX_CHARS - 4) + "court") == GENERAL


def test_more_collections_than_are_remembered_are_told_apart() -> None:
    names = [f"{'law' if n % 3 else 'old'}-{n}" for n in range(COLLECTIONS_KEPT + 100)]
    expected = ["law" if name.startswith("law") else GENERAL for name in names]
    for _ in range(2):
        assert [SMALL.of(name, "", "") for name in names] == expected


# --- beside a slow computation ---


def slow_words(text: str) -> list[str]:
    """Letter by letter."""
    words, word = [], ""
    for char in f"{unicodedata.normalize('NFC', text).casefold()} ":
        if char.isalnum():
            word += char
        elif word:
            words.append(word)
            word = ""
    return words


def slow_glob(pattern: str, name: str) -> bool:
    """``*`` and ``?`` by trying everything."""
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(slow_glob(pattern[1:], name[start:]) for start in range(len(name) + 1))
    return bool(name) and pattern[0] in ("?", name[0]) and slow_glob(pattern[1:], name[1:])


def slow_domain(rules: list[Rule], collection: str, doc_type: str, text: str) -> str:
    best, winner = 0, GENERAL
    words = slow_words(text)
    for rule in rules:
        points = 0
        if any(slow_glob(pattern.casefold(), collection.casefold()) for pattern in rule.collections):
            points += 50
        if doc_type.casefold() in [one.casefold() for one in rule.doc_types]:
            points += 30
        held = set()
        for keyword in rule.keywords:
            wanted = slow_words(keyword)
            if any(words[start : start + len(wanted)] == wanted for start in range(len(words))):
                held.add(tuple(wanted))
        points += 10 * min(len(held), 10)
        if points > best:
            best, winner = points, rule.name
    return winner


WORDS = ["a", "b", "c", "Ab", "aB", "ä", "Ä", "ß", "SS", "1", "x1", "ее", "日本", "e\u0301", "\u00e9", "of", "the", "İ"]
SIGNS = [" ", "  ", "-", "_", "\n", ". ", "'", "…", "\u00a0", ""]


def some_rules(rng: random.Random) -> list[Rule]:
    def phrase() -> str:
        return rng.choice(SIGNS[:6]).join(rng.choices(WORDS, k=rng.choice([1, 1, 1, 2, 2, 3, MAX_KEYWORD_WORDS])))

    def name(letters: str) -> str:
        return "".join(rng.choices(letters, k=rng.randint(1, 5)))

    return [
        Rule(
            f"d{n}",
            [name("abA-_**?") for _ in range(rng.randint(0, 2))],
            [name("abAB") for _ in range(rng.randint(0, 3))],
            [phrase() for _ in range(rng.randint(0, 20))],
        )
        for n in range(rng.randint(1, 6))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_any_rules_give_what_a_slow_computation_gives(seed: int) -> None:
    rng = random.Random(seed)
    seen = set()
    for _ in range(15):
        rules = some_rules(rng)
        domains = Domains(rules)
        for _ in range(15):
            collection = "".join(rng.choices("abAB-_", k=rng.randint(0, 5)))
            doc_type = "".join(rng.choices("abAB", k=rng.randint(0, 3)))
            text = "".join(rng.choice(WORDS) + rng.choice(SIGNS) for _ in range(rng.randint(0, 40)))
            found = domains.of(collection, doc_type, text)
            assert found == slow_domain(rules, collection, doc_type, text), (rules, collection, doc_type, text)
            seen.add(found)
    assert len(seen) > 3


def test_the_built_in_rules_give_what_a_slow_computation_gives() -> None:
    rng = random.Random(7)
    keywords = [keyword for rule in BUILT_IN for keyword in rule.keywords]
    types = ["", "memo", *(kind for rule in BUILT_IN for kind in rule.doc_types)]
    seen = set()
    for _ in range(300):
        text = " ".join(rng.choice([*WORDS, rng.choice(keywords), rng.choice(keywords)]) for _ in range(25))
        kind = rng.choice(types)
        found = BUILT.of("", kind, text)
        assert found == slow_domain([rule._replace(collections=()) for rule in BUILT_IN], "", kind, text)
        seen.add(found)
    assert seen >= {rule.name for rule in BUILT_IN}


# --- what is built in ---


@pytest.mark.parametrize(
    ("collection", "doc_type", "text", "domain"),
    [
        ("legal", "", "", "legal"),
        ("acme-Contracts.2024", "", "", "legal"),
        ("eu_law", "", "", "legal"),
        ("outlaws", "", "", GENERAL),
        ("paralegals", "", "", GENERAL),
        ("q3-finance", "", "", "financial"),
        ("HR", "", "", "hr"),
        ("hr_forms", "", "", "hr"),
        ("chrome", "", "", GENERAL),
        ("human-resources-emea", "", "", "hr"),
        ("backend-api", "", "", "engineering"),
        ("", "NDA", "", "legal"),
        ("", "invoice", "", "financial"),
        ("", "payslip", "", "hr"),
        ("", "Function", "", "engineering"),
        ("", "", "The Plaintiff asks the Court for an injunction.", "legal"),
        ("", "", "Net income rose; the balance sheet shows less debt and a dividend.", "financial"),
        ("", "", "Every employee has 30 days of annual leave.", "hr"),
        ("", "", "The backend answers JSON; see the stack trace.", "engineering"),
        ("", "", "A walk in the woods.", GENERAL),
        ("recipes", "class", "salary", "engineering"),
    ],
)
def test_built_in_rules(collection: str, doc_type: str, text: str, domain: str) -> None:
    assert BUILT.of(collection, doc_type, text) == domain


def test_built_in_rules_are_in_their_documented_order_and_bounds() -> None:
    assert [rule.name for rule in BUILT_IN] == ["legal", "financial", "hr", "engineering"]
    for rule in BUILT_IN:
        assert all(1 <= len(slow_words(keyword)) <= MAX_KEYWORD_WORDS for keyword in rule.keywords)
        for held in (rule.collections, rule.doc_types, rule.keywords):
            assert len(set(held)) == len(held)


def test_symbols_of_the_example_graph_are_engineering() -> None:
    labels = ("Function", "Method", "Class", "Struct", "Property", "Variable")
    nodes = [node for node in read_graph(EXAMPLE).nodes if node.label in labels]
    found = [BUILT.of("memvid-export", node.label, f"{node.id}\n{node.properties['content']}") for node in nodes]
    assert len(found) > 2_000
    # The others have four or more words of another domain.
    assert found.count("engineering") > 0.99 * len(found)


# --- a file of one's own ---


def test_a_file_adds_domains_after_the_built_in_ones(tmp_path: Path) -> None:
    domains = load(
        tmp_path, '[domains.b]\nkeywords = ["lathe", "payroll"]\n[domains.a]\nkeywords = ["lathe", "weir"]\n'
    )
    assert domains.of("", "", "a lathe") == "b"
    assert domains.of("", "", "a lathe, a weir") == "a"
    assert domains.of("", "", "payroll") == "hr"
    assert domains.of("legal", "", "") == "legal"


def test_a_file_replaces_a_built_in_domain_in_its_place(tmp_path: Path) -> None:
    domains = load(tmp_path, '[domains.hr]\nkeywords = ["lathe"]\n[domains.first]\nkeywords = ["lathe", "salary"]\n')
    assert domains.of("", "", "lathe") == "hr"
    assert domains.of("", "", "salary") == "first"
    assert domains.of("hr", "payslip", "payroll") == GENERAL


def test_a_domain_without_rules_has_no_documents(tmp_path: Path) -> None:
    domains = load(tmp_path, "[domains.hr]\n[domains.x]\ncollections = []\nkeywords = []\n")
    assert domains.of("hr", "cv", "salary of an employee") == GENERAL
    assert domains.of("", "", "") == GENERAL


def test_an_empty_file_leaves_the_built_in_rules(tmp_path: Path) -> None:
    assert load(tmp_path, "").of("", "", "a plaintiff") == "legal"


def test_the_example_does_what_it_says() -> None:
    domains = Domains.load(REPOSITORY / "examples" / "domains.toml")
    assert domains.of("it_security", "", "") == domains.of("CVE-2024", "", "") == "security"
    assert domains.of("", "", "An unknown zero-day.") == "security"
    assert domains.of("legal-eu", "", "") == "legal"
    assert domains.of("", "", "a plaintiff") == GENERAL
    assert domains.of("hr", "payslip", "salary") == GENERAL
    assert domains.of("", "", "a cve, a clause, an invoice for the budget") == "financial"


def test_a_file_at_its_bounds_is_read(tmp_path: Path) -> None:
    keyword = "five words of one keyword"
    lists = {
        "collections": [f"{'c' * 125}{n:03}" for n in range(100)],
        "doc_types": [f"{'t' * 61}{n:03}" for n in range(100)],
        "keywords": [keyword, *(f"{'k' * 95}{n:05}" for n in range(999))],
    }
    tables = [f"[domains.d{n}]\n" for n in range(MAX_DOMAINS - 1)]
    tables.append(f"[domains.{'n' * 64}]\n" + "".join(f"{name} = {held!r}\n" for name, held in lists.items()))
    domains = load(tmp_path, "".join(tables))
    for given in ((lists["collections"][99], "", ""), ("", lists["doc_types"][99], ""), ("", "", keyword)):
        assert domains.of(*given) == "n" * 64


KEYWORDS = "1 to 5 words, 100 characters at most"
NAMED = "named by at most 64 small letters, digits, - and _, and not general"


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("x = 1", "x", "x is not known; there is domains"),
        ("domains = 1", "domains", "must be at most 100 tables [domains.NAME]; it is neither a text nor a list nor"),
        ('domains = ["a"]', "domains", "it is a list with 1 entries"),
        ("".join(f"[domains.d{n}]\n" for n in range(101)), "domains", "it is a table with 101 entries"),
        ("[domains.general]", "domains", f"must be {NAMED}; it is 'general'"),
        ("[domains.Legal]", "domains", NAMED),
        ('[domains."a b"]', "domains", "it is 'a b'"),
        ('[domains.""]', "domains", NAMED),
        (f"[domains.{'n' * 65}]", "domains", f"it is '{'n' * 56}..."),
        ("[domains]\nx = 1", "domains.x", "must be a table [domains.x]"),
        (
            "[domains.x]\nkeyword = []",
            "domains.x.keyword",
            "domains.x.keyword is not known; there is collections, doc_types, keywords",
        ),
        ('[domains.x]\n"a b" = []', "domains.x.'a b'", "is not known"),
        ("[domains.x]\nkeywords = 'one'", "domains.x.keywords", "must be a list of at most 1,000 texts; it is 'one'"),
        ("[domains.x]\nkeywords = {}", "domains.x.keywords", "it is a table with 0 entries"),
        (f"[domains.x]\nkeywords = {['w'] * 1001}", "domains.x.keywords", "it is a list with 1,001 entries"),
        (f"[domains.x]\ndoc_types = {['w'] * 101}", "domains.x.doc_types", "at most 100 texts"),
        (f"[domains.x]\ncollections = {['w'] * 101}", "domains.x.collections", "at most 100 texts"),
        ("[domains.x]\nkeywords = ['a', 2]", "domains.x.keywords[1]", f"must be {KEYWORDS}; it is neither a text"),
        ("[domains.x]\nkeywords = ['...']", "domains.x.keywords[0]", KEYWORDS),
        ("[domains.x]\nkeywords = ['']", "domains.x.keywords[0]", KEYWORDS),
        ("[domains.x]\nkeywords = ['a b c d e f']", "domains.x.keywords[0]", "it is 'a b c d e f'"),
        (f"[domains.x]\nkeywords = ['{'k' * 101}']", "domains.x.keywords[0]", KEYWORDS),
        ("[domains.x]\ndoc_types = [' ']", "domains.x.doc_types[0]", "a type of documents, 1 to 64 characters"),
        (f"[domains.x]\ndoc_types = ['{'t' * 65}']", "domains.x.doc_types[0]", "1 to 64 characters"),
        ("[domains.x]\ncollections = [['a']]", "domains.x.collections[0]", "it is a list with 1 entries"),
        (f"[domains.x]\ncollections = ['{'c' * 129}']", "domains.x.collections[0]", "1 to 128 characters"),
        (f"[domains.x]\ncollections = [0x{'f' * 9_000}]", "domains.x.collections[0]", "neither a text"),
        ("[domains.x]\ncollections = [", "file", "the file is not TOML"),
        (f"x = {'9' * 5_000}", "file", "the file is not TOML"),
        ("x = " + "[" * 100_000, "file", "the file is not TOML"),
        (b"\xff", "file", "the file is not UTF-8"),
        ("#" * (MAX_FILE_BYTES + 1), "file", "the file must have at most 1,048,576 bytes"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_told_with_its_place(
    tmp_path: Path, text: str | bytes, place: str, message: str
) -> None:
    with pytest.raises(InvalidSettings) as caught:
        load(tmp_path, text)
    assert caught.value.details["field"] == place
    assert caught.value.message.startswith(f"{tmp_path / 'domains.toml'}: ")
    assert message in caught.value.message
    assert len(caught.value.message) < len(str(tmp_path)) + 250


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=re.escape(f"{tmp_path}: the file cannot be read: Is a directory")):
        Domains.load(tmp_path)
    with pytest.raises(InvalidSettings, match="the file cannot be read: No such file"):
        Domains.load(tmp_path / "gone.toml")


# --- nothing takes long ---


def test_no_pattern_fails_or_warns(tmp_path: Path) -> None:
    rng = random.Random(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(500):
            patterns = ["".join(rng.choices("*?[]!^-&|~\\(){}.+$aZ\n", k=rng.randint(1, 12))) for _ in range(3)]
            domains = Domains([Rule("some", patterns)])
            assert domains.of("a-Z", "", "") in ("some", GENERAL)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "a " * 500_000,
        "a" * 1_000_000,
        "power of " * 120_000,
        "\u0301" * 500_000 + "\u0316" * 500_000,
        "\u0316\u0301" * 500_000,
        "e\u0301" * 500_000,
        "İ" * 1_000_000,
        "\x00" * 1_000_000,
        "_" * 1_000_000,
        "日本 " * 300_000,
    ],
    ids=lambda text: repr(text[:6]),
)
def test_every_text_of_a_megabyte_is_read_at_once(text: str) -> None:
    assert SMALL.of("law-1", "", text) == "law"
    assert SMALL.of("", "", "power of attorney, " + text) == "law"


@pytest.mark.timeout(20)
def test_many_stars_in_a_pattern_are_matched_at_once() -> None:
    domains = Domains([Rule("stars", ["*a" * 63 + "b", "*?" * 64, "*" * 128])])
    assert domains.of("a" * 128, "", "") == "stars"
    only = Domains([Rule("stars", ["*a" * 63 + "b"])])
    assert [only.of(name, "", "") for name in ("a" * 127 + "b", "a" * 128)] == ["stars", GENERAL]


@pytest.mark.timeout(20)
def test_a_hundred_thousand_keywords_with_one_beginning_are_no_trouble() -> None:
    rules = [Rule(f"d{n}", keywords=[f"the word{n * 1_000 + k}" for k in range(1_000)]) for n in range(100)]
    domains = Domains(rules)
    for _ in range(20):
        assert domains.of("", "", "the " * 10_000 + "word99999") == "d99"
