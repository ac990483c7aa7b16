"""Semi-supervised GAN on MNIST: 60,000 digits, 100 of them labeled.

Two classifiers train side by side. A multilayer perceptron learns from the labeled digits. It is
also the discriminator of a GAN on all digits: its K = 10 logits give D(x) = Z/(Z+1), with
Z = sum_k exp l_k(x). The generator matches the mean features of real digits (Salimans et al. 2016,
arXiv:1606.03498, sections 3.1 and 5). A convolutional network, the student, learns the labeled
digits, augmented.

In the second half of the epochs the moving averages (EMA) of both are the teacher: the mean of
their logits labels the unlabeled digits. The student learns these labels too, on augmented digits.
The perceptron learns those that the teacher is sure of. The student's average is what is scored,
with --gan-only the perceptron's.

With --good-generator a second generator makes digits of a given class (Triple-GAN, Li et al. 2017,
arXiv:1703.02291). Its adversary, the pair discriminator, judges digit and class together. The
perceptron learns the digits made to order. Together with the first GAN this is UGAN (Li et al.
2019, arXiv:1910.08540).

    python sgan_mnist.py                                   # 100 labels, 10 of each digit
    python sgan_mnist.py --gan-only --epochs 40            # the perceptron and its GAN alone
    python sgan_mnist.py --student-only                    # the student, its own teacher, no GAN
    python sgan_mnist.py --supervised-only                 # the student on labeled digits alone
    python sgan_mnist.py --num-labeled 30000               # half of the labels
    python sgan_mnist.py --good-generator                  # UGAN
    python sgan_mnist.py --good-generator --gan-weight 0   # Triple-GAN

The unlabeled images are all training images but those of validation. The labeled images are among
them. What differs from the articles that this follows, and what it scores: .github/RESULTS.md.
"""

import argparse
import time
from copy import deepcopy
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from tqdm import tqdm

from common import (EpochMeans, Run, balanced_split, bf16_autocast, die, evaluate, fake_loss,
                    labeled_loss, number, pick_device, plot_test, real_logit, run_script,
                    save_samples, say, unlabeled_loss)

SCRIPT = Path(__file__).stem  # begins the name of each run's folder
NUM_CLASSES = 10
NUM_VAL = 5000  # labeled images for validation; the headline accuracy does not use them
LATENT_DIM = 100
LABELED_BATCH = 100  # labeled images in each step; with fewer labels than that, all of them
STUDENT_LABELED = 50  # labeled images in each step of the student
CONFIDENCE = 0.8  # the perceptron learns only those of the teacher's labels that are more probable
# EMA decay is the smaller of (1 + step) / (10 + step) and this cap
PERCEPTRON_EMA, STUDENT_EMA, GOOD_EMA = 0.9999, 0.99, 0.999
GOOD_LR = 1e-3  # Adam learning rate of the good generator and of the pair discriminator
MADE_WEIGHT = 0.1  # weight of the perceptron's loss on digits made to order
PASS_WEIGHT = 0.005  # Triple-GAN: weight of the perceptron's loss to fool the pair discriminator


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [flags]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=number(int, minimum=0, below=2**63), default=0,
                     help="seed of initialisation, batches and augmentation")
    run.add_argument("--split-seed", type=number(int, minimum=0, below=2**63), default=0,
                     help="seed of the draw of labeled and validation images")
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                     help="device to train on; auto takes the GPU if there is one")
    run.add_argument("--out-dir", default="runs", help="folder in which the run's folder is made")
    run.add_argument("--dry-run", action="store_true", help="two steps of everything, then stop")
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", default="data",
                      help="folder that holds MNIST/raw; missing files are fetched")
    data.add_argument("--num-labeled", type=int, default=100,
                      help="number of labeled images, a multiple of the 10 classes")
    train = parser.add_argument_group("training")
    train.add_argument("--supervised-only", action="store_true",
                       help="the baseline: the student alone, on labeled images alone")
    train.add_argument("--gan-only", action="store_true",
                       help="the perceptron and its GAN alone, without the student")
    train.add_argument("--student-only", action="store_true",
                       help="the student alone, its own average its teacher: nothing of the GAN")
    train.add_argument("--epochs", type=number(int, minimum=1), default=16,
                       help="passes over the unlabeled images; as many steps for the baseline")
    train.add_argument("--batch-size", type=number(int, minimum=2), default=100,
                       help="unlabeled images in each step, and as many generated ones")
    train.add_argument("--lr", type=number(float, above=0), default=3e-3,
                       help="Adam learning rate of student, perceptron and its generator")
    train.add_argument("--gan-weight", type=number(float, minimum=0), default=1.0,
                       help="weight of the mean of unlabeled and fake loss; 0 switches the GAN off")
    train.add_argument("--generator-loss", choices=["feature-matching", "complement"],
                       default="feature-matching",
                       help="match mean features, or match and spread out")
    train.add_argument("--good-generator", action="store_true",
                       help="train a generator of digits of a given class beside the GAN's")
    train.add_argument("--augmentation", type=number(float, minimum=0, maximum=1), default=1.0,
                       help="strength of the student's augmentation, from 0, none, to 1")
    return parser.parse_args()


