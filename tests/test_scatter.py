"""Prompts in the residual stream: activations against taps, principal components against an SVD, and the stage."""

import csv
import json
import shutil

import numpy as np

from refusal_jax.mechanism.components import components_of
from refusal_jax.runs.artifacts import FIGURES, SCATTER, SCATTER_POINTS
from refusal_jax.study.mechanism.run import run_mechanism
from refusal_jax.study.mechanism.scatter import layers_shown


def test_components_are_those_of_an_svd():
    for shape in ((30, 12), (6, 40)):
        points = np.random.default_rng(0).normal(size=shape) * np.linspace(3, 1, shape[1])
        found = components_of(points, 3)
        _, sizes, axes = np.linalg.svd(points - points.mean(0), full_matrices=False)
        np.testing.assert_allclose(np.abs(found.axes_cd @ axes[:3].T), np.eye(3), atol=1e-8)
        np.testing.assert_allclose(found.shares_c, (sizes**2 / (sizes**2).sum())[:3])
        np.testing.assert_allclose(found.along_nc, (points - points.mean(0)) @ found.axes_cd.T)
    line = components_of(np.outer(np.arange(5.0), [1.0, -2.0, 0.0]))
    np.testing.assert_allclose(line.shares_c, [1, 0], atol=1e-12)
    np.testing.assert_allclose(line.axes_cd, [np.array([-1, 2, 0]) / np.sqrt(5), np.zeros(3)], atol=1e-7)
    assert not components_of(np.ones((4, 3))).shares_c.any()
    assert components_of(np.ones((1, 3))).along_nc.shape == (1, 2)


def test_layers_that_are_shown():
    assert layers_shown(8, 6, 4) == [1, 2, 4, 5, 6, 7] and layers_shown(1, 6, 0) == [0]
    assert layers_shown(80, 4, 40) == [1, 40, 53, 79] and layers_shown(3, 1, 2) == [2]


def test_the_scatter_of_a_study(demo_study, tmp_path):
    folder = shutil.copytree(demo_study, tmp_path / "run")
    run = run_mechanism({"parts": ("scatter",), "scatter": {"panels": 3}}, folder)
    found, arrays = json.loads((folder / SCATTER).read_text()), run.read_tensors(SCATTER_POINTS)
    count = sum(found["splits"].values())
    assert arrays["components"].shape == (3, count, 2) and len(found["layers"]) == 3
    row = next(
        row
        for row in found["layers"]
        if row["layer"] == json.loads((folder / "direction_metadata.json").read_text())["layer"]
    )
    assert 0 < row["shares"][1] < row["shares"][0] < 1 and row["direction"] > 0.3
    assert max(abs(area - 0.5) for area in row["areas"]) > 0.4  # harmful and harmless lie apart without being told
    with (folder / FIGURES / "scatter-layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * count and {r["refused"] for r in rows} == {"0", "1"}
