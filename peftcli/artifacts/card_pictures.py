"""What a model card says of a model of pictures: its task, and the lines of Python that put a picture to it."""

from __future__ import annotations

import json
from typing import Any

from peftcli.tasks.images import alarms

IMPORT = "AutoImageProcessor"
"""Stands where a language model's card imports its tokenizer."""
ASK = """
from PIL import Image, ImageOps

labels = {labels}
upright = ImageOps.exif_transpose(Image.open("YOUR PICTURE"))
picture = processor(upright.convert("RGB"), return_tensors="pt")
chances = model(**picture{more}).logits[0].{chance}
print({{label: round(chance, 3) for label, chance in zip(labels, chances.tolist())}})"""
RESIZED = ("ViT", "DeiT")
"""Architectures that ask to be told of pictures of another size."""


def facts(lineage: dict[str, Any]) -> dict[str, str]:
    """How the model was trained."""
    task = lineage["task"]
    found = {"task": task["type"], "labels": ", ".join(lineage.get("labels") or [])}
    if looked_for := lineage.get("alarms"):
        found["to be found"] = looked_for["positive"]
        if (least := _least(lineage)) is not None:
            rate, count = task["false_alarms"], len(looked_for["others"])
            found["score"] = (
                f"above {least:.4g}, for a share of false alarms of {rate:g} by {count} validation pictures"
            )
    if task["image_size"]:
        found["pictures"] = f"{task['image_size']} x {task['image_size']} pixels"
    return found


def ask(lineage: dict[str, Any], kind: str, whole: bool) -> list[str]:
    """Lines that put a picture to the model.

    Args:
        lineage: With the task and its labels.
        kind: The Transformers class.
        whole: The folder holds a whole model, made for its size of pictures, and not an adapter.
    """
    task, labels = lineage["task"], lineage.get("labels") or []
    resized = task["image_size"] and not whole and kind.startswith(RESIZED)
    more = ", interpolate_pos_encoding=True" if resized else ""
    chance = "sigmoid()" if task["multilabel"] else "softmax(0)"
    return [ASK.format(labels=json.dumps(labels, ensure_ascii=False), more=more, chance=chance), *verdict(lineage)]


def verdict(lineage: dict[str, Any]) -> list[str]:
    """A line that says what the chances mean where one of two labels is looked for; none elsewhere."""
    if (least := _least(lineage)) is None:
        return []
    labels, positive = lineage["labels"], lineage["alarms"]["positive"]
    [other] = [label for label in labels if label != positive]
    return [f"print({positive!r} if chances[{labels.index(positive)}] > {least:.7g} else {other!r})"]


def _least(lineage: dict[str, Any]) -> float | None:
    """The probability above which a picture has what is looked for; None where none was set."""
    known = alarms.known(lineage.get("alarms"))
    return known.probability(lineage["task"]["false_alarms"]) if known else None


def reads(code: str) -> str:
    """A card's lines with an image processor, which lies in the folder itself, in the tokenizer's place."""
    lines = [
        'processor = AutoImageProcessor.from_pretrained(".")' if line.startswith("tokenizer = ") else line
        for line in code.replace("AutoTokenizer", IMPORT).splitlines()
    ]
    first = next(i for i, line in enumerate(lines) if line.startswith("from transformers import "))
    names = sorted(lines[first].removeprefix("from transformers import ").split(", "))
    lines[first] = f"from transformers import {', '.join(names)}"
    return "\n".join(lines) + "\n"
