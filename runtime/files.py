"""Atomic files and folders, for the runtime; they live in `ir/files.py`, where every layer may use them."""

from __future__ import annotations

from ..ir.files import atomic_file, atomic_folder

__all__ = ["atomic_file", "atomic_folder"]
