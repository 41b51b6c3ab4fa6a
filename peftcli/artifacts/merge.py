"""Merging an adapter into its base for good, measured on real inputs before and after the result is on disk.

Letters: B rows, L positions, V outputs a position, N compared positions.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peftcli.artifacts import adapter, atomic, card
from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.models import packed, quantized
from peftcli.models.checkpoint import quiet

POSITIONS = 8
"""Positions compared in a row: its last ones, where the outputs depend on most of the input."""

NEARER = 0.5
"""The merged outputs must be nearer to the tuned ones than this share of the distance between tuned and base."""


@dataclass(frozen=True)
class Drift:
    """How far the merged model's outputs are from the unmerged ones', over N x V values.

    Attributes:
        largest: Largest absolute difference.
        mean: Mean absolute difference.
        spread: Standard deviation of the unmerged outputs.
        share: Mean absolute difference at the worst position, as a share of the spread; what the tolerance bounds.
        effect: Mean absolute difference between unmerged and base outputs: what the adapter does at all.
        agreement: Share of positions whose largest output is the same.
    """

    largest: float
    mean: float
    spread: float
    share: float
    effect: float
    agreement: float


def merge(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    probes: Sequence[dict[str, Tensor]],
    folder: Path,
    lineage: dict[str, Any],
    *,
    tolerance: float = 0.1,
    dtype: torch.dtype | None = None,
    metrics: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Merge in float32, save a plain Transformers folder, load it again, and compare at both points.

    Args:
        model: With its adapter loaded; it is used up. Outputs are compared in the type that it was loaded in: with
            float32 the comparison sees the rounding of the saved weights alone, else also noise of the arithmetic.
        tokenizer: Saved beside the model.
        probes: Batches of real inputs, `input_ids` and `attention_mask` [B, L] each.
        folder: Where the merged model goes; replaced if it is there.
        lineage: The adapter's.
        tolerance: Largest mean difference of a position's outputs, as a share of their spread.
        dtype: Of the saved weights; the base's own if not given.
        metrics: For the model card, as in `adapter.save`.

    Returns:
        `merge` and `reload`, a `Drift` as a dict each; `dtype`; `forced_base`, the tensors in which the base is not the
        one that the adapter was trained on; `positions` and `outputs`, how many were compared and outputs at each; of a
        base in few bits its `quantization`, which the merged model no longer has.

    Raises:
        UserError: The adapter cannot be merged, or the folder cannot be written to.
        CheckFailed: `merge-drift`, `disk-full` or `write-failed`; an earlier folder there is unchanged.
    """
    if not probes:
        raise UserError(Mistake("a merge is checked on real inputs and there are none", hint="give it rows to compare"))
    base: Any = model.get_base_model()
    kind, forced, bits = type(base), getattr(model, "forced_base", []), packed.kind(base)
    arithmetic = next(base.parameters()).dtype
    dtype = dtype or arithmetic
    quantized.compute_in(base, arithmetic)
    tuned_NV = outputs(model, probes)
    with model.disable_adapter():
        base_NV = outputs(model, probes)
    merged = merged_in_float32(on_whole_base(model) if bits else model)
    round_to(merged, dtype)
    round_to(merged, arithmetic)
    found = {"merge": check(compare(outputs(merged, probes), tuned_NV, base_NV), tolerance, "merged", dtype, bits)}
    with atomic.folder(folder) as partial:
        round_to(merged, dtype)
        adapter.write_model(merged, tokenizer, partial)
        cast(nn.Module, merged).to("meta")  # room for the copy that is read back
        again = adapter.load_model(kind, partial, dtype=arithmetic)
        with quiet():  # Transformers' own forward pass says at length that it has no kernel here
            read_NV = outputs(again, probes)
        found["reload"] = check(compare(read_NV, tuned_NV, base_NV), tolerance, "saved", dtype, bits)
        report: dict[str, Any] = {name: asdict(drift) for name, drift in found.items()}
        report |= {"dtype": str(dtype).removeprefix("torch."), "forced_base": forced}
        report |= {"quantization": bits} if bits else {}
        report |= {"positions": len(tuned_NV), "outputs": tuned_NV.shape[1]}
        lineage = adapter.portable(lineage) | {"merged": report}
        adapter.describe(partial, lineage, card.model(lineage, kind.__name__, metrics or {}))
    return report