# ============================================== data ==============================================


def load_images(data_dir, train):
    """MNIST from its IDX files, fetched if missing: (N, 1, 28, 28) uint8, (N,) int64 labels."""
    raw, part, tensors = Path(data_dir, "MNIST", "raw"), "train" if train else "t10k", []
    for path, read in ((raw / f"{part}-images-idx3-ubyte", read_image_file),
                       (raw / f"{part}-labels-idx1-ubyte", read_label_file)):
        try:
            if not path.exists():
                MNIST(data_dir, download=True)
            tensors.append(read(path))
        except Exception as error:  # torchvision raises many kinds for a damaged file
            die(f"{path}, below --data-dir, could not be fetched or read ({error!r}): if it is "
                "there, delete it, and the next run fetches it")
    x, y = tensors
    if x.shape[1:] != (28, 28) or len(x) != len(y) or len(x) == 0:
        die(f"{raw} must hold N images of 28 x 28 and N labels, but it holds images "
            f"{tuple(x.shape)} and {len(y)} labels")
    if y.max() >= NUM_CLASSES:
        die(f"{raw} holds the label {y.max()}, but those of MNIST are 0 to 9")
    return x[:, None], y


def read_data(args, device):
    """Labeled images (n, 1, 28, 28) uint8 and labels (n,), unlabeled images, and two pairs.

    The pairs (images, labels) are validation and test. The unlabeled images are all training images
    but those of validation. All are on `device`.
    """
    x_train, y_train = load_images(args.data_dir, train=True)  # (N, 1, 28, 28) uint8, (N,)
    x_test, y_test = load_images(args.data_dir, train=False)
    # at most half of the images that are not labeled
    num_val = min(NUM_VAL, max(0, len(y_train) - args.num_labeled) // 2)
    labeled, val, unlabeled = balanced_split(y_train, args.num_labeled, num_val, NUM_CLASSES,
                                             args.split_seed)
    x_unlabeled = x_train[torch.cat([labeled, unlabeled])].to(device)  # without their labels
    if len(x_unlabeled) < args.batch_size:
        die(f"--batch-size {args.batch_size} is more than the {len(x_unlabeled)} unlabeled images")
    counts = [f"{n} of {k}" for k, n in enumerate(y_train[labeled].bincount().tolist())]
    say(f"{device}: {len(labeled)} labeled images ({', '.join(counts)}), {len(x_unlabeled)} "
        f"unlabeled, {len(val)} validation, {len(x_test)} test")
    return (x_train[labeled].to(device), y_train[labeled].to(device), x_unlabeled,
            (x_train[val].to(device), y_train[val].to(device)),
            (x_test.to(device), y_test.to(device)))


def augment(x, strength):
    """Redraw each digit, on a black background, a little differently; (N, 1, 28, 28) -> the same.

    Strength 0 leaves the images as they are, up to rounding. Strength 1:
        shifts up to 2 pixels, turns up to 14 degrees, shear up to 17 degrees;
        sides from 17% shorter to 25% longer;
        a smooth warp, of standard deviation 1 pixel at 5 x 5 nodes;
        strokes thicker or thinner, in 6 images of 10.
    """
    n, device = len(x), x.device
    uniform = (torch.rand(6, n, device=device) * 2 - 1) * strength  # (6, N)
    shift_x, shift_y, turn, shear, side_x, side_y = uniform
    turn, side_x, side_y = 0.25 * turn, 1 + 0.2 * side_x, 1 + 0.2 * side_y
    lean = turn + 0.3 * shear
    # theta says where a pixel is read: 0.8 makes the side 1/0.8 = 1.25 times as long
    theta = torch.stack([side_x * turn.cos(), -side_y * lean.sin(), shift_x / 7,
                         side_x * turn.sin(), side_y * lean.cos(), shift_y / 7], dim=1)
    grid = F.affine_grid(theta.view(n, 2, 3), x.shape, align_corners=False)  # (N, 28, 28, 2)
    warp = strength / 14 * torch.randn(n, 2, 5, 5, device=device)  # a pixel is 2/28 of the grid
    warp = F.interpolate(warp, size=28, mode="bicubic", align_corners=True)  # (N, 2, 28, 28)
    x = F.grid_sample(x, grid + warp.permute(0, 2, 3, 1), align_corners=False)
    thick, thin = F.max_pool2d(x, 3, 1, 1), -F.max_pool2d(-x, 3, 1, 1)
    kind, amount = torch.rand(2, n, 1, 1, 1, device=device)
    strokes = torch.where(kind < 0.3, thick, torch.where(kind < 0.6, thin, x))
    return x.lerp(strokes, strength * amount)


# ============================================ networks ============================================


def linear(n_in, n_out):
    """A linear layer whose weights are g v / |v|, unit by unit: v ~ N(0, 0.1^2), g = 1, bias 0."""
    layer = weight_norm(nn.Linear(n_in, n_out))
    weight = layer.parametrizations.weight
    nn.init.ones_(weight.original0)  # g (n_out, 1)
    nn.init.normal_(weight.original1, std=0.1)  # v (n_out, n_in)
    nn.init.zeros_(layer.bias)
    return layer


class Generator(nn.Module):
    """z (N, latent_dim) -> images (N, 1, 28, 28) in [0, 1], as in the MNIST code of Salimans et al.

    A good generator gets z and its class, one-hot, side by side. Weight norm of the last layer
    matters: without it the perceptron wins within an epoch.
    """

    def __init__(self, num_inputs=LATENT_DIM):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_inputs, 500, bias=False), nn.BatchNorm1d(500), nn.Softplus(),
            nn.Linear(500, 500, bias=False), nn.BatchNorm1d(500), nn.Softplus(),
            linear(500, 28 * 28), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28)),
        )

    def forward(self, z):
        return self.layers(z)


