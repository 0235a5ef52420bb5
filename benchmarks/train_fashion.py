"""Train the benchmarks' image classifiers on Fashion-MNIST; killed and started again, it goes on at the last finished epoch.

    python benchmarks/train_fashion.py [cnn] [resnet18] [--epochs 10] [--threads 1]

Leaves model.safetensors and training.json (accuracies) in the cache folder. 5,000 training images are held out for validation; the test images are
read once, after the last epoch. A net that is already trained is left alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cnn_models import MODELS, accuracy, folder_of
from safetensors.torch import save_file
from torch import Tensor, nn

from fxpress.runtime.zoo_images import fashion_mnist


@dataclass(frozen=True, kw_only=True)
class Settings:
    """SGD with Nesterov momentum; the rate rises over the first epoch and falls along a cosine."""

    epochs: int = 10
    batch: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0

    def rate(self, progress: float) -> float:
        """Learning rate after `progress` epochs."""
        warm = min(1.0, (progress + 0.02) / 1.0)
        return self.lr * warm * (1 + math.cos(math.pi * progress / self.epochs)) / 2


def augment(images: Tensor, generator: torch.Generator, reach: int = 2) -> Tensor:
    """Every image shifted by up to `reach` pixels each way, and mirrored half of the time: `[B, 1, 28, 28]`."""
    count, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4, value=float(images.min()))
    top, left = (torch.randint(0, 2 * reach + 1, (count, 1), generator=generator) for _ in range(2))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def batches(images: Tensor, labels: Tensor, *, size: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """One epoch in random order, augmented; the last, smaller batch is left out."""
    order = torch.randperm(len(labels), generator=generator).split(size)
    return [(augment(images[i], generator), labels[i]) for i in order if len(i) == size]


def train(name: str, settings: Settings) -> None:
    """Train one net from its last checkpoint on, and write what it reached."""
    folder = folder_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    model = MODELS[name]().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, nesterov=True)
    state = _resume(folder / "checkpoint.pt", model, optimizer, settings)
    data, held_out = fashion_mnist("train"), fashion_mnist("validation")
    for epoch in range(state["epoch"], settings.epochs):
        began = time.perf_counter()
        loss = _epoch(model, optimizer, data, epoch, settings)
        found = accuracy(model.eval(), *held_out)
        state = {"epoch": epoch + 1, "seconds": state["seconds"] + time.perf_counter() - began, "validation": found, "settings": asdict(settings)}
        _save(folder / "checkpoint.pt", {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
        print(f"{name} epoch {epoch + 1}/{settings.epochs}: loss {loss:.4f}, validation {found:.2f} %, {state['seconds']:.0f} s so far", flush=True)
    record = {
        "validation_accuracy": state["validation"],
        "test_accuracy": accuracy(model.eval(), *fashion_mnist("test")),
        "training_seconds": state["seconds"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": asdict(settings),
        "torch": torch.__version__,
    }
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"{name}: test accuracy {record['test_accuracy']:.2f} %", flush=True)


def _epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], epoch: int, settings: Settings) -> float:
    """One pass over the data; its mean loss."""
    generator = torch.Generator().manual_seed(1000 * settings.seed + epoch)
    work = batches(*data, size=settings.batch, generator=generator)
    total = 0.0
    model.train()
    for step, (x, y) in enumerate(work):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(epoch + step / len(work))
        loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(work)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings) -> dict[str, Any]:
    """State after the last finished epoch; a checkpoint of other settings is refused."""
    if not path.exists():
        return {"epoch": 0, "seconds": 0.0}
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if state["settings"] != asdict(settings):
        raise SystemExit(f"{path} belongs to a run with {state['settings']}; give the same settings, or delete the file")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state


def _save(path: Path, state: dict[str, Any]) -> None:
    scratch = path.with_suffix(".part")
    torch.save(state, scratch)
    scratch.replace(path)


def main() -> None:
    """Train the nets that are named, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="net", help=f"of {', '.join(MODELS)}; none: all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names or MODELS:
        if (folder_of(name) / "training.json").exists():
            print(f"{name}: trained, in {folder_of(name)}")
        else:
            train(name, Settings(epochs=arguments.epochs))


if __name__ == "__main__":
    main()