def on_whole_base(model: PeftModel) -> PeftModel:
    """The same adapter on its base with all matrices in float32; the model is used up.

    PEFT's own layers for matrices in few bits would round the merged ones to these bits again.
    """
    base: Any = model.get_base_model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        for name, layer in _outermost(base, BaseTunerLayer, AuxiliaryTrainingWrapper).items():
            inside = getattr(layer, "original_module", None)
            base.set_submodule(name, layer.get_base_layer() if inside is None else inside)
        quantized.unpack(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(base, folder).eval()


def round_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the type of the weights; `Module.to` would round the rotary frequencies too.

    What Transformers keeps in float32 when it loads such a model stays so in the file (Mamba's `A_log`).
    """
    exact = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name.endswith(exact) else dtype)


def merged_in_float32(model: PeftModel) -> PreTrainedModel:
    """The base with the adapter in its weights; the model is used up.

    One adapted layer at a time is float32, so that rounding happens once and memory stays that of the loaded model.

    Raises:
        UserError: This kind of adapter has no merged form.
        CheckFailed: `merge-drift`, the merged weights are not finite.
    """
    kind, tuner = str(getattr(model.peft_type, "value", model.peft_type)), cast(Any, model.base_model)
    if not hasattr(tuner, "merge_and_unload"):
        hint = "use the adapter folder itself, with PeftModel.from_pretrained"
        raise UserError(
            Mistake(f"an adapter of type {kind} cannot be merged: it is not a change of weights", hint=hint)
        )
    layers = list(_outermost(tuner.model, BaseTunerLayer).values())
    _untie(tuner.model, layers)
    try:
        for layer in layers:
            dtypes = {name: tensor.dtype for name, tensor in layer.get_base_layer().named_parameters()}
            layer.float()
            layer.merge(safe_merge=True)
            for name, tensor in layer.get_base_layer().named_parameters():
                tensor.data = tensor.data.to(dtypes[name])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            return tuner.merge_and_unload()
    except NotImplementedError as error:
        raise UserError(Mistake(f"an adapter of type {kind} cannot be merged: {error}")) from error
    except ValueError as error:
        if "NaN" not in str(error):
            raise UserError(Mistake(f"this adapter of type {kind} cannot be merged: {error}")) from error
        raise CheckFailed("merge-drift", f"the merged weights are not finite: {error}") from error


def _untie(model: Any, layers: list[Any]) -> None:
    """Give adapted layers a weight of their own where it is another layer's too: only theirs is merged into."""
    others = packed.shared(model)
    for base in (layer.get_base_layer() for layer in layers):
        if id(getattr(base, "weight", None)) in others:
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
            model.all_tied_weights_keys = {}


def outputs(model: nn.Module, probes: Sequence[dict[str, Tensor]]) -> Tensor:
    """The model's outputs in float32: at the last real positions of each row [N, V], or its class scores [B, V]."""
    was_training = model.training
    model.eval()
    found = []
    with torch.no_grad():
        for probe in probes:
            logits = model(**probe).logits
            if logits.dim() == 3:
                # Counted from the right: tuners that put virtual tokens before the input lengthen the output.
                mask_BL = probe["attention_mask"].bool()
                from_end_BL = mask_BL.flip(1).cumsum(1).flip(1)
                logits = logits[:, -mask_BL.shape[1] :][mask_BL & (from_end_BL <= POSITIONS)]
            found.append(logits.float().cpu())
    model.train(was_training)
    return torch.cat(found)


def compare(merged_NV: Tensor, tuned_NV: Tensor, base_NV: Tensor) -> Drift:
    """How far merged outputs are from the tuned ones, beside how far those are from the base's."""
    difference_NV, spread = (merged_NV - tuned_NV).abs(), tuned_NV.std().item()
    return Drift(
        largest=difference_NV.max().item(),
        mean=difference_NV.mean().item(),
        spread=spread,
        share=difference_NV.mean(dim=1).max().item() / max(spread, 1e-12),
        effect=(tuned_NV - base_NV).abs().mean().item(),
        agreement=(merged_NV.argmax(1) == tuned_NV.argmax(1)).float().mean().item(),
    )


def check(drift: Drift, tolerance: float, what: str, dtype: torch.dtype, bits: str | None = None) -> Drift:
    """Give back the drift if the merge kept what the adapter does.

    Args:
        drift: What was measured.
        tolerance: Largest `share`.
        what: Which model was compared.
        dtype: Of its weights.
        bits: How the unmerged base was packed.

    Raises:
        CheckFailed: `merge-drift`, beyond the tolerance, no nearer to the tuned model than the base is, or an adapter
            without any effect.
    """
    numbers = (
        f"outputs of the {what} model differ from the unmerged ones by {drift.mean:.3g} in the mean and "
        f"{drift.largest:.3g} at most, where their spread is {drift.spread:.3g}"
    )
    hint = "" if dtype == torch.float32 else "rounding is finer with --dtype fp32"
    if bits == "int8":
        hint = "on GPUs int8 also rounds the inputs of the unmerged base; training.merge_tolerance=0.3 allows more"
    if not drift.share <= tolerance:
        worst = f"{numbers}; at the worst position by {drift.share:.2%} of it, and {tolerance:.2%} is allowed"
        raise CheckFailed("merge-drift", worst, hint)
    if drift.effect == 0:
        what = "the adapter does not change the outputs at all: merged, it would be the base under another name"
        raise CheckFailed("merge-drift", what, "train it, or use the base itself")
    if not drift.mean < NEARER * drift.effect:
        what = f"{numbers}; the whole adapter changes them by {drift.effect:.3g}, so most of its effect is lost"
        raise CheckFailed("merge-drift", what, hint)
    return drift


def _outermost(model: nn.Module, *kinds: type) -> dict[str, Any]:
    """The modules of these kinds by name, without those inside another."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found
