"""Two rings in the plane, four labels each: why a semi-supervised GAN wants a bad generator.

The same small classifier learns from 8 labeled points alone, and as the discriminator
D(x) = Z/(Z+1), Z = exp l_1(x) + exp l_2(x), of three GANs on 2000 points without labels (Salimans
et al. 2016, arXiv:1606.03498, section 5). The generators differ in what they want: to pass for
data ("fool"), to match the mean features of data, or to do that, spread out, and stay away from the
data ("complement", Dai et al. 2017, arXiv:1705.09783, called Bad GAN). Fakes between the rings are
what moves the boundary there.

Two more methods train a good generator G(z, y) of points of a class y. Its discriminator judges
pairs of a point and a label. Triple-GAN (Li et al. 2017, arXiv:1703.02291) has this generator
alone. UGAN (Li et al. 2019, arXiv:1910.08540) has the complement generator beside it.

    python toy_rings.py                            # all six, rings.png and rings.gif
    python toy_rings.py --seed 1 --split-seed 1    # other labels

What it scores over 20 draws of labels: .github/RESULTS.md.
"""

import argparse
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from tqdm import tqdm

from common import (EpochMeans, Run, atomic, balanced_split, evaluate, fake_loss, fool_loss,
                    labeled_loss, number, only_warns, pick_device, real_logit, run_script,
                    save_figure, say, unlabeled_loss)

SCRIPT = Path(__file__).stem  # begins the name of each run's folder
METHODS = ["supervised", "fool", "feature-matching", "complement", "triple-gan", "ugan"]
NUM_POINTS, NUM_TEST = 2000, 2000
LATENT_DIM = 8
BATCH_SIZE = 50  # 40 steps an epoch
LEARNING_RATE = 3e-3
EMA_DECAY = 0.99
LABELED_WEIGHT = 0.03  # small, so that 2000 points form the features before 8 labels do
BANDWIDTH = 0.05  # of the density estimate, about the width of a ring
REACH = 1.6  # the density table covers [-1.6, 1.6] in both coordinates, beyond all data
LOW_DENSITY = 0.1  # quantile of the data's density; generated points shall be in places below it
RIGHT_RING = 0.12  # a point this near to a ring's radius is on it, three times the rings' noise
FRAMES = 25  # of rings.gif
COLORS = ["#d95f02", "#1b6ca8"]  # inner and outer ring; orange and blue, for all eyes


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [flags]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=number(int, minimum=0, below=2**63), default=0,
                        help="seed of initialisation and batches")
    parser.add_argument("--split-seed", type=number(int, minimum=0, below=2**63), default=0,
                        help="seed of the draw of labeled points")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                        help="device to train on; auto takes the GPU if there is one")
    parser.add_argument("--out-dir", default="runs",
                        help="folder in which the run's folder is made")
    parser.add_argument("--dry-run", action="store_true", help="two steps of everything, then stop")
    parser.add_argument("--num-labeled", type=int, default=8,
                        help="number of labeled points, a multiple of the 2 classes")
    parser.add_argument("--supervised-only", action="store_true",
                        help="the baseline: the same classifier on labeled points alone")
    parser.add_argument("--epochs", type=number(int, minimum=1), default=50,
                        help="passes over the points, for each method")
    return parser.parse_args()


# ============================================== data ==============================================


def draw_rings(n, generator):
    """n points of two noisy rings, radius 0.5 and 1 in turn: (n, 2) float, (n,) int64 labels."""
    y = torch.arange(n) % 2
    angle = 2 * torch.pi * torch.rand(n, generator=generator)
    radius = 0.5 * (y + 1) + 0.04 * torch.randn(n, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), y


def log_density_table(data):
    """Kernel density estimate of data (M, 2) on the plane, up to a constant: (321, 321) log p.

    A Gaussian of two coordinates is the product of two Gaussians, so the sum over the data is a
    matrix product. Row: second coordinate, column: first, both from -REACH to REACH.
    """
    axis = torch.linspace(-REACH, REACH, 321, device=data.device)  # 5 cells to a bandwidth
    kernel = torch.exp(-(axis[:, None, None] - data).square() / (2 * BANDWIDTH**2))  # (321, M, 2)
    return (kernel[..., 1] @ kernel[..., 0].T).clamp(min=1e-6).log()  # 1e-6: far from any point


