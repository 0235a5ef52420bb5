"""Write files and folders so that a failure leaves nothing half-written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from .errors import ArtifactError


def cache_path() -> Path:
    """The folder for what can be fetched or measured again: `FXPRESS_CACHE`, default `~/.cache/fxpress`."""
    return Path(os.environ.get("FXPRESS_CACHE", "~/.cache/fxpress")).expanduser()


def cache_dir() -> Path:
    """As `cache_path`, made if missing."""
    path = cache_path()
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def atomic_folder(target: Path, *, own: Sequence[str]) -> Iterator[Path]:
    """Yield a scratch folder beside `target`; on success it takes the target's place, on failure it vanishes.

    `own`: patterns of the names that may be replaced. A folder with any other file, or a file in its place, is refused (`ArtifactError`) before any work.
    """
    target = Path(target)
    _refuse_foreign(target, own)
    scratch = _scratch_beside(target)
    try:
        yield scratch
        _replace_folder(scratch, target)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a scratch path beside `target`; on success it replaces the target, on failure it vanishes."""
    target = Path(target)
    scratch = _scratch_beside(target)
    try:
        yield scratch / target.name
        for part in sorted(scratch.iterdir(), key=lambda p: p.name == target.name):
            os.replace(part, target.parent / part.name)
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _refuse_foreign(target: Path, own: Sequence[str]) -> None:
    """The whole folder is replaced: never one that holds what is not ours to remove."""
    if target.is_dir():
        foreign = sorted(p.name for p in target.iterdir() if not any(fnmatch(p.name, pattern) for pattern in own))
        if foreign:
            raise ArtifactError(f"cannot write {target}: it holds other files ({', '.join(foreign[:3])}), which saving would remove; choose a new folder")
    elif target.exists():
        raise ArtifactError(f"cannot write {target}: it is a file; choose a folder")


def _scratch_beside(target: Path) -> Path:
    """A fresh folder on the target's file system, so that the final rename is atomic."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}; choose a writable folder") from error


def _replace_folder(scratch: Path, target: Path) -> None:
    scratch.chmod(0o755)
    if not target.exists():
        os.replace(scratch, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, old / "previous")
    try:
        os.replace(scratch, target)
    except OSError:
        os.replace(old / "previous", target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
