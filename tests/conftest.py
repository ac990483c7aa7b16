"""What the tests share: small data sets in the native formats, whole runs of the scripts, helpers.

Data sets and runs are made once a session. The runs are processes of their own, two at a time.
They begin with the session and go on beside the other tests. The tests that look at them come last.
"""

import os

# Torch reads it when it is loaded, here and in the runs. Networks as small as these lose more by
# threads that wait for each other than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import csv
import importlib
import json
import shutil
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.io import loadmat, savemat
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import (register_optimizer_step_post_hook,
                                   register_optimizer_step_pre_hook)

import common
from common import balanced_split, dali_loader
from tests.cartoons import write_pets
from tests.sweep import photo_folders

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
DIGITS = ["sgan_mnist", "sgan_svhn"]
SCRIPTS = [*DIGITS, "sgan_catsdogs"]
MNIST = ["--device", "cpu", "--batch-size", 50, "--epochs", 4]
SVHN = ["--device", "cpu", "--num-labeled", 100, "--batch-size", 40, "--warmup-steps", 20]
PETS = ["--device", "cpu", "--image-size", 32, "--batch-size", 16, "--gan-weight", 1]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# ============================================ helpers =============================================


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test works in an empty folder of its own, where the scripts make their runs/."""
    monkeypatch.chdir(tmp_path)


def call_main(name, *flags):
    """Run a script's main() in this process, as if by the command line."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        try:
            importlib.import_module(name).main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def train(name, *flags, out_dir="runs"):
    """Run a script to its end in this process; the only run's folder in out_dir, its results."""
    call_main(name, *flags, "--out-dir", out_dir)
    [folder] = Path(out_dir).iterdir()
    return folder, json.loads((folder / "results.json").read_text())


def refusal(capsys, name, *flags):
    """What a script says on stderr that refuses its input: a sentence, maybe a list of files."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call_main(name, *flags)
    first, *others = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    if first.startswith("usage: "):  # argparse says first how the script is called
        first, *others = others
        assert first.startswith(f"{name}.py: error: argument --")
    else:
        assert first.startswith("error: ")
    assert all(line.startswith("  ") for line in others)
    return "\n".join([first, *others])


def read_csv(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def cut_off(path, share):
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def picture(mode="RGB", size=(300, 220), seed=0):
    """Coloured clouds."""
    noise = np.random.default_rng(seed).integers(256, size=(6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def save(image, cut=None, **options):
    """A function of a path that saves the image there, cut off after a share of its bytes."""
    def write(path):
        image.save(path, **options)
        if cut:
            cut_off(path, cut)
    return write


def flatten(state, name=""):
    """Nested dictionaries of a checkpoint as one, name -> tensor or value."""
    if not isinstance(state, dict):
        return {name: state}
    return {k: v for key, part in state.items() for k, v in flatten(part, f"{name}.{key}").items()}


def same_bits(a, b):
    """Whether two checkpoints are equal in every bit of every tensor."""
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


def untimed(rows, but=()):
    """The rows of metrics.csv without times, and without columns that begin with one of but."""
    return [{column: number for column, number in row.items()
             if column not in ("seconds", "images_per_s") and not column.startswith(tuple(but))}
            for row in rows]


def new_classifier(name, num_classes=2):
    """The untrained classifier of a script; num_classes is of pets, which are 32 pixels wide."""
    script = importlib.import_module(name)
    if name == "sgan_mnist":
        return script.Student()
    arguments = {"sgan_catsdogs": (num_classes, 32)}.get(name, ("logsumexp",))
    return script.Classifier(*arguments)


@contextlib.contextmanager
def forced_bf16(native):
    """Within it the scripts take this processor for one that multiplies in bfloat16, or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "multiplies_in_bf16", lambda device: native)
        yield


@pytest.fixture(scope="session", params=[False, True], ids=["float32", "bfloat16"])
def bf16(request):
    """Twice: for forced_bf16."""
    return request.param