def log_density(points, table):
    """log p, up to a constant, of points (N, 2), bilinear in the table -> (N,)."""
    grid = (points / REACH).view(1, 1, -1, 2)
    return F.grid_sample(table[None, None], grid, padding_mode="border",
                         align_corners=True).view(-1)


# ============================================ networks ============================================


class Classifier(nn.Module):
    """Points (N, 2) -> logits (N, 2), features (N, 64)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                                    nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 2)

    def forward(self, x):
        features = self.layers(x)
        return self.head(features), features


def make_generator(num_inputs=LATENT_DIM):
    """z (N, latent_dim) -> points (N, 2); a good generator gets z and y one-hot, side by side."""
    return nn.Sequential(nn.Linear(num_inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                         nn.Linear(64, 2))


def make_pair_discriminator():
    """Points (N, 2) -> d (N, 2); sigmoid d_y(x) says how real the pair of x and label y is."""
    return nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2),
                         nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 2))


def with_class(z, y):
    """z (N, latent_dim), labels (N,) -> the input of a good generator (N, latent_dim + 2)."""
    return torch.cat([z, F.one_hot(y, 2)], dim=1)


def at(logits, y):
    """The logit of label y (N,) in each row of logits (N, K) -> (N,)."""
    return logits.gather(1, y[:, None])[:, 0]


# ============================================ training ============================================


def train(method, x_lab, y_lab, x_data, args, run):
    """Train one method; returns ({name: network}, snapshots of them for the figures).

    The classifier and the good generator, if there is one, are moving averages (EMA).
    """
    device = x_data.device
    torch.manual_seed(args.seed)  # every method begins with the same classifier
    classifier = Classifier().to(device)
    classifier_ema = deepcopy(classifier).requires_grad_(False)
    generator = make_generator().to(device)
    opt_d = torch.optim.Adam(classifier.parameters(), LEARNING_RATE, betas=(0.5, 0.999), fused=True)
    opt_g = torch.optim.Adam(generator.parameters(), LEARNING_RATE, betas=(0.5, 0.999), fused=True)
    fixed_z = torch.randn(300, LATENT_DIM, device=device)
    table = log_density_table(x_data)
    threshold = log_density(x_data, table).quantile(LOW_DENSITY)
    has_gan = method not in ("supervised", "triple-gan")  # the classifier is a discriminator, too
    has_good = method in ("triple-gan", "ugan")  # a generator makes points of a given class
    networks = {"classifier": classifier_ema, "generator": generator}
    averages = [(classifier_ema, classifier)]
    if has_good:  # only then: more networks would change the random numbers of the others
        pair_d = make_pair_discriminator().to(device)
        good = make_generator(LATENT_DIM + 2).to(device)
        good_ema = deepcopy(good).requires_grad_(False)
        opt_pair_d = torch.optim.Adam(pair_d.parameters(), LEARNING_RATE, (0.5, 0.999), fused=True)
        opt_good = torch.optim.Adam(good.parameters(), LEARNING_RATE, (0.5, 0.999), fused=True)
        networks["good_generator"] = good_ema
        averages.append((good_ema, good))
    if method == "triple-gan":  # the good one is its only generator
        del networks["generator"]
    steps_per_epoch = len(x_data) // BATCH_SIZE
    num_steps = 2 if args.dry_run else args.epochs * steps_per_epoch
    frames = {round(num_steps * (k / (FRAMES - 1)) ** 2) for k in range(FRAMES)}  # more at first
    snapshots, means = [snapshot(0, networks, fixed_z)], EpochMeans()
    started = time.perf_counter()

    for step in tqdm(range(1, num_steps + 1), method, disable=None, leave=False):
        i = (step - 1) % steps_per_epoch
        if i == 0:
            order = torch.randperm(len(x_data), device=device)
        x_unl = x_data[order[i * BATCH_SIZE:(i + 1) * BATCH_SIZE]]  # (N, 2)
        # (N, 2); also where no loss uses it, so that the methods draw the same random numbers
        x_fake = generator(torch.randn(BATCH_SIZE, LATENT_DIM, device=device))
        losses = {}

        # ---- good generator: pairs (x, y) real, pairs (G(z, y), y) fake; Li et al. 2017 ----
        if has_good:
            y_good = torch.arange(BATCH_SIZE, device=device) % 2  # the classes asked for
            z = torch.randn(BATCH_SIZE, LATENT_DIM, device=device)
            x_good = good(with_class(z, y_good))  # (N, 2)
            with torch.no_grad():
                y_unl = classifier_ema(x_unl)[0].argmax(dim=1)  # (N,) labels for the data
                p_unl = classifier(x_unl)[0].softmax(dim=1)  # (N, 2)
            pair_d.requires_grad_(True)
            d_lab, d_unl, d_good = pair_d(x_lab), pair_d(x_unl), pair_d(x_good.detach())
            # binary cross-entropy of each kind of pair; sigmoid d is the probability of "real"
            loss_pair = (0.1 * F.softplus(-at(d_lab, y_lab)).mean()  # real: labeled points
                         + 0.9 * F.softplus(-at(d_unl, y_unl)).mean()  # real: points the EMA labels
                         + 0.5 * F.softplus(at(d_good, y_good)).mean()  # fake: points made to order
                         # fake: points with a label drawn from p(y | x), in expectation
                         + 0.5 * (p_unl * F.softplus(d_unl)).sum(dim=1).mean())
            opt_pair_d.zero_grad()
            loss_pair.backward()
            opt_pair_d.step()
            pair_d.requires_grad_(False)
            # -E log sigmoid d_y(G(z, y))
            loss_good = F.softplus(-at(pair_d(x_good), y_good)).mean()
            opt_good.zero_grad()
            loss_good.backward()
            opt_good.step()
            losses |= {"loss/pair": loss_pair, "loss/good": loss_good}

        # ---- classifier: labels right, data real, fakes fake ----
        classifier.requires_grad_(True)
        logits_lab, _ = classifier(x_lab)  # (n, 2)
        logits_unl, feat_unl = classifier(x_unl)  # (N, 2), (N, 64)
        loss_lab = labeled_loss(logits_lab, y_lab)  # -E log p(y | x, real)
        loss_d = LABELED_WEIGHT * loss_lab
        losses["loss/lab"] = loss_lab
        if has_gan:
            logits_fake, _ = classifier(x_fake.detach())  # (N, 2)
            r_unl, r_fake = real_logit(logits_unl), real_logit(logits_fake)  # (N,) log Z(x)
            loss_unl = unlabeled_loss(r_unl)  # -E log D(x)
            loss_fake = fake_loss(r_fake)  # -E log(1 - D(G(z)))
            loss_d = loss_d + 0.5 * (loss_unl + loss_fake)  # 0.5: the code of Salimans et al.
            losses |= {"loss/unl": loss_unl, "loss/fake": loss_fake,
                       "monitor/p_real_unl": r_unl.sigmoid().mean(),
                       "monitor/p_real_fake": r_fake.sigmoid().mean()}
        if has_good:  # points made to order: weight 0 in the first quarter, whole from the half on
            ramp = min(1, max(0, 4 * step / num_steps - 1))
            loss_made = labeled_loss(classifier(x_good.detach())[0], y_good)
        if method == "ugan":
            loss_d = loss_d + LABELED_WEIGHT * ramp * loss_made
        if method == "triple-gan":  # Li et al. 2017: its own pairs shall pass for real
            loss_pass = (logits_unl.softmax(dim=1) * F.softplus(-pair_d(x_unl))).sum(dim=1).mean()
            loss_d = loss_lab + ramp * loss_made + 0.005 * loss_pass
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()

        # ---- generator, through the updated classifier: its aim is what the GANs differ in ----
        if has_gan:
            classifier.requires_grad_(False)
            logits_fake, feat_fake = classifier(x_fake)  # (N, 2), (N, 64)
            if method == "fool":
                loss_g = fool_loss(real_logit(logits_fake))  # -E log D(G(z))
            else:  # mean over features of (E f(x) - E f(G(z)))^2, Salimans 2016, section 3.1
                loss_g = (feat_unl.detach().mean(dim=0) - feat_fake.mean(dim=0)).square().mean()
            if method in ("complement", "ugan"):  # Dai et al. 2017, section 5
                unit = F.normalize(feat_fake, dim=1)
                cosines = (unit @ unit.T).fill_diagonal_(0)  # (N, N)
                # pull-away, for entropy of G: mean of cos(f_i, f_j)^2 over i != j
                loss_g = loss_g + cosines.square().sum() / (BATCH_SIZE**2 - BATCH_SIZE)
                # low density: E max(log p(G(z)) - threshold, 0)
                loss_g = loss_g + (log_density(x_fake, table) - threshold).relu().mean()
            opt_g.zero_grad()
            loss_g.backward()
            opt_g.step()
            losses["loss/g"] = loss_g

        # ---- EMA of the classifier and the good generator; short memory at first ----
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for average, network in averages:
            for ema, now in zip(average.parameters(), network.parameters()):
                ema.lerp_(now.detach(), 1 - decay)

        means.add(step, losses)
        if step in frames:
            snapshots.append(snapshot(step, networks, fixed_z))
            run.log({"method": method, "step": step, "epoch": -(-step // steps_per_epoch),
                     **means.take(), "seconds": round(time.perf_counter() - started, 2)})
    return networks, snapshots


@torch.no_grad()
def score_good_generator(good, device):
    """Of 1000 points made to order: the share on the ring asked for, and the coverage.

    Coverage is the share of 36 angles on each ring that have such a point.
    """
    y = torch.arange(1000, device=device) % 2
    points = good(with_class(torch.randn(1000, LATENT_DIM, device=device), y))  # (1000, 2)
    right = (points.norm(dim=1) - 0.5 * (y + 1)).abs() < RIGHT_RING  # (1000,)
    angle = ((torch.atan2(points[:, 1], points[:, 0]) / torch.pi + 1) * 18).long().clamp(max=35)
    covered = len((y * 36 + angle)[right].unique()) / 72  # of both rings
    return {"right_ring": right.float().mean().item(), "coverage": covered}


# ============================================ figures =============================================

AXIS = torch.linspace(-1.4, 1.4, 141)
GRID = torch.cartesian_prod(AXIS, AXIS)  # (141 * 141, 2), x varies slowest


@torch.no_grad()
def snapshot(step, networks, fixed_z):
    """What a panel shows: step, p(outer | x) on the grid (141, 141), generated points (300, 2).

    Last comes a colour for each point: of the class asked for if there is a good generator.
    """
    p = networks["classifier"](GRID.to(fixed_z.device))[0].softmax(dim=1)[:, 1]
    if "good_generator" in networks:
        y = torch.arange(len(fixed_z), device=fixed_z.device) % 2
        points = networks["good_generator"](with_class(fixed_z, y))
        colors = [COLORS[k] for k in y]
    else:
        points, colors = networks["generator"](fixed_z), ["black"] * len(fixed_z)
    return step, p.view(len(AXIS), -1).T.cpu(), points.cpu(), colors


def draw_panel(axes, title, x, y, labeled, shown=None, fakes=True):
    """One panel: points in grey, labeled ones in colour, decision regions, generated points."""
    if shown is not None:
        _, p, generated, colors = shown
        axes.contourf(AXIS, AXIS, p, levels=[0, 0.5, 1], colors=COLORS, alpha=0.3)
        axes.contour(AXIS, AXIS, p, levels=[0.5], colors="black", linewidths=1)
    axes.scatter(*x[:1000].T, s=1.5, color="0.45")  # enough to see the rings
    if shown is not None and fakes:
        axes.scatter(*generated.T, s=9, c=colors, marker="x", linewidths=0.8)
    axes.scatter(*x[labeled].T, s=55, c=[COLORS[k] for k in y[labeled]], edgecolors="black")
    axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize=11)


@only_warns
def draw_figures(x, y, labeled, snapshots, accuracy, run):
    """Write rings.png, the end of every method, and rings.gif, the way there."""
    rows, columns = -(-(1 + len(snapshots)) // 4), min(4, 1 + len(snapshots))
    figure = Figure(figsize=(3 * columns, 3.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns).flatten()
    draw_panel(panels[0], f"{len(x)} points, {len(labeled)} labels", x, y, labeled)
    for axes in panels[1 + len(snapshots):]:
        axes.axis("off")
    for axes, (method, shots) in zip(panels[1:], snapshots.items()):
        draw_panel(axes, f"{method}: {100 * accuracy[method]:.1f}%", x, y, labeled, shots[-1],
                   fakes=method != "supervised")
    save_figure(figure, run.dir / "rings.png")

    frames = []
    for shots in zip(*snapshots.values()):  # one time for all methods
        step = shots[0][0]
        rows, columns = -(-len(shots) // 3), min(3, len(shots))
        figure = Figure(figsize=(2.2 * columns, 2.3 * rows + 0.3), dpi=80, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        figure.suptitle(f"step {step}", fontsize=10)
        for axes, method, shot in zip(panels, snapshots, shots):
            draw_panel(axes, method, x, y, labeled, shot, fakes=method != "supervised")
        path = run.dir / "samples" / f"step_{step:05d}.png"
        with atomic(path) as tmp:
            figure.savefig(tmp, format="png")
        frames.append(Image.open(path).convert("RGB"))
    palette = frames[-1].quantize(64)  # one for all frames, so that no colour drifts
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with atomic(run.dir / "rings.gif") as tmp:
        frames[0].save(tmp, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[200] * (len(frames) - 1) + [2500])  # ms


# ============================================== main ==============================================


def main():
    args = parse_args()
    device = pick_device(args.device)
    data = torch.Generator().manual_seed(0)  # the points are the same in every run
    x, y = draw_rings(NUM_POINTS, data)
    x_test, y_test = draw_rings(NUM_TEST, data)
    labeled, _, _ = balanced_split(y, args.num_labeled, 0, 2, args.split_seed)
    x_data, x_lab, y_lab = x.to(device), x[labeled].to(device), y[labeled].to(device)
    methods = METHODS[:1] if args.supervised_only else METHODS
    run = Run(args.out_dir, f"{SCRIPT}__n{args.num_labeled}__split{args.split_seed}"
              f"__seed{args.seed}", vars(args))

    started, accuracy, good_scores, snapshots, weights = time.perf_counter(), {}, {}, {}, {}
    for method in methods:
        networks, snapshots[method] = train(method, x_lab, y_lab, x_data, args, run)
        # test points are scored here only, at the end of each method: they choose nothing
        test = evaluate(networks["classifier"], [(x_test.to(device), y_test.to(device))], 2)
        accuracy[method] = test["accuracy"]
        if "good_generator" in networks:
            good_scores[method] = score_good_generator(networks["good_generator"], device)
        weights[method] = {name: network.state_dict() for name, network in networks.items()}
        say(f"{method}: {accuracy[method]:.2%} of {NUM_TEST} test points")
    seconds = time.perf_counter() - started
    run.save("final.pt", weights)
    run.finish(device, script=SCRIPT, method=" ".join(methods), accuracy=accuracy,
               good_generator=good_scores, steps=snapshots["supervised"][-1][0],
               seconds=round(seconds, 1))
    draw_figures(x, y, labeled, snapshots, accuracy, run)


if __name__ == "__main__":
    run_script(main)
