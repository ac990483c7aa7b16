"""What the four scripts share: the log-sum-exp loss, the DALI image loader, and evaluation.

With the loader go the check of image files and what several processes need; with evaluation the
draw of labels, the record of a run on disk, its checkpoints and its figures. There are no networks,
training steps or hyper-parameters here: those stand in the scripts, where they are read.

Notation: l(x) are the K logits of the classifier, Z(x) = sum_k exp l_k(x), and the classifier is
also the discriminator D(x) = Z / (Z + 1) (Salimans et al. 2016, arXiv:1606.03498, section 5).
"""

import atexit
import contextlib
import csv
import fcntl
import functools
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.utils import save_image
from tqdm import tqdm

# ==================================== the log-sum-exp loss =======================================
# A (K+1)-way softmax whose extra logit, "fake", is fixed at 0 says p(fake | x) = 1 / (Z + 1). So
# with r(x) = log Z(x): D(x) = sigmoid(r), -log D(x) = softplus(-r), -log(1 - D(x)) = softplus(r),
# and p(y | x, real) = exp l_y / Z is the ordinary softmax. Under autocast, too, nothing is computed
# in less than float32; logsumexp and softplus and their gradients stay finite at logits of +-1e4.


def float32_at_least(x: Tensor) -> Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay."""
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


# ========================================= several processes ======================================
# `torchrun --nproc-per-node N script.py` starts N processes; without torchrun all of this is of no
# effect. Every process draws the same random numbers for the whole batch and takes its share.


def start_processes(device_name: str):
    """(rank, number of processes): joins those that torchrun started, one GPU each on CUDA."""
    if "RANK" not in os.environ:
        return 0, 1
    if device_name != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # gloo for CPU tensors, NCCL for CUDA tensors
    atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


class _MeanOverProcesses(torch.autograd.Function):
    """Both ways the mean: with gradients averaged as well, the loss is the mean of all losses."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    backward = forward


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of x over all processes, differentiable; x itself where there is one."""
    return _MeanOverProcesses.apply(x) if dist.is_initialized() else x


def from_all_processes(x: Tensor) -> Tensor:
    """The rows of x of all processes, (N, ...) -> (processes * N, ...); x where there is one."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def average_gradients(network: nn.Module):
    """Replace the gradient of each parameter by its mean over all processes."""
    if dist.is_initialized():
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        mean = mean_over_processes(torch.cat([g.flatten() for g in gradients]))
        for g, part in zip(gradients, mean.split([g.numel() for g in gradients])):
            g.copy_(part.view_as(g))


def stop_signal() -> threading.Event:
    """An event that SIGINT (Ctrl-C) or SIGTERM sets; a second signal ends the process at once."""
    event, signals = threading.Event(), (signal.SIGINT, signal.SIGTERM)

    def request(number, frame):
        event.set()
        for each in signals:
            signal.signal(each, signal.SIG_DFL)

    for each in signals:
        signal.signal(each, request)
    return event


def in_any_process(*flags: bool) -> list:
    """Of each flag whether it is set in any process; all get the same answers, without the GPU."""
    return (mean_over_processes(torch.tensor(flags, dtype=torch.float32)) > 0).tolist()


def same_everywhere(values) -> bool:
    """Whether all processes have the same list of strings, numbers or the like."""
    digest = torch.tensor(float(zlib.crc32(repr(values).encode(errors="replace"))),
                          dtype=torch.float64)
    return mean_over_processes(digest).item() == digest.item()


def random_state() -> dict:
    """The state of torch's random numbers, of the CPU and of this process's GPU."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict):
    """What random_state() returned; that of a GPU is passed over where there is none."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ==================================== image files, checked ========================================
# One file that DALI cannot decode ends its pipeline, so every file is decoded once before.

DALI_FORMATS = {"JPEG", "MPO", "PNG", "BMP", "TIFF", "PPM", "JPEG2000", "WEBP"}  # MPO: phones' JPEG
LITTER = {"thumbs.db", "desktop.ini"}  # of operating systems; hidden files are passed over too


def why_unusable(path):
    """The reason in a few words why an image file cannot be decoded, None if it can.

    What Pillow decodes whole, checksums included, DALI was seen to decode. A JPEG is read to its
    end at an eighth of its size, which takes a third of the time.
    """
    try:
        str(path).encode()  # fails for names that are not UTF-8
        if path.stat().st_size == 0:
            return "empty"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images
            with Image.open(path) as image:
                if image.format not in DALI_FORMATS:
                    return f"{image.format}, which DALI does not decode"
                if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                    return "several frames or pages"
                image.verify()
            with Image.open(path) as image:  # nothing can be read after verify()
                image.draft("RGB", (64, 64))
                image.load()
    except Image.UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # Pillow raises many kinds for a damaged file
        return f"cannot be read: {error}"


