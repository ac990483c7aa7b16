"""Semi-supervised GAN on a folder of photos: cats and dogs from 100 labels.

A ResNet18 is trained from scratch on a few labeled photos and many unlabeled ones. Its K logits
are also a discriminator, D(x) = Z/(Z+1) with Z = sum_k exp l_k(x), which tells photos from the
images of a DCGAN generator (Salimans et al. 2016, arXiv:1606.03498, section 5). It can also
learn from the labels that its own moving average (EMA) is sure of; that helps on the drawn pets,
and not yet on photos.

    python sgan_catsdogs.py --demo                          # drawn pets, no download: a first run
    python sgan_catsdogs.py --download                      # fetch the photos, draw 50 + 50 labels
    python sgan_catsdogs.py --prepare data/PetImages        # the same from photos you have
    python sgan_catsdogs.py --labeled-dir data/labeled --epochs 40
    python sgan_catsdogs.py --supervised-only               # the baseline: labeled photos alone

What differs from the article that this follows, and what it scores: README.md.
"""

import argparse
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from tqdm import tqdm

from common import (Run, StepMeans, atomic, bf16_autocast, dali_loader, die, errors_and_others,
                    evaluate, fake_loss, fool_loss, labeled_loss, not_negative, pick_device,
                    plot_confusion, plot_curves, plot_predictions, positive, real_logit,
                    save_samples, seed_everything, unlabeled_loss)

LATENT_DIM = 100
LABELED_BATCH = 32  # labeled images in each step; with fewer labels than that, all of them
CONFIDENCE = 0.95  # from which probability on the EMA classifier's own labels are trained on
EMA_DECAY = 0.999


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="initialisation, batches, augmentation")
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where")
    run.add_argument("--out-dir", default="runs", help="parent of the run's folder")
    run.add_argument("--dry-run", action="store_true", help="two steps of everything, then stop")
    data = parser.add_argument_group("data")
    data.add_argument("--labeled-dir", default="data/labeled",
                      help="labeled images: a subfolder per class, or names like cat.12.jpg")
    data.add_argument("--unlabeled-dir", default="data/train", help="images without labels")
    data.add_argument("--val-dir", default="data/val", help="labeled images to watch training by")
    data.add_argument("--test-dir", default="data/test", help="labeled images, read at the end")
    data.add_argument("--image-size", type=int, default=224, help="side in pixels, n x 32")
    train = parser.add_argument_group("training")
    train.add_argument("--supervised-only", action="store_true",
                       help="the baseline: the same classifier, labeled images alone")
    train.add_argument("--epochs", type=int, default=40,
                       help="passes over the unlabeled images; of 100 steps if --supervised-only")
    train.add_argument("--batch-size", type=int, default=64, help="unlabeled, and fake, images")
    train.add_argument("--lr", type=float, default=2e-4, help="Adam, classifier")
    train.add_argument("--lr-generator", type=float, default=1e-3, help="Adam, generator")
    train.add_argument("--gan-weight", type=float, default=1.0,
                       help="of the unlabeled and fake terms; 0: the generator is of no effect")
    train.add_argument("--consistency-weight", type=float, default=0.0,
                       help="of agreeing with the EMA classifier on unlabeled images; --demo: 1")
    source = parser.add_argument_group("making the four folders (does not train)")
    source.add_argument("--prepare", metavar="SOURCE",
                        help="draw the four folders from Kaggle's train/ or Microsoft's PetImages/")
    source.add_argument("--download", action="store_true",
                        help="fetch Microsoft's archive (0.8 GB) to data/ and prepare that")
    source.add_argument("--split-seed", type=int, default=0, help="which images are labeled")
    source.add_argument("--demo", action="store_true",
                        help="draw 2,000 small cartoon pets and train on them for a few minutes")
    args = parser.parse_args()
    if args.demo:  # the main job on other data: these become the defaults, flags still count
        parser.set_defaults(labeled_dir="data/demo/labeled", unlabeled_dir="data/demo/train",
                            val_dir="data/demo/val", test_dir="data/demo/test",
                            image_size=32, epochs=11, consistency_weight=1.0)
        args = parser.parse_args()
    positive(epochs=args.epochs, batch_size=args.batch_size, image_size=args.image_size,
             lr=args.lr, lr_generator=args.lr_generator)
    if args.image_size % 32:
        die(f"--image-size must be a multiple of 32, but it is {args.image_size}")
    if args.batch_size < 2:
        die("--batch-size must be at least 2: batch norm has no variance of one image")
    not_negative(seed=args.seed, split_seed=args.split_seed, gan_weight=args.gan_weight,
                 consistency_weight=args.consistency_weight)
    return args


