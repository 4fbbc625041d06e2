"""The guide `docs/python.md`: its examples run as they stand, one after the other, and print what they promise."""

import re
from pathlib import Path

import pytest

from support.places import ROOT

GUIDE = ROOT / "docs" / "python.md"
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    examples, names = EXAMPLE.findall(GUIDE.read_text(encoding="utf-8")), {}
    printed = []
    for number, example in enumerate(examples, 1):
        exec(compile(example, f"{GUIDE.name}, example {number}", "exec"), names)
        printed.append(capsys.readouterr().out)
    load, plan, run, model, verdict, shape, refusal = printed
    assert load == ""
    assert re.findall(r"^\S+", plan, re.MULTILINE) == ["source", "01-depth", "02-quantize"]
    assert re.search(r"^01-depth +perplexity \d+\.\d$", run, re.MULTILINE)
    assert model == "24\n"
    assert re.search(r"^(pass|undecided|fail)\nperplexity: \d+\.\d to \d+\.\d, ", verdict)
    assert re.fullmatch(r"24 \d+\ntorch.Size\(\[128\]\)\n", shape)
    assert "num_hidden_layers: given -1" in refusal
    assert "seeds: unknown key: did you mean seed?" in refusal
