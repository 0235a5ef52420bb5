"""Serving folders: what is in them, the same text as the model's own `generate`, in place and portable, by onnxruntime-genai too; and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fxpress
from fxpress.ir.errors import ArtifactError, CalibrationError, LowerError
from fxpress.runtime.cli import app
from fxpress.runtime.decoding import OnnxDecoder
from fxpress.runtime.serving import MODEL, Served

from ..tiny import fresh_program, tiny
from .test_causal_lm import batch, own_logits, real

PROMPT = "ab ca"


@cache
def model() -> nn.Module:
    """Heads of 16, which ONNX Runtime turns by itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=48, bos_token_id=1, eos_token_id=63, initializer_range=0.3)).eval()


@cache
def captured() -> fxpress.Program:
    return fxpress.capture_causal_lm(model())


@cache
def tokenizer() -> Any:
    """A letter a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate("?_|" + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;!:-")}
    made = Tokenizer(models.WordLevel(letters, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", bos_token="_", eos_token="|")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("serving")
    result = fxpress.optimize(captured(), [])
    for name, portable in (("in place", False), ("portable", True)):
        report = result.save_serving(root / name, model(), tokenizer(), portable=portable, all_logits=True)
        assert report.max_error < 1e-5 and report.path == str(root / name / MODEL)
    fxpress.optimize(captured(), "quantize_cache", calibration=[_ids()]).save_serving(root / "8-bit caches", model(), tokenizer())
    return {name: root / name for name in ("in place", "portable", "8-bit caches")}


def expected(prompt: str, tokens: int) -> str:
    ids = torch.tensor([tokenizer().encode(prompt)])
    found = model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    return str(tokenizer().decode(found[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("form", ["in place", "portable"])
def test_text_is_the_model_s_own(folders: dict[str, Path], form: str) -> None:
    served = Served(folders[form])
    assert "".join(served.stream(PROMPT, most=30)) == expected(PROMPT, 30)
    assert "".join(served.stream("xyz", most=8)) == expected("xyz", 8)  # a new text forgets the old one


@pytest.mark.parametrize("form", ["in place", "portable"])
def test_logits_at_every_length_left_padded_and_in_a_batch(folders: dict[str, Path], form: str) -> None:
    decoder = OnnxDecoder(folders[form] / MODEL, longest=20)
    for call in (batch(1, 9), batch(4, 11, padding=3)):
        call["input_ids"] %= 64
        decoder.start(len(call["input_ids"]))
        cuts = [0, 5, 6, 7, call["input_ids"].shape[1]]
        parts = [decoder(call["input_ids"][:, a:b], call["attention_mask"][:, a:b]) for a, b in pairwise(cuts)]
        torch.testing.assert_close(real(call, torch.cat(parts, 1)), real(call, own_logits(model(), call)), rtol=1e-4, atol=1e-4)
        assert decoder.length == cuts[-1]


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed")
@pytest.mark.parametrize("form", ["in place", "portable", "8-bit caches"])
def test_onnxruntime_genai_writes_the_same(folders: dict[str, Path], form: str) -> None:
    genai: Any = importlib.import_module("onnxruntime_genai")

    loaded = genai.Model(str(folders[form]))
    settings = genai.GeneratorParams(loaded)
    ids = tokenizer().encode(PROMPT)
    settings.set_search_options(max_length=len(ids) + 20, do_sample=False)
    generator = genai.Generator(loaded, settings)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    text = "".join(Served(folders[form]).stream(PROMPT, most=20)) if form == "8-bit caches" else expected(PROMPT, 20)
    assert tokenizer().decode(list(generator.get_sequence(0))[len(ids) :], skip_special_tokens=True) == text


def test_the_last_logits_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    fxpress.optimize(captured(), []).save_serving(tmp_path / "last", model(), tokenizer())
    assert "".join(Served(tmp_path / "last").stream(PROMPT, most=30)) == expected(PROMPT, 30)
    whole, last = (OnnxDecoder(folder / MODEL, longest=20) for folder in (folders["in place"], tmp_path / "last"))
    for new in (batch(3, 6), batch(3, 1), batch(3, 2)):
        every = whole(new["input_ids"] % 64)
        torch.testing.assert_close(last(new["input_ids"] % 64), every[:, -1:], rtol=1e-4, atol=1e-4)


def test_the_command_streams_and_stops(folders: dict[str, Path]) -> None:
    text = expected(PROMPT, 12)
    done = CliRunner().invoke(app, ["generate", str(folders["in place"]), "--prompt", PROMPT, "--tokens", "12"])
    assert done.exit_code == 0 and done.stdout == text + "\n"
    stopped = CliRunner().invoke(app, ["generate", str(folders["in place"]), "--prompt", PROMPT, "--tokens", "12", "--stop", text[4:6]])
    assert stopped.stdout == text[: text.index(text[4:6])] + "\n"


def test_pruned_heads_are_served(tmp_path: Path) -> None:
    small = fxpress.optimize(captured(), "prune_structured{ratio=0.5,roles=[kv_group]}", calibration=[_ids()])
    small.save_serving(tmp_path / "small", model(), tokenizer(), all_logits=True)
    config = json.loads((tmp_path / "small" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["num_key_value_heads"] == 1
    decoder, ids = OnnxDecoder(tmp_path / "small" / MODEL, longest=20), _ids()["input_ids"][:1]
    torch.testing.assert_close(torch.cat([decoder(ids[:, :5]), decoder(ids[:, 5:])], 1), small.program.run(**_ids())["logits"][:1], rtol=1e-4, atol=1e-4)


def _ids() -> dict[str, torch.Tensor]:
    return batch(2, 12) | {"input_ids": batch(2, 12)["input_ids"] % 64}


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    served = Served(folders["in place"], longest=10)
    for prompt, message in (("", "the prompt is empty"), ("a" * 10, "the prompt has 10 tokens, the context 10")):
        with pytest.raises(CalibrationError, match=message):
            served.stream(prompt)
    assert len("".join(served.stream("a" * 8, most=99))) <= 2  # the context is full
    decoder = OnnxDecoder(folders["in place"] / MODEL, longest=4)
    with pytest.raises(CalibrationError, match="0 tokens are held and 5 come, more than the 4"):
        decoder(torch.zeros(1, 5, dtype=torch.int64))
    decoder(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(CalibrationError, match=r"new token for each of 1 texts, got ids \[2, 1\]"):
        decoder(torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ArtifactError, match=r"model.onnx, genai_config.json, tokenizer.json is missing"):
        Served(tmp_path)
    with pytest.raises(LowerError, match=r"capture the model with fxpress\.capture_causal_lm"):
        fxpress.optimize(fresh_program("llama"), []).save_serving(tmp_path / "no", tiny("llama").model, tokenizer())
    assert not (tmp_path / "no").exists()
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folders["portable"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes() if file.suffix != ".json" or "genai" not in file.name else b"{")
    with pytest.raises(ArtifactError, match="is damaged"):
        Served(broken)
    (broken / "genai_config.json").write_bytes((folders["portable"] / "genai_config.json").read_bytes())
    (broken / MODEL).write_bytes((broken / MODEL).read_bytes()[:5000])
    with pytest.raises(ArtifactError, match=r"model\.onnx does not load"):
        Served(broken)
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="its tokenizer does not load"):
        Served(broken)


def test_folders_with_anything_else_in_them_stay(tmp_path: Path) -> None:
    result = fxpress.optimize(captured(), [])
    model().save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    (tmp_path / "file").write_text("mine")
    before = {p.name for p in (tmp_path / "hf").iterdir()}
    with pytest.raises(ArtifactError, match=r"holds other files \(config.json, generation_config.json, model.safetensors\)"):
        result.save_serving(tmp_path / "hf", model(), tokenizer())
    with pytest.raises(ArtifactError, match="it holds other files"):
        fxpress.save_pretrained(model(), tmp_path / "hf")
    with pytest.raises(ArtifactError, match="it is a file"):
        fxpress.save_pretrained(model(), tmp_path / "file")
    assert {p.name for p in (tmp_path / "hf").iterdir()} == before and (tmp_path / "file").read_text() == "mine"
    for _ in range(2):  # its own form is replaced
        fxpress.save_pretrained(model(), tmp_path / "own", tokenizer=tokenizer())


def test_a_model_writes_one_text_at_a_time(folders: dict[str, Path]) -> None:
    served = Served(folders["in place"])
    first, second = served.stream("ab ca", most=8), served.stream("xyz", most=8)
    assert "".join(first) == expected("ab ca", 8) and "".join(second) == expected("xyz", 8)
    first, second = served.stream("ab ca", most=8), served.stream("xyz", most=8)
    next(first), next(second)
    with pytest.raises(CalibrationError, match="another text was begun on this model"):
        list(first)


def test_special_tokens_stop(folders: dict[str, Path]) -> None:
    served = Served(folders["in place"])
    plain = "".join(served.stream("ab ca", most=8))
    served.tokenizer.add_special_tokens({"additional_special_tokens": [plain[3]]})
    assert plain[3] not in plain[:3] and "".join(served.stream("ab ca", most=8, stops=(plain[3],))) == plain[:3]


def test_a_call_that_fails_leaves_what_is_held(folders: dict[str, Path]) -> None:
    decoder, ids = OnnxDecoder(folders["in place"] / MODEL, longest=20), torch.tensor([[3, 4, 5, 6]])
    decoder.start()
    wanted = torch.cat([decoder(ids), decoder(ids)], 1)
    decoder.start()
    decoder(ids)
    with pytest.raises(Exception, match="out of data bounds"):
        decoder(torch.tensor([[999]]))
    assert decoder.length == 4 and torch.allclose(decoder(ids.int()), wanted[:, 4:], atol=1e-5)


def test_a_shorter_text_limit_is_the_folder_s(tmp_path: Path) -> None:
    program = fxpress.capture_causal_lm(model(), longest=16)
    fxpress.optimize(program, []).save_serving(tmp_path / "short", model(), tokenizer())
    served = Served(tmp_path / "short")
    assert served.context == 16 and len("".join(served.stream("ab", most=99))) <= 14


def test_heads_of_odd_widths_are_spelled_out(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 36, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 3}
    narrow = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=32)).eval()
    report = fxpress.optimize(fxpress.capture_causal_lm(narrow), []).save_serving(tmp_path / "out", narrow, tokenizer())
    assert any("its heads are 12 wide, which is no multiple of 8" in n for n in report.lowering.notes)
    assert report.max_error < 1e-5 and not report.caches_in_place


def test_a_file_without_caches_is_refused(tmp_path: Path) -> None:
    fxpress.optimize(fresh_program("mlp"), []).export_onnx(tmp_path / "mlp.onnx")
    with pytest.raises(LowerError, match="has no caches"):
        OnnxDecoder(tmp_path / "mlp.onnx", longest=4)
