"""An ONNX file answers like its model for any number of rows and tokens, or nothing is written."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import pad

from peftcli import register_with_peft
from peftcli.artifacts import onnx_folder, onnx_graph
from peftcli.artifacts.merge import compare
from peftcli.config.errors import CheckFailed, UserError
from peftcli.methods.sparse_adapter import compaction
from peftcli.methods.sparse_adapter.config import SparseAdapterConfig
from peftcli.models.selective_scan import _step_by_step, selective_scan
from peftcli.testing import tiny

slow = pytest.mark.slow
CLASSES, WORDS = "sequence-classification", "causal-lm"


def probes(batch):
    """The batch and others of it: one row, five rows, longer rows, and rows padded on either side."""
    yield {name: part[:1] for name, part in batch.items()}
    yield {name: part[[0, 1, 0, 1, 1]] for name, part in batch.items()}
    if "input_ids" in batch:
        yield {name: torch.cat([part, part, part], 1) for name, part in batch.items()}
        for sides in ((5, 0), (0, 5)):
            padded = {name: pad(part, sides) for name, part in batch.items()}
            yield padded | {"input_ids": padded["input_ids"] + (padded["attention_mask"] == 0)}


def real(scores, batch):
    """Scores of classes, or of words at positions that are not padding."""
    return scores if scores.dim() == 2 else scores[batch["attention_mask"].bool()]


def check_equal(model, exported, batch):
    for probe in probes(batch):
        with torch.no_grad():
            expected = real(model(**probe).logits, probe)
        assert torch.allclose(real(exported(**probe).logits, probe), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("base", "architecture"),
    [
        (tiny.vit, "image-classification"),
        (tiny.mamba, WORDS),
        pytest.param(tiny.dinov2, "image-classification", marks=slow),
        pytest.param(tiny.resnet, "image-classification", marks=slow),
        pytest.param(tiny.llama, WORDS, marks=slow),
        pytest.param(tiny.llama, CLASSES, marks=slow),
        pytest.param(tiny.mamba, CLASSES, marks=slow),
    ],
)
def test_the_file_answers_like_the_model_on_batches_of_other_shapes(tmp_path, base, architecture):
    made = base(torch.float32, architecture)
    made.model.config.pad_token_id = 0
    onnx_graph.write(made.model, {name: part[:2] for name, part in made.batch.items()}, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    check_equal(made.model, onnx_graph.Exported(tmp_path / "m.onnx"), made.batch)


@pytest.mark.parametrize(
    ("base", "targets"),
    [
        (tiny.resnet, r".*stages\.\d+\.layers\.\d+"),
        pytest.param(tiny.vit, r".*(o_proj|fc2)", marks=slow),
        pytest.param(tiny.mamba, r".*out_proj", marks=slow),
    ],
)
def test_a_compacted_sparse_adapter_keeps_its_modules_in_the_graph(tmp_path, base, targets):
    made = base(torch.float32)
    untouched = made.outputs(made.model)
    register_with_peft()
    model = get_peft_model(made.model, SparseAdapterConfig(r=6, target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(0)
    for _, layer in compaction.layers(model, "default"):
        up_ER = layer.sparse_up["default"].data
        up_ER += 0.3 * torch.randn(up_ER.shape, generator=generator)
        layer.prune("default", {"units": torch.tensor([True, False, True, False, False, True])})
    compaction.compact(model)
    plain = model.get_base_model()
    onnx_graph.write(plain, {name: part[:2] for name, part in made.batch.items()}, tmp_path / "m.onnx")
    check_equal(plain, onnx_graph.Exported(tmp_path / "m.onnx"), made.batch)
    assert not torch.allclose(made.outputs(plain), untouched, atol=1e-2)


def test_eight_bits_make_it_smaller_and_near(tmp_path):
    made = tiny.vit(torch.float32)
    onnx_graph.write(made.model, made.batch, tmp_path / "m.onnx")
    onnx_graph.quantise(tmp_path / "m.onnx", tmp_path / "q.onnx")
    exact, rounded = (onnx_graph.Exported(tmp_path / name)(**made.batch).logits for name in ("m.onnx", "q.onnx"))
    assert 0 < (exact - rounded).abs().max() < 0.5 * exact.std()
    weights = sum(parameter.numel() for parameter in made.model.parameters())
    assert (tmp_path / "m.onnx").stat().st_size - (tmp_path / "q.onnx").stat().st_size > 2 * weights


def test_the_scan_as_an_operator_equals_the_scan():
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.rand(2, 9, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    A, state = -torch.rand(4, 3, generator=generator, dtype=torch.float64), torch.ones(2, 4, 3, dtype=torch.float64)
    B, C = (torch.randn(2, 9, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[1, 4] = True
    for more in ((None, None), (state, None), (state, resets)):
        for ours, expected in zip(
            _step_by_step(x, delta, A, B, C, *more), selective_scan(x, delta, A, B, C, *more), strict=True
        ):
            assert torch.allclose(ours, expected, atol=1e-12)


class Undecided(nn.Module):
    """Takes one of two ways by what it reads, which a graph cannot."""

    def __init__(self):
        super().__init__()
        self.config = tiny.vit_shape()

    def forward(self, pixel_values):
        if pixel_values.sum() > 0:
            return tiny.vit
        return pixel_values


def test_a_model_without_a_graph_says_so(tmp_path):
    with pytest.raises(UserError, match="a model of type vit cannot be exported: ") as failed:
        onnx_graph.write(Undecided(), {"pixel_values": torch.zeros(2, 3, 4, 4)}, tmp_path / "m.onnx")
    assert "\n" not in failed.value.mistakes[0].what
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_run_and_one_that_answers_otherwise_fail_the_check(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a graph")
    with pytest.raises(CheckFailed, match=r"export-drift: ONNX Runtime cannot compute m\.onnx"):
        onnx_graph.Exported(tmp_path / "m.onnx")
    told = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    onnx_folder._within(compare(told + 1e-4, told, told), "m.onnx")
    off = told.clone()
    off[7] += 0.01
    for other in (off, told * torch.nan):
        with pytest.raises(CheckFailed, match=r"export-drift: outputs of m\.onnx differ"):
            onnx_folder._within(compare(other, told, told), "m.onnx")


def test_eight_bits_may_move_the_scores_and_not_make_them() -> None:
    told = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    onnx_folder._near(compare(told + 0.2, told, told))
    for other in (told + 0.4, told.flip(0), told * torch.nan):
        with pytest.raises(CheckFailed, match="export-drift: 8-bit weights change the scores"):
            onnx_folder._near(compare(other, told, told))


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(onnx_graph, "PACKAGES", ("onnx", "onnx_that_nobody_has"))
    with pytest.raises(UserError, match="--onnx needs onnx_that_nobody_has, which is not installed") as failed:
        onnx_graph.check_installed()
    assert failed.value.mistakes[0].hint == 'pip install "peftcli[onnx]"'
