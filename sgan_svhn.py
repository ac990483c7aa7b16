"""Semi-supervised GAN on SVHN: photos of house numbers, 1000 digits of them labeled.

A convolutional classifier learns from the labeled digits, and is at the same time the
discriminator of a GAN on all of them: its K logits give D(x) = Z/(Z+1), Z = sum_k exp l_k(x). The
generator matches the mean features of real digits (Salimans et al. 2016, arXiv:1606.03498,
sections 3.1 and 5).

    python sgan_svhn.py                         # 1000 labels, 100 of each digit
    python sgan_svhn.py --supervised-only       # the baseline: labeled digits alone

The unlabeled images are all training images but those of validation, the labeled ones among them.
What differs from the article that this follows, and what it scores: README.md.
"""

import argparse
import time
from copy import deepcopy
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.io import loadmat
from torch import nn
from torchvision.datasets.utils import download_url
from tqdm import tqdm

from common import (Run, StepMeans, balanced_split, bf16_autocast, die, errors_and_others, evaluate,
                    fake_loss, labeled_loss, not_negative, pick_device, plot_confusion, plot_curves,
                    plot_predictions, positive, real_logit, save_samples, seed_everything,
                    unlabeled_loss)

NUM_CLASSES = 10
NUM_VAL = 1000  # labeled images that only watch the training; the headline figure needs none
LATENT_DIM = 100
LABELED_BATCH = 50  # labeled images in each step; with fewer labels than that, all of them
CONFIDENCE = 0.9  # from which probability on the EMA classifier's own labels are trained on
EMA_DECAY = 0.995


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="initialisation, batches, augmentation")
    run.add_argument("--split-seed", type=int, default=0, help="which images are labeled")
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where")
    run.add_argument("--out-dir", default="runs", help="parent of the run's folder")
    run.add_argument("--dry-run", action="store_true", help="two steps of everything, then stop")
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", default="data",
                      help="holds SVHN/*.mat, or they are fetched there")
    data.add_argument("--num-labeled", type=int, default=1000, help="a multiple of the 10 classes")
    train = parser.add_argument_group("training")
    train.add_argument("--supervised-only", action="store_true",
                       help="the baseline: the same classifier and steps, labeled images alone")
    train.add_argument("--epochs", type=int, default=12, help="passes over the unlabeled images")
    train.add_argument("--batch-size", type=int, default=50, help="unlabeled, and fake, images")
    train.add_argument("--lr", type=float, default=2e-3, help="Adam, classifier and generator")
    train.add_argument("--gan-weight", type=float, default=1.0,
                       help="of the unlabeled and fake terms; 0: the generator is of no effect")
    train.add_argument("--consistency-weight", type=float, default=1.0,
                       help="of agreeing with the EMA classifier on unlabeled images; 0: without")
    args = parser.parse_args()
    positive(num_labeled=args.num_labeled, epochs=args.epochs, lr=args.lr)
    if args.batch_size < 2:
        die("--batch-size must be at least 2: batch norm has no variance of one image")
    not_negative(seed=args.seed, split_seed=args.split_seed, gan_weight=args.gan_weight,
                 consistency_weight=args.consistency_weight)
    return args


# ============================================== data ==============================================


FILES = {  # the official ones, with their MD5; a file that is there already is taken as it is
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}


def load_images(data_dir, filename):
    """One SVHN .mat file, fetched if missing: (N, 3, 32, 32) uint8, (N,) int64 labels 0 to 9."""
    path = Path(data_dir) / "SVHN" / filename
    try:
        if not path.exists():
            download_url(f"http://ufldl.stanford.edu/housenumbers/{filename}", path.parent,
                         filename, FILES[filename])
        data = loadmat(path)
        x = torch.from_numpy(data["X"]).permute(3, 2, 0, 1).contiguous()  # from (32, 32, 3, N)
        y = torch.from_numpy(data["y"].astype("int64")).flatten() % 10  # the file says 10 for 0
    except Exception as error:  # scipy raises many kinds for a damaged file
        die(f"{path} could not be fetched or read ({type(error).__name__}: {error}): put the "
            "official file there, or one of the same layout")
    if x.shape[1:] != (3, 32, 32) or x.dtype != torch.uint8 or len(x) != len(y) or len(x) == 0:
        die(f"{path} must hold X (32, 32, 3, N) uint8 and y (N, 1), but X is {data['X'].shape} "
            f"{data['X'].dtype} and y is {data['y'].shape}")
    return x, y


