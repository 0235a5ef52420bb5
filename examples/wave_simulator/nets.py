"""Two nets for waves, and how far they are off: over one step, and over many fed back into themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Conv = Callable[[int, int], nn.Module]
Run = Callable[[Tensor], Tensor]


def dense(inputs: int, outputs: int) -> nn.Module:
    """A plain 3 x 3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _edges(field: Tensor) -> Tensor:
    """The field with zeros at its edges, which the equation demands."""
    return F.pad(field[..., 1:-1, 1:-1], (1, 1, 1, 1))


class StepNet(nn.Module):
    """Frames k-1 and k (and what else is known) `[B, inputs, H, W]` -> frame k+1 `[B, 1, H, W]`: six convolutions that correct the last frame.

    `conv` makes the four inner ones.
    """

    def __init__(self, inputs: int = 2, width: int = 32, depth: int = 6, conv: Conv = dense) -> None:
        super().__init__()
        inner = [layer for _ in range(depth - 2) for layer in (conv(width, width), nn.ReLU())]
        self.layers = nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """The next frame."""
        return _edges(x[:, 1:2] + self.layers(x))


class UNet(nn.Module):
    """The first frame (and what else is known) `[B, inputs, H, W]` -> a later one `[B, 1, H, W]`: a U-Net of three levels (Ronneberger et al. 2015)."""

    def __init__(self, inputs: int = 1, widths: tuple[int, int, int] = (16, 32, 64), conv: Conv = dense) -> None:
        super().__init__()
        a, b, c = widths
        self.enter = nn.Sequential(nn.Conv2d(inputs, a, 3, padding=1), nn.ReLU(), conv(a, a), nn.ReLU())
        self.down = nn.Sequential(nn.MaxPool2d(2), conv(a, b), nn.ReLU(), conv(b, b), nn.ReLU())
        self.bottom = nn.Sequential(nn.MaxPool2d(2), conv(b, c), nn.ReLU(), conv(c, c), nn.ReLU())
        self.up = nn.Sequential(conv(c + b, b), nn.ReLU(), conv(b, b), nn.ReLU())
        self.leave = nn.Sequential(conv(b + a, a), nn.ReLU(), nn.Conv2d(a, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """The later frame."""
        fine = self.enter(x)
        middle = self.down(fine)
        coarse = F.interpolate(self.bottom(middle), size=middle.shape[2:])
        middle = self.up(torch.cat([coarse, middle], 1))
        return _edges(self.leave(torch.cat([F.interpolate(middle, size=fine.shape[2:]), fine], 1)))


@torch.no_grad()
def relative_error(run: Run, data: tuple[Tensor, Tensor], batch: int = 64) -> float:
    """Root of the squared error over the squared size, of all fields together."""
    x, y = data
    found = torch.cat([run(part) for part in x.split(batch)])
    return float((found - y).norm() / y.norm())


@torch.no_grad()
def rollout(run: Run, start: Tensor, steps: int) -> Tensor:
    """A step net fed its own frames: `start: [B, inputs, H, W]` -> `[B, steps, H, W]`."""
    frames = []
    for _ in range(steps):
        after = run(start)
        frames.append(after)
        start = torch.cat([start[:, 1:2], after, start[:, 2:]], 1)
    return torch.cat(frames, 1)


def rollout_error(run: Run, start: Tensor, truth: Tensor) -> float:
    """Relative error of a rollout over all of `truth: [B, steps, H, W]`."""
    return float((rollout(run, start, truth.shape[1]) - truth).norm() / truth.norm())
