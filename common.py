"""What the four scripts share: the log-sum-exp loss, the DALI image loader, and evaluation.

Evaluation includes the draw of labels, the record of a run on disk and its figures. There are no
networks, training steps or hyper-parameters here: those stand in the scripts, where they are read.

Notation: l(x) are the K logits of the classifier, Z(x) = sum_k exp l_k(x), and the classifier is
also the discriminator D(x) = Z / (Z + 1) (Salimans et al. 2016, arXiv:1606.03498, section 5).
"""

import contextlib
import csv
import io
import json
import os
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.utils import save_image

# ==================================== the log-sum-exp loss =======================================
# A (K+1)-way softmax whose extra logit, "fake", is fixed at 0 says p(fake | x) = 1 / (Z + 1). So
# with r(x) = log Z(x): D(x) = sigmoid(r), -log D(x) = softplus(-r), -log(1 - D(x)) = softplus(r),
# and p(y | x, real) = exp l_y / Z is the ordinary softmax. Under autocast, too, nothing is computed
# in less than float32; logsumexp and softplus and their gradients stay finite at logits of +-1e4.


def float32_at_least(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def real_logit(logits: Tensor) -> Tensor:
    """r(x) = log sum_k exp l_k(x): logits (N, K) of any float type -> (N,) float32 or float64."""
    return torch.logsumexp(float32_at_least(logits), dim=1)


def labeled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-E log p(y | x, x is real): logits (N, K), labels (N,) int64 -> scalar in nats."""
    return F.cross_entropy(float32_at_least(logits), labels)


def unlabeled_loss(r: Tensor) -> Tensor:
    """-E log D(x) on real images without labels: real logit r (N,) -> scalar in nats."""
    return F.softplus(-float32_at_least(r)).mean()


def fake_loss(r: Tensor) -> Tensor:
    """-E log(1 - D(G(z))) on generated images: real logit r (N,) -> scalar in nats."""
    return F.softplus(float32_at_least(r)).mean()


def fool_loss(r: Tensor) -> Tensor:
    """-E log D(G(z)), what a generator that wants to pass for real minimises (non-saturating).

    r (N,) is the real logit of generated images (Goodfellow et al. 2014, arXiv:1406.2661, sec. 3).
    """
    return F.softplus(-float32_at_least(r)).mean()


# ====================================== errors, device, seed ======================================


def die(message: str):
    """Refuse bad input: one sentence on stderr, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def positive(**flags: float):
    """Refuse the first of the named flags that is not above zero: `positive(batch_size=64)`."""
    for name, value in flags.items():
        if not value > 0:
            die(f"--{name.replace('_', '-')} must be positive, but it is {value}")


def not_negative(**flags: float):
    """Refuse the first of the named flags that is below zero: `not_negative(seed=0)`."""
    for name, value in flags.items():
        if not value >= 0:
            die(f"--{name.replace('_', '-')} must not be negative, but it is {value}")


def pick_device(name: str) -> torch.device:
    """"auto", "cpu" or "cuda" -> device; "auto" takes the GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        die("--device cuda was asked for, but torch finds no CUDA GPU: use --device cpu or auto")
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def bf16_autocast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the hardware multiplies in it, a context without effect elsewhere.

    A processor without avx512_bf16 or AMX emulates bfloat16 and would be slower than in float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        native = cpuinfo.exists() and "_bf16" in cpuinfo.read_text()
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def seed_everything(seed: int):
    """Seed Python, NumPy and torch: on one CPU the same seed then gives the same numbers."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ====================================== image files with DALI =====================================


def dali_loader(files, labels, batch_size, image_size, device, shuffle_seed=None, drop_last=False,
                shard_id=0, num_shards=1):
    """One pass over image files with NVIDIA DALI, decoded on the device that trains.

    Args:
        files: paths; labels: a class index for each, or None to get each file's index in `files`.
        image_size: images are resized to this square, ignoring their aspect ratio (antialiased).
        device: on CUDA, JPEGs are decoded and resized by the GPU; otherwise by CPU threads.
        shuffle_seed: None keeps the order; a list of integers, say [seed, epoch], fixes a
            permutation of all files, the same one on every shard.
        drop_last: leave out the last batch when it is not full, and give every shard as many.
        shard_id, num_shards: this process takes every num_shards-th file, so that the shards
            together see each file exactly once.
    Returns:
        an iterator of (images (N, 3, S, S) float32 in [0, 1], labels (N,) int64) on `device`.
        Decoding of the first batches begins with the call and runs ahead of the training.
    """
    try:
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
    except ImportError:
        die("NVIDIA DALI is not installed: `pip install nvidia-dali-cuda120` (Linux only)")

    order = np.arange(len(files))
    if shuffle_seed is not None:
        order = np.random.default_rng(shuffle_seed).permutation(order)
    if drop_last:
        order = order[: len(order) // (num_shards * batch_size) * num_shards * batch_size]
    order = order[shard_id::num_shards]
    if len(order) == 0:
        return iter(())

    on_gpu = device.type == "cuda"

    @pipeline_def(batch_size=batch_size, num_threads=min(8, os.cpu_count()),
                  device_id=device.index if on_gpu else None)
    def pipeline():
        jpegs, y = fn.readers.file(files=[str(files[i]) for i in order],
                                   labels=[int(i if labels is None else labels[i]) for i in order],
                                   pad_last_batch=True, name="reader")
        x = fn.decoders.image(jpegs, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        x = fn.resize(x, resize_x=image_size, resize_y=image_size)
        x = fn.crop_mirror_normalize(x, dtype=types.FLOAT, output_layout="CHW",
                                     mean=[0.0] * 3, std=[255.0] * 3)
        return x, (y.gpu() if on_gpu else y)

    # PARTIAL with a padded reader: the last batch is cut to the images that are left, none twice
    batches = DALIGenericIterator(pipeline(), ["x", "y"], reader_name="reader",
                                  last_batch_policy=LastBatchPolicy.PARTIAL)
    return ((batch[0]["x"], batch[0]["y"].squeeze(-1).long()) for batch in batches)


# ================================ which images are labeled: the draw ==============================


def balanced_split(labels: Tensor, num_labeled: int, num_val: int, num_classes: int, seed: int):
    """Draw a class-balanced labeled set and a random validation set; the rest stays unlabeled.

    Args: labels (N,) int64 of all training images; the two sizes; the seed of the draw.
    Returns: index tensors (labeled, validation, unlabeled), disjoint, together all N. Where a
    class is smaller than its share, all of it is labeled and others fill the gap at random. The
    labeled draw does not depend on num_val; validation has the class frequencies of the data.
    Errors: exit status 2 if num_labeled is no positive multiple of num_classes or more than N, or
    if a class has no image at all.
    """
    if num_labeled <= 0 or num_labeled % num_classes:
        die(f"--num-labeled must be a positive multiple of the {num_classes} classes, "
            f"but it is {num_labeled}")
    if num_labeled > len(labels):
        die(f"--num-labeled is {num_labeled}, but there are {len(labels)} training images")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    by_class = [order[labels[order] == k] for k in range(num_classes)]
    for k, members in enumerate(by_class):
        if len(members) == 0:
            die(f"class {k} has no training image, so none can be labeled")

    def others(chosen):  # the indices that are not in chosen, in the order drawn
        return order[~torch.isin(order, chosen)]

    labeled = torch.cat([members[: num_labeled // num_classes] for members in by_class])
    labeled = torch.cat([labeled, others(labeled)[: num_labeled - len(labeled)]])
    rest = others(labeled)
    return labeled, rest[:num_val], rest[num_val:]


# ========================================== evaluation ============================================


@torch.no_grad()
def evaluate(classifier: nn.Module, batches, num_classes: int) -> dict:
    """Score a classifier, raw or EMA, in one pass; the device is read once, at the end.

    Args: classifier maps images to (logits (N, K), ...); batches of (images, labels (N,)).
    Returns: accuracy in [0, 1], mean cross-entropy in nats, confusion (K, K) int64 counts with
    the true class in rows, and predicted (N,) int64 in the order of the batches; without images
    the first two are NaN. Each image counts once whatever the batch sizes. The classifier is
    left in the mode, train or eval, that it came in.
    """
    was_training = classifier.training
    classifier.eval()
    device = next(classifier.parameters()).device
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
    loss_sum, predicted = torch.zeros((), device=device), [torch.zeros(0, device=device).long()]
    for x, y in batches:
        logits = classifier(x)[0].float()  # (N, K)
        predicted.append(logits.argmax(dim=1))
        cell = y * num_classes + predicted[-1]  # (N,): row y, column prediction
        confusion.index_add_(0, cell, torch.ones_like(cell))
        loss_sum += F.cross_entropy(logits, y, reduction="sum")
    classifier.train(was_training)
    confusion = confusion.view(num_classes, num_classes).cpu()
    count = confusion.sum().item() or float("nan")
    return {"accuracy": confusion.trace().item() / count, "loss": loss_sum.item() / count,
            "confusion": confusion, "predicted": torch.cat(predicted).cpu()}


# ========================================= record of a run ========================================


@contextlib.contextmanager
def atomic(path):
    """`with atomic(path) as tmp:` write to tmp; path then appears whole, or is left as it was."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


class Run:
    """The folder of one run, `out_dir/name__time/`: args.json, metrics.csv, checkpoints, results.

    name: what was run, e.g. "sgan_mnist__n100__split0__seed0"; config: all flags, for args.json and
    results.json.
    Every file is written whole or not at all.
    """

    def __init__(self, out_dir, name: str, config: dict):
        stamp = f"{name}__{time.strftime('%Y%m%d-%H%M%S')}"
        for attempt in range(100):  # two runs may begin in the same second
            self.dir = Path(out_dir) / (f"{stamp}-{attempt}" if attempt else stamp)
            try:
                (self.dir / "samples").mkdir(parents=True)
                break
            except FileExistsError:
                continue
            except OSError as error:
                die(f"--out-dir {out_dir} cannot be written: {error.strerror}")
        self.config, self.rows = dict(config), []  # as given: a dry run changes some
        with atomic(self.dir / "args.json") as tmp:
            tmp.write_text(json.dumps(config, indent=2, default=str) + "\n")

    def log(self, row: dict):
        """Add one evaluation to metrics.csv; row: column -> number, empty where a row has none."""
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=dict.fromkeys(k for one in self.rows for k in one))
        writer.writeheader()
        writer.writerows(self.rows)
        with atomic(self.dir / "metrics.csv") as tmp:
            tmp.write_text(text.getvalue())

    def save(self, filename: str, state: dict):
        """Save a checkpoint of tensors, numbers and strings (`torch.load(weights_only=True)`)."""
        with atomic(self.dir / filename) as tmp:
            torch.save(state, tmp)

    def finish(self, device: torch.device, **results):
        """Write results.json and print the same object after the word RESULT, as the last line.

        The object has every flag, the results, which replace flags of the same name, and
        peak_memory_mib: of GPU memory on CUDA, otherwise of this process's resident memory.
        """
        if device.type == "cuda":
            peak, name = torch.cuda.max_memory_allocated() / 2**20, torch.cuda.get_device_name()
        else:
            unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
            peak, name = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, "cpu"
        results = {**self.config, **results, "peak_memory_mib": round(peak), "device": name,
                   "torch": torch.__version__}
        results = {key: None if value != value else value for key, value in results.items()}  # NaN
        with atomic(self.dir / "results.json") as tmp:
            tmp.write_text(json.dumps(results, indent=2, default=str) + "\n")
        print(f"written to {self.dir}")
        print("RESULT", json.dumps(results, default=str), flush=True)


class StepMeans:
    """Scalars of each training step, left on the device; averaged for one row of metrics.csv.

    A loss that is not finite ends the run with a sentence. Reading the device makes it wait, so
    it is read every 50 steps only, and always before a checkpoint of these steps can be written.
    """

    def __init__(self):
        self.names, self.steps, self.values, self.checked = [], [], [], 0

    def add(self, step: int, values: dict):
        """values: name -> scalar tensor of this step, the same names at every step."""
        self.names = list(values)
        self.steps.append(step)
        self.values.append(torch.stack([value.detach().float() for value in values.values()]))
        if len(self.values) - self.checked >= 50:
            self.check()

    def check(self):
        """Exit status 1, with the name and step of the first value that is not finite."""
        if self.checked == len(self.values):
            return
        recent = torch.stack(self.values[self.checked:]).cpu()  # (steps, names)
        bad = (~recent.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise SystemExit(
                f"stopped: {self.names[column]} is {recent[row, column].item()} at step "
                f"{self.steps[self.checked + row]}; checkpoints already written are from before "
                "it; a lower learning rate usually helps")
        self.checked = len(self.values)

    def means(self) -> dict:
        """name -> mean since the last call, as float; starts anew."""
        self.check()
        means = dict(zip(self.names, torch.stack(self.values).mean(dim=0).tolist()))
        self.steps, self.values, self.checked = [], [], 0
        return means


# ============================================ figures =============================================


@torch.no_grad()
def save_samples(generator: nn.Module, fixed_z: Tensor, path):
    """Write a square-ish grid of G(z) for one fixed z (N, latent_dim), images in [0, 1], as PNG."""
    was_training = generator.training
    generator.eval()
    images = generator(fixed_z).float().cpu()  # (N, C, H, W)
    generator.train(was_training)
    with atomic(path) as tmp:
        save_image(images, tmp, format="png", nrow=round(len(images) ** 0.5))


def save_figure(figure: Figure, path):
    """Write a matplotlib figure as PNG."""
    with atomic(path) as tmp:
        figure.savefig(tmp, format="png", dpi=100, bbox_inches="tight")


def plot_curves(rows: list, path):
    """Validation accuracy and loss, and mean D on real and fake images, against steps.

    rows: the rows of metrics.csv; columns that a run does not have are left out.
    """
    panels = [("accuracy on validation images, %", 100, ["val_accuracy", "val_accuracy_ema"]),
              ("cross-entropy on validation images, nats", 1, ["val_loss", "val_loss_ema"]),
              ("mean D(x)", 1, ["monitor/p_real_unl", "monitor/p_real_fake"])]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (title, unit, columns) in zip(figure.subplots(1, 3), panels):
        for column in columns:
            points = [(row["step"], unit * row[column]) for row in rows if column in row]
            if points:
                axes.plot(*zip(*points), marker=".", label=column.removeprefix("monitor/"))
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    save_figure(figure, path)


def plot_confusion(confusion: Tensor, class_names: list, path):
    """Confusion matrix (K, K), true class in rows: counts, shaded by their share of the row."""
    k = len(class_names)
    share = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(2 + 0.45 * k, 1.7 + 0.45 * k), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(k):
        for j in range(k):
            axes.text(j, i, int(confusion[i, j]), ha="center", va="center", fontsize=8,
                      color="white" if share[i, j] > 0.5 else "black")
    axes.set_xticks(range(k), class_names, rotation=90 if k > 5 else 0)
    axes.set_yticks(range(k), class_names)
    accuracy = 100 * confusion.trace().item() / max(1, confusion.sum().item())
    axes.set(xlabel="predicted", ylabel="true", title=f"{accuracy:.2f}% correct")
    save_figure(figure, path)


def errors_and_others(labels: Tensor, predicted: Tensor, num: int) -> Tensor:
    """Indices of num predictions to show: up to num/2 errors, then correct ones, evenly spread."""
    shown, room = [], num // 2
    for indices in ((predicted != labels).nonzero(), (predicted == labels).nonzero()):
        picks = torch.linspace(0, len(indices) - 1, min(room, len(indices))).long()
        shown.append(indices.flatten()[picks])
        room = num - len(shown[0])
    return torch.cat(shown)


def plot_predictions(images: Tensor, labels: Tensor, predicted: Tensor, class_names: list, path,
                     title=""):
    """A few images (N, C, H, W) in [0, 1], each under its predicted class; errors framed in red."""
    columns = 10
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(columns * 1.1, rows * 1.4 + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes in figure.subplots(rows, columns).flat:
        axes.axis("off")
    for axes, x, y, guess in zip(figure.axes, images.cpu(), labels.tolist(), predicted.tolist()):
        axes.imshow(x.permute(1, 2, 0).clamp(0, 1).float().squeeze(-1), cmap="gray")
        wrong = guess != y
        title = f"{class_names[guess]}, not {class_names[y]}" if wrong else class_names[guess]
        axes.set_title(title, fontsize=7, color="red" if wrong else "black")
        if wrong:
            axes.axis("on")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color="red", linewidth=3)
    save_figure(figure, path)
