"""Save a smaller program as a Hugging Face folder that `from_pretrained` loads without any code of ours.

The architecture is not named anywhere: sizes that changed are looked for among the numbers of the model's own config, biases that came among its switches,
and a guess counts only if a model built from the config has exactly the program's tensors and, filled with them, gives the program's outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..ir.centres import centre_of, fold_centre
from ..ir.edit import Editor
from ..ir.errors import LowerError
from ..ir.files import atomic_folder
from ..ir.program import Program
from ..ir.weights import named_tensors
from .folders import CONFIGS, TOKENIZER

TOLERANCE = 1e-4  # of the largest output
WAY_OUT = "save the program with Result.save, or make every layer equally wide (slice{ratio=} or one width)"


def save_pretrained(program: Program, model: nn.Module, folder: str | Path, *, tokenizer: Any = None) -> Path:
    """Write `program`, a smaller version of the Hugging Face `model`, as config and safetensors; `model` is not changed.

    Raises `LowerError` when the program holds compressed weights, when its layers have sizes that one config cannot say, or when the model built from the
    new config does not give the program's outputs on the example inputs; then nothing is written.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise LowerError(f"save_pretrained: expected a Hugging Face model with a config, got {type(model).__name__}; {WAY_OUT}")
    if (held := next((s for s in program.sites() if s.compressed), None)) is not None:
        raise LowerError(f"save_pretrained: {held.name} holds {held.format.to_spec()}, which no Hugging Face class stores; {WAY_OUT}")
    plain = _without_centres(program)
    tensors = {name: tensor.detach() for name, tensor in named_tensors(plain.graph_module)}
    config = _config(model, tensors)
    small = _filled(type(model), config, tensors)
    _check(small, program)
    with atomic_folder(Path(folder), own=("model*.safetensors*", *CONFIGS, *TOKENIZER)) as scratch:
        small.save_pretrained(scratch)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    return Path(folder)


def _without_centres(program: Program) -> Program:
    """The program with what `nest` takes off its inputs folded into biases: the same function, in the architecture's own operators."""
    plain = program.clone()
    with Editor(plain, "save_pretrained") as editor:
        for site in [s for s in plain.sites() if centre_of(s) is not None]:
            fold_centre(editor, site, "folded")
    return plain


def _config(model: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """The model's config with new sizes and switches, such that its class has the program's tensors."""
    sizes = _changed_sizes(model, tensors)
    for attributes in _guesses(model.config, sizes):
        config = copy.deepcopy(model.config)
        try:
            for name, value in attributes.items():
                setattr(config, name, value)
        except (ValueError, TypeError, AttributeError):
            continue  # switches that the config does not turn on alone
        if _fits(type(model), config, tensors):
            return config
    listed = ", ".join(f"{old} -> {new}" for old, new in sizes.items()) or "none"
    raise LowerError(f"save_pretrained: no config of {type(model).__name__} has the program's tensors (sizes that changed: {listed}); {WAY_OUT}")


def _changed_sizes(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[int, int]:
    """What each size of the model's parameters has become."""
    found: dict[int, set[int]] = {}
    for name, old in named_tensors(model):
        new = tensors.get(name)
        for before, after in zip(old.shape, new.shape, strict=True) if new is not None and new.dim() == old.dim() else ():
            if before != after:
                found.setdefault(before, set()).add(after)
    for before, several in found.items():
        if len(several) > 1:
            raise LowerError(f"save_pretrained: layers that had {before} units now have {sorted(several)}, and a config holds one width; {WAY_OUT}")
    return {before: after.pop() for before, after in found.items()}


def _guesses(config: Any, sizes: Mapping[int, int]) -> Iterator[dict[str, Any]]:
    """Changes of the config to try: some numbers that equal an old size, or one that is left open, take the new one; then up to two switches are turned on."""
    values = config.to_dict()
    named = {n: sizes[v] for n, v in values.items() if isinstance(v, int) and not isinstance(v, bool) and v in sizes}
    opened = [n for n, v in values.items() if v is None and hasattr(config, n)]
    numbers = [dict(some) for count in range(len(sizes), len(named) + 1) for some in combinations(named.items(), count)]
    numbers += [{n: new} for n in opened for new in sizes.values()]
    switches = sorted((n for n, v in values.items() if v is False), key=lambda n: "bias" not in n)  # those that add tensors first
    for chosen in numbers:
        for count in range(3):
            for turned in combinations(switches, count):
                yield chosen | dict.fromkeys(turned, True)


def _fits(kind: type[nn.Module], config: Any, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a model of this config has the program's tensors: each of equal shape, and besides them only biases and what it does not save."""
    try:
        with torch.device("meta"):
            built = kind(config)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, ZeroDivisionError):
        return False
    shapes = {name: parameter.shape for name, parameter in built.named_parameters(remove_duplicate=False)}
    wanted = {name: tensor.shape for name, tensor in tensors.items() if name in shapes or name.endswith((".weight", ".bias"))}
    return all(shapes.get(name) == shape for name, shape in wanted.items()) and all(n in tensors or n.endswith(".bias") or _tied(built, n) for n in shapes)


def _tied(model: nn.Module, name: str) -> bool:
    """Whether the parameter is another name of one that the program holds (a head tied to its embedding)."""
    return any(name in (key, value) for key, value in (getattr(model, "all_tied_weights_keys", None) or {}).items())


def _filled(kind: type[nn.Module], config: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model of the config with the program's values; biases that the program does not have are zero."""
    model = kind(config).eval()
    state = {name: tensors.get(name, torch.zeros_like(value)) for name, value in model.state_dict().items() if name in tensors or name.endswith(".bias")}
    model.load_state_dict(state, strict=False)
    return model


def _check(model: nn.Module, program: Program) -> None:
    with torch.no_grad():
        outputs = pytree.tree_leaves(model.to(program.device)(*program.inputs.args, **program.inputs.kwargs))
    for got, wanted in zip(outputs, pytree.tree_leaves(program.run_examples()), strict=False):
        if isinstance(wanted, Tensor) and wanted.is_floating_point():
            error = float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30))
            if not error <= TOLERANCE:
                raise LowerError(f"save_pretrained: {type(model).__name__} gives outputs {error:.1e} of the largest away from the program's; {WAY_OUT}")
