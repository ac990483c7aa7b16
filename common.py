"""What the scripts share: the log-sum-exp loss, the DALI loader, and evaluation.

Image files and the DALI loader are for photos. Networks, training loops and hyper-parameters are in
the scripts.

Notation: l(x) are the K logits of the classifier and Z(x) = sum_k exp l_k(x). The classifier is
also the discriminator D(x) = Z / (Z + 1) (Salimans et al. 2016, arXiv:1606.03498, section 5).
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import re
import resource
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import islice
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

# ==================================== the log-sum-exp loss =======================================
# Take a softmax of K+1 classes whose last logit, "fake", is fixed at 0. With r(x) = log Z(x):
#     D(x) = 1 - p(fake | x) = Z / (Z + 1) = sigmoid(r)
#     -log D(x) = softplus(-r)
#     -log(1 - D(x)) = softplus(r)
#     p(y | x, real) = exp l_y / Z, the ordinary softmax
# All is computed in float32 at least, under autocast too. It stays finite at logits of +-1e4.


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


# ===================================== the command line, and device ===============================


def die(message: str):
    """Refuse bad input: print `error: message` on stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def say(*words, file=None):
    """Print a line at once, on stdout or on the file given; of several processes the first does.

    Characters that the output's encoding lacks are escaped. If nobody reads it any more, as after
    `| head`, the run goes on and prints nowhere.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    line = " ".join(map(str, words)).encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(line, file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def run_script(main):
    """Call a script's main(). Ctrl-C or a file that cannot be read or written ends it in a line."""
    try:
        main()
    except OSError as error:
        raise SystemExit(f"stopped: {error}") from None
    except KeyboardInterrupt:
        say("\nstopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None


def number(kind, *, minimum=-math.inf, above=-math.inf, maximum=math.inf, below=math.inf):
    """A `type=` for argparse: `number(int, minimum=1)` accepts whole numbers from 1 on.

    kind is int or float. A value outside the bounds, infinite or NaN is refused, naming the flag.
    """
    def parse(text):
        value = kind(text)
        if not (minimum <= value <= maximum and above < value < below and abs(value) < math.inf):
            bounds = {"at least": minimum, "above": above, "at most": maximum, "below": below}
            words = [f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound)]
            raise argparse.ArgumentTypeError(f"it must be {' and '.join(words)}, but is {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value" of what is no number
    return parse


def pick_device(name: str) -> torch.device:
    """"auto", "cpu" or "cuda" -> device. "auto" takes the GPU if there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        die("--device cuda was asked for, but torch finds no CUDA GPU: use --device cpu or auto")
    cuda = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def multiplies_in_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32: on CPUs with AMX, and on AMD's with avx512_bf16.

    An Intel Xeon with avx512_bf16 but without AMX took twice as long as in float32. Others emulate.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    cpu = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "amx_bf16" in cpu or ("avx512_bf16" in cpu and "AuthenticAMD" in cpu)


def bf16_autocast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where that is faster; otherwise a context without effect.

    It is for networks alone. Do not augment under it: coordinates in bfloat16 are too coarse.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_in_bf16(device))


def balanced_split(labels: Tensor, num_labeled: int, num_val: int, num_classes: int, seed: int):
    """Draw a class-balanced labeled set and a random validation set; the rest stays unlabeled.

    Args: labels (N,) int64 of all training images; the two sizes; the seed of the draw.
    Returns: index tensors (labeled, validation, unlabeled), disjoint, together all N. If a class
    is smaller than its share, all of it is labeled and random others fill the gap. Validation is
    drawn from the rest; num_val does not change what is labeled.
    Exits with status 2 if num_labeled is no positive multiple of num_classes, if it is more than N,
    or if a class has no image.
    """
    if num_labeled <= 0 or num_labeled % num_classes:
        die(f"--num-labeled must be a positive multiple of the {num_classes} classes, "
            f"but it is {num_labeled}")
    if num_labeled > len(labels):
        die(f"--num-labeled is {num_labeled}, but there are only {len(labels)} to draw from")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    by_class = [order[labels[order] == k] for k in range(num_classes)]
    for k, members in enumerate(by_class):
        if len(members) == 0:
            die(f"class {k} has no training image, so none can be labeled")

    def all_but(chosen):  # the other indices, in the order drawn
        return order[~torch.isin(order, chosen)]

    labeled = torch.cat([members[: num_labeled // num_classes] for members in by_class])
    labeled = torch.cat([labeled, all_but(labeled)[: num_labeled - len(labeled)]])
    rest = all_but(labeled)
    return labeled, rest[:num_val], rest[num_val:]


# ================================== image files, and the DALI loader ==============================
# NVIDIA DALI decodes JPEG and PNG of 8 bits, Pillow all other kinds. One file that cannot be
# decoded would end a run, so every file is decoded once beforehand.

# Names of folders that are hidden, or that systems leave beside photos.
PASSED_OVER = (r"\..*|\$recycle\.bin|#recycle|#snapshot|@eadir|@recycle|@tmp|__macosx|lost\+found|"
               "recycler|system volume information")
OTHER_PHOTOS = {".heic", ".heif", ".jxl", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}
SPLIT_NAME = r"(train|test|val|valid|validation|dev|eval)(ing|ation)?([ _-]?(set|data))?[ _-]?\d*"
warnings.filterwarnings("ignore", module="PIL")  # of large images, and of transparency
warnings.filterwarnings("ignore", "Glyph")  # a letter that matplotlib's font lacks


@functools.cache  # it is asked in each pass
def decoded_by_dali(path) -> bool:
    """Whether a file is a PNG of 8 bits a channel, or a JPEG without stray bytes in its head."""
    with open(path, "rb") as file:  # only the head is read: it may be a film
        head = file.read(25)
        if not head.startswith(b"\xff\xd8"):
            return head.startswith(b"\x89PNG\r\n\x1a\n") and head[24:] == b"\x08"
        file.seek(2)
        while file.read(1) == b"\xff":  # a segment: fill bytes, its kind, its length and content
            while (kind := file.read(1)) == b"\xff":
                pass
            if kind == b"\xda":  # the pixels follow
                return True
            file.seek(int.from_bytes(file.read(2), "big") - 2, os.SEEK_CUR)
    return False


def bytes_for_dali(path) -> np.ndarray:
    """An image file as bytes that DALI decodes. Raises an exception if Pillow cannot decode it.

    What is neither a JPEG nor a PNG of 8 bits becomes a PPM file, upright, in RGB of 8 bits: 16
    bits of grey are divided by 257, and transparency is dropped.
    """
    if decoded_by_dali(path):
        return np.fromfile(path, np.uint8)
    with Image.open(path) as image:
        kind = image.format
        if kind == "EPS":
            raise ValueError("EPS is a program, and is not run")
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("several frames or pages")
        tags = image.tag_v2 if kind == "TIFF" else {}
        bits, white_is_zero, in_planes = tags.get(258, ()), tags.get(262) == 0, tags.get(284) == 2
        if 12 in bits or set(tags.get(339, (1,))) != {1} or (  # 339: signed or not
                16 in bits and (white_is_zero or in_planes)):
            raise ValueError("a rare kind of TIFF: save it anew, in 8 bits a channel")
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("more than 16 bits a channel")
    ppm = io.BytesIO()
    image.convert("RGB").save(ppm, "PPM")
    return np.frombuffer(ppm.getbuffer(), np.uint8)


def why_unusable(path):
    """Why an image file cannot be used, in a few words; None if it can.

    It is decoded as in training, but a JPEG at an eighth of its size. That reads all of it, too.
    """
    try:
        str(path).encode()
        if path.stat().st_size == 0:
            return "empty"
        if not decoded_by_dali(path):
            bytes_for_dali(path)
            return None
        with Image.open(path) as image:
            if image.format == "PNG" and b"IEND\xaeB`\x82" not in path.read_bytes():
                return "cannot be read: its end is missing"
            image.verify()
        with Image.open(path) as image:  # nothing can be read after verify()
            image.draft("RGB", (64, 64))
            image.load()
    except UnicodeEncodeError:
        return "its name is not UTF-8: rename it"
    except UnidentifiedImageError:
        return "not an image" + (" that Pillow reads: convert it to JPEG"
                                 if path.suffix.lower() in OTHER_PHOTOS else "")
    except Exception as error:  # Pillow raises many kinds for a damaged file
        return f"cannot be read: {error}"


def check_images(folder, flag: str):
    """All image files below a folder -> (usable paths, sorted; {unusable path: reason}).

    Links are followed. Passed over are hidden files, some folders, and files that are images
    neither by content nor by ending; a line says how many. Exits with status 2 and the flag's name
    if the folder is missing, unreadable or without images, or if most of them are unusable.
    """
    def refuse(error):
        die(f"{flag} {folder}: the folder {error.filename} cannot be read ({error.strerror}); make "
            "it readable, or move it elsewhere")

    dali_loader([], None, 1, 1, torch.device("cpu"))  # so that it exits now if there is no DALI
    folder = Path(folder)
    if not os.path.isdir(folder):
        die(f"{flag} {folder} is not a folder: name a folder that holds images (--prepare and "
            "--download make the four folders for training)")
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if os.path.realpath(parent) in seen:  # another link leads here, maybe one to a parent
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders
                            if not re.fullmatch(PASSED_OVER, name, re.IGNORECASE))
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    files.sort()
    if len(files) > 5000:  # progress is shown on a terminal only
        say(f"checking {len(files)} files in {flag} {folder} ...")
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:  # each holds a decoded image
        reasons = list(tqdm(pool.map(why_unusable, files), f"checking {folder}", len(files),
                            disable=None, leave=False))
    usable, unusable, others = [], {}, Counter()  # others: how many of each ending are no images
    for path, reason in zip(files, reasons):
        ending = path.suffix.lower()
        if not reason:
            usable.append(path)
        elif reason in ("not an image", "empty") and ending not in Image.registered_extensions():
            others[ending or "without ending"] += 1
        else:
            unusable[path] = reason
    if others:
        endings = ", ".join(f"{n} {ending}" for ending, n in others.most_common(10))
        say(f"{flag} {folder}: {others.total()} files are no images and are passed over: {endings}")
    if not usable and not unusable:
        die(f"{flag} {folder} holds no images")
    if len(unusable) > len(usable):
        die(f"{len(unusable)} of {len(usable) + len(unusable)} images in {flag} {folder} cannot be "
            "used" + listing(unusable))
    return usable, unusable


def listing(unusable: dict) -> str:
    """The first 20 unusable files with their reasons, a line each, to end a message with."""
    lines = [f"\n  {path}: {reason}" for path, reason in list(unusable.items())[:20]]
    return ":" + "".join(lines) + ("\n  ..." if len(unusable) > 20 else "")


def classes_of(images, folder, flag: str, at_least=1) -> list:
    """The class of each labeled image: its subfolder, or else its name without numbers at the end.

    american_bulldog_1.jpg is of class american_bulldog; cat.12.jpg, cat (7).jpg, cat3.jpg and
    cat.8 (1).jpg are of class cat. Exits with status 2 if only some images are in subfolders, if a
    name is but a number, if there are fewer classes than at_least, or if the subfolders are named
    like the parts of a data set.
    """
    loose = [path for path in images if path.parent == Path(folder)]
    if 0 < len(loose) < len(images):
        die(f"{flag} {folder} holds subfolders of images, and beside them images such as "
            f"{loose[0]}: move these into the subfolder of their class, or elsewhere")
    if loose:
        classes = [re.sub(r"(?:[\s._-]*+(?:\d++|\(\d+\)))++$", "", path.stem) for path in images]
    else:
        classes = [path.relative_to(folder).parts[0] for path in images]
    names = sorted(set(classes))
    if "" in names:
        die(f"{images[classes.index('')]} has no class: put it in a subfolder, or begin its name "
            "with the class")
    if len(names) < at_least:
        die(f"{flag} {folder} holds one class only ({names[0]}): at least two are needed; name "
            "a folder with a subfolder for each class, or with files like cat.0.jpg, dog.0.jpg")
    if len(names) > 1 and all(re.fullmatch(SPLIT_NAME, name, re.IGNORECASE) for name in names):
        die(f"{flag} {folder} holds the parts of a data set, {' and '.join(names)}, which are no "
            f"classes: name one of them, such as {flag} {Path(folder, names[-1])}")
    return classes


def check_labeled(folder, flag: str, class_names=None, strict=True):
    """A labeled folder -> (paths, class index of each, class names, {unusable path: reason}).

    Without class_names the folder defines the classes, two at least, and if strict every image in
    it must be usable. With class_names, as for validation and test, other classes are refused.
    Prints how many images of each class there are. Exits with status 2 and the flag's name on bad
    input.
    """
    images, unusable = check_images(folder, flag)
    if class_names is None and unusable and strict:
        die(f"each file in {flag} {folder} must be an image; repair or remove" + listing(unusable))
    classes = classes_of(images, folder, flag, at_least=2 if class_names is None else 1)
    if class_names is None:
        empty = [d.name for d in Path(folder).iterdir() if d.is_dir() and d.name not in classes
                 and not re.fullmatch(PASSED_OVER, d.name, re.IGNORECASE)]
        if empty and images[0].parent != Path(folder):
            die(f"class {empty[0]} in {flag} {folder} has no image")
        class_names = sorted(set(classes))
    unknown = sorted(set(classes) - set(class_names))
    if unknown:
        die(f"class {unknown[0]} in {flag} {folder} has no labeled image: the classes are "
            f"{', '.join(class_names)}")
    counts = {name: classes.count(name) for name in class_names}
    say(f"{flag} {folder}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    if 0 in counts.values():
        lacking = ", ".join(name for name, n in counts.items() if n == 0)
        say(f"warning: {flag} {folder} has no image of {lacking}")
    return images, [class_names.index(name) for name in classes], class_names, unusable


def same_bytes(files) -> list:
    """Groups of two or more files that are equal byte for byte, each in the order given.

    A file is read once, and only if another one has its size.
    """
    by_size, by_content = {}, {}
    for path in files:
        by_size.setdefault(path.stat().st_size, []).append(path)
    for alike in by_size.values():
        for path in alike if len(alike) > 1 else ():
            by_content.setdefault(digest(path), []).append(path)
    return [group for group in by_content.values() if len(group) > 1]


@functools.cache
def digest(path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def dali_loader(files, labels, batch_size, image_size, device):
    """One pass over image files, in order, with NVIDIA DALI.

    Args: N paths; N class indices, or None to get each file's position instead; the side S to which
    images are resized, whatever their shape; the device that resizes, and decodes what DALI can.
    Returns an iterator of (images (B, 3, S, S) float32 in [0, 1], labels (B,) int64) on `device`.
    The last batch may be smaller. Decoding starts with the call and runs ahead of the training.
    """
    try:
        from nvidia.dali import fn, pipeline_def, types
        from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
    except ImportError:
        die("NVIDIA DALI is not installed: `pip install nvidia-dali-cuda120` (Linux only)")
    if len(files) == 0:
        return iter(())
    labels = list(range(len(files)) if labels is None else labels)
    on_gpu = device.type == "cuda"
    threads = min(8, os.cpu_count())
    # at_once: photos that DALI decodes together, several times for a batch. On a CPU they are few,
    # as one of 12 megapixels takes 36 MB. ahead: how many such parts wait, resized, for training.
    at_once = min(len(files), batch_size if on_gpu else math.gcd(batch_size, threads))
    # Prefetch less for small sets: after the last photo DALI starts over, and that work is wasted.
    ahead = max(1, min(max(2, batch_size // at_once), len(files) // at_once // 8))
    plain = all(map(decoded_by_dali, files))  # then DALI itself reads the files

    def other_kinds():  # of at_once files a time
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(files), at_once):
                part = slice(start, start + at_once)
                yield list(pool.map(bytes_for_dali, files[part])), np.array(labels[part])[:, None]

    @pipeline_def(batch_size=at_once, num_threads=threads, prefetch_queue_depth=ahead,
                  device_id=device.index if on_gpu else None)
    def pipeline():
        if plain:
            encoded, y = fn.readers.file(files=[str(path) for path in files], labels=labels,
                                         pad_last_batch=True, name="reader")
        else:
            encoded, y = fn.external_source(source=other_kinds, num_outputs=2)
        # colours are interpolated on a GPU as they are on a CPU: small photos differ much otherwise
        x = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB,
                              jpeg_fancy_upsampling=True)
        x = fn.resize(x, resize_x=image_size, resize_y=image_size)
        x = fn.crop_mirror_normalize(x, dtype=types.FLOAT, output_layout="CHW",
                                     mean=[0.0] * 3, std=[255.0] * 3)
        return x, (y.gpu() if on_gpu else y)

    # PARTIAL with a padded reader: the last part is cut to the photos that are left
    iterator = DALIGenericIterator(pipeline(), ["x", "y"], reader_name="reader" if plain else None,
                                   last_batch_policy=LastBatchPolicy.PARTIAL)

    def batches():
        parts = (part[0] for part in iterator)
        while batch := list(islice(parts, batch_size // at_once)):
            yield (torch.cat([part["x"] for part in batch]),
                   torch.cat([part["y"] for part in batch]).squeeze(-1).long())

    return batches()


class Photos:
    """Image files and their labels, given in batches as often as asked.

    Decoded photos stay on the device as uint8 if they take at most cache_bytes; otherwise they are
    decoded anew in each pass. The images are the same up to half a step of 8 bits.
    Args: N paths; N class indices, or None to get each photo's index instead; the side S.
    Attributes: labels (N,) int64; images (N, 3, S, S) uint8, or None if they are not kept.
    """

    def __init__(self, files, labels, image_size, device, cache_bytes=0):
        self.files, self.image_size, self.device = files, image_size, device
        self.labels = torch.as_tensor(range(len(files)) if labels is None else labels,
                                      device=device)
        self.images = None
        if len(files) * 3 * image_size**2 <= cache_bytes:
            self.images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8,
                                      device=device)
            with tqdm(total=len(files), desc="decoding", leave=False, disable=None) as progress:
                for x, indices in dali_loader(files, None, 64, image_size, device):
                    self.images[indices] = (x * 255).round().byte()
                    progress.update(len(x))

    def batches(self, batch_size, order=None):
        """One pass: an iterator of (images (B, 3, S, S) float32 in [0, 1], labels (B,)).

        order: the indices of the photos to give, in that order; None gives all of them.
        """
        order = torch.as_tensor(range(len(self.files)) if order is None else order).long()
        if self.images is None:
            return dali_loader([self.files[i] for i in order],
                               self.labels[order.to(self.device)].tolist(), batch_size,
                               self.image_size, self.device)
        parts = order.to(self.device).split(batch_size) if len(order) else ()
        return ((self.images[i] / 255, self.labels[i]) for i in parts)


# ===================================== evaluation, record of a run ================================


@torch.no_grad()
def evaluate(classifier: nn.Module, batches, num_classes: int) -> dict:
    """Score a classifier in one pass over (images, labels (B,)) batches; each image counts once.

    classifier maps images to (logits (B, K), ...). It is put into eval mode and back.
    Returns {"accuracy": in [0, 1], "loss": mean cross-entropy in nats, "confusion": (K, K) int64
    counts with the true class in rows, "predicted": (N,) int64}. Without images accuracy and loss
    are NaN.
    """
    was_training = classifier.training
    classifier.eval()
    device = next(classifier.parameters()).device
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
    loss_sum, predicted = torch.zeros((), device=device), [torch.zeros(0, device=device).long()]
    for x, y in batches:
        if len(x) == 0:  # networks that normalise would warn
            continue
        logits = classifier(x)[0].float()  # (B, K)
        predicted.append(logits.argmax(dim=1))
        cell = y * num_classes + predicted[-1]  # (B,): row y, column prediction
        confusion.index_add_(0, cell, torch.ones_like(cell))
        loss_sum += F.cross_entropy(logits, y, reduction="sum")
    classifier.train(was_training)
    confusion = confusion.view(num_classes, num_classes).cpu()  # the device is read from here on
    count = confusion.sum().item() or float("nan")
    return {"accuracy": confusion.trace().item() / count, "loss": loss_sum.item() / count,
            "confusion": confusion, "predicted": torch.cat(predicted).cpu()}


@contextlib.contextmanager
def atomic(path):
    """`with atomic(path) as tmp:` write to tmp; then path appears whole, or stays as it was.

    A missing folder is made. If the file cannot be written, exits with status 1.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        with open(tmp, "rb") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as error:
        raise SystemExit(f"stopped: {path} cannot be written ({error.strerror}); what was saved "
                         "before is kept") from None
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)


