"""File names of capsules, made from what a client calls its source."""

from __future__ import annotations

import re
import unicodedata

MAX_BASE_NAME_BYTES = 120
FALLBACK_BASE_NAME = "graph"

_ENDINGS = re.compile(r"(\.(gz|zst|ndjson|jsonl|json|graph|export))+$", re.IGNORECASE)
_FORBIDDEN = frozenset('/\\:*?"<>|')


def base_name_of(file_name: str) -> str:
    """What a graph's file name says about its source: ``app.graph.ndjson.gz`` gives ``app``."""
    return _ENDINGS.sub("", file_name) or file_name


def safe_base_name(base_name: str) -> str:
    """Make a text safe as the beginning of a file name.

    Separators, characters that Windows forbids, control, format and unassigned characters become ``-``; leading dots
    and dashes and trailing dots go; at most 120 bytes of UTF-8 stay, cut between characters. Never empty.
    """
    text = unicodedata.normalize("NFC", base_name[: 8 * MAX_BASE_NAME_BYTES])
    text = "".join("-" if _unsafe(character) else character for character in text)
    text = text.strip(" .-")
    text = text.encode()[:MAX_BASE_NAME_BYTES].decode(errors="ignore").rstrip(" .-")
    return text or FALLBACK_BASE_NAME


def _unsafe(character: str) -> bool:
    category = unicodedata.category(character)
    return character in _FORBIDDEN or category[0] == "C" or category in ("Zl", "Zp")


def capsule_file_name(base_name: str, date: str) -> str:
    """``{baseName}-gitnexus-mem_capsule-{YYYY-MM-DD}.mv2``; ``date`` is an ISO date, or a time that begins with one."""
    return f"{safe_base_name(base_name)}-gitnexus-mem_capsule-{date[:10]}.mv2"