# ================================ training seen through torch's hooks =============================


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors}


def gradients(network):
    return {name: None if p.grad is None else p.grad.clone()
            for name, p in network.named_parameters()}


def changed(before, after):
    """Names of the tensors that are not the same bit for bit, None included."""
    return {name for name, old in before.items()
            if (old is None) != (after[name] is None)
            or (old is not None and not torch.equal(old, after[name]))}


@contextlib.contextmanager
def hooked(before_forward, after_forward, before_update, after_update):
    """Within it, torch calls these at each pass of any module and each step of any optimizer."""
    handles = [register_module_forward_pre_hook(before_forward),
               register_module_forward_hook(after_forward),
               register_optimizer_step_pre_hook(before_update),
               register_optimizer_step_post_hook(after_update)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find(images, known):
    """The index in known of each image, which is there up to rounding."""
    distance, index = torch.cdist(images.double().flatten(1), known.double().flatten(1)).min(dim=1)
    assert (distance < 0.01).all()
    return index


def real_gradient(logits, target):
    """That of -log D(x), target 1, or -log(1 - D(x)), target 0, by the logits: (N, K)."""
    z = logits.exp().sum(dim=1, keepdim=True)
    return (z / (1 + z) - target) * logits.softmax(dim=1)


def averaged(average, states, decay):
    """The moving average, from its first value on, of a network's state after each step."""
    for n, state in enumerate(states, 1):
        share = min(decay, (1 + n) / (10 + n))
        average = {name: share * average[name].double() + (1 - share) * now.double()
                   for name, now in state.items() if now.is_floating_point()}
    return average


# ======================================== small data sets =========================================


def striped_images(labels, side, rng):
    """Ten kinds of stripes, one a class, with noise: labels (N,) -> (N, side, side) uint8.

    Width (5) and direction (2) of the stripes tell the class; phase and contrast are random. A
    network that averages over positions learns this in a few steps.
    """
    y, x = np.mgrid[:side, :side]
    along = np.where((labels % 2)[:, None, None], x, y)  # (N, side, side)
    period = np.array([2, 3, 5, 8, 14])[labels // 2, None, None]
    phase, contrast = rng.uniform([[0], [60]], [[2 * np.pi], [120]], (2, len(labels)))
    waves = np.sin(2 * np.pi * along / period + phase[:, None, None])
    noise = rng.normal(0, 10, waves.shape)
    return np.clip(127 + contrast[:, None, None] * waves + noise, 0, 255).astype(np.uint8)


def write_idx(path, array):
    """An array of uint8 in MNIST's format: zeros, 8 for uint8, the rank, the sizes, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def mat_labels(labels):
    """Labels 0 to 9 as the .mat files hold them: (N, 1) uint8, 10 for 0."""
    return np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]


@pytest.fixture(scope="session")
def mnist(tmp_path_factory):
    """A data directory with MNIST/raw: 900 training and 200 test images."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("mnist")
    for part, n in (("train", 900), ("t10k", 200)):
        labels = rng.integers(10, size=n)
        write_idx(root / f"MNIST/raw/{part}-images-idx3-ubyte", striped_images(labels, 28, rng))
        write_idx(root / f"MNIST/raw/{part}-labels-idx1-ubyte", labels)
    return root


@pytest.fixture(scope="session")
def svhn(tmp_path_factory):
    """A data directory with SVHN/*.mat: 700 training and 150 test images, stored last axis first.
    """
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("svhn")
    (root / "SVHN").mkdir()
    for part, n in (("train", 700), ("test", 150)):
        labels, tint = rng.integers(10, size=n), rng.uniform(0.7, 1.0, (n, 1, 1, 3))
        x = (striped_images(labels, 32, rng)[..., None] * tint).astype(np.uint8)  # (N, 32, 32, 3)
        savemat(root / f"SVHN/{part}_32x32.mat",
                {"X": x.transpose(1, 2, 3, 0), "y": mat_labels(labels)})
    return root


@pytest.fixture(scope="session")
def pets(tmp_path_factory):
    """The four folders of cartoon pets: labeled, val, test in subfolders, train flat."""
    root = tmp_path_factory.mktemp("pets")
    write_pets(root / "labeled", 4, seed=1, size=40)
    write_pets(root / "train", 24, seed=2, size=40, layout="flat")
    write_pets(root / "val", 8, seed=3, size=40)
    write_pets(root / "test", 15, seed=4, size=40)
    return root


@pytest.fixture(scope="session")
def flat_pets(pets, tmp_path_factory):
    """The pets and a third class, told by flat names; the unlabeled ones claim classes."""
    root = tmp_path_factory.mktemp("flat_pets")
    for part in ("labeled", "val", "test"):
        (root / part).mkdir()
        for path in sorted((pets / part).rglob("*.jpg")):
            number, dash = int(path.stem), {"cat": ".", "dog": "_"}[path.parent.name]
            shutil.copy(path, root / part / f"{path.parent.name}{dash}{number}.jpg")
            with Image.open(path) as image:  # other bytes, as a photo has one label
                ImageOps.mirror(image).save(root / part / f"zebra{number}.jpg")
    for n, path in enumerate(sorted((pets / "train").iterdir())):  # the order stays
        target = root / "train" / ("cat" if n < 24 else "dog") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return root


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """1,060 tiny photos a class, in Kaggle's flat layout and in that of PetImages; one is damaged.

    They are hard links to a few files: names of their own, so that a draw shows in them.
    """
    root, rng = tmp_path_factory.mktemp("archives"), np.random.default_rng(0)
    for i in range(8):
        image = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8))
        image.save(root / f"{i}.jpg")
    (root / "kaggle").mkdir()
    for name in ("Cat", "Dog"):
        (root / "PetImages" / name).mkdir(parents=True)
        for i in range(1060):
            os.link(root / f"{i % 8}.jpg", root / f"kaggle/{name.lower()}.{i}.jpg")
            os.link(root / f"{i % 8}.jpg", root / f"PetImages/{name}/{i}.jpg")
    for path in (root / "kaggle/cat.666.jpg", root / "PetImages/Cat/666.jpg"):
        path.unlink()
        path.write_bytes(b"")  # as there are in Microsoft's archive
    return root


