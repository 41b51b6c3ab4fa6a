"""How to go on from a run: the commands and the few lines of Python, ready to copy."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from peftcli.reports.record import Record


@dataclass(frozen=True)
class Usage:
    """One thing to do with a run: what, why, and the text to copy."""

    title: str
    why: str
    code: str


def commands(run: Record) -> list[Usage]:
    """Repeat, load, merge and undo for this run; only what can be done with what it left."""
    about = run.report.get("run") or {}
    name = str(about.get("name") or run.config.get("name") or "")
    folder = str(PurePath(str(run.config.get("output") or "runs")) / run.path.absolute().name)
    quoted = shlex.quote(folder)
    entries = []
    if about.get("status") not in (None, "done"):
        why = "From its last checkpoint, exactly as if it had not stopped."
        entries.append(Usage("Continue it", why, f"peft train --resume {quoted}"))
    if name:
        repeat = shlex.join(["peft", "train", name, *run.overrides])
        why = "The same recipe, overrides and seed give the same adapter on the same machine and versions."
        entries.append(Usage("Repeat it", why, repeat))
    if not (run.report.get("adapter") or {}).get("path"):
        return entries
    if _few_shot(run):
        return [*entries, *_examples(run, quoted), *(_undo() if run.adapter_config else ())]
    pictures = (run.config.get("task") or {}).get("type") == "images"
    code = f"peft eval {quoted}\npeft predict {quoted} --input {'pictures/' if pictures else 'rows.jsonl'}"
    entries.append(Usage("Use it", f"Measure it again, or answer new {'pictures' if pictures else 'rows'}.", code))
    return entries + (_adapter(run, folder) if run.adapter_config else _model(run, folder))


def _few_shot(run: Record) -> bool:
    return (run.config.get("task") or {}).get("type") == "episodes"


def _examples(run: Record, quoted: str) -> list[Usage]:
    """What a few-shot run is for: classes of one's own, by some examples of each."""
    pictures = (run.config.get("task") or {}).get("reads") != "text"
    things, support = ("pictures/", "examples/") if pictures else ("rows.jsonl", "examples.csv")
    kind = "a folder of pictures for each" if pictures else "rows with `text` and `label`"
    return [
        Usage(
            "Use it",
            f"Tell classes of your own apart by some examples of each ({kind}).",
            f"peft predict {quoted} --support {support} --input {things} --explain",
        ),
        Usage(
            "Measure it again",
            "More tasks of each domain, directly and after fine-tuning the model of each task.",
            f"peft eval {quoted} --episodes 600\npeft eval {quoted} --episodes 50 --then lora",
        ),
        Usage(
            "Merge it",
            "The plain model of one task; its answers are checked.",
            f"peft merge {quoted} --support {support} --to merged",
        ),
    ]


def _adapter(run: Record, folder: str) -> list[Usage]:
    return [
        Usage("Load it in Python", "Plain PEFT, on the untouched base.", _python(run, folder)),
        Usage(
            "Merge it",
            "A plain model folder without any trace of PEFT; the difference to the unmerged model is checked.",
            f"peft merge {shlex.quote(folder)} --to merged",
        ),
        *_undo(),
    ]


def _undo() -> list[Usage]:
    return [
        Usage(
            "Undo it",
            "The base was never changed: without the folder adapter/ it is all there is. In Python, switch the adapter "
            "off for a while or take it out for good:",
            "with model.disable_adapter():\n    ...  # the base answers here\nbase = model.unload()",
        )
    ]


def _model(run: Record, folder: str) -> list[Usage]:
    loader = _loader(run)
    load = f"from transformers import {loader}\n\nmodel = {loader}.from_pretrained({str(PurePath(folder) / 'model')!r})"
    return [Usage("Load it in Python", "This method changes the base itself, so the whole model was saved.", load)]


def _loader(run: Record) -> str:
    head, kind = ((run.config.get("task") or {}).get(key) for key in ("head", "type"))
    if kind == "images":
        return "AutoModelForImageClassification"
    return "AutoModelForSequenceClassification" if head == "linear" else "AutoModelForCausalLM"


def _python(run: Record, folder: str) -> str:
    model, loader = run.config.get("model") or {}, _loader(run)
    base = repr(str(model.get("name") or run.adapter_config.get("base_model_name_or_path") or "BASE"))
    lines = ["import peftcli", "from peft import PeftModel", f"from transformers import {loader}"]
    options = _revision(model)
    if finder := {"sample": "sample_folder", "bundled": "bundled"}.get(str(model.get("source"))):
        lines.insert(2, f"from peftcli.config.paths import {finder}")
        base = f"{finder}({base})"
    if loader != "AutoModelForCausalLM":
        options += f", num_labels={_labels(run)}"
    if loader == "AutoModelForImageClassification":
        options += ", ignore_mismatched_sizes=True"
    lines += [
        "",
        "peftcli.register_with_peft()",
        f"base = {loader}.from_pretrained({base}{options})",
        f"model = PeftModel.from_pretrained(base, {str(PurePath(folder) / 'adapter')!r})",
    ]
    return "\n".join(lines)


def _revision(model: dict[str, Any]) -> str:
    return f", revision={str(model['revision'])!r}" if model.get("revision") and model.get("source") == "hub" else ""


def _labels(run: Record) -> int | str:
    """How many classes there are."""
    return len(run.report.get("labels") or []) or "..."
