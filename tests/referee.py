"""Share of digits drawn to order that a referee gives the class asked for.

The referee is a classifier trained with all labels of MNIST:

    python sgan_mnist.py --supervised-only --num-labeled 60000
    python tests/referee.py runs/REFEREE/final.pt runs/RUN/final.pt [runs/RUN/final.pt ...]

Each RUN is one with --good-generator. Of each, 100 digits a class are drawn, by seed 0.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sgan_mnist  # noqa: E402
from common import load_checkpoint, load_state  # noqa: E402

K = sgan_mnist.NUM_CLASSES


@torch.no_grad()
def right_class(generator, referee, per_class=100):
    """Of per_class digits of each class, the share that the referee gives that class: (K,)."""
    torch.manual_seed(0)
    y = torch.arange(K).repeat_interleave(per_class)  # (N,) the classes asked for
    z = torch.rand(len(y), sgan_mnist.LATENT_DIM)
    x = generator(torch.cat([z, F.one_hot(y, K)], dim=1))  # (N, 1, 28, 28)
    return (referee(x)[0].argmax(dim=1) == y).float().view(K, per_class).mean(dim=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("referee", help="final.pt of a classifier trained with all labels")
    parser.add_argument("runs", nargs="+", help="final.pt of runs with --good-generator")
    args = parser.parse_args()
    referee = sgan_mnist.Student().eval()
    checkpoint = load_checkpoint(args.referee, "referee", ["classifier"])
    load_state(referee, checkpoint["classifier"], "referee", args.referee)
    shares = []
    for path in args.runs:
        generator = sgan_mnist.Generator(sgan_mnist.LATENT_DIM + K).eval()
        checkpoint = load_checkpoint(path, "runs", ["good_generator"])
        load_state(generator, checkpoint["good_generator"], "runs", path)
        of_class = right_class(generator, referee)
        shares.append(of_class.mean())
        print(f"{100 * shares[-1]:.1f}%, by class "
              f"{' '.join(f'{100 * share:.0f}' for share in of_class)}: {path}")
    if len(shares) > 1:
        std, mean = torch.std_mean(torch.stack(shares))
        print(f"{100 * mean:.2f} ± {100 * std:.2f}% over {len(shares)} runs")


if __name__ == "__main__":
    main()
