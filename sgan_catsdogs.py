"""Semi-supervised GAN on a folder of photos: cats and dogs from 100 labels.

A ResNet is trained from scratch on a few labeled photos and many unlabeled ones. It tells by how
many quarters each unlabeled photo was turned. And its moving average (EMA) labels the photos that
it is surest of. The classifier learns these labels.

With --gan-weight 1 there is a GAN as well. The K logits are then also a discriminator,
D(x) = Z/(Z+1) with Z = sum_k exp l_k(x). It tells photos from the images of a DCGAN generator
(Salimans et al. 2016, arXiv:1606.03498, section 5).

    python sgan_catsdogs.py --demo                          # cartoon pets, no download: a first run
    python sgan_catsdogs.py --download                      # fetch the photos, draw 50 + 50 labels
    python sgan_catsdogs.py --prepare data/PetImages        # draw them from photos you have
    python sgan_catsdogs.py --labeled-dir data/labeled --epochs 40   # train
    python sgan_catsdogs.py --supervised-only               # the baseline: labeled photos alone
    python sgan_catsdogs.py --resume runs/RUN               # go on with a run that was ended
    python sgan_catsdogs.py --predict PHOTOS --checkpoint runs/RUN/final.pt
    torchrun --nproc-per-node 4 sgan_catsdogs.py            # train on four GPUs

Read main() first. What it scores, and how it differs from the cats and dogs article (Petrova 2020):
.github/RESULTS.md.
"""

import argparse
import atexit
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice, zip_longest
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

from common import (EpochMeans, Photos, Run, bf16_autocast, check_images, check_labeled, die,
                    digest, evaluate, fake_loss, fool_loss, labeled_loss, load_checkpoint,
                    load_state, number, pick_device, plot_images, plot_test, real_logit, run_script,
                    same_bytes, save_samples, say, unlabeled_loss, write_json)

SCRIPT = Path(__file__).stem  # begins the name of each run's folder
LATENT_DIM = 100
LABELED_BATCH = 16  # labeled images in each step; with fewer labels than that, all of them
UNLABELED_PER_FAKE = 2  # unlabeled photos in each step for one generated image
UNLABELED_STRENGTH = 0.5  # of augmentation, for turned photos and fakes; for all others it is 1
WARM_UP = 0.02  # fraction of a run in which the learning rates rise
TEACHER_START = 1 / 3  # fraction of a run before the EMA classifier labels anything
TEACHER_SHARE = 0.5  # fraction of an unlabeled batch that it labels: from 0 up to this
CACHE_BYTES = 2 << 30  # on a CPU, the photos of a folder stay decoded in memory up to this size
CACHE_SHARE = 1 / 4  # on a GPU, up to this share of its memory
FOLDERS = ["labeled_dir", "unlabeled_dir", "val_dir", "test_dir"]  # flags
# defaults with --demo
DEMO = {"labeled_dir": "data/demo/labeled", "unlabeled_dir": "data/demo/train",
        "val_dir": "data/demo/val", "test_dir": "data/demo/test",
        "image_size": 32, "epochs": 5, "batch_size": 32,
        "gan_weight": 1.0, "rotation_weight": 0.0, "consistency_weight": 0.0}  # the GAN alone
