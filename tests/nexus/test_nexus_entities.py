"""What a text names is found by rules that would rather miss something than make it up, and no text takes them long."""

from __future__ import annotations

import random
import sys
import unicodedata

import pytest
from processes import EXAMPLE

from common.graph import Node, read_graph
from control_plane.nexus.entities import MAX_CHARS, MAX_ENTITIES, MAX_KEY_CHARS, composed, entities


def of(kind: str, text: str) -> set[str]:
    """The names of one kind."""
    return {key.partition(":")[2] for key in entities(text) if key.startswith(f"{kind}:")}


# --- identifiers ---


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("call parse_graph here", {"parse_graph"}),
        ("_weights and __mangled_name", {"_weights", "__mangled_name"}),
        ("type_ of Some_Thing", {"type_", "Some_Thing"}),
        ("MAX_CHARS = 5", {"MAX_CHARS"}),
        ("getUserById(userIDs)", {"getUserById", "userIDs"}),
        ("HTTPServer, S30Client, IOError, Vec3Of, x80Foo", {"HTTPServer", "S30Client", "IOError", "Vec3Of", "x80Foo"}),
        ("größe_max is größeMax", {"größe_max", "größeMax"}),
        ("数据_名 is 1_000", {"数据_名"}),
        ("see a.b.c, os.path or aa.bb.dd", {"a.b.c", "os.path", "aa.bb.dd"}),
        ("self._digest.size, this.fileName, cls.made_by, self.x", {"_digest.size", "fileName", "made_by"}),
        ("common.graph.read_graph.", {"common.graph.read_graph"}),
        ("run export() and load(x), self.refresh()", {"export", "refresh"}),
        ("foo_bar().baz_qux(), x().run()", {"foo_bar", "baz_qux"}),
        ("rows[0].file_name", {"file_name"}),
        ("a.name+b.name-other_one*third_one/fourth_one", {"a.name", "b.name", "other_one", "third_one", "fourth_one"}),
        ("@pytest.fixture def x", {"pytest.fixture"}),
        ("$foo_bar ${baz_qux} ~my_x", {"foo_bar", "baz_qux", "my_x"}),
        ("Method:Costs.total#2", {"Costs.total"}),
        ("table.items() rows.append(x) name.strip", set()),
        ("row_of.items()", {"row_of"}),
        ("Thing.__init__ and Some.part.__name__", {"Some.part"}),
        ("response.json() and answer.json[0]", {"response.json", "answer.json"}),
        ("Cargo.lock", {"Cargo.lock"}),
    ],
)
def test_identifiers(text: str, names: set[str]) -> None:
    assert entities(text) == {f"identifier:{name}" for name in names}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Nothing is named here, and README is no name. HTTP, JSON and URLs are not either; PhD, PDFs, TVs.",
        "e.g. this, i.e. that, a.m., p.m., a.k.a. them, U.S.A., U.S., Ph.D., w.r.t. it",
        "iPhone eBay iOS macOS kWh pH mRNA",
        "GitHub, JavaScript, TypeScript, PostgreSQL, McDonald, MacArthur",
        "The end.The next sentence lacks its space.",
        "3.14 1.2.3 v1.2.3 1e5 0x1F 1.e5 10_000",
        "_ __ ___ _a_ _emphasis_ __init__ __name__ x_ a_b i_j",
        "len(x) print() dict() super() main() if() x() ab()",
        "ada.lovelace@example.com or someone_else@host.example.com, x@y_z.t, example.com, www.foo_bar.net",
        r"a \n newline, \alpha_beta, \nfoo_bar and \textGreek",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a e1_f2_a3_b4 a1b2c3d4",
        "comm_35 proc_3_serve filePath startLine cross_community",
        "Node.js, Vue.js and d3.js",
        "well-known read/write 24/7 C++ a->b ... -- == :: #1 50% x*y",
        "...foo_bar",
    ],
)
def test_what_is_no_identifier_and_nothing_else(text: str) -> None:
    assert entities(text) == set()