def with_other_hidden_labels(labels, num_val):
    """Labels (N,) of which each is changed that neither training nor validation may see."""
    labels = torch.from_numpy(labels.astype(np.int64))
    split = balanced_split(labels, 100, num_val, 10, seed=0)
    changed = labels.clone()
    changed[split[2]] = (labels[split[2]] + torch.randint(1, 10, split[2].shape)) % 10
    # the draw is by class, but these images come after the drawn ones: it is the same
    assert all(map(torch.equal, balanced_split(changed, 100, num_val, 10, seed=0), split))
    assert (changed != labels).sum() == len(split[2]) > 0
    return changed.numpy()


@pytest.fixture(scope="session")
def mnist_relabeled(mnist, tmp_path_factory):
    root = shutil.copytree(mnist, tmp_path_factory.mktemp("relabeled"), dirs_exist_ok=True)
    path = root / "MNIST/raw/train-labels-idx1-ubyte"
    labels = np.frombuffer(path.read_bytes()[8:], np.uint8)
    write_idx(path, with_other_hidden_labels(labels, num_val=400))
    return root


@pytest.fixture(scope="session")
def svhn_relabeled(svhn, tmp_path_factory):
    root = shutil.copytree(svhn, tmp_path_factory.mktemp("relabeled"), dirs_exist_ok=True)
    data = loadmat(root / "SVHN/train_32x32.mat")
    labels = with_other_hidden_labels(data["y"].flatten() % 10, num_val=300)
    savemat(root / "SVHN/train_32x32.mat", {"X": data["X"], "y": mat_labels(labels)})
    return root


