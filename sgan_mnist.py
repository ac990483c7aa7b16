"""Semi-supervised GAN on MNIST: 60,000 digits, 100 of them labeled.

A small convolutional classifier learns from the labeled digits, and is at the same time the
discriminator of a GAN on all of them: its K logits give D(x) = Z/(Z+1), Z = sum_k exp l_k(x). The
generator matches the mean features of real digits (Salimans et al. 2016, arXiv:1606.03498,
sections 3.1 and 5). Two flags choose other forms of both.

It begins with a warm-up on the labeled digits alone. From then on the moving average (EMA) of the
classifier labels the unlabeled digits that it is sure of, and the classifier learns these labels
too, on augmented digits. The average is what is scored.

    python sgan_mnist.py                        # 100 labels, 10 of each digit
    python sgan_mnist.py --supervised-only      # the baseline: labeled digits alone
    python sgan_mnist.py --num-labeled 30000    # half of the labels

The unlabeled images are all training images but those of validation, the labeled ones among them.
What differs from the articles that this follows, and what it scores: .github/RESULTS.md.
"""

import argparse
import time
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.datasets import MNIST
from tqdm import tqdm

from common import (EpochMeans, Run, balanced_split, bf16_autocast, die, evaluate, fake_loss,
                    fool_loss, labeled_loss, number, pick_device, plot_confusion, plot_predictions,
                    real_logit, save_samples, say, unlabeled_loss)

NUM_CLASSES = 10
NUM_VAL = 5000  # labeled images that only watch the training; the headline figure needs none
LATENT_DIM = 100
FAKE_BATCH = 50  # generated images in each step
LABELED_BATCH = 100  # labeled images in each step; with fewer labels than that, all of them
CONFIDENCE = 0.8  # probability from which on a label by the EMA classifier is trained on


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [flags]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=number(int, minimum=0, below=2**63), default=0,
                     help="seed of initialisation, batches and augmentation")
    run.add_argument("--split-seed", type=number(int, minimum=0, below=2**63), default=0,
                     help="seed of the draw of labeled images")
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
                       help="the baseline: the same classifier and steps, labeled images alone")
    train.add_argument("--warmup-steps", type=number(int, minimum=0), default=300,
                       help="steps on labeled images alone, before the first epoch")
    train.add_argument("--epochs", type=number(int, minimum=1), default=4,
                       help="passes over the unlabeled images")
    train.add_argument("--batch-size", type=number(int, minimum=2), default=200,
                       help="unlabeled images per step, at least 2 for batch norm")
    train.add_argument("--lr", type=number(float, above=0), default=3e-3,
                       help="Adam learning rate of both networks; falls to 0 over the second half")
    train.add_argument("--real-logit", choices=["logsumexp", "fake-class", "sigmoid-head"],
                       default="logsumexp", help="form of the real/fake logit, see Classifier")
    train.add_argument("--generator-loss", choices=["feature-matching", "fool", "complement"],
                       default="feature-matching",
                       help="match mean features, pass for real, or match and spread out")
    train.add_argument("--gan-weight", type=number(float, minimum=0), default=0.3,
                       help="weight of the mean of unlabeled and fake loss; 0 switches the GAN off")
    train.add_argument("--consistency-weight", type=number(float, minimum=0), default=1.0,
                       help="weight of the loss on labels by the EMA classifier; 0 switches it off")
    train.add_argument("--augmentation", type=number(float, minimum=0, maximum=1), default=1.0,
                       help="strength of augmentation in training, from 0, none, to 1")
    train.add_argument("--ema-decay", type=number(float, minimum=0, below=1), default=0.99,
                       help="decay of the averaged classifier, which is scored; 0: no average")
    return parser.parse_args()


# ============================================== data ==============================================


def load_images(data_dir, train):
    """MNIST from its IDX files, fetched if missing: (N, 1, 28, 28) uint8, (N,) int64 labels."""
    try:
        data = MNIST(data_dir, train=train, download=True)
    except Exception as error:  # torchvision raises many kinds for a damaged file
        die(f"MNIST could not be read from or fetched to --data-dir {data_dir} "
            f"({type(error).__name__}: {error})")
    x, y = data.data, data.targets
    if x.shape[1:] != (28, 28) or len(x) != len(y) or len(x) == 0:
        die(f"{data.raw_folder} must hold N images of 28 x 28 and N labels, but it holds images "
            f"{tuple(x.shape)} and {len(y)} labels")
    if y.max() >= NUM_CLASSES:
        die(f"{data.raw_folder} holds the label {y.max()}, but those of MNIST are 0 to 9")
    return x[:, None], y