class Perceptron(nn.Module):
    """Images (N, 1, 28, 28) in [0, 1] -> logits (N, K), features (N, 250), real logit r (N,).

    D(x) = sigmoid(r), r = log Z. It has Gaussian noise and weight norm in place of batch norm, as
    in the code of Salimans et al. So images in a batch do not depend on each other.
    """

    def __init__(self):
        super().__init__()
        self.hidden = nn.ModuleList(linear(n_in, n_out) for n_in, n_out in pairwise(
            [28 * 28, 1000, 500, 250, 250, 250]))
        self.head = linear(250, NUM_CLASSES)

    def noisy(self, x, std):
        return x + std * torch.randn_like(x) if self.training else x

    def forward(self, x):
        h = self.noisy(x.flatten(1), 0.3)  # (N, 784)
        for layer in self.hidden:
            features = F.relu(layer(h))
            h = self.noisy(features, 0.5)
        logits = self.head(h)
        return logits, features, real_logit(logits)  # r = log sum_k exp l_k(x)

    @torch.no_grad()
    def standardise(self, x):
        """Give each unit mean 0 and deviation 1, before its nonlinearity, on x (N, 1, 28, 28).

        The scales g of the hidden units stay fixed from then on (Salimans and Kingma 2016,
        arXiv:1602.07868, section 3, and the code of Salimans et al.).
        """
        h = self.noisy(x.flatten(1), 0.3)
        for layer in [*self.hidden, self.head]:
            std, mean = torch.std_mean(layer(h), dim=0)
            layer.parametrizations.weight.original0 /= std[:, None]
            layer.bias.copy_((layer.bias - mean) / std)
            h = self.noisy(F.relu(layer(h)), 0.5)
        for layer in self.hidden:
            layer.parametrizations.weight.original0.requires_grad_(False)


