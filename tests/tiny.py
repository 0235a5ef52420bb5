"""A zoo of tiny models with fixed seeds: every architecture family the compiler must capture, built from configs, no downloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from fxpress.ir.capture import capture
from fxpress.ir.program import Program

Call = tuple[tuple[Any, ...], dict[str, Any]]
SPREAD = 0.2  # standard deviation of the initial weights: large enough for attention to be far from uniform


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """A model in evaluation mode, what to capture it with, and `other`: a call at other dynamic sizes (None when all are fixed)."""

    model: nn.Module
    example_inputs: Any
    dynamic_shapes: Any = None
    other: Call | None = None

    @property
    def call(self) -> Call:
        """The example inputs as `(args, kwargs)`."""
        return ((), dict(self.example_inputs)) if isinstance(self.example_inputs, Mapping) else (tuple(self.example_inputs), {})


def seeded(seed: int = 0) -> torch.Generator:
    """A fresh generator."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal values that depend on nothing but shape and seed."""
    return torch.randn(*shape, generator=seeded(seed))


def tokens(batch: int, length: int, vocabulary: int = 96, seed: int = 0) -> Tensor:
    """Token ids `[batch, length] int64`."""
    return torch.randint(vocabulary, (batch, length), generator=seeded(seed))


class Mlp(nn.Module):
    """Two linears, the second without a bias."""

    def __init__(self, width: int = 12, hidden: int = 20, out: int = 6) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width] -> [..., out]`."""
        return self.down(torch.relu(self.up(x)))


class ConvNet(nn.Module):
    """Conv, batch norm and relu twice (stride, padding, dilation), pooled into a linear; `groups` splits the second conv."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=groups)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W] -> [B, 5]`."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Conv1dNet(nn.Module):
    """A strided and a `same`-padded conv over a signal, pooled into a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 6, 5, stride=2, padding=2)
        self.conv2 = nn.Conv1d(6, 4, 3, padding="same", dilation=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 2, T] -> [B, 3]`."""
        return self.head(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean(-1))


class UNet(nn.Module):
    """One level down and up again, the skip concatenated with two upsampled tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.merge = nn.Conv2d(18, 6, 3, padding=1)
        self.leave = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W] -> [B, 2, H, W]`."""
        skip = torch.relu(self.enter(x))
        deep = torch.relu(self.norm(self.down(skip)))
        joined = torch.cat([skip, self.up(deep), nn.functional.interpolate(deep, scale_factor=2.0)], 1)
        return self.leave(torch.relu(self.merge(joined)))


class Repeated(nn.Module):
    """One linear applied three times: three sites share a weight and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, 4] -> [N, 4]`."""
        return self.step(torch.relu(self.step(torch.relu(self.step(x)))))