def read_part(root, part):
    """Images (N, C, S, S) in [0, 1] and labels (N,) of "train", "test", ..., without the scripts.

    The photos of a folder without classes have label 0.
    """
    if (root / "MNIST").exists():
        raw, part = root / "MNIST/raw", part.replace("test", "t10k")
        x = np.frombuffer((raw / f"{part}-images-idx3-ubyte").read_bytes()[16:], np.uint8)
        y = np.frombuffer((raw / f"{part}-labels-idx1-ubyte").read_bytes()[8:], np.uint8)
        x = x.reshape(-1, 1, 28, 28)
    elif (root / "SVHN").exists():
        data = loadmat(root / f"SVHN/{part}_32x32.mat")
        x, y = data["X"].transpose(3, 2, 0, 1), data["y"].flatten() % 10
    else:
        files = sorted((root / part).rglob("*.jpg"))
        names = [path.name[:3] if path.parent.name == part else path.parent.name for path in files]
        y = np.unique(names, return_inverse=True)[1] if part != "train" else np.zeros(len(files))
        x = torch.cat([x for x, _ in dali_loader(files, None, 16, 32, CPU)]).mul(255).round()
        x = x.numpy()
    return torch.from_numpy(x / np.float32(255)), torch.from_numpy(y.astype(int))


# ========================================== whole runs ============================================


class Runs:
    """Runs of {key: (script, *flags)}, each in folder/key; runs[key] waits for what it left."""

    pool, processes = ThreadPoolExecutor(2), []

    def __init__(self, folder, jobs):
        self.folder = folder
        self.started = {key: self.pool.submit(self.run, key, *job) for key, job in jobs.items()}

    def run(self, key, name, *flags):
        (self.folder / key).mkdir()
        process = subprocess.Popen([sys.executable, ROOT / f"{name}.py", *map(str, flags)],
                                   cwd=self.folder / key, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.processes.append(process)
        output = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, *output)

    def completed(self, key):
        return self.started[key].result()

    def __getitem__(self, key):
        """What a successful run left: its RESULT, its folder, metrics and checkpoints."""
        completed = self.completed(key)
        assert completed.returncode == 0, completed.stderr
        last = completed.stdout.splitlines()[-1]
        assert last.startswith("RESULT {")
        [folder] = (self.folder / key / "runs").iterdir()
        checkpoints = {path.stem: torch.load(path, weights_only=True)
                       for path in folder.glob("*.pt")}
        return SimpleNamespace(results=json.loads(last.removeprefix("RESULT ")), folder=folder,
                               stderr=completed.stderr, rows=read_csv(folder / "metrics.csv"),
                               **checkpoints)


