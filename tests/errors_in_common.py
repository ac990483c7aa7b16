"""Digits of MNIST that the classifiers of several runs all get wrong: counts, and a picture.

    python tests/errors_in_common.py errors.png runs/RUN/final.pt runs/OTHER/final.pt [...]

Each RUN is one of sgan_mnist.py, but not with --gan-only. The picture shows up to a hundred test
digits, under the class that the first run gives them and the true one.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sgan_mnist  # noqa: E402
from common import evaluate, load_checkpoint, load_state, plot_images  # noqa: E402

K = sgan_mnist.NUM_CLASSES


def load_student(path):
    """The classifier of a final.pt."""
    student = sgan_mnist.Student()
    load_state(student, load_checkpoint(path, "runs", ["classifier"])["classifier"], "runs", path)
    return student


@torch.no_grad()
def predictions(student, x, y):
    """The class that a classifier gives each of x (N, 1, 28, 28) uint8: (N,)."""
    batches = ((images / 255, labels) for images, labels in zip(x.split(1000), y.split(1000)))
    return evaluate(student, batches, K)["predicted"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("picture", help="file to draw into")
    parser.add_argument("runs", nargs="+", help="final.pt of runs of sgan_mnist.py")
    parser.add_argument("--data-dir", default="data", help="folder that holds MNIST/raw")
    args = parser.parse_args()
    students = [load_student(path) for path in args.runs]
    for part in ("train", "test"):
        x, y = sgan_mnist.load_images(args.data_dir, train=part == "train")
        predicted = torch.stack([predictions(student, x, y) for student in students])  # (runs, N)
        wrong = predicted != y  # (runs, N)
        in_common = wrong.all(dim=0)  # (N,)
        print(f"{part}: {len(y)} digits, errors {' '.join(map(str, wrong.sum(dim=1).tolist()))}, "
              f"in common {in_common.sum()}")
        for name, errors in (*zip(args.runs, wrong), ("in common", in_common)):
            by_class = y[errors].bincount(minlength=K).tolist()
            print(f"    of 0 to 9: {' '.join(map(str, by_class))} ({name})")
    shown = in_common.nonzero().flatten()[:100]  # of the test digits, which came last
    if len(shown):
        captions = [f"{predicted[0, i]}, not {y[i]}" for i in shown]
        plot_images(x[shown] / 255, captions, args.picture,
                    f"{in_common.sum()} test digits that {len(args.runs)} runs get wrong")


if __name__ == "__main__":
    main()
