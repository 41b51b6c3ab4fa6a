"""The model card: what a stranger needs to load an adapter, to ask it, and to know where it comes from."""

from __future__ import annotations

import json
import string
from typing import Any

from peftcli.artifacts import card_episodes, card_onnx, card_pictures
from peftcli.models.quantized import ARGUMENTS, PIP
from peftcli.tasks.layouts import CONVERSATION

LOAD_ADAPTER = """\
import peftcli
from peft import PeftModel
from transformers import AutoModelFor{auto}, AutoTokenizer
{imports}
peftcli.register_with_peft()  # pip install peftcli=={version}
base = AutoModelFor{auto}.from_pretrained({where}{more})
tokenizer = AutoTokenizer.from_pretrained({where})
model = PeftModel.from_pretrained(base, ".").eval()  # "." is the folder of this file
"""
LOAD_MODEL = """\
from transformers import AutoModelFor{auto}, AutoTokenizer
{imports}
model = AutoModelFor{auto}.from_pretrained(".").eval()  # "." is the folder of this file
tokenizer = AutoTokenizer.from_pretrained(".")
"""
SCORES = """\
ids = tokenizer(prompt, return_tensors="pt").input_ids
scores = model(input_ids=ids).logits[0, -1]  # of every token that may come next
first = {first}  # the first token of each label's word
print(max(first, key=lambda label: scores[first[label]].item()))
"""
CLASSES = """\
ids = tokenizer(prompt, return_tensors="pt").input_ids
labels = {labels}
print(labels[model(input_ids=ids).logits[0].argmax().item()])
"""
ANSWER = """\
answer = model.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens={most}, do_sample=False)
print(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip())
"""
PARTS = {"base": "base model", "data": "training data"}
"""What a licence is needed of."""


def adapter(lineage: dict[str, Any], kind: str, base_class: str, metrics: dict[str, dict[str, float]]) -> str:
    """The card of an adapter of PEFT type `kind` on a base of a Transformers class."""
    code = _load_adapter(lineage, base_class) + "\n".join(_ask(lineage, base_class, whole=False))
    return _card(lineage, f"{kind} adapter", "peft", code, metrics)


def model(lineage: dict[str, Any], kind: str, metrics: dict[str, dict[str, float]]) -> str:
    """The card of a whole model of the Transformers class `kind`."""
    if _few_shot(lineage) and lineage.get("labels"):
        code = card_episodes.merged(lineage, _prompt(lineage["task"]["prompt"]))
        return _card(lineage, kind, "transformers", code, metrics)
    code = LOAD_MODEL.format(auto=_auto(kind), imports=_head(kind))
    code = card_pictures.reads(code) if _of_pictures(lineage) else code
    return _card(lineage, kind, "transformers", code + "\n".join(_ask(lineage, kind, whole=True)), metrics)


def onnx(lineage: dict[str, Any], reader: Any, metrics: dict[str, dict[str, float]]) -> str:
    """The card of a folder with a model as ONNX; the lineage has its report, and `reader` is the task's."""
    task, report = lineage["task"], lineage["onnx"]
    if _of_pictures(lineage):
        code = "\n".join([card_onnx.of_pictures(task, reader).rstrip(), *card_pictures.verdict(lineage)]) + "\n"
    else:
        code = card_onnx.of_text(lineage, _prompt(task["prompt"]), _ids(task).replace('"pt"', '"np"'))
    card = _card(lineage, "ONNX model", "onnx", code, metrics | card_onnx.metrics(report))
    return "\n".join([card, *card_onnx.files(report)])


def _card(lineage: dict[str, Any], what: str, library: str, code: str, metrics: dict[str, dict[str, float]]) -> str:
    base, version = lineage["base"], lineage["package_version"]
    facts = {
        "base model": base["id"] + (f" at {base['revision']}" if base["revision"] else ""),
        "base weights (SHA-256)": base["hash"] or "not recorded",
        **({"base weights held in": f"{bits} (bitsandbytes)"} if (bits := base.get("quantization")) else {}),
        "method": lineage["method"],
        "training rows (fingerprint)": lineage["data_fingerprint"],
        "config (SHA-256)": lineage["config_hash"],
        "seed": lineage["seed"],
        "made by": f"{lineage['package']} {version}",
        **_asked(lineage),
    }
    return "\n".join(
        [
            "---",
            f"library_name: {library}",
            f"base_model: {json.dumps(base['id'])}",
            f"tags: {json.dumps(['peftcli', lineage['method']])}",
            "license: unknown",
            "---",
            f"# {what} for {base['id']}",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
            *_table(metrics),
            "```python",
            code.rstrip(),
            "```",
            "",
            _licence(lineage),
            "",
        ]
    )


def _auto(class_name: str) -> str:
    return class_name.partition("For")[2] or "CausalLM"


def _head(class_name: str) -> str:
    """What registers a head that Transformers lacks, or a model that was made smaller."""
    if class_name.startswith("Compact"):
        what = "what is smaller in it; peft merge RUN --to DIR --onnx needs none of it"
        return f"\nimport peftcli\n\npeftcli.register_with_transformers()  # pip install peftcli: {what}\n"
    if class_name != "MambaForSequenceClassification":
        return ""
    return "from peftcli.models import mamba_gaps\n\nmamba_gaps.fill()  # pip install peftcli: the head is its own\n"


