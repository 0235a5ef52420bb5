"""Compressed weights in the user's own model: the same numbers, the same methods, and a refusal where that cannot be."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxpress.ir.capture import capture
from fxpress.ir.edit import Editor
from fxpress.ir.errors import LowerError
from fxpress.ir.formats.base import parse_format
from fxpress.ir.ops import decode_weight
from fxpress.ir.program import Program
from fxpress.passes.context import Context
from fxpress.passes.fold_affine import FoldAffine
from fxpress.runtime.artifact import load, save
from fxpress.runtime.attach import attach
from fxpress.runtime.compressed_modules import CompressedConv, CompressedEmbedding, CompressedLinear, CompressedWeight, LazyWeight

from ..checks import assert_same
from ..tiny import TinyModel, randn, seeded, tiny, tokens
from .mixed import MODELS, mixed

Captured = Callable[[str], Program]
FORMAT = parse_format("affine{bits=4,group_size=4}")


def run(model: nn.Module, zoo: TinyModel) -> object:
    with torch.no_grad():
        return model(*zoo.call[0], **zoo.call[1])


def compressed(program: Program, *names: str) -> Program:
    """The sites called `names` in 4 bits."""
    result = program.clone()
    with Editor(result, "test") as editor:
        for site in result.sites():
            if site.name in names:
                editor.compress(site, FORMAT, FORMAT.encode(site.matrix()), "for the test")
    assert sum(s.compressed for s in result.sites()) == len(names)
    return result


def net(model: nn.Module, *inputs: Tensor) -> tuple[nn.Module, Program]:
    model = model.eval()
    return model, capture(model, inputs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("keep_decoded", [False, True])
def test_the_attached_model_equals_the_program_bit_by_bit(captured: Captured, name: str, keep_decoded: bool) -> None:
    zoo, original = tiny(name), captured(name)
    program = mixed(original)
    before = {k: v.clone() for k, v in zoo.model.state_dict().items()}
    classes = [type(m) for m in zoo.model.modules()]
    result = attach(zoo.model, original, program, keep_decoded=keep_decoded)
    outputs = program.run_examples()
    assert_same(run(result, zoo), outputs)
    if zoo.other is not None:
        with torch.no_grad():
            assert_same(result(*zoo.other[0], **zoo.other[1]), program.run_inputs(zoo.other))
    plain = run(zoo.model, zoo)
    assert not all(map(torch.equal, pytree.tree_leaves(plain), pytree.tree_leaves(outputs)))
    assert [type(m) for m in zoo.model.modules()] == classes
    assert_same(dict(zoo.model.state_dict()), before)
    assert sum(isinstance(m, CompressedWeight) for m in result.modules()) == (0 if keep_decoded else sum(s.compressed for s in program.sites()))


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "opt"])
@pytest.mark.parametrize("keep_decoded", [False, True])
def test_generate_with_a_cache_continues_like_the_program(captured: Captured, name: str, keep_decoded: bool) -> None:
    zoo, original = tiny(name), captured(name)
    program = mixed(original)
    model = attach(zoo.model, original, program, keep_decoded)
    ids = tokens(2, 5)
    got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)  # type: ignore[operator]
    for _ in range(6):
        logits = program.run(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, ids)


def test_modules_are_of_the_right_kinds(captured: Captured) -> None:
    gpt2 = attach(tiny("gpt2").model, captured("gpt2"), mixed(captured("gpt2")))
    assert isinstance(gpt2.get_submodule("transformer.h.0.attn.c_attn"), CompressedLinear)
    assert isinstance(gpt2.get_submodule("transformer.wte"), CompressedEmbedding)
    conv = attach(tiny("conv").model, captured("conv"), mixed(captured("conv")))
    assert isinstance(conv.get_submodule("conv2"), CompressedConv)
    opt = attach(tiny("opt").model, captured("opt"), mixed(captured("opt")))
    positions = opt.get_submodule("model.decoder.embed_positions")
    assert isinstance(positions, CompressedWeight) and isinstance(positions, type(tiny("opt").model.get_submodule("model.decoder.embed_positions")))


def test_a_tied_head_and_embedding_are_compressed_apart(captured: Captured) -> None:
    original, zoo = captured("llama_tied"), tiny("llama_tied")
    for names in (("lm_head",), ("model.embed_tokens",), ("lm_head", "model.embed_tokens")):
        program = compressed(original, *names)
        result = attach(zoo.model, original, program)
        assert_same(run(result, zoo), program.run_examples())
        assert {n for n, m in result.named_modules() if isinstance(m, CompressedWeight)} == set(names)


def test_unchanged_tensors_share_memory_and_take_no_gradients(captured: Captured) -> None:
    model, original = tiny("llama").model, captured("llama")
    result = attach(model, original, compressed(original, "lm_head"))
    mine = dict(model.named_parameters())
    theirs = dict(result.named_parameters())
    assert set(mine) - set(theirs) == {"lm_head.weight"}
    assert all(p.data_ptr() == mine[n].data_ptr() and p is not mine[n] and not p.requires_grad for n, p in theirs.items())
    assert all(p.requires_grad for p in mine.values())
    assert not result.training


def test_new_dense_weights_go_to_all_tied_names(captured: Captured) -> None:
    model, original = tiny("llama_tied").model, captured("llama_tied")
    program = original.clone()
    with Editor(program, "test") as editor:
        site = next(s for s in program.sites() if s.name == "lm_head")
        editor.set_matrix(site, site.matrix().round(decimals=1), "for the test")
    result = attach(model, original, program)
    assert_same(run(result, tiny("llama_tied")), program.run_examples())
    head, embedding = result.get_parameter("lm_head.weight"), result.get_parameter("model.embed_tokens.weight")
    assert head.data_ptr() == embedding.data_ptr() != model.get_parameter("lm_head.weight").data_ptr()


class Tied(nn.Module):
    """Two linears with one weight; a third name for it is used only elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.spare = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.spare.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_names_that_the_graph_does_not_read_follow_their_tie() -> None:
    model, original = net(Tied(), randn(2, 8))
    program = original.clone()
    with Editor(program, "test") as editor:
        editor.set_matrix(program.sites()[0], randn(8, 8, seed=5), "for the test")
    result = attach(model, original, program)
    assert torch.equal(result.get_parameter("spare.weight"), randn(8, 8, seed=5))
    assert_same(result(randn(2, 8)), program.run_examples())
    with Editor(program, "test") as editor:
        editor.set_matrix(editor.untie(program.sites()[1]), randn(8, 8, seed=6), "for the test")
    result = attach(model, original, program)
    assert torch.equal(result.get_parameter("a.weight"), randn(8, 8, seed=5)) and torch.equal(result.get_parameter("b.weight"), randn(8, 8, seed=6))
    assert_same(result(randn(2, 8)), program.run_examples())