def write_json(path, values: dict):
    """Write a dictionary as JSON; what JSON does not know, such as a path, becomes its text."""
    with atomic(path) as tmp:
        tmp.write_text(json.dumps(values, indent=2, default=str) + "\n")


class Run:
    """The folder of one run, out_dir/name__time: flags, metrics, checkpoints, results.

    name says what is run, e.g. "sgan_mnist__n100__split0__seed0". config holds all flags. resume is
    the folder of an earlier run that goes on, and rows are its metrics so far.
    """

    def __init__(self, out_dir, name: str, config: dict, resume=None, rows=()):
        self.config, self.rows = dict(config), list(rows)
        if resume:
            self.dir = Path(resume)
            for half_written in self.dir.rglob(".*.tmp"):  # by a process that was killed
                half_written.unlink()
            return
        stamp = f"{name}__{time.strftime('%Y%m%d-%H%M%S')}"
        for ending in ("", *(f"-{n}" for n in range(1, 100))):  # for runs of the same second
            self.dir = Path(out_dir, stamp + ending)
            with contextlib.suppress(FileExistsError):
                self.dir.mkdir(parents=True)
                break
        write_json(self.dir / "args.json", config)

    def table(self, filename: str, rows: list):
        """Write a CSV file; rows are {column: value}. A column that a row lacks stays empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=dict.fromkeys(k for row in rows for k in row))
        writer.writeheader()
        writer.writerows(rows)
        with atomic(self.dir / filename) as tmp:  # a file's name may be no UTF-8
            tmp.write_text(text.getvalue(), encoding="utf-8", errors="backslashreplace")

    def warn(self, filename: str, columns, rows, what: str):
        """If there are rows, tuples, write them as a table and print one line that says so."""
        if rows:
            self.table(filename, [dict(zip(columns, row)) for row in rows])
            say(f"warning: {len(rows)} {what}: see {self.dir / filename}")

    def log(self, row: dict):
        """Add a row of numbers to metrics.csv."""
        self.rows.append(row)
        self.table("metrics.csv", self.rows)

    def log_epoch(self, row: dict, scores: dict, scores_ema: dict):
        """Add an epoch to metrics.csv, draw curves.png and print a line.

        row holds step, epoch, seconds, images_per_s and means of the losses. scores and scores_ema
        are what evaluate() says of raw and of averaged weights on validation images.
        """
        self.log({**row, "val_loss": scores["loss"], "val_accuracy": scores["accuracy"],
                  "val_loss_ema": scores_ema["loss"], "val_accuracy_ema": scores_ema["accuracy"]})
        plot_curves(self.rows, self.dir / "curves.png")
        means = "".join(f"{name} {value:.3g}, " for name, value in row.items() if "/" in name)
        say(f"epoch {row['epoch']}: {means}val {scores['accuracy']:.2%}, EMA "
            f"{scores_ema['accuracy']:.2%}, {row['images_per_s']:.0f} images/s, "
            f"{row['seconds']:.0f} s")

    def save(self, filename: str, state: dict):
        """Save tensors, numbers and strings; `torch.load(weights_only=True)` reads them."""
        saved = io.BytesIO()  # torch's own writer does not say that a disk is full
        torch.save(state, saved)
        with atomic(self.dir / filename) as tmp:
            tmp.write_bytes(saved.getbuffer())

    def save_best(self, best_val: float, raw, ema, **others) -> float:
        """Write best.pt if validation accuracy exceeds best_val; returns the best one so far.

        raw, ema: (network, what evaluate() says of it) of raw and of averaged weights.
        """
        for weights, (network, scores) in (("raw", raw), ("ema", ema)):
            if not scores["accuracy"] <= best_val:  # better, or NaN: no image left to validate by
                best_val = scores["accuracy"]
                self.save("best.pt", {"classifier": network.state_dict(), "weights": weights,
                                      "val_accuracy": best_val, **others})
        return best_val

    def finish(self, device: torch.device, **results):
        """Write results.json, and print the same object after the word RESULT as the last line.

        It holds flags, results that replace flags of their name, and peak_memory_mib: GPU memory
        on CUDA, otherwise the resident memory of this process.
        """
        if device.type == "cuda":
            peak, name = torch.cuda.max_memory_allocated() / 2**20, torch.cuda.get_device_name()
        else:
            unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
            peak, name = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, "cpu"
        results = {**self.config, **results, "peak_memory_mib": round(peak), "device": name,
                   "torch": torch.__version__}
        results = {key: None if value != value else value for key, value in results.items()}  # NaN
        write_json(self.dir / "results.json", results)
        say(f"written to {self.dir}")
        say("RESULT", json.dumps(results, default=str))


def load_checkpoint(path, flag: str, keys) -> dict:
    """A file that Run.save wrote, on the CPU.

    Exits with status 2, naming the flag, if it is missing, damaged or lacks a key.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        die(f"{flag}: {path} cannot be read ({error.strerror})")
    except Exception as error:  # torch.load raises many kinds for a damaged file
        die(f"{flag}: {path} is damaged or no checkpoint ({type(error).__name__})")
    missing = [key for key in keys if not (isinstance(state, dict) and key in state)]
    if missing:
        die(f"{flag}: {path} is another kind of checkpoint: it has no {', '.join(missing)}")
    return state