def check_images(folder, flag: str):
    """(images, reason by unusable file) anywhere below a folder, links followed, sorted by name.

    Errors: exit status 2, naming the flag, if there is no such folder or no file in it, or if more
    than half of its files are unusable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        die(f"{flag} {folder} is not a folder: name one that holds images (--prepare and "
            "--download make those for training)")
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:  # by another link, maybe of a folder to its parent
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(parent, name) for name in names
                  if not name.startswith(".") and name.lower() not in LITTER]
    files.sort()
    if not files:
        die(f"{flag} {folder} holds no files")
    with ThreadPoolExecutor() as pool:
        reasons = list(tqdm(pool.map(why_unusable, files), f"checking {folder}", len(files),
                            disable=None, leave=False))
    unusable = {path: reason for path, reason in zip(files, reasons) if reason}
    if 2 * len(unusable) > len(files):
        die(f"{len(unusable)} of {len(files)} files in {flag} {folder} cannot be used"
            + listing(unusable))
    return [path for path in files if path not in unusable], unusable


def listing(unusable: dict) -> str:
    """A line for each unusable file, of the first 20."""
    lines = [f"\n  {path}: {reason}" for path, reason in list(unusable.items())[:20]]
    return ":" + "".join(lines) + ("\n  ..." if len(unusable) > 20 else "")


def class_of(path, folder) -> str:
    """The class of a labeled image: its subfolder, or else the letters that begin its name."""
    relative = path.relative_to(folder)
    if len(relative.parts) > 1:
        return relative.parts[0]
    letters = re.match(r"[^\W\d_]+", path.name)  # cat.12.jpg, dog_7.jpg, cat3.jpg
    if not letters:
        die(f"{path} has no class: put it in a subfolder, or begin its name with the class")
    return letters[0]


def names_of(classes, folder, flag: str) -> list:
    """The names, sorted, of the classes of a folder's images. Errors: exit status 2, naming the
    flag, if there is one only, as when the folder is one too high."""
    names = sorted(set(classes))
    if len(names) < 2:
        die(f"{flag} {folder} holds one class only ({names[0]}): at least two are needed; name the "
            "folder right above their subfolders, or that of files like cat.0.jpg and dog.0.jpg")
    return names


def check_labeled(folder, flag: str, class_names=None):
    """(images, class index of each, class names, reason by unusable file) of a labeled folder.

    Without class_names it is the folder to learn from: its classes are the classes, every file must
    be usable and every subfolder hold an image. Otherwise only classes of these names may occur.
    Errors: exit status 2, naming the flag.
    """
    images, unusable = check_images(folder, flag)
    classes = [class_of(path, folder) for path in images]
    if class_names is None:
        if unusable:
            die(f"each file in {flag} {folder} must be an image; repair or remove"
                + listing(unusable))
        empty = [d.name for d in Path(folder).iterdir() if d.is_dir() and d.name not in classes
                 and not d.name.startswith(".")]
        if empty:
            die(f"class {empty[0]} in {flag} {folder} has no image")
        class_names = names_of(classes, folder, flag)
    unknown = sorted(set(classes) - set(class_names))
    if unknown:
        die(f"class {unknown[0]} in {flag} {folder} has no labeled image: the classes are "
            f"{', '.join(class_names)}")
    return images, [class_names.index(c) for c in classes], class_names, unusable


def same_bytes(held_out, training) -> dict:
    """held-out file -> a training file of the same bytes: such images make a score too good."""
    digest = functools.cache(lambda path: hashlib.sha256(path.read_bytes()).digest())
    by_size, leaks = {}, {}
    for path in training:
        by_size.setdefault(path.stat().st_size, []).append(path)
    for path in held_out:
        for other in by_size.get(path.stat().st_size, []):
            if digest(other) == digest(path):
                leaks[path] = other
                break
    return leaks


def fetch_archive(url, inner, folder):
    """Fetch a .zip and make its folder `inner` the given one, whole or not at all.

    Does nothing if that is there already. Errors: exit status 2, naming --download, if it fails.
    """
    folder = Path(folder)
    if folder.is_dir():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
            download_and_extract_archive(url, folder.parent, unpacked)
            os.replace(Path(unpacked, inner), folder)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        die(f"--download could not fetch and unpack {url} in {folder.parent} ({error}): "
            "remove what is there of it, and try again")


# ====================================== image files with DALI =====================================


def _order(count, batch_size, shuffle_seed, drop_last, shard_id, num_shards, first_batch):
    """Indices of the images that a loader gives, for the arguments of dali_loader."""
    order = np.arange(count)
    if shuffle_seed is not None:
        order = np.random.default_rng(shuffle_seed).permutation(order)
    if drop_last:
        order = order[: count // (num_shards * batch_size) * num_shards * batch_size]
    return order[first_batch * num_shards * batch_size:][shard_id::num_shards]


def dali_loader(files, labels, batch_size, image_size, device, shuffle_seed=None, drop_last=False,
                shard_id=0, num_shards=1, first_batch=0):
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
        first_batch: begin there, as if the batches before it had been taken.
    Returns:
        an iterator of (images (N, 3, S, S) float32 in [0, 1], labels (N,) int64) on `device`.
        Decoding of the first batches begins with the call and runs ahead of the training.
    """
    try:
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
    except ImportError:
        die("NVIDIA DALI is not installed: `pip install nvidia-dali-cuda120` (Linux only)")

    order = _order(len(files), batch_size, shuffle_seed, drop_last, shard_id, num_shards,
                   first_batch)
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


