"""Semi-supervised GAN on a folder of photos: cats and dogs from 100 labels.

A ResNet is trained from scratch on a few labeled photos and many unlabeled ones. Its K logits are
also a discriminator, D(x) = Z/(Z+1) with Z = sum_k exp l_k(x), which tells photos from the images
of a DCGAN generator (Salimans et al. 2016, arXiv:1606.03498, section 5). It also learns the labels
that its own moving average (EMA) gives the photos it is surest of, equally many of each class.

    python sgan_catsdogs.py --demo                          # cartoon pets, no download: a first run
    python sgan_catsdogs.py --download                      # fetch the photos, draw 50 + 50 labels
    python sgan_catsdogs.py --prepare data/PetImages        # the same from photos you have
    python sgan_catsdogs.py --labeled-dir data/labeled --epochs 40
    python sgan_catsdogs.py --supervised-only               # the baseline: labeled photos alone
    python sgan_catsdogs.py --resume runs/RUN               # go on with a run that was ended
    python sgan_catsdogs.py --predict PHOTOS --checkpoint runs/RUN/final.pt
    torchrun --nproc-per-node 4 sgan_catsdogs.py            # the training on four GPUs

What differs from the article that this follows, and what it scores: README.md.
"""

import argparse
import os
import shlex
import sys
import time
from copy import deepcopy
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

from common import (Run, StepMeans, average_gradients, bf16_autocast, cached_loader, check_images,
                    check_labeled, class_of, dali_loader, decode_all, die, draw_folders, drawn_by,
                    errors_and_others, evaluate, fake_loss, fetch_archive, float32_at_least,
                    fool_loss, from_all_processes, in_any_process, labeled_loss, listing,
                    load_checkpoint, load_state, mean_over_processes, names_of, not_negative,
                    pick_device, plot_confusion, plot_curves, plot_predictions, positive,
                    random_state, real_logit, run_to_resume, same_bytes, same_everywhere,
                    save_samples, seed_everything, set_random_state, start_processes, stop_signal,
                    unlabeled_loss, write_predictions)

