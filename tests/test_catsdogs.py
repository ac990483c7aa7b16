"""sgan_catsdogs.py as a job to be trusted: bad files, leaks, runs that are killed, prediction."""

import contextlib
import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import common
from common import (cached_loader, check_images, dali_loader, decode_all, draw_folders, drawn_by,
                    same_bytes, why_unusable)
from tests.conftest import PETS, ROOT, Runs, pet_folders
from tests.test_scripts import CPU, assert_refused, call_main, new_classifier, same_bits

# ========================================= image files ============================================


def picture(mode="RGB", size=(300, 220)):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(256, size=(6, 8, 3), dtype=np.uint8))
    return noise.resize(size, Image.BICUBIC).convert(mode)


def cut_off(path, share):
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def save(image, cut=None, **options):
    def write(path):
        image.save(path, **options)
        if cut:
            cut_off(path, cut)
    return write


def link(path):
    picture().save(path.with_name("target.jpg"))
    path.symlink_to(path.with_name("target.jpg"))


GOOD = {
    "photo.jpg": save(picture()),
    "progressive.jpg": save(picture(), progressive=True),
    "grey.jpg": save(picture("L")),
    "cmyk.jpg": save(picture("CMYK")),
    "palette.png": save(picture("P")),
    "transparent.png": save(picture("RGBA")),
    "sixteen bits.png": save(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20))),
    "one pixel.jpg": save(picture(size=(1, 1))),
    "wide.jpg": save(picture(size=(20_000, 3))),
    "phone.jpg": save(picture(), format="MPO", save_all=True, append_images=[picture()]),
    "LOUD.JPG": save(picture(), format="JPEG"),
    "mon chat préféré 猫.jpg": save(picture()),
    "really a jpeg.png": save(picture(), format="JPEG"),
    "no extension": save(picture(), format="PNG"),
    "x.webp": save(picture()),
    "x.bmp": save(picture()),
    "x.tiff": save(picture()),
    "link.jpg": link,
}
BAD = {
    "empty.jpg": (lambda path: path.write_bytes(b""), "empty"),
    "text.jpg": (lambda path: path.write_text("a cat, honestly"), "not an image"),
    "half.jpg": (save(picture(), cut=0.5), "truncated"),
    "nearly whole.jpg": (save(picture(), cut=0.99), "truncated"),
    "half.png": (save(picture(), cut=0.5), "cannot be read"),
    "end missing.png": (save(picture(), cut=0.999), "cannot be read"),
    "half.webp": (save(picture(), cut=0.5), "cannot be read"),
    "x.gif": (save(picture()), "GIF"),
    "animated.webp": (save(picture(), save_all=True, append_images=[picture("L")]), "several"),
    "pages.tiff": (save(picture(), save_all=True, append_images=[picture("L")]), "several"),
    "broken link.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "cannot be read"),
}


@pytest.mark.parametrize("name", GOOD)
def test_images_of_all_kinds_are_usable_and_can_be_loaded(name, tmp_path):
    GOOD[name](tmp_path / name)
    assert why_unusable(tmp_path / name) is None
    [(x, _)] = dali_loader([tmp_path / name], None, 1, 32, CPU)
    assert x.shape == (1, 3, 32, 32) and x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_decoded_get_a_reason(name, tmp_path):
    write, word = BAD[name]
    write(tmp_path / name)
    assert word in why_unusable(tmp_path / name)


@pytest.mark.parametrize("options", [{}, {"shuffle_seed": [3, 1], "drop_last": True, "shard_id": 1,
                                          "num_shards": 2, "first_batch": 1}])
def test_decoded_images_come_in_the_same_batches(options, pets):
    files = sorted((pets / "train").rglob("*.jpg"))
    images = decode_all(files, 32, CPU)
    assert images.dtype == torch.uint8 and images.shape == (len(files), 3, 32, 32)
    decoded = list(cached_loader(images, 5, **options))
    streamed = list(dali_loader(files, None, 5, 32, CPU, **options))
    assert len(decoded) == len(streamed) > 1
    for (x, y), (x_streamed, y_streamed) in zip(decoded, streamed):
        assert torch.equal(y, y_streamed)
        torch.testing.assert_close(x, x_streamed, rtol=0, atol=1e-6)


