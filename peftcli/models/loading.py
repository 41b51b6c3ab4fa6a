"""The base model and its tokenizer or image reader: from the hub, a fetched sample or a folder; or its shape alone,
without weights.

Always safetensors, never code from a checkpoint. Seed first where a head is drawn (all but `causal-lm`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.config.schema import ModelConfig
from peftcli.models import batch_norm, byte_tokenizer, families, features, image_reader, outline, quantized, vision
from peftcli.models.checkpoint import check_weights, find_folder, plain_errors, quiet, where
from peftcli.models.family import Family
from peftcli.models.image_reader import ImageReader
from peftcli.models.precision import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Architecture = Literal["causal-lm", "sequence-classification", "image-classification"]
HEADS = ("score.", "classifier.")
SEVERAL: Final = "multi_label_classification"
"""Transformers' name in `config.problem_type` for scores that answer one question each."""
RANDOM_WEIGHTS_SEED = 0
RENAMED = frozenset({"rope_theta", "rope_scaling"})
"""Keys of a checkpoint's configuration that Transformers 5 still reads, into `rope_parameters`."""


@dataclass(frozen=True)
class LoadedModel:
    """A base model that is ready for an adapter: frozen, in its final type, on its device.

    Attributes:
        model: The Transformers model.
        family: Its family; one without roles where the architecture has no table here.
        tokenizer: Its tokenizer, or for pictures its image reader; None where there is none (on the meta device, or
            random weights of a folder or of a small vocabulary).
        base_id: What the recipe calls the model.
        revision: The hub commit it came from.
        folder: The local folder it came from.
        notes: What was done to it that the recipe did not ask for word by word.
    """

    model: PreTrainedModel
    family: Family
    tokenizer: PreTrainedTokenizerBase | ImageReader | None
    base_id: str
    revision: str | None
    folder: Path | None
    notes: list[str] = field(default_factory=list)


def load(
    config: ModelConfig,
    precision: str,
    architecture: Architecture,
    labels: list[str] | None,
    device: str = "cpu",
    meta: bool = False,
    image_size: int | None = None,
    several_labels: bool = False,
) -> LoadedModel:
    """Load the base model, frozen.

    Args:
        config: The recipe's `model`.
        precision: `fp32`, `bf16` or `fp16`; the type of the weights where `model.dtype` is auto.
        architecture: What stands on top of the model.
        labels: Names of the classes, for a classification head; an empty list takes the head off, so that the model's
            `logits` are its pooled features.
        device: Where the weights go, straight from the file.
        meta: Build the shapes only: no weights, no tokenizer, and no network where `model.shape` is given.
        image_size: Side of the pictures in pixels, where it is not the checkpoint's own.
        several_labels: A row may have several of the classes at once.

    Raises:
        UserError: The model cannot be found or read, or is not what the recipe says.
        CheckFailed: `unsafe-weights`: the checkpoint has pickled weights only, or wants to run its own code.
    """
    from peftcli.models import mamba_mixer

    folder = None if meta and config.shape else find_folder(config)
    dtype = DTYPES[precision] if config.dtype == "auto" else getattr(torch, config.dtype)
    shape = _shape(config, folder, from_shape=meta or config.weights == "random")
    former: dict[Any, str] = dict(shape.id2label or {})
    if labels is not None and architecture != "causal-lm":
        _name_classes(shape, labels, several_labels)
    headless = labels == [] and architecture != "causal-lm"
    pictures = architecture == "image-classification"
    words: Any = None if meta else image_reader.find(config, image_size) if pictures else tokenizer(config)
    if words is not None and not pictures:
        shape.pad_token_id = words.pad_token_id
    if config.quantization:
        _check_packing(config, shape)
        if not meta:
            quantized.check(config.quantization, device)
    bits = quantized.settings(config.quantization, DTYPES[precision]) if config.quantization and not meta else None
    notes: list[str] = []
    if meta or config.weights == "random":
        model = _draw(config, shape, architecture, dtype, "meta" if meta else device, bits)
    else:
        model, drawn = _read(config, folder, shape, architecture, dtype, device, bits)
        if labels and architecture != "causal-lm":
            notes += filter(None, [vision.new_head(model, None if drawn else former, labels)])
    if pictures:
        size = words.size if words else image_size
        notes += words.notes if words else ()
        if size:
            vision.resize_positions(model, size)
    if headless:
        features.take_off_head(model)
    batch_norm.widen(model)
    if config.batch_norm == "frozen":
        batch_norm.rest(model)
    mamba_mixer.install(model)
    if bits is not None:
        quantized.check_sizes(model)
        quantized.steady(model)
    model.requires_grad_(False)
    _set_cache(model, None if pictures else words)
    revision = getattr(shape, "_commit_hash", None) or config.revision
    return LoadedModel(model, _family(config, shape.model_type), words, config.name, revision, folder, notes)