def decode_all(files, image_size, device) -> Tensor:
    """All images as dali_loader gives them, but as (N, 3, S, S) uint8, on `device`."""
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8, device=device)
    others = dist.is_initialized() and dist.get_rank() > 0  # only the first process shows a bar
    progress = tqdm(total=len(files), desc="decoding", leave=False, disable=others or None)
    for x, indices in dali_loader(files, None, 64, image_size, device):
        images[indices] = (x * 255).round().byte()
        progress.update(len(x))
    progress.close()
    return images


def cached_loader(images, batch_size, shuffle_seed=None, drop_last=False, shard_id=0,
                  num_shards=1, first_batch=0):
    """As dali_loader without labels, for images (N, 3, S, S) uint8 that are decoded already."""
    order = _order(len(images), batch_size, shuffle_seed, drop_last, shard_id, num_shards,
                   first_batch)
    if len(order) == 0:
        return iter(())
    batches = torch.from_numpy(order).to(images.device).split(batch_size)
    return ((images[indices] / 255, indices) for indices in batches)


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


def draw_folders(images, classes, targets, sizes, seed: int):
    """The same for image files: draw them into new folders, of links or, without these, of copies.

    Args: images (paths) and the class of each; the folders to make, the last one for unlabeled
    images under neutral names, the others with a subfolder for each class; how many images of each
    class go to each but the last, which gets the rest; the seed of the draw.
    Each folder appears whole or not at all. The images of the first one are listed beside it with
    the seed, of "labeled" in labeled.json.
    Errors: exit status 2 if a class has too few images.
    """
    rng = np.random.default_rng(seed)
    drawn = {target: [] for target in targets}
    for name in sorted(set(classes)):
        members = [path for path, of in zip(images, classes) if of == name]
        if len(members) <= sum(sizes):
            die(f"class {name} has {len(members)} images in {os.path.commonpath(images)}: more "
                f"than {sum(sizes)} are needed to draw labeled, validation and test images and "
                "leave some unlabeled")
        members = np.array([members[i] for i in rng.permutation(len(members))])
        for target, chosen in zip(targets, np.split(members, np.cumsum(sizes))):
            drawn[target] += [(name, path) for path in chosen]
    rng.shuffle(drawn[targets[-1]])
    for target in targets:
        tmp = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        for n, (name, path) in enumerate(drawn[target]):
            neutral = target == targets[-1]
            copy = tmp / f"{n:05d}{path.suffix}" if neutral else tmp / name / path.name
            if os.path.lexists(copy):  # of that name in another subfolder
                copy = copy.with_name(f"{n:05d}-{path.name}")
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                copy.symlink_to(path.resolve())
            except OSError:
                shutil.copyfile(path, copy)
        tmp.rename(target)
        print(f"{target}: {len(drawn[target])} images")
    source = os.path.commonpath(images)
    files = sorted(os.path.relpath(path, source) for _, path in drawn[targets[0]])
    with atomic(_draw_record(targets[0])) as tmp:
        tmp.write_text(json.dumps({"split_seed": seed, "source": source, "files": files},
                                  indent=1) + "\n")


def _draw_record(folder) -> Path:
    return Path(folder).with_name(Path(folder).name + ".json")


