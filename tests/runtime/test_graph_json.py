"""Graphs as JSON: exact round trips, and nothing in a file that is ever run."""

from __future__ import annotations

import builtins
import contextlib
import copy
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from fxpress.ir.capture import capture
from fxpress.ir.errors import ArtifactError
from fxpress.ir.nodes import module_path, node_type
from fxpress.ir.program import Program
from fxpress.runtime.graph_json import graph_from_json, graph_to_json
from fxpress.runtime.json_values import decode, encode, plain_json, plain_value
from fxpress.runtime.op_targets import resolve_target, target_name
from fxpress.runtime.tree_specs import spec_from_json, spec_to_json

from ..checks import assert_same
from ..tiny import Mlp, randn
from .mixed import MODELS, mixed

Captured = Callable[[str], Program]


def again(program: Program) -> Program:
    """The program with its graph sent through JSON text; its tensors stay."""
    text = json.dumps(graph_to_json(program.graph_module), allow_nan=False)
    module, notes = graph_from_json(json.loads(text), program.clone().graph_module)
    assert notes == ()
    return Program(module, program.inputs, program.stage, program.journal)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_round_trip_keeps_the_graph(captured: Captured, name: str, compressed: bool) -> None:
    program = mixed(captured(name)) if compressed else captured(name)
    back = again(program)
    back.verify()
    assert back.to_text() == program.to_text()
    assert back.graph_module.code == program.graph_module.code
    assert graph_to_json(back.graph_module) == graph_to_json(program.graph_module)
    assert [str(s) for s in back.sites()] == [str(s) for s in program.sites()]
    for a, b in zip(back.graph.nodes, program.graph.nodes, strict=True):
        assert (a.name, module_path(a), node_type(a)) == (b.name, module_path(b), node_type(b))
        assert {k: v for k, v in a.meta.items() if k.startswith("fxpress_")} == {k: v for k, v in b.meta.items() if k.startswith("fxpress_")}
    assert_same(back.run_examples(), program.run_examples())


