"""Semi-supervised GAN on SVHN: photos of house numbers, 1000 digits of them labeled.

A convolutional classifier learns from the labeled digits. It is also the discriminator of a GAN on
all digits: its K logits give D(x) = Z/(Z+1), with Z = sum_k exp l_k(x). The generator matches the
mean features of real digits (Salimans et al. 2016, arXiv:1606.03498, sections 3.1 and 5).
--real-logit and --generator-loss choose other forms.

Training begins with a warm-up on the labeled digits alone. From then on the moving average (EMA) of
the classifier is the teacher: it labels the unlabeled digits that it is sure of. The classifier
learns these labels too, on augmented digits. The average is what is scored.

    python sgan_svhn.py                         # 1000 labels, 100 of each digit
    python sgan_svhn.py --ten-thousand          # the same on 10,000 images, in less than an hour
    python sgan_svhn.py --supervised-only       # the baseline: labeled digits alone

The unlabeled images are all training images but those of validation, the labeled ones among them.
What differs from the article that this follows (Silva 2017), and what it scores:
.github/RESULTS.md.
"""

import argparse
import time
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.io import loadmat
from torch import nn
from torchvision.datasets.utils import download_url
from tqdm import tqdm

from common import (EpochMeans, Run, balanced_split, bf16_autocast, die, evaluate, fake_loss,
                    fool_loss, labeled_loss, number, pick_device, plot_test, real_logit, run_script,
                    save_samples, say, unlabeled_loss)

