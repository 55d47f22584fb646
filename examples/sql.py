"""Questions over a table, answered in SQL: text that is no JSON, and so has no schema.

    python examples/sql.py    writes sql_train.jsonl and sql_heldout.jsonl here

A prompt shows a table and two of its rows; the row's `database` holds all of them, so that nothing
can be read off, and its `reference` is a query that is right. Two rewards: `well_formed`, for which
sqlglot parses (`pip install sqlglot`), and `right`, for which Python's own SQLite runs the query.
"""

import json
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import sqlglot
from sqlglot.errors import SqlglotError
from sqlglot.expressions import CTE, Alias, Column, Select, Table, TableAlias

LONGEST = 500  # characters of an answer
MOST_SELECTS = 4  # in it: SQLite may write one out wherever another uses it, exponentially often
MOST_STEPS = 100_000  # of SQLite's machine; a query over a few rows takes some hundred
MOST_BYTES = 10_000  # of a value
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ}
FUNCTIONS = {"abs", "avg", "count", "like", "lower", "max", "min", "round", "sum", "upper"}

# Training and held-out rows share neither tables nor wordings. A table t: columns for a name n, a
# kind k and a number x, and the kinds that there are; a question asks for one kind v, a limit m.
TABLES = {
    "train": [
        ("orders", "customer", "city", "total", ["Leeds", "Porto", "Graz"]),
        ("books", "title", "genre", "pages", ["poetry", "crime", "travel"]),
        ("staff", "surname", "team", "salary", ["sales", "legal", "design"]),
    ],
    "heldout": [
        ("flights", "code", "airline", "minutes", ["Arrow", "Nimbus", "Polar"]),
        ("plants", "species", "bed", "height", ["north", "pond", "wall"]),
    ],
}
QUESTIONS = {
    "train": {
        "How many {t} have the {k} {v}?": "SELECT COUNT(*) FROM {t} WHERE {k} = '{v}'",
        "Each {n} of {t} with {x} above {m}.": "SELECT {n} FROM {t} WHERE {x} > {m}",
        "For each {k}, the sum of {x}.": "SELECT {k}, SUM({x}) FROM {t} GROUP BY {k}",
    },
    "heldout": {
        "Which {k} occur, and how often?": "SELECT {k}, COUNT(*) FROM {t} GROUP BY {k}",
        "The {n} of the three {t} that have most {x}, from most to least.": (
            "SELECT {n} FROM {t} ORDER BY {x} DESC LIMIT 3"
        ),
    },
}


def draw_row(rng: Random, part: str) -> dict[str, Any]:
    """A line of the data file."""
    table, name, kind, number, kinds = rng.choice(TABLES[part])
    numbers = rng.sample(range(100, 1000), 12)  # all different: an order has no ties
    rows = [(f"{name[0].upper()}{i:02}", rng.choice(kinds), x) for i, x in enumerate(numbers)]
    create = f"CREATE TABLE {table} ({name} TEXT, {kind} TEXT, {number} INTEGER);"
    insert = [f"INSERT INTO {table} VALUES {values};" for values in rows]
    asked, reference = rng.choice([*QUESTIONS[part].items()])
    words = {"t": table, "n": name, "k": kind, "x": number}
    words |= {"v": rng.choice(rows)[1], "m": sorted(numbers)[rng.randint(3, 8)]}
    system = "Answer with one SELECT statement in SQLite's dialect, as plain text without a fence."
    user = "\n".join(["A table, and two of its rows:", create, *insert[:2], asked.format(**words)])
    return {
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "database": "\n".join([create, *insert]),
        "reference": reference.format(**words),
    }


def well_formed(completion: str, row: dict[str, Any]) -> float:
    """0.5 for a single SELECT, 1 if it reads tables that there are, and names no other columns.

    SQLite by itself takes a column in double quotes that is not there for a string.
    """
    text = answer(completion)
    try:
        [tree] = sqlglot.parse(text, read="sqlite") if len(text) <= LONGEST else []
    except (SqlglotError, ValueError, RecursionError):  # not one statement; brackets without end
        return 0.0
    if not isinstance(tree, Select) or len([*tree.find_all(Select)]) > MOST_SELECTS:
        return 0.0
    columns = columns_by_table(row["database"])
    own = {cte.alias.lower() for cte in tree.find_all(CTE)}
    tables = [table for table in tree.find_all(Table) if table.name.lower() not in own]
    if not tables or any(table.db or table.name.lower() not in columns for table in tables):
        return 0.5
    known = {"*"}.union(*(columns[table.name.lower()] for table in tables))
    known |= {each.alias.lower() for each in tree.find_all(Alias)}
    known |= {c.name.lower() for each in tree.find_all(TableAlias) for c in each.columns}
    return 1.0 if all(c.name.lower() in known for c in tree.find_all(Column)) else 0.5


def right(completion: str, row: dict[str, Any]) -> float:
    """1 for the result that the reference has, in any order where that has none."""
    if well_formed(completion, row) < 1.0:
        return 0.0
    with closing(open_database(row["database"])) as db:
        wanted = db.execute(row["reference"]).fetchall()
        restrain(db)
        try:
            found = db.execute(answer(completion)).fetchmany(len(wanted) + 1)
        except (sqlite3.Error, ValueError):  # half a surrogate pair is a ValueError
            return 0.0
    in_order = "ORDER BY" in row["reference"]
    return float(found == wanted if in_order else Counter(found) == Counter(wanted))


def answer(completion: str) -> str:
    """What follows the last `</think>`."""
    return completion.rpartition("</think>")[2]


def columns_by_table(script: str) -> dict[str, set[str]]:
    """What there is in a database, in lower case."""
    with closing(open_database(script)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master")]
        asked = "SELECT lower(name) FROM pragma_table_info(?)"
        return {t.lower(): {name for (name,) in db.execute(asked, [t])} for t in tables}


def open_database(script: str) -> sqlite3.Connection:
    """A database in memory, made by SQL that we have written."""
    db = sqlite3.connect(":memory:")
    db.executescript(script + "PRAGMA temp_store = MEMORY;")  # no file to sort in either
    return db


def restrain(db: sqlite3.Connection) -> None:
    """From now on it answers questions alone: no writing, no files, no recursion, no long work."""

    def allow(action: int, _: str | None, name: str | None, *__: str | None) -> int:
        known = action == sqlite3.SQLITE_FUNCTION and name in FUNCTIONS
        return sqlite3.SQLITE_OK if known or action in READING else sqlite3.SQLITE_DENY

    db.set_authorizer(allow)
    db.set_progress_handler(lambda: 1, MOST_STEPS)  # called after so many; 1 ends the query
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)


def main() -> None:
    """Writes the data files, the same rows every time."""
    for part, rows in (("train", 400), ("heldout", 100)):
        rng = Random(part)
        lines = [json.dumps(draw_row(rng, part)) + "\n" for _ in range(rows)]
        Path(__file__).with_name(f"sql_{part}.jsonl").write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()