@pytest.mark.parametrize("name", ["conv", "depthwise", "resnet"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("keep_decoded", [False, True])
def test_folded_batch_norms_are_left_out(captured: Captured, name: str, compress: bool, keep_decoded: bool) -> None:
    zoo, original = tiny(name), captured(name)
    program = original.clone()
    fold, context = FoldAffine(), Context()
    fold.rewrite(program, fold.analyze(program, context), context)
    program = mixed(program) if compress else program
    result = attach(zoo.model, original, program, keep_decoded)
    assert_same(run(result, zoo), program.run_examples())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in zoo.model.modules())
    assert norms >= 2
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in zoo.model.modules()) == norms


def test_a_new_bias_is_taken() -> None:
    model, original = net(nn.Sequential(nn.Linear(8, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)), randn(2, 8))
    for compress in (False, True):
        program = original.clone()
        with Editor(program, "test") as editor:
            for i, site in enumerate(program.sites()):
                editor.set_bias(site, randn(site.rows, seed=i), "for the test")
        program = mixed(program, ("affine{bits=4}",)) if compress else program
        assert_same(attach(model, original, program)(randn(2, 8)), program.run_examples())
    assert model[0].bias is None  # type: ignore[index]


class Twice(nn.Module):
    """One linear called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.again = self.mix

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.mix(x)))


def test_a_module_called_twice_is_swapped_under_all_its_names() -> None:
    model, original = net(Twice(), randn(2, 8))
    names = [s.name for s in original.sites()]
    assert len(names) == 2
    program = compressed(original, *names)
    result = attach(model, original, program)
    assert_same(result(randn(2, 8)), program.run_examples())
    assert result.mix is result.again and isinstance(result.mix, CompressedLinear)
    with pytest.raises(LowerError, match=r"mix.*compressed at one site and read dense at another"):
        attach(model, original, compressed(original, names[0]))
    other = mixed(original, ("affine{bits=4}", "affine{bits=3}"))
    with pytest.raises(LowerError, match=r"one weight, mix\.weight, compressed in two ways; use result\.module\(\)"):
        attach(model, original, other)


class Custom(nn.Module):
    """A layer of the user's own, with a weight [K, N] and no forward we could know."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.kernel)