def load_state(part, state: dict, flag: str, path):
    """Give a network or an optimiser its state from a checkpoint; another network's is refused."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError):  # of networks, of optimisers
        die(f"{flag}: {path} was written by a script with other networks; use that one")


class EpochMeans:
    """Scalars of each training step, kept on the device until the epoch's means are asked for."""

    def __init__(self):
        self.steps, self.values = [], []

    def add(self, step: int, scalars: dict):
        """scalars: {name: scalar tensor}, the same names at every step."""
        self.names = list(scalars)
        self.steps.append(step)
        self.values.append(torch.stack([value.detach().float() for value in scalars.values()]))

    def take(self) -> dict:
        """{name: mean over the steps since the last call}, as float. Waits for the device.

        Exits with status 1, naming the scalar and its step, if a value is not finite.
        """
        values = torch.stack(self.values).cpu()  # (steps, names)
        for row, column in (~values.isfinite()).nonzero().tolist():
            raise SystemExit(
                f"stopped: {self.names[column]} is {values[row, column].item()} at step "
                f"{self.steps[row]}; checkpoints already written are from before it; a new run "
                "with a lower learning rate usually helps")
        self.steps, self.values = [], []
        return dict(zip(self.names, values.mean(dim=0).tolist()))


# ============================================= figures ============================================

