"""Seconds until MNIST's validation accuracy passes the Keras article's figures, ours and its way.

    python tests/bench_time_to_accuracy.py
    python tests/bench_time_to_accuracy.py --curve runs/article

Ours is `python sgan_mnist.py`; flags such as `--split-seed 1` go to it. The article's way is
written here plainly: its networks, batches of 32, Adam 1e-3, a backward pass for each loss, no
augmentation, no average of the weights. It is trained for --max-minutes. Both learn the same 100
labels, one after the other, and are read every 100 steps; reading takes no time that counts.

Two times are compared: until each has 90.67%, the article's test accuracy after 6,000 steps; and
until ours has the best that the article's way had in all of --max-minutes. Ours stops there.

The second form trains the article's way alone, and writes the curve that `tests/sweep.py --curves`
draws.
"""

import argparse
import contextlib
import csv
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sgan_mnist  # noqa: E402
from common import (evaluate, fake_loss, fool_loss, pick_device, real_logit,  # noqa: E402
                    unlabeled_loss)

ARTICLE = 0.9067  # its test accuracy


def generator():
    """z (N, 100) -> images (N, 1, 28, 28) in [-1, 1]."""
    def up(n_in, n_out, stride):
        return [nn.ConvTranspose2d(n_in, n_out, 3, stride, 1, output_padding=stride - 1),
                nn.BatchNorm2d(n_out), nn.LeakyReLU(0.01)]

    return nn.Sequential(
        nn.Linear(100, 7 * 7 * 256), nn.Unflatten(1, (256, 7, 7)),
        *up(256, 128, 2), *up(128, 64, 1),
        nn.ConvTranspose2d(64, 1, 3, 2, 1, output_padding=1), nn.Tanh())


class Classifier(nn.Module):
    """Images (N, 1, 28, 28) in [-1, 1] -> (logits (N, 10),)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1), nn.LeakyReLU(0.01),
            nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.LeakyReLU(0.01),
            nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.LeakyReLU(0.01),
            nn.Dropout(0.5), nn.Flatten(), nn.Linear(128 * 4 * 4, 10))

    def forward(self, x):
        return (self.layers(x),)


def articles(digits, val, device, seed, limit):
    """[(seconds, validation accuracy)] of the article's way, up to limit seconds."""
    torch.manual_seed(seed)
    x_labeled, y_labeled, x_unlabeled = digits
    classifier, g = Classifier().to(device), generator().to(device)
    opt_d = torch.optim.Adam(classifier.parameters(), 1e-3)
    opt_g = torch.optim.Adam(g.parameters(), 1e-3)
    curve, seconds, step = [(0.0, 0.0)], 0.0, 0
    while seconds < limit:
        started = time.perf_counter()
        for _ in range(100):
            step += 1
            lab = torch.randint(len(x_labeled), (32,), device=device)
            unl = torch.randint(len(x_unlabeled), (32,), device=device)
            x_lab, x_unl = x_labeled[lab] / 127.5 - 1, x_unlabeled[unl] / 127.5 - 1
            z = torch.randn(2, 32, 100, device=device)
            for loss in (lambda: F.cross_entropy(classifier(x_lab)[0], y_labeled[lab]),
                         lambda: unlabeled_loss(real_logit(classifier(x_unl)[0])),
                         lambda: fake_loss(real_logit(classifier(g(z[0]).detach())[0]))):
                opt_d.zero_grad()
                value = loss()
                value.backward()
                opt_d.step()
                value.item()
            opt_g.zero_grad()
            value = fool_loss(real_logit(classifier(g(z[1]))[0]))
            value.backward()
            opt_g.step()
            value.item()
        seconds += time.perf_counter() - started
        batches = ((x / 127.5 - 1, y) for x, y in zip(val[0].split(1000), val[1].split(1000)))
        curve.append((seconds, evaluate(classifier, batches, 10)["accuracy"]))
        print(f"the article's way: {100 * curve[-1][1]:.1f}% after {step} steps, {seconds:.0f} s",
              flush=True)
    return curve


class Enough(Exception):
    """Training has reached its goal."""


def ours(flags, val, goal):
    """[(seconds since the start, validation accuracy of the average)] of the script, to the goal.

    Its networks are seen when the script copies them for their averages.
    """
    averages, curve, reading, started = [], [(0.0, 0.0)], [0.0], time.perf_counter()
    add, copy = sgan_mnist.EpochMeans.add, sgan_mnist.deepcopy

    def copy_and_keep(network):
        averages.append(copy(network))
        return averages[-1]

    def add_and_read(means, step, scalars):
        add(means, step, scalars)
        if step % 100 == 0:
            now = time.perf_counter()
            student = next(net for net in averages if isinstance(net, sgan_mnist.Student))
            batches = ((x / 255, y) for x, y in zip(val[0].split(1000), val[1].split(1000)))
            curve.append((now - started - reading[0], evaluate(student, batches, 10)["accuracy"]))
            print(f"ours: {curve[-1][1]:.1%} after {step} steps, {curve[-1][0]:.0f} s", flush=True)
            reading[0] += time.perf_counter() - now
            if curve[-1][1] >= goal:
                raise Enough

    sgan_mnist.EpochMeans.add, sgan_mnist.deepcopy = add_and_read, copy_and_keep
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        sys.argv = ["sgan_mnist.py", "--out-dir", folder, *flags]
        sgan_mnist.main()
    return curve


def seconds_to(goal, curve):
    """When the curve first reaches the goal, or inf."""
    return min((seconds for seconds, accuracy in curve if accuracy >= goal), default=float("inf"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max-minutes", type=float, default=20)
    parser.add_argument("--curve", help="folder for the curve of the article's way alone")
    args, flags = parser.parse_known_args()  # the others are for sgan_mnist.py
    device, limit = pick_device("auto"), 60 * args.max_minutes
    sys.argv = ["sgan_mnist.py", *flags]
    settings = sgan_mnist.parse_args()
    *digits, val, _ = sgan_mnist.read_data(settings, device)
    theirs = articles(digits, val, device, settings.seed, limit)
    if args.curve:
        folder = Path(args.curve) / f"article__split{settings.split_seed}__seed{settings.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metrics.csv", "w", newline="") as f:
            csv.writer(f).writerows([("seconds", "val_accuracy_ema"), *theirs[1:]])
        return
    best = max(accuracy for _, accuracy in theirs)
    mine = ours(flags, val, max(best, ARTICLE))
    print(f"\nvalidation images, {torch.get_num_threads()} threads, {device}:")
    for goal in (ARTICLE, best):
        a, b = seconds_to(goal, mine), seconds_to(goal, theirs)
        print(f"{goal:.2%}: ours {a:.1f} s, the article's way {b:.1f} s: {b / a:.1f}x")
    print(f"the article's way had its best of {theirs[-1][0]:.0f} s; {best:.2%} took ours "
          f"{theirs[-1][0] / seconds_to(best, mine):.1f} times less than all of that")


if __name__ == "__main__":
    main()
