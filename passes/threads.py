"""Thread counts for work made of many small operations."""

from __future__ import annotations

from collections.abc import Iterator
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
