"""A measurement that cannot be finished loses nothing of what was trained."""

from __future__ import annotations

import json
import sqlite3

from tests.cli.conftest import write_recipe


def test_a_query_that_the_database_refuses_leaves_the_adapter(peft, checkpoint, made, tmp_path):
    folder = tmp_path / "databases" / "shop"
    folder.mkdir(parents=True)
    with sqlite3.connect(folder / "shop.sqlite") as database:
        database.execute("CREATE TABLE items (name TEXT)")
    rows = [{"question": "all", "query": "SELECT price FROM items", "db": "shop"}] * 3
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "test")}
    for path in files.values():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(
        checkpoint, files, tmp_path,
        data={
            "source": "files", "files": {split: str(path) for split, path in files.items()}, "validation_share": 0.0,
            "columns": {"database": "db"},
        },
        task={
            "type": "generation", "scoring": "sql", "prompt": "{question}: ", "completion": "{query}",
            "databases": str(tmp_path / "databases"), "max_new_tokens": 4,
        },
        training={"max_steps": 1, "batch_size": 2, "precision": "fp32"},
    )  # fmt: skip
    result = peft("train", recipe, "--quiet")
    assert result.exit_code == 2
    assert "no such column: price" in result.output
    assert (made().adapter / "adapter_model.safetensors").is_file()
