"""Loading: from folders, samples and shapes; frozen, in the right type; every wrong input a plain message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peftcli.config.errors import CheckFailed, UserError
from peftcli.config.schema import ModelConfig
from peftcli.models import checkpoint as places
from peftcli.models import loading
from peftcli.testing.tiny import llama

SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bfloat16 weights and a word-level tokenizer without a padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    llama(torch.bfloat16).model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "cat": 2, "dog": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    return folder


def from_folder(folder: Path, **more: object) -> ModelConfig:
    return ModelConfig(name=str(folder), source="folder", **more)


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [("fp32", "auto", torch.float32), ("bf16", "auto", torch.bfloat16), ("bf16", "float32", torch.float32)],
)
def test_folder(checkpoint: Path, precision: str, dtype: str, expected: torch.dtype) -> None:
    loaded = loading.load(from_folder(checkpoint, dtype=dtype), precision, "causal-lm", None)
    assert {p.dtype for p in loaded.model.parameters()} == {expected}
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.config.use_cache
    assert loaded.model.generation_config.use_cache
    assert (loaded.family.name, loaded.folder, loaded.base_id) == ("llama", checkpoint, str(checkpoint))
    weight = llama(torch.bfloat16).model.lm_head.weight
    assert torch.equal(loaded.model.lm_head.weight.bfloat16(), weight)


def test_a_missing_padding_token_becomes_the_end_token(checkpoint: Path) -> None:
    loaded = loading.load(from_folder(checkpoint), "fp32", "causal-lm", None)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.pad_token_id == 1
    assert loaded.model.config.pad_token_id == loaded.model.generation_config.pad_token_id == 1
    assert loading.tokenizer(from_folder(checkpoint))("cat dog")["input_ids"] == [2, 3]


def test_classification_head(checkpoint: Path) -> None:
    torch.manual_seed(3)
    loaded = loading.load(from_folder(checkpoint), "bf16", "sequence-classification", ["acq", "earn", "ship"])
    assert loaded.model.score.weight.shape == (3, 32)
    assert loaded.model.config.id2label == {0: "acq", 1: "earn", 2: "ship"}
    assert loaded.model.config.pad_token_id == 1
    assert torch.equal(loaded.model.model.embed_tokens.weight, llama(torch.bfloat16).model.model.embed_tokens.weight)


def test_sample(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path))
    config = ModelConfig(name="tiny", source="sample")
    with pytest.raises(UserError, match="peft samples fetch tiny"):
        loading.load(config, "fp32", "causal-lm", None)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "tiny").symlink_to(checkpoint)
    (checkpoint / "complete").touch()
    assert loading.load(config, "fp32", "causal-lm", None).base_id == "tiny"


def test_random_weights_are_the_same_in_every_run_and_leave_the_seed_alone() -> None:
    config = ModelConfig(name="tiny", weights="random", shape=SHAPE)
    torch.manual_seed(1)
    first = loading.load(config, "fp32", "causal-lm", None)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn
    second = loading.load(config, "fp32", "causal-lm", None)
    assert first.tokenizer is None
    assert torch.equal(first.model.lm_head.weight, second.model.lm_head.weight)


def test_random_weights_of_a_folder_keep_its_tokenizer(checkpoint: Path) -> None:
    loaded = loading.load(from_folder(checkpoint, weights="random"), "fp32", "causal-lm", None)
    assert loaded.tokenizer is not None
    assert not torch.equal(loaded.model.lm_head.weight, llama(torch.float32).model.lm_head.weight)


def test_shapes_alone_need_no_weights_and_no_network() -> None:
    config = ModelConfig(name="meta-llama/Llama-2-7b-hf", shape={**SHAPE, "num_hidden_layers": 40, "vocab_size": 32000})
    loaded = loading.load(config, "bf16", "sequence-classification", ["a", "b"], meta=True)
    assert {p.device.type for p in loaded.model.parameters()} == {"meta"}
    assert len(loaded.model.model.layers) == 40
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.score.out_features == 2


def mistake(config: ModelConfig) -> str:
    with pytest.raises(UserError) as error:
        loading.load(config, "fp32", "causal-lm", None)
    return str(error.value)


def test_wrong_folders(tmp_path: Path, checkpoint: Path) -> None:
    assert "does not exist" in mistake(from_folder(tmp_path / "nowhere"))
    assert "not a checkpoint: it has no config.json" in mistake(from_folder(tmp_path))
    assert "model.source=folder" in mistake(ModelConfig(name=str(tmp_path)))
    assert "did you mean: llama" in mistake(ModelConfig(name="x", weights="random", shape={"model_type": "lama"}))
    differing = from_folder(checkpoint, shape={"hidden_size": 64, "vocab_size": 64})
    assert mistake(differing).startswith("model.shape.hidden_size=64, but")
    assert "unknown model family 'lama'" in mistake(from_folder(checkpoint, family="lama"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"hiden_size": 3}, "did you mean: hidden_size"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
    ],
)
def test_wrong_shapes(more: dict[str, object], said: str) -> None:
    assert said in mistake(ModelConfig(name="x", weights="random", shape={**SHAPE, **more}))


def test_what_transformers_lacks_is_a_plain_message() -> None:
    config = ModelConfig(name="x", weights="random", shape={**SHAPE, "model_type": "granite"})
    with pytest.raises(UserError, match="AutoModelForSequenceClassification"):
        loading.load(config, "fp32", "sequence-classification", ["a"])
    config = ModelConfig(name="x", weights="random", shape=SHAPE, attention="flash_attention_2")
    assert "FlashAttention2" in mistake(config)


def copy_of(checkpoint: Path, folder: Path, without: str = "") -> Path:
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name != without:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_pickled_weights_are_not_opened(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path / "pickled", without="model.safetensors")
    assert "has no weights" in mistake(from_folder(folder))
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(CheckFailed, match=r"unsafe-weights.*pytorch_model\.bin"):
        loading.load(from_folder(folder), "fp32", "causal-lm", None)


def test_a_checkpoint_with_code_of_its_own_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path / "coded")
    shape = json.loads((folder / "config.json").read_text())
    shape |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckFailed, match="unsafe-weights"):
        loading.load(from_folder(folder), "fp32", "causal-lm", None)


def test_broken_weights(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(checkpoint, tmp_path / "broken")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in mistake(from_folder(folder))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    weights.unlink()
    save_file(tensors, weights, {"format": "pt"})
    assert "lacks 1 tensors" in mistake(from_folder(folder))
    assert "model.layers.1.mlp.up_proj.weight" in mistake(from_folder(folder))


def test_no_tokenizer(tmp_path: Path) -> None:
    llama(torch.float32).model.save_pretrained(tmp_path)
    assert "has no tokenizer" in mistake(from_folder(tmp_path))


def test_without_a_network_the_message_names_what_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "hub_answers", lambda: False)
    text = mistake(ModelConfig(name="nobody/nothing-at-all"))
    assert "cannot load 'nobody/nothing-at-all'" in text
    for way in ("model.source=sample", "model.source=folder", "HF_HOME"):
        assert way in text
