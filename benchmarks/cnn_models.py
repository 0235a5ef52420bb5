"""The two image classifiers of the benchmarks, and their weights as `benchmarks/train_fashion.py` left them in the cache folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fxpress.ir.files import cache_dir


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, and its batch norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs))


class SmallCnn(nn.Module):
    """Five convolutions and two linears, `[B, 1, 28, 28] -> [B, 10]`; 22 million multiply-adds."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128), hidden: int = 128) -> None:
        super().__init__()
        a, b, c = widths
        layers: list[nn.Module] = []
        for inputs, outputs, pool in ((1, a, False), (a, a, True), (a, b, False), (b, b, True), (b, c, True)):
            layers += [*conv_bn(inputs, outputs), nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(9 * c, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.features(x))


class Block(nn.Module):
    """The basic block of ResNet (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, stride=stride)
        self.second = conv_bn(outputs, outputs)
        self.shortcut = conv_bn(inputs, outputs, kernel=1, stride=stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]`."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18's layout (two basic blocks at each of four widths) with a 3x3 stem of stride 1; `[B, 1, 28, 28] -> [B, 10]`, 28 million multiply-adds."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = conv_bn(1, width)
        widths = [width * 2 ** (i // 2) for i in range(8)]
        pairs = zip([width, *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(Block(a, b, stride=1 + (a != b)) for a, b in pairs))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": SmallCnn, "resnet18": ResNet18}


def folder_of(name: str) -> Path:
    """Where the weights of `name` are kept."""
    return cache_dir() / "fashion-nets" / name


def load_trained(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The trained net in evaluation mode, and what its training recorded (accuracies in percent, settings)."""
    folder = folder_of(name)
    if not (folder / "training.json").exists():
        raise SystemExit(f"{name} is not trained yet: run  python benchmarks/train_fashion.py {name}")
    model = MODELS[name]()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), json.loads((folder / "training.json").read_text(encoding="utf-8"))


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch: int = 250) -> float:
    """Percent of images whose largest logit is at their label."""
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(batch), labels.split(batch), strict=True))
    return 100 * hits / len(labels)
