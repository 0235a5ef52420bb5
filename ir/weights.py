"""Names and tensors: every parameter and buffer of a program, and which names share storage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, then every buffer, under every name it has."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def storage_key(tensor: Tensor) -> tuple[int, int]:
    """Equal for tensors that share storage; empty tensors share nothing."""
    pointer = tensor.untyped_storage().data_ptr()
    return (pointer, 0) if pointer else (0, id(tensor))


def _start(tensor: Tensor) -> tuple[int, int]:
    """Equal for tensors that begin at one address: tied ones do, disjoint slices of one buffer do not."""
    pointer = tensor.data_ptr() if tensor.numel() else 0
    return (pointer, 0) if pointer else (0, id(tensor))


@dataclass(frozen=True)
class AliasClasses:
    """Groups of names of one tensor (tied weights)."""

    groups: tuple[tuple[str, ...], ...]

    def of(self, name: str) -> tuple[str, ...]:
        """All names of the tensor called `name`, itself included."""
        return next((g for g in self.groups if name in g), (name,))


def alias_classes(module: nn.Module) -> AliasClasses:
    """Alias classes of a module by address, in order of first name. One of several names is usually dead in the graph."""
    by_address: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, tensor in named_tensors(module):
        by_address[_start(tensor)].append(name)
    return AliasClasses(tuple(tuple(names) for names in by_address.values()))


def set_tensor(module: nn.Module, name: str, tensor: Tensor, *, parameter: bool) -> None:
    """Bind `name` (dotted; containers are made as needed) to `tensor` as a frozen parameter or a buffer."""
    owner_path, _, leaf = name.rpartition(".")
    owner = module
    for part in owner_path.split(".") if owner_path else []:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    if parameter:
        owner.register_parameter(leaf, nn.Parameter(tensor.detach(), requires_grad=False))
    else:
        owner.register_buffer(leaf, tensor)


def delete_tensor(module: nn.Module, name: str) -> None:
    """Unbind one name."""
    owner_path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_path)
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)


def shallow_tree(module: nn.Module) -> nn.Module:
    """A tree of bare containers that binds the same tensors under the same names; no tensor is copied."""
    root = nn.Module()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        _bind(root, name, parameter)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        _bind(root, name, buffer)
    return root


def _bind(root: nn.Module, name: str, tensor: Tensor) -> None:
    owner_path, _, leaf = name.rpartition(".")
    owner = root
    for part in owner_path.split(".") if owner_path else []:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def unique_bytes(module: nn.Module) -> int:
    """Bytes of all storages the module holds, tied ones counted once."""
    seen = {storage_key(t): t.untyped_storage().nbytes() for _, t in named_tensors(module)}
    return sum(seen.values())


def unique_parameters(module: nn.Module) -> int:
    """Number of floating-point elements, tied tensors counted once."""
    seen = {_start(t): t.numel() for _, t in named_tensors(module) if torch.is_floating_point(t)}
    return sum(seen.values())