def test_folders_are_searched_through_links_and_litter_is_passed_over(tmp_path):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "photos"
    for place in (elsewhere, folder / "a/b", folder / ".thumbnails"):
        place.mkdir(parents=True)
        picture().save(place / "1.jpg")
    (folder / "to elsewhere").symlink_to(elsewhere)
    (folder / "a/to photos").symlink_to(folder)  # a circle
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_text("litter")
    (folder / "notes.txt").write_text("not litter")
    images, unusable = check_images(folder, "--flag")
    assert [str(path.relative_to(folder)) for path in images] == ["a/b/1.jpg", "to elsewhere/1.jpg"]
    assert unusable == {folder / "notes.txt": "not an image"}


def test_leaks_are_files_of_the_same_bytes(tmp_path):
    paths = [tmp_path / name for name in "abcde"]
    for path, text in zip(paths, ("cat", "dog", "dog", "cow", "sheep")):
        path.write_text(text)
    assert same_bytes(paths[:2], paths[2:]) == {paths[1]: paths[2]}
    assert same_bytes(paths[:1], paths[2:]) == {}


def read_csv(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_bad_files_are_left_out_and_listed_and_leaks_reported(pets, tmp_path, capsys):
    shutil.copytree(pets, tmp_path / "pets")
    train = tmp_path / "pets/train"
    for name, write in GOOD.items():
        write(train / name)
    for name, (write, _) in BAD.items():
        write(train / name)
    cut_off(tmp_path / "pets/test/dog/001.jpg", 0.5)
    shutil.copy(tmp_path / "pets/test/cat/002.jpg", train / "another name.jpg")
    call_main("sgan_catsdogs", *PETS, *pet_folders(tmp_path / "pets"), "--out-dir",
              tmp_path / "runs", "--epochs", 1)
    output = capsys.readouterr().out
    [run] = (tmp_path / "runs").iterdir()
    left_out = {Path(row["file"]).name: row["why"] for row in read_csv(run / "left_out.csv")}
    assert left_out.keys() == {*BAD, "001.jpg"}
    assert all(word in left_out[name] for name, (_, word) in BAD.items())
    [leak] = read_csv(run / "leaks.csv")
    assert leak["held out"].endswith("test/cat/002.jpg")
    assert leak["training"].endswith("another name.jpg")
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: 12 ") and "left_out.csv" in warnings[0]
    assert warnings[1].startswith("warning: 1 ") and "leaks.csv" in warnings[1]
    results = json.loads((run / "results.json").read_text())
    assert (results["left_out"], results["leaks"]) == (12, 1)
    assert f"{48 + len(GOOD) + 1 + 1} unlabeled" in output  # the link's target, the leak


def test_a_folder_of_mostly_unusable_files_is_refused_with_their_list(pets, tmp_path, capsys):
    shutil.copytree(pets / "train", tmp_path / "train")
    for path in sorted((tmp_path / "train").iterdir())[:25]:
        path.write_bytes(b"")
    assert_refused(capsys, ["--unlabeled-dir", "25 of 48", "00000.jpg: empty", "..."], tmp_path,
                   "sgan_catsdogs", *PETS, *pet_folders(pets), "--unlabeled-dir",
                   tmp_path / "train")


def test_photos_of_the_same_name_in_other_subfolders_are_all_drawn(tmp_path):
    images = [tmp_path / f"photos/cat/{place}/1.jpg" for place in "abcdef"]
    for path in images:
        path.parent.mkdir(parents=True)
        path.write_text(str(path))
    targets = [tmp_path / part for part in ("labeled", "val", "train")]
    draw_folders(images, ["cat"] * 6, targets, [3, 2], 0)
    record = json.loads((tmp_path / "labeled.json").read_text())
    first = [Path(record["source"], name) for name in record["files"]]
    drawn = [path for target in targets for path in target.rglob("*.jpg")]
    assert sorted(path.read_text() for path in drawn) == sorted(map(str, images))
    assert [len(list(target.rglob("*.jpg"))) for target in targets] == [3, 2, 1]
    assert {path.read_text() for path in targets[0].rglob("*.jpg")} == set(map(str, first))
    assert all(path.read_text() == str(path) for path in images)  # the photos are as they were


def test_a_seed_is_recorded_of_as_many_photos_as_were_drawn(tmp_path):
    """The record of a draw lies beside its folder, where others may come later."""
    photos = [tmp_path / f"photos/cat/{n}.jpg" for n in range(6)]
    photos[0].parent.mkdir(parents=True)
    for path in photos:
        path.write_text("")
    draw_folders(photos, ["cat"] * 6, [tmp_path / "labeled", tmp_path / "train"], [3], 7)
    assert drawn_by(tmp_path / "labeled", 3) == 7
    assert drawn_by(tmp_path / "labeled", 4) is None  # other photos
    assert drawn_by(tmp_path / "train", 3) is None


# ==================================== runs that are ended early ===================================

STEPS_PER_EPOCH = 48 // 16


@pytest.fixture(scope="module")
def flags(pets):
    return [*PETS, *pet_folders(pets), "--epochs", 2]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run that nothing interrupted."""
    return train(flags, tmp_path_factory.mktemp("whole"))


def train(flags, out_dir):
    call_main("sgan_catsdogs", *flags, "--out-dir", out_dir)
    [run] = out_dir.iterdir()
    return run


def end_at(step, action, flags, out_dir):
    """Train, with an action after the first update of one step; its folder and exit."""
    count, updates_a_step = [0], 1 if "--supervised-only" in flags else 2

    def after_update(optimizer, args, kwargs):
        count[0] += 1
        if count[0] == updates_a_step * (step - 1) + 1:
            action()

    handle = register_optimizer_step_post_hook(after_update)
    try:
        with pytest.raises(SystemExit) as stop:
            call_main("sgan_catsdogs", *flags, "--out-dir", out_dir)
    finally:
        handle.remove()
    [run] = out_dir.iterdir()
    return run, stop.value.code


def assert_same_run(run, other):
    """Metrics and weights are equal bit for bit; times are not."""
    for name in ("final.pt", "best.pt"):
        assert same_bits(torch.load(run / name, weights_only=True),
                         torch.load(other / name, weights_only=True))
    rows, other_rows = read_csv(run / "metrics.csv"), read_csv(other / "metrics.csv")
    for row in rows + other_rows:
        del row["seconds"], row["images_per_s"]
    assert rows == other_rows
    results, others = (json.loads((folder / "results.json").read_text()) for folder in (run, other))
    for key in ("test_accuracy", "test_accuracy_best_val", "val_accuracy", "steps"):
        assert results[key] == others[key]
    assert not (run / "last.pt").exists()


@pytest.mark.parametrize("step", [STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2])
def test_a_signal_ends_the_run_after_its_step_and_resume_goes_on_exactly(step, flags, whole,
                                                                         tmp_path):
    run, message = end_at(step, lambda: os.kill(os.getpid(), signal.SIGTERM), flags, tmp_path)
    assert message.startswith(f"stopped after step {step} of {2 * STEPS_PER_EPOCH}")
    assert message.endswith(f"python sgan_catsdogs.py --resume {run}")
    assert torch.load(run / "last.pt", weights_only=True)["step"] == step
    call_main("sgan_catsdogs", "--resume", run)
    assert_same_run(run, whole)


def test_baseline_is_resumed_too(flags, tmp_path):
    """Its second optimiser never had a step."""
    flags = [*flags, "--dry-run", "--supervised-only"]  # two steps
    whole = train(flags, tmp_path / "whole")
    run, _ = end_at(1, lambda: os.kill(os.getpid(), signal.SIGINT), flags, tmp_path / "ended")
    call_main("sgan_catsdogs", "--resume", run)
    assert_same_run(run, whole)


def test_checkpoints_within_an_epoch_change_nothing(flags, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("sgan_catsdogs.SAVE_SECONDS", 0)
    saved = []
    monkeypatch.setattr("sgan_catsdogs.random_state",
                        lambda: saved.append(1) or common.random_state())
    run = train(flags, tmp_path)
    assert len(saved) == 2 * STEPS_PER_EPOCH
    assert_same_run(run, whole)


def test_a_process_killed_at_any_moment_is_resumed_exactly(flags, whole, tmp_path):
    """kill -9 a random time after the first two new checkpoints, and go on to the end."""
    out_dir, delays = tmp_path / "runs", np.random.default_rng(0).uniform(0, 0.5, 20)
    command = [*flags, "--out-dir", out_dir]
    kills = 0
    for delay in delays:
        process = subprocess.Popen([sys.executable, ROOT / "sgan_catsdogs.py", *map(str, command)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = {path: path.stat().st_mtime_ns for path in out_dir.glob("*/last.pt")}
        while process.poll() is None:
            now = {path: path.stat().st_mtime_ns for path in out_dir.glob("*/last.pt")}
            if kills < 2 and now and now != before:
                time.sleep(delay)
                process.kill()
                kills += process.wait() == -signal.SIGKILL
                break
            time.sleep(0.02)
        [run] = out_dir.iterdir()
        if process.returncode == 0 or not (run / "last.pt").exists():
            break
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        command = ["--resume", run]
    assert kills >= 1
    assert_same_run(run, whole)
    assert not list(run.glob(".*"))  # nor is anything left that was half written


def test_a_full_disk_keeps_the_checkpoint_before(flags, whole, tmp_path):
    """A file may grow to 100 MB only: best.pt can be written, last.pt no more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 10**6, limits[1]))

    with Runs.starting:  # no other process is to begin with that limit
        try:
            run, message = end_at(STEPS_PER_EPOCH + 1, fill, flags, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"stopped: {run / 'last.pt'} cannot be written")
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]
    assert torch.load(run / "last.pt", weights_only=True)["step"] == STEPS_PER_EPOCH
    call_main("sgan_catsdogs", "--resume", run)
    assert_same_run(run, whole)


