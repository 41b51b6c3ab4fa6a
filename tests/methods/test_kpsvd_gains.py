"""KPSVD on calibration rows: ranks by the gain of a first step, and what is decomposed to start with."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from peftcli.config.errors import CheckFailed, UserError
from peftcli.methods import gradients
from peftcli.methods.contract import Calibration
from peftcli.methods.kpsvd import gains
from peftcli.methods.kpsvd.decomposition import leading
from peftcli.methods.kpsvd.layer import KpsvdLayer
from peftcli.methods.kpsvd.maths import total
from peftcli.methods.kpsvd.shapes import square
from peftcli.methods.kpsvd.tuner import Method
from peftcli.testing.rows import Row, train, trained

TARGETS = ["attention", "mlp"]
V_PROJ = "model.layers.1.self_attn.v_proj"


def rows_of(base: Any, batches: int = 1) -> Calibration:
    """The base's own batch, over and over."""
    return Calibration([[base.batch]] * batches, lambda model, _: base.loss(model), batches, 3)


def layers(model: Any) -> dict[str, KpsvdLayer]:
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, KpsvdLayer)}


def measured(settings: dict[str, Any]) -> tuple[Any, Any, gains.Gains]:
    """The model with all candidates in it, its base, and the candidates' gains as the rule measures them."""
    row = Row("kpsvd", {"targets": TARGETS, "rank": 5, **settings})
    base, model, _ = row.attached()
    starts = model.base_model.starts["default"]
    fresh = row.new_base()
    weights = {name: fresh.model.get_submodule(name).weight for name in starts}
    terms = {
        name: type(found.terms)(found.terms.U[:5], found.terms.V[:5], found.terms.sigma[:5], found.terms.energy)
        for name, found in starts.items()
    }
    with_sigma = settings.get("sigma") == "trained"
    return model, base, gains.measure(fresh.model, weights, terms, rows_of(fresh, 3), 2, with_sigma)


@pytest.mark.parametrize("settings", [{}, {"base": "delta"}, {"sigma": "trained"}], ids=str)
def test_the_gain_of_a_term_is_the_squared_gradient_of_its_parameters(settings):
    model, base, found = measured(settings)
    base.loss(model).backward()
    assert found.batches == 2
    assert found.loss == pytest.approx(base.loss(base.model).item())
    for name, layer in layers(model).items():
        factors = (layer.kpsvd_U, layer.kpsvd_V, layer.kpsvd_S)
        tensors = [of["default"].grad for of in factors if "default" in of]
        expected = sum(grad.flatten(1).square().sum(1) if grad.dim() > 1 else grad.square() for grad in tensors)
        torch.testing.assert_close(torch.tensor(found.terms[name], dtype=torch.float64), expected)


def test_a_small_step_on_some_terms_lowers_the_loss_by_their_gain():
    model, base, found = measured({})
    kept = gains.choose(found.terms, dict.fromkeys(found.terms, 1), 1, 0.5)
    predicted = sum(found.terms[name][k] for name, places in kept.items() for k in places)
    before, eta = base.loss(model), 1e-6
    before.backward()
    with torch.no_grad():
        for name, layer in layers(model).items():
            for factor in (layer.kpsvd_U["default"], layer.kpsvd_V["default"]):
                factor[kept[name]] -= eta * factor.grad[kept[name]]
    assert (before - base.loss(model)).item() == pytest.approx(eta * predicted, rel=1e-3)
    assert 0.5 <= predicted / sum(map(sum, found.terms.values())) < 1


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=2, max_size=4), min_size=1, max_size=3),
    st.integers(0, 2),
    st.floats(0, 0.99),
)
def test_the_choice_is_within_the_bound_and_the_cheapest_of_equal_costs(values, least, bound):
    found = {str(i): of for i, of in enumerate(values)}
    kept = gains.choose(found, dict.fromkeys(found, 7), least, bound)
    every = [(name, k) for name, of in found.items() for k in range(len(of))]
    wanted = (1 - bound) * sum(map(sum, values))

    def fine(places: set[tuple[str, int]], slack: float) -> bool:
        enough = all(sum(name == other for other, _ in places) >= least for name in found)
        return enough and sum(found[name][k] for name, k in places) >= wanted - slack

    chosen = {(name, k) for name, places in kept.items() for k in places}
    assert fine(chosen, 1e-9)
    fewer = combinations(every, len(chosen) - 1) if chosen else ()
    assert not any(fine(set(places), -1e-9) for places in fewer)


def test_a_parameter_goes_where_it_gains_most():
    found = {"cheap": [3.0, 3.0], "dear": [8.0, 0.1]}
    assert gains.choose(found, {"cheap": 1, "dear": 10}, 0, 0.5) == {"cheap": [0, 1], "dear": [0]}
    assert gains.choose(found, {"cheap": 1, "dear": 1}, 0, 0.5) == {"cheap": [], "dear": [0]}
    assert gains.choose(found, {"cheap": 1, "dear": 1}, 1, 0.99) == {"cheap": [0], "dear": [0]}
    assert gains.choose({"flat": [1.0, 1.0, 1.0]}, {"flat": 1}, 0, 0.5) == {"flat": [0, 1]}


