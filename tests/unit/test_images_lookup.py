"""Finding an image by its name, as each container's making does."""

from pathlib import Path

from corral.images import catalog
from corral.images.reference import parse_reference
from corral.images.store import MIGRATIONS
from corral.store import Database, Row, Snapshot
from corral.store.views import Params


class Asked(Snapshot):
    """Keeps the statements."""

    def execute(self, sql: str, params: Params = ()) -> list[Row]:
        self.statements = [*getattr(self, "statements", []), sql]
        return super().execute(sql, params)


def test_the_plan_of_a_look_up_is_the_same_for_every_name(tmp_path: Path):
    """One that depends on the value is made anew at each execution, which takes ten times as long as that."""
    with Database(tmp_path / "images.db", MIGRATIONS, durable=False) as db, db._reader() as connection:
        asked = Asked(connection)
        assert catalog.by_reference(asked, "default", parse_reference("busybox")) is None
        [statement] = asked.statements
        rows = connection.execute(f"EXPLAIN QUERY PLAN {statement}", ("default", "")).fetchall()
        assert any("images_by_name" in row["detail"] for row in rows), [tuple(row) for row in rows]
