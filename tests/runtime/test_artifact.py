"""Artefact folders: exact round trips, refusals of every kind of damage, and nothing left behind by a failure."""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import json
import math
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.errors import ArtifactError, VerifyError
from fxpress.ir.program import Program, Stage
from fxpress.ir.weights import set_tensor
from fxpress.passes.base import Guarantee, PassReport, SiteResult, Skip
from fxpress.passes.quantize_rtn import QuantizeRtn
from fxpress.passes.recipe import Recipe, as_recipe
from fxpress.runtime.artifact import load, save
from fxpress.runtime.manifest import FILES, MANIFEST
from fxpress.runtime.tensor_files import pack_tensors, read_tensors, unpack_tensors, write_tensors

from ..checks import assert_same
from ..tiny import TinyModel, randn, seeded
from .mixed import LANGUAGE, MODELS, mixed

Captured = Callable[[str], Program]
REPORT = PassReport(
    pass_spec="mixed",
    guarantee=Guarantee.BOUNDED,
    taken=(SiteResult(site="up", action="affine", bytes_before=10, bytes_after=3, facts={"relative_error": 0.1, "worst": math.inf}),),
    skipped=(Skip("down", "too narrow"),),
    bytes_before=10,
    bytes_after=3,
    seconds=0.5,
    notes=("a note",),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact artefact of a compressed net; copy it to change it."""
    program = mixed(capture(nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8)), (randn(2, 16),)))
    return save(tmp_path_factory.mktemp("intact") / "out", program, reports=[REPORT], recipe=Recipe((QuantizeRtn(bits=4),), 7), bytes_before=1000)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of the artefact, to be damaged."""
    target = tmp_path / "out"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def resign(folder: Path) -> None:
    """Make the manifest's sizes and checksums agree with the files, as a forger would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_round_trip_is_exact(captured: Captured, zoo: Callable[[str], TinyModel], tmp_path: Path, name: str, compressed: bool) -> None:
    program = mixed(captured(name)) if compressed else captured(name)
    loaded = load(save(tmp_path / "out", program))
    back = loaded.program
    assert loaded.notes == ()
    assert_same(back.run_examples(), program.run_examples())
    if (other := zoo(name).other) is not None:
        assert_same(back.run_inputs(other), program.run_inputs(other))
    assert back.to_text() == program.to_text()
    assert (back.stage, back.journal, back.nbytes, back.parameters) == (program.stage, program.journal, program.nbytes, program.parameters)
    assert (back.inputs.dynamic, list(back.inputs.kwargs)) == (program.inputs.dynamic, list(program.inputs.kwargs))
    assert_same((back.inputs.args, back.inputs.kwargs), (program.inputs.args, program.inputs.kwargs))
    for a, b in zip(back.sites(), program.sites(), strict=True):
        assert (str(a), a.format, a.tensors, a.bias, a.dtype, a.tied, a.groups) == (str(b), b.format, b.tensors, b.bias, b.dtype, b.tied, b.groups)
        assert_same(a.payload(), b.payload())


@pytest.mark.parametrize("name", ["conv", "llama_tied", "gpt2"])
def test_a_loaded_program_exports_again_at_other_sizes(captured: Captured, zoo: Callable[[str], TinyModel], tmp_path: Path, name: str) -> None:
    program = mixed(captured(name))
    exported = load(save(tmp_path / "out", program)).program.to_exported().module()
    args, kwargs = zoo(name).other or ((), {})
    assert_same(exported(*args, **kwargs), program.run(*args, **kwargs))


def test_a_loaded_program_can_be_compressed_and_saved_again(captured: Captured, tmp_path: Path) -> None:
    once = load(save(tmp_path / "a", captured("llama_tied"))).program
    twice = load(save(tmp_path / "b", mixed(once))).program
    assert_same(twice.run_examples(), mixed(captured("llama_tied")).run_examples())


def test_reports_recipe_and_facts_come_back(folder: Path) -> None:
    loaded = load(folder)
    assert loaded.reports == (REPORT,)
    assert loaded.recipe == Recipe((QuantizeRtn(bits=4),), 7)
    assert (loaded.manifest.bytes_before, loaded.manifest.seed, loaded.manifest.stage) == (1000, 7, "compressed")
    assert loaded.manifest.torch_version == torch.__version__
    assert loaded.program.stage is Stage.COMPRESSED
    assert as_recipe(folder / "recipe.yaml") == loaded.recipe
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["passes"][0]["quantize_rtn"]["bits"] == 4
    assert [c.why for c in loaded.program.journal.changes] == ["for the test"] * 2


def test_saving_twice_gives_the_same_bytes(captured: Captured, tmp_path: Path) -> None:
    program = mixed(captured("llama_tied"))
    first, second = save(tmp_path / "a", program), save(tmp_path / "b", program)
    third = save(tmp_path / "c", load(first).program)
    for name in (*FILES, MANIFEST):
        assert (first / name).read_bytes() == (second / name).read_bytes() == (third / name).read_bytes()


def test_no_pickle_is_written_or_read(captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    program = mixed(captured("llama"))
    for owner, name in ((pickle, "dump"), (pickle, "dumps"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (torch, "save")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(builtins, "eval", refuse)
    target = save(tmp_path / "out", program)
    load(target)
    assert sorted(p.name for p in target.iterdir()) == sorted((*FILES, MANIFEST))
    assert {p.stat().st_mode & 0o777 for p in target.iterdir()} == {0o666 & ~_umask()}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_tied_weights_are_stored_once_and_stay_tied(captured: Captured, tmp_path: Path) -> None:
    program = captured("llama_tied")
    target = save(tmp_path / "out", program)
    size = (target / "model.safetensors").stat().st_size
    assert program.nbytes <= size <= program.nbytes + 8192
    back = load(target).program
    assert back.nbytes == program.nbytes
    tied = {s.name: s.tied for s in back.sites() if s.tied}
    assert tied == {"model.embed_tokens": ("lm_head",), "lm_head": ("model.embed_tokens",)}


@dataclass
class Pair:
    """A user's own container, registered as a pytree."""

    left: Tensor
    right: Tensor


torch.export.register_dataclass(Pair, serialized_type_name="test_artifact.Pair")


class Structured(nn.Module):
    """Nested inputs and outputs, a constant, and a list among them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, pair: Pair, more: list[Tensor], *, options: dict[str, Any]) -> dict[str, Any]:
        left = self.mix(pair.left) * options["scale"]
        return {"pair": Pair(left, pair.right + more[0]), "rest": (more[1], [left.sum()]), "nothing": None}


def test_nested_inputs_and_outputs_survive(tmp_path: Path) -> None:
    args = (Pair(randn(2, 4), randn(4)), [randn(4, seed=1), randn(1, seed=2)])
    exported = torch.export.export(Structured(), args, {"options": {"scale": 2.5, "mask": None}}, strict=False)
    program = mixed(capture(exported), ("affine{bits=4}",))
    back = load(save(tmp_path / "out", program)).program
    assert_same(back.run_examples(), program.run_examples())
    assert isinstance(back.run_examples()["pair"], Pair) and isinstance(back.inputs.args[0], Pair)
    assert back.inputs.kwargs == {"options": {"scale": 2.5, "mask": None}}


class Views(nn.Module):
    """A transposed weight, two views of one storage, an expanded buffer, a scalar and an empty buffer."""

    def __init__(self) -> None:
        super().__init__()
        fused = randn(6, 4)
        self.head = nn.Parameter(randn(5, 4, seed=1).t())
        self.first, self.second = nn.Parameter(fused[:2]), nn.Parameter(fused[1:])
        self.register_buffer("spread", randn(1, 5, seed=2).expand(3, 5))
        self.register_buffer("empty", torch.zeros(0, 5))
        self.register_buffer("shift", torch.tensor(2.0))
        self.register_buffer("narrow", randn(5, seed=3).bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.first.t() @ self.first + x @ self.second.t() @ self.second
        return torch.cat([x @ self.head + self.spread + self.shift + self.narrow, self.empty])  # type: ignore[list-item, operator]


def test_strides_and_shared_storage_survive(tmp_path: Path) -> None:
    program = capture(Views(), (randn(3, 4),))
    back = load(save(tmp_path / "out", program)).program
    assert_same(back.run_examples(), program.run_examples())
    module = back.graph_module
    assert module.head.stride() == (1, 4)  # type: ignore[operator]
    assert module.first.untyped_storage().data_ptr() == module.second.untyped_storage().data_ptr()  # type: ignore[operator]
    assert module.empty.untyped_storage().data_ptr() != module.shift.untyped_storage().data_ptr()  # type: ignore[operator]


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    """Named tensors of many dtypes and layouts, some of them views of others."""
    tensors: dict[str, Tensor] = {}
    for i in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        base = torch.randn(shape, generator=seeded(i)).mul(10).to(draw(st.sampled_from(DTYPES)))
        base = base.permute(draw(st.permutations(range(len(shape)))))
        tensors[f"t{i}.base"] = base
        for kind in draw(st.lists(st.sampled_from(["same", "slice", "flip", "expand", "flat"]), max_size=3)):
            if kind == "same":
                tensors[f"t{i}.same"] = base
            elif kind == "slice" and base.dim():
                tensors[f"t{i}.slice"] = base[1:]
            elif kind == "flip":
                tensors[f"t{i}.turned"] = base.permute(tuple(reversed(range(base.dim()))))
            elif kind == "expand":
                tensors[f"t{i}.expanded"] = base.unsqueeze(0).expand(2, *base.shape)
            elif kind == "flat" and base.is_contiguous():
                tensors[f"t{i}.flat"] = base.view(-1)
    return tensors


def raw(tensor: Tensor) -> bytes:
    """The elements in row-major order, as bytes."""
    return bytes(torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).untyped_storage())


@settings(deadline=None, max_examples=150)
@given(tensors=tensor_sets())
def test_any_set_of_tensors_survives_with_its_ties(tensors: dict[str, Tensor]) -> None:
    stored, layout = pack_tensors(tensors)
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(Path(folder) / "t.safetensors", stored)
        back = unpack_tensors(read_tensors(Path(folder) / "t.safetensors"), json.loads(json.dumps(layout)))
    assert list(back) == list(tensors)
    pointers = {name: (a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr()) for (name, a), b in zip(tensors.items(), back.values(), strict=True)}
    for name, tensor in tensors.items():
        got = back[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert raw(got) == raw(tensor)
        if tensor.numel() and 0 not in tensor.stride():
            assert got.stride() == tensor.stride()
            tied = {n for n, (p, _) in pointers.items() if p == pointers[name][0]}
            assert {n for n, (_, p) in pointers.items() if p == pointers[name][1]} == tied


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_values_in_an_unsupported_dtype_are_refused(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("odd", torch.zeros(3, dtype=torch.complex32))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.odd.real.to(x.dtype)  # type: ignore[operator]

    with pytest.raises(ArtifactError, match=r"cannot write model\.safetensors"):
        save(tmp_path / "out", capture(Odd(), (randn(3),)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_refused(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is missing|has no {name}"):
        load(damaged)


def test_a_missing_folder_and_a_foreign_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 1, -1])
def test_a_truncated_file_is_refused(damaged: Path, name: str, keep: int) -> None:
    data = (damaged / name).read_bytes()
    (damaged / name).write_bytes(data[:keep])
    with pytest.raises(ArtifactError, match=rf"{name} has \d+ bytes, expected {len(data)}: it is truncated"):
        load(damaged)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_truncated_safetensors_are_refused_even_when_signed(damaged: Path, keep: int) -> None:
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    resign(damaged)
    with pytest.raises(ArtifactError, match=r"cannot read .*model\.safetensors"):
        load(damaged)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_changed_byte_is_refused(folder: Path, name: str, place: float, flip: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            (Path(scratch) / file.name).write_bytes(file.read_bytes())
        data = bytearray((folder / name).read_bytes())
        data[int(place * len(data))] ^= flip
        (Path(scratch) / name).write_bytes(bytes(data))
        with pytest.raises(ArtifactError, match="sha256"):
            load(scratch)


@settings(deadline=None, max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_manifest_is_refused_or_read_never_worse(folder: Path, place: float, byte: int, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            (Path(scratch) / file.name).write_bytes(file.read_bytes())
        data = bytearray((folder / MANIFEST).read_bytes())
        at = int(place * len(data))
        data[at] = byte
        (Path(scratch) / MANIFEST).write_bytes(bytes(data[:at] if cut else data))
        with contextlib.suppress(ArtifactError):
            load(scratch)


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", "null", "3", '{"a": 1}', '{"format_version": "1"}', '{"format_version": 0}', '{"format_version": true}', "[" * 100000, "\xff"],
)
def test_a_manifest_that_is_none_is_refused(damaged: Path, text: str) -> None:
    (damaged / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"manifest\.json (is not JSON|has no format_version)"):
        load(damaged)


def test_a_newer_format_is_refused_with_its_version(damaged: Path) -> None:
    edit_manifest(damaged, lambda m: m.update(format_version=99, fxpress_version="7.1", something_new=[]))
    with pytest.raises(ArtifactError, match=r"format 99 \(written by fxpress 7\.1\).*upgrade fxpress"):
        load(damaged)


@pytest.mark.parametrize("name", ["../out/graph.json", "/etc/passwd", "..", "", "sub/graph.json", "graph.json\0"])
def test_file_names_that_lead_elsewhere_are_refused(damaged: Path, name: str) -> None:
    def rename(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop("graph.json")

    edit_manifest(damaged, rename)
    with pytest.raises(ArtifactError, match="expected exactly"):
        load(damaged)


PARTS = ("stage", "reports", "journal", "inputs", "tensors", "files")


@pytest.mark.parametrize("key", [*PARTS, "recipe", "torch_version", "nbytes"])
def test_every_part_of_the_manifest_is_needed(damaged: Path, key: str) -> None:
    edit_manifest(damaged, lambda m: m.pop(key))
    with pytest.raises(ArtifactError, match=key):
        load(damaged)


@pytest.mark.parametrize("key", PARTS)
@pytest.mark.parametrize("value", [None, 3, "text", [3], {"a": 3}])
def test_parts_of_the_wrong_kind_are_refused(damaged: Path, key: str, value: Any) -> None:
    edit_manifest(damaged, lambda m: m.update({key: value}))
    with pytest.raises(ArtifactError):
        load(damaged)


@pytest.mark.parametrize("recipe", [None, 3, {"passes": 3}, {"passes": [{"their_pass": None}], "seed": 7}, {"passes": [{"quantize_rtn": {"bits": "many"}}]}])
def test_a_recipe_that_cannot_be_read_is_only_noted(damaged: Path, recipe: Any) -> None:
    edit_manifest(damaged, lambda m: m.update(recipe=recipe))
    loaded = load(damaged)
    assert loaded.recipe == Recipe((), 7)
    assert loaded.notes[0].startswith("the recipe is in the manifest only: ")
    assert loaded.manifest.recipe == recipe


def change_graph(folder: Path, old: str, new: str) -> None:
    text = (folder / "graph.json").read_text()
    assert old in text
    (folder / "graph.json").write_text(text.replace(old, new))
    resign(folder)


def test_a_payload_that_does_not_fit_its_format_is_refused(damaged: Path) -> None:
    change_graph(damaged, "affine{bits=4,group_size=8}", "affine{bits=8,group_size=8}")
    with pytest.raises(ArtifactError, match=r"payload of affine\{bits=8,group_size=8\} at 0"):
        load(damaged)


@pytest.mark.parametrize("spec", ["nonsense{bits=4}", "affine{bits=99}", "affine{", "os.system"])
def test_a_format_that_does_not_exist_is_refused(damaged: Path, spec: str) -> None:
    change_graph(damaged, "affine{bits=4,group_size=8}", spec)
    with pytest.raises(ArtifactError, match="does not hold a valid program"):
        load(damaged)


def test_tensors_out_of_bounds_are_refused(damaged: Path) -> None:
    def widen(manifest: dict[str, Any]) -> None:
        manifest["tensors"]["0.weight_codes"] |= {"shape": [12, 800], "stride": [800, 1], "offset": 0}

    edit_manifest(damaged, widen)
    with pytest.raises(ArtifactError, match=r"tensor 0\.weight_codes: .* does not fit what is stored"):
        load(damaged)


def test_an_unknown_operator_is_named(damaged: Path) -> None:
    change_graph(damaged, "aten::relu.default", "their_kernels::relu.default")
    with pytest.raises(ArtifactError, match=r"node relu: 'their_kernels::relu\.default' is no operator of this process"):
        load(damaged)


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot read"):
        load(folder, device="cuda:77")


def test_an_invalid_program_is_not_saved(captured: Captured, tmp_path: Path) -> None:
    program = captured("mlp")
    set_tensor(program.graph_module, "up.weight", torch.full((20, 12), math.nan), parameter=True)
    with pytest.raises(VerifyError, match=r"up\.weight holds NaN"):
        save(tmp_path / "out", program)
    assert not list(tmp_path.iterdir())


def test_an_output_type_nobody_registered_comes_back_as_a_dict(captured: Captured, tmp_path: Path) -> None:
    """In a process that never imports transformers."""
    program = mixed(captured("llama"))
    target = save(tmp_path / "out", program)
    torch.save(program.run_examples().logits, tmp_path / "expected.pt")
    script = """
import sys, warnings, torch
from fxpress.runtime.artifact import load
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = load(sys.argv[1])
assert [w.category for w in caught if "CausalLMOutputWithPast" in str(w.message)] == [UserWarning], caught
assert "is not registered in this process, so its values come back as a plain dict" in loaded.notes[0], loaded.notes
out = loaded.program.run_examples()
assert type(out) is dict and list(out) == ["logits"], out
assert torch.equal(out["logits"], torch.load(sys.argv[2]))
loaded.program.to_exported()
assert "transformers" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(target), str(tmp_path / "expected.pt")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# Failures while writing. `before` is what stands in the parent folder, down to the bytes.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond `limit` bytes: writes fail like on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 100, 20_000])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_what_was_there(captured: Captured, tmp_path: Path, limit: int, existing: bool) -> None:
    program = captured("llama")
    if existing:
        save(tmp_path / "out", captured("mlp"))
    before = contents(tmp_path)
    with file_size_limit(limit), pytest.raises(ArtifactError, match=r"cannot write .* free space"):
        save(tmp_path / "out", program)
    assert contents(tmp_path) == before
    save(tmp_path / "out", program)
    assert load(tmp_path / "out").program.to_text() == program.to_text()


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_failure_at_any_file_leaves_what_was_there(captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    save(tmp_path / "out", captured("mlp"))
    before = contents(tmp_path)

    def failing(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path.name == name:
                raise OSError(28, "No space left on device")
            return write(path, *args, **kwargs)

        return wrapped

    monkeypatch.setattr(Path, "write_text", failing(Path.write_text))
    monkeypatch.setattr("fxpress.runtime.artifact.write_tensors", failing(write_tensors))
    with pytest.raises(ArtifactError, match=r"cannot write .*: No space left on device; free space or choose another folder"):
        save(tmp_path / "out", captured("mlp"))
    assert contents(tmp_path) == before


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`mounted("tmpfs", options)`: a fresh mount; the test is skipped where mounting is not allowed."""
    made: list[Path] = []

    def mount(kind: str, options: str) -> Path:
        point = tmp_path / f"mount{len(made)}"
        point.mkdir()
        if subprocess.run(["mount", "-t", kind, "-o", options, kind, str(point)], capture_output=True, check=False).returncode:
            pytest.skip("mounting is not allowed here")
        made.append(point)
        return point

    yield mount
    for point in made:
        subprocess.run(["umount", str(point)], check=True)


def test_a_really_full_file_system_is_left_empty(captured: Captured, mounted: Callable[..., Path]) -> None:
    point = mounted("tmpfs", "size=128k")
    with pytest.raises(ArtifactError, match="No space left on device"):
        save(point / "out", captured("llama"))
    assert not list(point.iterdir())


def test_a_read_only_file_system_is_refused(captured: Captured, mounted: Callable[..., Path]) -> None:
    point = mounted("tmpfs", "ro")
    with pytest.raises(ArtifactError, match=r"cannot write .*: Read-only file system; choose a writable folder"):
        save(point / "out", captured("mlp"))


@pytest.mark.parametrize("where", ["/proc/fxpress/out", "/dev/null/out"])
def test_a_place_that_takes_no_folder_is_refused(captured: Captured, where: str) -> None:
    with pytest.raises(ArtifactError, match=f"cannot write {where}: .*; choose a writable folder"):
        save(where, captured("mlp"))


def test_saving_never_replaces_what_is_no_artefact(captured: Captured, tmp_path: Path) -> None:
    program = captured("mlp")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"it holds other files \(thesis\.tex\)"):
        save(tmp_path, program)
    with pytest.raises(ArtifactError, match="it is a file; choose a folder"):
        save(tmp_path / "thesis.tex", program)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", program)
    save(tmp_path / "empty", program)
    assert load(tmp_path / "empty").program.to_text() == program.to_text()


def test_a_relative_folder_is_taken_from_here(captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert save("out", captured("mlp")) == tmp_path / "out"
    monkeypatch.chdir(tmp_path / "out")
    assert load(".").program.to_text() == captured("mlp").to_text()


@pytest.mark.parametrize("name", LANGUAGE)
def test_stored_tensors_are_named_like_the_programs(captured: Captured, tmp_path: Path, name: str) -> None:
    program = mixed(captured(name))
    target = save(tmp_path / "out", program)
    with safe_open(target / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= {n for n, _ in [*program.graph_module.named_parameters(), *program.graph_module.named_buffers()]}
    with safe_open(target / "inputs.safetensors", "pt") as file:
        assert len(file.keys()) == sum(isinstance(x, Tensor) for x in pytree.tree_leaves(program.inputs.kwargs))
