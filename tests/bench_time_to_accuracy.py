"""Seconds until MNIST's validation accuracy passes the Keras article's 90.67%, ours and its way.

    python tests/bench_time_to_accuracy.py
    python tests/bench_time_to_accuracy.py --curve runs/article

Ours is `python sgan_mnist.py`, which reads its validation accuracy after each epoch; flags such as
`--epochs 8` go to it. The article's way is written here plainly: its networks, batches of 32, Adam
1e-3, a backward pass for each loss, no augmentation, no average of the weights. It is read every
100 steps, and stopped after --max-minutes. Both learn the same 100 labels, one after the other. The
article trained for 6,000 steps; its accuracy is of test images, ours of validation images.

The second form trains the article's way alone, for all of --max-minutes, and writes the curve that
`tests/sweep.py --curves` draws.
"""

import argparse
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


def articles(digits, val, device, seed, limit, goal=ARTICLE):
    """[(seconds, validation accuracy)] of the article's way, up to the goal or limit seconds."""
    torch.manual_seed(seed)
    x_labeled, y_labeled, x_unlabeled = digits
    classifier, g = Classifier().to(device), generator().to(device)
    opt_d = torch.optim.Adam(classifier.parameters(), 1e-3)
    opt_g = torch.optim.Adam(g.parameters(), 1e-3)
    curve, seconds, step = [(0.0, 0.0)], 0.0, 0
    while seconds < limit and curve[-1][1] < goal:
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


def ours(flags):
    """[(seconds, validation accuracy of the averaged weights)] of the script itself."""
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["sgan_mnist.py", "--out-dir", folder, *flags]
        sgan_mnist.main()
        [path] = Path(folder).glob("*/metrics.csv")
        with open(path, newline="") as f:
            return [(float(row["seconds"]), float(row["val_accuracy_ema"]))
                    for row in csv.DictReader(f)]


def summary(curve):
    """When the curve first passes the article's accuracy, and its best."""
    passed = [seconds for seconds, accuracy in curve if accuracy >= ARTICLE]
    best = f"best {max(accuracy for _, accuracy in curve):.2%} after {curve[-1][0]:.0f} s"
    return f"{min(passed):.1f} s; {best}" if passed else f"never; {best}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max-minutes", type=float, default=20)
    parser.add_argument("--curve", help="folder for the curve of the article's way alone")
    args, flags = parser.parse_known_args()  # the others are for sgan_mnist.py
    device, limit = pick_device("auto"), 60 * args.max_minutes
    sys.argv = ["sgan_mnist.py", *flags]
    settings = sgan_mnist.parse_args()
    *digits, val, _ = sgan_mnist.read_data(settings, device)
    if args.curve:
        curve = articles(digits, val, device, settings.seed, limit, goal=1.0)
        folder = Path(args.curve) / f"article__split{settings.split_seed}__seed{settings.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metrics.csv", "w", newline="") as f:
            csv.writer(f).writerows([("seconds", "val_accuracy_ema"), *curve[1:]])
        return
    mine = ours(flags)
    theirs = articles(digits, val, device, settings.seed, limit)
    print(f"\n{ARTICLE:.2%} of validation images, {torch.get_num_threads()} threads, {device}:")
    print(f"ours: {summary(mine)}\nthe article's way: {summary(theirs)}")


if __name__ == "__main__":
    main()