def _name_classes(shape: PreTrainedConfig, labels: list[str], several: bool) -> None:
    shape.id2label, shape.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    shape.problem_type = SEVERAL if several else None


def _set_cache(model: Any, words: PreTrainedTokenizerBase | None) -> None:
    """States are kept where text is generated, and nowhere else."""
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = True
        if words is not None:
            model.generation_config.pad_token_id = words.pad_token_id


def tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer alone, with a padding token.

    Random weights of a shape read bytes (`byte_tokenizer`); None where their vocabulary is smaller than that, and for
    random weights of a folder that brings no tokenizer.

    Raises:
        UserError: It cannot be found or read.
    """
    folder = find_folder(config)
    if folder and not any(folder.glob("tokenizer*")):
        if config.weights == "random":
            return None
        raise UserError(Mistake(f"{folder} has no tokenizer: no tokenizer.json or tokenizer.model in it"))
    if config.weights == "random" and config.shape and not folder:
        words = getattr(_shape(config, folder, from_shape=True), "vocab_size", 0)
        return byte_tokenizer.build() if words >= byte_tokenizer.TOKENS else None
    from transformers import AutoTokenizer

    with plain_errors(config):
        words = AutoTokenizer.from_pretrained(folder or config.name, **where(config, folder))
    if words.pad_token is None:
        words.pad_token = words.eos_token
    return words


def _family(config: ModelConfig, model_type: str) -> Family:
    """The family the recipe names, else the model type's, else a bare one, which knows raw module names only."""
    if config.family != "auto":
        return families.find(config.family)
    try:
        return families.find(model_type)
    except UserError:
        return Family(model_type, (model_type,))