class Sizes(nn.Module):
    """Computes with sizes, so that scalar functions stand in the graph."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = x.shape
        half = torch.sym_max(rows // 2, 1)
        return x.reshape(rows * columns), x.new_full((half + math.ceil(columns / 2),), -torch.inf)


def test_scalar_functions_and_infinities_survive() -> None:
    program = capture(Sizes(), (randn(6, 3),), dynamic_shapes=({0: Dim("rows", min=2, max=64), 1: Dim("columns", min=2, max=64)},))
    targets = {n["target"] for n in graph_to_json(program.graph_module)["nodes"]}
    assert {"operator::mul", "operator::floordiv", "torch::sym_max", "math::ceil"} <= targets
    back = again(program)
    assert_same(back.run(randn(9, 5)), program.run(randn(9, 5)))
    assert back.run(randn(9, 5))[1].shape == (7,)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text()
CONSTANTS = st.sampled_from([torch.float32, torch.float8_e4m3fn, torch.strided, torch.channels_last, torch.device("cpu"), torch.device("cuda:1")])
VALUES = st.recursive(
    SCALARS | CONSTANTS | st.builds(slice, st.none() | st.integers(), st.none() | st.integers()),
    lambda v: st.lists(v, max_size=4) | st.lists(v, max_size=4).map(tuple) | st.dictionaries(st.text() | st.integers(), v, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(value=VALUES)
def test_every_argument_value_survives(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value, "here"), allow_nan=False)), {}, "here")
    assert type(back) is type(value)
    assert repr(back) == repr(value)  # NaN is not equal to itself; repr also tells 0.0 from -0.0


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(), v, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(value=PLAIN.filter(lambda v: not (isinstance(v, dict) and set(v) == {"float"})))
def test_every_record_survives(value: Any) -> None:
    assert repr(plain_value(json.loads(json.dumps(plain_json(value), allow_nan=False)))) == repr(value) or "'float'" in repr(value)


@pytest.mark.parametrize("value", [object(), torch.zeros(2), {1, 2}, torch.Generator(), lambda: None])
def test_an_unknown_argument_is_refused_with_its_place(value: Any) -> None:
    with pytest.raises(ArtifactError, match=r"node add_3: cannot save a"):
        encode(value, "node add_3")


@pytest.mark.parametrize(
    "name",
    ["os::system.default", "aten::__class__.default", "aten::linear.__class__", "aten::linear", "builtins::eval", "builtins::__import__", "math::__loader__",
     "operator::attrgetter", "operator::methodcaller", "torch::load", "aten::linear.default.__call__", "aten::nonsense.default", "load_library::x.default",
     "higher_order::cond.default", "", None, 3, ["aten::linear.default"]],
)  # fmt: skip
def test_only_registered_operators_and_listed_functions_are_found(name: Any) -> None:
    with pytest.raises(ArtifactError, match="no operator of this process"):
        resolve_target(name, "node x")


@pytest.mark.parametrize(
    "target", [torch.ops.aten.linear.default, torch.ops.aten.__and__.Tensor, torch.ops.fxpress.conv.default, torch.ops.prims.convert_element_type.default]
)
def test_operators_are_found_by_their_names(target: Any) -> None:
    assert resolve_target(target_name(target, "here"), "here") is target


@pytest.mark.parametrize("target", [torch.ops.higher_order.cond, torch.nn.functional.relu, print])
def test_a_call_without_a_name_is_refused_at_saving(captured: Captured, target: Any) -> None:
    program = captured("mlp")
    relu = next(n for n in program.graph.nodes if n.target is torch.ops.aten.relu.default)
    relu.target = target
    with pytest.raises(ArtifactError, match=r"node relu: cannot save a call .* registered torch operator"):
        graph_to_json(program.graph_module)


HOSTILE = (
    "canary_called()",
    "x=canary_called()",
    "x=canary_called(), approximate",
    'x" if canary_called() else "x',
    "self.__dict__[canary_called()]",
    "x'); canary_called(); ('",
    'x"), canary_called(), ("',
    "x\n    canary_called()",
    "x': canary_called(), 'y",
    "x:canary_called()",
    "x # COUNTER: 1",
    "x\\",
)


def texts_in(data: Any) -> set[str]:
    """All texts in JSON data, keys too, and those in the JSON texts of pytree contexts."""
    if isinstance(data, dict):
        inner = {t for k, v in data.items() for t in texts_in(json.loads(v) if k == "context" and isinstance(v, str) else v)}
        return set(data) | inner
    return {t for v in data for t in texts_in(v)} if isinstance(data, list) else {data} if isinstance(data, str) else set()


def renamed(data: Any, old: str, new: str) -> Any:
    """JSON data with every text `old` replaced, as a value, as a key and inside pytree contexts."""
    if isinstance(data, dict):
        values = {k: json.dumps(renamed(json.loads(v), old, new)) if k == "context" and isinstance(v, str) else renamed(v, old, new) for k, v in data.items()}
        return {new if k == old else k: v for k, v in values.items()}
    return [renamed(v, old, new) for v in data] if isinstance(data, list) else new if data == old else data


def loads_and_runs(data: Any, program: Program, old: str, new: str) -> None:
    """Read JSON data as a graph and run it, over tensors of which `old` is called `new`; only `ArtifactError` may come of reading."""
    tensors = program.clone().graph_module
    if old in dict(tensors.named_parameters()) and "." not in new:
        tensors.register_buffer(new, tensors.get_parameter(old).detach())
    try:
        module, _ = graph_from_json(data, tensors)
    except ArtifactError:
        return
    with torch.no_grad(), contextlib.suppress(Exception):  # a changed graph may fail in any way when it runs
        module(*program.inputs.leaves)


class Keyword(nn.Module):
    """Keyword inputs, a constant, a slice, a list index and a dict output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: Tensor, *, scale: Tensor, mode: str = "a") -> dict[str, Tensor]:
        return {"y": torch.nn.functional.gelu(self.layers(x), approximate="tanh") * scale[0, None, 1:]}


def test_no_text_in_a_file_is_ever_run(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(builtins, "canary_called", lambda: called.append(1), raising=False)
    program = capture(Keyword(), {"x": randn(2, 4), "scale": randn(2, 5), "mode": "b"})
    data = graph_to_json(program.graph_module)
    texts = texts_in(data)
    assert {"x", "scale", "linear", "layers.0.weight", "tanh", "aten::linear.default", "builtins.tuple", "y", "args"} <= texts
    scopes: tuple[Callable[[str, str], Any], ...] = (
        lambda old, new: renamed(data, old, new),
        lambda old, new: data | {"nodes": renamed(data["nodes"], old, new)},
        lambda old, new: data | {"nodes": [n | {"target": renamed(n["target"], old, new)} for n in data["nodes"]]},
        lambda old, new: data | {"signature": data["signature"] | {"arguments": renamed(data["signature"]["arguments"], old, new)}},
        lambda old, new: data | {"signature": data["signature"] | {"inputs": renamed(data["signature"]["inputs"], old, new)}},
    )
    for old in texts:
        for new in HOSTILE:
            for scope in scopes:
                if (changed := scope(old, new)) != data:
                    loads_and_runs(changed, program, old, new)
    assert not called
    exec("canary_called()")
    assert called, "the canary itself must work"


def test_an_input_default_is_refused_for_fx_would_split_its_source() -> None:
    program = capture(Mlp(), (randn(2, 12),))
    data = graph_to_json(program.graph_module)
    placeholder = next(n for n in data["nodes"] if n["op"] == "placeholder")
    placeholder["args"] = ["a:b"]
    with pytest.raises(ArtifactError, match="default value"):
        graph_from_json(data, program.graph_module)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["node", "tuple", "dict", "slice", "dtype", "device", "float", "x"]), v, max_size=2),
    max_leaves=6,
)