matplotlib.rcParams["text.parse_math"] = False  # a class named $5 is no formula


def only_warns(draw):
    """Decorator: a figure that cannot be drawn or written is a warning on stderr, not the end."""
    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        try:
            draw(*args, **kwargs)
        except (Exception, SystemExit) as error:
            if isinstance(getattr(error, "code", None), int):  # a signal ends the process
                raise
            say(f"warning: {draw.__name__} failed, its figure is missing ({error})",
                file=sys.stderr)

    return wrapper


@only_warns
@torch.no_grad()
def save_samples(generator: nn.Module, fixed_z: Tensor, path):
    """Write G(z) for N fixed z (N, latent_dim), images in [0, 1], as a PNG grid, about square."""
    images = deepcopy(generator).eval()(fixed_z).float().cpu()  # (N, C, H, W)
    with atomic(path) as tmp:
        save_image(images, tmp, format="png", nrow=round(len(images) ** 0.5))


def save_figure(figure: Figure, path):
    """Write a matplotlib figure as PNG."""
    with atomic(path) as tmp:
        figure.savefig(tmp, format="png", dpi=100)


@only_warns
def plot_curves(rows: list, path):
    """Validation accuracy and loss, and mean D on real and fake images, against steps.

    rows: those of metrics.csv. Columns that a run does not have are left out, as mean D without a
    GAN.
    """
    panels = [("accuracy on validation images, %", 100, ["val_accuracy", "val_accuracy_ema"]),
              ("cross-entropy on validation images, nats", 1, ["val_loss", "val_loss_ema"]),
              ("mean D(x)", 1, ["monitor/p_real_unl", "monitor/p_real_fake"])]
    panels = [panel for panel in panels if any(set(panel[2]) & row.keys() for row in rows)]
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    for axes, (title, unit, columns) in zip(figure.subplots(1, len(panels)), panels):
        for column in columns:
            points = [(row["step"], unit * row[column]) for row in rows if column in row]
            if points:
                axes.plot(*zip(*points), marker=".", label=column.removeprefix("monitor/"))
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


