"""Conversions on inputs small enough to write down: rows, cuts, and weights that compute the same function."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from peftcli.data.samples import images, text, wordnet
from peftcli.data.samples.table import percentile

WORDNET = {
    "noun": '00015388 05 n 02 animal 0 animate_being 0 000 | a living organism; "it moved"  ',
    "verb": "01835496 38 v 01 travel 0 000 01 + 08 00 | change location; move  ",
    "adj": "00001740 44 s 01 galore(ip) 0 000 | in great numbers | or so  ",
    "adv": "00001740 02 r 01 a_cappella 0 000 | without musical accompaniment  ",
}


def rows(path):
    return pq.read_table(path).to_pylist()


def folders(tmp_path):
    for name in ("source", "out"):
        (tmp_path / name).mkdir()
    return tmp_path / "source", tmp_path / "out"


def test_wordnet_rows(tmp_path, monkeypatch):
    source, out = folders(tmp_path)
    places = iter([95, 0, 89, 90])  # test, train, train, validation
    monkeypatch.setattr(wordnet, "percentile", lambda _: next(places))
    for pos, line in WORDNET.items():
        (source / f"data.{pos}").write_text(f"  1 This software and database  \n  2 is provided\n{line}\n")
    notes = wordnet.convert(source, out)
    assert notes["rows"] == {"train": 2, "validation": 1, "test": 1}
    (animal,) = rows(out / "test.parquet")
    assert animal == {
        "word": "animal",
        "gloss": 'a living organism; "it moved"',
        "definition": "a living organism",
        "category": "noun.animal",
        "pos": "noun",
        "synset": "noun-00015388",
    }
    travel, galore = rows(out / "train.parquet")
    assert (travel["definition"], travel["category"]) == ("change location; move", "verb.motion")
    assert (galore["word"], galore["category"], galore["pos"]) == ("galore", "adj.ppl", "adj")
    assert galore["gloss"] == "in great numbers | or so"
    assert rows(out / "validation.parquet")[0]["word"] == "a cappella"
    assert (out / "LICENSE").read_text() == "This software and database\nis provided\n"


def test_wordnet_has_45_categories():
    assert len(set(wordnet.CATEGORIES)) == 45
    assert {c.split(".")[0] for c in wordnet.CATEGORIES} == set(wordnet.POS.values())


def test_reuters_skips_headers_and_blanks_and_keeps_quotes(tmp_path):
    source, out = folders(tmp_path)
    head = "Category\tText\nd\tstring\nclass\t\n\n"
    (source / "reuters-r8-train.tab").write_text(head + 'earn\t he said "up \nacq\tdeal\nacq\t \n')
    (source / "reuters-r8-test.tab").write_text(head + "ship\tport\n")
    assert text.reuters(source, out)["rows"] == {"train": 2, "test": 1}
    assert rows(out / "train.parquet") == [{"text": 'he said "up', "label": "earn"}, {"text": "deal", "label": "acq"}]


def test_gsm8k_cut_is_called_ours(tmp_path):
    source, out = folders(tmp_path)
    lines = [json.dumps({"question": f"q{i}", "answer": f"#### {i}", "id": i}) for i in range(1319)]
    (source / "test.jsonl").write_text("\n".join(lines) + "\n")
    notes = text.gsm8k(source, out)
    assert notes["rows"] == {"train": 1000, "test": 319}
    assert "our own cut" in notes["splits"]
    assert rows(out / "test.parquet")[0] == {"question": "q1000", "answer": "#### 1000"}


def test_emoji_skin_tones_stay_in_one_split(tmp_path):
    source, out = folders(tmp_path)
    folder = source / "package/img/google/64"
    folder.mkdir(parents=True)
    (source / "LICENSE").touch()
    entries = []
    for i in range(40):
        tones = {str(t): {"image": f"{i}-{t}.png"} for t in range(3)}
        category = {"category": "Food & Drink", "subcategory": "food"} if i else {"category": "Component"}
        entries.append({"subcategory": "", **category, "name": f"N{i}", "unified": f"U{i}", "image": f"{i}.png"})
        entries[-1]["skin_variations"] = tones
        for name in (f"{i}.png", *(tone["image"] for tone in tones.values())):
            (folder / name).write_bytes(name.encode())
    (folder / "7-1.png").unlink()  # not every style draws every emoji
    (source / "emoji.json").write_text(json.dumps(entries))
    counts = images.emoji(source, out)["rows"]
    assert sum(counts.values()) == 39 * 4 - 1
    train, test = (rows(out / f"{split}.parquet") for split in ("train", "test"))
    assert test
    assert not {row["emoji"] for row in train} & {row["emoji"] for row in test}
    assert {row["label"] for row in train} == {"Food & Drink"}
    assert train[0]["image"]["bytes"].decode() == train[0]["image"]["path"]


def test_digits_keep_their_pixels_and_decode_as_images(tmp_path):
    from datasets import Dataset
    from datasets import Image as ImageFeature
    from sklearn.datasets import load_digits

    source, out = folders(tmp_path)
    assert sum(images.digits(source, out)["rows"].values()) == 1797
    dataset = Dataset.from_parquet(str(out / "test.parquet"), cache_dir=str(tmp_path / "hf"))
    assert isinstance(dataset.features["image"], ImageFeature)
    row = rows(out / "test.parquet")[5]
    pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
    index = int(row["name"][:4])
    assert np.array_equal(np.round(pixels / 255 * 16), load_digits().images[index])
    assert row["label"] == str(load_digits().target[index])


def test_elpv_labels_and_modules(tmp_path):
    source, out = folders(tmp_path)
    (source / "data/images").mkdir(parents=True)
    (source / "LICENSE.md").touch()
    known = {60: ("0.0", "mono"), 61: (str(1 / 3), "poly"), 1315: (str(2 / 3), "mono"), 1375: ("1.0", "mono")}
    lines = []
    for number, (probability, cell) in known.items():
        (source / f"data/images/cell{number:04}.png").write_bytes(b"png")
        lines.append(f"images/cell{number:04}.png  {probability}   {cell}")
    (source / "data/labels.csv").write_text("\n".join(lines) + "\n")
    assert images.elpv(source, out)["rows"] == {"train": 2, "validation": 1, "test": 1}
    found = [row for split in ("test", "train", "validation") for row in rows(out / f"{split}.parquet")]
    assert [row["name"][4:8] for row in found] == ["0060", "0061", "1315", "1375"]
    assert [row["label"] for row in found] == ["functional", "functional", "defective", "defective"]
    assert [row["module"] for row in found] == [1, 2, 23, 24]
    assert found[1]["cell"] == "poly"


def test_elpv_modules_hold_every_cell_and_lie_in_one_split():
    assert (len(images.MODULES), sum(images.MODULES)) == (44, 2624)
    validation, test = images.ELPV_SPLITS.values()
    assert not set(validation) & set(test)
    assert set(validation) | set(test) <= set(range(1, 45))


def test_percentile_is_even_and_stable():
    counts = np.bincount([percentile(f"noun-{i:08}") for i in range(20_000)], minlength=100)
    assert counts.shape == (100,)
    assert counts.min() > 140
    assert percentile("noun-00001740") == 98


def test_plain_vit_computes_what_dinov2_computes(tmp_path):
    from safetensors.torch import load_file
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    from peftcli.data.samples import vit

    torch.manual_seed(0)
    shape = {**vit.SHAPE, "num_hidden_layers": 2}
    source = Dinov2Model(Dinov2Config(**shape, image_size=14 * vit.TRAINED, mlp_ratio=4)).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    source.save_pretrained(tmp_path / "dinov2")
    plain = vit.plain_vit(load_file(tmp_path / "dinov2/model.safetensors"))
    config = ViTConfig(**shape, image_size=224, intermediate_size=1536, layer_norm_eps=1e-6)
    vit.onnx_file.save(ViTModel, config, plain, tmp_path / "vit", add_pooling_layer=False)
    pixels_1CHW = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = source(pixels_1CHW).last_hidden_state
        found = ViTModel.from_pretrained(tmp_path / "vit")(pixels_1CHW).last_hidden_state
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_weight_too_few_is_told(tmp_path):
    from transformers import ResNetConfig, ResNetModel

    from peftcli.config.errors import CheckFailed
    from peftcli.data.samples import onnx_file

    config = ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1])
    weights = ResNetModel(config).state_dict()
    weights.pop("embedder.embedder.convolution.weight")
    weights["stray"] = torch.zeros(1)
    with pytest.raises(CheckFailed, match=r"missing: .*embedder.convolution.weight.*unexpected: .*stray"):
        onnx_file.save(ResNetModel, config, weights, tmp_path / "out")


def test_stem_takes_normalised_rgb_for_bgr_bytes():
    from peftcli.data.samples import resnet
    from peftcli.data.samples.onnx_file import IMAGENET_STD

    rgb_1CHW = torch.randint(0, 256, (1, 3, 16, 16)).float()
    kernel_OIHW = torch.randn(4, 3, 7, 7)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (resnet.MEAN_RGB, IMAGENET_STD))
    original = rgb_1CHW.flip(1) - torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)
    expected = torch.nn.functional.conv2d(original, kernel_OIHW, padding=3)
    found = torch.nn.functional.conv2d(
        (rgb_1CHW / 255 - mean) / std, resnet._for_normalised_rgb(kernel_OIHW), padding=3
    )
    assert torch.allclose(found, expected, atol=1e-2, rtol=1e-4)


def test_gguf_weights_compute_the_same_function(tmp_path):
    """A tiny model with two heads to each key, written the way GGUF does, comes back as it was."""
    from gguf import GGUFReader, GGUFWriter
    from transformers import LlamaConfig, LlamaForCausalLM

    from peftcli.data.samples import smollm2

    torch.manual_seed(0)
    numbers = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "max_position_embeddings": 64}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**numbers, **heads, **rope, **special, rms_norm_eps=1e-5)).bfloat16().eval()
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_vocab_size(40)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = {v: k for k, v in {**smollm2.LAYER, **smollm2.TOP}.items()}
    for name, tensor in model.model.named_parameters():
        *block, part = name.removesuffix(".weight").replace("layers.", "").split(".", 1)
        gguf_name = f"blk.{block[0]}.{names[part]}" if block else names[part]
        value = tensor.detach().float().numpy()
        for projection, count in (("q_proj", 4), ("k_proj", 2)):
            if projection in part:  # llama.cpp's own permutation, from its converter
                value = value.reshape(count, 2, value.shape[0] // count // 2, 32).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{gguf_name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = GGUFReader(tmp_path / "tiny.gguf")
    config = smollm2._config(reader)
    config.save_pretrained(tmp_path)
    smollm2._save_weights(reader, config, tmp_path)
    found = LlamaForCausalLM.from_pretrained(tmp_path)
    assert found.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    assert found.config.rope_parameters == model.config.rope_parameters
    assert found.config.rms_norm_eps == model.config.rms_norm_eps
    assert found.config.num_key_value_heads == 2
