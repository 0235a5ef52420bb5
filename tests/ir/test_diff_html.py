"""The HTML page of a diff: self-contained, parseable, and safe whatever the names hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fxpress.ir.diff import GraphDiff
from fxpress.ir.diff_html import page_data
from fxpress.ir.edit import Editor
from fxpress.ir.errors import ArtifactError
from fxpress.ir.formats.affine import Affine
from fxpress.ir.journal import Change
from fxpress.ir.program import Program

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u2028{{ 7*7 }}"
VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """Collects the tags, checks that they nest, and keeps the embedded JSON."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.json = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == ("script", {"id": "diff-data", "type": "application/json"}) and self.open[-1] == "script":
            self.json += data

    @property
    def data(self) -> Any:
        return json.loads(self.json)


@pytest.fixture
def diff(captured: Callable[[str], Program]) -> GraphDiff:
    original = captured("llama")
    program = original.clone()
    fmt = Affine(bits=4)
    with Editor(program, "quantize_rtn{bits=4}") as editor:
        for site in program.sites():
            editor.compress(site, fmt, fmt.encode(site.matrix()), "round to nearest", {"error": 0.5, "odd": math.nan})
    return GraphDiff.from_journal(original, program)


def hostile(diff: GraphDiff) -> GraphDiff:
    def step(change: Change) -> Change:
        return replace(change, pass_spec=HOSTILE, why=HOSTILE, facts={HOSTILE: 1.0})

    entries = [
        replace(e, after=e.after and replace(e.after, name=HOSTILE, module=HOSTILE, op=HOSTILE, format=HOSTILE), steps=tuple(map(step, e.steps)))
        for e in diff.entries
    ]
    return replace(diff, entries=tuple(entries), passes=(HOSTILE,))


def test_the_page_parses_and_its_facts_load(diff: GraphDiff) -> None:
    page = Page(diff.to_html())
    assert page.open == []
    assert page.data == page_data(diff)
    assert len(page.data["entries"]) == len(diff.entries)
    assert page.data["passes"] == [{"spec": "quantize_rtn{bits=4}", "nodes": len(diff.changed)}]


def test_the_page_refers_to_nothing_outside(diff: GraphDiff) -> None:
    text = diff.to_html()
    assert not re.search(r"https?:|//[\w-]+\.\w|@import|url\(|fetch\(|XMLHttpRequest|WebSocket", text)
    page = Page(text)
    assert all(attrs.get("href", "data:,") in ("data:,", "#tree") and "src" not in attrs for _, attrs in page.tags)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_hostile_names_stay_text(diff: GraphDiff) -> None:
    plain, text = Page(diff.to_html()), hostile(diff).to_html(title=HOSTILE)
    page = Page(text)
    assert page.open == []
    assert {t for t, _ in page.tags} == {t for t, _ in plain.tags}
    assert [a for t, a in page.tags if t == "script"] == [a for t, a in plain.tags if t == "script"]
    assert "alert(1)</script>" not in text
    assert "onerror=alert" not in re.sub(r"&lt;img src=x onerror=alert|\\u003cimg src=x onerror=alert", "", text)
    assert any(e["after"]["module"] == HOSTILE for e in page.data["entries"])


def test_no_script_draws_with_markup(diff: GraphDiff) -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", diff.to_html())


def test_equal_sides_are_stored_once_and_equal_blocks_share_a_fold(diff: GraphDiff) -> None:
    entries = page_data(diff)["entries"]
    assert all(("after" in e) == (e["kind"] != "unchanged") for e in entries)
    down = [e for e in entries if e["module"].endswith("down_proj")]
    assert len(down) == 2
    assert down[0]["fold"] == down[1]["fold"]
    assert down[0]["steps"][0]["facts"] == {"error": 0.5, "odd": "nan"}


def test_the_controls_have_names(diff: GraphDiff) -> None:
    page = Page(diff.to_html())
    labels = {a["for"] for t, a in page.tags if t == "label"}
    assert {a["id"] for t, a in page.tags if t == "input"} <= labels
    assert {a["data-kind"] for t, a in page.tags if "data-kind" in a} == {"replaced", "unchanged"}
    assert ("html", {"lang": "en"}) in page.tags
    assert "<noscript>" in diff.to_html()


def test_an_empty_diff_says_so(captured: Callable[[str], Program]) -> None:
    program = captured("mlp")
    text = GraphDiff.from_journal(program, program.clone()).to_html()
    assert "The two programs are the same" in text
    assert Page(text).open == []


def test_the_page_is_written_and_returned(diff: GraphDiff, tmp_path: Path) -> None:
    target = tmp_path / "new" / "diff.html"
    assert diff.to_html(target, title="Tiny llama") == target.read_text(encoding="utf-8")
    assert [p.name for p in target.parent.iterdir()] == ["diff.html"]
    assert "<title>Tiny llama</title>" in target.read_text(encoding="utf-8")


def test_a_folder_that_cannot_be_written_is_refused(diff: GraphDiff, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        diff.to_html(tmp_path / "file" / "diff.html")


def test_the_page_is_the_same_every_time(diff: GraphDiff) -> None:
    assert diff.to_html() == diff.to_html()