def planted(base: Any, places: tuple[int, ...], size: float = 1e-3) -> Calibration:
    """A loss whose gradient lies in one weight's terms at these places, and nowhere else."""
    weight = base.model.get_submodule(V_PROJ).weight
    (terms,) = leading([weight], square(*weight.shape), 12)
    # The terms of one weight are orthogonal, and so are their left factors and their right ones.
    wanted = size * total(terms.U[list(places)], terms.V[list(places)])

    def loss(model: Any, _: dict[str, torch.Tensor]) -> torch.Tensor:
        return 1 - (model.get_submodule(V_PROJ).weight * wanted).sum()

    return Calibration([[base.batch]], loss, 1, 3)


@pytest.mark.parametrize("mode", ["residual", "delta"])
def test_a_task_of_two_terms_of_one_module_gets_these(mode):
    row = Row("kpsvd", {"rank": "auto", "targets": TARGETS, "max_rank": 12, "loss_increase": 1e-6, "base": mode})
    base, method, untouched = row.new_base(), row.new_method(), row.new_base()
    model = method.attach(base.model, base.family, planted(base, (4, 9)))
    starts = model.base_model.starts["default"]
    assert starts.pop(V_PROJ).kept == (4, 9)
    assert {(found.kept, found.cut.bound) for found in starts.values()} == {((0,), "min_rank")}
    assert "chose 15 of 168 candidate terms" in method.notes[0]
    assert f"most of the gain is in {V_PROJ} 100%" in method.notes[0]
    assert "bound by min_rank in 13, calibration in 1" in method.notes[1]
    torch.testing.assert_close(untouched.outputs(model.eval()), untouched.outputs(untouched.model))
    train(model, method, base)
    method.finish(model)
    assert torch.equal(model.unload().get_submodule(V_PROJ).weight, untouched.model.get_submodule(V_PROJ).weight)


def test_a_tighter_bound_costs_more():
    counts = []
    for bound in (0.0, 0.1, 0.5, 0.99):
        row = Row("kpsvd", {"rank": "auto", "targets": TARGETS, "max_rank": 12, "loss_increase": bound})
        base, method = row.new_base(), row.new_method()
        model = method.attach(base.model, base.family, rows_of(base))
        counts.append(sum(p.numel() for p in trained(model).values()))
        assert f"{counts[-1]:,} of {counts[0]:,} parameters" in method.notes[0]
        assert f"and {bound:.1%} may be lost" in method.notes[0]
        kept = {name: len(found.kept) for name, found in model.base_model.starts["default"].items()}
        assert model.peft_config["default"].rank_pattern == kept
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4


def test_looking_leaves_no_trace():
    row = Row("kpsvd", {"rank": "auto", "loss_increase": 0.3})
    base, untouched = row.new_base(), row.new_base()
    weights = {V_PROJ: base.model.get_submodule(V_PROJ).weight}
    gradients.mean(base.model.train(), weights, rows_of(base), 1)
    assert base.model.training
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())
    assert not base.model.get_submodule(V_PROJ).weight._post_accumulate_grad_hooks
    assert torch.equal(untouched.outputs(base.model.eval()), untouched.outputs(untouched.model))


def test_unequal_micro_batches_make_the_batchs_gradient():
    base = Row("kpsvd", {}).new_base()
    labels = base.batch["input_ids"].clone()
    labels[0, :3] = -100
    whole = {"input_ids": base.batch["input_ids"], "labels": labels}
    rows = [{name: value[at : at + 1] for name, value in whole.items()} for at in range(len(labels))]
    weights = {V_PROJ: base.model.get_submodule(V_PROJ).weight}

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"]).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, batch["labels"].flatten())

    found = [gradients.mean(base.model, weights, Calibration([b, b, b], loss, 3, 3), 2) for b in ([whole], rows)]
    torch.testing.assert_close(*(gradient[V_PROJ] for gradient in found))


def test_rows_without_a_finite_loss_or_without_a_batch_are_named():
    row = Row("kpsvd", {"rank": "auto"})
    base = row.new_base()
    broken = Calibration([[base.batch]], lambda model, _: base.loss(model) * float("nan"), 1, 3)
    with pytest.raises(CheckFailed, match="non-finite-loss"):
        row.new_method().attach(base.model, base.family, broken)
    with pytest.raises(CheckFailed, match="no batch to look at"):
        row.new_method().attach(base.model, base.family, Calibration([], broken.loss, 0, 3))


def start_of(model: Any, name: str = V_PROJ) -> torch.Tensor:
    return total(*(t.detach() for t in layers(model)[name].first_factors("default")))