class Student(nn.Module):
    """Images (N, 1, 28, 28) in [0, 1] -> logits (N, K), features (N, 128)."""

    def __init__(self):
        super().__init__()

        def conv(n_in, n_out, stride):
            return [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out),
                    nn.LeakyReLU(0.1)]

        self.layers = nn.Sequential(
            *conv(1, 32, 2),  # (N, 32, 14, 14)
            *conv(32, 32, 1),
            *conv(32, 64, 2),  # (N, 64, 7, 7)
            *conv(64, 64, 1),
            *conv(64, 128, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),  # (N, 128)
        )
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(128, NUM_CLASSES))

    def forward(self, x):
        features = self.layers((x - 0.13) / 0.31)  # mean and deviation of MNIST's pixels
        return self.head(features), features


# =========================================== the method ===========================================


def floats(network):
    """The tensors that a moving average follows: weights, and batch-norm statistics."""
    return [values for values in network.state_dict().values() if values.is_floating_point()]


def aligned(logits, p_mean):
    """The teacher's p(y | x), all classes about equally often: logits (N, K) -> (N, K).

    Distribution alignment (Berthelot et al. 2020, arXiv:1911.09785, section 3.1). p_mean (K,), the
    running mean over the steps of what the logits predict, is updated.
    """
    p_mean.lerp_(logits.softmax(dim=1).mean(dim=0), 0.01)
    return (logits - p_mean.log()).softmax(dim=1)


class MadeToOrder:
    """A good generator, which makes digits of a given class, and its adversary.

    Logit k of the pair discriminator d says how real the pair of an image and class k is
    (Triple-GAN, Li et al. 2017, arXiv:1703.02291, section 3). The caller trains the perceptron on
    the digits that update() returns.
    """

    def __init__(self, x_init, device):
        self.pair_d = Perceptron().to(device)
        self.good = Generator(LATENT_DIM + NUM_CLASSES).to(device)
        self.pair_d.standardise(x_init)
        self.good_ema = deepcopy(self.good).requires_grad_(False).eval()
        adam = {"lr": GOOD_LR, "betas": (0.5, 0.999), "fused": True}
        self.opt_d = torch.optim.Adam(self.pair_d.parameters(), **adam)
        self.opt_g = torch.optim.Adam(self.good.parameters(), **adam)

    def update(self, z, x_lab, y_lab, x_unl, p_teacher, autocast):
        """Update both networks. z (N, latent_dim), then images, labels and p(y | x) of a step.

        Returns the digits made (N, 1, 28, 28), their classes (N,), d(x_unl) (N, K), the losses.
        """
        def logit_of(y, logits):  # of label y (N,) in each row of logits (N, K) -> (N,)
            return logits.gather(1, y[:, None])[:, 0]

        y_made = torch.arange(len(z), device=z.device) % NUM_CLASSES  # (N,)
        with autocast:
            x_made = self.good(torch.cat([z, F.one_hot(y_made, NUM_CLASSES)], dim=1)).float()
            d, _, _ = self.pair_d(torch.cat([x_lab, x_unl, x_made.detach()]))
        d_lab, d_unl, d_made = d.float().split([len(x_lab), len(x_unl), len(z)])
        y_teacher = p_teacher.argmax(dim=1)  # (N,)
        # Each term is -E log of the probability of the right answer. sigmoid d is p(real).
        loss_pair = (0.1 * F.softplus(-logit_of(y_lab, d_lab)).mean()  # real: labeled digits
                     + 0.9 * F.softplus(-logit_of(y_teacher, d_unl)).mean()  # real: unlabeled ones
                     + 0.5 * F.softplus(logit_of(y_made, d_made)).mean()  # fake: digits made
                     # fake: unlabeled digits with every label, weighted by p(y | x)
                     + 0.5 * (p_teacher * F.softplus(d_unl)).sum(dim=1).mean())
        self.opt_d.zero_grad()
        loss_pair.backward()
        self.opt_d.step()
        with autocast:
            d_made = self.pair_d(x_made)[0].float()  # (N, K)
        loss_good = F.softplus(-logit_of(y_made, d_made)).mean()  # -E log sigmoid d_y(G(z, y))
        self.opt_g.zero_grad()
        loss_good.backward(inputs=list(self.good.parameters()))
        self.opt_g.step()
        losses = {"loss/pair": loss_pair, "loss/good": loss_good}
        return x_made.detach(), y_made, d_unl.detach(), losses


