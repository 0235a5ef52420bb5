"""Resume after a kill: one file per finished group of sites, bound to model, recipe, calibration and seed by a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..ir.chain import from_json
from ..ir.edit import Editor
from ..ir.errors import CheckpointError
from ..ir.formats.base import parse_format
from ..ir.program import Program
from ..ir.sites import WeightSite
from ..ir.weights import named_tensors
from .base import SiteResult
from .context import Call

if TYPE_CHECKING:
    from .examples import Example


@dataclass(frozen=True)
class EditRecord:
    """One site edit: new dense weights (tensor `matrix`), a payload in `weight_format`, or a `chain` of factors as text (tensors by their names)."""

    site: str
    weight_format: str
    why: str
    facts: Mapping[str, float]
    tensors: Mapping[str, Tensor]
    chain: str = ""

    def apply(self, editor: Editor, site: WeightSite) -> None:
        """Redo the edit."""
        if self.chain:
            editor.factorize(site, from_json(self.chain, self.tensors), self.why, self.facts)
        elif self.weight_format:
            editor.compress(site, parse_format(self.weight_format), self.tensors, self.why, self.facts)
        else:
            editor.set_matrix(site, self.tensors["matrix"], self.why, self.facts)


@dataclass(frozen=True)
class GroupRecord:
    """A finished group: its site names and, per pass, the edits made and the results reported."""

    sites: list[str]
    edits: list[list[EditRecord]]
    results: list[list[SiteResult]]


class Checkpoint:
    """A folder of finished groups. Opening it with another fingerprint is refused rather than mixed."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = Path(folder)
        self.reused = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            mark = self.folder / "fingerprint"
            if not mark.exists():
                mark.write_text(fingerprint)
            found = mark.read_text()
        except OSError as error:
            raise CheckpointError(f"checkpoint folder {folder} cannot be used: {error.strerror}; choose another checkpoint_dir") from error
        if found != fingerprint:
            raise CheckpointError(
                f"checkpoint folder {folder} belongs to another model, recipe, calibration set, seed or version "
                f"(fingerprint {found[:12]}, this run {fingerprint[:12]}); delete it or choose another checkpoint_dir"
            )

    def save(self, stage: int, group: int, record: GroupRecord) -> None:
        """Write one group; the file appears whole or not at all."""
        tensors = {f"{i}.{j}.{k}": t.contiguous() for i, edits in enumerate(record.edits) for j, edit in enumerate(edits) for k, t in edit.tensors.items()}
        self.write(_name(stage, group), tensors, _header(record))

    def write(self, name: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Write one file of tensors and plain data; it appears whole or not at all."""
        path = self.folder / f"{name}.safetensors"
        scratch = path.with_suffix(".tmp")
        try:
            save_file(dict(tensors), scratch, metadata={"record": json.dumps(header)})
            os.replace(scratch, path)
        except (OSError, SafetensorError) as error:
            scratch.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write checkpoint {path}: {error}; free space, or run without checkpoint_dir") from error

    def load(self, stage: int, group: int, sites: Sequence[str]) -> GroupRecord | None:
        """The group as it was finished earlier, or None; a file that is damaged is set aside and the group done again."""
        found = self.read(_name(stage, group))
        if found is None:
            return None
        header, tensors = found
        if header["sites"] != list(sites):
            raise CheckpointError(
                f"checkpoint {_name(stage, group)} in {self.folder} holds sites {header['sites']}, expected {list(sites)}; delete the checkpoint folder"
            )
        self.reused += 1
        return _record(header, tensors)

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Plain data and tensors (where new tensors lie) of a file written earlier, or None; a damaged file is removed."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt", device=str(torch.get_default_device())) as file:
                return json.loads(file.metadata()["record"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, KeyError, TypeError, OSError):
            path.unlink()
            return None


def _name(stage: int, group: int) -> str:
    return f"stage-{stage:02d}-group-{group:05d}"


def _header(record: GroupRecord) -> dict[str, Any]:
    edits = [[{"site": e.site, "weight_format": e.weight_format, "why": e.why, "facts": dict(e.facts), "chain": e.chain} for e in es] for es in record.edits]
    return {"sites": record.sites, "edits": edits, "results": [[asdict(r) for r in rs] for rs in record.results]}


def _record(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GroupRecord:
    edits = [
        [EditRecord(**e, tensors={k.split(".", 2)[2]: t for k, t in tensors.items() if k.startswith(f"{i}.{j}.")}) for j, e in enumerate(es)]
        for i, es in enumerate(header["edits"])
    ]
    return GroupRecord(header["sites"], edits, [[SiteResult(**r) for r in rs] for rs in header["results"]])


def fingerprint(program: Program, recipe: Sequence[str], calls: Sequence[Call], seed: int, training: Sequence[Example] = ()) -> str:
    """sha256 over graph, weights, resolved recipe, calibration and training data, seed, torch and fxpress checkpoint version."""
    digest = hashlib.sha256()
    digest.update(json.dumps(["fxpress-checkpoint-1", torch.__version__, seed, list(recipe), program.to_text()]).encode())
    for name, tensor in sorted(named_tensors(program.graph_module)):
        digest.update(name.encode())
        _update(digest, tensor)
    for leaf in torch.utils._pytree.tree_leaves([[list(c) for c in calls], [[list(e.call), e.target] for e in training]]):
        if isinstance(leaf, Tensor):
            _update(digest, leaf)
    return digest.hexdigest()


def _update(digest: Any, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
