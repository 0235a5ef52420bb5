"""Synthesised harmonic tones with exact pitches, and the accuracy of a pitch network on them, for `benchmarks/factorization_crepe.py`.

A frame holds 1024 samples at 16 kHz, zero mean and unit variance, as CREPE reads them (Kim et al. 2018). Tones differ in pitch (60 to 1000 Hz, uniform on a
log scale), in the number, decay, gaps and phases of their harmonics, in a broad resonance, and in their noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor

SAMPLES, RATE = 1024, 16000
LOWEST, HIGHEST, BINS = 60.0, 1000.0, 360
FIRST_CENTS, CENTS_A_BIN = 1997.3794084376191, 20.0  # of the network's bins, above 10 Hz
CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class Tones:
    """`frames: [N, 1024] float32` and their fundamental frequencies `pitch: [N] float32`, in Hz."""

    frames: Tensor
    pitch: Tensor

    def batches(self, size: int) -> list[Tensor]:
        """The frames in batches."""
        return list(self.frames.split(size))


def synthesise(count: int, *, seed: int, noise: tuple[float, float] = (0.0, 0.0)) -> Tones:
    """`count` tones; their signal-to-noise ratio in decibels is uniform in the range `noise`."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)

    pitch = torch.exp(uniform(log(LOWEST), log(HIGHEST), count, 1))
    order = torch.arange(1, int(RATE / 2 / LOWEST) + 1, dtype=torch.float64)  # [H]
    frequency = pitch * order
    loudness = order ** -uniform(0.3, 1.8, count, 1)
    resonance, width = uniform(200.0, 4000.0, count, 1), uniform(150.0, 900.0, count, 1)
    loudness = loudness * (1 + uniform(0.0, 6.0, count, 1) * torch.exp(-((frequency - resonance) / width).square()))
    loudness = loudness * torch.where(order % 2 == 0, uniform(0.1, 1.0, count, 1), 1.0)  # some have weak even harmonics, as a clarinet has
    loudness = loudness * (0.25 + 0.75 * torch.rand(loudness.shape, generator=g, dtype=torch.float64))
    loudness = loudness * (order <= uniform(4.0, 40.0, count, 1)) * (frequency < 0.95 * RATE / 2)
    phase = uniform(0.0, 2 * pi, *frequency.shape)
    time = torch.arange(SAMPLES, dtype=torch.float64) / RATE
    tone = torch.stack(
        [(a.unsqueeze(1) * torch.sin(2 * pi * f.unsqueeze(1) * time + p.unsqueeze(1))).sum(0) for a, f, p in zip(loudness, frequency, phase, strict=True)]
    )
    hiss = torch.randn(count, SAMPLES, generator=g, dtype=torch.float64)
    level = 10 ** (-uniform(*noise, count, 1) / 20)
    frames = tone / tone.std(1, keepdim=True) + level * hiss / hiss.std(1, keepdim=True)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return Tones(frames=frames.float(), pitch=pitch.squeeze(1).float())


def decoded(activation: Tensor) -> Tensor:
    """Pitch in cents above 10 Hz, `[N]`, of activations `[N, 360]`: their mean over the nine bins around the highest (Kim et al. 2018)."""
    bins = torch.arange(BINS)
    near = (bins - activation.argmax(1, keepdim=True)).abs() <= 4
    weights = activation.double().clamp_min(0) * near
    return (weights * (FIRST_CENTS + CENTS_A_BIN * bins)).sum(1) / weights.sum(1).clamp_min(1e-12)


def cents(pitch: Tensor) -> Tensor:
    """Cents above 10 Hz."""
    return 1200 * torch.log2(pitch.double() / 10)


def activations(model: Callable[[Tensor], Tensor], tones: Tones) -> Tensor:
    """`[N, 360]` of all tones, in chunks."""
    with torch.no_grad():
        return torch.cat([model(x) for x in tones.batches(CHUNK)])


def accuracy(activation: Tensor, tones: Tones) -> float:
    """Percent of the tones whose pitch is found within 50 cents."""
    return 100 * float(((decoded(activation) - cents(tones.pitch)).abs() <= 50).double().mean())


def agreement(activation: Tensor, other: Tensor) -> float:
    """Percent of the frames where two networks are within 50 cents of each other."""
    return 100 * float(((decoded(activation) - decoded(other)).abs() <= 50).double().mean())
