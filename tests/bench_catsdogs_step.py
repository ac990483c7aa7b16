"""Images a second of a training step of sgan_catsdogs.py, and of the article's way of doing it.

    python tests/bench_catsdogs_step.py --image-size 64 --batch-size 64
    python tests/bench_catsdogs_step.py --image-size 224 --batch-size 16
    python tests/bench_catsdogs_step.py --image-size 128 --batch-size 16 --count

Both train the same two networks on the same JPEG files with batches of the same sizes, in turn, in
one process; the first round of each warms up. The article's way: photos decoded by a torchvision
DataLoader, float32 in the default memory layout, plain Adam, no augmentation, no EMA, a backward
pass for each of the three losses, fresh fakes for the generator, each loss read back at every step.
Ours has the GAN switched on here, makes as many fakes, and does not ask the EMA classifier. Its
unlabeled photos are turned, and pass together with the labeled ones. It is timed twice: with photos
that are decoded as they are needed, as the article's are, and with photos that were decoded before,
as in every epoch of a folder that fits in memory. The loaders alone, doing the same work, are
compared first.

The third form counts the operations of torch in the second step of the script, instead of timing
it: each is a call that the host makes, and on a GPU at least one kernel, but for views.
"""

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sgan_catsdogs  # noqa: E402
from common import dali_loader, pick_device  # noqa: E402
from tests.bench_mnist_step import matrix_rate, pass_flops  # noqa: E402

PASSES = 5  # over the photos, of the loaders alone
PHOTO_SIDE = 400  # pixels; those of the original archive have about as many


def write_photos(folder, count):
    """Smooth noise with grain, 30 to 40 KB a file like the archive's; half of them a class."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(256, size=(12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((PHOTO_SIDE, PHOTO_SIDE), Image.BICUBIC), np.int16)
        grain = rng.integers(-12, 13, size=(PHOTO_SIDE, PHOTO_SIDE, 1))
        path = folder / ("cat", "dog")[i % 2] / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(path, quality=85)


def image_folder(folder, args, batch_size, passes=1):
    """The photos of a folder by torchvision's loader, as many processes as there are cores."""
    resized = transforms.Compose([transforms.Resize((args.image_size, args.image_size)),
                                  transforms.ToTensor()])
    photos = torch.utils.data.ConcatDataset([datasets.ImageFolder(folder, resized)] * passes)
    return torch.utils.data.DataLoader(photos, batch_size, shuffle=True, drop_last=True,
                                       num_workers=os.cpu_count())


def loading_speed(batches):
    """Images a second, the start of processes or threads included."""
    started, count = time.perf_counter(), 0
    for x, _ in batches:
        count += len(x)
    x.flatten()[0].item()  # waits for the device
    return count / (time.perf_counter() - started)


def ours(root, args, decoded_before, consistency_weight="0", gan_weight="1"):
    """Unlabeled images a second in an epoch of the script itself, without its decoding ahead."""
    sgan_catsdogs.UNLABELED_PER_FAKE = 1
    sgan_catsdogs.CACHE_BYTES = 1 << 40 if decoded_before else 0
    sgan_catsdogs.CACHE_SHARE = 1 if decoded_before else 0
    with tempfile.TemporaryDirectory() as out_dir:
        sys.argv = ["sgan_catsdogs.py", "--epochs", "1", "--out-dir", out_dir, "--image-size",
                    str(args.image_size), "--batch-size", str(args.batch_size),
                    "--consistency-weight", consistency_weight, "--gan-weight", gan_weight]
        for flag, part in (("labeled", "labeled"), ("unlabeled", "train"), ("val", "labeled"),
                           ("test", "labeled")):
            sys.argv += [f"--{flag}-dir", str(root / part)]
        sgan_catsdogs.main()
        [path] = Path(out_dir).glob("*/metrics.csv")
        with open(path, newline="") as f:
            return float(list(csv.DictReader(f))[-1]["images_per_s"])


class Operations(TorchDispatchMode):
    """Counts torch's operations between the first two calls of EpochMeans.add, which end steps."""

    def __init__(self):
        super().__init__()
        self.steps, self.counts = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        frame, callers = sys._getframe(1), set()
        while frame:
            callers.add(frame.f_code.co_name)
            frame = frame.f_back
        name = function.overloadpacket.__name__
        if self.steps == 1 and "add" not in callers:
            kind = ("augmentation" if "augment" in callers else
                    "convolution" if "convolution" in name else
                    "batch norm" if "batch_norm" in name else
                    "activation" if name in ("relu_", "threshold_backward") else
                    "views" if name in VIEWS else "others")
            self.counts[kind] += 1
        return function(*args, **(kwargs or {}))


VIEWS = {"detach", "view", "t", "expand", "select", "slice", "unsqueeze", "squeeze", "as_strided",
         "alias", "split", "unbind", "_unsafe_view", "transpose", "permute"}