ARCHIVE = ("https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/"
           "kagglecatsanddogs_5340.zip")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [flags]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=number(int, minimum=0, below=2**63), default=0,
                     help="seed of initialisation, batches and augmentation")
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                     help="device to train on; auto takes the GPU if there is one")
    run.add_argument("--out-dir", default="runs", help="folder in which the run's folder is made")
    run.add_argument("--dry-run", action="store_true", help="two steps of everything, then stop")
    run.add_argument("--demo", action="store_true",
                     help="draw 2,000 small cartoon pets, and train a GAN on them for a minute")
    run.add_argument("--resume", metavar="RUN",
                     help="folder of an unfinished run, to go on with its own flags")
    run.add_argument("--predict", metavar="FOLDER", help="folder of images to label, no training")
    run.add_argument("--checkpoint", metavar="FILE", help="final.pt or best.pt, for --predict")
    data = parser.add_argument_group("data")
    data.add_argument("--labeled-dir", default="data/labeled",
                      help="labeled images: a subfolder per class, or names like cat.12.jpg")
    data.add_argument("--unlabeled-dir", default="data/train", help="images without labels")
    data.add_argument("--val-dir", default="data/val", help="labeled images, scored every epoch")
    data.add_argument("--test-dir", default="data/test", help="labeled images, scored at the end")
    data.add_argument("--image-size", type=number(int, minimum=32), default=224,
                      help="side in pixels to which images are resized, a multiple of 32")
    train = parser.add_argument_group("training")
    train.add_argument("--supervised-only", action="store_true",
                       help="the baseline: the same classifier on labeled images alone")
    train.add_argument("--epochs", type=number(int, minimum=1), default=40,
                       help="passes over the unlabeled images; with --supervised-only 100 steps "
                            "each")
    train.add_argument("--batch-size", type=number(int, minimum=4), default=64,
                       help="unlabeled images per step, at least one for each quarter turn")
    train.add_argument("--lr", type=number(float, above=0), default=1e-3,
                       help="highest learning rate of the classifier; at the end it is 0")
    train.add_argument("--gan-weight", type=number(float, minimum=0), default=0.0,
                       help="weight of the mean of unlabeled and fake loss; 0: there is no GAN")
    train.add_argument("--rotation-weight", type=number(float, minimum=0), default=1.0,
                       help="weight of the loss on turned photos; 0 switches it off")
    train.add_argument("--consistency-weight", type=number(float, minimum=0), default=1.0,
                       help="weight of the loss on labels by the EMA classifier; 0 switches it off")
    train.add_argument("--augmentation", type=number(float, minimum=0, maximum=1), default=1.0,
                       help="strength of augmentation in training, from 0, none, to 1")
    train.add_argument("--ema-decay", type=number(float, minimum=0, below=1), default=0.99,
                       help="decay of the averaged classifier, which is scored; 0: the raw one")
    prepare = parser.add_argument_group("making the four folders, without training")
    prepare.add_argument("--prepare", metavar="SOURCE",
                         help="draw the four folders from Kaggle's train/ or from PetImages/")
    prepare.add_argument("--download", action="store_true",
                         help="fetch Microsoft's archive (0.8 GB) to data/PetImages, unless it is "
                              "there, and prepare that")
    prepare.add_argument("--labels-per-class", type=number(int, minimum=1),
                         default=argparse.SUPPRESS,
                         help="labeled images to draw of each class (default: 50)")
    prepare.add_argument("--split-seed", type=number(int, minimum=0, below=2**63),
                         default=argparse.SUPPRESS,
                         help="seed of the draw of labeled images (default: 0)")
    if "--demo" in sys.argv:
        parser.set_defaults(**DEMO)
    args = parser.parse_args()
    if args.image_size % 32:
        die(f"--image-size must be a multiple of 32, but it is {args.image_size}")
    if "" in (args.resume, args.predict, args.prepare):  # a variable of the shell that is not set
        die("--resume, --predict or --prepare was given an empty name")
    if sum(map(bool, (args.demo, args.resume, args.predict, args.prepare or args.download))) > 1:
        die("--demo, --resume, --predict, --prepare or --download: give one of them")
    if dist.is_torchelastic_launched() and (args.predict or args.prepare or args.download):
        die("torchrun is for training: start --predict, --prepare and --download with python")
    if bool(args.predict) != bool(args.checkpoint):
        die("--predict FOLDER and --checkpoint FILE are given together, or neither of them")
    if {"labels_per_class", "split_seed"} & vars(args).keys() and not (args.prepare
                                                                      or args.download):
        die("--labels-per-class and --split-seed draw labeled images, so they need --prepare or "
            "--download; training takes the images in --labeled-dir")
    return args


# ============================================== data ==============================================


def read_folders(args, device, world):
    """The labeled, unlabeled, validation and test photos of four folders, checked before training.

    Returns these four Photos, the K class names, {unusable file: reason} and duplicates. These are
    files equal byte for byte that should not be: (file, other file, what that means).
    Exits with status 2, naming the flag, on bad input.
    """
    labeled, labels, class_names, _ = check_labeled(args.labeled_dir, "--labeled-dir")
    val, val_labels, _, bad_val = check_labeled(args.val_dir, "--val-dir", class_names)
    test, test_labels, _, bad_test = check_labeled(args.test_dir, "--test-dir", class_names)
    unlabeled, bad_unlabeled = [], {}
    if not args.supervised_only:
        unlabeled, bad_unlabeled = check_images(args.unlabeled_dir, "--unlabeled-dir")
    check_batches(args, len(labeled), len(unlabeled), len(class_names), world)
    say(f"{device}: {len(labeled)} labeled images, {len(unlabeled)} unlabeled, {len(val)} "
        f"validation, {len(test)} test")
    duplicates, held_out, training = [], {*val, *test}, {*labeled, *unlabeled}
    label_of = dict(zip(labeled + val + test, labels + val_labels + test_labels))
    for group in same_bytes(labeled + unlabeled + val + test):
        trained = [path for path in group if path in training]
        duplicates += [(path, trained[0], "held out, but a training image, too")
                       for path in group if path in held_out and trained]
        first_with = {label_of[path]: path for path in group[::-1] if path in label_of}
        duplicates += [(path, other, "labeled otherwise") for path in group if path in label_of
                       for label, other in first_with.items() if label != label_of[path]]

    # how many bytes of unlabeled photos, and of validation photos, this process keeps decoded
    kept = CACHE_BYTES // world
    if device.type == "cuda":  # each process has a GPU of its own
        kept = int(CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory)
    kept = 0 if args.dry_run else kept  # decoding all is not worth it for two steps
    photos = [Photos(labeled, labels, args.image_size, device, cache_bytes=inf),
              Photos(unlabeled, None, args.image_size, device, cache_bytes=kept),
              Photos(val, val_labels, args.image_size, device, cache_bytes=kept),
              Photos(test, test_labels, args.image_size, device)]
    return photos, class_names, {**bad_val, **bad_test, **bad_unlabeled}, duplicates


