"""What a model card says of a model for few-shot tasks: its task, and the lines of Python that put one to it."""

from __future__ import annotations

import json
from typing import Any

PICTURES = """
from PIL import Image


def read(*files):
    return processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")


support = read("A PICTURE OF CLASS 0", "ANOTHER OF CLASS 0", "A PICTURE OF CLASS 1", "ANOTHER OF CLASS 1")
query = read("YOUR PICTURE")"""
TEXTS = """
from peftcli.models.features import take_off_head

take_off_head(model.get_base_model() if hasattr(model, "get_base_model") else model)


def read(*texts):
    return tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right")


support = read("A TEXT OF CLASS 0", "ANOTHER OF CLASS 0", "A TEXT OF CLASS 1", "ANOTHER OF CLASS 1")
query = read("YOUR TEXT")"""
ASK = """
import torch
from peftcli.methods.episodes import adapted, prototypes, scores

classes = torch.tensor([0, 0, 1, 1])
with torch.no_grad(), adapted(model, support, classes, 2):
    means = prototypes(model(**support).logits, classes, 2)
    print(scores(model(**query).logits, means).argmax(1))"""

MERGED = """\
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(".").eval()  # "." is the folder of this file
tokenizer = AutoTokenizer.from_pretrained(".")
labels = {labels}
prototypes = load_file("prototypes.safetensors")["prototypes"]

ids = tokenizer({prompt}, return_tensors="pt").input_ids
with torch.no_grad():
    feature = model(input_ids=ids).last_hidden_state[0].mean(0)
print(labels[torch.cosine_similarity(feature, prototypes).argmax().item()])
"""
"""Of one task of texts."""


def facts(lineage: dict[str, Any]) -> dict[str, str]:
    """How the model was trained."""
    task = lineage["task"]
    if labels := lineage.get("labels"):
        return {"task": f"one few-shot task, of {task['reads']}", "labels": ", ".join(labels)}
    least, most = task["ways"]
    found = {"task": f"few-shot {task['reads']}, {least} to {most} classes at a time"}
    if task["reads"] == "pictures" and task["image_size"]:
        found["pictures"] = f"{task['image_size']} x {task['image_size']} pixels"
    return found


def ask(lineage: dict[str, Any]) -> list[str]:
    """Lines that put a task of two classes to the model."""
    return [PICTURES if lineage["task"]["reads"] == "pictures" else TEXTS, ASK]


def merged(lineage: dict[str, Any], prompt: str) -> str:
    """The lines that ask a merged model of texts; `prompt` is a Python expression."""
    return MERGED.format(labels=json.dumps(lineage["labels"], ensure_ascii=False), prompt=prompt)
