"""Fashion-MNIST (Xiao et al. 2017, MIT), read from the Debian package that holds it.

An installed package is read in place; else the package is downloaded once with apt-get into the cache folder, without being installed. Every file
is checked against its sha256 each time it is read.
"""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..ir.errors import AssetError
from ..ir.files import atomic_folder, cache_dir

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530  # of the training images, scaled to 0..1
HELD_OUT = 5000


@dataclass(frozen=True, kw_only=True)
class Files:
    """The two files of one half of the data set, with their sha256."""

    images: tuple[str, str]
    labels: tuple[str, str]


TRAIN = Files(
    images=("train-images-idx3-ubyte.gz", "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"),
    labels=("train-labels-idx1-ubyte.gz", "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"),
)
TEST = Files(
    images=("t10k-images-idx3-ubyte.gz", "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"),
    labels=("t10k-labels-idx1-ubyte.gz", "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"),
)
SPLITS = {"train": (TRAIN, slice(None, -HELD_OUT)), "validation": (TRAIN, slice(-HELD_OUT, None)), "test": (TEST, slice(None))}


def fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images `[N, 1, 28, 28] float32` (mean 0, deviation 1 over the training images) and labels `[N] int64`, ten classes.

    `train` is the first 55,000 training images, `validation` the last 5,000 of them, `test` the 10,000 test images.
    """
    if split not in SPLITS:
        raise AssetError(f"Fashion-MNIST has no split {split!r}; splits are {', '.join(SPLITS)}")
    files, part = SPLITS[split]
    folder = fashion_mnist_folder()
    images, labels = (read_idx(folder / name, sha256)[part] for name, sha256 in (files.images, files.labels))
    return (images.float()[:, None] / 255 - MEAN) / STD, labels.long()


def fashion_mnist_folder() -> Path:
    """The folder with the four `.gz` files: the installed package's, else one in the cache folder, fetched when missing."""
    names = [name for files in (TRAIN, TEST) for name, _ in (files.images, files.labels)]
    cached = cache_dir() / "fashion-mnist"
    for folder in (INSTALLED, cached):
        if all((folder / name).exists() for name in names):
            return folder
    with atomic_folder(cached, own=("*",)) as scratch:
        _fetch(scratch, names, cached)
    return cached


def _fetch(target: Path, names: list[str], home: Path) -> None:
    """Download the package and move its data files into `target`."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        _run(["apt-get", "download", PACKAGE], Path(scratch), home)
        (archive,) = Path(scratch).glob("*.deb")
        _run(["dpkg-deb", "-x", archive.name, "unpacked"], Path(scratch), home)
        for name in names:
            (Path(scratch) / "unpacked" / INSTALLED.relative_to("/") / name).replace(target / name)


def _run(command: list[str], folder: Path, home: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        trouble = done.stderr.strip()[-300:] if done.returncode else None
    except FileNotFoundError:
        trouble = "no such program"
    if trouble is not None:
        raise AssetError(
            f"cannot fetch Fashion-MNIST: {' '.join(command)} said {trouble!r}; run apt-get update and retry, "
            f"install the Debian package {PACKAGE}, or place its four .gz files in {home}"
        )


def read_idx(path: Path, sha256: str) -> Tensor:
    """A `.gz` file in the IDX format of MNIST as uint8: `[N, 28, 28]` images or `[N]` labels."""
    data = path.read_bytes()
    got = hashlib.sha256(data).hexdigest()
    if got != sha256:
        raise AssetError(f"{path} has sha256 {got}, expected {sha256}; delete the file and retry")
    raw = gzip.decompress(data)
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", count=axes, offset=4).astype(int).tolist()
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())