@pytest.fixture(scope="module")
def ended(flags, tmp_path_factory):
    """A run that was ended after its second step, its folder."""
    run, _ = end_at(2, lambda: os.kill(os.getpid(), signal.SIGINT), flags,
                    tmp_path_factory.mktemp("ended"))
    return run


def refused(capsys, words, *flags):
    with pytest.raises(SystemExit) as stop:
        call_main("sgan_catsdogs", *flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ")
    assert len(message.splitlines()) == 1
    for word in words:
        assert str(word) in message


def test_other_flags_than_those_of_the_run_are_refused(ended, flags, tmp_path, capsys):
    for flag, value, old in (("--epochs", 5, 2), ("--seed", 1, 0), ("--lr", 0.1, 0.001)):
        refused(capsys, [flag, value, old, ended], "--resume", ended, flag, value)
    assert torch.load(ended / "last.pt", weights_only=True)["step"] == 2  # as it was
    state = torch.load(ended / "last.pt", weights_only=True)
    del state["args"]["constant_lr"]  # as if the run were older than the flag
    torch.save(state, tmp_path / "last.pt")
    refused(capsys, ["--constant-lr False, not True", tmp_path], "--resume", tmp_path,
            "--constant-lr")


def test_a_run_that_another_process_is_at_work_on_is_refused(flags, tmp_path, capsys):
    """Of two processes the one that began the run has it, until it ends."""
    lock = [sys.executable, "-c", "import fcntl; f = open('args.json', 'r+'); "
            "fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); input('held')"]

    def end():
        [run] = (tmp_path / "runs").iterdir()
        other = subprocess.run(lock, cwd=run, capture_output=True, text=True)
        assert "BlockingIOError" in other.stderr or "PermissionError" in other.stderr
        os.kill(os.getpid(), signal.SIGINT)

    run, _ = end_at(2, end, flags, tmp_path / "runs")
    run = shutil.copytree(run, tmp_path / "run")  # the lock on the other is this process's
    with subprocess.Popen(lock, cwd=run, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.read(4) == b"held"
        refused(capsys, ["--resume", run, "another process"], "--resume", run)
        other.communicate(b"\n")
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 2  # as it was


def test_damaged_or_missing_checkpoints_are_refused(ended, whole, tmp_path, capsys):
    refused(capsys, ["--resume", "last.pt"], "--resume", tmp_path)
    refused(capsys, ["--resume", "last.pt"], "--resume", whole)  # finished: nothing to resume
    shutil.copy(ended / "last.pt", tmp_path)
    cut_off(tmp_path / "last.pt", 0.7)
    refused(capsys, ["--resume", "last.pt", "damaged"], "--resume", tmp_path)
    shutil.copy(whole / "best.pt", tmp_path / "last.pt")
    refused(capsys, ["--resume", "last.pt"], "--resume", tmp_path)
    state = torch.load(ended / "last.pt", weights_only=True)
    state["classifier"]["head.weight"] = torch.zeros(2, 3)
    torch.save(state, tmp_path / "last.pt")
    refused(capsys, ["--resume", "last.pt", "other networks"], "--resume", tmp_path)


def test_other_photos_than_those_of_the_run_are_refused(flags, pets, tmp_path, capsys):
    shutil.copytree(pets, tmp_path / "pets")
    flags = [*PETS, *pet_folders(tmp_path / "pets")]
    run, _ = end_at(1, lambda: os.kill(os.getpid(), signal.SIGINT), flags, tmp_path / "runs")
    capsys.readouterr()
    (tmp_path / "pets/train/00007.jpg").unlink()
    refused(capsys, ["--resume", run, "images"], "--resume", run)


# ====================================== labels for new photos =====================================


def test_predictions_are_those_of_the_checkpoint_least_certain_first(whole, pets, tmp_path,
                                                                     monkeypatch, capsys):
    photos = tmp_path / "new photos"
    shutil.copytree(pets / "test", photos)
    (photos / "notes.txt").write_text("no photo")
    monkeypatch.chdir(tmp_path)  # without any training data
    call_main("sgan_catsdogs", "--predict", photos, "--checkpoint", whole / "best.pt", "--device",
              "cpu", "--batch-size", 7)
    [run] = (tmp_path / "runs").iterdir()
    rows = read_csv(run / "predictions.csv")
    assert sorted(row["file"] for row in rows) == sorted(map(str, photos.rglob("*.jpg")))
    probabilities = [float(row["probability"]) for row in rows]
    assert probabilities == sorted(probabilities) and probabilities[0] >= 0.5
    assert all(0 <= float(row["looks_like_training"]) <= 1 for row in rows)
    classifier = new_classifier("sgan_catsdogs").eval()
    classifier.load_state_dict(torch.load(whole / "best.pt", weights_only=True)["classifier"])
    for row in rows:
        [(x, _)] = dali_loader([row["file"]], None, 1, 32, CPU)
        with torch.no_grad():
            logits, _, r = classifier(x)
        p = logits.softmax(dim=1)[0]
        assert float(row["probability"]) == pytest.approx(p.max().item(), abs=0.02)  # bfloat16
        assert p[["cat", "dog"].index(row["class"])] > 0.47
        assert float(row["looks_like_training"]) == pytest.approx(r.sigmoid().item(), abs=0.02)
    correct = np.mean([row["class"] == Path(row["file"]).parent.name for row in rows])
    results = json.loads((whole / "results.json").read_text())
    assert correct == pytest.approx(results["test_accuracy_best_val"])
    with Image.open(run / "contact_sheet.png") as sheet:
        assert sheet.width > 500
    assert [Path(row["file"]).name for row in read_csv(run / "left_out.csv")] == ["notes.txt"]
    counts = re.findall(r"(\d+) (?:cat|dog)", capsys.readouterr().out)
    assert sum(map(int, counts)) == len(rows)


def test_bad_checkpoints_for_prediction_are_refused(ended, whole, pets, tmp_path, capsys):
    refused(capsys, ["--predict", "--checkpoint"], "--predict", pets / "test")
    refused(capsys, ["--predict", "--checkpoint"], "--checkpoint", whole / "best.pt")
    for path in (tmp_path / "missing.pt", ended / "last.pt", ended / "args.json"):
        refused(capsys, ["--checkpoint", path], "--predict", pets / "test", "--checkpoint", path)
    state = torch.load(whole / "best.pt", weights_only=True)
    del state["classifier"]["head.bias"]
    torch.save(state, tmp_path / "best.pt")
    refused(capsys, ["--checkpoint", tmp_path / "best.pt", "other networks"], "--predict",
            pets / "test", "--checkpoint", tmp_path / "best.pt")


# ======================================= several processes ========================================

DRIVER = """
import os
import sys
from types import SimpleNamespace
import torch
import sgan_catsdogs
# Dropout masks are drawn by each process for its part. In float64, as the rounding of float32 grows
# to differences that one could not tell from mistakes.
torch.nn.Dropout.forward = lambda self, x: x
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double  # in the scripts it makes float32 of bfloat16
augment = sgan_catsdogs.augment
sgan_catsdogs.augment = lambda x, *args: augment(x.double(), *args)
evaluate = sgan_catsdogs.evaluate
sgan_catsdogs.evaluate = lambda classifier, batches, num_classes: evaluate(
    classifier, ((x.double(), y) for x, y in batches), num_classes)
sgan_catsdogs.SAVE_SECONDS = 0  # checkpoints within the epoch change nothing
sgan_catsdogs.bf16_autocast = lambda device: torch.autocast(device.type, enabled=False)
if os.environ.get("RANK") == "1" and "--resume" not in sys.argv:  # asked to stop after two steps
    answers = iter([False, True])
    sgan_catsdogs.stop_signal = lambda: SimpleNamespace(is_set=lambda: next(answers))
sgan_catsdogs.main()
"""


def test_two_processes_train_as_one_even_if_stopped_and_resumed(flags, tmp_path):
    """The same global batches: losses, validation and batch-norm statistics agree by rounding."""
    (tmp_path / "driver.py").write_text(DRIVER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]

    with contextlib.ExitStack() as at_the_end:
        def start(launcher, *flags):
            command = [sys.executable, *launcher, tmp_path / "driver.py", *flags]
            process = subprocess.Popen(list(map(str, command)), text=True,
                                       env={**os.environ, "PYTHONPATH": str(ROOT)},
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            at_the_end.callback(process.terminate)
            return process

        flags = [*flags, "--epochs", 1, "--out-dir"]
        one, two = start([], *flags, tmp_path / "one"), start(torchrun, *flags, tmp_path / "two")
        _, errors = two.communicate(timeout=300)
        assert two.returncode == 1, errors
        [run] = (tmp_path / "two").iterdir()
        assert (f"stopped after step 2 of {STEPS_PER_EPOCH}; to go on: torchrun --nproc-per-node 2 "
                f"sgan_catsdogs.py --resume {run}") in errors
        assert not (run / "metrics.csv").exists()  # the losses so far are in the checkpoint
        for process in (one, start(torchrun, "--resume", run)):
            output, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            assert output.count("RESULT") == 1  # of the first process alone
    rows, weights = [], []
    for name in ("one", "two"):
        [run] = (tmp_path / name).iterdir()
        [row] = read_csv(run / "metrics.csv")
        rows.append({column: float(value) for column, value in row.items() if value})
        weights.append(torch.load(run / "final.pt", weights_only=True))
    for column in rows[0].keys() - {"seconds", "images_per_s"}:
        assert rows[1][column] == pytest.approx(rows[0][column], rel=1e-4, abs=1e-4), column
    for part in ("classifier", "generator"):
        for name, one in weights[0][part].items():
            if "num_batches" not in name:
                torch.testing.assert_close(weights[1][part][name], one, rtol=1e-3, atol=1e-4)


def test_processes_must_share_a_batch_evenly(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sgan_catsdogs.start_processes", lambda device: (0, 2))  # as if of two
    refused(capsys, ["--batch-size 15", "2 processes"], *flags, "--batch-size", 15,
            "--out-dir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
