"""Images a second of a step of sgan_mnist.py's GAN, and of the Keras article's way (Vaidya 2020).

    python tests/bench_mnist_step.py

Both train the same two networks with batches of the same sizes, in turn, in one process. The
article's way: float32, plain Adam, no EMA, a pass forward and backward for each of the three
losses, fresh fakes for the generator, and each loss read back at every step. Ours does more work in
a step: it matches the features of other digits, and averages. The student does not take part. The
ceiling is the speed at which the matrix products of our step would take all its time, at the rate
that this machine reaches in one large product.
"""

import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sgan_mnist  # noqa: E402
from common import bf16_autocast, pick_device  # noqa: E402

BATCH, STEPS, ROUNDS, NUM_LABELED = 100, 60, 5, 100


def ours(script, batch, num_labeled, flags, folder):
    """Unlabeled images a second in an epoch of the script itself."""
    sys.argv = [f"{script.__name__}.py", "--epochs", "1", *flags, "--out-dir", folder,
                "--batch-size", str(batch), "--num-labeled", str(num_labeled)]
    script.main()
    [path] = Path(folder).glob("*/metrics.csv")
    with open(path, newline="") as f:
        return float(list(csv.DictReader(f))[-1]["images_per_s"])


def articles(device):
    """The same of STEPS plain steps, on random images."""
    classifier = sgan_mnist.Perceptron().to(device)
    generator = sgan_mnist.Generator().to(device)
    opt_d = torch.optim.Adam(classifier.parameters(), 3e-3)
    opt_g = torch.optim.Adam(generator.parameters(), 3e-3)
    x_lab = torch.rand(min(NUM_LABELED, sgan_mnist.LABELED_BATCH), 1, 28, 28, device=device)
    y_lab = torch.randint(10, (len(x_lab),), device=device)
    x_all = torch.rand(BATCH * STEPS, 1, 28, 28, device=device)
    started = time.perf_counter()
    for x_unl in x_all.split(BATCH):
        z = torch.rand(2, BATCH, sgan_mnist.LATENT_DIM, device=device)
        opt_d.zero_grad()
        for loss in (lambda: F.cross_entropy(classifier(x_lab)[0], y_lab),
                     lambda: F.softplus(-classifier(x_unl)[2]).mean(),
                     lambda: F.softplus(classifier(generator(z[0]).detach())[2]).mean()):
            value = loss()
            value.backward()
            value.item()
        opt_d.step()
        opt_g.zero_grad()
        classifier.requires_grad_(False)
        with torch.no_grad():
            mean = classifier(x_unl)[1].mean(0)
        value = (mean - classifier(generator(z[1]))[1].mean(0)).square().mean()
        value.backward()
        opt_g.step()
        value.item()
        classifier.requires_grad_(True)
    return BATCH * STEPS / (time.perf_counter() - started)


def pass_flops(network, x):
    """Floating-point operations of one forward pass."""
    with FlopCounterMode(display=False) as counter:
        network.eval()(x)
    return counter.get_total_flops()


def matrix_rate(device):
    """Operations a second of this machine in a large product, in the type the scripts use."""
    with bf16_autocast(device):
        product = torch.rand(1, 1, device=device) @ torch.rand(1, 1, device=device)
    a, b = torch.rand(2, 2048, 2048, device=device).to(product.dtype)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10):
            product = a @ b
        product[0, 0].item()  # waits for the device
        times.append((time.perf_counter() - started) / 10)
    return 2 * 2048**3 / min(times)


def ceiling(script, classifier, fakes, image_shape, batch, num_labeled, device):
    """Unlabeled images a second if only products took time, GFLOP of a step, and GFLOP/s."""
    classifier = pass_flops(classifier, torch.rand(1, *image_shape))
    generator = pass_flops(script.Generator(), torch.rand(1, script.LATENT_DIM))
    lab = min(num_labeled, script.LABELED_BATCH)
    # forward and both gradients are 3 forward passes; the generator's update needs none of the
    # classifier's weight gradients, 2; the pass of the teacher, or of other digits, is 1
    step = classifier * (3 * (lab + fakes + batch) + batch + 2 * fakes) + generator * 3 * fakes
    rate = matrix_rate(device)
    return batch * rate / step, step / 1e9, rate / 1e9


def compare(script, flags, articles, classifier, fakes, image_shape, batch, num_labeled, steps):
    """Run both in turn; print the two speeds, their ratio and the ceiling of ours.

    articles(device) gives the speed of steps steps of the plain way, in unlabeled images a second.
    flags are those of the script; fakes is the number of generated images in a step.
    """
    device = pick_device("auto")
    torch.manual_seed(0)
    y = torch.arange(batch * steps) % 10
    x = torch.randint(256, (len(y), *image_shape)).byte()
    script.NUM_VAL = 0
    script.load_images = lambda *which, **part: (x, y)
    speeds = {"ours": [], "articles": []}
    for _ in range(ROUNDS + 1):
        with tempfile.TemporaryDirectory() as folder:
            speeds["ours"].append(ours(script, batch, num_labeled, flags, folder))
        speeds["articles"].append(articles(device))
    mine, theirs = (statistics.median(values[1:]) for values in speeds.values())  # 1 to warm up
    ratios = [a / b for a, b in list(zip(*speeds.values()))[1:]]
    best, gflop, rate = ceiling(script, classifier, fakes, image_shape, batch, num_labeled, device)
    print(f"\nunlabeled images a second, median of {ROUNDS} rounds of {steps} steps of {batch}, "
          f"{torch.get_num_threads()} threads, {device}:")
    print(f"ours {mine:.0f}, the article's way {theirs:.0f}: {statistics.median(ratios):.2f}x "
          f"({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"ceiling {best:.0f} ({gflop:.1f} GFLOP a step at {rate:.0f} GFLOP/s): "
          f"ours reaches {mine / best:.0%} of it")


if __name__ == "__main__":
    compare(sgan_mnist, ["--gan-only"], articles, sgan_mnist.Perceptron(), BATCH,
            (1, 28, 28), BATCH, NUM_LABELED, STEPS)