@pytest.mark.parametrize("mode", ["residual", "delta"])
def test_the_gradient_can_be_the_source(mode):
    row = Row("kpsvd", {"source": "gradient", "rank": 2, "targets": TARGETS, "base": mode})
    base, untouched = row.new_base(), row.new_base()
    model = row.new_method().attach(base.model, base.family, rows_of(base)).eval()
    weights = {name: untouched.model.get_submodule(name).weight.requires_grad_() for name in layers(model)}
    untouched.loss(untouched.model).backward()
    step = min(weight.detach().norm() / weight.grad.norm() for weight in weights.values())
    for name, weight in weights.items():
        (terms,) = leading([weight.grad * step], square(*weight.shape), 2)
        expected = total(terms.sigma[:, None, None] * terms.U, terms.V)
        torch.testing.assert_close(start_of(model, name), expected)
    torch.testing.assert_close(untouched.outputs(model), untouched.outputs(untouched.model))


def tuned_folder(base: Any, folder: Path) -> dict[str, torch.Tensor]:
    """A fine-tuned copy of the base, as a checkpoint of two files, two Kronecker terms away."""
    state = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    changed = {}
    for name in [name for name in state if name.endswith("proj.weight")]:
        m, n, p, q = square(*state[name].shape)
        U, V = (torch.randn(2, *size, generator=generator, dtype=torch.float64) for size in ((m, n), (p, q)))
        changed[name.removesuffix(".weight")] = total(U, V)
        state[name] += changed[name.removesuffix(".weight")]
    folder.mkdir()
    halves = sorted(state)[::2], sorted(state)[1::2]
    for number, names in enumerate(halves):
        save_file({name: state[name] for name in names}, folder / f"model-{number}.safetensors")
    return changed


def test_what_a_fine_tuning_changed_can_be_the_source(tmp_path):
    settings = {"source": "delta", "tuned": str(tmp_path / "tuned"), "rank": 2, "targets": TARGETS}
    row = Row("kpsvd", settings)
    base, untouched = row.new_base(), row.new_base()
    changed = tuned_folder(base, tmp_path / "tuned")
    model = row.new_method().attach(base.model, base.family).eval()
    for name in layers(model):
        torch.testing.assert_close(start_of(model, name), changed[name])
    torch.testing.assert_close(untouched.outputs(model), untouched.outputs(untouched.model))


def test_mistakes_of_the_sources_are_the_users(tmp_path):
    def attach(**settings: Any) -> None:
        row = Row("kpsvd", {"rank": 2, **settings})
        base = row.new_base()
        row.new_method().attach(base.model, base.family)

    base = Row("kpsvd").new_base()
    name, other = f"{V_PROJ}.weight", "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(UserError, match=r"source=gradient looks at a calibration set"):
        attach(source="gradient")
    with pytest.raises(UserError, match="is no folder"):
        attach(source="delta", tuned=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="has no weights"):
        attach(source="delta", tuned=str(tmp_path))
    tensors = {n: t for n, t in base.model.state_dict().items() if n.endswith("proj.weight")}
    save_file({n: t for n, t in tensors.items() if n != other}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"has no tensor {other}"):
        attach(source="delta", tuned=str(tmp_path))
    save_file({**tensors, name: tensors[name][:8].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"is \[8, 32\] in method.tuned=.*, and \[16, 32\] in the base"):
        attach(source="delta", tuned=str(tmp_path))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has 0 Kronecker terms"):
        attach(source="delta", tuned=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        attach(source="delta", tuned=str(tmp_path))


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("sigma", ["absorbed", "trained"])
def test_state_brings_back_another_machines_start(alpha, sigma):
    settings = {"rank": "auto", "targets": TARGETS, "max_rank": 6, "alpha": alpha, "sigma": sigma}

    def attached(bound: float) -> tuple[Method, Any, Any]:
        row = Row("kpsvd", {**settings, "loss_increase": bound})
        base, method = row.new_base(), row.new_method()
        return method, method.attach(base.model, base.family, rows_of(base)), base

    (method, model, base), (other, resumed, _) = attached(0.5), attached(0.2)
    other.restore(resumed, method.state(model))
    for (name, layer), again in zip(layers(model).items(), layers(resumed).values(), strict=True):
        assert torch.equal(layer.base_layer.weight, again.base_layer.weight), name
        assert all(torch.equal(*pair) for pair in zip(layer.factors("default"), again.factors("default"), strict=True))
    assert method.figures(model)[0]["svg"].count("#dddddd") == other.figures(resumed)[0]["svg"].count("#dddddd")
    assert resumed.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
    before = dict(resumed.named_parameters())
    other.restore(resumed, method.state(model))  # what is there already stays the same tensors
    assert all(parameter is before[name] for name, parameter in resumed.named_parameters())
    other.finish(resumed)
    torch.testing.assert_close(base.outputs(resumed.eval()), base.outputs(model.eval()))


def test_ranks_by_rows_survive_a_scale_and_a_file(tmp_path):
    from peft import PeftModel

    row = Row("kpsvd", {"rank": "auto", "targets": TARGETS, "alpha": 6.0})
    base, model, method = row.attached()
    train(model, method, base)
    method.finish(model)
    expected = base.outputs(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(row.new_base().model, str(tmp_path)).eval()
    torch.testing.assert_close(base.outputs(loaded), expected, rtol=1e-6, atol=1e-6)
