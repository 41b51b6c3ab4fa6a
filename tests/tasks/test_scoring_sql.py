"""Execution match on SQLite databases, and what a query may not do there."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from peftcli.config import frozen
from peftcli.config.compose import compose
from peftcli.config.errors import UserError
from peftcli.config.rules import SCORED
from peftcli.config.schema import GenerationConfig
from peftcli.tasks.scoring import registry, sql
from peftcli.tasks.scoring.contract import Answered


@pytest.fixture
def databases(tmp_path):
    folder = tmp_path / "database" / "singers"
    folder.mkdir(parents=True)
    with sqlite3.connect(folder / "singers.sqlite") as connection:
        connection.execute("CREATE TABLE singer (name TEXT, age INTEGER)")
        connection.executemany("INSERT INTO singer VALUES (?, ?)", [("Ann", 30), ("Bo", 40), ("Cy", 30), ("Cy", 30)])
        connection.execute("INSERT INTO singer VALUES (CAST(x'ff41' AS TEXT), NULL)")
    connection.close()
    return tmp_path / "database"


@pytest.fixture
def judged(databases):
    scorer = registry.build(GenerationConfig(scoring="sql", databases=str(databases)))

    def judge(expected, written):
        return scorer.score([Answered({"database": "singers"}, expected, [written])])

    return judge


ALL = "SELECT name FROM singer"


@pytest.mark.parametrize(
    ("expected", "written", "right"),
    [
        (ALL, "select s.name from singer as s;", True),
        (ALL, "SELECT name FROM singer ORDER BY age DESC", True),
        (ALL, "SELECT DISTINCT name FROM singer", False),
        ("SELECT name FROM singer ORDER BY age DESC, name", "SELECT name FROM singer ORDER BY age, name", False),
        ("SELECT name FROM singer ORDER BY name", "SELECT name FROM singer ORDER BY name ASC", True),
        ("SELECT avg(age) FROM singer WHERE age = 30", "SELECT 30", True),
        ("SELECT name, age FROM singer", "SELECT age, name FROM singer", False),
        ("SELECT name FROM singer WHERE age > 99", "SELECT name FROM singer WHERE 0", True),
        ("SELECT name FROM singer WHERE age > 99", "", False),
        ("SELECT name FROM singer WHERE age > 99", "nothing", False),
        ("SELECT name FROM singer WHERE age > 99", "-- nothing", False),
        (ALL, f"```sql\n{ALL};\n```\nThis lists them.", True),
        (ALL, f"{ALL};\n\nQuestion: how many?", True),
        (ALL, f"{ALL}\n\nQuestion: how many?", True),
        ("SELECT ';'", "SELECT ';'; SELECT 2", True),
        (ALL, "SELECT nome FROM singer", False),
        (ALL, "SELECT name FROM singers", False),
        (ALL, "\x00", False),
        (ALL, "\ud800", False),
    ],
)
def test_what_a_query_returns_decides(judged, expected, written, right):
    found = judged(expected, written)
    assert found.metrics["execution_match"] == float(right)
    assert found.right == [right]
    assert (found.remarks == [""]) is right


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER  BY a", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a LIMIT 1)", False),
        ("SELECT 'order by' FROM t", False),
        ('SELECT "order by" FROM t -- order by', False),
        ("SELECT a FROM t WHERE b IN (SELECT max(b) FROM t ORDER BY 1) order\nby a", True),
        ("SELECT a FROM t GROUP BY a", False),
    ],
)
def test_only_the_outermost_order_counts(query, ordered):
    assert sql.is_ordered(query) is ordered


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE singer",
        "DELETE FROM singer",
        "UPDATE singer SET age = 1",
        "INSERT INTO singer VALUES ('x', 1)",
        "CREATE TABLE x (a)",
        "CREATE TEMP TABLE x AS SELECT 1",
        "ATTACH DATABASE '/tmp/x.db' AS x",
        "VACUUM INTO '/tmp/x.db'",
        "PRAGMA query_only = off",
        "PRAGMA writable_schema = 1",
        "SELECT load_extension('/tmp/x.so')",
        "SELECT readfile('/etc/passwd')",
        "BEGIN",
        "WITH x AS (SELECT 1) DELETE FROM singer",
        f"{ALL}; DROP TABLE singer",
        "SELECT 1; SELECT 2",
        "SELECT zeroblob(1000000000)",
    ],
)
def test_a_query_can_only_read(databases, query):
    path = databases / "singers" / "singers.sqlite"
    before = path.read_bytes()
    with pytest.raises((sqlite3.Error, sqlite3.Warning)):
        sql.run(path, query)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["singers.sqlite"]


def test_a_query_without_end_is_stopped(databases, monkeypatch):
    path = databases / "singers" / "singers.sqlite"
    monkeypatch.setattr(sql, "SECONDS", 0.3)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT"
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        sql.run(path, f"{endless} count(*) FROM n")
    monkeypatch.setattr(sql, "SECONDS", 60)
    with pytest.raises(sqlite3.OperationalError, match="rows"):
        sql.run(path, f"{endless} i FROM n")
    monkeypatch.setattr(sql, "MEMORY", 8 << 20)
    with pytest.raises(sqlite3.OperationalError):
        sql.run(path, f"{endless} i FROM n ORDER BY i")
    with pytest.raises(sqlite3.OperationalError, match="long"):
        sql.run(path, f"{endless} hex(zeroblob(400000)) FROM n")


def test_a_saved_run_finds_the_databases_from_any_folder():
    config = compose("mamba/spider_sdt", ["task.databases=spider/database"]).config
    assert frozen.anchored(config).task.databases == str(Path.cwd() / "spider" / "database")


def test_no_databases_compare_the_texts():
    scorer = registry.build(GenerationConfig(scoring="sql"))
    assert "task.databases" in scorer.notes[0]
    assert scorer.judged == "text (no query was run)"
    assert scorer.columns == ()
    found = scorer.score([Answered({}, "SELECT 1", ["SELECT 1"])])
    assert found.metrics["exact_match"] == 1.0
    assert "execution_match" not in found.metrics


def test_what_is_wrong_with_the_databases(databases, judged):
    with pytest.raises(UserError, match="is no folder"):
        registry.build(GenerationConfig(scoring="sql", databases="nowhere"))
    scorer = registry.build(GenerationConfig(scoring="sql", databases=str(databases)))
    assert scorer.metrics == SCORED["sql"]
    for name in ("singer", "../database/singers", "/etc"):
        with pytest.raises(UserError, match="unknown database"):
            scorer.score([Answered({"database": name}, "SELECT 1", ["SELECT 1"])])
    with pytest.raises(UserError, match="the reference query"):
        judged("SELECT nothing", "SELECT 1")