LATENT_DIM = 100
LABELED_BATCH = 32  # labeled images in each step; with fewer labels than that, all of them
UNLABELED_PER_FAKE = 2
TEACHER_START = 0.2  # share of a run before labels by the EMA classifier are trained on
TEACHER_SHARE = 0.5  # share of the unlabeled images that it labels at the end, before rounding
CACHE_BYTES = 2 << 30  # unlabeled or validation photos that take less, decoded, stay in memory
SAVE_SECONDS = 600  # between two checkpoints within an epoch; one is written after each anyway


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="initialisation, batches, augmentation")
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where")
    run.add_argument("--out-dir", default="runs", help="parent of the run's folder")
    run.add_argument("--dry-run", action="store_true", help="two steps of everything, then stop")
    run.add_argument("--resume", metavar="RUN", help="go on with the unfinished run in this folder")
    run.add_argument("--predict", metavar="FOLDER", help="label these images instead of training")
    run.add_argument("--checkpoint", metavar="FILE", help="final.pt or best.pt, for --predict")
    data = parser.add_argument_group("data")
    data.add_argument("--labeled-dir", default="data/labeled",
                      help="labeled images: a subfolder per class, or names like cat.12.jpg")
    data.add_argument("--unlabeled-dir", default="data/train", help="images without labels")
    data.add_argument("--val-dir", default="data/val", help="labeled images to watch training by")
    data.add_argument("--test-dir", default="data/test", help="labeled images, scored at the end")
    data.add_argument("--image-size", type=int, default=224, help="side in pixels, n x 32")
    train = parser.add_argument_group("training")
    train.add_argument("--supervised-only", action="store_true",
                       help="the baseline: the same classifier, labeled images alone")
    train.add_argument("--epochs", type=int, default=40,
                       help="passes over the unlabeled images; of 100 steps if --supervised-only")
    train.add_argument("--batch-size", type=int, default=64, help="unlabeled images a step")
    train.add_argument("--lr", type=float, default=1e-3, help="Adam, classifier")
    train.add_argument("--lr-generator", type=float, default=1e-3, help="Adam, generator")
    train.add_argument("--real-logit", choices=["logsumexp", "fake-class"], default="logsumexp",
                       help="what tells real from fake, see Classifier")
    train.add_argument("--generator-loss", choices=["both", "fool", "feature-matching"],
                       default="both", help="pass for a photo, match mean features, or both")
    train.add_argument("--gan-weight", type=float, default=0.3,
                       help="of the mean of unlabeled and fake terms; 0: no learning from fakes")
    train.add_argument("--consistency-weight", type=float, default=3.0,
                       help="of agreeing with the EMA classifier on unlabeled images")
    train.add_argument("--augmentation", type=int, choices=[0, 1], default=1,
                       help="of labeled, unlabeled and fake images; 0: none")
    train.add_argument("--ema-decay", type=float, default=0.996,
                       help="of the classifier that teaches and is scored; 0: no average")
    train.add_argument("--statistics", choices=["unlabeled", "all"], default="unlabeled",
                       help="images whose batch-norm statistics the teacher and evaluation use")
    train.add_argument("--constant-lr", action="store_true",
                       help="otherwise both learning rates fall to 0 in the second half of a run")
    source = parser.add_argument_group("making the four folders (does not train)")
    source.add_argument("--prepare", metavar="SOURCE",
                        help="draw the four folders from Kaggle's train/ or Microsoft's PetImages/")
    source.add_argument("--download", action="store_true",
                        help="fetch Microsoft's archive (0.8 GB) to data/ and prepare that")
    source.add_argument("--labels-per-class", type=int, default=50, help="labeled images to draw")
    source.add_argument("--split-seed", type=int, default=0, help="which images are labeled")
    source.add_argument("--demo", action="store_true",
                        help="draw 2,000 small cartoon pets and train on them for a few minutes")
    args = parser.parse_args()
    # --demo trains on cartoons: these become the defaults, which flags replace. GAN weight 1 is
    # best there, but costs 8 points with 500 labeled photos (README).
    if args.demo:
        parser.set_defaults(labeled_dir="data/demo/labeled", unlabeled_dir="data/demo/train",
                            val_dir="data/demo/val", test_dir="data/demo/test",
                            image_size=32, epochs=16, batch_size=32, gan_weight=1.0)
        args = parser.parse_args()
    checkpoint = None
    if args.resume:  # the run's own flags become the defaults; others given must agree with them
        checkpoint, args = run_to_resume(args.resume, parser)
    if bool(args.predict) != bool(args.checkpoint):
        die("--predict FOLDER and --checkpoint FILE are given together, or neither of them")
    positive(epochs=args.epochs, batch_size=args.batch_size, image_size=args.image_size,
             lr=args.lr, lr_generator=args.lr_generator,
             labels_per_class=args.labels_per_class)
    if args.image_size % 32:
        die(f"--image-size must be a multiple of 32, but it is {args.image_size}")
    if args.batch_size < 2:
        die("--batch-size must be at least 2: batch norm has no variance of one image")
    not_negative(seed=args.seed, split_seed=args.split_seed, gan_weight=args.gan_weight,
                 consistency_weight=args.consistency_weight, ema_decay=args.ema_decay)
    if args.ema_decay >= 1:
        die(f"--ema-decay must be below 1, or nothing is averaged, but it is {args.ema_decay}")
    return args, checkpoint


