"""An attached Hugging Face model as a folder: its config, every tensor in its compressed form, and which modules hold one. No pickle, no code.

`save_pretrained` of transformers would write the payloads, too, but its `from_pretrained` builds a dense model around them. Here the class that the config
names is built, the modules that held compressed weights become `compressed_modules` again, and all tensors are bound as they were, ties included.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.errors import ArtifactError, LowerError, MissingExtraError
from ..ir.files import atomic_folder
from ..ir.weights import named_tensors, set_tensor
from .compressed_modules import CompressedConv, CompressedEmbedding, CompressedLinear, CompressedWeight, as_decoding, stand_in, write_sizes
from .folders import CONFIGS, TOKENIZER
from .tensor_files import pack_tensors, read_tensors, same_values, unpack_tensors, write_tensors

TENSORS, MODULES = "fxpress.safetensors", "fxpress.json"
VERSION = 1
_KINDS: dict[str, type[CompressedWeight]] = {c.__name__: c for c in (CompressedLinear, CompressedConv, CompressedEmbedding)}


def save_pretrained(model: nn.Module, folder: str | Path, *, tokenizer: Any = None) -> Path:
    """Write `model`, a Hugging Face model that `Result.attach` returned (or any other of its class), for `fxpress.from_pretrained`.

    The folder is read back and every tensor compared before it appears. Raises `LowerError` for models whose class is not one of transformers.
    """
    kind = type(model)
    if not hasattr(model, "config") or getattr(_transformers(), kind.__name__, None) is not kind:
        raise LowerError(f"save_pretrained: expected a model of a class of transformers, got {kind.__module__}.{kind.__name__}; save the Result instead")
    config: Any = copy.deepcopy(model.config)
    generation: Any = getattr(model, "generation_config", None)
    config.architectures = [kind.__name__]
    stored, layout = pack_tensors(dict(named_tensors(model)))
    modules = {path: _described(m) for path, m in model.named_modules() if isinstance(m, CompressedWeight)}
    folded = [path for path, m in model.named_modules() if type(m) is nn.Identity]
    with atomic_folder(Path(folder), own=(TENSORS, MODULES, *CONFIGS, *TOKENIZER)) as scratch:
        config.save_pretrained(scratch)
        if generation is not None:
            generation.save_pretrained(scratch)
        write_tensors(scratch / TENSORS, stored)
        text = json.dumps({"version": VERSION, "modules": modules, "folded": folded, "tensors": layout}, indent=1)
        (scratch / MODULES).write_text(text + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        _compare(model, from_pretrained(scratch))
    return Path(folder)


def from_pretrained(folder: str | Path) -> nn.Module:
    """The model of a folder that `save_pretrained` wrote, in evaluation mode: of its own class, so that `generate()` and the rest work; no remote code.

    Raises `ArtifactError` for a folder that is incomplete, damaged, or of another version.
    """
    root, transformers = Path(folder), _transformers()
    record = _read(root)
    try:
        config = transformers.AutoConfig.from_pretrained(root, trust_remote_code=False)
        generation = transformers.GenerationConfig.from_pretrained(root) if (root / "generation_config.json").exists() else None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{root}: a config is missing or damaged ({error}); save the folder again") from error
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise ArtifactError(f"{root}: the config names the class {config.architectures}, which this transformers {transformers.__version__} does not have")
    tensors = unpack_tensors(read_tensors(root / TENSORS), record["tensors"])
    model: nn.Module = kind(config).eval()
    for path, description in record["modules"].items():
        _restore(model, path, description, tensors)
    for path in record["folded"]:
        _put(model, path, nn.Identity())
    _bind(model, tensors, root)
    if generation is not None:
        model.generation_config = generation
    return model.requires_grad_(requires_grad=False)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "saving and loading attached models") from error
    return transformers


def _described(module: CompressedWeight) -> dict[str, Any]:
    """What `_restore` needs beside the tensors."""
    known: dict[str, Any] = {"kind": type(module).__name__, "format": module.weight_format, "shape": list(module.weight_shape)}
    known |= {"dtype": str(module.weight_dtype).removeprefix("torch."), "transposed": module.transposed, "parts": list(module.parts)}
    if isinstance(module, CompressedConv):
        known["geometry"] = list(module.geometry)
    if type(module).__name__ not in _KINDS:
        known["leaf"] = next(name for name, value in vars(type(module)).items() if isinstance(value, property))
    return known


def _restore(model: nn.Module, path: str, known: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    module = _module(model, path)
    payload = {part: tensors[f"{path}.{part}"] for part in known["parts"]}
    kind = _KINDS.get(known["kind"])
    if kind is None:
        as_decoding(module, known["leaf"])
    else:
        module = stand_in(kind, module, tensors.get(f"{path}.bias"))
        _put(model, path, module)
    CompressedWeight.take(module, payload, known["format"], tuple(known["shape"]), getattr(torch, known["dtype"]), transposed=known["transposed"])  # type: ignore[arg-type]
    if isinstance(module, CompressedConv):
        module.geometry = tuple(known["geometry"])
    if kind is not None:
        write_sizes(module, module.weight_shape)  # type: ignore[arg-type]


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    _module(model, owner)._modules[name] = module


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ArtifactError(f"{type(model).__name__} of this config has no module {path}; the folder is of another version of transformers") from error


def _bind(model: nn.Module, tensors: dict[str, Tensor], root: Path) -> None:
    """Give the model every tensor; both must have the same names, but for biases that passes added."""
    mine = dict(named_tensors(model))
    missing, more = sorted(set(mine) - set(tensors)), sorted(n for n in set(tensors) - set(mine) if not _open(model, n))
    if missing or more:
        raise ArtifactError(f"{root}: {type(model).__name__} has tensors that the folder lacks {missing[:3]}, the folder others {more[:3]}; save it again")
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        set_tensor(model, name, tensor, parameter=name not in mine or isinstance(mine[name], nn.Parameter))
        if leaf == "weight" and mine[name].shape != tensor.shape:
            write_sizes(_module(model, owner), tuple(tensor.shape))


def _open(model: nn.Module, name: str) -> bool:
    """Whether the module has a place for this parameter, and nothing in it."""
    owner, _, leaf = name.rpartition(".")
    parameters = _module(model, owner)._parameters
    return leaf in parameters and parameters[leaf] is None


def _compare(model: nn.Module, again: nn.Module) -> None:
    there = dict(named_tensors(again))
    for name, tensor in named_tensors(model):
        if name not in there or not same_values(tensor.detach().cpu(), there[name]):
            raise LowerError(f"save_pretrained: {name} does not come back as it was; please report the model")


def _read(root: Path) -> dict[str, Any]:
    missing = [n for n in ("config.json", TENSORS, MODULES) if not (root / n).is_file()]
    if missing:
        raise ArtifactError(f"{root}: {', '.join(missing)} is missing; expected a folder that fxpress.save_pretrained wrote")
    try:
        record: dict[str, Any] = json.loads((root / MODULES).read_text(encoding="utf-8"))
        version = record["version"]
        record["modules"], record["folded"], record["tensors"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{root / MODULES} is damaged: {type(error).__name__}: {error}; save the folder again") from error
    if version != VERSION:
        raise ArtifactError(f"{root}: written by version {version} of the folder's form, this fxpress reads {VERSION}; save it again")
    return record