def runs_of(item):
    """The fixtures of whole runs that a test looks at."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    data = parameters["run"][0] if "run" in parameters else parameters.get("data")
    return {name for name in ("mnist_runs", "svhn_runs", "pets_runs", "rings_runs", "killed_run")
            if name in item.fixturenames or name == f"{data}_runs"}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: bool(runs_of(item)))


@pytest.fixture(scope="session", autouse=True)
def begin_whole_runs(request):
    for name in sorted(set().union(*map(runs_of, request.session.items))):
        with contextlib.suppress(Exception):  # the tests that look at them fail by it
            request.getfixturevalue(name)
    yield
    Runs.pool.shutdown(wait=False, cancel_futures=True)
    for process in Runs.processes:
        process.kill()  # of no effect on one that has ended


@pytest.fixture(scope="session")
def mnist_runs(mnist, mnist_relabeled, tmp_path_factory):
    """"lost" takes one step an epoch, so large that the second loss is not finite."""
    sgan = ["sgan_mnist", *MNIST]
    lost = ["--lr", 1e30, "--batch-size", 500, "--supervised-only"]
    ten_labels = [*sgan, "--data-dir", mnist, "--num-labeled", 10, "--batch-size", 20, "--epochs",
                  8]
    return Runs(tmp_path_factory.mktemp("mnist_runs"), {
        "sgan": [*sgan, "--data-dir", mnist],
        "other seed": [*sgan, "--data-dir", mnist, "--seed", 1],
        "relabeled": [*sgan, "--data-dir", mnist_relabeled],
        "supervised": [*sgan, "--data-dir", mnist, "--supervised-only", "--split-seed", 7],
        "lost": [*sgan, "--data-dir", mnist, *lost],
        "ten labels": ten_labels, "ten labels alone": [*ten_labels, "--supervised-only"],
        "refused": [*sgan, "--data-dir", mnist, "--num-labeled", 15]})


@pytest.fixture(scope="session")
def svhn_runs(svhn, svhn_relabeled, tmp_path_factory):
    sgan = ["sgan_svhn", *SVHN, "--epochs", 1]
    return Runs(tmp_path_factory.mktemp("svhn_runs"), {
        "sgan": [*sgan, "--data-dir", svhn],
        "relabeled": [*sgan, "--data-dir", svhn_relabeled],
        "supervised": [*sgan, "--data-dir", svhn, "--supervised-only", "--seed", 5]})


@pytest.fixture(scope="session")
def pets_runs(pets, flat_pets, tmp_path_factory):
    sgan = ["sgan_catsdogs", *PETS, "--epochs", 1]
    return Runs(tmp_path_factory.mktemp("pets_runs"), {
        "sgan": [*sgan, *photo_folders(pets)],
        "other seed": [*sgan, *photo_folders(pets), "--seed", 1],
        "relabeled": [*sgan, *photo_folders(pets), "--unlabeled-dir", flat_pets / "train"],
        "flat": [*sgan, *photo_folders(flat_pets)],
        "supervised": [*sgan, *photo_folders(pets), "--supervised-only", "--unlabeled-dir", "no"],
        "two processes": ["tests/two_processes", *PETS, *photo_folders(pets), "--epochs", 2,
                          "--augmentation", 0, "--rotation-weight", 0]})


@pytest.fixture(scope="session")
def three_epochs(pets):
    """Flags of a run of photos that is to be interrupted."""
    return [*PETS, *photo_folders(pets), "--epochs", 3]


KILLED = """
import os, signal, sys, common, sgan_catsdogs
from torch.optim.optimizer import register_optimizer_step_post_hook
kind, left, replace = sys.argv.pop(1), [int(sys.argv.pop(1))], os.replace
def count(*args, **kwargs):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
def count_and_replace(*paths):
    count()
    replace(*paths)
if kind == "update":
    register_optimizer_step_post_hook(count)
else:
    os.replace = count_and_replace
sgan_catsdogs.main()
"""


def kill_and_resume(folder, flags):
    """Train, and kill -9 the process at four moments; go on each time, and return what is left.

    They are: an update of the first step, one of the second epoch, the moment before a checkpoint
    takes the place of the one before, and that before results.json is there.
    """
    for kind, number in (("update", 1), ("update", 9), ("file", 4), ("file", 9)):
        command = [sys.executable, "-c", KILLED, kind, number, *flags]
        process = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True,
                                 text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert process.returncode == -signal.SIGKILL, process.stderr
        [run] = folder.glob("runs/*")
        flags = ["--resume", run]
    return run


@pytest.fixture(scope="session")
def killed_run(three_epochs, tmp_path_factory):
    return Runs.pool.submit(kill_and_resume, tmp_path_factory.mktemp("killed"), three_epochs)

@pytest.fixture(scope="session")
def rings_runs(tmp_path_factory):
    """The same short run twice, and a baseline of another seed."""
    short = ["toy_rings", "--epochs", 1, "--device", "cpu"]
    return Runs(tmp_path_factory.mktemp("rings_runs"), {
        "first": [*short, "--seed", 3], "again": [*short, "--seed", 3],
        "other": [*short, "--seed", 4, "--supervised-only"]})
