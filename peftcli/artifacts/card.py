"""The model card: what a stranger needs to load an adapter and to know where it comes from."""

from __future__ import annotations

import json
from typing import Any

LOAD_ADAPTER = """\
import peftcli
from peft import PeftModel
from transformers import AutoModelFor{auto}

peftcli.register_with_peft()  # pip install peftcli=={version}
base = AutoModelFor{auto}.from_pretrained({base}{revision})
model = PeftModel.from_pretrained(base, "THIS FOLDER")
"""

LOAD_MODEL = """\
from transformers import AutoModelFor{auto}

model = AutoModelFor{auto}.from_pretrained("THIS FOLDER")
"""


def adapter(lineage: dict[str, Any], kind: str, base_class: str, metrics: dict[str, dict[str, float]]) -> str:
    """The card of an adapter of PEFT type `kind` on a base of a Transformers class."""
    return _card(lineage, f"{kind} adapter", "peft", LOAD_ADAPTER, base_class, metrics)


def model(lineage: dict[str, Any], kind: str, metrics: dict[str, dict[str, float]]) -> str:
    """The card of a whole model of the Transformers class `kind`."""
    return _card(lineage, kind, "transformers", LOAD_MODEL, kind, metrics)


def _card(
    lineage: dict[str, Any], what: str, library: str, code: str, class_name: str, metrics: dict[str, dict[str, float]]
) -> str:
    base, version = lineage["base"], lineage["package_version"]
    revision = f", revision={json.dumps(base['revision'])}" if base["revision"] else ""
    auto = class_name.partition("For")[2] or "CausalLM"
    tags = ["peftcli", lineage["method"]]
    facts = {
        "base model": base["id"] + (f" at {base['revision']}" if base["revision"] else ""),
        "base weights (SHA-256)": base["hash"] or "not recorded",
        "method": lineage["method"],
        "training rows (fingerprint)": lineage["data_fingerprint"],
        "config (SHA-256)": lineage["config_hash"],
        "seed": lineage["seed"],
        "made by": f"{lineage['package']} {version}",
    }
    return "\n".join(
        [
            "---",
            f"library_name: {library}",
            f"base_model: {json.dumps(base['id'])}",
            f"tags: {json.dumps(tags)}",
            "license: unknown",
            "---",
            f"# {what} for {base['id']}",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
            *_table(metrics),
            "```python",
            code.format(base=json.dumps(base["id"]), revision=revision, version=version, auto=auto).rstrip(),
            "```",
            "",
            "The licence is not known: it follows from those of the base model and of the training data.",
            "",
        ]
    )


def _table(metrics: dict[str, dict[str, float]]) -> list[str]:
    """A table with a row for each thing measured; nothing where nothing was."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    if not names:
        return []
    rows = [f"| | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for what, values in metrics.items():
        rows.append(f"| {what} | {' | '.join(f'{values[n]:.4g}' if n in values else '' for n in names)} |")
    return [*rows, ""]