def count_operations(root, args):
    """Print how many operations the second step of the script makes, by kind, as it is and with
    the GAN."""
    add = sgan_catsdogs.EpochMeans.add

    def count_step(*arguments):
        add(*arguments)
        operations.steps += 1

    sgan_catsdogs.EpochMeans.add = count_step
    sgan_catsdogs.TEACHER_START = 0  # so that the second step has its labels, too
    for gan_weight in ("0", "1"):
        operations = Operations()
        with operations:
            ours(root, args, False, "1", gan_weight)
        kinds = ", ".join(f"{n} {kind}" for kind, n in operations.counts.most_common())
        print(f"--gan-weight {gan_weight}: {operations.counts.total()} operations a step at "
              f"{args.image_size} px: {kinds}")


def articles(root, args, device):
    """The same of one pass over the photos in the article's way."""
    classifier = sgan_catsdogs.Classifier(2, args.image_size).to(device)
    generator = sgan_catsdogs.Generator(args.image_size).to(device)
    opt_d = torch.optim.Adam(classifier.parameters(), 2e-3, betas=(0.5, 0.999))
    opt_g = torch.optim.Adam(generator.parameters(), 2e-3, betas=(0.5, 0.999))
    x_lab, y_lab = next(iter(image_folder(root / "labeled", args, sgan_catsdogs.LABELED_BATCH)))
    batches = iter(image_folder(root / "train", args, args.batch_size))
    batches = chain([next(batches)], batches)  # its processes are started by now, as DALI's threads
    started, count = time.perf_counter(), 0
    for x_unl, _ in batches:
        x_unl = x_unl.to(device)
        opt_d.zero_grad()
        z = torch.randn(2, len(x_unl), sgan_catsdogs.LATENT_DIM, device=device)
        for loss in (lambda: F.cross_entropy(classifier(x_lab.to(device))[0], y_lab.to(device)),
                     lambda: F.softplus(-classifier(x_unl)[2]).mean(),
                     lambda: F.softplus(classifier(generator(z[0]).detach())[2]).mean()):
            value = loss()
            value.backward()
            value.item()
        opt_d.step()
        opt_g.zero_grad()
        value = F.softplus(-classifier(generator(z[1]))[2]).mean()
        value.backward()
        value.item()
        opt_g.step()
        count += len(x_unl)
    return count / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", action="store_true", help="count operations instead")
    args = parser.parse_args()
    device = pick_device("auto")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photos(root / "train", args.steps * args.batch_size)
        write_photos(root / "labeled", sgan_catsdogs.LABELED_BATCH)
        if args.count:
            return count_operations(root, args)
        files = PASSES * sorted((root / "train").rglob("*.jpg"))
        np.random.default_rng(0).shuffle(files)
        speeds = {"DALI": [], "DataLoader": [], "ours": [], "ours, decoded before": [],
                  "the article's way": []}
        for _ in range(args.rounds + 1):
            speeds["DALI"].append(loading_speed(
                dali_loader(files, None, args.batch_size, args.image_size, device)))
            speeds["DataLoader"].append(loading_speed((x.to(device), y) for x, y in image_folder(
                root / "train", args, args.batch_size, PASSES)))
            speeds["ours"].append(ours(root, args, False))
            speeds["ours, decoded before"].append(ours(root, args, True))
            speeds["the article's way"].append(articles(root, args, device))

    print(f"\nimages a second, median of {args.rounds} rounds of {args.steps} steps of "
          f"{args.batch_size} photos, {args.image_size} px, {torch.get_num_threads()} threads, "
          f"{device}:")
    for mine, theirs in (("DALI", "DataLoader"), ("ours", "the article's way"),
                         ("ours, decoded before", "the article's way")):
        ratios = [a / b for a, b in zip(speeds[mine][1:], speeds[theirs][1:])]
        print(f"{mine} {statistics.median(speeds[mine][1:]):.1f}, {theirs} "
              f"{statistics.median(speeds[theirs][1:]):.1f}: {statistics.median(ratios):.2f}x "
              f"({min(ratios):.2f} to {max(ratios):.2f})")
    d = pass_flops(sgan_catsdogs.Classifier(2, args.image_size),
                   torch.rand(1, 3, args.image_size, args.image_size))
    g = pass_flops(sgan_catsdogs.Generator(args.image_size), torch.rand(1, 100))
    # forward and both gradients are 3 forward passes: of labeled, unlabeled and fake photos; the
    # generator's update needs none of the weight gradients, 2
    step = d * (3 * sgan_catsdogs.LABELED_BATCH + 8 * args.batch_size) + g * 3 * args.batch_size
    rate, fastest = matrix_rate(device), statistics.median(speeds["ours, decoded before"][1:])
    print(f"ceiling {args.batch_size * rate / step:.1f} ({step / 1e9:.0f} GFLOP a step at "
          f"{rate / 1e9:.0f} GFLOP/s): ours, decoded before, reaches "
          f"{fastest * step / rate / args.batch_size:.0%} of it")


if __name__ == "__main__":
    main()
