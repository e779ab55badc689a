"""Every statement gets its parameters in a form that all versions of Python take.

A numbered placeholder has a name to some versions, and one with a name is to be given a mapping: warned of since 3.12,
refused since 3.14. Source: Python's sqlite3, "How to use placeholders to bind values in SQL queries".
"""

import ast
import re
from pathlib import Path

import pytest

SERVICES = Path(__file__).parents[2] / "services"
SQL = re.compile(r"\b(SELECT|INSERT|UPDATE|DELETE|VALUES|WHERE)\b")
NUMBERED = re.compile(r"\?\d")
NAMED = re.compile(r"(?<!:)[:@$][a-z]\w*", re.ASCII)


def sql_of(call: ast.Call) -> str:
    """What of its statement stands in the call itself, without the quoted values in it."""
    literals = [node.value for node in ast.walk(call.args[0]) if isinstance(node, ast.Constant)]
    return re.sub(r"'[^']*'", "''", "".join(text for text in literals if isinstance(text, str)))


def is_sequence(node: ast.expr) -> bool:
    return isinstance(node, ast.Tuple | ast.List | ast.ListComp)


def complaints(source: str) -> list[int]:
    """The lines of statements with numbered placeholders, and of those with names that are given a sequence."""
    nodes = list(ast.walk(ast.parse(source)))
    texts = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and len(node.args) > 1]
    numbered = [text.lineno for text in texts if SQL.search(text.value) and NUMBERED.search(text.value)]
    named = [call.lineno for call in calls if is_sequence(call.args[1]) and NAMED.search(sql_of(call))]
    return numbered + named


@pytest.mark.parametrize(
    "statement",
    [
        'view.one("SELECT a FROM t WHERE a = ?1", (1,))',
        'SQL = "SELECT a FROM t WHERE a = ?2"',
        'view.execute("SELECT a FROM t" + " WHERE a = :a", [1])',
        'view.execute("SELECT a FROM t"\n" WHERE a = @a", (1,))',
        'view.execute(f"SELECT {columns} FROM t WHERE a = $a", (1,))',
    ],
)
def test_a_statement_that_some_python_refuses_is_seen(statement: str) -> None:
    assert complaints(statement)


@pytest.mark.parametrize(
    "statement",
    [
        'view.one("SELECT a FROM t WHERE a = ?", (1,))',
        'view.one("SELECT a FROM t WHERE a = :a", {"a": 1})',
        "view.one(\"SELECT a FROM t WHERE a = ':a' AND b = ?\", (1,))",
    ],
)
def test_a_statement_that_every_python_takes_passes(statement: str) -> None:
    assert not complaints(statement)


def test_the_services_have_no_statement_that_some_python_refuses() -> None:
    found = {str(path): complaints(path.read_text("utf-8")) for path in sorted(SERVICES.rglob("*.py"))}
    assert len(found) > 50
    assert {path: lines for path, lines in found.items() if lines} == {}
