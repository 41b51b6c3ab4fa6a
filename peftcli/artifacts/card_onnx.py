"""What the card of an ONNX folder says: the lines of Python that run it, and how its files compare with PyTorch."""

from __future__ import annotations

import json
from typing import Any

from peftcli.models.image_reader import ImageReader

OPEN = """\
import numpy as np
import onnxruntime
{imports}
session = onnxruntime.InferenceSession("model.onnx")  # in the folder of this file; pip install {packages}
"""
OF_PICTURES = """\
with open("labels.json", encoding="utf-8") as file:
    labels = json.load(file)
picture = ImageOps.exif_transpose(Image.open("YOUR PICTURE")).convert("RGB")
{fit}
pixels = (np.asarray(picture) / 255 - {mean}) / {std}
scores = session.run(None, {{"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)}})[0][0]
chances = {chance}
print({{label: round(float(chance), 3) for label, chance in zip(labels, chances)}})
"""
SHORTER = """\
scale = {edge} / min(picture.size)
picture = picture.resize([int(side * scale + 1e-6) for side in picture.size], {resample})"""
SQUASHED = "picture = picture.resize(({edge}, {edge}), {resample})"
CUT = """
left, top = (picture.width - {size}) // 2, (picture.height - {size}) // 2
picture = picture.crop((left, top, left + {size}, top + {size}))"""
SOFTMAX, SIGMOID = "np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()", "1 / (1 + np.exp(-scores))"
RUN = 'session.run(None, {{"input_ids": ids, "attention_mask": np.ones_like(ids)}})[0]'
CLASSES = f"""
with open("labels.json", encoding="utf-8") as file:
    labels = json.load(file)
print(labels[{RUN}[0].argmax()])"""
WORDS = f"""
scores = {RUN}[0, -1]  # of every token that may come next
first = {{first}}  # the first token of each label's word
print(max(first, key=lambda label: scores[first[label]]))"""
ANSWER = f"""
start = ids.shape[1]
for _ in range({{most}}):  # each token reads the whole text again: the graph keeps no cache
    following = {RUN}[0, -1].argmax()
    if following == tokenizer.eos_token_id:
        break
    ids = np.append(ids, [[following]], axis=1)
print(tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())"""


def of_pictures(task: dict[str, Any], reader: ImageReader) -> str:
    """Lines that put a picture to the file, as the reader does."""
    fit = (SQUASHED if reader.squash else SHORTER).format(edge=reader.edge, resample=reader.resample)
    fit += CUT.format(size=reader.size) if reader.edge != reader.size or not reader.squash else ""
    head = OPEN.format(imports="from PIL import Image, ImageOps\n", packages="onnxruntime pillow")
    chance = SIGMOID if task["multilabel"] else SOFTMAX
    body = OF_PICTURES.format(fit=fit, mean=list(reader.mean), std=list(reader.std), chance=chance)
    return f"import json\n\n{head}{body}"


def of_text(lineage: dict[str, Any], prompt: str, ids: str) -> str:
    """Lines that put a text to the file.

    Args:
        lineage: With its task.
        prompt: A Python expression for the text.
        ids: Lines that make a row of tokens of `prompt`.
    """
    task, labels, tokens = (lineage.get(key) for key in ("task", "labels", "label_tokens"))
    assert task is not None
    first = dict(zip(labels, tokens, strict=True)) if labels and tokens else {}
    if task["type"] == "generation":
        ask = ANSWER.format(most=task["max_new_tokens"])
    elif task["head"] == "linear":
        ask = CLASSES.format()
    else:
        ask = WORDS.format(first=json.dumps(first, ensure_ascii=False))
    head = OPEN.format(imports="from transformers import AutoTokenizer\n", packages="onnxruntime transformers")
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained(".")'
    return ("import json\n\n" if "json." in ask else "") + f"{head}{tokenizer}\nprompt = {prompt}\n{ids}{ask}\n"


def files(report: dict[str, Any]) -> list[str]:
    """A section on the files: their sizes, how far their scores are from those of the model in PyTorch, their speed."""
    rows = [
        "| | MB | mean difference | worst, of spread | same highest | median ms | p95 ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, about in report["files"].items():
        drift, speed = about.get("drift"), about["latency"]
        cells = [""] * 4
        if drift:
            cells = [f"{about['bytes'] / 1e6:.2f}", f"{drift['mean']:.3g}"]
            cells += [f"{drift['share']:.4%}", f"{drift['agreement']:.1%}"]
        cells += [f"{speed['median']:.2f}", f"{speed['p95']:.2f}"]
        rows.append(f"| {' | '.join([name, *cells])} |")
    what = (
        f"Compared with PyTorch in float32 on {report['rows']} {report['source']}, {report['positions']:,} positions. "
        "The run may have measured itself in other arithmetic. "
        f"Milliseconds are of one row at a time on the machine that wrote this, threads: {report['threads']}. "
    )
    if "model.pt2" in report["files"]:
        what += (
            "`model.pt2` is the same for PyTorch alone: `torch.export.load('model.pt2').module()(*inputs)`, the inputs "
            "as tensors in the order of those above. "
        )
    if "model.int8.onnx" in report["files"]:
        what += (
            "`model.int8.onnx` runs by the same lines; its weights are 8-bit and its activations rounded as they come."
        )
    return ["## Files", "", *rows, "", what.strip(), ""]


def metrics(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The files' metrics by what the card's table calls them; nothing where they were not measured."""
    over = f"{report['measured_rows']} rows"
    return {f"{name}, {over}": about["metrics"] for name, about in report["files"].items() if "metrics" in about}