def _shape(config: ModelConfig, folder: Path | None, from_shape: bool) -> PreTrainedConfig:
    """The checkpoint's configuration, from `model.shape` where that is enough."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    from peftcli.models.compact import registered

    given = dict(config.shape)
    if from_shape and given:
        registered.know(given)
        model_type = given.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise UserError(unknown("model.shape.model_type", str(model_type), CONFIG_MAPPING.keys()))
        with plain_errors(config):
            usual = CONFIG_MAPPING[model_type]()
            if strange := [key for key in given if not hasattr(usual, key) and key not in RENAMED]:
                raise UserError(*(unknown("key of model.shape", key, usual.to_dict()) for key in strange))
            return AutoConfig.for_model(model_type, **given)
    with plain_errors(config):
        known, _ = PreTrainedConfig.get_config_dict(folder or config.name, **where(config, folder))
        registered.know(known)
        shape = AutoConfig.from_pretrained(folder or config.name, **where(config, folder))
    differing = {key: value for key, value in given.items() if getattr(shape, key, value) != value}
    if differing:
        raise UserError(
            *(
                Mistake(f"model.shape.{key}={value!r}, but {config.name} has {getattr(shape, key)!r}")
                for key, value in differing.items()
            )
        )
    return shape


def attention(config: ModelConfig, shape: Mapping[str, Any]) -> str:
    """The attention kernel of a model of this shape; Transformers takes none but eager where there is no attention."""
    return config.attention if "num_attention_heads" in shape else "eager"


def auto_class(architecture: Architecture) -> Any:
    """Transformers' class that picks a checkpoint's own, knowing also what Transformers lacks."""
    import transformers

    from peftcli.models import mamba_gaps

    mamba_gaps.fill()
    if architecture == "image-classification":
        batch_norm.keep_exact()
    return {
        "causal-lm": transformers.AutoModelForCausalLM,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "image-classification": transformers.AutoModelForImageClassification,
    }[architecture]


def _check_packing(config: ModelConfig, shape: PreTrainedConfig) -> None:
    key = "model.quantization"
    if shape.model_type == "mamba":
        what = f"{key}={config.quantization}: Mamba's forward pass reads its matrices as they are"
        raise UserError(Mistake(what, key, hint=f"{key}=null; models of attention layers can be packed"))
    if method := getattr(shape, "quantization_config", None):
        method = getattr(method, "quant_method", None) or dict(method).get("quant_method", "a way of its own")
        what = f"{key}={config.quantization}, and {config.name} is packed already, by {method}"
        raise UserError(Mistake(what, key, hint="name the checkpoint with whole weights"))


def _draw(
    config: ModelConfig,
    shape: PreTrainedConfig,
    architecture: Architecture,
    dtype: torch.dtype,
    device: str,
    bits: Any,
) -> PreTrainedModel:
    """A model of this shape with random weights, the same for every run, so that an adapter finds its base again."""
    from peftcli.models import mamba_gaps

    with plain_errors(config), quiet(), torch.random.fork_rng():
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        with torch.device("meta" if bits else device):
            model = auto_class(architecture).from_config(
                shape, dtype=dtype, attn_implementation=attention(config, shape.to_dict()), trust_remote_code=False
            )
        if bits:
            quantized.draw(model, bits, device, dtype)
        elif config.quantization:
            outline.trace(model, config.quantization)
        mamba_gaps.draw_exactly(model)
        return model


def _read(
    config: ModelConfig,
    folder: Path | None,
    shape: PreTrainedConfig,
    architecture: Architecture,
    dtype: torch.dtype,
    device: str,
    bits: Any,
) -> tuple[PreTrainedModel, bool]:
    """The model, and whether its checkpoint had no head, so that one was drawn."""
    if folder:
        check_weights(folder)
    if getattr(shape, "rescale_prenorm_residual", False):
        shape.rescale_prenorm_residual = False  # Transformers 5.23 scales Mamba's out_proj after reading it, each time
    placed: dict[str, Any] = {} if device == "cpu" and bits is None else {"device_map": {"": device}}
    if bits is not None:
        placed["quantization_config"] = bits
    with plain_errors(config), quiet():
        model, found = auto_class(architecture).from_pretrained(
            folder or config.name,
            config=shape,
            dtype=dtype,
            attn_implementation=attention(config, shape.to_dict()),
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **placed,
            **where(config, folder),
        )
    others = [key for key in _names(found["mismatched_keys"]) if not key.startswith(HEADS)]
    if others:
        what = f"{config.name} has tensors of other shapes than a {type(model).__name__}: {', '.join(others[:5])}"
        raise UserError(Mistake(what, hint="its config.json is not that of its weights"))
    if missing := sorted(key for key in found["missing_keys"] if not key.startswith(HEADS)):
        raise UserError(
            Mistake(
                f"{config.name} lacks {len(missing)} tensors of a {type(model).__name__}: {', '.join(missing[:5])}",
                hint="they would have been drawn at random",
            )
        )
    return model, any(key.startswith(HEADS) for key in found["missing_keys"])


def _names(mismatched: Any) -> list[str]:
    """The tensors' names, which come alone or with the two shapes."""
    return sorted(key if isinstance(key, str) else key[0] for key in mismatched)
