"""Figures of the report as files: SVG, PNG and CSV."""

import csv
import io
import json
import math
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from refusal_jax.report.drawing import axes_within, drawing
from refusal_jax.report.pictures import Picture, as_csv, grid_rows, series_rows
from refusal_jax.runs.artifacts import FIGURES, PROJECTIONS, figure_list
from refusal_jax.study.mechanism.run import run_mechanism

PNG = b"\x89PNG\r\n\x1a\n"


def test_cells_of_a_csv():
    """No NaN in a file, numbers that are numbers, and no text that a spreadsheet would run."""
    rows = [
        {"name": "=1+2", "n": np.int64(3), "value": math.nan},
        {"name": 'a, "b"\n', "n": True, "value": -0.25},
        {"name": "−1", "n": None, "value": np.float32(1.5)},
    ]
    found = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert found == [
        {"name": "'=1+2", "n": "3", "value": ""},
        {"name": 'a, "b"\n', "n": "1", "value": "-0.25"},
        {"name": "−1", "n": "", "value": "1.5"},
    ]
    with pytest.raises(ValueError, match="a row has the columns .'a'., the first one .'b'."):
        as_csv([{"b": 1}, {"a": 1}])
    assert as_csv([]) == "\n"


def test_rows_of_maps_and_lines():
    grid = grid_rows(np.array([[1.0, 2.0], [3.0, math.nan]]), ("position", "layer", "cosine"), ["-2", "-1"])
    assert grid[1] == {"position": "-2", "layer": 1, "cosine": 2.0} and len(grid) == 4
    lines = series_rows(("layer", range(2)), {"mean": {"a": [1, 2], "b": [3, 4]}, "sd": {"a": [0, 0], "b": [1, 1]}})
    assert lines[2] == {"series": "b", "layer": 0, "mean": 3, "sd": 1} and len(lines) == 4


def test_files_of_a_picture():
    """They are the same whether the page has shown the figure before or not, and whatever the day."""

    def made() -> Picture:
        with drawing(120) as figure:
            axes = axes_within(figure, 40, 10, 10, 30)
            axes.plot([0, 1], [0, 1])
            axes.set_title("<b> & --> $x", parse_math=False)
        return Picture("a-line", "A <line>", figure, [{"x": 0, "y": 0.5}])

    shown, fresh = made(), made()
    assert 'aria-label="A &lt;line&gt;"' in shown.html and "currentColor" in shown.html
    files = shown.files()
    assert files == fresh.files() and [*files] == ["a-line.svg", "a-line.png", "a-line.csv"]
    root = ET.fromstring(files["a-line.svg"])
    assert root.attrib["width"] == "360pt" and b"<script" not in files["a-line.svg"]
    assert files["a-line.png"].startswith(PNG) and files["a-line.csv"] == b"x,y\n0,0.5\n"
    assert shown.html == made().html


def test_every_figure_of_a_report_is_a_file(demo_study, tmp_path):
    folder = shutil.copytree(demo_study, tmp_path / "run")
    run = run_mechanism({"parts": ("figures",)}, folder)
    assert run.worked == ["figures"]
    listed = json.loads((folder / figure_list(FIGURES)).read_text())
    names = [row["name"] for row in listed]
    page = (folder / "report.html").read_text()
    assert len(set(names)) == len(names) >= 6 and page.count("<figure>") == len(names)
    assert {path.name for path in (folder / FIGURES).iterdir()} == {
        "figures.json",
        *(f for row in listed for f in row["files"]),
    }
    with (folder / FIGURES / "geometry-projections.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["group", "prompt", "layer", "projection [residual units]"]
    along = run.read_tensors(PROJECTIONS)
    assert len(rows) == along["harmful_val"].size + along["harmless_val"].size
    assert run_mechanism({"parts": ("figures",)}, folder).worked == []
