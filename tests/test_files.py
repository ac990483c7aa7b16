"""Files as other people have them: kinds of pixels, names, folders, captions, closed pipes."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from scipy.io import savemat

import common
from common import (check_images, classes_of, dali_loader, decoded_by_dali, same_bytes,
                    why_unusable)
from tests.conftest import (CPU, MNIST, PETS, ROOT, SVHN, call_main, photo_folders, picture,
                            read_csv, refusal, save, train, write_idx)

# ====================================== kinds of pixels ===========================================

SIDE = 64
PHOTO = picture(size=(SIDE, SIDE))
TURNED = Image.Exif()
TURNED[0x112] = 8  # upright only after a quarter turn
RGB = np.asarray(PHOTO)  # (S, S, 3)
GREY = np.asarray(PHOTO.convert("L"))
GREY16 = Image.fromarray(GREY.astype(np.uint16) * 257)


def png16(path):
    """A PNG of 16 bits a channel by hand, which Pillow does not write in colour."""
    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    rows = (RGB.astype(">u2") * np.array(257, ">u2")).astype(">u2").reshape(SIDE, -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)
                     + chunk(b"IEND", b""))


def tiff(array, **others):
    """A TIFF by hand, not compressed, little-endian: array (S, S), or (C, S, S) in planes."""
    planes = 1 if array.ndim == 2 else len(array)
    bits, size = 8 * array.dtype.itemsize, array.nbytes // planes
    fields = {256: SIDE, 257: SIDE, 258: (bits,) * planes, 259: 1, 262: 2 if planes > 1 else 1,
              273: tuple(8 + size * n for n in range(planes)), 277: planes, 278: SIDE,
              279: (size,) * planes, 284: 2 if planes > 1 else 1}
    fields |= {int(tag.removeprefix("t")): value for tag, value in others.items()}
    entries, longer, at = b"", b"", 8 + array.nbytes + 2 + 12 * len(fields) + 4
    for tag, value in sorted(fields.items()):
        numbers = value if isinstance(value, tuple) else (value,)
        kind, code = (4, "I") if tag in (273, 279) else (3, "H")  # 32 or 16 bits
        packed = struct.pack(f"<{len(numbers)}{code}", *numbers).ljust(4, b"\0")
        if len(packed) > 4:
            packed, longer, at = struct.pack("<I", at), longer + packed, at + len(packed)
        entries += struct.pack("<HHI", tag, kind, len(numbers)) + packed
    head = b"II*\0" + struct.pack("<I", 8 + array.nbytes)
    return lambda path: path.write_bytes(head + array.tobytes() + struct.pack("<H", len(fields))
                                         + entries + bytes(4) + longer)


def saved(image):
    """The bytes of a JPEG."""
    data = io.BytesIO()
    image.save(data, "JPEG")
    return data.getvalue()


def odd_webp(path):
    """Lossless WebP whose pixels are a chunk of an odd number of bytes, before its EXIF."""
    for seed in range(40):
        data = io.BytesIO()
        picture(size=(SIDE, SIDE), seed=seed).save(data, "WEBP", lossless=True, exif=TURNED)
        if struct.unpack("<I", data.getvalue()[34:38])[0] % 2:
            path.write_bytes(data.getvalue())
            return


KINDS = {
    "JPEG, grey": save(PHOTO.convert("L"), format="JPEG"),
    "JPEG, progressive and turned": save(PHOTO, format="JPEG", progressive=True, exif=TURNED),
    "JPEG, CMYK": save(PHOTO.convert("CMYK"), format="JPEG"),
    "JPEG, RGB not YCbCr": save(PHOTO, format="JPEG", keep_rgb=True),
    "JPEG with a stray byte": lambda path: path.write_bytes(
        (jpeg := saved(PHOTO))[:20] + b"\0" + jpeg[20:]),
    "JPEG with a second picture": save(PHOTO, format="MPO", save_all=True,
                                       append_images=[PHOTO.rotate(90)]),
    "PNG, grey with alpha": save(PHOTO.convert("LA"), format="PNG"),
    "PNG, palette and transparent": save(PHOTO.convert("P"), format="PNG", transparency=3),
    "PNG, turned": save(PHOTO.convert("RGBA"), format="PNG", exif=TURNED),
    "PNG, 1 bit": save(PHOTO.convert("1"), format="PNG"),
    "PNG, 4 bits": save(PHOTO.convert("P", palette=1, colors=16), format="PNG", bits=4),
    "PNG, grey of 16 bits": save(GREY16, format="PNG"),
    "PNG, colour of 16 bits": png16,
    "BMP": save(PHOTO, format="BMP"),
    "GIF": save(PHOTO.convert("P"), format="GIF"),
    "PPM": save(PHOTO, format="PPM"),
    "PPM as text": lambda path: path.write_text(
        f"P3 {SIDE} {SIDE} 255\n" + " ".join(map(str, RGB.flatten()))),
    "TIFF, turned": save(PHOTO, format="TIFF", exif=TURNED),
    "TIFF, lzma": save(PHOTO, format="TIFF", compression="lzma"),
    "TIFF, grey with alpha": save(PHOTO.convert("LA"), format="TIFF"),
    "TIFF, Lab": save(PHOTO.convert("LAB"), format="TIFF"),
    "TIFF, 16 bits, LZW": save(GREY16, format="TIFF", compression="tiff_lzw"),
    "TIFF, 8 bits in planes": tiff(np.ascontiguousarray(RGB.transpose(2, 0, 1))),
    "JPEG 2000, 16 bits": save(GREY16, format="JPEG2000"),
    "WebP": save(PHOTO, format="WEBP"),
    "WebP, odd": odd_webp,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_pixels_are_decoded_as_pillow_does(kind, tmp_path):
    path = tmp_path / "photo"
    KINDS[kind](path)
    assert why_unusable(path) is None
    assert decoded_by_dali(path) == (kind.startswith("JPEG,") or "second picture" in kind or (
        kind.startswith("PNG,") and "bit" not in kind))
    with Image.open(path) as image:
        expected = np.asarray(image)
        if image.mode.startswith("I"):
            expected = np.repeat(expected[:, :, None] / 257, 3, axis=2)
        else:
            expected = np.asarray(image.convert("RGB")).astype(float)
            if image.format != "TIFF" and image.getexif().get(0x112) == 8:
                expected = np.rot90(expected)  # Pillow turns a TIFF itself
    for _ in range(2):
        [(x, _)] = dali_loader([path], None, 1, SIDE, CPU)
        error = np.abs(255 * x[0].permute(1, 2, 0).numpy() - expected)
        assert error.mean() < 0.6 and error.max() < 2
    assert expected.std() > 10  # something is in it


OTHER_KINDS = {
    "32 bits": save(PHOTO.convert("I"), format="TIFF"),
    "floating point": save(PHOTO.convert("F"), format="TIFF"),
    "signed": tiff((GREY // 2).astype(np.int8), t339=2),
    "12 bits": tiff(np.repeat(GREY, 2, axis=1)[:, :96].copy(), t258=12),
    "16 bits in planes": tiff((RGB.transpose(2, 0, 1).astype("<u2") * 257)),
    "16 bits, white is zero": tiff(GREY.astype("<u2") * 257, t262=0),
    "PNG whose last byte is missing": save(PHOTO, format="PNG", cut=1 - 1e-9),
    "a program": save(PHOTO, format="EPS"),
    "pages": save(PHOTO, format="TIFF", save_all=True, append_images=[PHOTO]),
    "film": save(PHOTO, format="GIF", save_all=True, append_images=[PHOTO.rotate(90)]),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_kinds_of_pixels_that_would_be_misread_get_a_reason(kind, tmp_path):
    OTHER_KINDS[kind](tmp_path / "photo")
    assert why_unusable(tmp_path / "photo").startswith("cannot be read: ")


def test_loader_mixes_kinds_in_order_on_every_device(tmp_path):
    """Seven files, of which each third is no JPEG, in batches of which the last is smaller."""
    for n in range(7):
        image = Image.new("RGB", (50 + n, 40), (30 * n, 255 - 30 * n, 90))
        image.save(tmp_path / f"{n}", format="TIFF" if n % 3 == 2 else "JPEG")
    files = [tmp_path / f"{n}" for n in range(7)]
    devices = [CPU, *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    for device in devices:
        batches = list(dali_loader(files, [5, 4, 3, 2, 1, 0, 6], 4, 32, device))
        assert [y.tolist() for _, y in batches] == [[5, 4, 3, 2], [1, 0, 6]]
        for n, color in enumerate(torch.cat([255 * x.mean(dim=(2, 3)) for x, _ in batches])):
            expected = torch.tensor([30.0 * n, 255 - 30 * n, 90])
            torch.testing.assert_close(color.cpu(), expected, rtol=0, atol=3)


def test_unusable_kinds_do_not_end_a_run_and_rare_ones_are_used(pets, tmp_path):
    shutil.copytree(pets / "train", tmp_path / "train")
    shutil.copytree(pets / "test", tmp_path / "photos")
    for folder in ("train", "photos"):
        OTHER_KINDS["32 bits"](tmp_path / folder / "int32.tiff")
        KINDS["WebP, odd"](tmp_path / folder / "odd.webp")
    folder, results = train("sgan_catsdogs", *PETS, *photo_folders(pets), "--dry-run",
                            "--unlabeled-dir", tmp_path / "train")
    assert results["left_out"] == 1
    assert [Path(row["file"]).name for row in read_csv(folder / "left_out.csv")] == ["int32.tiff"]
    call_main("sgan_catsdogs", "--predict", tmp_path / "photos", "--checkpoint",
              folder / "final.pt", "--out-dir", "labels", "--device", "cpu")
    [labels] = Path("labels").iterdir()
    assert len(read_csv(labels / "predictions.csv")) == 31


# ============================================= cost ===============================================


def lines_run(function, *args):
    """How many lines of Python the call runs; unlike its seconds, the same on every machine."""
    count = 0

    def tracer(frame, event, arg):
        nonlocal count
        count += event == "line"
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return count


def test_duplicates_are_found_in_work_that_grows_with_the_files(tmp_path):
    """Four times as many files, all of one size: pairs of them would be 16 times as many."""
    files = [tmp_path / str(n) for n in range(500)]
    for n, path in enumerate(files):
        path.write_text(f"{n:08d}")
    few, many = lines_run(same_bytes, files[:100]), lines_run(same_bytes, files[100:])
    assert 0 < many < 5 * few


def test_confusion_of_many_classes_is_small_and_soon_drawn(monkeypatch):
    numbers = []  # the numbers in the cells; 360,000 of them would take a quarter of an hour
    write = Axes.text
    monkeypatch.setattr(Axes, "text", lambda *args, **kw: numbers.append(0) or write(*args, **kw))
    for count, size in ((40, 2000), (600, 2000)):
        names = [f"class {n}" for n in range(count)]
        common.plot_confusion(torch.eye(count).long(), names, "c.png")
        with Image.open("c.png") as image:
            assert 1500 < image.width <= size and image.height <= size
    assert len(numbers) == 40 * 40


def test_a_long_check_says_so_before_it(tmp_path, capsys, monkeypatch):
    for n in range(5001):
        (tmp_path / f"{n}.png").touch()
    printed = []  # until each file's turn
    monkeypatch.setattr(common, "why_unusable",
                        lambda path: printed.append(capsys.readouterr().out))
    check_images(tmp_path, "--flag")
    assert len(printed) == 5001 and "5001 files in --flag" in "".join(printed)


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


def test_what_systems_and_cameras_leave_behind_is_passed_over(tmp_path, capsys):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "photos"
    write_photos(elsewhere, "1.jpg")
    litter = ["__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found",
              "#recycle", ".thumbnails"]
    write_photos(folder, "cat/1.jpg", *(f"{name}/1.jpg" for name in litter),
                 *(f"cat/{name}/1.jpg" for name in litter))
    (folder / "to elsewhere").symlink_to(elsewhere)
    (folder / "cat/to photos").symlink_to(folder)  # a circle
    for name in (".DS_Store", "Thumbs.db", "cat/1.jpg:Zone.Identifier", "cat/2.jpg:Zone.Identifier",
                 "cat/2.HEIC", "notes/README"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no image" if name != "Thumbs.db" else "")
    images, unusable = check_images(folder, "--flag")
    assert [str(path.relative_to(folder)) for path in images] == ["cat/1.jpg", "to elsewhere/1.jpg"]
    assert [path.name for path in unusable] == ["2.HEIC"]  # a phone's photo, which is missed
    assert classes_of(images, folder, "--flag") == ["cat", "to elsewhere"]
    printed = capsys.readouterr().out
    for words in ("4 files", "2 .identifier", "1 .db", "1 without ending"):
        assert words in printed


def test_a_film_beside_photos_is_not_read_into_memory(tmp_path, monkeypatch):
    write_photos(tmp_path, "1.jpg")
    with open(tmp_path / "film.mov", "wb") as film:
        film.truncate(1 << 33)  # 8 GB, which take no room on the disk
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes",
                        lambda path: pytest.fail("all of it") if path.suffix == ".mov"
                        else read_bytes(path))
    images, unusable = check_images(tmp_path, "--flag")
    assert [path.name for path in images] == ["1.jpg"] and unusable == {}


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
    ("猫 1.jpg", "猫"), ("type2 diabetes_03.jpg", "type2 diabetes"), ("cow_7 (2).jpg", "cow"),
    ("pug-12 (1) (3).jpg", "pug"), (f"cat_{10**40}_{10**30}_n.jpg", f"cat_{10**40}_{10**30}_n")])
def test_class_of_a_name_is_all_but_the_numbers_at_its_end(name, its_class):
    assert classes_of([Path("photos", name)], "photos", "--flag") == [its_class]


def test_class_of_a_subfolder_is_its_whole_name():
    for names, classes in ((("cat_1/7.jpg", "dog/deep/down/cat.jpg"), ["cat_1", "dog"]),
                           (("train/1.jpg", "car/1.jpg"), ["train", "car"]),  # vehicles
                           (("cow/2023/1.jpg", "pig/2023/1.jpg"), ["cow", "pig"])):
        images = [Path("photos", name) for name in names]
        assert classes_of(images, "photos", "--flag") == classes


@pytest.mark.parametrize("names, words", [
    (["cat/1.jpg", "dog/1.jpg", "Screenshot 2024.jpg"], ["Screenshot 2024.jpg", "beside"]),
    (["12.jpg", "cat.1.jpg"], ["12.jpg", "no class"]),
    (["(3).jpg", "cat.1.jpg"], ["(3).jpg", "no class"]),
    (["cat.1.jpg", "cat.2.jpg"], ["one class only (cat)"]),
    (["Train/a/1.jpg", "valid/a/2.jpg"], ["parts of a data set", "valid"]),
    (["train/cat.1.jpg", "test1/1.jpg"], ["parts of a data set", "train"])])
def test_labeled_folders_without_clear_classes_are_refused(names, words, pets, tmp_path, capsys):
    write_photos(tmp_path / "labeled", *names)
    message = refusal(capsys, "sgan_catsdogs", *photo_folders(pets), "--labeled-dir",
                      tmp_path / "labeled")
    assert "--labeled-dir" in message or "no class" in message
    assert all(word in message for word in words)


def test_classes_are_counted_before_training_and_odd_folders_warned_of(pets, tmp_path, capsys):
    """A validation folder without dogs, and a cat that is also a dog."""
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
    pairs = {row["file"]: row["other file"] for row in read_csv(folder / "duplicates.csv")
             if row["what that means"] == "labeled otherwise"}
    assert len(pairs) == 2 and pairs[pairs[str(twin)]] == str(twin)
    assert out.index("4 cat, 5 dog") < out.index("epoch 1")


# ========================================= other terminals ========================================


def test_names_that_a_terminal_cannot_show_do_not_end_a_run(pets, tmp_path):
    for part in ("labeled", "val", "test"):
        shutil.copytree(pets / part / "cat", tmp_path / part / "кошка")
        shutil.copytree(pets / part / "dog", tmp_path / part / "犬")
    flags = [*PETS, *photo_folders(tmp_path), "--unlabeled-dir", pets / "train", "--dry-run"]
    done = subprocess.run([sys.executable, ROOT / "sgan_catsdogs.py", *map(str, flags)], text=True,
                          capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "4 \\u043a" in done.stdout and done.stdout.splitlines()[-1].startswith("RESULT ")


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


def test_a_signal_while_a_figure_is_drawn_ends_the_process():
    @common.only_warns
    def draw():
        raise SystemExit(130)  # as the handler of Ctrl-C does

    with pytest.raises(SystemExit):
        draw()


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