def drawn_by(folder, num_images):
    """The seed by which draw_folders drew as many images into a folder, None if it did not."""
    try:
        record = json.loads(_draw_record(folder).read_text())
        return int(record["split_seed"]) if len(record["files"]) == num_images else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
    """`with atomic(path) as tmp:` write to tmp; path then appears whole, or is left as it was.

    Its folder is made if it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def load_checkpoint(path, flag: str, keys=()) -> dict:
    """What Run.save has saved, on the CPU. Errors: exit status 2, naming the flag, if there is no
    such file, if it is damaged, or if one of the keys is missing in it."""
    if not Path(path).is_file():
        die(f"{flag}: there is no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        die(f"{flag}: {path} is damaged or no checkpoint ({type(error).__name__})")
    if not (isinstance(state, dict) and set(keys) <= set(state)):
        die(f"{flag}: {path} is another kind of checkpoint: it has no {', '.join(keys)}")
    return state


def load_state(part, state: dict, path, flag: str):
    """Give a network the weights of a checkpoint, or an optimiser its moments. Errors: exit status
    2, naming the flag and the checkpoint's path, if they are of another network."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError):  # of networks, of optimisers
        die(f"{flag}: {path} was written by a script with other networks; use that one")


_locked = []  # files that stay open and locked until this process ends


def lock_run(folder):
    """From now on no other process may resume the run in a folder: both would write its files.

    To close another handle of the locked file, args.json, would end the lock: leave it alone.
    Errors: exit status 2 if another process has the lock.
    """
    try:
        file = open(Path(folder, "args.json"), "r+")
    except OSError:
        return  # there is no run; load_checkpoint will say so
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # either is what systems answer
        die(f"--resume {folder}: another process is still at work on that run")
    except OSError:
        return  # a file system without locks
    _locked.append(file)


def run_to_resume(folder, parser):
    """(checkpoint, args) of the unfinished run in a folder, whose flags become the parser's
    defaults.

    Errors: exit status 2 if there is no whole checkpoint of such a run, if another process is still
    at work on it, or if a flag was given that is not the run's.
    """
    if int(os.environ.get("RANK", 0)) == 0:  # the one process that writes
        lock_run(folder)
    checkpoint = load_checkpoint(Path(folder, "last.pt"), "--resume", ["args", "step"])
    if checkpoint["best_val"] >= 0 and not Path(folder, "best.pt").exists():
        die(f"--resume {folder}: best.pt is missing there, which belongs to last.pt")
    parser.set_defaults(**checkpoint["args"])
    args = parser.parse_args()
    for name, given in vars(args).items():
        value = parser.get_default(name)
        if given != value and name != "resume":
            die(f"--resume {folder}: that run has --{name.replace('_', '-')} {value}, not "
                f"{given}; leave the flag out, or start a new run")
    return checkpoint, args


