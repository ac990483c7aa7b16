"""Bad input is refused before training, with exit status 2 and a sentence that names the flag."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

import sgan_svhn
from tests.conftest import (CPU, DIGITS, MNIST, PETS, SCRIPTS, SVHN, cut_off, photo_folders,
                            refusal, write_idx)


@pytest.fixture
def assert_refused(mnist, svhn, pets, capsys):
    """Refused with all words of the message, and no folder of a run made; see refusal()."""
    good = {"sgan_mnist": [*MNIST, "--data-dir", mnist], "sgan_svhn": [*SVHN, "--data-dir", svhn],
            "sgan_catsdogs": [*PETS, *photo_folders(pets)], "toy_rings": []}

    def assert_refused(name, flags, words):
        message = refusal(capsys, name, *good[name], *flags, "--dry-run")
        assert all(str(word) in message for word in words), message
        assert not Path("runs").exists()
    return assert_refused


# ============================================= flags ==============================================

BELOW_ZERO, NOT_ABOVE = [-1, "nan"], [0, -1, "nan", "inf"]
BAD_NUMBERS = {
    "--seed": [-1, 2**63, 2**64, 1.5], "--split-seed": [-1, 2**63], "--epochs": [0, -3, "many"],
    "--batch-size": [1, 0, -1], "--lr": NOT_ABOVE, "--gan-weight": BELOW_ZERO,
    "--augmentation": [-0.1, 1.5, "nan"]}
NOT_OF_MNIST = {"--consistency-weight": BELOW_ZERO, "--ema-decay": [-0.1, 1, "nan"]}
OWN_NUMBERS = [*((name, flag, values) for name in ("sgan_svhn", "sgan_catsdogs")
                 for flag, values in NOT_OF_MNIST.items()),
               ("sgan_svhn", "--warmup-steps", [-1]),
               ("sgan_catsdogs", "--rotation-weight", BELOW_ZERO),
               ("sgan_catsdogs", "--image-size", [0, -32, 31]),
               ("sgan_catsdogs", "--labels-per-class", [0]),
               ("toy_rings", "--epochs", [0]), ("toy_rings", "--seed", [-1, 2**63, 2**64])]


@pytest.mark.parametrize("name, flag, values", [
    *((name, flag, values) for name in SCRIPTS for flag, values in BAD_NUMBERS.items()),
    *OWN_NUMBERS])
def test_numbers_out_of_bounds_are_refused(name, flag, values, assert_refused):
    for value in values:
        assert_refused(name, [flag, value], [f"{name}.py: error: argument {flag}: ", value])


@pytest.mark.parametrize("name, flags, words", [
    *((name, ["--num-labeled", n], ["--num-labeled", n]) for n in (15, 0, -10)
      for name in (*DIGITS, "toy_rings")),
    ("toy_rings", ["--num-labeled", 7], ["--num-labeled", 7]),
    ("toy_rings", ["--num-labeled", 4000], ["--num-labeled", 4000, 2000]),
    ("sgan_mnist", ["--num-labeled", 100_000], ["--num-labeled", 900]),
    ("sgan_mnist", ["--supervised-only", "--gan-only"], ["--gan-only"]),
    ("sgan_mnist", ["--supervised-only", "--good-generator"], ["--good-generator"]),
    ("sgan_svhn", ["--num-labeled", 100_000], ["--num-labeled", 700]),
    *((name, ["--batch-size", 100_000], ["--batch-size"]) for name in SCRIPTS),
    ("sgan_catsdogs", ["--batch-size", 3], ["--batch-size", "at least 4"]),
    *(("sgan_catsdogs", [flag, ""], [flag, "empty"]) for flag in ("--resume", "--prepare")),
    *(("sgan_catsdogs", ["--prepare", "pets", *mode], ["give one of them"])
      for mode in (["--demo"], ["--predict", "pets", "--checkpoint", "final.pt"])),
    ("sgan_catsdogs", ["--image-size", 48], ["--image-size", "multiple of 32", 48]),
    ("sgan_catsdogs", ["--split-seed", 0], ["--split-seed", "--prepare"]),
    ("sgan_catsdogs", ["--labels-per-class", 4], ["--labels-per-class", "--prepare"]),
    *(("sgan_catsdogs", [flag, "nowhere"], [f"{flag} nowhere is not a folder"])
      for flag in ("--labeled-dir", "--unlabeled-dir", "--val-dir", "--test-dir"))])
def test_flags_that_do_not_fit_the_data_are_refused(name, flags, words, assert_refused):
    assert_refused(name, flags, words)


def test_prepare_refuses_a_folder_that_is_none(capsys):
    message = refusal(capsys, "sgan_catsdogs", "--prepare", "nowhere")
    assert "--prepare nowhere is not a folder" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
@pytest.mark.parametrize("name", [*SCRIPTS, "toy_rings"])
def test_cuda_without_a_gpu_is_refused(name, assert_refused):
    assert_refused(name, ["--device", "cuda"], ["--device cuda"])


# ======================================== files of digits =========================================

X, Y = "MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/train-labels-idx1-ubyte"
BAD_MNIST = {
    "garbage": lambda root: (root / X).write_bytes(b"no digits here" * 100),
    "empty": lambda root: (root / X).write_bytes(b""),
    "cut off": lambda root: cut_off(root / X, 0.9),
    "other type": lambda root: (root / X).write_bytes(
        b"\0\0\x0d" + (root / X).read_bytes()[3:]),  # 13: float32
    "images are labels": lambda root: shutil.copy(root / Y, root / X),
    "fewer labels": lambda root: write_idx(root / Y, np.arange(800) % 10)}


@pytest.mark.parametrize("damage", BAD_MNIST.values(), ids=BAD_MNIST)
def test_damaged_idx_files_are_refused(damage, mnist, tmp_path, assert_refused):
    damage(shutil.copytree(mnist, tmp_path / "data"))
    words = (["800"] if damage is BAD_MNIST["fewer labels"] else
             [tmp_path / "data" / X, "--data-dir", "delete it"])
    assert_refused("sgan_mnist", ["--data-dir", tmp_path / "data"], words)


IMAGES = np.zeros((32, 32, 3, 30), np.uint8)
BAD_SVHN = {
    "garbage": lambda path: path.write_bytes(b"no digits here" * 100),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: cut_off(path, 0.9),
    "no labels": lambda path: savemat(path, {"X": IMAGES}),
    "images first": lambda path: savemat(path, {"X": IMAGES.transpose(3, 0, 1, 2),
                                                "y": np.ones((30, 1))}),
    "float images": lambda path: savemat(path, {"X": IMAGES / 1.0, "y": np.ones((30, 1))}),
    "0 beside 10": lambda path: savemat(path, {"X": IMAGES, "y": np.arange(30)[:, None] % 11}),
    "fewer labels": lambda path: savemat(path, {"X": IMAGES, "y": np.ones((29, 1))})}


@pytest.mark.parametrize("damage", BAD_SVHN.values(), ids=BAD_SVHN)
def test_damaged_mat_files_are_refused(damage, svhn, tmp_path, assert_refused):
    path = shutil.copytree(svhn, tmp_path / "data") / "SVHN/train_32x32.mat"
    damage(path)
    assert_refused("sgan_svhn", ["--data-dir", tmp_path / "data"], [path])


def test_ten_thousand_are_the_first_images_of_the_official_test_file(tmp_path, monkeypatch):
    """8,001 and 1,999 of them, in their order; the training file is not asked for."""
    y = np.random.default_rng(0).integers(1, 11, size=(26_032, 1)).astype(np.uint8)
    x = np.zeros((32, 32, 3, 26_032), np.uint8)
    x[0, 0, 0], x[5, 7, 2] = np.arange(26_032) % 256, np.arange(26_032) // 256
    (tmp_path / "SVHN").mkdir()
    savemat(tmp_path / "SVHN/test_32x32.mat", {"X": x, "y": y})
    monkeypatch.setattr("sys.argv", ["sgan_svhn.py", "--ten-thousand", "--data-dir", str(tmp_path)])
    x_labeled, y_labeled, x_unlabeled, (x_val, y_val), (x_test, y_test) = sgan_svhn.read_data(
        sgan_svhn.parse_args(), CPU)

    def position(images):
        return images[:, 0, 0, 0].long() + 256 * images[:, 2, 5, 7].long()

    assert position(x_test).tolist() == list(range(8001, 10_000))
    assert sorted(torch.cat([position(x_unlabeled), position(x_val)])) == list(range(8001))
    assert len(x_val) == 1000 and set(position(x_labeled).tolist()) < set(
        position(x_unlabeled).tolist())
    for images, labels in ((x_test, y_test), (x_labeled, y_labeled), (x_val, y_val)):
        assert labels.tolist() == [y[i, 0] % 10 for i in position(images)]


def test_ten_thousand_of_another_file_are_refused(svhn, assert_refused):
    assert_refused("sgan_svhn", ["--ten-thousand"],
                   ["--ten-thousand", "26032", svhn / "SVHN/test_32x32.mat", "150"])


# ======================================= folders of photos ========================================


def emptied(folder, keep=0):
    for path in sorted(folder.iterdir())[keep:]:
        path.unlink()


def mostly_empty_files(root):
    for path in sorted((root / "train").iterdir())[:25]:
        path.write_bytes(b"")


BAD_PETS = {  # what is done to the folders, and the words of the message
    "empty labeled folder": (lambda root: (shutil.rmtree(root / "labeled"),
                                           (root / "labeled").mkdir()), ["--labeled-dir"]),
    "empty unlabeled folder": (lambda root: emptied(root / "train"), ["--unlabeled-dir"]),
    "empty class": (lambda root: (root / "labeled/cow").mkdir(), ["class cow in --labeled-dir"]),
    "one class only": (lambda root: emptied(root / "labeled/dog"), ["--labeled-dir", "(cat)"]),
    "validation class never seen": (lambda root: (root / "val/dog").rename(root / "val/cow"),
                                    ["--val-dir", "class cow", "cat, dog"]),
    "test class never seen": (lambda root: (root / "test/dog").rename(root / "test/cow"),
                              ["--test-dir", "class cow"]),
    "text for a labeled image": (lambda root: (root / "labeled/cat/001.jpg").write_text("x"),
                                 ["--labeled-dir", "labeled/cat/001.jpg: not an image"]),
    "labeled image cut off": (lambda root: cut_off(root / "labeled/cat/001.jpg", 0.9),
                              ["--labeled-dir", "labeled/cat/001.jpg: cannot be read"]),
    "loose image beside subfolders": (lambda root: os.rename(root / "labeled/cat/001.jpg",
                                                             root / "labeled/12.jpg"),
                                      ["--labeled-dir", "labeled/12.jpg", "beside"]),
    "fewer unlabeled images than a batch": (lambda root: emptied(root / "train", keep=15),
                                            ["--unlabeled-dir", "15 images", "--batch-size to 15"]),
    "mostly bad files": (mostly_empty_files,
                         ["25 of 48", "--unlabeled-dir", "00000.jpg: empty", "\n  ..."])}


@pytest.mark.parametrize("damage, words", BAD_PETS.values(), ids=BAD_PETS)
def test_bad_folders_are_refused(damage, words, pets, tmp_path, assert_refused):
    root = shutil.copytree(pets, tmp_path / "pets")
    damage(root)
    assert_refused("sgan_catsdogs", photo_folders(root), words)