def test_a_module_with_a_forward_of_its_own_keeps_it() -> None:
    model, original = net(nn.Sequential(nn.Linear(8, 8), Custom()), randn(2, 8))
    program = mixed(original, ("affine{bits=4}",))
    result = attach(model, original, program)
    custom = result[1]  # type: ignore[index]
    assert isinstance(custom, Custom) and isinstance(custom, CompressedWeight)
    torch.testing.assert_close(result(randn(2, 8)), program.run_examples())
    assert not torch.allclose(result(randn(2, 8)), model(randn(2, 8)))
    payload = {f"{name}_{part}" for name in ("0.weight", "1.kernel") for part in ("codes", "scale", "zero_point")}
    assert set(result.state_dict()) == {"0.bias"} | payload


def test_circular_padding_and_hooks_survive() -> None:
    model, original = net(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 3)), randn(1, 2, 6, 6))
    model[1].register_forward_hook(lambda module, args, output: output * 2)  # type: ignore[index]
    program = mixed(original, ("affine{bits=4}",))
    result = attach(model, original, program)
    assert_same(result(randn(1, 2, 6, 6)), program.run_examples() * 2)


def test_removed_channels_show_in_the_modules_sizes(captured: Captured) -> None:
    """Fewer hidden features between two linears change no other operator, so they can be attached."""
    model, original = net(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), randn(2, 8))
    program = original.clone()
    for name, cut in (("0.weight", slice(7)), ("0.bias", slice(7)), ("2.weight", (slice(None), slice(7)))):
        owner, _, leaf = name.partition(".")
        setattr(program.graph_module.get_submodule(owner), leaf, nn.Parameter(model.get_parameter(name).detach()[cut].clone(), requires_grad=False))
    for keep in (program, compressed(program, "0")):
        result = attach(model, original, keep)
        assert_same(result(randn(2, 8)), keep.run_examples())
        assert (result[0].out_features, result[2].in_features) == (7, 7)  # type: ignore[index]


@pytest.mark.parametrize("name", ["llama_tied", "opt", "vit", "mobilenet_v2"])
def test_an_attached_model_exports_again(captured: Captured, name: str) -> None:
    zoo, original = tiny(name), captured(name)
    program = mixed(original)
    exported = torch.export.export(attach(zoo.model, original, program), *zoo.call, strict=False)
    assert_same(exported.module()(*zoo.call[0], **zoo.call[1]), program.run_examples())


def test_a_loaded_program_attaches(captured: Captured, tmp_path: object) -> None:
    zoo, original = tiny("gpt2"), captured("gpt2")
    program = mixed(original)
    back = load(save(f"{tmp_path}/out", program)).program
    assert_same(run(attach(zoo.model, original, back), zoo), program.run_examples())


def test_state_dict_and_copies_work(captured: Captured) -> None:
    zoo, original = tiny("bert"), captured("bert")
    program = mixed(original)
    result = attach(zoo.model, original, program)
    twin = copy.deepcopy(result)
    for name in twin.state_dict():
        twin.state_dict()[name].copy_(torch.zeros(()))
    assert not torch.equal(twin.get_submodule("pooler")(randn(1, 2, 32)), result.get_submodule("pooler")(randn(1, 2, 32)))
    twin.load_state_dict(result.state_dict())
    assert_same(run(twin, zoo), program.run_examples())
    stored = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in result.state_dict().values()}.values())
    assert stored <= program.nbytes


def test_a_lazy_weight_decodes_only_for_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = net(nn.Sequential(nn.Linear(8, 4)), randn(2, 8))
    layer = attach(model, original, compressed(original, "0"))[0]  # type: ignore[index]
    decoded: list[int] = []

    def count(layer: CompressedWeight) -> Tensor:
        decoded.append(1)
        return decode_weight(layer.payload, layer.weight_format, layer.weight_shape, torch.float32)

    monkeypatch.setattr(CompressedWeight, "decoded", count)
    weight = layer.weight
    assert isinstance(weight, LazyWeight) and isinstance(weight, Tensor)
    assert (weight.dtype, weight.device, weight.shape, weight.dim(), weight.numel()) == (torch.float32, torch.device("cpu"), (4, 8), 2, 32)
    assert "LazyWeight" in repr(weight) and not decoded
    assert torch.equal(F.linear(randn(3, 8), weight, layer.bias), layer(randn(3, 8)))
    assert torch.equal(weight.t() + 0, compressed(original, "0").sites()[0].matrix().t())
    assert decoded


# Refusals