# --- paths ---


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("see src/a/b.py.", {"src/a/b.py"}),
        ("`src/a/b.py`:12, (docs/x.md), [y/z.toml]", {"src/a/b.py", "docs/x.md", "y/z.toml"}),
        ("./src/a.py is src//a.py is src/./a.py", {"src/a.py"}),
        ("./x, ../up/y.z, ../../z, ~/notes", {"x", "../up/y.z", "../../z", "~/notes"}),
        ("/etc/x and /etc/nginx/ or '/dev/null'", {"/etc/x", "/etc/nginx", "/dev/null"}),
        ("/app.py", {"/app.py"}),
        ("GET /v1/exports/{id}/events", {"/v1/exports"}),
        ("README.md, capacity.py and graph.ndjson.gz", {"README.md", "capacity.py", "graph.ndjson.gz"}),
        ("--data-binary @graph.json", {"graph.json"}),
        ("docker-compose.yml", {"docker-compose.yml"}),
        ("native/Cargo.lock", {"native/Cargo.lock"}),
        ("Function:common/a_b.py:_weights", {"common/a_b.py"}),
        ("//src/a.py does it", {"src/a.py"}),
        ("node_modules/@scope/pkg/main.js", {"node_modules/@scope/pkg/main.js"}),
        ("größe/übung.txt", {"größe/übung.txt"}),
        (r"C:\x, C:\Temp\a_b.log; c:/Users/me", {"C:/x", "C:/Temp/a_b.log", "C:/Users/me"}),
        (r'"D:\\data\\new_one.csv"', {"D:/data/new_one.csv"}),
        (r"C:\Temp\.", {"C:/Temp"}),
    ],
)
def test_paths(text: str, names: set[str]) -> None:
    assert of("path", text) == names


@pytest.mark.parametrize(
    "text",
    [
        "and/or, he/she/it, 1/2, 2024/01/02, I/O, TCP/IP, w/o, text/plain, application/json, owner/repo",
        "/x / // /// /etc ./ ../ ~/ . .. ... /./ /../",
        "a total/self.count of a /b",
        "text.replace(/foo/g, x) and /ab/gi",
        "</div></p/x> <br/> {base}/src/a.py *.py src/**/*.py x)/etc/passwd",
        "${HOME}/a/b.py $HOME/a.py src/{name}.py /a/b*",
        ".eslintrc.json .gitignore {name}.manifest.json",
        "self.json this.py node.js __init__.py index.html x/self.nothing",
        "pw@host/db.sql",
        r"Q:\nWhat A:\nfoo\nbar",
        "response.json() data.json[0]",
        "/2/3 /1.2/3",
    ],
)
def test_what_is_no_path(text: str) -> None:
    assert of("path", text) == set()


def test_a_windows_path_with_spaces_is_left_out_whole() -> None:
    assert entities(r"open C:\Program Files\foo_bar\x.exe now") == set()


# --- URLs ---


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("https://example.org/a/b.", {"https://example.org/a/b"}),
        ("HTTPS://Example.ORG/A/B?", {"https://example.org/A/B"}),
        ("https://example.org/ https://example.org https://example.org./", {"https://example.org"}),
        ("(https://example.org/a_(b)), then", {"https://example.org/a_(b)"}),
        ("[here](https://example.org/x)[there](http://a.b/c)", {"https://example.org/x", "http://a.b/c"}),
        ("<https://example.org/x>, 'http://a.b/c', «http://d.e»", {"https://example.org/x", "http://a.b/c", "http://d.e"}),
        ("**https://example.org/x**!", {"https://example.org/x"}),
        ("https://user:pa55_word@example.org/x", {"https://example.org/x"}),
        ("https://token_x@example.org", {"https://example.org"}),
        ("https://a@b@example.org:8080/x", {"https://example.org:8080/x"}),
        ("https://example.org/@someone", {"https://example.org/@someone"}),
        ("https://example.org/x#part_two", {"https://example.org/x"}),
        ("https://example.org/x?a=1&b=2#y", {"https://example.org/x?a=1&b=2"}),
        ("https://example.org/?q=1", {"https://example.org/?q=1"}),
        ("https://example.org?q=1", {"https://example.org/?q=1"}),
        ("https://s3.example.org/x?v=1&X-Amz-Signature=ab_cd&api_key=3&Access_Token=z&&", {"https://s3.example.org/x?v=1"}),
        ("https://example.org/x?password=a_b", {"https://example.org/x"}),
        ("git+https://example.org/x", {"https://example.org/x"}),
        ("http://localhost:8000/x http://my_host", {"http://localhost:8000/x", "http://my_host"}),
        ("https://bücher.example/ä", {"https://bücher.example/ä"}),
        ("见https://example.org/x。", set()),
        ("见 https://example.org/x。再见", {"https://example.org/x"}),
        ("https://web.example.org/https://other.example.org/", {"https://web.example.org/https://other.example.org/"}),
        ("`https://api.example.org/v1/users/${id}/x`", {"https://api.example.org/v1/users/"}),
        ("https://example.org/x?id={id}", {"https://example.org/x"}),
        ("https://example.org/dist@{version}", {"https://example.org"}),
    ],
)  # fmt: skip
def test_urls_and_nothing_else(text: str, names: set[str]) -> None:
    assert {key for key in entities(text) if not key.startswith("url:")} == set()
    assert of("url", text) == names


