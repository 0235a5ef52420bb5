"""Save a program to a folder and load it back: safetensors and JSON, no pickle, nothing half-written.

    model.safetensors    weights and payloads, tied ones once       graph.json    the graph (`graph_json`)
    inputs.safetensors   tensors among the example inputs           recipe.yaml   the resolved recipe, for people and `optimize`
    manifest.json        the rest, with size and sha256 of every other file (`manifest`)

Loading runs no code from the folder, imports nothing it names and recomputes nothing; *running* the loaded program runs the torch operators it names.
An output type that the loading process has not registered (a transformers `ModelOutput` where transformers is not imported) comes back as a plain dict
or tuple, with a note and a `UserWarning`: import its package before loading to get the type itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ..ir.errors import ArtifactError, FxpressError
from ..ir.files import atomic_folder
from ..ir.inputs import DynamicAxis, Inputs
from ..ir.journal import Change, Journal
from ..ir.program import Program, Stage
from ..ir.weights import named_tensors, set_tensor
from ..passes.base import PassReport
from ..passes.recipe import Recipe, as_recipe
from .graph_json import graph_from_json, graph_to_json
from .json_values import decode, encode
from .manifest import FILES, MANIFEST, Manifest, check_file, dump_json, environment, file_record, fxpress_version, parse_json
from .tensor_files import pack_tensors, read_tensors, unpack_tensors, write_tensors
from .tree_specs import spec_from_json, spec_to_json


@dataclass(frozen=True)
class Loaded:
    """What `load` found: the program, the report of every pass, the recipe, the manifest, and notes on what could not come back as it was."""

    program: Program
    reports: tuple[PassReport, ...]
    recipe: Recipe
    manifest: Manifest
    notes: tuple[str, ...] = ()


def save(
    folder: str | Path, program: Program, *, reports: Iterable[PassReport] = (), recipe: Recipe | None = None, bytes_before: int = 0
) -> Path:  # fmt: skip
    """Write the artefact folder and return its path. An artefact that stands there is replaced; any other folder with files in it is refused.

    `bytes_before`: bytes of the original program. Raises `ArtifactError` when the folder cannot be written or the graph holds what cannot be saved (calls
    that are no registered torch operators, unregistered pytree types), `VerifyError` when the program is not valid; then nothing is left behind.
    """
    target = Path(folder).absolute()
    program.verify()
    graph = graph_to_json(program.graph_module)
    weights, layout = pack_tensors(dict(named_tensors(program.graph_module)))
    described, examples = _inputs_to_json(program.inputs)
    recipe = recipe or Recipe(())
    with atomic_folder(target, own=(*FILES, MANIFEST)) as scratch:
        write_tensors(scratch / "model.safetensors", weights)
        write_tensors(scratch / "inputs.safetensors", examples)
        (scratch / "graph.json").write_text(dump_json(graph), encoding="utf-8")
        (scratch / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        manifest = Manifest(
            fxpress_version=fxpress_version(),
            torch_version=torch.__version__,
            environment=environment(),
            stage=program.stage.value,
            seed=recipe.seed,
            bytes_before=bytes_before,
            nbytes=program.nbytes,
            recipe=recipe.to_dict(),
            reports=tuple(r.to_dict() for r in reports),
            journal=tuple(c.to_dict() for c in program.journal.changes),
            inputs=described,
            tensors={name: place | {"kind": _kind(program.graph_module, name)} for name, place in layout.items()},
            files={name: file_record(scratch / name) for name in FILES},
        )
        (scratch / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return target


def load(folder: str | Path, *, device: str = "cpu") -> Loaded:
    """Read an artefact folder, with its weights on `device`.

    Raises `ArtifactError` for a folder that is no artefact, for missing, truncated or changed files, a newer format, operators this process does not know,
    and weights that do not fit their formats.
    """
    root = Path(folder)
    manifest = _read_manifest(root)
    for name, expected in manifest.files.items():
        check_file(root / name, expected)
    try:
        program, notes = _program(root, manifest, device)
        program.verify()
        reports = tuple(PassReport.from_dict(r) for r in manifest.reports)
    except ArtifactError as error:
        raise ArtifactError(f"{root}: {error}") from error
    except (FxpressError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise ArtifactError(f"{root} does not hold a valid program: {type(error).__name__}: {error}; save it again") from error
    recipe, unread = _recipe(manifest)
    for note in notes:
        warnings.warn(f"{root}: {note}", UserWarning, stacklevel=2)
    return Loaded(program, reports, recipe, manifest, (*notes, *unread))


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    if not path.is_file():
        what = f"it has no {MANIFEST}" if root.is_dir() else "there is no such folder"
        raise ArtifactError(f"{root} is not an fxpress artefact: {what}; pass the folder that Result.save wrote")
    try:
        return Manifest.from_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except ArtifactError as error:
        raise ArtifactError(f"{root}: {error}") from error


def _program(root: Path, manifest: Manifest, device: str) -> tuple[Program, tuple[str, ...]]:
    weights = _weights(read_tensors(root / "model.safetensors", device), manifest.tensors)
    module, notes = graph_from_json(parse_json((root / "graph.json").read_bytes(), "graph.json"), weights)
    inputs = _inputs_from_json(manifest.inputs, read_tensors(root / "inputs.safetensors", device))
    journal = Journal([Change.from_dict(c) for c in manifest.journal])
    return Program(module, inputs, Stage(manifest.stage), journal), notes


def _kind(module: fx.GraphModule, name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    return "parameter" if leaf in module.get_submodule(owner)._parameters else "buffer"


def _weights(stored: Mapping[str, Tensor], tensors: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    root = nn.Module()
    for name, tensor in unpack_tensors(stored, {n: dict(place) for n, place in tensors.items()}).items():
        set_tensor(root, name, tensor, parameter=tensors[name]["kind"] == "parameter")
    return root


def _inputs_to_json(inputs: Inputs) -> tuple[dict[str, Any], dict[str, Tensor]]:
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    stored, layout = pack_tensors({f"input_{i}": v for i, v in enumerate(leaves) if isinstance(v, Tensor)})
    described = [{"tensor": layout[f"input_{i}"]} if isinstance(v, Tensor) else {"value": encode(v, f"input {i}")} for i, v in enumerate(leaves)]
    axes = [[[axis, d.name, d.low, d.high] for axis, d in per_leaf.items()] for per_leaf in inputs.dynamic]
    return {"structure": spec_to_json(spec, "example inputs"), "leaves": described, "dynamic": axes, "caches": list(inputs.caches)}, stored


def _inputs_from_json(data: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Inputs:
    spec, _ = spec_from_json(data["structure"], "example inputs")
    layout = {str(i): dict(leaf["tensor"]) for i, leaf in enumerate(data["leaves"]) if "tensor" in leaf}
    tensors = unpack_tensors(stored, layout)
    leaves = [tensors[str(i)] if "tensor" in leaf else decode(leaf["value"], {}, f"input {i}") for i, leaf in enumerate(data["leaves"])]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    dynamic = tuple({int(axis): DynamicAxis(name, low, high) for axis, name, low, high in per_leaf} for per_leaf in data["dynamic"])
    return Inputs(tuple(args), dict(kwargs), dynamic, tuple(data.get("caches", ())))


def _recipe(manifest: Manifest) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe as pass objects; a pass this process does not have is no reason to refuse the program."""
    try:
        return as_recipe(manifest.recipe), ()
    except (FxpressError, TypeError, ValueError, AttributeError) as error:
        return Recipe((), manifest.seed), (f"the recipe is in the manifest only: {error}",)
