"""Optional imports of this target, and silence for the exporter's chatter."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...ir.errors import MissingExtraError


def require(package: str, why: str) -> Any:
    """The imported package, or a `MissingExtraError` that names the extra to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(package, "onnx", why) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back warnings of torch.onnx (missing torchvision, deprecated pytree calls) below the level of an error."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
