"""Choosing schedules by timing: candidates, the choice, and the file that keeps it. Times are made up; the GPU itself is not needed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from fxpress.codegen.triton_target import tuning
from fxpress.codegen.triton_target.layout import Packed, Structure, Tile, Values
from fxpress.codegen.triton_target.operators import describe
from fxpress.codegen.triton_target.pack import pack
from fxpress.codegen.triton_target.schedule import Schedule, schedule_for
from fxpress.codegen.triton_target.tuning import Book, candidates, fastest, tuned_schedule
from fxpress.ir.errors import LowerError

from .weights import random_source

FAST, SLOW = Schedule(splits=4), Schedule(splits=2)


@pytest.fixture(scope="module")
def packed() -> Packed:
    return pack(random_source(Values.CODE4, torch.float16, torch.ones(128, 1024, dtype=torch.bool))[0], Structure.DENSE, Tile())


def _times(times: dict[Schedule, float]) -> Callable[[Schedule], float]:
    def seconds(schedule: Schedule) -> float:
        if schedule not in times:
            raise OutOfResources(200_000, 100_000, "shared memory")
        return times[schedule]

    return seconds


@pytest.mark.parametrize("tokens", [1, 20, 64])
def test_candidates_begin_with_the_rule_and_are_legal(packed: Packed, tokens: int) -> None:
    rule = schedule_for(packed, tokens)
    tried = candidates(packed, rule)
    assert tried[0] == rule and len(set(tried)) == len(tried) <= 16
    assert all(s.splits <= packed.tiles and s.tokens <= rule.tokens for s in tried)
    assert {s.splits for s in tried} == {1, 2, 4, 8} and {s.warps for s in tried} == {4, 8}


def test_the_fastest_that_fits_is_taken() -> None:
    assert fastest([SLOW, FAST, Schedule(splits=8)], _times({SLOW: 2.0, FAST: 1.0})) == FAST
    with pytest.raises(LowerError, match="no schedule of the kernel fits this GPU: out of resource: shared memory"):
        fastest([SLOW, FAST], _times({}))


def test_the_file_outlives_the_process_and_merges(tmp_path: Path) -> None:
    file = tmp_path / "new" / "some GPU.json"
    first, second = Book(file), Book(file)
    first.add("a", FAST)
    second.add("b", SLOW)
    assert Book(file) == {"a": FAST, "b": SLOW}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"a": {"splits": 0}}', '{"a": {"tokens": 17, "splits": "x"}}', "[" * 100_000, '{"a": {"splits": 1, "unknown": 2}}', '{"a": 3}']
)
def test_a_file_that_cannot_be_read_is_measured_again(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "some GPU.json"
    file.write_text(text)
    with caplog.at_level(logging.WARNING, "fxpress"):
        book = Book(file)
    assert book == {} and "measured again" in caplog.text
    book.add("a", FAST)
    assert Book(file) == {"a": FAST}


def test_a_folder_that_cannot_be_written_costs_only_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("")
    book = Book(tmp_path / "taken" / "some GPU.json")
    with caplog.at_level(logging.WARNING, "fxpress"):
        book.add("a", FAST)
    assert book["a"] == FAST and "not kept for the next process" in caplog.text


class _Cuda:
    """Makes a weight look as if a GPU held it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, capturing: bool = False) -> None:
        self.timed = 0
        monkeypatch.delenv("FXPRESS_TUNE", raising=False)
        self.book = tuning._book
        module = "fxpress.codegen.triton_target.tuning."
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "some GPU")
        monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: capturing)
        monkeypatch.setattr(module + "schedule_for", lambda packed, tokens: SLOW)
        monkeypatch.setattr(module + "_book", lambda device: Book(folder / f"{device}.json"))
        monkeypatch.setattr(module + "_timer", lambda packed, x: self.seconds)

    def seconds(self, schedule: Schedule) -> float:
        self.timed += 1
        return 1.0 if schedule == FAST else 2.0


def test_a_weight_on_a_gpu_is_timed_once(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Cuda(monkeypatch, tmp_path)
    assert tuned_schedule(packed, 3, describe(packed)) == FAST
    timed = cuda.timed
    assert timed > 5 and tuned_schedule(packed, 16, describe(packed)) == FAST and cuda.timed == timed
    tuned_schedule(packed, 17, describe(packed))
    assert cuda.timed == 2 * timed  # another number of token tiles


@pytest.mark.parametrize("reason", ["capture", "switched off"])
def test_the_rule_stands_in_where_nothing_is_timed(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    cuda = _Cuda(monkeypatch, tmp_path, capturing=reason == "capture")
    if reason == "switched off":
        monkeypatch.setenv("FXPRESS_TUNE", "0")
    assert tuned_schedule(packed, 3, describe(packed)) == SLOW and cuda.timed == 0


def test_another_kernel_variant_is_another_key(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Cuda(monkeypatch, tmp_path)
    tuned_schedule(packed, 3, describe(packed))
    timed = cuda.timed
    tuned_schedule(replace(packed, slots=torch.zeros(64, dtype=torch.int32)), 3, describe(packed))
    tuned_schedule(replace(packed, grid=packed.grid[..., :1]), 3, describe(packed))
    assert cuda.timed == 3 * timed


@pytest.mark.parametrize("below", ["", "/below"])
def test_an_unusable_cache_is_no_error(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    cuda = _Cuda(monkeypatch, tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXPRESS_CACHE", f"{tmp_path}/file{below}")
    monkeypatch.setattr("fxpress.codegen.triton_target.tuning._book", cuda.book.__wrapped__)
    assert tuned_schedule(packed, 3, describe(packed)) == FAST


def test_a_weight_on_no_gpu_takes_the_rule(packed: Packed) -> None:
    assert tuned_schedule(packed, 3, describe(packed)) == schedule_for(packed, 3)