@pytest.mark.parametrize(
    "text",
    [
        "https:// http://… https://{host}/x https://%s/x http:///etc/x https://-",
        "https://user:pa/ss_word@host https://user:12/3_x@example.org https://user/x_y@host",
        "https://user:{pass}@host/a_b.py https://{user}:pa_ss@host/x",
        "https://user:pa|ss_word@host/x.py https://[::1]:80/x_y",
        "https://example.org:port/a_b https://host..name/x",
        "postgresql://some_user:pa_ss@host/data_base.sql redis://:s3_cret@h/0",
        "file:///etc/a_b ssh://git@host/a_b/c.py xhttps://example.org/a_b",
    ],
)
def test_other_schemes_and_broken_urls_give_nothing_of_their_parts(text: str) -> None:
    assert entities(text) == set()


# --- names ---


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("It was Ada Lovelace who wrote it.", {"Ada Lovelace"}),
        ("met Ada Lovelace, Mary Ann Evans; Alan Turing", {"Ada Lovelace", "Mary Ann Evans", "Alan Turing"}),
        ("by Jean-Luc Picard's ship and Conan O'Brien", {"Jean-Luc Picard", "Conan O'Brien"}),
        ("für Ämilie Öz, por José García", {"Ämilie Öz", "José García"}),
        ("под Москвой Анна Каренина", set()),
        ("с Анна Каренина", {"Анна Каренина"}),
        ("on Monday Ada Lovelace met Dr Watson", {"Ada Lovelace"}),
        ("by The New York Times", {"New York Times"}),
        # At the beginning of a sentence only, it may be capitalised for its place.
        ("Ada Lovelace wrote it. Yesterday Evening came.", set()),
        ("When Ada Lovelace wrote it", set()),
        ("Ada Lovelace wrote it, as Ada Lovelace said.", {"Ada Lovelace"}),
        ("see: Ada Lovelace\nGrace Hopper", set()),
        ("only Ada was there, with a Single Wordé", {"Single Wordé"}),
        ("the One Two Three Four of it", {"Two Three Four"}),
        ("the Alpha Beta Gamma Delta of it", set()),
        ("new ADA LOVELACE, an Ada LOVELACE", set()),
        ("public List Items; return Some Thing; class Foo Bar", set()),
        ("call Foo Bar(x), x Foo Bar[0], a Foo Bar={}", set()),
        ("x/Ada Lovelace, a  Ada  Lovelace", set()),
        ("是 日本 東京", set()),
    ],
)  # fmt: skip
def test_names(text: str, names: set[str]) -> None:
    assert entities(text) == {f"name:{name}" for name in names}


# --- all together ---


def test_every_kind_is_found_in_one_text_and_no_part_twice() -> None:
    text = (
        "So wrote Ada Lovelace at https://example.org/src/parse_graph.py, read_graph() of common/graph/read_graph.py "
        "takes what C:\\Temp\\make_it.py gives."
    )
    assert entities(text) == {
        "name:Ada Lovelace",
        "url:https://example.org/src/parse_graph.py",
        "identifier:read_graph",
        "path:common/graph/read_graph.py",
        "path:C:/Temp/make_it.py",
    }


