"""Small data sets in the native formats of the real ones, and whole runs of the scripts on them.

Both are made once a session. The runs are processes of their own, which begin with the session and
go on beside the tests of other things, two at a time; the tests that look at them come last.
"""

import os

# Before torch is loaded, and for the scripts' processes, of which two run at a time: on networks as
# small as these, threads that wait for each other cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import csv
import json
import shutil
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat

from common import balanced_split
from tests.cartoons import write_pets
from tests.sweep import photo_folders as pet_folders

ROOT = Path(__file__).resolve().parent.parent
PETS = ["--device", "cpu", "--image-size", 32, "--batch-size", 16]
MNIST = ["--device", "cpu", "--batch-size", 50, "--warmup-steps", 20]
SVHN = ["--device", "cpu", "--num-labeled", 100, "--batch-size", 40, "--warmup-steps", 20]

# ======================================== small data sets =========================================


def striped_images(labels, side, rng):
    """Ten kinds of stripes, one a class, with noise: labels (N,) -> (N, side, side) uint8.

    The width (5) and direction (2) of the stripes tell the class, so that a network which averages
    over positions learns them in a few steps; phase and contrast are random.
    """
    labels = np.asarray(labels)
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


def write_mnist(data_dir, x_train, y_train, x_test, y_test):
    """data_dir/MNIST/raw/: images (N, 28, 28), labels (N,)."""
    for part, x, y in (("train", x_train, y_train), ("t10k", x_test, y_test)):
        write_idx(data_dir / f"MNIST/raw/{part}-images-idx3-ubyte", x)
        write_idx(data_dir / f"MNIST/raw/{part}-labels-idx1-ubyte", y)


def mat_labels(labels):
    """Labels 0 to 9 as the .mat files hold them: (N, 1) uint8, 10 for 0."""
    return np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]


def write_svhn(data_dir, x_train, y_train, x_test, y_test):
    """data_dir/SVHN/*.mat: images (N, 32, 32, 3) stored last axis first, labels with 10 for 0."""
    (data_dir / "SVHN").mkdir(parents=True)
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        savemat(data_dir / f"SVHN/{part}_32x32.mat",
                {"X": x.transpose(1, 2, 3, 0), "y": mat_labels(y)})


@pytest.fixture(scope="session")
def mnist(tmp_path_factory):
    """A data directory with MNIST/raw: 900 training and 200 test images."""
    rng = np.random.default_rng(0)
    y_train, y_test = rng.integers(10, size=900), rng.integers(10, size=200)
    data_dir = tmp_path_factory.mktemp("mnist")
    write_mnist(data_dir, striped_images(y_train, 28, rng), y_train,
                striped_images(y_test, 28, rng), y_test)
    return data_dir


@pytest.fixture(scope="session")
def svhn(tmp_path_factory):
    """A data directory with SVHN/*.mat: 700 training and 150 test images."""
    rng = np.random.default_rng(0)
    data_dir = tmp_path_factory.mktemp("svhn")
    parts = []
    for n in (700, 150):
        y = rng.integers(10, size=n)
        tint = rng.uniform(0.7, 1.0, (n, 1, 1, 3))
        parts += [(striped_images(y, 32, rng)[..., None] * tint).astype(np.uint8), y]
    write_svhn(data_dir, *parts)
    return data_dir


@pytest.fixture(scope="session")
def pets(tmp_path_factory):
    """The four folders of cartoon pets: labeled, val, test in subfolders, train flat."""
    root = tmp_path_factory.mktemp("pets")
    write_pets(root / "labeled", 4, seed=1, size=40)
    write_pets(root / "train", 24, seed=2, size=40, layout="flat")
    write_pets(root / "val", 8, seed=3, size=40)
    write_pets(root / "test", 15, seed=4, size=40)
    return root


# ========================================= whole runs =============================================


class Runs:
    """Runs of {key: (name, *flags)}, each in folder/key; runs[key] is an outcome.

    They go on in the background, two at a time in a pool of threads; to look at one is to wait for
    it. A session that ends early ends them.
    """

    beside = ThreadPoolExecutor(2)  # for those that begin with the session
    starting = threading.Lock()  # held while a process begins
    processes, over = [], False

    def __init__(self, jobs, folder, pool=None):
        self.folder, pool = folder, pool or ThreadPoolExecutor(2)
        self.started = {key: pool.submit(self.run, *job, cwd=folder / key)
                        for key, job in jobs.items()}

    def run(self, name, *flags, cwd):
        """Run a script in the folder cwd; its CompletedProcess holds text."""
        cwd.mkdir(parents=True)
        with self.starting:
            if Runs.over:
                raise RuntimeError("the session has ended")
            process = subprocess.Popen([sys.executable, ROOT / f"{name}.py", *map(str, flags)],
                                       cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       text=True)
            self.processes.append(process)
        try:
            output = process.communicate(timeout=900)
        finally:
            process.kill()  # of no effect on one that has ended
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
        with open(folder / "metrics.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        checkpoints = {path.stem: torch.load(path, weights_only=True)
                       for path in folder.glob("*.pt")}
        return SimpleNamespace(results=json.loads(last.removeprefix("RESULT ")), folder=folder,
                               stderr=completed.stderr, rows=rows, **checkpoints)