SCRIPT = Path(__file__).stem  # begins the name of each run's folder
NUM_CLASSES = 10
NUM_VAL = 1000  # labeled images for validation; the headline accuracy does not use them
LATENT_DIM = 100
FAKE_BATCH = 50  # generated images in each step
LABELED_BATCH = 100  # labeled images in each step; with fewer labels than that, all of them
CONFIDENCE = 0.9  # the teacher's label of a digit counts if it is more probable than this


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
                      help="folder that holds SVHN/*.mat; missing files are fetched")
    data.add_argument("--ten-thousand", action="store_true",
                      help="SVHN-10k instead of SVHN: the first 10,000 images of the official test "
                           "file, 8,001 to train on and 1,999 to test")
    data.add_argument("--num-labeled", type=int, default=1000,
                      help="number of labeled images, a multiple of the 10 classes")
    train = parser.add_argument_group("training")
    train.add_argument("--supervised-only", action="store_true",
                       help="the baseline: the same classifier and steps, labeled images alone")
    train.add_argument("--warmup-steps", type=number(int, minimum=0), default=400,
                       help="steps on labeled images alone, before the first epoch")
    train.add_argument("--epochs", type=number(int, minimum=1), default=48,
                       help="passes over the unlabeled images")
    train.add_argument("--batch-size", type=number(int, minimum=2), default=100,
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


NUM_OFFICIAL_TEST = 26_032
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
        y = torch.from_numpy(data["y"].astype("int64")).flatten()  # 1 to 10
    except Exception as error:  # scipy raises many kinds for a damaged file
        die(f"{path} could not be fetched or read ({type(error).__name__}: {error}): put the "
            "official file there, or one of the same layout")
    if x.shape[1:] != (3, 32, 32) or x.dtype != torch.uint8 or len(x) != len(y) or len(x) == 0:
        die(f"{path} must hold X (32, 32, 3, N) uint8 and y (N, 1), but X is {data['X'].shape} "
            f"{data['X'].dtype} and y is {data['y'].shape}")
    both_zeros = 0 in y and NUM_CLASSES in y  # two labels for the digit 0
    if y.min() < 0 or y.max() > NUM_CLASSES or both_zeros:
        die(f"{path} holds labels from {y.min()} to {y.max()}, but those of SVHN are 1 to 10")
    return x, y % NUM_CLASSES  # the file says 10 for the digit 0


def read_data(args, device):
    """Labeled images (n, 3, 32, 32) uint8 and labels (n,), unlabeled images, and two pairs.

    The pairs (images, labels) are validation and test. The unlabeled images are all training images
    but those of validation. All are on `device`.
    """
    x_test, y_test = load_images(args.data_dir, "test_32x32.mat")  # (N, 3, 32, 32) uint8, (N,)
    if args.ten_thousand:
        if len(x_test) != NUM_OFFICIAL_TEST:
            die(f"--ten-thousand takes the official test file of {NUM_OFFICIAL_TEST} images, but "
                f"{args.data_dir}/SVHN/test_32x32.mat has {len(x_test)}: put that one there")
        x_train, x_test = x_test[:10_000].split([8001, 1999])  # no photo has digits in both
        y_train, y_test = y_test[:10_000].split([8001, 1999])
    else:
        x_train, y_train = load_images(args.data_dir, "train_32x32.mat")
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
    """Take each photo a little differently, differentiable; (N, 3, 32, 32) -> the same.

    Strength 0 leaves the images as they are. After strength 1 values may leave [0, 1]:
        shifts up to 2 pixels, turns and shear up to 10 degrees;
        sides from 15% shorter to 20% longer;
        each colour channel spread by 0.8 to 1.2 about the image's mean;
        each colour channel shifted by up to half of the image's standard deviation;
        up to a 3 x 3 blur, or as much sharper;
        a rectangle of up to 8 x 8 pixels in the image's mean colour.
    """
    if strength == 0:
        return x  # sampled between pixels, they would be the same up to rounding only
    n, device = len(x), x.device
    shift_x, shift_y, turn, shear, side_x, side_y = (torch.rand(6, n, device=device) * 2 - 1
                                                     ) * strength
    turn, side_x, side_y = 0.175 * turn, 1 + 0.17 * side_x, 1 + 0.17 * side_y
    lean = turn + 0.175 * shear
    theta = torch.stack([side_x * turn.cos(), -side_y * lean.sin(), shift_x / 8,
                         side_x * turn.sin(), side_y * lean.cos(), shift_y / 8], dim=1)
    grid = F.affine_grid(theta.view(n, 2, 3), x.shape, align_corners=False)  # (N, 32, 32, 2)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    # The classifier's normalisation would undo a change common to all three channels. It would
    # magnify a fixed offset on a faint image, so the offset is in proportion to the contrast.
    gain, offset = (torch.rand(2, n, 3, 1, 1, device=device) * 2 - 1) * strength
    std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (1 + 0.2 * gain) + 0.5 * std * offset
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = x.lerp(blurred, strength * (torch.rand(n, 1, 1, 1, device=device) * 2 - 1))
    row, column, height, width = torch.rand(4, n, 1, 1, 1, device=device)
    pixel = torch.arange(32, device=device) + 0.5
    erased = (((pixel.view(32, 1) - 32 * row).abs() < 4 * strength * height)
              & ((pixel - 32 * column).abs() < 4 * strength * width))  # (N, 1, 32, 32)
    return torch.where(erased, x.mean(dim=(2, 3), keepdim=True), x)


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
    """Images (N, 3, 32, 32) in [0, 1] -> logits (N, K), features (N, 128), real logit r (N,).

    D(x) = sigmoid(r). "logsumexp": r = log Z, as if "fake" were one more logit, fixed at 0
    (Salimans et al. 2016); "fake-class": that logit is learned (Odena 2016, arXiv:1606.01583; the
    labeled loss stays one of K classes); "sigmoid-head": r is a linear unit beside the K logits.
    """

    def __init__(self, real_logit_form):
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
        self.real_logit_form = real_logit_form
        if real_logit_form != "logsumexp":
            self.extra = nn.Linear(128, 1)

    def forward(self, x):
        std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)  # evens out the light
        x = ((x - mean) / (std + 0.02)).contiguous(memory_format=torch.channels_last)
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
    """Within it passes normalise by their own batch, and leave the running statistics alone."""
    norms = [module for module in classifier.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    yield
    for norm in norms:
        norm.track_running_stats = True


# ============================================ training ============================================


def main():
    args = parse_args()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    x_labeled, y_labeled, x_unlabeled, val, test = read_data(args, device)
    method = "supervised" if args.supervised_only else "sgan"

    def held_out(images, labels):  # batches for evaluation, in order, each image once
        batches = ((x / 255, y) for x, y in zip(images.split(1000), labels.split(1000)))
        return islice(batches, 2 if args.dry_run else None)

    classifier = Classifier(args.real_logit).to(device).to(memory_format=torch.channels_last)
    classifier_ema = deepcopy(classifier).requires_grad_(False).eval()
    # of the average and of the classifier: weights and batch-norm statistics
    averaged = [[values for values in network.state_dict().values() if values.is_floating_point()]
                for network in (classifier_ema, classifier)]
    generator = Generator().to(device).to(memory_format=torch.channels_last)
    opt_d = torch.optim.Adam(classifier.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    opt_g = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    fixed_z = torch.randn(100, LATENT_DIM, device=device)
    autocast = bf16_autocast(device)

    # ---- the run's folder, and the number of steps ----
    run = Run(args.out_dir, f"{SCRIPT}__{method}__n{args.num_labeled}__split{args.split_seed}"
              f"__seed{args.seed}", vars(args))
    epochs, steps_per_epoch = args.epochs, len(x_unlabeled) // args.batch_size
    warmup_steps = args.warmup_steps
    # With the GAN off it still makes 2 images, unused: the fewest that batch norm accepts.
    fake_batch = FAKE_BATCH if args.gan_weight else 2
    if args.dry_run:
        epochs, steps_per_epoch, warmup_steps = 1, min(2, steps_per_epoch), min(2, warmup_steps)
    total_steps = warmup_steps + epochs * steps_per_epoch
    step, best_val = 0, -1.0

    means, started = EpochMeans(), time.perf_counter()
    for epoch in range(0 if warmup_steps else 1, epochs + 1):  # epoch 0: the warm-up
        order = torch.randperm(len(x_unlabeled), device=device).split(args.batch_size)
        steps = steps_per_epoch if epoch else warmup_steps
        labeled_only = args.supervised_only or epoch == 0
        epoch_started = time.perf_counter()
        for i in tqdm(range(steps), f"epoch {epoch}/{epochs}", disable=None, leave=False):
            lr_factor = min(1, 2 * (1 - step / total_steps))  # falls in the second half
            for opt in (opt_d, opt_g):
                opt.param_groups[0]["lr"] = args.lr * lr_factor
            step += 1
            chosen = torch.randperm(len(x_labeled), device=device)[:LABELED_BATCH]
            x_lab = augment(x_labeled[chosen] / 255, args.augmentation)  # (n, 3, 32, 32)
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
                x_unl = x_unlabeled[order[i]] / 255  # (N, 3, 32, 32)
                z = torch.randn(fake_batch, LATENT_DIM, device=device)
                with autocast:
                    x_fake = generator(z)
                x_fake = augment(x_fake.float(), args.augmentation)  # (M, 3, 32, 32), both updates

                # ---- the EMA classifier, as teacher, labels the digits that it is sure of ----
                with torch.no_grad(), autocast:
                    logits_teacher, _, _ = classifier_ema(x_unl)  # (N, K)
                p_teacher, y_teacher = logits_teacher.float().softmax(dim=1).max(dim=1)  # (N,)
                picked = p_teacher > CONFIDENCE  # (N,) the others teach nothing yet
                x_unl = augment(x_unl, args.augmentation)  # harder than what the teacher saw

                # ---- classifier: labels right, digits real, fakes fake ----
                # Each kind of image has its own pass, so that batch norm does not mix them. Only
                # unlabeled digits, in the last pass, update its running statistics.
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
                # (Sohn et al. 2020, arXiv:2001.07685, section 2), whose teacher is no EMA
                loss_con = (F.cross_entropy(logits_unl.float(), y_teacher, reduction="none")
                            * picked).mean()
                # Salimans et al. use this factor 0.5, and gan_weight 1
                loss_d = (loss_lab + args.gan_weight * 0.5 * (loss_unl + loss_fake)
                          + args.consistency_weight * loss_con)
                opt_d.zero_grad()
                loss_d.backward()
                opt_d.step()

                # ---- generator, through the updated classifier; feat_unl is from before that ----
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
                    loss_g = loss_g + cosines.square().sum() / (fake_batch**2 - fake_batch)
                opt_g.zero_grad()
                loss_g.backward()
                opt_g.step()

                means.add(step, {"loss/lab": loss_lab, "loss/unl": loss_unl,
                                 "loss/fake": loss_fake, "loss/g": loss_g,
                                 "loss/con": loss_con, "monitor/picked": picked.float().mean(),
                                 "monitor/p_real_unl": r_unl.sigmoid().mean(),
                                 "monitor/p_real_fake": r_fake.sigmoid().mean()})

            # ---- EMA of the classifier, with a short memory at first ----
            decay = min(args.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(*averaged, 1 - decay)

        # ---- once an epoch: means of the losses, validation, samples, best weights ----
        epoch_means = means.take()  # waits for the device
        images_seen = steps * (len(x_lab) if labeled_only else args.batch_size)
        images_per_s = images_seen / (time.perf_counter() - epoch_started)
        with autocast:
            scores = evaluate(classifier, held_out(*val), NUM_CLASSES)
            scores_ema = evaluate(classifier_ema, held_out(*val), NUM_CLASSES)
            if not labeled_only:
                save_samples(generator, fixed_z, run.dir / "samples" / f"epoch_{epoch:03d}.png")
        best_val = run.save_best(best_val, (classifier, scores), (classifier_ema, scores_ema),
                                 epoch=epoch)
        run.log_epoch({"step": step, "epoch": epoch,
                       "seconds": round(time.perf_counter() - started, 1), **epoch_means,
                       "images_per_s": round(images_per_s, 1)}, scores, scores_ema)

    # ============ the end: test images are scored here only, by two sets of weights ============
    run.save("final.pt", {"classifier": classifier_ema.state_dict(), "weights": "ema",
                          "epoch": epoch, "generator": generator.state_dict()})
    best = torch.load(run.dir / "best.pt", map_location=device, weights_only=True)
    classifier.load_state_dict(best["classifier"])
    with autocast:
        scores = evaluate(classifier_ema, held_out(*test), NUM_CLASSES)
        scores_best = evaluate(classifier, held_out(*test), NUM_CLASSES)
    run.finish(device, script=SCRIPT, method=method, steps=step,
               seconds=run.rows[-1]["seconds"], val_accuracy=run.rows[-1]["val_accuracy_ema"],
               test_accuracy=scores["accuracy"], test_accuracy_best_val=scores_best["accuracy"])
    class_names = [str(k) for k in range(NUM_CLASSES)]
    plot_test(scores, test[1], class_names, lambda chosen: test[0][chosen] / 255, run.dir)


if __name__ == "__main__":
    run_script(main)