@only_warns
def plot_confusion(confusion: Tensor, class_names: list, path):
    """Confusion matrix (K, K), true class in rows, shaded by the share of the row.

    Up to 40 classes it shows counts; of more it names at most 40.
    """
    k = len(class_names)
    share = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    side = 0.45 * min(k, 40)
    figure = Figure(figsize=(2 + side, 1.7 + side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(k, k) if k <= 40 else ():
        axes.text(j, i, int(confusion[i, j]), ha="center", va="center", fontsize=8,
                  color="white" if share[i, j] > 0.5 else "black")
    named = range(0, k, -(-k // 40))
    axes.set_xticks(named, class_names[::named.step], rotation=90 if k > 5 else 0)
    axes.set_yticks(named, class_names[::named.step])
    accuracy = 100 * confusion.trace().item() / max(1, confusion.sum().item())
    axes.set(xlabel="predicted", ylabel="true", title=f"{accuracy:.2f}% correct")
    save_figure(figure, path)


@only_warns
def plot_test(scores: dict, labels: Tensor, class_names: list, load_images, folder):
    """Draw confusion.png and predictions.png of test images into a folder.

    The latter shows up to 30 errors, named in red, and correct ones.
    Args: what evaluate() returns; labels (N,) int64 of as many images or more; K names; a function
    that returns the images (M, C, S, S) in [0, 1] of a list of M indices.
    """
    plot_confusion(scores["confusion"], class_names, Path(folder, "confusion.png"))
    predicted = scores["predicted"]
    labels, chosen = labels[:len(predicted)].cpu(), []
    for indices in ((predicted != labels).nonzero(), (predicted == labels).nonzero()):
        room = min(60 - len(chosen) if chosen else 30, len(indices))
        chosen += indices.flatten()[torch.linspace(0, len(indices) - 1, room).long()].tolist()
    wrong = [n for n, i in enumerate(chosen) if predicted[i] != labels[i]]
    captions = [class_names[predicted[i]]
                + (f", not {class_names[labels[i]]}" if predicted[i] != labels[i] else "")
                for i in chosen]
    plot_images(load_images(chosen), captions, Path(folder, "predictions.png"),
                "test errors, and correct ones", wrong)


@only_warns
def plot_images(images: Tensor, captions: list, path, title: str, red=()):
    """Images (N, C, S, S) in [0, 1], ten in a row, under N captions; red: indices of red ones."""
    side = images.shape[-1]
    gap = side // 4 + 1  # has room for a caption
    grid = make_grid(images.float().cpu().clamp(0, 1), nrow=10, padding=gap, pad_value=1)
    figure = Figure(figsize=(11, 0.5 + 11 * grid.shape[1] / grid.shape[2]), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid.permute(1, 2, 0).numpy())
    for n, caption in enumerate(captions):
        x, y = n % 10 * (side + gap) + gap + side / 2, n // 10 * (side + gap) + 0.8 * gap
        axes.text(x, y, caption, fontsize=7, color="red" if n in red else "black", ha="center")
    axes.axis("off")
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)