# ============================================ training ============================================


def main():
    args = parse_args()
    if args.supervised_only + args.gan_only + args.student_only > 1:
        die("--supervised-only, --gan-only or --student-only: give one of them")
    with_perceptron = not (args.supervised_only or args.student_only)
    if args.good_generator and not with_perceptron:
        die("--good-generator needs the perceptron: leave out --supervised-only or --student-only")
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    x_labeled, y_labeled, x_unlabeled, val, test = read_data(args, device)
    method = ("supervised" if args.supervised_only else "gan-only" if args.gan_only else
              "student-only" if args.student_only else "sgan")

    def held_out(images, labels):  # batches for evaluation, in order, each image once
        batches = ((x / 255, y) for x, y in zip(images.split(1000), labels.split(1000)))
        return islice(batches, 2 if args.dry_run else None)

    # ---- networks, optimizers, and the average of each classifier ----
    perceptron, generator = Perceptron().to(device), Generator().to(device)
    student = Student().to(device).to(memory_format=torch.channels_last)
    x_init = x_unlabeled[torch.randperm(len(x_unlabeled), device=device)[:500]] / 255
    perceptron.standardise(x_init)
    perceptron_ema = deepcopy(perceptron).requires_grad_(False).eval()
    student_ema = deepcopy(student).requires_grad_(False).eval()
    averages = [(floats(perceptron_ema), floats(perceptron), PERCEPTRON_EMA),
                (floats(student_ema), floats(student), STUDENT_EMA)]
    teachers = [perceptron_ema] * with_perceptron + [student_ema] * (not args.gan_only)
    scored, scored_ema = (perceptron, perceptron_ema) if args.gan_only else (student, student_ema)
    # eps: Salimans et al. divide by sqrt(v + 1e-8), torch by sqrt(v) + eps
    gan_adam = {"lr": args.lr, "betas": (0.5, 0.999), "eps": 1e-4, "fused": True}
    opt_d = torch.optim.Adam(perceptron.parameters(), **gan_adam)
    opt_g = torch.optim.Adam(generator.parameters(), **gan_adam)
    opt_s = torch.optim.Adam(student.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    fixed_z = torch.rand(100, LATENT_DIM, device=device)
    if args.good_generator:  # only then, so that other runs keep their random numbers
        made_to_order = MadeToOrder(x_init, device)
        good_ema = made_to_order.good_ema
        averages.append((floats(good_ema), floats(made_to_order.good), GOOD_EMA))
        of_each_class = torch.arange(100, device=device) * NUM_CLASSES // 100  # (100,) a row each
        fixed_pairs = torch.cat([fixed_z, F.one_hot(of_each_class, NUM_CLASSES)], dim=1)
    autocast = bf16_autocast(device)

    # ---- the run's folder, and the number of steps ----
    run = Run(args.out_dir, f"{SCRIPT}__{method}__n{args.num_labeled}__split{args.split_seed}"
              f"__seed{args.seed}", vars(args))
    epochs, steps_per_epoch = args.epochs, len(x_unlabeled) // args.batch_size
    if args.dry_run:
        epochs, steps_per_epoch = min(2, epochs), min(2, steps_per_epoch)
    n_student = min(STUDENT_LABELED, len(x_labeled))
    step, total_steps, best_val = 0, epochs * steps_per_epoch, -1.0
    # running mean over the steps of p(y | x), as both averages predict it together
    p_mean = torch.full((NUM_CLASSES,), 1 / NUM_CLASSES, device=device)  # (K,)

    means, started = EpochMeans(), time.perf_counter()
    for epoch in range(1, epochs + 1):
        # student and perceptron first learn apart, so that their errors differ
        teach = epoch > epochs // 2 and method in ("sgan", "student-only")
        order = torch.randperm(len(x_unlabeled), device=device).split(args.batch_size)
        other_order = torch.randperm(len(x_unlabeled), device=device).split(args.batch_size)
        epoch_started = time.perf_counter()
        for i in tqdm(range(steps_per_epoch), f"epoch {epoch}/{epochs}", disable=None, leave=False):
            step += 1
            chosen = torch.randperm(len(x_labeled), device=device)[:LABELED_BATCH]
            x_lab, y_lab = x_labeled[chosen] / 255, y_labeled[chosen]  # (n, 1, 28, 28), (n,)
            losses = {}

            if not args.supervised_only:
                x_unl = x_unlabeled[order[i]] / 255  # (N, 1, 28, 28)
                if with_perceptron:
                    x_other = x_unlabeled[other_order[i]] / 255  # (N, 1, 28, 28)
                    z = torch.rand(args.batch_size, LATENT_DIM, device=device)
                    with autocast:
                        x_fake = generator(z).float()  # (N, 1, 28, 28), for both updates

                # ---- the teacher labels the digits, all classes about equally often ----
                # Also in the first half: p_mean must settle, and a good generator needs labels.
                if args.good_generator or not args.gan_only:
                    with torch.no_grad(), autocast:
                        logits_teachers = [teacher(x_unl)[0].float() for teacher in teachers]
                    p_teacher = aligned(sum(logits_teachers) / len(teachers), p_mean)  # (N, K)
                    p_max, y_teacher = p_teacher.max(dim=1)  # (N,)
                    picked = p_max > CONFIDENCE  # (N,) the perceptron learns these only

            if with_perceptron:
                x_made = x_unl[:0]  # none, unless a good generator makes digits to order
                if args.good_generator:
                    x_made, y_made, d_unl, losses = made_to_order.update(
                        z, x_lab, y_lab, x_unl, p_teacher, autocast)

                # ---- perceptron: labels right, digits real, fakes fake ----
                # All images pass in one batch, as there is no batch norm to mix them.
                images = [x_lab, x_unl, x_fake.detach(), x_made]
                sizes = [len(x) for x in images]
                with autocast:
                    logits, _, r = perceptron(torch.cat(images))
                logits_lab, logits_unl, _, logits_made = logits.split(sizes)  # (n, K), (N, K), ...
                _, r_unl, r_fake, _ = r.split(sizes)  # (N,), (N,)
                loss_lab = labeled_loss(logits_lab, y_lab)  # -E log p(y | x, real)
                loss_unl = unlabeled_loss(r_unl)  # -E log D(x)
                loss_fake = fake_loss(r_fake)  # -E log(1 - D(G(z)))
                # Salimans et al. use this factor 0.5, and gan_weight 1
                loss_d = loss_lab + args.gan_weight * 0.5 * (loss_unl + loss_fake)
                if teach:  # -E [x is picked] log p(teacher's label | x)
                    loss_con = (F.cross_entropy(logits_unl.float(), y_teacher, reduction="none")
                                * picked).mean()
                    loss_d = loss_d + loss_con
                    losses |= {"loss/con": loss_con, "monitor/picked": picked.float().mean()}
                if args.good_generator:  # -E log p(y | G(z, y))
                    # 0 until a quarter of the run, then rising to 1 at its half
                    ramp = min(1, max(0, 4 * step / total_steps - 1))
                    loss_d = loss_d + MADE_WEIGHT * ramp * labeled_loss(logits_made, y_made)
                    if not args.gan_weight:  # Triple-GAN: -E sum_y p(y | x) log sigmoid d_y(x)
                        p_unl = logits_unl.float().softmax(dim=1)  # (N, K)
                        loss_pass = (p_unl * F.softplus(-d_unl)).sum(dim=1).mean()
                        loss_d = loss_d + PASS_WEIGHT * loss_pass
                opt_d.zero_grad()
                loss_d.backward()
                opt_d.step()

                # ---- generator, through the updated perceptron, beside other digits ----
                with autocast:
                    _, feat_fake, _ = perceptron(x_fake)  # (N, 250)
                    with torch.no_grad():
                        _, feat_other, _ = perceptron(x_other)  # (N, 250)
                # mean over features of (E f(x) - E f(G(z)))^2, Salimans et al. 2016, section 3.1
                loss_g = (feat_other.float().mean(0) - feat_fake.float().mean(0)).square().mean()
                if args.generator_loss == "complement":  # Dai et al. 2017, without their density
                    unit = F.normalize(feat_fake.float(), dim=1)
                    cosines = (unit @ unit.T).fill_diagonal_(0)  # (N, N)
                    # pull-away, for entropy of G: mean of cos(f_i, f_j)^2 over i != j
                    loss_g = loss_g + cosines.square().sum() / (len(z)**2 - len(z))
                opt_g.zero_grad()
                loss_g.backward(inputs=list(generator.parameters()))
                opt_g.step()
                losses |= {"loss/lab": loss_lab, "loss/unl": loss_unl, "loss/fake": loss_fake,
                           "loss/g": loss_g, "monitor/p_real_unl": r_unl.sigmoid().mean(),
                           "monitor/p_real_fake": r_fake.sigmoid().mean()}

            # ---- student: true labels and the teacher's, on augmented digits ----
            if not args.gan_only:
                lr_factor = min(1, 2 * (1 - (step - 1) / total_steps))  # falls in the second half
                opt_s.param_groups[0]["lr"] = args.lr * lr_factor
                x, y = x_lab[:n_student], y_lab[:n_student]  # (n, 1, 28, 28), (n,)
                if teach:
                    x = torch.cat([x, x_unl])  # (n + N, 1, 28, 28)
                x = augment(x, args.augmentation)
                with autocast:
                    logits, _ = student(x)
                loss_s = labeled_loss(logits[:n_student], y)  # -E log p(y | augmented x)
                if teach:  # -E log p(teacher's label | augmented x)
                    loss_s = loss_s + labeled_loss(logits[n_student:], y_teacher)
                opt_s.zero_grad()
                loss_s.backward()
                opt_s.step()
                losses["loss/student"] = loss_s
            # ---- the averages: their memory is about a ninth of the steps so far, up to a cap ----
            for average, network, cap in averages:
                torch._foreach_lerp_(average, network, 1 - min(cap, (1 + step) / (10 + step)))
            means.add(step, losses)

        # ---- once an epoch: means of the losses, validation, samples, best weights ----
        epoch_means = means.take()  # waits for the device
        images_seen = steps_per_epoch * (n_student if args.supervised_only else args.batch_size)
        images_per_s = images_seen / (time.perf_counter() - epoch_started)
        with autocast:
            scores = evaluate(scored, held_out(*val), NUM_CLASSES)
            scores_ema = evaluate(scored_ema, held_out(*val), NUM_CLASSES)
            if with_perceptron:
                save_samples(generator, fixed_z, run.dir / "samples" / f"epoch_{epoch:03d}.png")
            if args.good_generator:
                save_samples(good_ema, fixed_pairs, run.dir / "samples" / f"good_{epoch:03d}.png")
        best_val = run.save_best(best_val, (scored, scores), (scored_ema, scores_ema), epoch=epoch)
        run.log_epoch({"step": step, "epoch": epoch,
                       "seconds": round(time.perf_counter() - started, 1), **epoch_means,
                       "images_per_s": round(images_per_s, 1)}, scores, scores_ema)

    # ============ the end: test images are scored here only, by two sets of weights ============
    good_weights = {"good_generator": good_ema.state_dict()} if args.good_generator else {}
    run.save("final.pt", {"classifier": scored_ema.state_dict(), "weights": "ema", "epoch": epoch,
                          "generator": generator.state_dict(), **good_weights})
    best = torch.load(run.dir / "best.pt", map_location=device, weights_only=True)
    scored.load_state_dict(best["classifier"])
    with autocast:
        scores = evaluate(scored_ema, held_out(*test), NUM_CLASSES)
        scores_best = evaluate(scored, held_out(*test), NUM_CLASSES)
    run.finish(device, script=SCRIPT, method=method, steps=step,
               seconds=run.rows[-1]["seconds"], val_accuracy=run.rows[-1]["val_accuracy_ema"],
               test_accuracy=scores["accuracy"], test_accuracy_best_val=scores_best["accuracy"])
    class_names = [str(k) for k in range(NUM_CLASSES)]
    plot_test(scores, test[1], class_names, lambda chosen: test[0][chosen] / 255, run.dir)


if __name__ == "__main__":
    run_script(main)