# ============================================ networks ============================================


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes; torch.nn.SyncBatchNorm does so on GPUs only."""

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        wide = float32_at_least(x)
        moments = torch.stack([wide.mean((0, 2, 3)), wide.square().mean((0, 2, 3))])
        mean, square = mean_over_processes(moments)  # (C,), (C,)
        var = (square - mean.square()).clamp(min=0)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


class Generator(nn.Module):
    """DCGAN: z (N, latent_dim) -> images (N, 3, S, S) in [0, 1], S = image_size = 32 s.

    Radford et al. 2015 (arXiv:1511.06434); the article's layers, which begin from 7x7 for 224 px.
    """

    def __init__(self, image_size):
        super().__init__()

        def up(n_in, n_out, kernel, stride, padding):
            return [nn.ConvTranspose2d(n_in, n_out, kernel, stride, padding, bias=False),
                    BatchNorm(n_out), nn.ReLU()]

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
    """Images (N, 3, S, S) in [0, 1] -> logits (N, K), features (N, 512), real logit (N,).

    A ResNet18 (He et al. 2015, arXiv:1512.03385), for images below 128 px a ResNet10, with one
    block in place of two at each size: at 64 px that learned more in the same time (README).
    D(x) = sigmoid(r) of the real logit r. "logsumexp": r = log Z, as if "fake" were one more logit,
    fixed at 0 (Salimans et al. 2016); "fake-class": that logit is learned (Odena 2016,
    arXiv:1606.01583; the labeled loss stays one of K classes).
    """

    def __init__(self, num_classes, image_size, real_logit_form):
        super().__init__()
        blocks = 2 if image_size >= 128 else 1
        self.resnet = ResNet(BasicBlock, [blocks] * 4, norm_layer=BatchNorm)
        self.resnet.fc = nn.Identity()
        if image_size < 64:  # keep detail: 32 px would shrink to 1x1 before the average
            self.resnet.maxpool = nn.Identity()
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(512, num_classes)
        self.real_logit_form = real_logit_form
        if real_logit_form == "fake-class":
            self.extra = nn.Linear(512, 1)

    def forward(self, x):
        x = ((x - 0.5) * 4).contiguous(memory_format=torch.channels_last)  # photos: std about 1/4
        features = self.resnet(x)
        h = self.dropout(features)
        logits = self.head(h)
        r = real_logit(logits)  # log sum_k exp l_k(x)
        if self.real_logit_form == "fake-class":
            r = r - self.extra(h)[:, 0].float()  # log Z - l_{K+1}
        return logits, features, r


def update_batch_norm_statistics(classifier, on):
    """Choose whether forward passes in training move the statistics that eval() will use."""
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1 if on else 0.0


def augment(x, on, rank=0, world=1):
    """Random crop, flip, colours and an erased square for each image; (N, 3, S, S) -> the same.

    Values may leave [0, 1]. Differentiable, so that fakes are changed as photos are and the
    generator learns through it (DiffAugment, Zhao et al. 2020, arXiv:2006.10738). x is what this
    process, of that rank in `world` processes, has of a batch. With `on` 0 x is left as it is.
    """
    if not on:
        return x
    n, side = len(x), x.shape[-1]
    noise = torch.rand(15, n * world, device=x.device)[:, rank::world]  # (15, n) in [0, 1)
    area, center_x, center_y, erase_x, erase_y, erase_half, no_color = noise[:7]
    flip, aspect, contrast, brightness, saturation, *tint = noise[7:] * 2 - 1  # in [-1, 1)

    area, aspect = 0.3 + 0.7 * area, torch.exp(0.25 * aspect)  # a window of 30% to 100% of it
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 1, 1] = width * torch.where(flip < 0, -1.0, 1.0), height
    theta[:, 0, 2] = (1 - width) * (2 * center_x - 1)  # the window stays within the image
    theta[:, 1, 2] = (1 - height) * (2 * center_y - 1)
    grid = F.affine_grid(theta, x.shape, align_corners=False)  # (n, S, S, 2)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    def each(values):  # (n,) -> (n, 1, 1, 1)
        return values.view(n, 1, 1, 1)

    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - mean) * each(1 + 0.4 * contrast) + mean + each(0.15 * brightness)
    grey = x.mean(dim=1, keepdim=True)  # (n, 1, S, S)
    x = grey + (x - grey) * each(torch.where(no_color < 0.15, 0.0, 1 + 0.8 * saturation))
    x = x * (1 + 0.1 * torch.stack(tint, dim=1)[:, :, None, None])
    # A square of 12% to 50% of the side takes the mean of the image.
    at = torch.arange(side, device=x.device) / side  # (S,)
    half = 0.06 + 0.19 * erase_half[:, None]
    rows = (at - erase_y[:, None]).abs() < half  # (n, S)
    columns = (at - erase_x[:, None]).abs() < half
    erased = (rows[:, :, None] & columns[:, None, :])[:, None]  # (n, 1, S, S)
    return torch.where(erased, x.mean(dim=(1, 2, 3), keepdim=True), x)


# ============================================ training ============================================


def main():
    args, checkpoint = parse_args()
    rank, world = start_processes(args.device)  # 0, 1 without torchrun
    if world > 1 and (args.download or args.prepare or args.predict or args.demo):
        die("--download, --prepare, --predict and --demo are for one process: leave torchrun out")
    if args.download or args.prepare:
        return prepare(args)
    if args.predict:
        return predict(args)
    if args.demo:
        draw_demo()
    device = pick_device(args.device)
    seed_everything(args.seed)

    # ---- the four folders, checked before anything is written ----
    lab_files, lab_labels, class_names, _ = check_labeled(args.labeled_dir, "--labeled-dir")
    val_files, val_labels, _, bad_val = check_labeled(args.val_dir, "--val-dir", class_names)
    test_files, test_labels, _, bad_test = check_labeled(args.test_dir, "--test-dir", class_names)
    num_classes, num_labeled = len(class_names), len(lab_files)
    unl_files, bad_unl = [], {}
    if not args.supervised_only:
        unl_files, bad_unl = check_images(args.unlabeled_dir, "--unlabeled-dir")
        if len(unl_files) < args.batch_size:
            die(f"--unlabeled-dir {args.unlabeled_dir} holds {len(unl_files)} images, fewer than "
                f"one batch: add some, or set --batch-size to {len(unl_files)} or less")
        enough = round(num_classes / TEACHER_SHARE)  # one image a class, at the end of a run
        if args.consistency_weight and args.batch_size < enough:
            die(f"--batch-size {args.batch_size} is too small to choose images of {num_classes} "
                f"classes from: set it to {enough} or more, or --consistency-weight to 0")
        if args.batch_size % world:
            die(f"{world} processes must share --batch-size {args.batch_size} evenly")
    if min(LABELED_BATCH, num_labeled) < world:
        die(f"{world} processes must have at least one labeled image each, of "
            f"{min(LABELED_BATCH, num_labeled)} in a step")
    unusable = {**bad_val, **bad_test, **bad_unl}
    leaks = same_bytes(val_files + test_files, lab_files + unl_files)
    method = "supervised" if args.supervised_only else "sgan"
    split_seed = drawn_by(args.labeled_dir, num_labeled)
    if rank == 0:
        print(f"{method} on {device}: {num_labeled} labeled images ("
              + ", ".join(f"{lab_labels.count(k)} {name}" for k, name in enumerate(class_names))
              + f"), {len(unl_files)} unlabeled, {len(val_files)} validation, "
              f"{len(test_files)} test")

    def held_out(files, labels, x=None):  # batches for evaluation, in order, each image once
        if x is None:
            batches = dali_loader(files, labels, args.batch_size, args.image_size, device)
        else:
            y = torch.tensor(labels, device=device)
            batches = ((x_part, y[i]) for x_part, i in cached_loader(x, args.batch_size))
        return islice(batches, 2) if args.dry_run else batches

    # ---- networks, optimisers, and how many images and steps ----
    classifier = Classifier(num_classes, args.image_size, args.real_logit).to(device)
    classifier = classifier.to(memory_format=torch.channels_last)
    classifier_ema = deepcopy(classifier).requires_grad_(False).eval()
    generator = Generator(args.image_size).to(device).to(memory_format=torch.channels_last)
    opt_d = torch.optim.Adam(classifier.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    opt_g = torch.optim.Adam(generator.parameters(), args.lr_generator, betas=(0.5, 0.999),
                             fused=True)
    fixed_z = torch.randn(64, LATENT_DIM, device=device)
    autocast = bf16_autocast(device)

    config = {name: value for name, value in vars(args).items() if name != "resume"}
    steps_per_epoch = 100 if args.supervised_only else len(unl_files) // args.batch_size
    if args.dry_run:
        args.epochs, steps_per_epoch = 1, min(2, steps_per_epoch)
    total_steps = args.epochs * steps_per_epoch
    labeled_batch = min(LABELED_BATCH, num_labeled) // world * world
    num_fakes = max(2, args.batch_size // UNLABELED_PER_FAKE)
    num_fakes = -(-num_fakes // world) * world  # as many in each process

    # ---- the run's folder, and of one that goes on the state it was left in ----
    for_predict = {"class_names": class_names, "image_size": args.image_size,
                   "real_logit": args.real_logit,
                   "gan_weight": 0.0 if args.supervised_only else args.gan_weight}
    losses, first_step, best_val, rows, seconds_before = StepMeans(), 1, -1.0, [], 0.0
    saved_parts = {"classifier": classifier, "classifier_ema": classifier_ema, "opt_d": opt_d,
                   "generator": generator, "opt_g": opt_g}
    # A run that goes on, and each process, must find the images that the run began with.
    paths_and_sizes = [f"{path}, {path.stat().st_size} bytes"
                       for path in lab_files + val_files + test_files + unl_files]
    if not same_everywhere([paths_and_sizes, checkpoint and checkpoint["step"]]):
        die("the processes do not all find the same images in the folders, or the same last.pt")
    if args.resume:
        if checkpoint["files"] != paths_and_sizes:
            die(f"--resume {args.resume}: the folders do not hold the images that run began with; "
                "was it started in another working directory?")
        for name, part in saved_parts.items():
            load_state(part, checkpoint[name], Path(args.resume, "last.pt"), "--resume")
        losses.load_state_dict(checkpoint["losses"], device)
        first_step, best_val = checkpoint["step"] + 1, checkpoint["best_val"]
        rows, seconds_before = checkpoint["rows"], checkpoint["seconds"]
        fixed_z = checkpoint["fixed_z"].to(device)
        set_random_state(checkpoint["random_state"])
    if rank == 0:
        split = "" if split_seed is None else f"__split{split_seed}"
        run = Run(args.out_dir, f"sgan_catsdogs__{method}__n{num_labeled}__px{args.image_size}"
                  f"{split}__seed{args.seed}", config, rows, resume=args.resume)
        run.warn("left_out.csv", ("file", "why"), unusable, "files cannot be used")
        run.warn("leaks.csv", ("held out", "training"), leaks,
                 "validation or test images are training images too")

    # ---- photos ----
    # Labeled ones, and validation and unlabeled ones if there is room, are decoded once and stay on
    # the device, (N, 3, S, S) uint8; two steps of a dry run are not worth it. All others are
    # decoded by DALI again in each pass over them.
    x_labeled, x_val, x_unlabeled = decode_all(lab_files, args.image_size, device), None, None
    y_labeled = torch.tensor(lab_labels, device=device)
    started = time.perf_counter()  # by now DALI is loaded, which takes long the first time
    room = 0 if args.dry_run else CACHE_BYTES // (3 * args.image_size**2)  # for that many photos
    if rank == 0 and len(val_files) <= room:
        x_val = decode_all(val_files, args.image_size, device)
    if unl_files and world * len(unl_files) <= room:
        x_unlabeled = decode_all(unl_files, args.image_size, device)
    stop, saved_at = stop_signal(), time.perf_counter()

    for step in tqdm(range(first_step, total_steps + 1), initial=first_step - 1, total=total_steps,
                     disable=True if rank else None):
        epoch, i = 1 + (step - 1) // steps_per_epoch, (step - 1) % steps_per_epoch
        if i == 0 or step == first_step:
            which = dict(shuffle_seed=[args.seed, epoch], drop_last=True, shard_id=rank,
                         num_shards=world, first_batch=i)
            if x_unlabeled is None:
                photos = dali_loader(unl_files, None, args.batch_size // world, args.image_size,
                                     device, **which)
            else:
                photos = cached_loader(x_unlabeled, args.batch_size // world, **which)
            epoch_started, first_i = time.perf_counter(), i

        # Constant for half of the run, then linearly to 0.
        falling = 1 if args.constant_lr else min(1, 2 * (1 - (step - 1) / total_steps))
        for opt, lr in ((opt_d, args.lr), (opt_g, args.lr_generator)):
            opt.param_groups[0]["lr"] = lr * falling

        # Every process draws the random numbers of the whole batch, and takes those of its images
        # (but for dropout, whose masks are the same in each).
        chosen = torch.randperm(num_labeled, device=device)[:labeled_batch][rank::world]
        x_lab = augment(x_labeled[chosen] / 255, args.augmentation, rank, world)  # (n, 3, S, S)
        y_lab = y_labeled[chosen]  # (n,)

        if args.supervised_only:
            with autocast:
                logits_lab, _, _ = classifier(x_lab)  # (n, K)
            loss_lab = labeled_loss(logits_lab, y_lab)
            opt_d.zero_grad()
            loss_lab.backward()
            average_gradients(classifier)
            opt_d.step()
            losses.add(step, {"loss/lab": loss_lab})

        else:
            x_unl, _ = next(photos)  # (N, 3, S, S)
            z = torch.randn(num_fakes, LATENT_DIM, device=device)[rank::world]
            with autocast:
                x_fake = generator(z)  # (M, 3, S, S)
            x_fake = augment(x_fake.float(), args.augmentation, rank, world)  # for both updates

            # ---- the EMA classifier, as teacher, labels the photos that it is surest of ----
            # FixMatch (Sohn et al. 2020, arXiv:2001.07685) takes every photo whose p(y | x) passes
            # a threshold, and most of these may be of one class. Here each class gets equally many,
            # those of its highest p(y | x), which needs classes of about equal frequency. Before
            # TEACHER_START the share is negative, and no photo is labeled.
            share = TEACHER_SHARE * (step / total_steps - TEACHER_START) / (1 - TEACHER_START)
            num_picked = round(share * args.batch_size / num_classes)  # of each class
            picked = torch.zeros(len(x_unl), num_classes, device=device)  # (N, K), 1 if taught
            if args.consistency_weight and num_picked > 0:
                with torch.no_grad(), autocast:
                    logits_teacher, _, _ = classifier_ema(x_unl)  # (N, K)
                p_teacher = logits_teacher.float().softmax(dim=1)
                of_all = from_all_processes(p_teacher)  # (batch_size, K)
                surest = of_all.topk(num_picked, dim=0)  # of each column: (num_picked, K)
                p_surest = torch.zeros_like(of_all).scatter(0, surest.indices, surest.values)
                # of several classes for one photo the likeliest
                likeliest = (p_surest > 0) & (p_surest == p_surest.amax(dim=1, keepdim=True))
                picked = likeliest.float().chunk(world)[rank]  # (N, K)

            # ---- classifier: labels right, photos real, fakes fake ----
            # Three forward passes, as batch norm would mix the three kinds of images; by default
            # only unlabeled photos move the running statistics: fakes are not evaluated, and the
            # labeled ones are few.
            all_move = args.statistics == "all"
            classifier.requires_grad_(True)
            with autocast:
                update_batch_norm_statistics(classifier, all_move)
                logits_lab, _, _ = classifier(x_lab)  # (n, K)
                _, _, r_fake = classifier(x_fake.detach())  # (M,)
                update_batch_norm_statistics(classifier, True)
                x_unl = augment(x_unl, args.augmentation, rank, world)
                logits_unl, feat_unl, r_unl = classifier(x_unl)  # (N, K), (N, 512), (N,)
                update_batch_norm_statistics(classifier, all_move)  # for the generator's pass below
            loss_lab = labeled_loss(logits_lab, y_lab)  # -E log p(y | x, real)
            loss_unl = unlabeled_loss(r_unl)  # -E log D(x)
            loss_fake = fake_loss(r_fake)  # -E log(1 - D(G(z)))
            # -E [x is picked] log p(teacher's label | x)
            loss_con = (picked * -logits_unl.float().log_softmax(dim=1)).sum(dim=1).mean()
            # 0.5: as in the code of Salimans et al.
            loss_d = (loss_lab + args.gan_weight * 0.5 * (loss_unl + loss_fake)
                      + args.consistency_weight * loss_con)
            opt_d.zero_grad()
            loss_d.backward()
            average_gradients(classifier)
            opt_d.step()

            # ---- generator, through the new classifier; feat_unl is of the old one ----
            classifier.requires_grad_(False)
            with autocast:
                _, feat_fake, r_gen = classifier(x_fake)  # (M, 512), (M,)
            gap = mean_over_processes(feat_unl.detach().float().mean(0)
                                      - feat_fake.float().mean(0))  # (512,)
            # mean over features of (E f(x) - E f(G(z)))^2, Salimans 2016, section 3.1
            loss_fm = gap.square().mean()
            loss_fool = fool_loss(r_gen)  # -E log D(G(z))
            loss_g = {"both": loss_fool + loss_fm, "fool": loss_fool,
                      "feature-matching": loss_fm}[args.generator_loss]
            opt_g.zero_grad()
            loss_g.backward()
            average_gradients(generator)
            opt_g.step()

            losses.add(step, {"loss/lab": loss_lab, "loss/unl": loss_unl,
                              "loss/fake": loss_fake, "loss/g": loss_g, "loss/fm": loss_fm,
                              "loss/con": loss_con, "monitor/picked": picked.sum(dim=1).mean(),
                              "monitor/p_real_unl": r_unl.sigmoid().mean(),
                              "monitor/p_real_fake": r_fake.sigmoid().mean()})

        # ---- EMA of the classifier, batch-norm statistics included; short memory at first ----
        decay = min(args.ema_decay, (1 + step) / (10 + step))
        for ema, now in zip(classifier_ema.state_dict().values(),
                            classifier.state_dict().values()):
            ema.lerp_(now, 1 - decay) if ema.is_floating_point() else ema.copy_(now)

        epoch_ends = i + 1 == steps_per_epoch
        stopping, save_due = in_any_process(stop.is_set(),
                                            time.perf_counter() - saved_at > SAVE_SECONDS)
        saving = epoch_ends or stopping or save_due
        if epoch_ends:
            means = losses.means()  # waits for the device
        if saving:  # in every process, as these are means over all of them
            losses_so_far, saved_at = losses.state_dict(), time.perf_counter()
        if rank > 0:  # the first process evaluates and writes; the others wait in their next step
            if stopping:
                return
            continue

        # ---- after each epoch: means of the losses, validation, samples, best weights ----
        if epoch_ends:
            images_seen = (i + 1 - first_i) * (labeled_batch if args.supervised_only
                                               else args.batch_size)
            images_per_s = images_seen / (time.perf_counter() - epoch_started)
            with autocast:
                val = evaluate(classifier, held_out(val_files, val_labels, x_val), num_classes)
                val_ema = evaluate(classifier_ema, held_out(val_files, val_labels, x_val),
                                   num_classes)
                if not args.supervised_only:
                    save_samples(generator, fixed_z, run.dir / "samples" / f"epoch_{epoch:03d}.png")
            for weights, scored in (("raw", val), ("ema", val_ema)):
                if scored["accuracy"] > best_val:
                    best_val = scored["accuracy"]
                    model = classifier if weights == "raw" else classifier_ema
                    run.save("best.pt", {"classifier": model.state_dict(), **for_predict,
                                         "weights": weights, "epoch": epoch,
                                         "val_accuracy": best_val})
            seconds = seconds_before + time.perf_counter() - started
            run.log({"step": step, "epoch": epoch, "seconds": round(seconds, 1), **means,
                     "val_loss": val["loss"], "val_accuracy": val["accuracy"],
                     "val_loss_ema": val_ema["loss"], "val_accuracy_ema": val_ema["accuracy"],
                     "images_per_s": round(images_per_s, 1)})
            plot_curves(run.rows, run.dir / "curves.png")
            tqdm.write(f"epoch {epoch}: "
                       + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
                       + f", val {val['accuracy']:.2%}, EMA {val_ema['accuracy']:.2%}, "
                       f"{images_per_s:.0f} images/s, {seconds:.0f} s")
            sys.stdout.flush()

        # ---- a checkpoint from which --resume goes on as if nothing had happened ----
        if saving:
            run.save("last.pt", {
                "args": config, "files": paths_and_sizes, "step": step,
                "best_val": best_val, "rows": run.rows, "losses": losses_so_far, "fixed_z": fixed_z,
                "seconds": seconds_before + time.perf_counter() - started,
                "random_state": random_state(),
                **{name: part.state_dict() for name, part in saved_parts.items()}})
        if stopping and step < total_steps:
            launcher = "python"
            if world > 1:
                launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
            raise SystemExit(f"stopped after step {step} of {total_steps}; to go on: {launcher} "
                             f"sgan_catsdogs.py --resume {shlex.quote(str(run.dir))}")

    if rank > 0:
        return

    # ============ the end: test images are scored here only, by two sets of weights ============
    run.save("final.pt", {"classifier": classifier_ema.state_dict(), **for_predict,
                          "weights": "ema", "epoch": args.epochs,
                          "generator": generator.state_dict()})
    best = load_checkpoint(run.dir / "best.pt", "--out-dir")
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
               split_seed=split_seed, steps=total_steps, seconds=run.rows[-1]["seconds"],
               val_accuracy=run.rows[-1]["val_accuracy_ema"], test_accuracy=test["accuracy"],
               test_accuracy_best_val=test_best["accuracy"], left_out=len(unusable),
               leaks=len(leaks))
    (run.dir / "last.pt").unlink()  # there is nothing left to resume


# ======================================= labels for new photos ====================================


def predict(args):
    """Label all images of a folder with a trained classifier, the least certain first.

    Writes predictions.csv (file, class, its probability and, of a GAN's classifier, D(x): whether
    the photo looks like the unlabeled ones) and a sheet of the least and the most certain images of
    each class.
    """
    device = pick_device(args.device)
    model = load_checkpoint(args.checkpoint, "--checkpoint",
                            ["class_names", "image_size", "real_logit", "gan_weight"])
    class_names, image_size = model["class_names"], model["image_size"]
    classifier = Classifier(len(class_names), image_size, model["real_logit"]).to(device).eval()
    load_state(classifier, model["classifier"], args.checkpoint, "--checkpoint")
    files, unusable = check_images(args.predict, "--predict")
    run = Run(args.out_dir, "predict", vars(args))
    run.warn("left_out.csv", ("file", "why"), unusable, "files cannot be used")

    photos = dali_loader(files, None, args.batch_size, image_size, device)
    probabilities, p_real = [], []
    with torch.no_grad(), bf16_autocast(device):
        for x, _ in tqdm(photos, "batches", -(-len(files) // args.batch_size), disable=None):
            logits, _, r = classifier(x)
            probabilities.append(logits.float().softmax(dim=1).cpu())  # (N, K)
            p_real.append(r.sigmoid().cpu())  # (N,) D(x)
    p_real = torch.cat(p_real) if model["gan_weight"] else None  # otherwise D was not trained
    write_predictions(run.dir, files, torch.cat(probabilities), p_real, class_names, image_size,
                      device)


# ================================== making the four folders =======================================

ARCHIVE = ("https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/"
           "kagglecatsanddogs_5340.zip")


def prepare(args):
    """Draw the four folders from one folder of labeled photos, fetched first for --download.

    --labels-per-class labeled images of each class, 1000 for validation and 1000 for test in all,
    class-balanced, the rest unlabeled.
    """
    source = Path(args.prepare or "data/PetImages")
    targets = [Path(d) for d in (args.labeled_dir, args.val_dir, args.test_dir, args.unlabeled_dir)]
    for target in targets:
        if target.exists():
            die(f"{target} exists already: name other folders by the flags, or remove it first if "
                "it was made by an earlier --prepare")
    if args.download:
        fetch_archive(ARCHIVE, "PetImages", source)
    images, unusable = check_images(source, "--prepare")
    classes = [class_of(path, source).lower() for path in images]
    class_names = names_of(classes, source, "--prepare")
    if unusable:
        print(f"{len(unusable)} files cannot be used and are left out" + listing(unusable),
              file=sys.stderr)
    print(f"classes: {', '.join(class_names)}")
    held_out = 1000 // len(class_names)
    draw_folders(images, classes, targets, [args.labels_per_class, held_out, held_out],
                 args.split_seed)


def draw_demo():
    """Draw the cartoon pets of --demo, once."""
    from tests.cartoons import draw_dataset
    if not Path("data/demo").exists():
        print("drawing 2,000 cartoon cats and dogs ...")
        draw_dataset(Path("data/demo"))


if __name__ == "__main__":
    main()
