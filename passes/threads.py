"""Thread counts for work made of many small operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block's torch operators on one thread.

    Operators that take microseconds gain nothing from a second thread, and lose a lot on a busy machine, where every one of them waits at a barrier for
    a thread that is not scheduled (measured: a GPTQ column loop 20 times slower).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def over_slices(work: Callable[[slice], None], count: int, step: int, threads: int) -> None:
    """`work` on `0` to `count` in slices of `step`, on so many threads; for work that gives up the interpreter's lock."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, (slice(i, min(i + step, count)) for i in range(0, count, step))))