def augment(x, strength):
    """Random crop, flip, colours and an erased square for each image; (N, 3, S, S) -> the same.

    Strength 1 is the full range of each, 0 leaves x as it is. Values may leave [0, 1].
    Differentiable, so that fakes are changed as photos are and the generator learns through it
    (DiffAugment, Zhao et al. 2020, arXiv:2006.10738).
    """
    if strength == 0:
        return x
    n, side = len(x), x.shape[-1]
    noise = torch.rand(15, n, 1, 1, 1, device=x.device)  # 15 times (N, 1, 1, 1), in [0, 1)
    area, center_x, center_y, erase_x, erase_y, erase_half, no_color = noise[:7]
    flip, aspect, contrast, brightness, saturation, *tint = noise[7:] * 2 - 1  # in [-1, 1)

    area = (1 - 0.7 * strength) + 0.7 * strength * area  # a window of 30% to 100% of the image
    aspect = torch.exp(0.25 * strength * aspect)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    shift_x, shift_y = (1 - width) * (2 * center_x - 1), (1 - height) * (2 * center_y - 1)
    mirror, zero = torch.where(flip < 0, -1.0, 1.0), torch.zeros_like(flip)
    theta = torch.cat([mirror * width, zero, shift_x, zero, height, shift_y], dim=1)
    grid = F.affine_grid(theta.view(n, 2, 3), x.shape, align_corners=False)  # (N, S, S, 2)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - mean) * (1 + 0.4 * strength * contrast) + mean
    x = x + 0.15 * strength * brightness
    grey = x.mean(dim=1, keepdim=True)  # (N, 1, S, S)
    saturation = torch.where(no_color < 0.15 * strength, 0.0, 1 + 0.8 * strength * saturation)
    x = grey + (x - grey) * saturation
    x = x * (1 + 0.1 * strength * torch.cat(tint, dim=1))
    # A square of 12% to 50% of the side takes the mean of the image.
    at = torch.arange(side, device=x.device) / side  # (S,)
    half = strength * (0.06 + 0.19 * erase_half)
    rows = (at[:, None] - erase_y).abs() < half  # (N, 1, S, 1)
    columns = (at - erase_x).abs() < half  # (N, 1, 1, S)
    return torch.where(rows & columns, x.mean(dim=(1, 2, 3), keepdim=True), x)


# ============================================ networks ============================================


