"""Fashion-MNIST: file format, checks, where the files are looked for, and (slow) the data themselves."""

from __future__ import annotations

import gzip
import hashlib
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fxpress.ir.errors import AssetError
from fxpress.runtime import zoo_images
from fxpress.runtime.zoo_images import TEST, TRAIN, fashion_mnist, fashion_mnist_folder, read_idx

NAMES = [TRAIN.images[0], TRAIN.labels[0], TEST.images[0], TEST.labels[0]]


def write_idx(path: Path, values: np.ndarray) -> str:
    """Write an IDX file; its sha256."""
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no installed package."""
    monkeypatch.setenv("FXPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo_images, "INSTALLED", tmp_path / "usr" / "fashion-mnist")
    return tmp_path


def test_idx_files_are_read_in_order(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    sha256 = write_idx(tmp_path / "x.gz", values)
    assert torch.equal(read_idx(tmp_path / "x.gz", sha256), torch.from_numpy(values.astype(np.uint8)))


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "x.gz", np.zeros(3))
    with pytest.raises(AssetError, match="expected 00"):
        read_idx(tmp_path / "x.gz", "00")


def test_unknown_split_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(AssetError, match="splits are train, validation, test"):
        fashion_mnist("valid")


def test_an_installed_package_is_read_in_place(nowhere: Path) -> None:
    zoo_images.INSTALLED.mkdir(parents=True)
    for name in NAMES:
        (zoo_images.INSTALLED / name).touch()
    assert fashion_mnist_folder() == zoo_images.INSTALLED


def test_files_placed_in_the_cache_are_found(nowhere: Path) -> None:
    folder = nowhere / "cache" / "fashion-mnist"
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).touch()
    assert fashion_mnist_folder() == folder


def test_a_failed_download_says_what_to_do_and_leaves_nothing(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 100, stderr="E: Unable to locate package")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(AssetError, match=r"Unable to locate package.*apt-get update.*place its four \.gz files"):
        fashion_mnist_folder()
    assert list((nowhere / "cache").iterdir()) == []


def test_a_machine_without_apt_says_so(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(nowhere))
    with pytest.raises(AssetError, match="no such program"):
        fashion_mnist_folder()


def test_splits_are_normalised_and_disjoint(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = nowhere / "cache" / "fashion-mnist"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    count = zoo_images.HELD_OUT + 7
    for name in NAMES:
        write_idx(folder / name, generator.integers(0, 10, (count,)) if "labels" in name else generator.integers(0, 256, (count, 2, 2)))
    checked = read_idx
    monkeypatch.setattr(zoo_images, "read_idx", lambda path, sha256: checked(path, hashlib.sha256(path.read_bytes()).hexdigest()))
    (train, train_labels), (held_out, held_labels), (test, test_labels) = (fashion_mnist(s) for s in ("train", "validation", "test"))
    assert train.shape == (7, 1, 2, 2) and held_out.shape == (zoo_images.HELD_OUT, 1, 2, 2) and len(test) == count
    assert (len(train_labels), len(held_labels), len(test_labels)) == (7, zoo_images.HELD_OUT, count)
    assert train.dtype == torch.float32 and train_labels.dtype == torch.int64
    raw = checked(folder / TRAIN.images[0], hashlib.sha256((folder / TRAIN.images[0]).read_bytes()).hexdigest())
    both = torch.cat([train, held_out])[:, 0] * zoo_images.STD + zoo_images.MEAN
    torch.testing.assert_close(both * 255, raw.float(), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_the_real_data() -> None:
    images, labels = fashion_mnist("test")
    assert images.shape == (10000, 1, 28, 28)
    assert labels.bincount().tolist() == [1000] * 10
    train, train_labels = fashion_mnist("train")
    assert len(train) == len(train_labels) == 55000
    assert abs(float(train.mean())) < 0.01 and abs(float(train.std()) - 1) < 0.01