def write_csv(path, rows: list):
    """rows: dictionaries, column -> value; a column that a row does not have stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=dict.fromkeys(k for row in rows for k in row))
    writer.writeheader()
    writer.writerows(rows)
    with atomic(path) as tmp:  # a file's name may be no UTF-8
        tmp.write_text(text.getvalue(), encoding="utf-8", errors="backslashreplace")


class Run:
    """The folder of one run, `out_dir/name__time/`: args.json, metrics.csv, checkpoints, results.

    name: what was run, e.g. "sgan_mnist__n100__split0__seed0"; config: all flags, for args.json and
    results.json. resume: the folder of a run that goes on, with the rows of metrics.csv so far;
    out_dir and name then do not count.
    Every file is written whole or not at all.
    """

    def __init__(self, out_dir, name: str, config: dict, rows=(), resume=None):
        self.config, self.rows = dict(config), list(rows)  # as given: a dry run changes some
        if resume:
            self.dir = Path(resume)
            for left in self.dir.glob(".*.tmp"):  # half-written when the run was killed
                left.unlink()
            return
        stamp = f"{name}__{time.strftime('%Y%m%d-%H%M%S')}"
        for attempt in range(100):  # two runs may begin in the same second
            self.dir = Path(out_dir) / (f"{stamp}-{attempt}" if attempt else stamp)
            try:
                self.dir.mkdir(parents=True)
                break
            except FileExistsError:
                continue
            except OSError as error:
                die(f"--out-dir {out_dir} cannot be written: {error.strerror}")
        with atomic(self.dir / "args.json") as tmp:
            tmp.write_text(json.dumps(config, indent=2, default=str) + "\n")
        lock_run(self.dir)

    def log(self, row: dict):
        """Add one evaluation to metrics.csv; row: column -> number, empty where a row has none."""
        self.rows.append(row)
        write_csv(self.dir / "metrics.csv", self.rows)

    def warn(self, filename: str, columns, found: dict, what: str):
        """Where anything was found, print one line, and list it all under the two columns."""
        if found:
            write_csv(self.dir / filename, [dict(zip(columns, pair)) for pair in found.items()])
            print(f"warning: {len(found)} {what}: see {self.dir / filename}")

    def save(self, filename: str, state: dict):
        """Save a checkpoint of tensors, numbers and strings (`torch.load(weights_only=True)`).

        Errors: exit status 1 if it cannot be written; the file of that name is then as it was.
        """
        try:
            with atomic(self.dir / filename) as tmp:
                torch.save(state, tmp)
        except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
            raise SystemExit(f"stopped: {self.dir / filename} cannot be written ({error}); what "
                             "was saved before is kept")

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
        """name -> mean since the last call, over all processes, as float; starts anew."""
        self.check()
        means = mean_over_processes(torch.stack(self.values).mean(dim=0)).tolist()
        self.steps, self.values, self.checked = [], [], 0
        return dict(zip(self.names, means))

    def state_dict(self) -> dict:
        """For a checkpoint; of several processes each must call it, and gets the means over all."""
        self.check()  # nothing that is not finite goes into a checkpoint
        values = list(mean_over_processes(torch.stack(self.values))) if self.values else []
        return {**vars(self), "values": values}

    def load_state_dict(self, state: dict, device):
        vars(self).update(state, values=[value.to(device) for value in state["values"]])


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
        figure.savefig(tmp, format="png", dpi=100)


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
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
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
    wrong = (predicted.cpu() != labels.cpu()).tolist()
    captions = [class_names[guess] + (f", not {class_names[y]}" if framed else "")
                for guess, y, framed in zip(predicted.tolist(), labels.tolist(), wrong)]
    plot_images(images, captions, path, title, wrong)


def write_predictions(folder, files, probabilities: Tensor, p_real, class_names: list, image_size,
                      device):
    """predictions.csv, the least certain first, and contact_sheet.png, the least and the most
    certain images of each class.

    Args: the folder to write to; the paths of N images; their p(y | x) (N, K) and D(x) (N,), on the
    CPU, None in place of D if it was not trained; image_size and device to load the ones shown.
    """
    sureness, predicted = probabilities.max(dim=1)
    order = sureness.argsort()
    rows = []
    for i in order.tolist():
        rows.append({"file": files[i], "class": class_names[predicted[i]],
                     "probability": f"{sureness[i]:.4f}"})
        if p_real is not None:
            rows[-1]["looks_like_training"] = f"{p_real[i]:.4f}"
    write_csv(folder / "predictions.csv", rows)

    few = max(1, min(10, 100 // len(class_names)))
    shown = []
    for k in range(len(class_names)):
        of_class = order[predicted[order] == k].tolist()
        shown += of_class[:few] + of_class[few:][-few:]
    images, _ = next(dali_loader([files[i] for i in shown], None, len(shown), image_size, device))
    plot_images(images, [f"{class_names[predicted[i]]} {sureness[i]:.1%}" for i in shown],
                folder / "contact_sheet.png", "of each class the least and the most certain")
    counts = predicted.bincount(minlength=len(class_names)).tolist()
    print(", ".join(f"{n} {name}" for n, name in zip(counts, class_names))
          + f": {folder / 'predictions.csv'}")


def plot_images(images: Tensor, captions: list, path, title="", wrong=()):
    """A few images (N, C, S, S) in [0, 1] under their captions; those that are wrong framed red.

    All stand in one system of axes, as one for each image takes several times as long to draw.
    """
    columns, row_height = 10, 1.25  # a row is an image of height 0.9 and its caption
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(1.1 * columns, 1.1 * row_height * rows + 0.3), layout="constrained")
    axes = figure.subplots()
    wrong = [*wrong, *[False] * (len(images) - len(wrong))]
    for n, (x, caption, framed) in enumerate(zip(images.cpu(), captions, wrong)):
        left, top = n % columns + 0.05, n // columns * row_height + 0.3
        axes.imshow(x.permute(1, 2, 0).clamp(0, 1).float().squeeze(-1).numpy(), cmap="gray",
                    vmin=0, vmax=1, extent=(left, left + 0.9, top + 0.9, top))
        color = "red" if framed else "black"
        axes.text(left + 0.45, top - 0.07, caption, fontsize=7, color=color, ha="center")
        if framed:
            axes.add_patch(Rectangle((left, top), 0.9, 0.9, fill=False, color=color, linewidth=3))
    axes.axis("off")
    axes.set(xlim=(0, columns), ylim=(rows * row_height, 0))
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)