def test_a_factorized_site_is_refused_with_its_pass() -> None:
    model, original = net(nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU()), randn(2, 8))
    program = original.clone()
    with Editor(program, "factorize{rank=2}") as editor:
        site = program.sites()[0]
        with program.graph.inserting_before(site.node):
            first = program.graph.call_function(torch.ops.aten.linear.default, (site.data, editor._store("0.down", randn(2, 8))))
            second = program.graph.call_function(torch.ops.aten.linear.default, (first, editor._store("0.up", randn(8, 2))))
        editor.replace(site.node, second)
    with pytest.raises(LowerError, match=r"attach: aten\.linear .* was added.*; use result\.module\(\) instead"):
        attach(model, original, program)


def test_a_removed_and_a_changed_operator_are_refused() -> None:
    model, original = net(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Softmax(-1)), randn(2, 8))
    program = original.clone()
    relu = next(n for n in program.graph.nodes if n.target is torch.ops.aten.relu.default)
    with Editor(program, "drop_relu") as editor:
        editor.bypass(relu, relu.args[0], "it does nothing")
    with pytest.raises(LowerError, match=r"aten\.relu in 1 \(node relu\) was removed by drop_relu \(it does nothing\)"):
        attach(model, original, program)
    program = original.clone()
    softmax = next(n for n in program.graph.nodes if "softmax" in str(n.target))
    softmax.args = (softmax.args[0], 0, *softmax.args[2:])
    with pytest.raises(LowerError, match=r"softmax.* in 2 .* was changed"):
        attach(model, original, program)


def test_a_site_that_reads_another_value_is_refused() -> None:
    model, original = net(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), randn(2, 8))
    for program in (original.clone(), compressed(original, "2")):
        site = program.sites()[1]
        site.node.args = (program.sites()[0].node, *site.node.args[1:])
        with pytest.raises(LowerError, match=r"in 2 .* takes other inputs than before"):
            attach(model, original, program)


def test_another_models_weights_are_refused(captured: Captured) -> None:
    original = captured("mlp")
    program = compressed(original, "up")
    for name in ("up.weight", "up.bias", "down.weight"):
        other = copy.deepcopy(tiny("mlp").model)
        other.get_parameter(name).data.add_(1)
        with pytest.raises(LowerError, match=rf"site .*{name} of the model has other values than were captured"):
            attach(other, original, program)
    norm = copy.deepcopy(tiny("llama").model)
    norm.get_parameter("model.norm.weight").data.add_(1)
    with pytest.raises(LowerError, match=r"model\.norm\.weight of the model has other values"):
        attach(norm, captured("llama"), captured("llama"))
    with pytest.raises(LowerError, match="the model holds no parameter or buffer"):
        attach(nn.Identity(), original, program)


class SharedNorm(nn.Module):
    """One batch norm after two convs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.norm(self.first(x))))


def test_a_norm_folded_at_one_of_its_two_uses_is_refused() -> None:
    model, original = net(SharedNorm(), randn(1, 3, 6, 6))
    program = original.clone()
    norm = next(n for n in program.graph.nodes if "batch_norm" in n.name)
    with Editor(program, "test") as editor:
        editor.bypass(norm, norm.args[0], "for the test")
    with pytest.raises(LowerError, match=r"in norm .* was folded at one of its two uses by test"):
        attach(model, original, program)


class Functional(nn.Module):
    """An embedding table that the head reads directly, and a batch norm without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 8)
        self.register_buffer("mean", torch.randn(8, generator=seeded()))
        self.register_buffer("variance", torch.ones(8))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.linear(self.embed(ids).mean(1), self.embed.weight)
        return F.batch_norm(F.linear(x, self.embed.weight.t()), self.mean, self.variance)  # type: ignore[arg-type]


def test_a_weight_that_is_also_read_dense_is_refused() -> None:
    model, original = net(Functional(), tokens(2, 6, 24))
    names = [s.name for s in original.sites()]
    with pytest.raises(LowerError, match=r"embed\.weight is compressed at one site and read dense at another"):
        attach(model, original, compressed(original, names[0]))


class FunctionalNorm(nn.Module):
    """A batch norm that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.randn(4, generator=seeded()))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.variance)  # type: ignore[arg-type]


def test_a_folded_norm_that_is_no_module_is_refused() -> None:
    model, original = net(FunctionalNorm(), randn(1, 3, 6, 6))
    program = original.clone()
    fold, context = FoldAffine(), Context()
    fold.rewrite(program, fold.analyze(program, context), context)
    with pytest.raises(LowerError, match="the batch norm folded in the model itself is no BatchNorm module"):
        attach(model, original, program)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    class Locked(nn.Sequential):
        def __deepcopy__(self, memo: object) -> Locked:
            raise TypeError("no copies")

    model, original = net(Locked(nn.Linear(8, 4)), randn(2, 8))
    with pytest.raises(LowerError, match="Locked cannot be copied: no copies"):
        attach(model, original, original)
