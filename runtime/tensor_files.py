"""Named tensors in a safetensors file, each storage once, and back with the same ties and strides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..ir.errors import ArtifactError
from ..ir.weights import storage_key

Layout = dict[str, dict[str, Any]]


def pack_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Layout]:
    """What to store, and per name where it lies.

    Names that share storage refer to one stored tensor: `{"stored": key}`, with `shape`, `stride` and `offset` (in elements) where the tensor is not the
    stored one as it is, such as a transposed weight or a view of a fused one. Expanded tensors are stored contiguous.
    """
    groups: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        groups[storage_key(tensor)].append(name)
    stored: dict[str, Tensor] = {}
    layout: Layout = {}
    for names in groups.values():
        members = {name: tensors[name].detach() for name in names}
        kinds = {(t.dtype, t.shape, t.stride(), t.storage_offset()) for t in members.values()}
        if len(kinds) == 1:
            _pack_one(members, stored, layout)
        elif len({dtype for dtype, *_ in kinds}) == 1:
            _pack_views(members, stored, layout)
        else:
            for name, tensor in members.items():
                _pack_one({name: tensor}, stored, layout)
    return stored, {name: layout[name] for name in tensors}


def _pack_one(members: Mapping[str, Tensor], stored: dict[str, Tensor], layout: Layout) -> None:
    """One tensor under one or more names."""
    key, tensor = next(iter(members.items()))
    usual = torch.empty(tensor.shape, device="meta").stride()
    copy = tensor if tensor.is_contiguous() else tensor.clone()
    place: dict[str, Any] = {"stored": key}
    if tensor.stride() != usual and _steps(copy) == _steps(tensor):
        place |= {"shape": list(tensor.shape), "stride": list(tensor.stride()), "offset": 0}
        copy = copy.as_strided((copy.numel(),), (1,))
    stored[key] = copy.contiguous().cpu()
    layout.update({name: dict(place) for name in members})


def _steps(tensor: Tensor) -> list[int]:
    """Strides that matter: those of axes longer than one."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _pack_views(members: Mapping[str, Tensor], stored: dict[str, Tensor], layout: Layout) -> None:
    """Different views of one storage: the part they span, flat, and each view's place in it."""
    first = min(t.storage_offset() for t in members.values())
    last = max((_last(t) for t in members.values() if t.numel()), default=first - 1)
    key, tensor = next(iter(members.items()))
    stored[key] = tensor.as_strided((last - first + 1,), (1,), first).cpu()
    for name, t in members.items():
        layout[name] = {"stored": key, "shape": list(t.shape), "stride": list(t.stride()), "offset": t.storage_offset() - first}


def _last(tensor: Tensor) -> int:
    """Offset of the last element in the storage."""
    return int(tensor.storage_offset()) + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def unpack_tensors(stored: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Inverse of `pack_tensors`. A layout that does not fit what is stored raises `ArtifactError`."""
    tensors = {}
    for name, place in layout.items():
        try:
            tensor = stored[place["stored"]]
            if "shape" in place:
                tensor = tensor.as_strided(place["shape"], place["stride"], place["offset"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"tensor {name}: {place} does not fit what is stored: {type(error).__name__}: {error}; save the program again") from error
        tensors[name] = tensor
    return tensors


def write_tensors(path: Path, stored: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors that share no storage; `ArtifactError` when the disk is full or a dtype has no safetensors name."""
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(dict(stored), path)
        path.chmod(mode)  # safetensors makes files that only their owner can read
    except SafetensorError as error:
        raise ArtifactError(f"cannot write {path.name}: {error}; free space or choose another folder") from error
    except (KeyError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"cannot write {path.name}: {type(error).__name__}: {error}; convert the tensor to a dtype that safetensors knows") from error


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of the file, each in memory of its own.

    Tensors as safetensors hands them out are unaligned slices of one mapped file: an empty one has its neighbour's address, which would tie the two.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise ArtifactError(f"cannot read {path}: {error}; the file is damaged or truncated, copy or save it again") from error


def same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return storage_key(a) == storage_key(b) and a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values in the same dtype and shape (NaN equals NaN at the same place)."""
    if same_storage(a, b):
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all()))