def runs_of(item):
    """The fixtures of whole runs that a test looks at."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    data = parameters["run"][0] if "run" in parameters else parameters.get("data")
    return {name for name in ("mnist_runs", "svhn_runs", "pets_runs", "rings_runs")
            if name in item.fixturenames or name == f"{data}_runs"}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: bool(runs_of(item)))


@pytest.fixture(scope="session", autouse=True)
def begin_whole_runs(request):
    for name in sorted(set().union(*map(runs_of, request.session.items))):
        with contextlib.suppress(Exception):  # the tests that look at them fail by it
            request.getfixturevalue(name)
    yield
    with Runs.starting:
        Runs.over = True
        for process in Runs.processes:
            process.kill()


def with_other_hidden_labels(labels, num_val):
    """Labels (N,) of which each is changed that neither training nor validation may see."""
    labels = torch.from_numpy(labels.astype(np.int64))
    labeled, val, unlabeled = balanced_split(labels, 100, num_val, 10, seed=0)
    changed = labels.clone()
    changed[unlabeled] = (labels[unlabeled] + torch.randint(1, 10, unlabeled.shape)) % 10
    # the draw is by class, but these images come after the drawn ones: it is the same
    for part, same in zip(balanced_split(changed, 100, num_val, 10, seed=0),
                          (labeled, val, unlabeled)):
        assert part.tolist() == same.tolist()
    assert (changed != labels).sum() == len(unlabeled) == len(labels) - 100 - num_val > 0
    return changed.numpy()


@pytest.fixture(scope="session")
def mnist_relabeled(mnist, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("relabeled")
    shutil.copytree(mnist, data_dir, dirs_exist_ok=True)
    path = data_dir / "MNIST/raw/train-labels-idx1-ubyte"
    labels = np.frombuffer(path.read_bytes()[8:], np.uint8)
    write_idx(path, with_other_hidden_labels(labels, num_val=400))
    return data_dir


@pytest.fixture(scope="session")
def svhn_relabeled(svhn, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("relabeled")
    shutil.copytree(svhn, data_dir, dirs_exist_ok=True)
    path = data_dir / "SVHN/train_32x32.mat"
    data = loadmat(path)
    labels = with_other_hidden_labels(data["y"].flatten() % 10, num_val=300)
    savemat(path, {"X": data["X"], "y": mat_labels(labels)})
    return data_dir


@pytest.fixture(scope="session")
def mnist_runs(mnist, mnist_relabeled, tmp_path_factory):
    sgan = ["sgan_mnist", *MNIST, "--epochs", 2]
    jobs = {"sgan": [*sgan, "--data-dir", mnist],
            "other seed": [*sgan, "--data-dir", mnist, "--seed", 1],
            "relabeled": [*sgan, "--data-dir", mnist_relabeled],
            "supervised": [*sgan, "--data-dir", mnist, "--supervised-only", "--split-seed", 7]}
    return Runs(jobs, tmp_path_factory.mktemp("mnist_runs"), Runs.beside)


@pytest.fixture(scope="session")
def svhn_runs(svhn, svhn_relabeled, tmp_path_factory):
    sgan = ["sgan_svhn", *SVHN, "--epochs", 1]
    jobs = {"sgan": [*sgan, "--data-dir", svhn],
            "relabeled": [*sgan, "--data-dir", svhn_relabeled],
            "supervised": [*sgan, "--data-dir", svhn, "--supervised-only", "--seed", 5]}
    return Runs(jobs, tmp_path_factory.mktemp("svhn_runs"), Runs.beside)


@pytest.fixture(scope="session")
def flat_pets(pets, tmp_path_factory):
    """The pets and a third class, told by flat names; the unlabeled ones claim classes."""
    root = tmp_path_factory.mktemp("flat_pets")
    for part in ("labeled", "val", "test"):
        (root / part).mkdir()
        for path in sorted((pets / part).rglob("*.jpg")):
            number, name = int(path.stem), path.parent.name
            shutil.copy(path, root / part / (f"cat.{number}.jpg" if name == "cat" else
                                             f"dog_{number}.jpg"))
            shutil.copy(path, root / part / f"zebra{number}.jpg")
    for n, path in enumerate(sorted((pets / "train").iterdir())):  # the order stays
        target = root / "train" / ("cat" if n < 24 else "dog") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return root


@pytest.fixture(scope="session")
def pets_runs(pets, flat_pets, tmp_path_factory):
    sgan = ["sgan_catsdogs", *PETS, "--epochs", 1]
    jobs = {"sgan": [*sgan, *pet_folders(pets)],
            "other seed": [*sgan, *pet_folders(pets), "--seed", 1],
            "relabeled": [*sgan, *pet_folders(pets), "--unlabeled-dir", flat_pets / "train"],
            "flat": [*sgan, *pet_folders(flat_pets)],
            "supervised": [*sgan, *pet_folders(pets), "--supervised-only",
                           "--unlabeled-dir", "nowhere"]}
    return Runs(jobs, tmp_path_factory.mktemp("pets_runs"), Runs.beside)


@pytest.fixture(scope="session")
def rings_runs(tmp_path_factory):
    """The same short run twice, and a baseline of another seed."""
    short = ["toy_rings", "--epochs", 1, "--device", "cpu"]
    return Runs({"first": [*short, "--seed", 3], "again": [*short, "--seed", 3],
                 "other": [*short, "--seed", 4, "--supervised-only"]},
                tmp_path_factory.mktemp("rings_runs"), Runs.beside)
