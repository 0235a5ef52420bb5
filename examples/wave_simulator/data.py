"""Trajectories of random pulses, split by trajectory, and the two tasks nets learn from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...passes.examples import Labelled
from .fem import WaveEquation

EVERY = 4  # time steps of half the mesh width a frame: waves move two cells
SLOW = (0.5, 0.9)  # speed of the second layer; the first has 1


@dataclass(frozen=True)
class Layers:
    """A medium of speed 1 before the `interface` along x, and `slow` behind it."""

    interface: float
    slow: float

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Speeds at the places."""
        return np.where(x < self.interface, 1.0, self.slow)


@dataclass(frozen=True)
class Waves:
    """`u: [trajectories, frames, nodes, nodes] float32`, and the `speed: [trajectories, 1, nodes, nodes]` where it varies."""

    u: Tensor
    speed: Tensor | None = None

    def split(self, *counts: int) -> list[Waves]:
        """Whole trajectories for training, validation, test."""
        speeds = self.speed.split(counts) if self.speed is not None else [None] * len(counts)
        return [Waves(u, s) for u, s in zip(self.u.split(counts), speeds, strict=True)]

    def steps(self) -> tuple[Tensor, Tensor]:
        """One-step task: frames k-1 and k `[N, 2, nodes, nodes]` (and the speed as a third channel) -> frame k+1 `[N, 1, nodes, nodes]`."""
        before, after = self.u.unfold(1, 3, 1).movedim(-1, 2).split([2, 1], 2)
        return self._with_speed(before).flatten(0, 1), after.flatten(0, 1)

    def fields(self, frame: int) -> tuple[Tensor, Tensor]:
        """Field task: the first frame `[N, 1, nodes, nodes]` (and the speed as a second channel) -> a later one."""
        return self._with_speed(self.u[:, None, :1]).squeeze(1), self.u[:, frame : frame + 1]

    def _with_speed(self, fields: Tensor) -> Tensor:
        """`[N, frames, channels, nodes, nodes]` and the speed as one more channel."""
        if self.speed is None:
            return fields
        return torch.cat([fields, self.speed[:, None].expand(-1, fields.shape[1], -1, -1, -1)], 2)


def simulate(count: int, *, nodes: int = 33, frames: int = 50, layered: bool = False, seed: int = 0) -> Waves:
    """`count` trajectories of pulses at rest; fields are scaled to a mean square of one over all of them. `layered`: two layers of different speeds in each."""
    generator = np.random.default_rng(seed)
    starts, steps = pulses(count, nodes, generator), EVERY * (frames - 1)
    if not layered:
        found, speeds = WaveEquation(nodes).run(starts, steps, every=EVERY).u, None
    else:
        media = [Layers(generator.uniform(0.3, 0.7), generator.uniform(*SLOW)) for _ in range(count)]
        speeds = np.stack([m(*grid(nodes)) for m in media])[:, None]
        found = np.concatenate([WaveEquation(nodes, m).run(s[None], steps, every=EVERY).u for s, m in zip(starts, media, strict=True)])
    u = torch.from_numpy(found / np.sqrt(np.mean(found**2))).float()
    return Waves(u, torch.from_numpy(speeds).float() if speeds is not None else None)


def pulses(count: int, nodes: int, generator: np.random.Generator) -> np.ndarray:
    """Sums of one to three Gaussian pulses `[count, nodes, nodes]`: centres in (.2, .8), widths .04 to .1, heights .5 to 1.5."""
    x, y = grid(nodes)
    found = np.zeros((count, nodes, nodes))
    for field in found:
        for _ in range(generator.integers(1, 4)):
            (a, b), width, height = generator.uniform(0.2, 0.8, 2), generator.uniform(0.04, 0.1), generator.uniform(0.5, 1.5)
            field += height * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * width**2))
    found[:, [0, -1]] = found[:, :, [0, -1]] = 0
    return found


def grid(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the nodes, `[nodes, nodes]` each."""
    ticks = np.linspace(0, 1, nodes)
    x, y = np.meshgrid(ticks, ticks, indexing="ij")
    return x, y


def batches(data: tuple[Tensor, Tensor], *, size: int, count: int, noise: float = 0.0, seed: int = 0) -> list[Labelled]:
    """`count` labelled batches in random order, again from the start when the data is used up.

    `noise`: deviation of what is added to the input fields (not to the speed), fresh in every round, so that a net learns to damp what it would otherwise
    amplify when it is fed its own frames (Sanchez-Gonzalez et al., arXiv 2002.09405).
    """
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(x), generator=generator) for _ in range(-(-count * size // len(x)))]
    return [Labelled((_noisy(x[i], noise, generator),), y[i]) for i in torch.cat(rounds).split(size)[:count]]


def _noisy(x: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if not noise:
        return x
    added = noise * torch.randn(x[:, :2].shape, generator=generator)
    added[..., [0, -1], :] = added[..., [0, -1]] = 0
    return torch.cat([x[:, :2] + added, x[:, 2:]], 1)