class EmbeddingNet(nn.Module):
    """An embedding tied to its output projection, around one linear."""

    def __init__(self, vocabulary: int = 24, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, T] int64 -> [B, T, vocabulary]`."""
        return self.head(torch.tanh(self.mix(self.embed(ids))))


def _settled(model: nn.Module) -> nn.Module:
    """Evaluation mode with batch-norm statistics and norm weights that are not the trivial zeros and ones."""
    generator = seeded(7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def _plain(model: nn.Module, *inputs: Tensor, other: Tensor | None = None, axes: Mapping[int, Any] | None = None) -> TinyModel:
    shapes = None if axes is None else (dict(axes),)
    return TinyModel(model=_settled(model), example_inputs=inputs, dynamic_shapes=shapes, other=None if other is None else ((other,), {}))


def _token_call(length: int, batch: int = 2) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length // 2 :] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def _language(model: nn.Module) -> TinyModel:
    axes = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=64)}
    inputs = _token_call(8)
    return TinyModel(model=_settled(model), example_inputs=inputs, dynamic_shapes=dict.fromkeys(inputs, axes), other=((), _token_call(13, batch=3)))


def _image(model: nn.Module, size: int = 32) -> TinyModel:
    axes = {0: Dim("batch", min=1, max=64)}
    inputs, other = {"pixel_values": randn(2, 3, size, size)}, {"pixel_values": randn(3, 3, size, size, seed=1)}
    return TinyModel(model=_settled(model), example_inputs=inputs, dynamic_shapes={"pixel_values": axes}, other=((), other))


def _llama(*, tied: bool = False, attention: str = "sdpa") -> TinyModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, attn_implementation=attention, use_cache=False, initializer_range=SPREAD,
    )  # fmt: skip
    return _language(LlamaForCausalLM(config))


def _opt() -> TinyModel:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32, use_cache=False, init_std=SPREAD,
    )  # fmt: skip
    return _language(OPTForCausalLM(config))


def _gpt2() -> TinyModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False, initializer_range=SPREAD, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _language(GPT2LMHeadModel(config))


def _bert() -> TinyModel:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        initializer_range=SPREAD,
    )  # fmt: skip
    return _language(BertModel(config))


def _vit() -> TinyModel:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8, num_labels=5,
        initializer_range=SPREAD,
    )  # fmt: skip
    return _image(ViTForImageClassification(config), size=16)


def _resnet() -> TinyModel:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    return _image(ResNetForImageClassification(config))


def _convnext() -> TinyModel:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return _image(ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=5, initializer_range=SPREAD)))


def _mobilenet_v2() -> TinyModel:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return _image(MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.1, min_depth=4, finegrained_output=True, num_labels=5)))


def _batch() -> Any:
    return Dim("batch", min=1, max=64)


BUILDERS: dict[str, Callable[[], TinyModel]] = {
    "mlp": lambda: _plain(Mlp(), randn(4, 12), other=randn(7, 12, seed=1), axes={0: _batch()}),
    "conv": lambda: _plain(ConvNet(), randn(2, 3, 12, 12), other=randn(3, 3, 12, 12, seed=1), axes={0: _batch()}),
    "grouped": lambda: _plain(ConvNet(groups=2), randn(2, 3, 12, 12)),
    "depthwise": lambda: _plain(ConvNet(groups=8), randn(2, 3, 12, 12)),
    "conv1d": lambda: _plain(Conv1dNet(), randn(2, 2, 24), other=randn(3, 2, 30, seed=1), axes={0: _batch(), 1: Dim.STATIC, 2: Dim("time", min=4, max=128)}),
    "unet": lambda: _plain(UNet(), randn(2, 3, 8, 8), other=randn(3, 3, 8, 8, seed=1), axes={0: _batch()}),
    "repeated": lambda: _plain(Repeated(), randn(3, 4), other=randn(5, 4, seed=1), axes={0: _batch()}),
    "embedding": lambda: _plain(EmbeddingNet(), tokens(2, 6, 24), other=tokens(3, 9, 24, seed=1), axes={0: _batch(), 1: Dim("length", min=1, max=64)}),
    "llama": _llama,
    "llama_tied": lambda: _llama(tied=True),
    "llama_eager": lambda: _llama(attention="eager"),
    "opt": _opt,
    "gpt2": _gpt2,
    "bert": _bert,
    "vit": _vit,
    "resnet": _resnet,
    "convnext": _convnext,
    "mobilenet_v2": _mobilenet_v2,
}  # fmt: skip
SMALL = ("mlp", "conv", "grouped", "depthwise", "conv1d", "unet", "repeated", "embedding")
TRANSFORMERS = tuple(name for name in BUILDERS if name not in SMALL)


@cache
def tiny(name: str) -> TinyModel:
    """The model called `name`, built once a session from a fixed seed. Do not change it: tests share it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILDERS[name]()


@cache
def _captured(name: str) -> Program:
    model = tiny(name)
    return capture(model.model, model.example_inputs, dynamic_shapes=model.dynamic_shapes)


def fresh_program(name: str) -> Program:
    """A program of the tiny model called `name`, free to edit: a clone of the one capture a session."""
    return _captured(name).clone()
