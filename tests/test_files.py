"""Files as other people have them: kinds of pixels, names, folders, captions, closed pipes."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from common import DALI_DECODES, check_images, classes_of, dali_loader, why_unusable
from tests.conftest import (CPU, MNIST, PETS, ROOT, SVHN, call_main, photo_folders, picture,
                            read_csv, refusal, save, train, write_idx)

# ====================================== kinds of pixels ===========================================

SIDE = 64
PHOTO = picture(size=(SIDE, SIDE))
RGB = np.asarray(PHOTO)  # (S, S, 3)
GREY, ALPHA = np.asarray(PHOTO.convert("L")), np.asarray(PHOTO.convert("L").rotate(90))


def sixteen(*channels):
    """Channels of 8 bits as one array of 16 bits, high byte first."""
    return np.dstack([channel.astype(">u2") * 257 for channel in channels]).astype(">u2")


def png(depth, color_type, rows):
    """A PNG by hand: rows (S, bytes of a row) uint8."""
    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, color_type, 0, 0, 0)
    data = b"".join(b"\0" + bytes(row) for row in rows)
    return lambda path: path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b""))


def bmp(bits, compression, data, palette=b""):
    """A BMP by hand, which stores the lowest row first."""
    offset = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, bits, compression, len(data), 0, 0,
                         len(palette) // 4, 0)
    return lambda path: path.write_bytes(
        b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + header + palette + data)


def tiff(array, photometric, **tags):
    """A TIFF by hand, not compressed, little-endian: array (S, S) or (S, S, C)."""
    channels = 1 if array.ndim == 2 else array.shape[2]
    bits, data = 8 * array.dtype.itemsize, np.ascontiguousarray(array).tobytes()
    fields = {256: SIDE, 257: SIDE, 258: (bits,) * channels, 259: 1, 262: photometric, 273: 8,
              277: channels, 278: SIDE, 279: len(data)}
    fields |= {int(tag.removeprefix("t")): value for tag, value in tags.items()}
    if fields.get(284) == 2:  # a plane for each channel
        size = len(data) // channels
        fields[273], fields[279] = tuple(8 + size * n for n in range(channels)), (size,) * channels
    entries, longer, at = b"", b"", 8 + len(data) + 2 + 12 * len(fields) + 4
    for tag, value in sorted(fields.items()):
        numbers = value if isinstance(value, tuple) else (value,)
        kind, code = (4, "I") if tag in (273, 279) else (3, "H")  # 32 or 16 bits
        packed = struct.pack(f"<{len(numbers)}{code}", *numbers).ljust(4, b"\0")
        if len(packed) > 4:
            packed, longer, at = struct.pack("<I", at), longer + packed, at + len(packed)
        entries += struct.pack("<HHI", tag, kind, len(numbers)) + packed
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return lambda path: path.write_bytes(head + data + struct.pack("<H", len(fields)) + entries
                                         + bytes(4) + longer)


def pnm(head, data):
    return lambda path: path.write_bytes(head.format(side=SIDE).encode() + bytes(data))


def pack(values, bits):
    """Rows of small values, several in a byte, the first one highest."""
    per_byte = 8 // bits
    parts = values.reshape(SIDE, -1, per_byte).astype(int) << (bits * np.arange(per_byte)[::-1])
    return parts.sum(axis=2).astype(np.uint8)


little = sixteen(GREY)[:, :, 0].astype("<u2")
greys = bytes(b for n in range(16) for b in (17 * n, 17 * n, 17 * n, 0))
run_lengths = b"".join(b"".join(bytes([1, v]) for v in row) + b"\0\0" for row in GREY[::-1])
KINDS = {  # every kind of DALI_DECODES, and in the end names of its kinds of the same contents
    "JPEG jpeg L": save(PHOTO.convert("L"), format="JPEG"),
    "JPEG jpeg RGB": save(PHOTO, format="JPEG", progressive=True),
    "JPEG jpeg CMYK;I": save(PHOTO.convert("CMYK"), format="JPEG"),
    "MPO jpeg RGB": save(PHOTO, format="MPO", save_all=True, append_images=[PHOTO.rotate(90)]),
    "PNG zip 1": save(PHOTO.convert("1"), format="PNG"),
    "PNG zip L": save(PHOTO.convert("L"), format="PNG"),
    "PNG zip L;2": png(2, 0, pack(GREY >> 6, 2)),
    "PNG zip L;4": png(4, 0, pack(GREY >> 4, 4)),
    "PNG zip LA": save(PHOTO.convert("LA"), format="PNG"),
    "PNG zip P": save(PHOTO.convert("P"), format="PNG", transparency=3),
    "PNG zip P;1": save(PHOTO.quantize(2), format="PNG"),
    "PNG zip P;2": save(PHOTO.quantize(4), format="PNG"),
    "PNG zip P;4": save(PHOTO.quantize(16), format="PNG"),
    "PNG zip RGB": save(PHOTO, format="PNG"),
    "PNG zip RGBA": save(PHOTO.convert("RGBA"), format="PNG"),
    "PNG zip I;16B": png(16, 0, map(bytes, sixteen(GREY))),
    "PNG zip LA;16B": png(16, 4, map(bytes, sixteen(GREY, ALPHA))),
    "PNG zip RGB;16B": png(16, 2, map(bytes, sixteen(*RGB.transpose(2, 0, 1)))),
    "PNG zip RGBA;16B": png(16, 6, map(bytes, sixteen(*RGB.transpose(2, 0, 1), ALPHA))),
    "BMP raw 1": save(PHOTO.convert("1"), format="BMP"),
    "BMP raw L": save(PHOTO.convert("L"), format="BMP"),
    "BMP raw P": save(PHOTO.convert("P"), format="BMP"),
    "BMP raw P;4": bmp(4, 0, bytes(pack(GREY[::-1] >> 4, 4)), greys[:60] + b"\0\x10\0\0"),
    "BMP raw BGR": save(PHOTO, format="BMP"),
    "BMP raw BGRX": bmp(32, 0, np.dstack([RGB[::-1, :, ::-1], ALPHA]).tobytes()),
    "BMP bmp_rle P": bmp(8, 1, run_lengths + b"\0\1",
                         bytes(b for n in range(256) for b in (n, n, n // 2, 0))),
    "TIFF raw L": save(PHOTO.convert("L"), format="TIFF"),
    "TIFF raw L;I": tiff(255 - GREY, 0),
    "TIFF raw P": save(PHOTO.convert("P"), format="TIFF"),
    "TIFF raw R": tiff(np.ascontiguousarray(RGB.transpose(2, 0, 1)).reshape(SIDE, SIDE, 3), 2,
                       t284=2),
    "TIFF raw RGB": save(PHOTO, format="TIFF"),
    "TIFF raw RGBX": save(PHOTO.convert("RGBX"), format="TIFF"),
    "TIFF raw RGBA": save(PHOTO.convert("RGBA"), format="TIFF"),
    "TIFF raw CMYK": save(PHOTO.convert("CMYK"), format="TIFF"),
    "TIFF raw YCbCr": save(PHOTO.convert("YCbCr"), format="TIFF"),
    "TIFF raw I;16": tiff(little, 1),
    "TIFF raw I;16B": save(Image.frombytes("I;16B", (SIDE, SIDE), sixteen(GREY).tobytes()),
                           format="TIFF"),
    "TIFF raw RGB;16L": tiff(sixteen(*RGB.transpose(2, 0, 1)).astype("<u2"), 2),
    "TIFF raw RGBA;16L": tiff(sixteen(*RGB.transpose(2, 0, 1), ALPHA).astype("<u2"), 2, t338=2),
    "TIFF libtiff 1": save(PHOTO.convert("1"), format="TIFF", compression="group4"),
    "TIFF libtiff L": save(PHOTO.convert("L"), format="TIFF", compression="tiff_lzw"),
    "TIFF libtiff P": save(PHOTO.convert("P"), format="TIFF", compression="packbits"),
    "TIFF libtiff RGB": save(PHOTO, format="TIFF", compression="jpeg"),
    "TIFF libtiff RGBA": save(PHOTO.convert("RGBA"), format="TIFF", compression="tiff_deflate"),
    "TIFF libtiff CMYK": save(PHOTO.convert("CMYK"), format="TIFF", compression="zstd"),
    "TIFF libtiff I;16N": save(Image.fromarray(little.astype(np.uint16)), format="TIFF",
                                compression="tiff_lzw"),
    "PPM raw 1;I": save(PHOTO.convert("1"), format="PPM"),
    "PPM raw L": save(PHOTO.convert("L"), format="PPM"),
    "PPM raw RGB": save(PHOTO, format="PPM"),
    "PPM raw I;16B": pnm("P5 {side} {side} 65535\n", sixteen(GREY)),
    "JPEG2000 jpeg2k L": save(PHOTO.convert("L"), format="JPEG2000"),
    "JPEG2000 jpeg2k RGB": save(PHOTO, format="JPEG2000"),
    "JPEG2000 jpeg2k RGBA": save(PHOTO.convert("RGBA"), format="JPEG2000"),
    "JPEG2000 jpeg2k I;16": save(Image.fromarray(little.astype(np.uint16)), format="JPEG2000"),
    "WEBP None RGB": save(PHOTO, format="WEBP"),
    "WEBP None RGBA": save(PHOTO.convert("RGBA"), format="WEBP", lossless=True),
}
NOT_WRITTEN = {  # Pillow cannot write them; they were compared once with files of other programs
    "JPEG jpeg CMYK", "MPO jpeg L", "TIFF libtiff RGB;16N"}


def pillow_pixels(path):
    """(S, S, 3) in [0, 255]; 16 bits of grey are scaled to 8, which Pillow does not do itself."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            return np.repeat(np.asarray(image)[:, :, None] / 257, 3, axis=2)
        return np.asarray(image.convert("RGB")).astype(float)