def values_in(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values in JSON data."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*path, key)
        yield from values_in(value, (*path, key))


@pytest.fixture(scope="module")
def small() -> tuple[Program, Any, list[tuple[Any, ...]]]:
    program = mixed(capture(Mlp(), (randn(2, 12),)))
    data = graph_to_json(program.graph_module)
    return program, data, list(values_in(data))


@settings(deadline=None, max_examples=300)
@given(draw=st.data())
def test_a_damaged_graph_is_refused_or_read_never_worse(small: tuple[Program, Any, list[tuple[Any, ...]]], draw: st.DataObject) -> None:
    program, data, paths = small
    path, value, remove = draw.draw(st.sampled_from(paths)), draw.draw(JSON), draw.draw(st.booleans())
    *parents, last = path
    broken = copy.deepcopy(data)
    owner = broken
    for key in parents:
        owner = owner[key]
    if remove:
        del owner[last]
    else:
        owner[last] = value
    try:
        graph_from_json(broken, program.clone().graph_module)
    except ArtifactError:
        return


@pytest.mark.parametrize("data", [None, [], {}, {"schema": 2}, {"schema": 1}, "text", 3])
def test_data_that_is_no_graph_is_refused(data: Any) -> None:
    with pytest.raises(ArtifactError, match="graph"):
        graph_from_json(data, nn.Module())


def test_a_graph_over_missing_weights_is_refused(captured: Captured) -> None:
    with pytest.raises(ArtifactError, match=r"up\.weight is not stored"):
        graph_from_json(graph_to_json(captured("mlp").graph_module), nn.Module())


class Mode(Enum):
    FAST = "fast"


@pytest.mark.parametrize("tree", [defaultdict(int, {"a": 1}), {"x": defaultdict(int)}, {Mode.FAST: 1}])
def test_structures_that_name_code_are_refused_at_saving(tree: Any) -> None:
    with pytest.raises(ArtifactError, match="names Python code"):
        spec_to_json(pytree.tree_structure(tree), "outputs")


@pytest.mark.parametrize(
    "node",
    [{"type": "builtins.dict", "context": json.dumps([{"__enum__": True, "fqn": "this:Mode", "name": "FAST"}]), "children_spec": []},
     {"type": "builtins.dict", "context": '[{"__en\\u0075m__": true, "fqn": "this:Mode", "name": "FAST"}]', "children_spec": []},
     {"type": "collections.defaultdict", "context": {"default_factory_module": "this", "default_factory_name": "d", "dict_context": []}, "children_spec": []}],
)  # fmt: skip
def test_reading_a_structure_imports_nothing(node: Any) -> None:
    assert "this" not in sys.modules
    nested = {"type": "builtins.tuple", "context": "null", "children_spec": [node]}
    for root in (node, nested):
        with pytest.raises(ArtifactError, match="names Python code"):
            spec_from_json([1, root], "outputs", plain_if_unknown=True)
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("context", "expected"), [('["logits", "loss"]', {"logits": 1, "loss": 2}), ("null", (1, 2)), ('["one"]', (1, 2)), ("nonsense", (1, 2))]
)
def test_an_unregistered_output_type_comes_back_plain_with_a_note(context: str, expected: Any) -> None:
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    data = [1, {"type": "nowhere.Output", "context": context, "children_spec": [leaf, leaf]}]
    spec, notes = spec_from_json(data, "outputs", plain_if_unknown=True)
    assert pytree.tree_unflatten([1, 2], spec) == expected
    assert notes == (f"the type nowhere.Output is not registered in this process, so its values come back as a plain {type(expected).__name__}",)
    with pytest.raises(ArtifactError, match=r"nowhere\.Output is not registered in this process; import the package"):
        spec_from_json(data, "inputs")
