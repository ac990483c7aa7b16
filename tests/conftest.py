"""Small data sets in the native formats of the real ones, generated once a session."""

import os

# Before torch is loaded, and for the scripts' processes, of which two run at a time: on networks as
# small as these, threads that wait for each other cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import struct

import numpy as np
import pytest
from scipy.io import savemat

from tests.cartoons import write_pets


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