def _load_adapter(lineage: dict[str, Any], base_class: str) -> str:
    base, imports, auto = lineage["base"], "", _auto(base_class)
    where = json.dumps(base["id"])
    if base.get("source") == "sample":
        where = f"sample_folder({where})"
        imports = f"\nfrom peftcli.config.paths import sample_folder  # once: peft samples fetch {base['id']}\n"
    elif base.get("source") == "bundled":
        where = f"bundled({where})"
        imports = "\nfrom peftcli.config.paths import bundled\n"
    elif base.get("source") == "folder":
        where = '"THE FOLDER OF THE BASE"'
        imports = f"\n# the base is a folder of the one who trained this, called {json.dumps(base['id'])}\n"
    elif base["revision"]:
        where += f", revision={json.dumps(base['revision'])}"
    imports += _head(base_class)
    if bits := base.get("quantization"):
        said = ", ".join(f"{name}={value!r}" for name, value in ARGUMENTS[bits].items())
        imports += f"from transformers import BitsAndBytesConfig  # {PIP}\n\nbits = BitsAndBytesConfig({said})\n"
    count = len(lineage.get("labels") or [])
    labels = f", num_labels={count}" if auto.endswith("Classification") and count else ""
    labels += ", ignore_mismatched_sizes=True" if _of_pictures(lineage) else ""
    labels += ", num_labels=0" if _few_shot(lineage) else ""
    more = labels + (", quantization_config=bits" if bits else "")
    code = LOAD_ADAPTER.format(auto=auto, imports=imports, version=lineage["package_version"], where=where, more=more)
    return card_pictures.reads(code) if _of_pictures(lineage) else code


def _of_pictures(lineage: dict[str, Any]) -> bool:
    task = lineage.get("task") or {}
    return task.get("type") == "images" or task.get("reads") == "pictures"


def _few_shot(lineage: dict[str, Any]) -> bool:
    return (lineage.get("task") or {}).get("type") == "episodes"


def _asked(lineage: dict[str, Any]) -> dict[str, str]:
    """How the model was asked in training, as facts; none where the lineage does not say."""
    task = lineage.get("task")
    if not task:
        return {}
    if _few_shot(lineage):
        return card_episodes.facts(lineage)
    if _of_pictures(lineage):
        return card_pictures.facts(lineage)
    facts = {"task": task["type"], "prompt": f"`{json.dumps(task['prompt'], ensure_ascii=False)}`"}
    if task["type"] == "generation":
        return facts | {"template": task["template"]}
    labels = lineage.get("labels") or []
    words = [task["labels"].get(label, label) for label in labels] if task["head"] == "label_words" else labels
    named = ", ".join(
        label if label == word else f"{label} ({word})" for label, word in zip(labels, words, strict=True)
    )
    facts["label words" if task["head"] == "label_words" else "labels"] = named
    return facts | {"longest prompt": f"{task['max_length']} tokens; longer texts were cut at their end"}


def _ask(lineage: dict[str, Any], kind: str, whole: bool) -> list[str]:
    """Lines of Python that put one row to the model; none where the lineage does not say how."""
    task, labels, tokens = (lineage.get(key) for key in ("task", "labels", "label_tokens"))
    if not task:
        return []
    if _few_shot(lineage):
        return card_episodes.ask(lineage)
    if _of_pictures(lineage):
        return card_pictures.ask(lineage, kind, whole)
    prompt = f"\nprompt = {_prompt(task['prompt'])}"
    if task["type"] == "generation":
        return [prompt, _ids(task), ANSWER.format(most=task["max_new_tokens"]).rstrip()]
    if task["head"] == "linear" and labels:
        return [prompt, CLASSES.format(labels=json.dumps(labels)).rstrip()]
    if labels and tokens:
        return [prompt, SCORES.format(first=json.dumps(dict(zip(labels, tokens, strict=True)))).rstrip()]
    return []


def _ids(task: dict[str, Any]) -> str:
    if task.get("template", "plain") == "plain":
        return 'ids = tokenizer(prompt, return_tensors="pt").input_ids'
    system = f'{{"role": "system", "content": {json.dumps(task["system"])}}}, ' if task["system"] is not None else ""
    return (
        f'turns = [{system}{{"role": "user", "content": prompt}}]\n'
        "text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)\n"
        'ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids'
    )


def _prompt(template: str) -> str:
    """A Python expression for the prompt, with a text of one's own for each column."""
    if template.strip() == f"{{{CONVERSATION}}}":
        return '"YOUR QUESTION"'
    parts = []
    # A space at the end would be a token of its own; in training it belonged to the answer.
    for literal, name, _, _ in string.Formatter().parse(template.rstrip(" ")):
        parts += [json.dumps(literal)] if literal else []
        parts += [json.dumps(f"YOUR {name}")] if name else []
    return " + ".join(parts) or '""'


def _licence(lineage: dict[str, Any]) -> str:
    known = lineage.get("licences") or {}
    said = [f"Licence of the {part}: {known[key]}." for key, part in PARTS.items() if known.get(key)]
    said += [f"The licence of the {part} is not known." for key, part in PARTS.items() if not known.get(key)]
    return " ".join([*said, "That of this folder follows from both."])


def _table(metrics: dict[str, dict[str, float]]) -> list[str]:
    """A table with a row for each thing measured; nothing where nothing was."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    if not names:
        return []
    rows = [f"| | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for what, values in metrics.items():
        rows.append(f"| {what} | {' | '.join(f'{values[n]:.4g}' if n in values else '' for n in names)} |")
    return [*rows, ""]