# ============================================== data ==============================================

DALI_FORMATS = {"JPEG", "PNG", "BMP", "TIFF", "PPM", "JPEG2000", "WEBP"}


def is_image(path, whole=False):
    """Whether DALI can decode the file, by its header, or by decoding the whole of it."""
    try:
        with Image.open(path) as image:
            if whole:
                image.load()
            return image.format in DALI_FORMATS
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return False


def list_images(folder, flag, whole=False):
    """(images, other files) anywhere below the folder, sorted; hidden files are passed over."""
    folder = Path(folder)
    if not folder.is_dir():
        die(f"{flag} {folder} is not a folder: --prepare or --download makes it, or name yours")
    files = sorted(path for path in folder.rglob("*") if path.is_file()
                   and not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not files:
        die(f"{flag} {folder} holds no files")
    with ThreadPoolExecutor() as pool:
        usable = list(pool.map(lambda path: is_image(path, whole), files))
    return [f for f, ok in zip(files, usable) if ok], [f for f, ok in zip(files, usable) if not ok]


def class_of(path, folder):
    """The class of a labeled image: its subfolder, or else the letters that begin its name."""
    relative = path.relative_to(folder)
    if len(relative.parts) > 1:
        return relative.parts[0]
    letters = re.match(r"[^\W\d_]+", path.name)  # cat.12.jpg, dog_7.jpg, cat3.jpg
    if not letters:
        die(f"{path} has no class: put it in a subfolder, or begin its name with the class")
    return letters[0]


def list_labeled(folder, flag, class_names=None):
    """(paths, class index of each, class names); with class_names given, no others may occur."""
    paths, others = list_images(folder, flag, whole=True)
    if others:
        die(f"{others[0]} in {flag} is not an image that can be read: repair or remove it")
    classes = [class_of(path, folder) for path in paths]
    if class_names is None:
        empty = [d.name for d in Path(folder).iterdir() if d.is_dir() and d.name not in classes
                 and not d.name.startswith(".")]
        if empty:
            die(f"class {empty[0]} in {flag} {folder} has no image")
        class_names = sorted(set(classes))
        if len(class_names) < 2:
            die(f"{flag} {folder} holds one class only ({class_names[0]}): at least two are needed")
    unknown = sorted(set(classes) - set(class_names))
    if unknown:
        die(f"class {unknown[0]} in {flag} {folder} has no labeled image: the classes are "
            f"{', '.join(class_names)}")
    return paths, [class_names.index(c) for c in classes], class_names


# ============================================ networks ============================================


class Generator(nn.Module):
    """DCGAN: z (N, latent_dim) -> images (N, 3, S, S) in [0, 1], S = image_size = 32 s.

    Radford et al. 2015 (arXiv:1511.06434); the article's layers, which begin from 7x7 for 224 px.
    """

    def __init__(self, image_size):
        super().__init__()

        def up(n_in, n_out, kernel, stride, padding):
            return [nn.ConvTranspose2d(n_in, n_out, kernel, stride, padding, bias=False),
                    nn.BatchNorm2d(n_out), nn.ReLU()]

        self.layers = nn.Sequential(
            *up(LATENT_DIM, 512, image_size // 32, 1, 0),  # (N, 512, s, s)
            *up(512, 256, 4, 2, 1),  # (N, 256, 2s, 2s)
            *up(256, 128, 4, 2, 1),  # (N, 128, 4s, 4s)
            *up(128, 64, 4, 4, 0),  # (N, 64, 16s, 16s)
            nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Tanh(),  # (N, 3, 32s, 32s)
        )
        for layer in self.layers:
            if isinstance(layer, nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, z):
        return (self.layers(z[:, :, None, None]) + 1) / 2


class Classifier(nn.Module):
    """ResNet18 from scratch: images (N, 3, S, S) in [0, 1] -> logits (N, K), features (N, 512)."""

    def __init__(self, num_classes, image_size):
        super().__init__()
        self.resnet = torchvision.models.resnet18(weights=None)
        self.resnet.fc = nn.Identity()
        if image_size < 128:  # keep detail: 64 px would shrink to 2x2 before the average
            self.resnet.maxpool = nn.Identity()
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(512, num_classes)

    def forward(self, x):
        x = ((x - 0.5) * 4).contiguous(memory_format=torch.channels_last)  # photos: std about 1/4
        features = self.resnet(x)
        return self.head(self.dropout(features)), features


def update_batch_norm_statistics(classifier, on):
    """Choose whether forward passes in training move the statistics that evaluation will use."""
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1 if on else 0.0


def augment(x):
    """Random flip, crop, shift, brightness and contrast of each image; (N, 3, S, S) -> the same.

    Differentiable, so that fakes are changed as photos are and the generator learns through it
    (DiffAugment, Zhao et al. 2020, arXiv:2006.10738).
    """
    n = len(x)
    flip = torch.randint(0, 2, (n,), device=x.device) * 2 - 1
    zoom, shift_x, shift_y, brightness, contrast = torch.rand(5, n, device=x.device) * 2 - 1
    zoom = 0.9 + 0.15 * zoom  # a window of 75% to 105% of the side
    theta = torch.zeros(n, 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 1, 1] = zoom * flip, zoom
    theta[:, 0, 2], theta[:, 1, 2] = 0.125 * shift_x, 0.125 * shift_y
    grid = F.affine_grid(theta, x.shape, align_corners=False)  # (N, S, S, 2)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - mean) * (1 + 0.3 * contrast.view(n, 1, 1, 1)) + mean
    return x + 0.2 * brightness.view(n, 1, 1, 1)


# ============================================ training ============================================


def main():
    args = parse_args()
    if args.download or args.prepare:
        return prepare(args)
    if args.demo:
        draw_demo(args)
    device = pick_device(args.device)
    seed_everything(args.seed)
    lab_files, lab_labels, class_names = list_labeled(args.labeled_dir, "--labeled-dir")
    val_files, val_labels, _ = list_labeled(args.val_dir, "--val-dir", class_names)
    test_files, test_labels, _ = list_labeled(args.test_dir, "--test-dir", class_names)
    unl_files = []
    if not args.supervised_only:
        unl_files, others = list_images(args.unlabeled_dir, "--unlabeled-dir")
        if len(unl_files) < args.batch_size:
            die(f"--unlabeled-dir {args.unlabeled_dir} holds {len(unl_files)} images, fewer than "
                f"one batch: add some, or set --batch-size to {len(unl_files)} or less")
        if others:
            print(f"warning: {len(others)} files that are no images are left out: {others[0]} ...")
    num_classes, num_labeled = len(class_names), len(lab_files)
    method = "supervised" if args.supervised_only else "sgan"
    record = draw_record(args.labeled_dir)
    split_seed = json.loads(record.read_text())["split_seed"] if record.exists() else None
    print(f"{method} on {device}: {num_labeled} labeled images ("
          + ", ".join(f"{lab_labels.count(k)} {name}" for k, name in enumerate(class_names))
          + f"), {len(unl_files)} unlabeled, {len(val_files)} validation, {len(test_files)} test")

    # The few labeled images stay on the device, (n, 3, S, S) uint8; all others come from DALI.
    x_labeled = torch.cat([(x * 255).round().byte() for x, _ in dali_loader(
        lab_files, lab_labels, args.batch_size, args.image_size, device)])
    y_labeled = torch.tensor(lab_labels, device=device)

    def held_out(files, labels):  # batches for evaluation, in order, each image once
        batches = dali_loader(files, labels, args.batch_size, args.image_size, device)
        return islice(batches, 2) if args.dry_run else batches

    classifier = Classifier(num_classes, args.image_size).to(device)
    classifier = classifier.to(memory_format=torch.channels_last)
    classifier_ema = deepcopy(classifier).requires_grad_(False).eval()
    generator = Generator(args.image_size).to(device).to(memory_format=torch.channels_last)
    opt_d = torch.optim.Adam(classifier.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    opt_g = torch.optim.Adam(generator.parameters(), args.lr_generator, betas=(0.5, 0.999),
                             fused=True)
    fixed_z = torch.randn(64, LATENT_DIM, device=device)
    autocast = bf16_autocast(device)

    run = Run(args.out_dir, f"sgan_catsdogs__{method}__n{num_labeled}__px{args.image_size}"
              f"__split{split_seed}__seed{args.seed}".replace("__splitNone", ""), vars(args))
    steps_per_epoch = 100 if args.supervised_only else len(unl_files) // args.batch_size
    if args.dry_run:
        args.epochs, steps_per_epoch = 1, min(2, steps_per_epoch)
    num_steps = args.epochs * steps_per_epoch
    step, best_val, losses, seconds, started = 0, -1.0, StepMeans(), 0.0, time.perf_counter()

    for epoch in range(1, args.epochs + 1):
        photos = dali_loader(unl_files, None, args.batch_size, args.image_size, device,
                             shuffle_seed=[args.seed, epoch], drop_last=True)
        epoch_started = time.perf_counter()
        for _ in tqdm(range(steps_per_epoch), f"epoch {epoch}/{args.epochs}", disable=None,
                      leave=False):
            step += 1
            chosen = torch.randperm(num_labeled, device=device)[:LABELED_BATCH]
            x_lab, y_lab = augment(x_labeled[chosen] / 255), y_labeled[chosen]  # (n, 3, S, S), (n,)

            if args.supervised_only:
                with autocast:
                    logits_lab, _ = classifier(x_lab)  # (n, K)
                loss_lab = labeled_loss(logits_lab, y_lab)
                opt_d.zero_grad()
                loss_lab.backward()
                opt_d.step()
                losses.add(step, {"loss/lab": loss_lab})

            else:
                x_unl, _ = next(photos)  # (N, 3, S, S)
                z = torch.randn(args.batch_size, LATENT_DIM, device=device)
                with autocast:
                    x_fake = generator(z)
                x_fake = augment(x_fake.float())  # (N, 3, S, S), used in both updates

                # ---- the EMA classifier, as teacher, labels the unlabeled photos ----
                with torch.no_grad(), autocast:
                    logits_teacher, _ = classifier_ema(augment(x_unl))  # (N, K)
                p_teacher, y_teacher = logits_teacher.float().softmax(dim=1).max(dim=1)  # (N,)
                sure = p_teacher > CONFIDENCE  # (N,) the others teach nothing yet

                # ---- classifier: labels right, photos real, fakes fake ----
                # Three forward passes, as batch norm would mix the three kinds of images; only
                # unlabeled photos move the running statistics, as only photos are evaluated.
                classifier.requires_grad_(True)
                with autocast:
                    update_batch_norm_statistics(classifier, False)
                    logits_lab, _ = classifier(x_lab)  # (n, K)
                    logits_fake, _ = classifier(x_fake.detach())  # (N, K)
                    update_batch_norm_statistics(classifier, True)
                    logits_unl, feat_unl = classifier(augment(x_unl))  # (N, K), (N, 512)
                    update_batch_norm_statistics(classifier, False)
                r_unl, r_fake = real_logit(logits_unl), real_logit(logits_fake)  # (N,) log Z(x)
                loss_lab = labeled_loss(logits_lab, y_lab)  # -E log p(y | x, real)
                loss_unl = unlabeled_loss(r_unl)  # -E log D(x)
                loss_fake = fake_loss(r_fake)  # -E log(1 - D(G(z)))
                # -E [teacher is sure] log p(teacher's label | x); as FixMatch, Sohn et al. 2020
                loss_con = (F.cross_entropy(logits_unl.float(), y_teacher, reduction="none")
                            * sure).mean()
                ramp = min(1.0, 3 * step / num_steps)  # an early teacher is wrong too often
                # 0.5: as in the code of Salimans et al.
                loss_d = (loss_lab + args.gan_weight * 0.5 * (loss_unl + loss_fake)
                          + args.consistency_weight * ramp * loss_con)
                opt_d.zero_grad()
                loss_d.backward()
                opt_d.step()

                # ---- generator: look real, with the mean features of photos ----
                classifier.requires_grad_(False)
                with autocast:
                    logits_fake, feat_fake = classifier(x_fake)  # (N, K), (N, 512)
                gap = feat_unl.detach().float().mean(0) - feat_fake.float().mean(0)  # (512,)
                # mean over features of (E f(x) - E f(G(z)))^2, Salimans 2016, section 3.1
                loss_fm = gap.square().mean()
                loss_g = fool_loss(real_logit(logits_fake)) + loss_fm  # -E log D(G(z)) + matching
                opt_g.zero_grad()
                loss_g.backward()
                opt_g.step()

                losses.add(step, {"loss/lab": loss_lab, "loss/unl": loss_unl,
                                  "loss/fake": loss_fake, "loss/g": loss_g, "loss/fm": loss_fm,
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
            val = evaluate(classifier, held_out(val_files, val_labels), num_classes)
            val_ema = evaluate(classifier_ema, held_out(val_files, val_labels), num_classes)
            if not args.supervised_only:
                save_samples(generator, fixed_z, run.dir / "samples" / f"epoch_{epoch:03d}.png")
        for weights, scored in (("raw", val), ("ema", val_ema)):
            if scored["accuracy"] > best_val:
                best_val = scored["accuracy"]
                model = classifier if weights == "raw" else classifier_ema
                run.save("best.pt", {"classifier": model.state_dict(), "class_names": class_names,
                                     "image_size": args.image_size, "weights": weights,
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
    run.save("final.pt", {"classifier": classifier_ema.state_dict(), "class_names": class_names,
                          "image_size": args.image_size, "weights": "ema", "epoch": args.epochs,
                          "generator": generator.state_dict()})
    best = torch.load(run.dir / "best.pt", map_location=device, weights_only=True)
    classifier.load_state_dict(best["classifier"])
    with autocast:
        test = evaluate(classifier_ema, held_out(test_files, test_labels), num_classes)
        test_best = evaluate(classifier, held_out(test_files, test_labels), num_classes)
    plot_confusion(test["confusion"], class_names, run.dir / "confusion.png")
    predicted = test["predicted"]
    shown = errors_and_others(torch.tensor(test_labels[:len(predicted)]), predicted, 60)
    x_shown, y_shown = next(dali_loader([test_files[i] for i in shown],
                                        [test_labels[i] for i in shown], 60, args.image_size,
                                        device))
    plot_predictions(x_shown, y_shown, predicted[shown], class_names, run.dir / "predictions.png",
                     "test errors, and correct ones")
    run.finish(device, script="sgan_catsdogs", method=method, num_labeled=num_labeled,
               split_seed=split_seed, steps=step, seconds=round(seconds, 1),
               val_accuracy=val_ema["accuracy"], test_accuracy=test["accuracy"],
               test_accuracy_best_val=test_best["accuracy"])


# ================================== making the four folders =======================================

ARCHIVE = ("https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/"
           "kagglecatsanddogs_5340.zip")


def draw_record(labeled_dir):
    """The file beside the labeled folder that says how --prepare drew it."""
    return Path(f"{labeled_dir}.json")


def prepare(args):
    """Draw labeled, validation, test and unlabeled images from one folder of labeled photos.

    50 labeled images a class, 1000 for validation and 1000 for test in all, class-balanced, the
    rest unlabeled under neutral names. Links where the file system has them, copies otherwise.
    The labeled files are listed beside their folder, in labeled.json. Each folder appears whole.
    """
    source = Path(args.prepare or "data/PetImages")
    targets = [Path(d) for d in (args.labeled_dir, args.val_dir, args.test_dir, args.unlabeled_dir)]
    for target in targets:
        if target.exists():
            die(f"{target} exists already: remove it first, or name other folders by the flags")
    if args.download and not source.is_dir():
        try:
            torchvision.datasets.utils.download_and_extract_archive(ARCHIVE, source.parent)
        except (OSError, RuntimeError) as error:
            die(f"--download could not fetch {ARCHIVE} to {source.parent}: {error}")
    images, others = list_images(source, "--prepare")
    if others:
        print(f"{len(others)} files that are no images are left out: {others[0]} ...")
    by_class = {}
    for path in images:
        by_class.setdefault(class_of(path, source).lower(), []).append(path)
    sizes = [50, 1000 // len(by_class), 1000 // len(by_class)]  # a class
    rng = np.random.default_rng(args.split_seed)
    drawn = {target: [] for target in targets}
    for name, members in sorted(by_class.items()):
        if len(members) <= sum(sizes):
            die(f"class {name} in {source} has {len(members)} images: more than {sum(sizes)} are "
                "needed to draw labeled, validation and test images and leave some unlabeled")
        members = [members[i] for i in rng.permutation(len(members))]
        for target, chosen in zip(targets, np.split(np.array(members), np.cumsum(sizes))):
            drawn[target] += [(name, path) for path in chosen]

    labeled, unlabeled = targets[0], targets[-1]
    rng.shuffle(drawn[unlabeled])
    for target in targets:
        tmp = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        for n, (name, path) in enumerate(drawn[target]):
            copy = tmp / f"{n:05d}{path.suffix}" if target == unlabeled else tmp / name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                copy.symlink_to(path.resolve())
            except OSError:
                shutil.copyfile(path, copy)
        tmp.rename(target)
    files = sorted(str(path.relative_to(source)) for _, path in drawn[labeled])
    with atomic(draw_record(labeled)) as tmp:
        tmp.write_text(json.dumps({"split_seed": args.split_seed, "source": str(source),
                                   "files": files}, indent=1) + "\n")
    print("\n".join(f"{target}: {len(drawn[target])} images" for target in targets))


def draw_demo(args):
    """Draw the cartoon pets of --demo, once."""
    from tests.cartoons import draw_dataset
    if not Path(args.labeled_dir).exists():
        print("drawing 2,000 cartoon cats and dogs ...")
        draw_dataset(Path(args.labeled_dir).parent)


if __name__ == "__main__":
    main()