def test_the_most_frequent_are_kept_and_of_those_the_first() -> None:
    rare = [f"rare_{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(100)]
    twice = ["identifier:zz_top", "url:https://z.example", "path:zz/top.py", "name:Zed Zulu"]
    text = " ".join([*rare, *["so zz_top https://z.example zz/top.py, Zed Zulu is"] * 2])
    assert entities(text) == {*twice, *(f"identifier:{name}" for name in rare[: MAX_ENTITIES - len(twice)])}


def test_an_occurrence_where_it_begins_a_sentence_counts_too() -> None:
    others = " ".join(f"a_b{chr(97 + n)} a_b{chr(97 + n)}" for n in range(26))
    more = " ".join(f"c_d{chr(97 + n)} c_d{chr(97 + n)}" for n in range(10))
    assert "name:Ada Lovelace" not in entities(f"{others} {more} so Ada Lovelace is")
    assert "name:Ada Lovelace" in entities(f"{others} {more} so Ada Lovelace is. Ada Lovelace. Ada Lovelace.")


def test_longer_keys_are_left_out() -> None:
    most = MAX_KEY_CHARS - len("identifier:") - len("a_")
    assert entities(f"a_{'x' * most} b_{'x' * (most + 1)}") == {f"identifier:a_{'x' * most}"}
    assert entities(f"https://example.org/{'x' * MAX_KEY_CHARS} /etc/{'y' * MAX_KEY_CHARS}") == set()


def test_only_whole_words_of_the_beginning_are_read() -> None:
    fill = "w " * (MAX_CHARS // 2 - 8)  # 16 characters are left
    assert entities(fill + "some_name other_name") == {"identifier:some_name"}
    assert entities(fill + "some_name\nother_name") == {"identifier:some_name"}
    assert entities(fill + "some_names_again and") == set()
    assert entities(fill + "some_name_again ") == {"identifier:some_name_again"}
    assert entities("," * (MAX_CHARS - 4) + "a_bcdefg") == {"identifier:a_bc"}
    assert entities(" " * (MAX_CHARS + 9)) == set()


def test_keys_are_composed_and_have_no_control_characters() -> None:
    text = "größe_é é/ü.py https://exämple.org/é José García, wie José García"
    found = entities(text)
    assert len(found) == 4
    assert entities(unicodedata.normalize("NFD", text)) == found
    assert entities("so\x00me_name a\u202e_b https://example.org/a\x1bb /etc/x\x07y") == {
        "identifier:me_name",
        "url:https://example.org/a",
        "path:/etc/x",
    }
    assert entities("https://example.org/a\u00adb https://example.org/\ue000") == set()


def test_every_letter_and_every_pair_that_composes_is_composed() -> None:
    letters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    pairs = [unicodedata.normalize("NFD", letter) for letter in letters if unicodedata.decomposition(letter)]
    marks = [letter for letter in letters if unicodedata.combining(letter)]
    swapped = [f"e{mark}{other}" for mark in marks for other in marks[::40]]
    hangul = ["\u1112\u1161", "\u1112\u1161\u11ab", "하\u11ab"]
    for text in (*letters, *pairs, *swapped, *hangul):
        assert composed(text) == unicodedata.normalize("NFC", text), ascii(text)


def test_composed_is_nfc_for_every_text_with_ascii_letters_here_and_there() -> None:
    rng = random.Random(5)
    signs = [
        "a",
        "e",
        " ",
        "\u0301",
        "\u0316",
        "ü",
        "u\u0308",
        "\u1100",
        "\u1161",
        "\u11a8",
        "각",
        "か",
        "\u3099",
        "Ω",
        "ﬁ",
    ]
    for _ in range(2_000):
        text = "".join(rng.choices(signs, k=rng.randint(0, 60)))
        assert composed(text) == unicodedata.normalize("NFC", text)


def test_any_text_gives_keys_within_the_bounds() -> None:
    rng = random.Random(11)
    pieces = [
        "a", "B", "_", ".", "/", "\\", ":", "://", "http", "https://", "C:\\", "@", "()", " ", "  ", "\n", "-", "~",
        "$", "(", ")", "{", "}", "'", "Ada ", "Lovelace", "is ", "é", "e\u0301", "\u200b", "\x00", "日", "1", "22",
        "foo_bar", "x.py", "?", "&", "token=", "#", "self.", "\ud800", "İ", "Ǆ",
    ]  # fmt: skip
    kinds = set()
    for _ in range(4_000):
        found = entities("".join(rng.choices(pieces, k=rng.randint(0, 80))))
        assert len(found) <= MAX_ENTITIES
        for key in found:
            kind, _, name = key.partition(":")
            kinds.add(kind)
            assert name
            assert len(key) <= MAX_KEY_CHARS
            assert key.isprintable()
            assert unicodedata.is_normalized("NFC", key)
            if kind == "url":
                assert name.startswith(("http://", "https://"))
                assert "token=" not in name.partition("?")[2]
                assert "#" not in name
    assert kinds == {"identifier", "path", "url", "name"}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "piece",
    [
        "a.", "a", "A", "_", "a_", "/", "./", "../", "/a", "a/", "Aa ", "Aa", "aA", "Aa-", "A'a", "A'Aa ", "Aa Aa(",
        ":", "://", "http://", "https://a", "https://a:b@", "http://a?b=c&", "http://a((((", "http://a))))", "C:\\",
        "C:\\a", "C:\\a b\\", "a@", "()", "a()", ".", "-", "$", "~", "\\", "\\n", "1", "1a", "a1B2", " ", "\n",
        "self.", "é", "éÉ", "É ", "e\u0301", "\u0301", "\u0316\u0301", "日", "日 ", "\x00", "a.b.c ", "a-b.c-d.",
        ", Ada Lovelace", "comm_1", "proc_1_", "\u1100\u1161\u11a8",
    ],
    ids=repr,
)  # fmt: skip
def test_a_megabyte_of_anything_is_read_at_once(piece: str) -> None:
    for text in (piece * (1_000_000 // len(piece)), f"some_name {piece * 100_000}"):
        found = entities(text)
        assert len(found) <= MAX_ENTITIES


@pytest.mark.timeout(30)
def test_accents_in_the_wrong_order_are_read_at_once() -> None:
    assert entities("some_name e" + "\u0301" * 45_000 + "\u0316" * 45_000 + " other_name") == {
        "identifier:some_name",
        "identifier:other_name",
    }


# --- a real graph ---


@pytest.fixture(scope="module")
def nodes() -> dict[str, Node]:
    """Nodes of the example graph by id."""
    return {node.id: node for node in read_graph(EXAMPLE).nodes}


@pytest.mark.parametrize(
    ("node_id", "keys"),
    [
        (
            "Function:control_plane/reading/tools.py:callers_of",
            {"identifier:callers_of", "identifier:OpenCapsule", "identifier:_calls"},
        ),
        ("Function:common/capsule/capacity.py:_weights", {"identifier:_weights"}),
        (
            "Class:common/capsule/capacity.py:Costs",
            {f"identifier:{name}" for name in ("msgspec.Struct", "other.payload", "other.toc", "other.vectors")},
        ),
        (
            "Function:common/graph/names.py:safe_base_name",
            {
                "identifier:safe_base_name",
                "identifier:base_name",
                "identifier:unicodedata.normalize",
                "identifier:MAX_BASE_NAME_BYTES",
                "identifier:FALLBACK_BASE_NAME",
                "identifier:_unsafe",
            },
        ),
        (
            "Function:common/text.py:split_identifier",
            {
                "identifier:split_identifier",
                "identifier:getUserById",
                "identifier:HTTPServer2",
                "identifier:max_snippet_chars",
                "identifier:userIDs",
                "identifier:_split",
                "identifier:_split_cached",
                "identifier:_CACHED_LENGTH",
            },
        ),
        ("TypeAlias:native/src/python.rs:VectorRows", {"identifier:VectorRows", "identifier:PyBytes"}),
    ],
)  # fmt: skip
def test_symbols_of_the_example_graph(nodes: dict[str, Node], node_id: str, keys: set[str]) -> None:
    assert entities(nodes[node_id].properties["content"]) == keys


def test_the_readme_of_the_example_graph(nodes: dict[str, Node]) -> None:
    content = nodes["File:README.md"].properties["content"]
    assert of("url", content) == {
        "https://www.npmjs.com/package/gitnexus",
        "https://www.memvid.com",
        "http://127.0.0.1:8080",
        "http://127.0.0.1:4747",
    }
    assert of("path", content) >= {"docs/capsule.md", "docs/decisions.md"}
    assert of("name", content) == set()


def test_the_path_and_the_name_of_every_symbol_are_found_in_its_id(nodes: dict[str, Node]) -> None:
    functions = [
        node for node in nodes.values() if node.label == "Function" and "_" in node.properties["name"].strip("_")
    ]
    assert len(functions) > 400
    for node in functions:
        found = entities(f"Function: {node.properties['name']}\nid={node.id}\n")
        assert found >= {f"path:{node.properties['filePath']}", f"identifier:{node.properties['name']}"}, node.id