def test_table_has_a_file_of_each_kind():
    kinds = {f"{format} {decoder} {kind}" for (format, decoder), kinds in DALI_DECODES.items()
             for kind in kinds.split()}
    assert kinds == {*KINDS, *NOT_WRITTEN}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_pixels_are_decoded_as_pillow_does(kind, tmp_path):
    path = tmp_path / "photo"
    KINDS[kind](path)
    with Image.open(path) as image:
        parameters = image.tile[0][3] if image.tile else None
        seen = parameters if isinstance(parameters, str) else (parameters or [None])[0]
        assert image.format == kind.split()[0]
        assert image.format in ("WEBP", "JPEG2000") or seen == kind.split()[2]
    assert why_unusable(path) is None
    [(x, _)] = dali_loader([path], None, 1, SIDE, CPU)
    error = np.abs(255 * x[0].permute(1, 2, 0).numpy() - pillow_pixels(path))
    assert error.mean() < 0.6 and error.max() < 2
    assert pillow_pixels(path).std() > 10  # something is in it


signed = tiff((GREY // 2).astype(np.int8), 1, t339=2)
OTHER_KINDS = {  # DALI crashes on them or gives other colours
    "text.ppm": pnm("P3 {side} {side} 255\n", " ".join(map(str, RGB.flatten())).encode()),
    "text.pgm": pnm("P2 {side} {side} 255\n", " ".join(map(str, GREY.flatten())).encode()),
    "maximum 100.ppm": pnm("P6 {side} {side} 100\n", RGB // 3),
    "12 bits.pgm": pnm("P5 {side} {side} 4095\n", (GREY.astype(">u2") * 16).tobytes()),
    "int32.tiff": save(PHOTO.convert("I"), format="TIFF"),
    "float.tiff": save(PHOTO.convert("F"), format="TIFF"),
    "int16.tiff": tiff((little // 2).astype("<i2"), 1, t339=2),
    "int8.tiff": signed,
    "grey with alpha.tiff": save(PHOTO.convert("LA"), format="TIFF"),
    "lab.tiff": save(PHOTO.convert("LAB"), format="TIFF"),
    "one bit.tiff": save(PHOTO.convert("1"), format="TIFF"),
    "lzma.tiff": save(PHOTO, format="TIFF", compression="lzma"),
    "grey with alpha.jp2": save(PHOTO.convert("LA"), format="JPEG2000"),
    "cmyk.jp2": save(PHOTO.convert("CMYK"), format="JPEG2000"),
    "15 bits.bmp": bmp(16, 0, ((RGB[::-1].astype("<u2") >> 3) @ np.array([1024, 32, 1], "<u2")
                               ).tobytes()),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_kinds_of_pixels_that_dali_misreads_get_a_reason(name, tmp_path):
    OTHER_KINDS[name](tmp_path / name)
    with Image.open(tmp_path / name) as image:
        image.load()  # Pillow reads it
    assert re.fullmatch(r"\w+ of a kind that DALI does not decode \(.+\)",
                        why_unusable(tmp_path / name))


def test_a_misread_kind_does_not_end_a_run(pets, tmp_path):
    shutil.copytree(pets / "train", tmp_path / "train")
    shutil.copytree(pets / "test", tmp_path / "photos")
    for folder in ("train", "photos"):
        OTHER_KINDS["text.ppm"](tmp_path / folder / "p3.ppm")
        OTHER_KINDS["int32.tiff"](tmp_path / folder / "int32.tiff")
    folder, results = train("sgan_catsdogs", *PETS, *photo_folders(pets), "--dry-run",
                            "--unlabeled-dir", tmp_path / "train")
    assert results["left_out"] == 2
    assert {Path(row["file"]).name for row in read_csv(folder / "left_out.csv")} == {
        "p3.ppm", "int32.tiff"}
    call_main("sgan_catsdogs", "--predict", tmp_path / "photos", "--checkpoint",
              folder / "final.pt", "--out-dir", "labels", "--device", "cpu")
    [labels] = Path("labels").iterdir()
    assert len(read_csv(labels / "predictions.csv")) == 30


# ============================================ memory ==============================================

DECODE = """
import resource, sys, torch
from common import Photos, dali_loader
small, *large = sys.argv[1:]
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
next(dali_loader([small], None, 64, 32, torch.device("cpu")))
before = peak()
Photos(large, None, 32, torch.device("cpu"), cache_bytes=1 << 30)
next(Photos(large, None, 32, torch.device("cpu")).batches(60, range(len(large))))
print(peak() - before)
"""


def test_memory_follows_the_photos_and_not_the_batch(tmp_path):
    """Eight photos of 12 megapixels, 36 MB each: a batch of 64 would take 2300 MB."""
    PHOTO.save(tmp_path / "small.jpg")
    for n in range(8):
        Image.new("RGB", (4000, 3000), (30 * n, 90, 120)).save(tmp_path / f"{n}.jpg")
    paths = [tmp_path / "small.jpg", *sorted(tmp_path.glob("[0-9].jpg"))]
    done = subprocess.run([sys.executable, "-c", DECODE, *map(str, paths)], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    assert float(done.stdout) < 36 * 12


# ==================================== folders and classes =========================================


def write_photos(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PHOTO.save(folder / name, format="JPEG")


def test_what_systems_and_cameras_leave_behind_is_passed_over(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "photos"
    write_photos(elsewhere, "1.jpg")
    litter = ["__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found",
              "#recycle", ".thumbnails"]
    write_photos(folder, "cat/1.jpg", *(f"{name}/1.jpg" for name in litter),
                 *(f"cat/{name}/1.jpg" for name in litter))
    (folder / "to elsewhere").symlink_to(elsewhere)
    (folder / "cat/to photos").symlink_to(folder)  # a circle
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "1.JSON", "cat/1.xmp", "notes.txt",
                 "cat/1.aae", "cat/1.MOV"):
        (folder / name).write_text("no image")
    images, unusable = check_images(folder, "--flag")
    assert [str(path.relative_to(folder)) for path in images] == ["cat/1.jpg", "to elsewhere/1.jpg"]
    assert unusable == {}
    assert classes_of(images, folder, "--flag") == ["cat", "to elsewhere"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    write_photos(tmp_path, "cat/1.jpg", "dog/1.jpg")
    scandir = os.scandir

    def denied(path):  # the superuser may read all, so permissions cannot be taken away for a test
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(SystemExit) as stop:
        check_images(tmp_path, "--flag")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "--flag" in message and str(tmp_path / "dog") in message and "Permission" in message


@pytest.mark.parametrize("name, its_class", [
    ("cat.12.jpg", "cat"), ("dog_7.jpg", "dog"), ("cat3.jpg", "cat"), ("cat (1).jpg", "cat"),
    ("american_bulldog_1.jpg", "american_bulldog"), ("cat-tabby-004.png", "cat-tabby"),
    ("american_pit_bull_terrier_10.jpg", "american_pit_bull_terrier"), ("cat.jpg", "cat"),
    ("猫 1.jpg", "猫"), ("type2 diabetes_03.jpg", "type2 diabetes")])
def test_class_of_a_name_is_all_but_the_number_at_its_end(name, its_class):
    assert classes_of([Path("photos", name)], "photos", "--flag") == [its_class]


def test_class_of_a_subfolder_is_its_whole_name():
    images = [Path("photos", name) for name in ("cat_1/7.jpg", "dog/deep/down/cat.jpg")]
    assert classes_of(images, "photos", "--flag") == ["cat_1", "dog"]


@pytest.mark.parametrize("names, words", [
    (["cat/1.jpg", "dog/1.jpg", "Screenshot 2024.jpg"], ["Screenshot 2024.jpg", "beside"]),
    (["12.jpg", "cat.1.jpg"], ["12.jpg", "no class"]),
    (["(3).jpg", "cat.1.jpg"], ["(3).jpg", "no class"]),
    (["cat.1.jpg", "cat.2.jpg"], ["one class only (cat)"])])
def test_labeled_folders_without_clear_classes_are_refused(names, words, pets, tmp_path, capsys):
    write_photos(tmp_path / "labeled", *names)
    message = refusal(capsys, "sgan_catsdogs", *photo_folders(pets), "--labeled-dir",
                      tmp_path / "labeled")
    assert "--labeled-dir" in message or "no class" in message
    assert all(word in message for word in words)


def test_classes_are_counted_before_training_and_odd_folders_warned_of(pets, tmp_path, capsys):
    """A validation folder without dogs, which is the test folder too; a cat that is also a dog."""
    shutil.copytree(pets / "labeled", tmp_path / "labeled")
    shutil.copytree(pets / "val/cat", tmp_path / "val/cat")
    twin = tmp_path / "labeled/dog/twin.jpg"
    shutil.copy(sorted((tmp_path / "labeled/cat").iterdir())[0], twin)
    folder, _ = train("sgan_catsdogs", *PETS, *photo_folders(pets), "--dry-run", "--labeled-dir",
                      tmp_path / "labeled", "--val-dir", tmp_path / "val", "--test-dir",
                      f"{tmp_path}/labeled/../val")
    out = capsys.readouterr().out
    assert f"--labeled-dir {tmp_path / 'labeled'}: 4 cat, 5 dog" in out
    assert f"--val-dir {tmp_path / 'val'}: 8 cat, 0 dog" in out
    assert f"warning: --val-dir {tmp_path / 'val'} has no image of dog" in out
    assert "warning: --val-dir and --test-dir are the same folder" in out
    assert "2 labeled images are labeled otherwise elsewhere" in out
    conflicts = {row["file"]: row["labeled otherwise"]
                 for row in read_csv(folder / "conflicts.csv")}
    assert len(conflicts) == 2 and conflicts[conflicts[str(twin)]] == str(twin)
    before_training = out.index("4 cat, 5 dog") < out.index("epoch 1")
    assert before_training


def test_prepare_counts_the_classes(tmp_path, capsys):
    write_photos(tmp_path / "photos", *(f"{name}_{n}.jpg" for n in range(3)
                                        for name in ("big_cat", "big_dog")))
    refusal_or_count = "3 big_cat, 3 big_dog"
    with pytest.raises(SystemExit):  # too few for 1000 validation and test images
        call_main("sgan_catsdogs", "--prepare", tmp_path / "photos")
    assert refusal_or_count in capsys.readouterr().out


# ================================ captions, results, closed pipes =================================


def test_names_of_classes_are_never_formulas(pets, tmp_path):
    names = {"cat": "$5_1_front", "dog": "$5_1_back {"}
    for part in ("labeled", "val", "test"):
        for old, new in names.items():
            shutil.copytree(pets / part / old, tmp_path / part / new)
    folder, results = train("sgan_catsdogs", *PETS, *photo_folders(tmp_path), "--dry-run",
                            "--unlabeled-dir", pets / "train")
    assert results["num_labeled"] == 8
    assert (folder / "confusion.png").exists() and (folder / "predictions.png").exists()


def test_a_figure_that_fails_is_a_warning_and_results_are_there_before(pets, monkeypatch, capsys):
    from matplotlib.figure import Figure

    def fail(self, *args, **kwargs):
        raise ValueError("no ink")

    monkeypatch.setattr(Figure, "savefig", fail)
    folder, results = train("sgan_catsdogs", *PETS, *photo_folders(pets), "--dry-run")
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("RESULT ")
    assert "warning: plot_confusion failed" in err and "no ink" in err
    assert not list(folder.glob("*.png")) and not (folder / "last.pt").exists()
    assert results["steps"] == 2


def test_output_that_nobody_reads_does_not_end_a_run(pets, tmp_path):
    flags = [*PETS, *photo_folders(pets), "--dry-run", "--out-dir", tmp_path / "runs"]
    process = subprocess.Popen([sys.executable, ROOT / "sgan_catsdogs.py", *map(str, flags)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() != ""
    process.stdout.close()  # as `| head -1` does
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 0
    [folder] = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "results.json").read_text())["steps"] == 2


# ===================================== files under other names ====================================


@pytest.mark.parametrize("images, labels, words", [
    ((50, 28, 28), np.arange(50) % 26, ["label 25"]),
    ((50, 32, 32), np.arange(50) % 10, ["28 x 28", "(50, 32, 32)"]),
    ((50, 28, 28), np.arange(49) % 10, ["50", "49"]),
    ((0, 28, 28), np.arange(0), ["--data-dir"]),
    ((50, 784), np.arange(50) % 10, ["--data-dir"])])
def test_files_under_the_names_of_mnist_that_are_not_mnist(images, labels, words, tmp_path, capsys):
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"MNIST/raw/{part}-images-idx3-ubyte", np.zeros(images))
        write_idx(tmp_path / f"MNIST/raw/{part}-labels-idx1-ubyte", labels)
    message = refusal(capsys, "sgan_mnist", *MNIST, "--data-dir", tmp_path)
    assert all(word in message for word in words)


@pytest.mark.parametrize("labels", [np.arange(50) % 26, np.arange(50) - 5.0])
def test_labels_that_are_not_those_of_svhn(labels, tmp_path, capsys):
    (tmp_path / "SVHN").mkdir()
    for part in ("train", "test"):
        savemat(tmp_path / f"SVHN/{part}_32x32.mat",
                {"X": np.zeros((32, 32, 3, 50), np.uint8), "y": labels[:, None]})
    message = refusal(capsys, "sgan_svhn", *SVHN, "--data-dir", tmp_path)
    assert f"from {labels.min():.0f} to {labels.max():.0f}" in message