class Generator(nn.Module):
    """DCGAN: z (N, latent_dim) -> images (N, 3, S, S) in [0, 1], S = image_size = 32 s.

    Radford et al. 2015 (arXiv:1511.06434). The layers are those of the article.
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


def local_contrast(x):
    """Images (N, 3, S, S) minus a blurred copy: edges and patterns, with a deviation of about 1.

    Brightness and colour of large areas mislead a network that has few labels.
    """
    coarse = F.adaptive_avg_pool2d(x, 8)  # (N, 3, 8, 8)
    return 8 * (x - F.interpolate(coarse, size=x.shape[-2:], mode="bilinear"))


class Classifier(nn.Module):
    """Images (N, 3, S, S) in [0, 1] -> logits (N, K), features (N, 512), real logit r (N,).

    r = log sum_k exp l_k(x), and D(x) = sigmoid(r). The network is a ResNet18 (He et al. 2015,
    arXiv:1512.03385). Below 128 px it is a ResNet10, with one block instead of two at each size,
    which learned more in the same time.
    """

    def __init__(self, num_classes, image_size):
        super().__init__()
        self.resnet = ResNet(BasicBlock, [2 if image_size >= 128 else 1] * 4)
        self.resnet.fc = nn.Identity()
        if image_size < 64:  # keep detail: 32 px would shrink to 1x1 before the average
            self.resnet.maxpool = nn.Identity()
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(512, num_classes)
        self.turn_head = nn.Linear(512, 4)  # from the features: the number of quarter turns

    def forward(self, x):
        x = local_contrast(x).contiguous(memory_format=torch.channels_last)
        features = self.resnet(x)
        logits = self.head(self.dropout(features))
        return logits, features, real_logit(logits)


class TwoViews(nn.Module):
    """A classifier that looks twice: images (N, 3, S, S) -> log of its mean p (N, K), that p.

    The second view is the mirror image of the middle, enlarged: augmentation enlarges, too, what is
    seen in training (Touvron et al. 2019, arXiv:1906.06423).
    """

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x):
        side, edge = x.shape[-1], x.shape[-1] // 5
        middle = x.flip(3)[:, :, edge:side - edge, edge:side - edge]
        middle = F.interpolate(middle, size=(side, side), mode="bilinear")
        logits, _, _ = self.classifier(torch.cat([x, middle]))  # (2N, K)
        p = logits.float().softmax(dim=1).view(2, len(x), -1).mean(dim=0)  # (N, K)
        return p.log(), p


# ============================================ the method ==========================================


@contextmanager
def frozen_statistics(classifier):
    """Within it batch norm goes by the batch, and leaves the running statistics alone."""
    norms = [module for module in classifier.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    yield
    for norm in norms:
        norm.track_running_stats = True


def surest_of_each_class(p, per_class):
    """Labels by a teacher's p(y | x): p (N, K) -> indices, labels, weights (K * per_class,).

    FixMatch (Sohn et al. 2020, arXiv:2001.07685) trusts every label whose p(y | x) passes a
    threshold, and most of these may be of one class. Here each class picks equally many images,
    those of its highest p(y | x). So the classes should be about equally frequent. An image that
    several classes pick has weight 1 with its most likely one, and 0 with the others. How many are
    picked is known beforehand, so that nobody waits for the device.
    """
    surest = p.topk(per_class, dim=0)  # of each column: (per_class, K)
    p_picked = torch.zeros_like(p).scatter_(0, surest.indices, surest.values)  # (N, K)
    label = torch.arange(p.shape[1], device=p.device).expand(per_class, -1).flatten()
    index, order = surest.indices.flatten().sort()
    label = label[order]
    return index, label, (p_picked.argmax(dim=1)[index] == label).float()


def turn(x, num_turns):
    """Turn image i to the left by i mod num_turns quarters: (N, 3, S, S) -> same, quarters (N,)."""
    index = torch.arange(len(x), device=x.device)
    turned = torch.stack([x.rot90(k, (2, 3)) for k in range(num_turns)])  # (T, N, 3, S, S)
    return turned[index % num_turns, index], index % num_turns


def main():
    args, checkpoint = parse_args(), None
    if args.prepare or args.download or args.predict:
        return (predict if args.predict else prepare)(args)
    if args.resume:
        args, checkpoint = flags_of_the_run(args)
    rank, world = start_processes(args.device)  # 0, 1 without torchrun
    if args.demo and not args.resume:
        draw_demo(rank, world)
    started, device = time.perf_counter(), pick_device(args.device)
    torch.manual_seed(args.seed)
    photos, class_names, unusable, duplicates = read_folders(args, device, world)
    labeled, unlabeled, val, test = photos
    x_labeled, y_labeled = labeled.images, labeled.labels  # (n, 3, S, S) uint8, (n,)
    num_classes, num_labeled = len(class_names), len(x_labeled)
    method = "supervised" if args.supervised_only else "sgan"
    with_gan = args.gan_weight > 0 and not args.supervised_only

    def held_out(photos):  # batches for evaluation, in order, each image once
        return islice(photos.batches(args.batch_size), 2 if args.dry_run else None)

    # ---- networks, their optimizers, and the average of the classifier ----
    classifier = Classifier(num_classes, args.image_size)
    classifier = classifier.to(device).to(memory_format=torch.channels_last)
    classifier_ema = deepcopy(classifier).requires_grad_(False).eval()
    # weights and batch-norm statistics of the average, and of the classifier
    averaged = [[values for values in network.state_dict().values() if values.is_floating_point()]
                for network in (classifier_ema, classifier)]
    generator = Generator(args.image_size).to(device).to(memory_format=torch.channels_last)
    teacher = TwoViews(classifier_ema).eval()  # also what is scored
    opt_d = torch.optim.AdamW(classifier.parameters(), args.lr, weight_decay=0.02, fused=True)
    opt_g = torch.optim.Adam(generator.parameters(), 2e-4, betas=(0.5, 0.999), fused=True)
    fixed_z = torch.randn(64, LATENT_DIM, device=device)
    autocast = bf16_autocast(device)

    # ---- the number of steps, and the images of this process in each ----
    epochs = args.epochs
    steps_per_epoch = 100 if args.supervised_only else len(unlabeled.files) // args.batch_size
    if args.dry_run:
        epochs, steps_per_epoch = 1, min(2, steps_per_epoch)
    total_steps = epochs * steps_per_epoch
    labeled_batch = min(LABELED_BATCH, num_labeled) // world
    unlabeled_batch = args.batch_size // world
    fake_batch = max(2, unlabeled_batch // UNLABELED_PER_FAKE)  # batch norm needs 2
    num_turns = 4 if args.rotation_weight else 1  # in which photos are shown
    weak = UNLABELED_STRENGTH * args.augmentation  # of turned photos and fakes

    # ---- the run's folder, and where a run that goes on was left ----
    state = checkpoint or {"step": 0, "best_val": -1.0, "seconds": 0.0, "rows": []}
    step, best_val = state["step"], state["best_val"]
    started -= state["seconds"]
    parts = {"classifier": classifier, "classifier_ema": classifier_ema, "generator": generator,
             "opt_d": opt_d, "opt_g": opt_g}
    files = files_of(args, photos)
    if checkpoint:
        restore(checkpoint, parts, files, args)
    if rank == 0:
        run = open_run(args, f"{method}__n{num_labeled}", state["rows"], unusable, duplicates)
        for_predict = {"class_names": class_names, "flags": run.config}
        save_state(run, started, parts, step=step, best_val=best_val, files=files)
    else:  # from here on each process has random numbers of its own
        torch.manual_seed(args.seed + rank + step)

    means = EpochMeans()
    for epoch in range(step // steps_per_epoch + 1, epochs + 1):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(unlabeled.files))
        order = order[:steps_per_epoch * args.batch_size][rank::world]
        batches = unlabeled.batches(unlabeled_batch, order)
        epoch_started = time.perf_counter()
        for _ in tqdm(range(steps_per_epoch), f"epoch {epoch}/{epochs}",
                      disable=True if rank else None, leave=False):
            for optimizer in (opt_d, opt_g):  # the learning rate rises, stays, falls to 0
                optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * min(
                    1, (step + 1) / (WARM_UP * total_steps), 1.5 * (1 - step / total_steps))
            step += 1
            chosen = torch.randperm(num_labeled, device=device)[:labeled_batch]
            x_lab, y_lab = x_labeled[chosen] / 255, y_labeled[chosen]  # (n, 3, S, S), (n,)
            if args.supervised_only:
                x_lab = augment(x_lab, args.augmentation)
                with autocast:
                    logits_lab, _, _ = classifier(x_lab)  # (n, K)
                loss_d = labeled_loss(logits_lab, y_lab)
                losses = {"loss/lab": loss_d}

            else:
                x_unl, _ = next(batches)  # (N, 3, S, S)

                # ---- the EMA classifier, as teacher, labels the surest photos: more and more ----
                done = max(0, step / total_steps - TEACHER_START) / (1 - TEACHER_START)
                per_class = round(TEACHER_SHARE * done * len(x_unl) / num_classes)
                per_class = per_class if args.consistency_weight else 0
                p = torch.zeros(len(x_unl), num_classes, device=device)  # (N, K)
                if per_class:
                    with torch.no_grad(), autocast:
                        _, p = teacher(x_unl)
                picked, y_teacher, weight = surest_of_each_class(p, per_class)  # (P,) each

                # ---- classifier: labels, its teacher's labels, quarter turns ----
                x_taught = augment(torch.cat([x_lab, x_unl[picked]]), args.augmentation)
                x_turned, quarters = turn(augment(x_unl, weak), num_turns)  # (N, 3, S, S), (N,)
                sizes = [len(x_lab), len(picked), len(x_unl)]  # n, P, N
                with autocast:  # one pass
                    outputs = classifier(torch.cat([x_taught, x_turned]))
                    logits, features, r = (output.split(sizes) for output in outputs)
                    logits_lab, logits_picked, _ = logits  # (n, K), (P, K)
                    feat_unl, r_lab, r_unl = features[2], r[0], r[2]  # (N, 512), (n,), (N,)
                    logits_turn = classifier.turn_head(feat_unl)  # (N, 4)
                loss_lab = labeled_loss(logits_lab, y_lab)  # -E log p(y | x, real)
                # -E weight log p(teacher's label | augmented x)
                loss_con = (F.cross_entropy(logits_picked.float(), y_teacher, reduction="none")
                            * weight).sum() / len(x_unl)
                # -E log p(turn | turned x), Chen et al. 2019 (arXiv:1811.11212, section 3)
                loss_turn = labeled_loss(logits_turn, quarters)
                loss_d = (loss_lab + args.consistency_weight * loss_con
                          + args.rotation_weight * loss_turn)
                losses = {"loss/lab": loss_lab, "loss/con": loss_con, "loss/turn": loss_turn,
                          "monitor/picked": weight.sum() / len(x_unl)}

            # ---- the GAN: photos against fakes ----
            if with_gan:
                z = torch.randn(fake_batch, LATENT_DIM, device=device)
                with autocast:
                    x_fake = generator(z)
                # Fakes are augmented and turned as photos are; both updates use them: (M, 3, S, S)
                x_fake, _ = turn(augment(x_fake.float(), weak), num_turns)
                # fakes pass apart, so that batch norm does not mix them with photos
                with autocast, frozen_statistics(classifier):
                    _, _, r_fake = classifier(x_fake.detach())  # (M,)
                # labeled photos are real, too: else D learns to tell these few from all others
                loss_unl = unlabeled_loss(torch.cat([r_lab, r_unl]))  # -E log D(x)
                loss_fake = fake_loss(r_fake)  # -E log(1 - D(G(z)))
                loss_d = loss_d + args.gan_weight * 0.5 * (loss_unl + loss_fake)  # Salimans: 0.5

            opt_d.zero_grad()
            loss_d.backward()
            average_gradients(classifier)
            opt_d.step()

            # ---- generator, through the updated classifier; feat_unl is of the old one ----
            if with_gan:
                classifier.requires_grad_(False)
                with autocast, frozen_statistics(classifier):
                    _, feat_fake, r_gen = classifier(x_fake)  # (M, 512), (M,)
                classifier.requires_grad_(True)
                # mean over features of (E f(x) - E f(G(z)))^2, Salimans 2016, section 3.1
                loss_fm = (feat_unl.detach().float().mean(0) - feat_fake.float().mean(0)
                           ).square().mean()
                loss_g = fool_loss(r_gen) + loss_fm  # -E log D(G(z)), and the means
                opt_g.zero_grad()
                loss_g.backward()
                average_gradients(generator)
                opt_g.step()
                losses |= {"loss/unl": loss_unl, "loss/fake": loss_fake, "loss/g": loss_g,
                           "loss/fm": loss_fm, "monitor/p_real_unl": r_unl.sigmoid().mean(),
                           "monitor/p_real_fake": r_fake.sigmoid().mean()}
            means.add(step, losses)

            # ---- EMA of the classifier, with a short memory at first ----
            decay = min(args.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(*averaged, 1 - decay)

        # ---- once an epoch: means of the losses, validation, samples, checkpoint ----
        epoch_means = means.take()  # waits for the device
        if rank:  # the first process evaluates and writes; the others wait in their next step
            continue
        images = labeled_batch * world if args.supervised_only else args.batch_size  # a step
        images_per_s = steps_per_epoch * images / (time.perf_counter() - epoch_started)
        with autocast:
            scores = evaluate(TwoViews(classifier), held_out(val), num_classes)
            scores_ema = evaluate(teacher, held_out(val), num_classes)
            if with_gan:
                save_samples(generator, fixed_z, run.dir / "samples" / f"epoch_{epoch:03d}.png")
        best_val = run.save_best(best_val, (classifier, scores), (classifier_ema, scores_ema),
                                 epoch=epoch, **for_predict)
        run.log_epoch({"step": step, "epoch": epoch,
                       "seconds": round(time.perf_counter() - started, 1), **epoch_means,
                       "images_per_s": round(images_per_s, 1)}, scores, scores_ema)
        save_state(run, started, parts, step=step, best_val=best_val, files=files)

    if rank:
        return

    # ============ the end: test images are scored here only, by two sets of weights ============
    run.save("final.pt", {"classifier": classifier_ema.state_dict(), "weights": "ema",
                          "epoch": epochs, "generator": generator.state_dict(), **for_predict})
    best = torch.load(run.dir / "best.pt", map_location=device, weights_only=True)
    classifier.load_state_dict(best["classifier"])
    with autocast:
        scores = evaluate(teacher, held_out(test), num_classes)
        scores_best = evaluate(TwoViews(classifier), held_out(test), num_classes)
    run.finish(device, script=SCRIPT, method=method, num_labeled=num_labeled, steps=total_steps,
               seconds=run.rows[-1]["seconds"], val_accuracy=run.rows[-1]["val_accuracy_ema"],
               test_accuracy=scores["accuracy"], test_accuracy_best_val=scores_best["accuracy"],
               left_out=len(unusable), duplicates=len(duplicates))
    plot_test(scores, test.labels, class_names, lambda chosen: next(test.batches(60, chosen))[0],
              run.dir)
    (run.dir / "last.pt").unlink()  # there is nothing left to resume


# --------- what follows is no method: checks, processes, --resume, --predict, --prepare -----------


def check_batches(args, num_labeled, num_unlabeled, num_classes, world):
    """Refuse a batch size that the photos or the processes do not allow."""
    if min(LABELED_BATCH, num_labeled) < world:
        die(f"a step has only {min(LABELED_BATCH, num_labeled)} labeled images, fewer than the "
            f"{world} processes: start fewer processes")
    if args.supervised_only:
        return
    if num_unlabeled < args.batch_size:
        die(f"--unlabeled-dir {args.unlabeled_dir} holds {num_unlabeled} images, fewer than one "
            f"batch: add some, or set --batch-size to {num_unlabeled} or less")
    at_least = world * round(num_classes / TEACHER_SHARE)  # one image a class by the last step
    if args.consistency_weight and args.batch_size < at_least:
        die(f"--batch-size {args.batch_size} is too small: the consistency loss on {num_classes} "
            f"classes needs {at_least} or more, unless --consistency-weight is 0")
    if args.batch_size % world:
        die(f"--batch-size {args.batch_size} must be a multiple of the {world} processes")


# ==================================== processes and checkpoints ===================================


def start_processes(device_name):
    """(rank, number of processes) under torchrun, one GPU for each on CUDA; otherwise (0, 1)."""
    if not dist.is_torchelastic_launched():  # clusters set RANK without it
        return 0, 1
    if device_name != "cpu" and torch.cuda.is_available():
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            die(f"more processes than the {torch.cuda.device_count()} GPUs: start fewer processes")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # gloo for CPU tensors, NCCL for CUDA tensors
    atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def average_gradients(network):
    """Replace each gradient by its mean over all processes; of no effect in one process."""
    if dist.is_initialized():
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(total.view_as(gradient) / dist.get_world_size())


def open_run(args, name, rows, unusable, duplicates):
    """The run's folder, with lists of files that need attention. Says how to go on with it, and
    does so again when Ctrl-C (SIGINT) or SIGTERM ends the process."""
    config = {key: value for key, value in vars(args).items() if key != "resume"}
    config |= {key: os.path.abspath(config[key]) for key in FOLDERS}  # --resume works anywhere
    run = Run(args.out_dir, f"{SCRIPT}__{name}__px{args.image_size}__seed{args.seed}", config,
              args.resume, rows)
    run.warn("left_out.csv", ("file", "why"), unusable.items(),
             "files cannot be used and are left out")
    run.warn("duplicates.csv", ("file", "other file", "what that means"), duplicates,
             "pairs of files are equal that should differ")
    launcher = (f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"  # of one machine
                if dist.is_initialized() else "python")
    script, folder = (shlex.quote(os.path.abspath(path)) for path in (__file__, run.dir))
    how = f"go on with `{launcher} {script} --resume {folder}`"

    def stop(signum, frame):
        say(f"\nstopped: {how}", file=sys.stderr)
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    say(f"if this run ends early, {how}")
    return run


def flags_of_the_run(args):
    """With --resume: the flags of that run, and its checkpoint last.pt.

    Of the flags given beside it only folders count, which may have moved; others are refused.
    """
    folder = Path(args.resume)
    folder = folder.parent if folder.name == "last.pt" else folder
    given = {word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")}
    moved = {name for name in FOLDERS if f"--{name.replace('_', '-')}" in given}
    if len(given) > 1 + len(moved):
        die(f"--resume {args.resume} takes the run's own flags: leave out all others but those of "
            "folders that moved")
    if not (folder / "last.pt").exists() and (folder / "final.pt").exists():
        die(f"--resume {args.resume}: that run is finished")
    checkpoint = load_checkpoint(folder / "last.pt", "--resume",
                                 ["args", "step", "files", "rows", "rng_state"])
    flags = {**vars(args), **checkpoint["args"], **{name: vars(args)[name] for name in moved}}
    return argparse.Namespace(**{**flags, "resume": folder}), checkpoint


def save_state(run, started, parts, **state):
    """Write last.pt: all that --resume needs."""
    run.save("last.pt", {"args": run.config, "rows": run.rows, "rng_state": torch.get_rng_state(),
                         "seconds": time.perf_counter() - started, **state,
                         **{name: part.state_dict() for name, part in parts.items()}})


def files_of(args, photos):
    """{folder's flag: its files}, by which a run that goes on knows its images again: each one's
    path below the folder and its content, or of unlabeled ones, which are many, its size."""
    return {name: [f"{path.relative_to(vars(args)[name])}, "
                   + (f"{path.stat().st_size} bytes" if name == "unlabeled_dir" else digest(path))
                   for path in folder.files] for name, folder in zip(FOLDERS, photos)}


def restore(checkpoint, parts, files, args):
    """Put networks, optimisers and random numbers where last.pt left them.

    Refused if a folder holds other images than those that the run began with.
    """
    for name in FOLDERS:
        for then, now in zip_longest(checkpoint["files"][name], files[name]):
            if then != now:
                die(f"--resume {args.resume}: --{name.replace('_', '-')} {vars(args)[name]} does "
                    f"not hold the images that the run began with: {then or now} differs; if the "
                    "folder has moved, name the new one by that flag")
    for name, part in parts.items():
        load_state(part, checkpoint[name], "--resume", Path(args.resume, "last.pt"))
    torch.set_rng_state(checkpoint["rng_state"])
    torch.cuda.manual_seed(args.seed + checkpoint["step"])  # of no effect without a GPU


# ======================================= labels for new photos ====================================


@torch.no_grad()
def predict(args):
    """Label all images of a folder with a trained classifier, the least certain first.

    Writes predictions.csv (file, class, its probability) and contact_sheet.png, the 30 least and
    most certain images.
    """
    device = pick_device(args.device)
    model = load_checkpoint(args.checkpoint, "--checkpoint", ["class_names", "flags"])
    class_names, flags = model["class_names"], argparse.Namespace(**model["flags"])
    classifier = Classifier(len(class_names), flags.image_size)
    load_state(classifier, model["classifier"], "--checkpoint", args.checkpoint)
    classifier = TwoViews(classifier).to(device).eval()
    files, unusable = check_images(args.predict, "--predict")
    run = Run(args.out_dir, "predict", vars(args))
    run.warn("left_out.csv", ("file", "why"), unusable.items(),
             "files cannot be used and are left out")

    photos, p = Photos(files, None, flags.image_size, device), []
    with bf16_autocast(device):
        for x, _ in tqdm(photos.batches(args.batch_size), "batches",
                         -(-len(files) // args.batch_size), disable=None):
            p.append(classifier(x)[1].cpu())  # (N, K)
    certainty, predicted = torch.cat(p).max(dim=1)  # (N,), (N,)
    order = certainty.argsort().tolist()
    run.table("predictions.csv", [
        {"file": files[i], "class": class_names[predicted[i]], "probability": f"{certainty[i]:.4f}"}
        for i in order])
    shown = order if len(order) <= 60 else order[:30] + order[-30:]
    plot_images(next(photos.batches(len(shown), shown))[0],
                [f"{class_names[predicted[i]]} {certainty[i]:.1%}" for i in shown],
                run.dir / "contact_sheet.png", "the least certain images, and the most certain")
    counts = predicted.bincount(minlength=len(class_names)).tolist()
    say(", ".join(f"{n} {name}" for n, name in zip(counts, class_names))
        + f": {run.dir / 'predictions.csv'}")


# ===================================== making the four folders ====================================


def prepare(args):
    """Draw the four folders from one folder of labeled photos, which --download fetches first.

    Each class gives --labels-per-class labeled images. Validation and test get about 1000 each,
    equally many of each class, but at most a fifth of a class. The rest is unlabeled, under names
    that tell no class. All are links. `<labeled folder>.json` records the seed and what was drawn.
    """
    source, seed = Path(args.prepare or "data/PetImages"), vars(args).get("split_seed", 0)
    targets = [Path(d) for d in (args.labeled_dir, args.val_dir, args.test_dir, args.unlabeled_dir)]
    if len({os.path.abspath(target) for target in targets}) < 4:
        die("--labeled-dir, --val-dir, --test-dir and --unlabeled-dir must be four folders")
    for target in targets:
        if target.exists():
            die(f"{target} exists already: name other folders by the flags, or remove it first if "
                "it was made by an earlier --prepare")
    if args.download and not source.is_dir():
        try:  # the folder appears whole or not at all
            source.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=source.parent) as unpacked:
                download_and_extract_archive(ARCHIVE, unpacked)
                os.replace(Path(unpacked, "PetImages"), source)
        except Exception as error:  # zipfile raises many kinds for a damaged archive
            die(f"--download could not fetch and unpack {ARCHIVE} in {source.parent} ({error}): "
                "try again")
    images, labels, names, unusable = check_labeled(source, "--prepare", strict=False)
    if unusable:
        path, why = next(iter(unusable.items()))
        say(f"{len(unusable)} files cannot be used and are left out, such as {path}: {why}")
    if len({name.lower() for name in names}) < len(names):
        die(f"--prepare {source} has classes that differ in capitals only: {', '.join(names)}")
    rng, drawn = np.random.default_rng(seed), {target: [] for target in targets}
    for k, name in enumerate(names):
        members = np.array([path for path, label in zip(images, labels) if label == k])
        labeled = vars(args).get("labels_per_class", 50)
        held_out = min(max(1, 1000 // len(names)), len(members) // 5)
        if held_out == 0 or labeled + 2 * held_out >= len(members):
            die(f"class {name} has {len(members)} images, too few for {labeled} labeled ones, a "
                "fifth for validation, a fifth for test and some unlabeled ones: add images, or "
                "give fewer --labels-per-class")
        members = members[rng.permutation(len(members))]
        sizes = [labeled, held_out, held_out]
        for target, chosen in zip(targets, np.split(members, np.cumsum(sizes))):
            drawn[target] += [(name.lower(), path) for path in chosen]
    rng.shuffle(drawn[targets[3]])
    for target, files in drawn.items():
        draft = target.with_name(f".{target.name}.tmp")  # the folder appears whole
        shutil.rmtree(draft, ignore_errors=True)
        for n, (name, path) in enumerate(files if target == targets[3] else sorted(files)):
            link = Path(draft, "" if target == targets[3] else name, f"{n:05d}{path.suffix}")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        draft.rename(target)
        say(f"{target}: {len(files)} images")
    files = sorted(os.path.relpath(path, source) for _, path in drawn[targets[0]])
    write_json(f"{targets[0]}.json", {"split_seed": seed, "source": source, "files": files})


def draw_demo(rank, world):
    """Draw the cartoon pets of --demo, if they are not there yet; one process does, others wait."""
    if rank == 0 and not Path("data/demo").exists():
        try:
            from tests.cartoons import draw_dataset
        except ModuleNotFoundError:
            die("--demo needs the repository's folder tests/ beside this script")
        say("drawing 2,000 cartoon cats and dogs ...")
        draw_dataset(Path("data/demo"))
    if world > 1:
        dist.barrier()


if __name__ == "__main__":
    run_script(main)
