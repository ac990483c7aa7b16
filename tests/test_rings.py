"""toy_rings.py: a whole small run, the density, and that the complement generator helps."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageSequence

import common
import toy_rings

METHODS = ["supervised", "fool", "feature-matching", "complement"]


def test_run_leaves_results_pictures_and_weights(rings_runs):
    run = rings_runs["first"]
    result, folder = run.results, run.folder
    assert json.loads((folder / "results.json").read_text()) == result
    assert result["script"] == "toy_rings"
    assert (result["num_labeled"], result["seed"], result["split_seed"]) == (8, 3, 0)
    assert (result["epochs"], result["steps"]) == (1, 40)
    assert list(result["accuracy"]) == METHODS
    assert all(0.3 < accuracy <= 1 for accuracy in result["accuracy"].values())
    with Image.open(folder / "rings.png") as image:
        assert image.width > 4 * image.height  # five panels
    with Image.open(folder / "rings.gif") as image:
        frames = [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(image)]
    assert len(frames) > 5
    assert frames[0] != frames[-1]
    assert {row["method"] for row in run.rows} == set(METHODS)
    assert {row["step"] for row in run.rows if row["method"] == "fool"} >= {"1", "40"}
    classifier = toy_rings.Classifier()
    for method in METHODS:  # the test points once more, drawn and scored here
        classifier.load_state_dict(run.final[method]["classifier"])
        data = torch.Generator().manual_seed(0)
        toy_rings.draw_rings(toy_rings.NUM_POINTS, data)
        x, y = toy_rings.draw_rings(toy_rings.NUM_TEST, data)
        correct = (classifier(x)[0].argmax(dim=1) == y).float().mean().item()
        assert correct == pytest.approx(result["accuracy"][method], abs=1e-6)


def test_no_progress_bar_where_the_output_is_no_terminal(rings_runs):
    assert [rings_runs[key].stderr for key in rings_runs.started] == ["", "", ""]


def test_seed_fixes_the_run_bit_for_bit(rings_runs):
    first, again, other = (rings_runs[key].final for key in ("first", "again", "other"))
    for method in METHODS:
        for net in ("classifier", "generator"):
            for name, value in first[method][net].items():
                assert value.equal(again[method][net][name])
    weights, others = first["supervised"]["classifier"], other["supervised"]["classifier"]
    assert not weights["layers.0.weight"].equal(others["layers.0.weight"])


def test_points_lie_on_two_rings():
    x, y = toy_rings.draw_rings(1000, torch.Generator().manual_seed(1))
    radius = x.norm(dim=1)
    assert y.bincount().tolist() == [500, 500]
    assert radius[y == 0].mean().item() == pytest.approx(0.5, abs=0.01)
    assert radius[y == 1].mean().item() == pytest.approx(1.0, abs=0.01)
    assert radius[y == 0].max() < radius[y == 1].min()


def test_density_is_that_of_a_sum_of_gaussians():
    generator = torch.Generator().manual_seed(2)
    data = torch.rand(200, 2, generator=generator)
    points = torch.rand(50, 2, generator=generator)
    h = toy_rings.BANDWIDTH
    table = toy_rings.log_density_table(data)
    for point, log_p in zip(points, toy_rings.log_density(points, table)):
        squares = [(point - center).double().square().sum() for center in data]
        total = sum(torch.exp(-square / (2 * h**2)) for square in squares)
        assert log_p.item() == pytest.approx(total.log().item(), abs=0.03)  # between cells


def test_complement_generator_separates_the_rings(tmp_path):
    """Two fixed draws of 8 labels: at least 10 points above the baseline on the average."""
    args = SimpleNamespace(seed=0, epochs=50, dry_run=False)
    x, y = toy_rings.draw_rings(2000, torch.Generator().manual_seed(0))
    accuracy = {"supervised": [], "complement": []}
    for args.seed in (130, 131):
        labeled, _, _ = common.balanced_split(y, 8, 0, 2, args.seed)
        for method, scores in accuracy.items():
            run = common.Run(tmp_path, "rings", {})
            classifier, generator, _ = toy_rings.train(method, x[labeled], y[labeled], x, args, run)
            scores.append(common.evaluate(classifier, [(x, y)], 2)["accuracy"])
        with torch.no_grad():  # the last generator is the complement one. Of data, 90% are dense
            fakes = generator(torch.randn(500, toy_rings.LATENT_DIM))
        table = toy_rings.log_density_table(x)
        dense = toy_rings.log_density(x, table).quantile(toy_rings.LOW_DENSITY)
        assert (toy_rings.log_density(fakes, table) > dense).float().mean() < 0.45
    mean = {method: sum(scores) / 2 for method, scores in accuracy.items()}
    assert mean["complement"] > 0.97
    assert mean["complement"] > mean["supervised"] + 0.1
