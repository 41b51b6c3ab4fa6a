"""The adapter's folder: PEFT's own two files, a model card and the lineage; every doubt at loading is an error."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli import register_with_peft
from peftcli.artifacts import atomic, card
from peftcli.artifacts.lineage import digests
from peftcli.config.errors import CheckFailed, Mistake, UserError, unknown
from peftcli.models import packed
from peftcli.models.checkpoint import quiet
from peftcli.models.compact import registered
from peftcli.models.image_reader import ImageReader

CONFIG, WEIGHTS, LINEAGE = "adapter_config.json", "adapter_model.safetensors", "lineage.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

log = logging.getLogger(__name__)


def save(
    model: PeftModel,
    folder: Path,
    lineage: dict[str, Any],
    metrics: dict[str, dict[str, float]],
    reader: ImageReader | None = None,
) -> None:
    """Write the adapter's folder whole: config, weights, lineage, model card.

    Args:
        model: With one adapter, `default`.
        folder: Replaced if it is there.
        lineage: From `lineage.collect`.
        metrics: For the card: values by name of what was measured (`tuned`, `untouched base`) and metric.
        reader: Of a model of pictures, which the adapter may have been trained on in another size than its own.

    Raises:
        UserError: The folder cannot be written to.
        CheckFailed: `disk-full` or `write-failed`; an earlier adapter there is unchanged.
    """
    lineage = portable(lineage)
    config = model.peft_config["default"]
    kind, base_class = str(getattr(config.peft_type, "value", "")), type(model.get_base_model()).__name__
    config.base_model_name_or_path = lineage["base"]["id"]
    config.revision = lineage["base"]["revision"]
    with atomic.folder(folder) as partial:
        # "auto" would ask the hub whether the vocabulary was resized; bases are never resized here.
        model.save_pretrained(str(partial), selected_adapters=["default"], save_embedding_layers=False)
        _sort_sets(partial / CONFIG, config)
        if reader is not None:
            reader.save_pretrained(partial)
        describe(partial, lineage, card.adapter(lineage, kind, base_class, metrics))


def load(base_model: nn.Module, folder: Path, *, force: bool = False, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its base, which is changed in place.

    Args:
        base_model: The untouched base.
        folder: The adapter's folder.
        force: Load although the base has other weights; `model.forced_base` then lists the tensors that differ.
        is_trainable: Let the adapter's tensors require gradients.

    Raises:
        UserError: No adapter there, or one of a type that nobody registered.
        CheckFailed: `unsafe-weights`, `adapter-keys` or `base-mismatch`.
    """
    config = read_config(folder)
    names = tensor_names(folder / WEIGHTS)
    different = base_differences(base_model, folder, force=force)
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks Transformers for a property that Transformers has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(base_model, str(folder), config=config, is_trainable=is_trainable)
    except (KeyError, RuntimeError, ValueError) as error:
        what = f"{folder} does not fit this base: {' '.join(str(error).split())[:600]}"
        raise CheckFailed("adapter-keys", what, "load it on the base that its model card names") from error
    _check_keys(model, names, folder)
    model.forced_base = different  # type: ignore[assignment]
    return model


def read_config(folder: Path) -> PeftConfig:
    """The adapter's PEFT config, once its weights are known to be safetensors and its type to be registered.

    Raises:
        UserError: No adapter there, or one of a type that nobody registered.
        CheckFailed: `unsafe-weights`.
    """
    register_with_peft()
    path = folder / CONFIG
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["peft_type"]
    except FileNotFoundError:
        hint = "give the folder that holds adapter_config.json; in a run folder that is adapter/"
        raise UserError(Mistake(f"{folder} holds no adapter: {CONFIG} is missing", hint=hint)) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(Mistake(f"{path} is not an adapter's config: {error!r}")) from None
    check_safe(folder, WEIGHTS)
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        hint = (
            "install the package that adds this type; if that is a newer peftcli, upgrade it. In a script of your own, "
            "call peftcli.register_with_peft() before PeftModel.from_pretrained"
        )
        known = [str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING]
        raise UserError(unknown("adapter type", kind, known, where=str(path), hint=hint))
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))


def base_differences(base_model: nn.Module, folder: Path, *, force: bool = False) -> list[str]:
    """Names of the base's tensors that are not those the adapter was trained on; only ever more than none with `force`.

    Raises:
        CheckFailed: `base-mismatch`.
    """
    if not (folder / LINEAGE).is_file():
        log.warning("%s has no %s: nothing says which base weights it was trained on", folder, LINEAGE)
        return []
    base = read_lineage(folder)["base"]
    now = digests(base_model, base["tensors"])
    different = [name for name, digest in base["tensors"].items() if now[name] != digest]
    if not different:
        return []
    what = (
        f"{folder} was trained on {base['id']}{'@' + base['revision'] if base['revision'] else ''}, and "
        f"{len(different)} of its {len(now)} adapted tensors are different in this base, the first: {different[0]}"
    )
    if force:
        log.warning("base-mismatch, ignored by force: %s", what)
        return different
    hint = "load the base that it names, at that revision; --force uses this base all the same and records it"
    dtype = str(next(base_model.parameters()).dtype).removeprefix("torch.")
    was, is_now = (kind or "not packed" for kind in (base.get("quantization"), packed.kind(base_model)))
    if was != is_now:
        hint += f". Its matrices were {was} and are {is_now} here; the adapter is a change that fits either"
    if dtype != base["dtype"] and "float16" in (dtype, base["dtype"]):
        hint += f". It was {base['dtype']} and is now {dtype}: float16 rounds differently, load float32 or bfloat16"
    raise CheckFailed("base-mismatch", what, hint)