def read_data(args, device):
    """Labeled images (n, 1, 28, 28) uint8 and labels (n,), unlabeled images, and two pairs.

    The pairs (images, labels) are validation and test. The unlabeled images are all training images
    but those of validation. All are on `device`.
    """
    x_train, y_train = load_images(args.data_dir, train=True)  # (N, 1, 28, 28) uint8, (N,)
    x_test, y_test = load_images(args.data_dir, train=False)
    # half of what is left where nearly all are labeled, none where all are
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
    """Redraw each digit a little differently, differentiable; (N, 1, 28, 28) -> the same.

    Strength 1: shifts up to 2 pixels, turns up to 14 degrees, sides from 17% shorter to 25% longer,
    shear up to 17 degrees, a smooth warp (standard deviation 1 pixel at 5 x 5 nodes), strokes
    thicker or thinner in 6 images of 10. Strength 0 leaves the images as they are.
    """
    n, device = len(x), x.device
    shift_x, shift_y, turn, shear, side_x, side_y = (torch.rand(6, n, device=device) * 2 - 1
                                                     ) * strength
    turn, side_x, side_y = 0.25 * turn, 1 + 0.2 * side_x, 1 + 0.2 * side_y
    lean = turn + 0.3 * shear
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


class Generator(nn.Module):
    """z (N, latent_dim) -> images (N, 1, 28, 28) in [0, 1].

    As wide as that of Salimans et al., whose MNIST networks are not convolutional either: matching
    mean features needs no more, and transposed convolutions took 16 times as long on a CPU.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(LATENT_DIM, 500, bias=False), nn.BatchNorm1d(500), nn.ReLU(),
            nn.Linear(500, 500, bias=False), nn.BatchNorm1d(500), nn.ReLU(),
            nn.Linear(500, 28 * 28), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28)),
        )

    def forward(self, z):
        return self.layers(z)


class Classifier(nn.Module):
    """Images (N, 1, 28, 28) in [0, 1] -> logits (N, K), features (N, 128), real logit r (N,).

    D(x) = sigmoid(r). "logsumexp": r = log Z, as if "fake" were one more logit, fixed at 0
    (Salimans et al. 2016); "fake-class": that logit is learned (Odena 2016, arXiv:1606.01583; the
    labeled loss stays one of K classes); "sigmoid-head": r is a linear unit beside the K logits.
    """

    def __init__(self, real_logit_form):
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
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(128, NUM_CLASSES)
        self.real_logit_form = real_logit_form
        if real_logit_form != "logsumexp":
            self.extra = nn.Linear(128, 1)

    def forward(self, x):
        x = ((x - 0.13) / 0.31).contiguous(memory_format=torch.channels_last)
        features = self.layers(x)
        h = self.dropout(features)
        logits = self.head(h)
        if self.real_logit_form == "logsumexp":
            r = real_logit(logits)  # log sum_k exp l_k(x)
        elif self.real_logit_form == "fake-class":
            r = real_logit(logits) - self.extra(h)[:, 0].float()  # log Z - l_{K+1}
        else:
            r = self.extra(h)[:, 0].float()
        return logits, features, r


@contextmanager
def frozen_statistics(classifier):
    """Within it, forward passes do not change the running batch-norm statistics."""
    norms = [module for module in classifier.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm in norms:
        norm.momentum = 0.1


# ============================================ training ============================================


def main():
    args = parse_args()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    x_labeled, y_labeled, x_unlabeled, val, test = read_data(args, device)
    method = "supervised" if args.supervised_only else "sgan"

    def held_out(part):  # batches for evaluation, in order, each image once
        batches = ((x / 255, y) for x, y in zip(part[0].split(1000), part[1].split(1000)))
        return islice(batches, 2 if args.dry_run else None)

    classifier = Classifier(args.real_logit).to(device).to(memory_format=torch.channels_last)
    classifier_ema = deepcopy(classifier).requires_grad_(False).eval()
    generator = Generator().to(device)
    opt_d = torch.optim.Adam(classifier.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    opt_g = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    fixed_z = torch.randn(100, LATENT_DIM, device=device)
    autocast = bf16_autocast(device)

    # ---- the run's folder, and the number of steps ----
    run = Run(args.out_dir, f"sgan_mnist__{method}__n{args.num_labeled}__split{args.split_seed}"
              f"__seed{args.seed}", vars(args))
    steps_per_epoch = len(x_unlabeled) // args.batch_size
    if args.dry_run:
        args.epochs, steps_per_epoch = 1, min(2, steps_per_epoch)
        args.warmup_steps = min(2, args.warmup_steps)
    total_steps = args.warmup_steps + args.epochs * steps_per_epoch
    step, best_val = 0, -1.0

    means, started = EpochMeans(), time.perf_counter()
    for epoch in range(0 if args.warmup_steps else 1, args.epochs + 1):  # epoch 0: the warm-up
        order = torch.randperm(len(x_unlabeled), device=device)
        steps = steps_per_epoch if epoch else args.warmup_steps
        labeled_only = args.supervised_only or epoch == 0
        epoch_started = time.perf_counter()
        for i in tqdm(range(steps), f"epoch {epoch}/{args.epochs}", disable=None, leave=False):
            falling = min(1, 2 * (1 - step / total_steps))  # over the second half of the steps
            for opt, lr in ((opt_d, args.lr), (opt_g, args.lr)):
                opt.param_groups[0]["lr"] = lr * falling
            step += 1
            chosen = torch.randperm(len(x_labeled), device=device)[:LABELED_BATCH]
            x_lab = augment(x_labeled[chosen] / 255, args.augmentation)  # (n, 1, 28, 28)
            y_lab = y_labeled[chosen]  # (n,)

            if labeled_only:
                with autocast:
                    logits_lab, _, _ = classifier(x_lab)  # (n, K)
                loss_lab = labeled_loss(logits_lab, y_lab)
                opt_d.zero_grad()
                loss_lab.backward()
                opt_d.step()
                means.add(step, {"loss/lab": loss_lab})

            else:
                x_unl = x_unlabeled[order[i * args.batch_size:(i + 1) * args.batch_size]] / 255
                z = torch.randn(FAKE_BATCH, LATENT_DIM, device=device)
                with autocast:
                    x_fake = generator(z)
                x_fake = augment(x_fake.float(), args.augmentation)  # (M, 1, 28, 28), both updates

                # ---- the EMA classifier, as teacher, labels the digits that it is sure of ----
                with torch.no_grad(), autocast:
                    logits_teacher, _, _ = classifier_ema(x_unl)  # (N, K)
                p_teacher, y_teacher = logits_teacher.float().softmax(dim=1).max(dim=1)  # (N,)
                picked = p_teacher > CONFIDENCE  # (N,) the others teach nothing yet
                x_unl = augment(x_unl, args.augmentation)  # harder than what the teacher saw

                # ---- classifier: labels right, digits real, fakes fake ----
                # Each kind of image has a pass of its own, as batch norm would mix them. Only
                # unlabeled digits update the running statistics: fakes are not evaluated, and the
                # labeled digits are few.
                classifier.requires_grad_(True)
                with autocast:
                    with frozen_statistics(classifier):
                        logits_lab, _, _ = classifier(x_lab)  # (n, K)
                        _, _, r_fake = classifier(x_fake.detach())  # (M,)
                    logits_unl, feat_unl, r_unl = classifier(x_unl)  # (N, K), (N, 128), (N,)
                loss_lab = labeled_loss(logits_lab, y_lab)  # -E log p(y | x, real)
                loss_unl = unlabeled_loss(r_unl)  # -E log D(x)
                loss_fake = fake_loss(r_fake)  # -E log(1 - D(G(z)))
                # -E [x is picked] log p(teacher's label | augmented x), as in FixMatch
                # (Sohn et al. 2020, arXiv:2001.07685, section 2), where there is no EMA in training
                loss_con = (F.cross_entropy(logits_unl.float(), y_teacher, reduction="none")
                            * picked).mean()
                # 0.5: as in the code of Salimans et al., where gan_weight is 1
                loss_d = (loss_lab + args.gan_weight * 0.5 * (loss_unl + loss_fake)
                          + args.consistency_weight * loss_con)
                opt_d.zero_grad()
                loss_d.backward()
                opt_d.step()

                # ---- generator, through the updated classifier; feat_unl is from before ----
                classifier.requires_grad_(False)
                with autocast, frozen_statistics(classifier):
                    _, feat_fake, r_gen = classifier(x_fake)  # (M, 128), (M,)
                feat_fake = feat_fake.float()
                if args.generator_loss == "fool":
                    loss_g = fool_loss(r_gen)  # -E log D(G(z))
                else:  # mean over features of (E f(x) - E f(G(z)))^2, Salimans 2016, section 3.1
                    loss_g = (feat_unl.detach().float().mean(0) - feat_fake.mean(0)).square().mean()
                if args.generator_loss == "complement":  # Dai et al. 2017, without their density
                    unit = F.normalize(feat_fake, dim=1)
                    cosines = (unit @ unit.T).fill_diagonal_(0)  # (M, M)
                    # pull-away, for entropy of G: mean of cos(f_i, f_j)^2 over i != j
                    loss_g = loss_g + cosines.square().sum() / (FAKE_BATCH**2 - FAKE_BATCH)
                opt_g.zero_grad()
                loss_g.backward()
                opt_g.step()

                means.add(step, {"loss/lab": loss_lab, "loss/unl": loss_unl,
                                 "loss/fake": loss_fake, "loss/g": loss_g,
                                 "loss/con": loss_con, "monitor/picked": picked.float().mean(),
                                 "monitor/p_real_unl": r_unl.sigmoid().mean(),
                                 "monitor/p_real_fake": r_fake.sigmoid().mean()})

            # ---- EMA of the classifier, batch-norm statistics included; short memory at first ----
            decay = min(args.ema_decay, (1 + step) / (10 + step))
            for ema, now in zip(classifier_ema.state_dict().values(),
                                classifier.state_dict().values()):
                ema.lerp_(now, 1 - decay) if ema.is_floating_point() else ema.copy_(now)

        # ---- once an epoch: means of the losses, validation, samples, best weights ----
        epoch_means = means.take()  # waits for the device
        images_seen = steps * (len(x_lab) if labeled_only else args.batch_size)
        images_per_s = images_seen / (time.perf_counter() - epoch_started)
        with autocast:
            scores = evaluate(classifier, held_out(val), NUM_CLASSES)
            scores_ema = evaluate(classifier_ema, held_out(val), NUM_CLASSES)
            if not labeled_only:
                save_samples(generator, fixed_z, run.dir / "samples" / f"epoch_{epoch:03d}.png")
        for weights, model, scored in (("raw", classifier, scores),
                                       ("ema", classifier_ema, scores_ema)):
            if not scored["accuracy"] <= best_val:  # better, or NaN: no image left to validate by
                best_val = scored["accuracy"]
                run.save("best.pt", {"classifier": model.state_dict(), "weights": weights,
                                     "epoch": epoch, "val_accuracy": best_val})
        run.log_epoch({"step": step, "epoch": epoch,
                       "seconds": round(time.perf_counter() - started, 1), **epoch_means,
                       "val_loss": scores["loss"], "val_accuracy": scores["accuracy"],
                       "val_loss_ema": scores_ema["loss"],
                       "val_accuracy_ema": scores_ema["accuracy"],
                       "images_per_s": round(images_per_s, 1)})

    # ============ the end: test images are scored here only, by two sets of weights ============
    run.save("final.pt", {"classifier": classifier_ema.state_dict(), "weights": "ema",
                          "epoch": args.epochs, "generator": generator.state_dict()})
    best = torch.load(run.dir / "best.pt", map_location=device, weights_only=True)
    classifier.load_state_dict(best["classifier"])
    with autocast:
        scores = evaluate(classifier_ema, held_out(test), NUM_CLASSES)
        scores_best = evaluate(classifier, held_out(test), NUM_CLASSES)
    run.finish(device, script="sgan_mnist", method=method, steps=step,
               seconds=run.rows[-1]["seconds"], val_accuracy=run.rows[-1]["val_accuracy_ema"],
               test_accuracy=scores["accuracy"], test_accuracy_best_val=scores_best["accuracy"])
    class_names = [str(k) for k in range(NUM_CLASSES)]
    plot_confusion(scores["confusion"], class_names, run.dir / "confusion.png")
    predicted = scores["predicted"]
    plot_predictions(test[1][:len(predicted)].cpu(), predicted, class_names,
                     lambda chosen: test[0][chosen] / 255, run.dir / "predictions.png")


if __name__ == "__main__":
    main()
