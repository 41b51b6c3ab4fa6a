"""SmolLM2-135M-Instruct: from a 4-bit GGUF file to the folder that `AutoModelForCausalLM.from_pretrained` reads.

The weights are read with the `gguf` library, one tensor at a time: what Transformers loads from a GGUF keeps its
packed layers and cannot be saved.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from gguf import GGUFReader
from gguf.quants import dequantize

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "embed_tokens", "output_norm": "norm"}


def convert(source: Path, out: Path) -> dict:
    """Writes config, bfloat16 weights, tokenizer and chat template into `out`, and checks that the model speaks.

    Args:
        source: The unpacked package: one `.gguf` file and the licence, anywhere below.

    Returns:
        Notes for `sample.json`.
    """
    path = next(source.rglob("*.gguf"))
    reader = GGUFReader(path)
    config = _config(reader)
    config.save_pretrained(out)
    _save_weights(reader, config, out)
    _save_tokenizer(path, config, out)
    for licence in source.rglob("LICENSE"):
        shutil.copyfile(licence, out / "LICENSE")
    return {"dtype": "bfloat16", "check": _check(out)}


def _value(reader: GGUFReader, key: str):
    return reader.fields[key].contents()


def _config(reader: GGUFReader):
    from transformers import LlamaConfig

    special = {name: _value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=_value(reader, "llama.vocab_size"),
        hidden_size=_value(reader, "llama.embedding_length"),
        intermediate_size=_value(reader, "llama.feed_forward_length"),
        num_hidden_layers=_value(reader, "llama.block_count"),
        num_attention_heads=_value(reader, "llama.attention.head_count"),
        num_key_value_heads=_value(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_value(reader, "llama.context_length"),
        rms_norm_eps=round(_value(reader, "llama.attention.layer_norm_rms_epsilon"), 10),  # stored as float32
        rope_parameters={"rope_type": "default", "rope_theta": _value(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=special["bos"],
        eos_token_id=special["eos"],
        pad_token_id=special["padding"],
        dtype="bfloat16",
    )


def _save_weights(reader: GGUFReader, config, out: Path) -> None:
    from safetensors.torch import save_file

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        value = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
        *block, part, _ = tensor.name.split(".")  # blk.3.attn_q.weight, or token_embd.weight
        if part in heads:
            value = _unpermute(value, heads[part])
        name = f"model.layers.{block[1]}.{LAYER[part]}.weight" if block else f"model.{TOP[part]}.weight"
        weights[name] = value.contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def _unpermute(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF interleaves the two halves of each head for its rotary embedding; Transformers keeps them apart."""
    half = weight_OI.shape[0] // heads // 2
    return weight_OI.view(heads, half, 2, -1).transpose(1, 2).reshape(weight_OI.shape)


def _save_tokenizer(path: Path, config, out: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # `tokenizer.ggml.pre = smollm`: each digit by itself, then GPT-2's words. Transformers only reads the latter.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)
    special = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    GenerationConfig(**special, pad_token_id=config.pad_token_id).save_pretrained(out)


def _check(out: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peftcli.config.errors import CheckFailed

    prompt, expected = "The capital of France is", " Paris"
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        logits_V = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    said = tokenizer.decode(logits_V.argmax())
    if said != expected:
        raise CheckFailed("sample-conversion", f"{prompt!r} continues with {said!r} instead of {expected!r}")
    return f"{prompt!r} continues with {said!r}"
