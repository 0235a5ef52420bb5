"""Options as frozen dataclasses and their text specs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fxpress.ir.errors import SpecError
from fxpress.ir.formats.affine import Affine
from fxpress.ir.spec import Options, option, parse_spec, suggest


class Mode(Enum):
    FAST = "fast"
    SLOW = "slow"


@dataclass(frozen=True, kw_only=True)
class Sample(Options):
    """One field of every kind the passes use."""

    bits: int = option(ge=1, le=8)
    rate: float = option(0.5, gt=0, lt=1)
    width: int | None = option(None, ge=1)
    mode: Mode = Mode.FAST
    exact: bool = False
    only: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()


def parsed(text: str) -> Sample:
    name, options = parse_spec(text)
    assert name == Sample.name
    return Sample.from_dict(options)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
samples = st.builds(
    Sample,
    bits=st.integers(1, 8),
    rate=st.floats(0, 1, exclude_min=True, exclude_max=True),
    width=st.none() | st.integers(1, 10**6),
    mode=st.sampled_from(Mode),
    exact=st.booleans(),
    only=st.lists(words, max_size=3).map(tuple),
    sizes=st.lists(st.integers(-99, 99), max_size=3).map(tuple),
)


@example(Sample(bits=1, only=("it's", 'a"b', "'", "", " x ", "12", "true", "[a", "a,b", "2:4", "re:^a{2}$")))
@given(samples)
def test_spec_round_trips(sample: Sample) -> None:
    assert parsed(sample.to_spec()) == sample


@given(samples)
def test_dict_round_trips(sample: Sample) -> None:
    assert Sample.from_dict(sample.to_dict()) == sample


def test_name_is_the_file_stem() -> None:
    assert Sample.name == "test_spec"
    assert Affine.name == "affine"


def test_spec_names_only_what_differs_from_the_defaults() -> None:
    assert Sample(bits=4).to_spec() == "test_spec{bits=4}"
    full = Sample(bits=4, rate=0.25, width=64, mode=Mode.SLOW, exact=True, only=("a.*", "re:x,y"), sizes=(1, 2))
    assert full.to_spec() == "test_spec{bits=4,rate=0.25,width=64,mode=slow,exact=true,only=[a.*,'re:x,y'],sizes=[1,2]}"


def test_values_are_coerced_to_their_annotations() -> None:
    sample = parsed("test_spec{ bits = 4, mode='slow', only=one, sizes=[3], width=none }")
    assert sample == Sample(bits=4, mode=Mode.SLOW, only=("one",), sizes=(3,))
    assert isinstance(Sample(bits=4, rate=0.5).rate, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test_spec{bits=4", "missing closing brace"),
        ("test_spec{bits}", "expected option=value"),
        ("test_spec{bits=4,bits=5}", "given twice"),
        ("{bits=4}", "is not a name"),
        ("a-b", "is not a name"),
        ("test_spec{only=['a}", "unbalanced"),
        ("test_spec{bit=4}", r"unknown option 'bit' \(did you mean 'bits'\?\)"),
        ("test_spec", r"missing option 'bits', for example test_spec\{bits=\.\.\.\}"),
        ("test_spec{bits=9}", "bits=9: must be <= 8"),
        ("test_spec{bits=0}", "bits=0: must be >= 1"),
        ("test_spec{bits=4,rate=1.0}", "rate=1.0: must be < 1"),
        ("test_spec{bits=4,width=0}", "width=0: must be >= 1"),
        ("test_spec{bits=true}", "expected int, got True"),
        ("test_spec{bits=4.5}", "expected int, got 4.5"),
        ("test_spec{bits=4,mode=fats}", r"expected one of \['fast', 'slow'\], got 'fats' \(did you mean 'fast'\?\)"),
        ("test_spec{bits=4,exact=1}", "expected bool, got 1"),
        ("test_spec{bits=4,sizes=3}", "expected a list, got 3"),
        ("test_spec{bits=4,sizes=[a]}", "expected int, got 'a'"),
    ],
)
def test_refusals_name_the_option_and_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parsed(text)


@given(st.text(max_size=20))
def test_any_text_parses_or_is_refused_with_a_spec_error(text: str) -> None:
    try:
        name, options = parse_spec(text)
    except SpecError:
        return
    assert name.isidentifier()
    assert all(key.isidentifier() for key in options)


@pytest.mark.parametrize(("word", "expected"), [("bit", " (did you mean 'bits'?)"), ("zzz", "")])
def test_suggest(word: str, expected: str) -> None:
    known: list[Any] = ["bits", "width"]
    assert suggest(word, known) == expected
