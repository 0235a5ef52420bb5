"""Schedules chosen by timing on the GPU that holds the weight, once for every shape and form, and kept in a file for the next process."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ...ir.errors import ArtifactError, LowerError
from ...ir.files import atomic_file, cache_path
from .layout import Packed
from .schedule import TOKEN_TILES, Schedule, schedule_for

SPLITS, WARPS, STAGES = (1, 2, 4, 8, 16), (4, 8), (2, 3, 4)
MOST_SPLITS = max(SPLITS)
_log = logging.getLogger("fxpress")


def tuned_schedule(packed: Packed, tokens: int, layout: str) -> Schedule:
    """The fastest schedule that was ever timed for `packed` (its `layout` as text) and so many tokens on this kind of GPU; timed now if none was.

    The rule's (`schedule_for`) for weights that are on no GPU, with `FXPRESS_TUNE=0`, and while a CUDA graph is captured, when nothing can be timed.
    """
    rule = schedule_for(packed, tokens)
    if not packed.values.is_cuda or os.environ.get("FXPRESS_TUNE") == "0":
        return rule
    book = _book(torch.cuda.get_device_name(packed.values.device))
    wide = -(-tokens // rule.tokens) * rule.tokens
    key = f"{layout} grid={list(packed.grid.shape[1:])} outliers={packed.slots.numel() > 0} tokens={wide}"
    if key not in book and not torch.cuda.is_current_stream_capturing():
        x = torch.randn(wide, packed.columns, dtype=packed.dtype, device=packed.values.device)
        book.add(key, fastest(candidates(packed, rule), _timer(packed, x), f"{packed.rows} x {packed.columns}, {layout}"))
    return book.get(key, rule)


def candidates(packed: Packed, rule: Schedule) -> list[Schedule]:
    """The rule's schedule and its neighbours: every number of splits that the weight allows, the next narrower tile of tokens; then warps and stages."""
    splits = [s for s in SPLITS if s <= packed.tiles]
    narrow = [t for t in TOKEN_TILES if t <= rule.tokens][-2:]
    cuts = [replace(rule, tokens=t, splits=s) for t, s in product(reversed(narrow), splits)]
    depths = [replace(rule, warps=w, stages=g) for w, g in product(WARPS, STAGES)]
    return list(dict.fromkeys([rule, *cuts, *depths]))


def fastest(tried: Iterable[Schedule], seconds: Callable[[Schedule], float], where: str = "") -> Schedule:
    """The one that takes the least; those that ask for more than the GPU has are passed over. LowerError if all do."""
    taken: dict[Schedule, float] = {}
    refused = ""
    for schedule in tried:
        try:
            taken[schedule] = seconds(schedule)
        except OutOfResources as error:
            refused = str(error)
            _log.debug("%s does not fit this GPU: %s", schedule, refused)
    if not taken:
        raise LowerError(f"no schedule of the kernel fits this GPU: {refused} ({where}); use smaller tiles: Triton(tile=Tile(rows=32)).lower(program)")
    return min(taken, key=lambda s: taken[s])


class Book(dict[str, Schedule]):
    """Schedules by key, in a JSON file. What cannot be read is measured again; what cannot be written is kept in memory."""

    def __init__(self, file: Path) -> None:
        super().__init__(_read(file))
        self.file, self._kept = file, True

    def add(self, key: str, schedule: Schedule) -> None:
        """Keep one more, together with what other processes have written since."""
        self[key] = schedule
        self.update({k: s for k, s in _read(self.file).items() if k not in self})
        _log.info("fastest schedule on %s for %s: %s", self.file.stem, key, schedule)
        try:
            with atomic_file(self.file) as scratch:
                scratch.write_text(json.dumps({k: asdict(s) for k, s in sorted(self.items())}, indent=1), encoding="utf-8")
        except ArtifactError as error:
            _log.log(logging.WARNING if self._kept else logging.DEBUG, "schedules are not kept for the next process: %s", error)
            self._kept = False


def _read(file: Path) -> dict[str, Schedule]:
    try:
        return {key: _checked(Schedule(**row)) for key, row in json.loads(file.read_text(encoding="utf-8")).items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        _log.warning("%s cannot be read (%s); schedules are measured again", file, error)
        return {}


def _checked(schedule: Schedule) -> Schedule:
    """A schedule that was read; ValueError for one that no kernel could run."""
    legal = schedule.tokens in TOKEN_TILES and schedule.splits in range(1, MOST_SPLITS + 1) and schedule.warps in WARPS and schedule.stages in STAGES
    if not legal:
        raise ValueError(f"{schedule} is none that is ever chosen")
    return schedule


@cache
def _book(device: str) -> Book:
    return Book(cache_path() / "triton" / f"{device.replace(' ', '_')} triton {triton.__version__}.json")


def _timer(packed: Packed, x: Tensor) -> Callable[[Schedule], float]:
    """Median milliseconds of the product, the cache flushed before each."""
    from triton.testing import do_bench

    from .launch import matmul

    return lambda schedule: float(do_bench(lambda: matmul(packed, x, None, schedule), warmup=5, rep=20, return_mode="median"))
