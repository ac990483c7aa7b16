"""toy_rings.py: a whole small run, the density, the losses of each method, and that UGAN learns."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import (register_optimizer_step_post_hook,
                                   register_optimizer_step_pre_hook)

import common
import toy_rings
from tests.conftest import read_csv, real_gradient

METHODS = ["supervised", "fool", "feature-matching", "complement", "triple-gan", "ugan"]


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
        assert 1.5 * image.height < image.width < 2 * image.height  # seven panels in two rows
    with Image.open(folder / "rings.gif") as image:
        frames = [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(image)]
    assert len(frames) > 5
    assert frames[0] != frames[-1]
    assert {row["method"] for row in run.rows} == set(METHODS)
    assert {row["step"] for row in run.rows if row["method"] == "fool"} >= {"1", "40"}
    assert set(result["good_generator"]) == {"triple-gan", "ugan"}
    for scores in result["good_generator"].values():
        assert set(scores) == {"right_ring", "coverage"}
        assert all(0 <= share <= 1 for share in scores.values())
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
        assert set(first[method]) == {"classifier", *(["good_generator"] if method == "triple-gan"
                                                      else ["generator"]),
                                      *(["good_generator"] if method == "ugan" else [])}
        for net in first[method]:
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


def test_ugan_separates_the_rings_and_draws_each_to_order(tmp_path):
    """Two fixed draws of 8 labels: at least 10 points above the baseline on the average."""
    args = SimpleNamespace(seed=0, epochs=50, dry_run=False)
    x, y = toy_rings.draw_rings(2000, torch.Generator().manual_seed(0))
    accuracy = {"supervised": [], "ugan": []}
    for args.seed in (130, 131):
        labeled, _, _ = common.balanced_split(y, 8, 0, 2, args.seed)
        for method, scores in accuracy.items():
            run = common.Run(tmp_path, "rings", {})
            networks, _ = toy_rings.train(method, x[labeled], y[labeled], x, args, run)
            scores.append(common.evaluate(networks["classifier"], [(x, y)], 2)["accuracy"])
        with torch.no_grad():  # its other generator is the complement one. Of data, 90% are dense
            fakes = networks["generator"](torch.randn(500, toy_rings.LATENT_DIM))
        table = toy_rings.log_density_table(x)
        dense = toy_rings.log_density(x, table).quantile(toy_rings.LOW_DENSITY)
        assert (toy_rings.log_density(fakes, table) > dense).float().mean() < 0.45
        good = toy_rings.score_good_generator(networks["good_generator"], torch.device("cpu"))
        assert good["right_ring"] > 0.95 and good["coverage"] > 0.9
    mean = {method: sum(scores) / 2 for method, scores in accuracy.items()}
    assert mean["ugan"] > 0.97
    assert mean["ugan"] > mean["supervised"] + 0.1


def test_good_generator_is_scored_by_ring_and_angle():
    def good(inputs):  # asked for class 1 it draws the outer ring; for class 0 one point of it
        inner = torch.tensor([0.5, 0.0]).expand(len(inputs), 2)
        angle = torch.arange(len(inputs)) * 2 * torch.pi / len(inputs)
        outer = torch.stack([angle.cos(), angle.sin()], dim=1)
        return torch.where(inputs[:, -1:] == 1, outer, inner)

    scores = toy_rings.score_good_generator(good, torch.device("cpu"))
    assert scores == {"right_ring": 1.0, "coverage": 37 / 72}
    scores = toy_rings.score_good_generator(lambda inputs: 0.7 * good(inputs), torch.device("cpu"))
    assert scores == {"right_ring": 0.0, "coverage": 0.0}


class Watched:
    """A run of two steps: calls of each network, and which weights each update moves.

    The passes are those of the classifier through which a gradient may go back, to `grad`.
    """

    def __init__(self, method, folder):
        self.calls, self.passes, self.networks, self.moved, self.before = [], [], [], [], []
        x, y = toy_rings.draw_rings(2000, torch.Generator().manual_seed(0))
        self.labeled, _, _ = common.balanced_split(y, 8, 0, 2, 0)
        self.x, self.y, run = x, y, common.Run(folder, "rings", {})
        handles = [register_module_forward_hook(self.after_call),
                   register_optimizer_step_pre_hook(self.before_update),
                   register_optimizer_step_post_hook(self.after_update)]
        try:
            toy_rings.train(method, x[self.labeled], y[self.labeled], x,
                            SimpleNamespace(seed=0, epochs=1, dry_run=True), run)
        finally:
            for handle in handles:
                handle.remove()
        self.row = read_csv(run.dir / "metrics.csv")[0]  # of the first step alone

    def kind(self, network):
        if isinstance(network, toy_rings.Classifier):
            return "classifier" if network.head.weight.requires_grad else "fixed classifier"
        return {(2, 2): "pair discriminator", (10, 2): "good", (8, 2): "bad"}.get(
            (network[0].in_features, network[-1].out_features))

    def after_call(self, network, inputs, output):
        if isinstance(network, (toy_rings.Classifier, nn.Sequential)) and not isinstance(
                network[-1] if isinstance(network, nn.Sequential) else None, nn.ReLU):
            if not any(network is known for known in self.networks):
                self.networks.append(network)
            if isinstance(output, tuple):  # (logits, features), of a classifier
                output, features = output
                if output.requires_grad:
                    seen = SimpleNamespace(x=inputs[0].detach(), logits=output.detach().double(),
                                           features=features.detach().double(), grad=None)
                    output.register_hook(lambda grad: setattr(seen, "grad", grad.double()))
                    self.passes.append(seen)
            self.calls.append((self.kind(network), inputs[0].detach().double(),
                               output.detach().double()))

    def before_update(self, optimizer, args, kwargs):
        self.before = [[p.detach().clone() for p in network.parameters()]
                       for network in self.networks]

    def after_update(self, optimizer, args, kwargs):
        own = {id(p) for p in optimizer.param_groups[0]["params"]}
        for network, before in zip(self.networks, self.before):
            moved = [not torch.equal(p, old) for p, old in zip(network.parameters(), before)]
            mine = [id(p) in own for p in network.parameters()]
            assert moved == mine
        self.moved.append(len(own))


@pytest.mark.parametrize("method", ["triple-gan", "ugan"])
def test_pairs_are_judged_by_their_labels_and_each_update_moves_its_own_network(method, tmp_path):
    """The losses of the first step once more, in float64, from what the networks put out."""
    seen = Watched(method, tmp_path)
    # pair discriminator, good generator, classifier, and of UGAN the bad generator
    assert len(seen.moved) == 2 * (4 if method == "ugan" else 3)
    judged = [(x, d) for kind, x, d in seen.calls if kind == "pair discriminator"][:4]
    (x_lab, d_lab), (x_unl, d_unl), (x_good, d_good), (x_again, d_again) = judged
    asked, made = next((inputs[:, -2:], out) for kind, inputs, out in seen.calls
                       if kind == "good" and len(out) == toy_rings.BATCH_SIZE)
    assert torch.equal(x_lab, seen.x[seen.labeled].double())
    assert torch.equal(x_good, made) and torch.equal(x_again, made)
    assert asked.sum(dim=0).tolist() == [25, 25] and asked.unique().tolist() == [0, 1]
    labels = F.one_hot(seen.y[seen.labeled], 2)
    p_unl = next(out for kind, x, out in seen.calls
                 if "classifier" in kind and x.shape == x_unl.shape).softmax(dim=1)

    def minus_log(p, pairs):  # mean over points of -log p of the pairs that count
        return -(pairs * p.log()).sum(dim=1).mean().item()

    real, fake = torch.sigmoid, lambda d: torch.sigmoid(-d)
    pair = (0.1 * minus_log(real(d_lab), labels)
            + 0.9 * minus_log(real(d_unl), F.one_hot(p_unl.argmax(dim=1), 2))
            + 0.5 * minus_log(fake(d_good), asked) + 0.5 * minus_log(fake(d_unl), p_unl))
    assert float(seen.row["loss/pair"]) == pytest.approx(pair, rel=1e-4)
    assert float(seen.row["loss/good"]) == pytest.approx(minus_log(real(d_again), asked), rel=1e-4)


PASSES = {"supervised": ["labeled", "unlabeled"], "triple-gan": ["labeled", "unlabeled", "good"],
          "ugan": ["labeled", "unlabeled", "fake", "good", "generator"]}


@pytest.mark.parametrize("method", METHODS)
def test_classifier_and_generator_minimise_the_losses_of_their_method(method, tmp_path):
    """The first step once more: its ramp is at 1, as the run has only two."""
    seen, n = Watched(method, tmp_path), toy_rings.BATCH_SIZE
    kinds = PASSES.get(method, ["labeled", "unlabeled", "fake", "generator"])
    assert len(seen.passes) == 2 * len(kinds)
    of = dict(zip(kinds, seen.passes))
    expected = {"labeled": (of["labeled"].logits.softmax(dim=1)
                            - F.one_hot(seen.y[seen.labeled], 2)) / 8}
    if method != "triple-gan":
        expected["labeled"] *= toy_rings.LABELED_WEIGHT
    if "fake" in kinds:
        expected["unlabeled"] = 0.5 * real_gradient(of["unlabeled"].logits, 1) / n
        expected["fake"] = 0.5 * real_gradient(of["fake"].logits, 0) / n
    if "good" in kinds:
        asked = next(x[:, -2:] for kind, x, out in seen.calls if kind == "good" and len(out) == n)
        expected["good"] = (of["good"].logits.softmax(dim=1) - asked) / n
        if method == "ugan":
            expected["good"] *= toy_rings.LABELED_WEIGHT
    if method == "triple-gan":  # by the pair discriminator after its update
        d = [out for kind, x, out in seen.calls if kind == "pair discriminator"][4]
        p, cost = of["unlabeled"].logits.softmax(dim=1), (-d).exp().log1p()
        expected["unlabeled"] = 0.005 * p * (cost - (p * cost).sum(dim=1, keepdim=True)) / n
    for kind in kinds:
        if kind in expected:
            torch.testing.assert_close(of[kind].grad, expected[kind], rtol=1e-3, atol=1e-8)
        elif kind != "generator":
            assert of[kind].grad is None
    if "generator" not in kinds:
        assert not seen.row.get("loss/g")
        return
    x_fake = of["generator"].x
    assert torch.equal(x_fake, of["fake"].x)
    z = of["generator"].logits.exp().sum(dim=1)
    gap = of["unlabeled"].features.mean(dim=0) - of["generator"].features.mean(dim=0)
    loss_g = (1 / z).log1p().mean() if method == "fool" else gap.square().mean()
    if method in ("complement", "ugan"):
        unit = of["generator"].features / of["generator"].features.norm(dim=1, keepdim=True)
        loss_g += sum((unit[i] @ unit[j]) ** 2 for i in range(n) for j in range(n) if i != j
                      ) / (n * (n - 1))
        table = toy_rings.log_density_table(seen.x)
        dense = toy_rings.log_density(seen.x, table).quantile(toy_rings.LOW_DENSITY)
        too_dense = toy_rings.log_density(x_fake, table) - dense
        loss_g += too_dense.clamp(min=0).double().mean()
    assert float(seen.row["loss/g"]) == pytest.approx(loss_g.item(), rel=1e-4)
