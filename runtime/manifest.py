"""The manifest of an artefact folder: what is in it, where it came from, and the checksums that prove it whole."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..ir.errors import ArtifactError
from .json_values import DAMAGED, plain_json, plain_value

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FILES = ("graph.json", "inputs.safetensors", "model.safetensors", "recipe.yaml")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about an artefact but its graph and its tensors, as plain data.

    `tensors` maps each weight name to its place in model.safetensors (see `tensor_files`) and its kind (parameter or buffer). `inputs` holds the structure,
    constants and dynamic axes of the example inputs. `recipe` is fully resolved. The checksums find damage; they are no signature.
    """

    format_version: int = FORMAT_VERSION
    fxpress_version: str
    torch_version: str
    environment: Mapping[str, str] = field(default_factory=dict)
    stage: str
    seed: int | None = None
    bytes_before: int = 0
    nbytes: int
    recipe: Mapping[str, Any]
    reports: tuple[Mapping[str, Any], ...]
    journal: tuple[Mapping[str, Any], ...]
    inputs: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    def to_json(self) -> str:
        """Strict, indented JSON text."""
        return dump_json(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str | bytes) -> Manifest:
        """Inverse of `to_json`. Raises `ArtifactError` for text that is not a manifest, and for one of a newer format."""
        data = parse_json(text, MANIFEST)
        _check_version(data)
        try:
            plain = plain_value(data)
            files = {name: FileRecord(int(f["size"]), str(f["sha256"])) for name, f in data["files"].items()}
            manifest = Manifest(**plain | {"files": files, "reports": tuple(plain["reports"]), "journal": tuple(plain["journal"])})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{MANIFEST} is malformed: {type(error).__name__}: {error}; save the program again") from error
        if set(files) != set(FILES):
            raise ArtifactError(f"{MANIFEST} lists the files {sorted(map(str, files))}, expected exactly {list(FILES)}; {DAMAGED}")
        return manifest


def _check_version(data: Any) -> None:
    version = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ArtifactError(f"{MANIFEST} has no format_version; it was not written by fxpress, or it is damaged")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"the artefact has format {version} (written by fxpress {data.get('fxpress_version', '?')}), this fxpress {fxpress_version()} reads formats "
            f"up to {FORMAT_VERSION}; upgrade fxpress"
        )


def dump_json(data: Any, indent: int | None = None) -> str:
    """Strict JSON text (no NaN literals) with a final newline; `data` may hold tuples and non-finite floats."""
    return json.dumps(plain_json(data), indent=indent, allow_nan=False) + "\n"


def parse_json(text: str | bytes, name: str) -> Any:
    """JSON data, or an `ArtifactError` that names the file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name} is not JSON: {error}; {DAMAGED}") from error


def file_record(path: Path) -> FileRecord:
    """Size and checksum, read in pieces of 1 MiB."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def check_file(path: Path, expected: FileRecord) -> None:
    """Refuse a file that is missing, truncated or changed."""
    if not path.is_file():
        raise ArtifactError(f"{path.name} is missing from {path.parent}; copy the whole folder")
    try:
        size = path.stat().st_size
        got = FileRecord(size, "") if size != expected.size else file_record(path)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    if got.size != expected.size:
        raise ArtifactError(f"{path} has {got.size} bytes, expected {expected.size}: it is truncated or was changed; copy it again")
    if got.sha256 != expected.sha256:
        raise ArtifactError(f"{path} has sha256 {got.sha256}, expected {expected.sha256}: it was changed after it was saved; copy it again")


def fxpress_version() -> str:
    """Version of the installed package, `unknown` in a bare checkout."""
    try:
        return importlib.metadata.version("fxpress")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def environment() -> dict[str, str]:
    """What the artefact was made with."""
    return {"python": platform.python_version(), "platform": platform.platform(), "torch": torch.__version__}