def read_lineage(folder: Path) -> dict[str, Any]:
    """The lineage in an adapter's or a model's folder.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        return json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(Mistake(f"{folder / LINEAGE} cannot be read: {error}")) from None


def tensor_names(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file, which is looked at for damage.

    Raises:
        CheckFailed: `adapter-keys`, it is truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            return set(stored.keys())
    except (SafetensorError, OSError) as error:
        what = f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: {error}"
        raise CheckFailed("adapter-keys", what, "copy it again, or load an earlier checkpoint of the run") from error


def check_safe(folder: Path, wanted: str) -> None:
    """Stop at a folder whose weights are pickles, or missing.

    Raises:
        UserError: There are no weights at all.
        CheckFailed: `unsafe-weights`.
    """
    if any(folder.glob(wanted)):
        return
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        what = f"{folder} has its weights as a pickle ({', '.join(pickles)}), which can run any program when it is read"
        raise CheckFailed("unsafe-weights", what, "ask its author for safetensors, or convert it where you trust it")
    raise UserError(Mistake(f"{folder} holds no weights: {wanted} is missing"))


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ImageReader | None,
    folder: Path,
    lineage: dict[str, Any],
    metrics: dict[str, dict[str, float]],
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write a whole model as a plain Transformers folder, with lineage and card. Arguments and errors as `save`;
    `tensors` are the model's where it has only parts of them itself."""
    lineage = portable(lineage)
    with atomic.folder(folder) as partial:
        write_model(model, tokenizer, partial, tensors)
        describe(partial, lineage, card.model(lineage, type(model).__name__, metrics))


def load_model(kind: type[PreTrainedModel], folder: Path, **arguments: Any) -> PreTrainedModel:
    """Load a whole model that `save_model` wrote; no code and no pickle is run.

    Args:
        kind: Its class, `type(model)` of the model that was saved or one of Transformers' AutoModel classes.
        folder: Where it is.
        arguments: More for `from_pretrained`, such as `dtype`.

    Raises:
        UserError: No model there.
        CheckFailed: `unsafe-weights`, or `adapter-keys` where tensors are missing, left over or damaged.
    """
    if not (folder / "config.json").is_file():
        raise UserError(Mistake(f"{folder} holds no model: config.json is missing"))
    check_safe(folder, "*.safetensors")
    for part in folder.glob("*.safetensors"):
        tensor_names(part)
    registered.know(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with quiet():
        both: Any = kind.from_pretrained(
            str(folder), output_loading_info=True, use_safetensors=True, trust_remote_code=False, **arguments
        )
    model, found = both
    _complain(folder, found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"])
    return model


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ImageReader | None,
    folder: Path,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write model and tokenizer or image reader to a folder in Transformers' own layout, without this machine's
    paths."""
    was = model.config._name_or_path
    model.config._name_or_path = _name(was)
    try:
        with quiet():
            model.save_pretrained(folder, state_dict=tensors)
    finally:
        model.config._name_or_path = was
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        # Transformers notes one type, and would round what is float32 on purpose (Mamba's A_log) as it reads it.
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        atomic.write_json(folder / "config.json", {**written, "dtype": "float32"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def describe(folder: Path, lineage: dict[str, Any], text: str) -> None:
    """Write the lineage and the model card into a folder."""
    atomic.write_json(folder / LINEAGE, lineage)
    atomic.write_text(folder / "README.md", text)


def _name(base_id: str) -> str:
    return Path(base_id).name if Path(base_id).is_absolute() else base_id


def portable(lineage: dict[str, Any]) -> dict[str, Any]:
    """The lineage without paths, which would tell strangers about this machine and mean nothing on theirs."""
    return lineage | {"base": lineage["base"] | {"id": _name(lineage["base"]["id"])}}


def _sort_sets(path: Path, config: PeftConfig) -> None:
    """PEFT writes sets in an order that changes with Python's hash seed; equal runs shall write equal files."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    for key, value in vars(config).items():
        if isinstance(value, set):
            tree[key] = sorted(value)
    path.write_text(json.dumps(tree, indent=2, sort_keys=True), encoding="utf-8")


def _check_keys(model: PeftModel, stored: set[str], folder: Path) -> None:
    needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # Adapters saved by plain PEFT may carry the whole embedding beside what it needs.
    allowed = set(get_peft_model_state_dict(model, save_embedding_layers=True)) if stored - needed else needed
    _complain(folder, needed - stored, stored - allowed, ())


def _complain(folder: Path, missing: Any, unexpected: Any, mismatched: Any) -> None:
    found = []
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if names := sorted(str(name) for name in names):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"{len(names)} tensors are {kind} ({', '.join(names[:3])}{more})")
    if found:
        hint = "its files are incomplete, of another version, or belong to another base"
        raise CheckFailed("adapter-keys", f"{folder}: {'; '.join(found)}", hint)