def augment(x):
    """Shift each image by up to 2 pixels, differentiable; (N, 3, 32, 32) -> the same.

    Nothing else: flipped or turned, a digit may be another, and the crop cuts through neighbours.
    """
    n = len(x)
    theta = torch.eye(2, 3, device=x.device).repeat(n, 1, 1)
    theta[:, :, 2] = torch.randint(-2, 3, (n, 2), device=x.device) / 16  # the side is 2 = 32 pixels
    grid = F.affine_grid(theta, x.shape, align_corners=False)  # (N, 32, 32, 2)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="border", align_corners=False)


# ============================================ networks ============================================


class Generator(nn.Module):
    """z (N, latent_dim) -> images (N, 3, 32, 32) in [0, 1]."""

    def __init__(self):
        super().__init__()

        def up(n_in, n_out):
            return [nn.ConvTranspose2d(n_in, n_out, 4, 2, 1, bias=False), nn.BatchNorm2d(n_out),
                    nn.LeakyReLU(0.2)]

        self.layers = nn.Sequential(
            nn.Linear(LATENT_DIM, 256 * 4 * 4, bias=False), nn.BatchNorm1d(256 * 4 * 4),
            nn.LeakyReLU(0.2), nn.Unflatten(1, (256, 4, 4)),
            *up(256, 128),  # (N, 128, 8, 8)
            *up(128, 64),  # (N, 64, 16, 16)
            nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Sigmoid(),  # (N, 3, 32, 32)
        )

    def forward(self, z):
        return self.layers(z)


class Classifier(nn.Module):
    """Images (N, 3, 32, 32) in [0, 1] -> logits (N, K), features (N, 128)."""

    def __init__(self):
        super().__init__()

        def conv(n_in, n_out, stride):
            return [nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out),
                    nn.LeakyReLU(0.2)]

        self.layers = nn.Sequential(
            *conv(3, 32, 1),  # (N, 32, 32, 32)
            *conv(32, 64, 2),  # (N, 64, 16, 16)
            *conv(64, 64, 1), nn.Dropout2d(0.1),
            *conv(64, 128, 2),  # (N, 128, 8, 8)
            *conv(128, 128, 1), nn.Dropout2d(0.1),
            *conv(128, 128, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),  # (N, 128)
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(128, NUM_CLASSES)

    def forward(self, x):
        std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)  # light differs by the photo
        x = ((x - mean) / (std + 0.02)).contiguous(memory_format=torch.channels_last)
        features = self.layers(x)
        return self.head(self.dropout(features)), features


def update_batch_norm_statistics(classifier, on):
    """Choose whether forward passes in training move the statistics that evaluation will use."""
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1 if on else 0.0


# ============================================ training ============================================


