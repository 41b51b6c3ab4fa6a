"""The parts of a compact model: which modules were rebuilt as what, as `config.json` lists them.

| kind | in the place of | what it is |
| --- | --- | --- |
| `factors`, `ranks: [K]` | Linear | `reduce` [K, I] and `expand` [O, K] |
| | Conv2d | `reduce`, K filters of its window, and `expand`, 1x1 |
| `factors`, `ranks: [P, Q]` | Conv2d | Tucker-2: `reduce` 1x1 to P, `core` P to Q with its window, `expand` 1x1 |
| `heads`, `width: T` | attention without rotary positions | q, k, v and o with T dimensions a head; the scale stays |
| `tied`, `to`, `transposed`, `diagonal` | Linear, 1x1 Conv2d | uses the weight of the module `to`, which comes before |
| `halvit` | a stage of ResNet | the paper's layout, see `halvit` |

A part may stand inside an earlier one: `mlp.fc2.reduce` tied to `mlp.fc1.expand`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.models.compact import halvit
from peftcli.models.compact.layers import Factored, tied

Part = dict[str, Any]
Parts = Mapping[str, Part]


def build(model: Any, parts: Parts) -> None:
    """Put the parts in, in place, with new tensors of the former ones' type and device.

    Args:
        model: As Transformers builds it.
        parts: By full module name, in order.

    Raises:
        UserError: A part does not go with the model.
    """
    for name, part in parts.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            names = {one for one, _ in model.named_modules() if one}
            raise UserError(unknown("module of a compact model", name, names)) from None
        if part["kind"] not in KINDS:
            raise UserError(unknown("kind of part", part["kind"], KINDS))
        new = KINDS[part["kind"]](model, layer, part)
        if new is not layer:
            model.set_submodule(name, new.requires_grad_(next(layer.parameters()).requires_grad))


def _factors(model: Any, layer: Any, part: Part) -> nn.Module:
    made: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    ranks, bias = part["ranks"], layer.bias is not None
    if isinstance(layer, nn.Linear) and len(ranks) == 1:
        reduce: nn.Module = nn.Linear(layer.in_features, ranks[0], bias=False, **made)
        return Factored(OrderedDict(reduce=reduce, expand=nn.Linear(ranks[0], layer.out_features, bias=bias, **made)))
    if not isinstance(layer, nn.Conv2d) or len(ranks) > 2 or layer.groups > 1:
        raise UserError(Mistake(f"a {type(layer).__name__} cannot be factors of ranks {ranks}"))
    window: dict[str, Any] = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    expand = nn.Conv2d(ranks[-1], layer.out_channels, 1, bias=bias, **made)
    if len(ranks) == 1:
        reduce = nn.Conv2d(layer.in_channels, ranks[0], bias=False, **window, **made)
        return Factored(OrderedDict(reduce=reduce, expand=expand))
    reduce = nn.Conv2d(layer.in_channels, ranks[0], 1, bias=False, **made)
    core = nn.Conv2d(ranks[0], ranks[1], bias=False, **window, **made)
    return Factored(OrderedDict(reduce=reduce, core=core, expand=expand))


def _heads(model: Any, attention: Any, part: Part) -> nn.Module:
    projections: list[Any] = [getattr(attention, f"{one}_proj", None) for one in "qkvo"]
    if not all(isinstance(one, nn.Linear) for one in projections) or hasattr(attention, "rotary_emb"):
        raise UserError(Mistake(f"a {type(attention).__name__} has no heads that can be made narrower"))
    q, k, v, o = projections
    heads = q.out_features // attention.head_dim
    made: dict[str, Any] = {"device": q.weight.device, "dtype": q.weight.dtype}
    inner = heads * part["width"]
    # A bias of k adds the same to every logit of a row, and one of v goes through into o's.
    has_bias = o.bias is not None or v.bias is not None
    for name, inputs, outputs, bias in (
        ("q_proj", q.in_features, inner, q.bias is not None),
        ("k_proj", k.in_features, inner, False),
        ("v_proj", v.in_features, inner, False),
        ("o_proj", inner, o.out_features, has_bias),
    ):
        layer = nn.Linear(inputs, outputs, bias=bias, **made)
        setattr(attention, name, layer.requires_grad_(q.weight.requires_grad))
    attention.head_dim = part["width"]
    return attention  # type: ignore[no-any-return]


def _tied(model: Any, layer: Any, part: Part) -> nn.Module:
    source = model.get_submodule(part["to"])
    if not hasattr(source, "weight"):
        raise UserError(Mistake(f"{part['to']} has no weight of its own that another layer could use"))
    new = tied(layer, source, part["transposed"], part["diagonal"])
    if new.weight.shape != layer.weight.shape:
        what = f"a weight of {list(source.weight.shape)} cannot do for one of {list(layer.weight.shape)}"
        raise UserError(Mistake(what + (", transposed" if part["transposed"] else "")))
    return new


def _halvit(model: Any, stage: Any, part: Part) -> nn.Module:
    halvit.lay_out(stage, model.config)
    return stage  # type: ignore[no-any-return]


KINDS = {"factors": _factors, "heads": _heads, "tied": _tied, "halvit": _halvit}
