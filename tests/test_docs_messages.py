"""The messages that docs/troubleshooting.md quotes are those of the code, word for word but for names and numbers."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from parts.documents import blocks
from parts.paths import REPO

FOLDERS = ("manifests", "extract", "distill", "pipeline")
PAGE = (REPO / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = [line for block in blocks(PAGE, "text") for line in block.splitlines()]
LEAST, FEWEST = 0.25, 25  # of a message that must be words of the code, as a share and in characters


@cache
def templates() -> list[tuple[str, re.Pattern[str]]]:
    """Every text of the code with spaces in it: its longest fixed part, and what it can say."""
    found = []
    for path in (path for folder in FOLDERS for path in (REPO / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = fixed_parts(node)
            if longest := max(parts, key=len, default=""):
                found.append((longest, re.compile("(.*)".join(map(re.escape, parts)), re.DOTALL)))
    return [(longest, pattern) for longest, pattern in found if len(longest) >= 9]


def fixed_parts(node: ast.AST) -> list[str]:
    """What stands before, between and after the values of a text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.split(r"%\w", node.value) if " " in node.value else []
    if not isinstance(node, ast.JoinedStr):
        return []
    parts = [""]
    for piece in node.values:
        if isinstance(piece, ast.Constant):
            parts[-1] += str(piece.value)
        else:
            parts.append("")
    return parts


def words_of_the_code(message: str) -> int:
    """Characters of a message that are fixed in texts of the code, of which it may be put together."""
    known: set[int] = set()
    for longest, pattern in templates():
        if longest in message and (match := pattern.search(message)):
            values = {idx for group in range(1, pattern.groups + 1) for idx in range(*match.span(group))}
            known |= set(range(*match.span())) - values
    return len(known)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_one_of_the_code(message: str) -> None:
    assert words_of_the_code(message) >= max(FEWEST, LEAST * len(message))


def test_a_message_that_nobody_says_is_found() -> None:
    assert words_of_the_code("the moon is full; wait until it wanes and run the same command") < 20


def test_each_message_has_a_cause_and_a_cure() -> None:
    sections = re.split(r"^```text\n.*?^```\n", PAGE, flags=re.DOTALL | re.MULTILINE)[1:]
    assert len(sections) >= 15
    assert [section for section in sections if len(section.split()) < 10] == []