def main():
    args = parse_args()
    device = pick_device(args.device)
    seed_everything(args.seed)
    x_train, y_train = load_images(args.data_dir, "train_32x32.mat")  # (N, 3, 32, 32) uint8, (N,)
    x_test, y_test = load_images(args.data_dir, "test_32x32.mat")
    num_val = min(NUM_VAL, max(0, len(y_train) - args.num_labeled) // 2)
    labeled, val, unlabeled = balanced_split(y_train, args.num_labeled, num_val, NUM_CLASSES,
                                             args.split_seed)
    x_labeled, y_labeled = x_train[labeled].to(device), y_train[labeled].to(device)
    x_val, y_val = x_train[val].to(device), y_train[val].to(device)
    x_unlabeled = x_train[torch.cat([labeled, unlabeled])].to(device)  # no labels from here on
    x_test, y_test = x_test.to(device), y_test.to(device)
    if len(x_unlabeled) < args.batch_size:
        die(f"--batch-size {args.batch_size} is more than the {len(x_unlabeled)} unlabeled images")
    method = "supervised" if args.supervised_only else "sgan"
    print(f"{method} on {device}: {args.num_labeled} labeled images ("
          + ", ".join(f"{n} of {k}" for k, n in enumerate(y_labeled.bincount().tolist()))
          + f"), {len(x_unlabeled)} unlabeled, {len(x_val)} validation, {len(x_test)} test")

    def held_out(x, y):  # batches for evaluation, in order, each image once
        batches = zip((x_batch / 255 for x_batch in x.split(1000)), y.split(1000))
        return islice(batches, 2) if args.dry_run else batches

    classifier = Classifier().to(device).to(memory_format=torch.channels_last)
    classifier_ema = deepcopy(classifier).requires_grad_(False).eval()
    generator = Generator().to(device).to(memory_format=torch.channels_last)
    opt_d = torch.optim.Adam(classifier.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    opt_g = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    fixed_z = torch.randn(100, LATENT_DIM, device=device)
    autocast = bf16_autocast(device)

    run = Run(args.out_dir, f"sgan_svhn__{method}__n{args.num_labeled}__split{args.split_seed}"
              f"__seed{args.seed}", vars(args))
    steps_per_epoch = len(x_unlabeled) // args.batch_size
    if args.dry_run:
        args.epochs, steps_per_epoch = 1, min(2, steps_per_epoch)
    step, best_val, losses, seconds, started = 0, -1.0, StepMeans(), 0.0, time.perf_counter()

    for epoch in range(1, args.epochs + 1):
        order = torch.randperm(len(x_unlabeled), device=device)
        epoch_started = time.perf_counter()
        for i in tqdm(range(steps_per_epoch), f"epoch {epoch}/{args.epochs}", disable=None,
                      leave=False):
            step += 1
            chosen = torch.randperm(args.num_labeled, device=device)[:LABELED_BATCH]
            x_lab, y_lab = augment(x_labeled[chosen] / 255), y_labeled[chosen]  # (n, 3, 32, 32)

            if args.supervised_only:
                with autocast:
                    logits_lab, _ = classifier(x_lab)  # (n, K)
                loss_lab = labeled_loss(logits_lab, y_lab)
                opt_d.zero_grad()
                loss_lab.backward()
                opt_d.step()
                losses.add(step, {"loss/lab": loss_lab})

            else:
                x_unl = x_unlabeled[order[i * args.batch_size:(i + 1) * args.batch_size]] / 255
                z = torch.randn(args.batch_size, LATENT_DIM, device=device)
                with autocast:
                    x_fake = generator(z)
                x_fake = augment(x_fake.float())  # (N, 3, 32, 32), used in both updates

                # ---- the EMA classifier, as teacher, labels the unlabeled digits ----
                with torch.no_grad(), autocast:
                    logits_teacher, _ = classifier_ema(augment(x_unl))  # (N, K)
                p_teacher, y_teacher = logits_teacher.float().softmax(dim=1).max(dim=1)  # (N,)
                sure = p_teacher > CONFIDENCE  # (N,) the others teach nothing yet

                # ---- classifier: labels right, digits real, fakes fake ----
                # Three forward passes, as batch norm would mix the three kinds of images; only
                # unlabeled digits move the running statistics, as only digits are evaluated.
                classifier.requires_grad_(True)
                with autocast:
                    update_batch_norm_statistics(classifier, False)
                    logits_lab, _ = classifier(x_lab)  # (n, K)
                    logits_fake, _ = classifier(x_fake.detach())  # (N, K)
                    update_batch_norm_statistics(classifier, True)
                    logits_unl, feat_unl = classifier(augment(x_unl))  # (N, K), (N, 128)
                    update_batch_norm_statistics(classifier, False)
                r_unl, r_fake = real_logit(logits_unl), real_logit(logits_fake)  # (N,) log Z(x)
                loss_lab = labeled_loss(logits_lab, y_lab)  # -E log p(y | x, real)
                loss_unl = unlabeled_loss(r_unl)  # -E log D(x)
                loss_fake = fake_loss(r_fake)  # -E log(1 - D(G(z)))
                # -E [teacher is sure] log p(teacher's label | x); as FixMatch, Sohn et al. 2020
                loss_con = (F.cross_entropy(logits_unl.float(), y_teacher, reduction="none")
                            * sure).mean()
                # 0.5: as in the code of Salimans et al.
                loss_d = (loss_lab + args.gan_weight * 0.5 * (loss_unl + loss_fake)
                          + args.consistency_weight * loss_con)
                opt_d.zero_grad()
                loss_d.backward()
                opt_d.step()

                # ---- generator: the mean features of digits ----
                classifier.requires_grad_(False)
                with autocast:
                    _, feat_fake = classifier(x_fake)  # (N, 128)
                gap = feat_unl.detach().float().mean(0) - feat_fake.float().mean(0)  # (128,)
                # mean over features of (E f(x) - E f(G(z)))^2, Salimans 2016, section 3.1
                loss_g = gap.square().mean()
                opt_g.zero_grad()
                loss_g.backward()
                opt_g.step()

                losses.add(step, {"loss/lab": loss_lab, "loss/unl": loss_unl,
                                  "loss/fake": loss_fake, "loss/g": loss_g,
                                  "loss/con": loss_con, "monitor/sure": sure.float().mean(),
                                  "monitor/p_real_unl": r_unl.sigmoid().mean(),
                                  "monitor/p_real_fake": r_fake.sigmoid().mean()})

            # ---- EMA of the classifier, batch-norm statistics included; short memory at first ----
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            for ema, now in zip(classifier_ema.state_dict().values(),
                                classifier.state_dict().values()):
                ema.lerp_(now, 1 - decay) if ema.is_floating_point() else ema.copy_(now)

        # ---- once an epoch: means of the losses, validation, samples, checkpoint ----
        means = losses.means()  # waits for the device
        images_seen = steps_per_epoch * (len(x_lab) if args.supervised_only else args.batch_size)
        images_per_s = images_seen / (time.perf_counter() - epoch_started)
        with autocast:
            val = evaluate(classifier, held_out(x_val, y_val), NUM_CLASSES)
            val_ema = evaluate(classifier_ema, held_out(x_val, y_val), NUM_CLASSES)
            if not args.supervised_only:
                save_samples(generator, fixed_z, run.dir / "samples" / f"epoch_{epoch:03d}.png")
        for weights, scored in (("raw", val), ("ema", val_ema)):
            if not scored["accuracy"] <= best_val:  # better, or NaN: no image left to validate by
                best_val = scored["accuracy"]
                model = classifier if weights == "raw" else classifier_ema
                run.save("best.pt", {"classifier": model.state_dict(), "weights": weights,
                                     "epoch": epoch, "val_accuracy": best_val})
        seconds = time.perf_counter() - started
        run.log({"step": step, "epoch": epoch, "seconds": round(seconds, 1), **means,
                 "val_loss": val["loss"], "val_accuracy": val["accuracy"],
                 "val_loss_ema": val_ema["loss"], "val_accuracy_ema": val_ema["accuracy"],
                 "images_per_s": round(images_per_s, 1)})
        plot_curves(run.rows, run.dir / "curves.png")
        print(f"epoch {epoch}: " + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
              + f", val {val['accuracy']:.2%}, EMA {val_ema['accuracy']:.2%}, "
              f"{images_per_s:.0f} images/s, {seconds:.0f} s", flush=True)

    # ============ the end: test images are read here only, for two sets of weights ============
    run.save("final.pt", {"classifier": classifier_ema.state_dict(), "weights": "ema",
                          "epoch": args.epochs, "generator": generator.state_dict()})
    best = torch.load(run.dir / "best.pt", map_location=device, weights_only=True)
    classifier.load_state_dict(best["classifier"])
    with autocast:
        test = evaluate(classifier_ema, held_out(x_test, y_test), NUM_CLASSES)
        test_best = evaluate(classifier, held_out(x_test, y_test), NUM_CLASSES)
    class_names = [str(k) for k in range(NUM_CLASSES)]
    plot_confusion(test["confusion"], class_names, run.dir / "confusion.png")
    predicted = test["predicted"]
    shown = errors_and_others(y_test[:len(predicted)].cpu(), predicted, 60)
    plot_predictions(x_test[shown] / 255, y_test[shown], predicted[shown], class_names,
                     run.dir / "predictions.png", "test errors, and correct ones")
    run.finish(device, script="sgan_svhn", method=method, steps=step, seconds=round(seconds, 1),
               val_accuracy=val_ema["accuracy"], test_accuracy=test["accuracy"],
               test_accuracy_best_val=test_best["accuracy"])


if __name__ == "__main__":
    main()
