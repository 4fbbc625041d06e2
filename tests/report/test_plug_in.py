"""A stage of another package is drawn and tabled as those of this one are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch

from autoglm_compress.architecture import ModelShape
from autoglm_compress.cutting.surgery import Rewrite
from autoglm_compress.figures import KEPT, Record, layer_axis, new_figure
from autoglm_compress.stages import Stage, StageContext
from support.pages import read_page
from support.plug_ins import AddStage
from support.running import run, write_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

torch.set_num_threads(1)


class Weigh(Stage):
    """Copies the checkpoint, and notes the size of each layer's output matrix."""

    stage: Literal["weigh"]

    def plan(self, shape: ModelShape) -> ModelShape:
        return shape

    def run(self, context: StageContext) -> None:
        source, family = context.source, context.source.family
        layers = range(source.shape.num_hidden_layers)
        names = [f"{family.layer_prefix(layer)}{family.mlp_output}.weight" for layer in layers]
        Rewrite(layers, {}, lambda _: {}).run(source, context.target, context.shape, context.runtime.progress)
        context.decisions = {"sizes": [float(source.read(name).float().norm()) for name in names]}

    @classmethod
    def plot(cls, record: Record) -> "Figure":
        sizes = record["decisions"]["sizes"]
        figure, (axes,) = new_figure("Weigh: sizes of what layers add", 2.0)
        axes.bar(range(len(sizes)), sizes, color=KEPT)
        layer_axis(axes, len(sizes))
        return figure

    @classmethod
    def linears(cls, decisions: dict[str, Any]) -> list[dict[str, Any]]:
        sizes = enumerate(decisions["sizes"])
        return [{"layer": layer, "part": "mlp.down_proj", "matrix_size": size} for layer, size in sizes]


class Clumsy(Weigh):
    """Cannot draw what it found."""

    stage: Literal["clumsy"]

    @classmethod
    def plot(cls, record: Record) -> "Figure":
        raise KeyError("no such thing")


def test_it_brings_its_plot_and_its_table(add_stage: AddStage, make_checkpoint: Callable[..., Path], tmp_path: Path):
    add_stage("weigh", Weigh)
    output = run(write_recipe(tmp_path, make_checkpoint("glm"), [{"stage": "weigh"}]), pictures=True)
    assert "warning" not in output
    folder = tmp_path / "out" / "01-weigh"
    assert b"Weigh: sizes of what layers add" in (folder / "plot.svg").read_bytes()
    sizes = json.loads((folder / "stage.json").read_text())["decisions"]["sizes"]
    page = read_page(tmp_path / "out" / "report.html")
    assert "plot-01-weigh" in page.ids
    assert [row["matrix_size"] for row in page.json("01-weigh-layers.json")] == sizes
    assert "matrix size" in page.text()


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_plot_that_fails_is_a_warning(add_stage: AddStage, make_checkpoint: Callable[..., Path], tmp_path: Path):
    add_stage("clumsy", Clumsy)
    output = run(write_recipe(tmp_path, make_checkpoint("glm"), [{"stage": "clumsy"}]), pictures=True)
    assert output.count("warning: 01-clumsy: no plot.svg: KeyError: 'no such thing'") == 1
    page = read_page(tmp_path / "out" / "report.html")
    assert "No picture of what 01-clumsy decided: KeyError" in " ".join(page.text())
