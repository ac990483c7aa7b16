"""sgan_catsdogs.py as a job to be trusted: bad files, the draw, runs that are ended, prediction."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import sgan_catsdogs
from common import dali_loader, same_bytes, why_unusable
from tests.conftest import (CPU, PETS, ROOT, call_main, cut_off, new_classifier, photo_folders,
                            picture, read_csv, read_part, refusal, same_bits, save, train, untimed)

# ========================================= image files ============================================


def link(path):
    picture().save(path.with_name("target.jpg"))
    path.symlink_to(path.with_name("target.jpg"))


GOOD = {
    "one pixel.jpg": save(picture(size=(1, 1))),
    "wide.jpg": save(picture(size=(20_000, 3))),
    "LOUD.JPG": save(picture(), format="JPEG"),
    "mon chat préféré 猫.jpg": save(picture()),
    "really a jpeg.png": save(picture(), format="JPEG"),
    "no extension": save(picture(), format="PNG"),
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
    "half.tiff": (save(picture(), cut=0.5), "cannot be read"),
    "animated.webp": (save(picture(), save_all=True, append_images=[picture("L")]), "several"),
    "broken link.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "cannot be read"),
    "no utf-8 \udcff.jpg": (save(picture()), "rename it"),
}


@pytest.mark.parametrize("name", GOOD)
def test_images_under_all_names_are_usable_and_can_be_loaded(name, tmp_path):
    GOOD[name](tmp_path / name)
    assert why_unusable(tmp_path / name) is None
    [(x, _)] = dali_loader([tmp_path / name], None, 1, 32, CPU)
    assert x.shape == (1, 3, 32, 32) and x.min() >= 0 and x.max() <= 1


def test_files_of_the_same_bytes_are_grouped_in_order(tmp_path):
    paths = [tmp_path / name for name in "abcdefg"]
    for path, text in zip(paths, ("cat", "dog", "dog", "cow", "sheep", "cat", "dog")):
        path.write_text(text)
    assert same_bytes(paths[::-1]) == [[paths[6], paths[2], paths[1]], [paths[5], paths[0]]]
    assert same_bytes([paths[0], paths[3], paths[4]]) == []


def test_bad_files_are_left_out_and_listed_and_leaks_reported(pets, tmp_path, capsys):
    shutil.copytree(pets, tmp_path / "pets")
    train_dir = tmp_path / "pets/train"
    for name, write in GOOD.items():
        write(train_dir / name)
    for name, (write, _) in BAD.items():
        write(train_dir / name)
    cut_off(tmp_path / "pets/test/dog/001.jpg", 0.5)
    shutil.copy(tmp_path / "pets/test/cat/002.jpg", train_dir / "another name.jpg")
    run, results = train("sgan_catsdogs", *PETS, *photo_folders(tmp_path / "pets"), "--dry-run")
    left_out = {Path(row["file"]).name: row["why"] for row in read_csv(run / "left_out.csv")}
    words = {name.replace("\udcff", "\\udcff"): word for name, (_, word) in BAD.items()}
    assert left_out.keys() == {*words, "001.jpg"}
    assert all(word in left_out[name] for name, word in words.items())
    [leak] = read_csv(run / "duplicates.csv")
    assert leak["file"].endswith("test/cat/002.jpg") and "held out" in leak["what that means"]
    assert leak["other file"].endswith("another name.jpg")
    output = capsys.readouterr().out
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: 12 ") and "left_out.csv" in warnings[0]
    assert warnings[1].startswith("warning: 1 ") and "duplicates.csv" in warnings[1]
    assert (results["left_out"], results["duplicates"]) == (12, 1)
    assert f"{48 + len(GOOD) + 1 + 1} unlabeled" in output  # the link's target, the leak


# =================================== making the four folders ======================================


def class_in_archive(path):
    """The class of a photo by its place in either archive."""
    return path.name.split(".")[0] if path.parent.name == "kaggle" else path.parent.name.lower()


@pytest.mark.parametrize("layout, flags, labeled", [("kaggle", [], 50),
                                                    ("PetImages", ["--labels-per-class", 3], 3)])
def test_prepare_draws_balanced_folders(layout, flags, labeled, archives, tmp_path, capsys):
    source = archives / layout
    parts = {}  # {folder: its links, sorted, and the files that they lead to}
    call_main("sgan_catsdogs", "--prepare", source, *photo_folders(tmp_path), "--split-seed", 3,
              *flags)
    for part in ("labeled", "val", "test", "train"):
        links = sorted(path for path in (tmp_path / part).rglob("*") if path.is_file())
        parts[part] = links, [path.resolve() for path in links]
    sizes = [len(links) for links, _ in parts.values()]
    assert sizes == [2 * labeled, 423, 423, 2119 - 846 - 2 * labeled]  # of a class a fifth
    originals = [path for _, files in parts.values() for path in files]
    everything = {path for path in source.rglob("*.jpg") if path.stat().st_size}
    assert len(set(originals)) == len(originals) and set(originals) == everything
    output = capsys.readouterr()
    assert "1 files cannot be used" in output.out and "666.jpg: empty" in output.out
    assert re.search(r"^--prepare .*: 1059 [Cc]at, 1060 [Dd]og$", output.out, re.MULTILINE)
    for part in ("labeled", "val", "test"):
        links, files = parts[part]
        assert [path.parent.name for path in links] == [class_in_archive(path) for path in files]
        assert [path.parent.name for path in links].count("dog") == (len(links) + 1) // 2
    links, files = parts["train"]
    assert all(re.fullmatch(r"\d{5}\.jpg", path.name) for path in links)  # tells no class
    assert all(path.is_symlink() for links, _ in parts.values() for path in links)
    classes = [class_in_archive(path) for path in files]
    assert classes.count("cat") == 1059 - 2 * 211 - labeled  # one of 1,060 is damaged
    assert classes != sorted(classes) and classes != sorted(classes, reverse=True)
    record = json.loads((tmp_path / "labeled.json").read_text())
    assert record["split_seed"] == 3 and record["source"] == str(source)
    assert sorted(source / name for name in record["files"]) == sorted(parts["labeled"][1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "labeled", "labeled.json", "test", "train", "val"]


def test_prepare_refuses_what_it_cannot_draw(archives, pets, tmp_path, capsys):
    def refused(source, *words):
        message = refusal(capsys, "sgan_catsdogs", "--prepare", source, *photo_folders(new))
        assert all(str(word) in message for word in words)

    new = tmp_path / "new"
    for part in ("labeled", "val", "test", "train"):  # an earlier draw, or somebody's photos
        (new / part).mkdir(parents=True)
        refused(archives / "kaggle", new / part, "exists")
        assert os.listdir(new) == [part]
        shutil.rmtree(new)
    refused(pets / "test", "class cat", "15 images", "--labels-per-class")
    few, capitals = (shutil.copytree(pets / "test", tmp_path / name) for name in "fc")
    for path in sorted((few / "cat").iterdir())[4:]:
        path.unlink()
    message = refusal(capsys, "sgan_catsdogs", "--prepare", few, "--labels-per-class", 1,
                      *photo_folders(new))
    assert "class cat" in message and not new.exists()
    (capitals / "cat").rename(capitals / "Dog")
    refused(capitals, "capitals", "Dog")
    (tmp_path / "above").mkdir()
    (tmp_path / "above/PetImages").symlink_to(archives / "PetImages")
    refused(tmp_path / "above", tmp_path / "above", "one class only")
    message = refusal(capsys, "sgan_catsdogs", "--prepare", archives / "kaggle",
                      *photo_folders(new), "--val-dir", new / "test")
    assert "must be four folders" in message
    assert not new.exists()


def test_prepare_of_few_photos_holds_out_a_fifth_of_each_class_at_most(tmp_path):
    source = tmp_path / "photos"
    for name, count in (("cow", 23), ("pig", 14)):
        for n in range(count):
            path = source / name / f"herd {n % 3}/{n // 3}.png"  # the same names in subfolders
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (n, len(name + str(n)), 7)).save(path)
    draws = []
    for n, seed in enumerate((0, 0, 1)):
        call_main("sgan_catsdogs", "--prepare", source, "--labels-per-class", 3, "--split-seed",
                  seed, *photo_folders(tmp_path / str(n)))
        links = sorted((tmp_path / str(n)).rglob("*.png"))
        draws.append({str(path.relative_to(tmp_path / str(n))): path.resolve() for path in links})
        counts = [len(list((tmp_path / str(n) / part).rglob("*.png")))
                  for part in ("labeled/cow", "val/cow", "test/cow", "val/pig", "train")]
        assert counts == [3, 4, 4, 2, 23 - 11 + 14 - 7]
        assert sorted(draws[-1].values()) == sorted(source.rglob("*.png"))
    assert draws[0] == draws[1] != draws[2]


def test_what_cannot_be_written_is_said_in_words(pets, tmp_path):
    (tmp_path / "file").touch()
    jobs = {"--prepare": [pets / "test", "--labels-per-class", 1,
                          *photo_folders(tmp_path / "file")],
            "--demo": []}
    (tmp_path / "data").touch()  # where the demo wants a folder
    for mode, flags in jobs.items():
        done = subprocess.run([sys.executable, ROOT / "sgan_catsdogs.py", mode, *map(str, flags)],
                              cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith("stopped: ")
        assert "Not a directory" in done.stderr or "exists" in done.stderr


def test_download_unpacks_all_or_nothing(pets, capsys, monkeypatch):
    """A local archive stands in for the one that is fetched; it is too small to draw from."""
    archive = Path("archive.zip")

    def fetch(url, folder, filename, md5):
        shutil.copy(archive, Path(folder, filename))

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", fetch)
    photos = sorted((pets / "test").rglob("*.jpg"))
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in photos:
            packed.write(path, Path("PetImages") / path.relative_to(pets / "test"))
    whole = archive.read_bytes()
    start = whole.index(b".jpg") + 4  # of the first file's compressed bytes
    invalid = b"\x07"  # a kind of block that there is not
    for damaged in (whole[:start] + invalid + whole[start + 1:], whole[:-3000],
                    whole[:len(whole) // 2] + b"damaged" + whole[len(whole) // 2 + 7:]):
        archive.write_bytes(damaged)
        assert "--download could not" in refusal(capsys, "sgan_catsdogs", "--download")
        assert os.listdir("data") == []
    archive.write_bytes(whole)
    assert "class cat" in refusal(capsys, "sgan_catsdogs", "--download")
    assert os.listdir("data") == ["PetImages"]
    unpacked = sorted(Path("data/PetImages").rglob("*.jpg"))
    assert [path.read_bytes() for path in unpacked] == [path.read_bytes() for path in photos]


# ==================================== runs that are ended early ===================================

STEPS, EPOCHS = 48 // 16, 3  # in an epoch, in a run


@pytest.fixture(scope="session")
def whole(three_epochs, tmp_path_factory):
    """A run that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("whole") / "runs"
    return train("sgan_catsdogs", *three_epochs, out_dir=out_dir)[0]


def end_at(step, number, flags, out_dir):
    """Train, with a signal after the first update of one step; the run's folder, and its exit."""
    count, updates_a_step = [0], 1 if "--supervised-only" in flags else 2

    def after_update(optimizer, args, kwargs):
        count[0] += 1
        if count[0] == updates_a_step * (step - 1) + 1:
            os.kill(os.getpid(), number)

    handle = register_optimizer_step_post_hook(after_update)
    try:
        with pytest.raises(SystemExit) as stop:
            call_main("sgan_catsdogs", *flags, "--out-dir", out_dir)
    finally:
        handle.remove()
    [run] = Path(out_dir).iterdir()
    return run, stop.value.code


@pytest.fixture(scope="module")
def own_pets(pets, tmp_path_factory):
    """The photos of `ended`, which a test may change."""
    return shutil.copytree(pets, tmp_path_factory.mktemp("own") / "pets")


@pytest.fixture(scope="module")
def ended(three_epochs, own_pets, tmp_path_factory):
    """A run that was ended in its fifth step, the second of the second epoch."""
    out_dir = tmp_path_factory.mktemp("ended") / "runs"
    flags = [*three_epochs, *photo_folders(own_pets)]
    return end_at(STEPS + 2, signal.SIGINT, flags, out_dir)[0]


def step_of(run):
    return torch.load(run / "last.pt", weights_only=True)["step"]


def assert_same_run(run, other):
    """Weights and metrics are equal bit for bit, but for times."""
    for name in ("final.pt", "best.pt"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (run, other))
        assert one.pop("flags").keys() == two.pop("flags").keys()  # --out-dir is another
        assert same_bits(one, two)
    assert untimed(read_csv(run / "metrics.csv")) == untimed(read_csv(other / "metrics.csv"))
    results, others = (json.loads((folder / "results.json").read_text()) for folder in (run, other))
    for key in ("test_accuracy", "test_accuracy_best_val", "val_accuracy", "steps"):
        assert results[key] == others[key]
    assert not (run / "last.pt").exists()
    assert not list(run.glob(".*"))  # nothing half written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_the_command_to_go_on(number, three_epochs, capsys):
    run, code = end_at(STEPS + 1, number, three_epochs, "my runs")
    assert code == 128 + number and step_of(run) == STEPS
    command = f"`python {ROOT / 'sgan_catsdogs.py'} --resume '{run.absolute()}'`"
    out, err = capsys.readouterr()
    assert command in out and err.splitlines()[-1] == f"stopped: go on with {command}"


def test_a_run_goes_on_from_another_folder_with_photos_that_moved(ended, own_pets, whole, tmp_path,
                                                                  monkeypatch):
    run = shutil.copytree(ended, tmp_path / "run")
    moved = shutil.copytree(own_pets, tmp_path / "moved")
    shutil.copy(ended / "last.pt", tmp_path / "last.pt")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    call_main("sgan_catsdogs", "--resume", "../run/last.pt", "--labeled-dir", "../moved/labeled",
              f"--unlabeled-dir={moved / 'train'}")
    assert_same_run(run, whole)


def test_baseline_is_resumed_too(three_epochs):
    """Its second optimiser never had a step; and the first epoch was not finished."""
    flags = [*three_epochs, "--dry-run", "--supervised-only"]  # two steps
    whole, _ = train("sgan_catsdogs", *flags, out_dir="whole")
    run, _ = end_at(1, signal.SIGTERM, flags, "ended")
    assert step_of(run) == 0
    call_main("sgan_catsdogs", "--resume", run)
    assert_same_run(run, whole)


def test_a_process_killed_at_any_moment_is_resumed_exactly(killed_run, whole):
    run = killed_run.result()
    call_main("sgan_catsdogs", "--resume", run)
    assert_same_run(run, whole)


def test_a_full_disk_keeps_the_checkpoint_before(ended, tmp_path):
    """No file may grow to more than 100 MB, as last.pt would."""
    run = shutil.copytree(ended, tmp_path / "run")
    script = [sys.executable, ROOT / "sgan_catsdogs.py", "--resume", run]
    process = subprocess.run(["bash", "-c", 'ulimit -f 97000; exec "$@"', "-", *script], text=True,
                             capture_output=True)
    assert process.returncode == 1
    assert re.fullmatch(f"stopped: {run}/last.pt cannot be written .File too large.*\n",
                        process.stderr)
    assert not list(run.glob(".*")) and step_of(run) == STEPS


def test_other_flags_or_photos_are_refused(ended, own_pets, capsys):
    for flag, value in (("--epochs", 3), ("--seed", 1), ("--lr", 0.1)):
        message = refusal(capsys, "sgan_catsdogs", "--resume", ended, flag, value)
        assert f"--resume {ended} takes the run's own flags" in message
    cat, dog = own_pets / "labeled/cat/001.jpg", own_pets / "val/dog/002.jpg"
    photo, unlabeled = own_pets / "test/cat/003.jpg", own_pets / "train/00007.jpg"
    before = {path: path.read_bytes() for path in (cat, dog, photo, unlabeled)}
    changes = [(cat, lambda: cat.write_bytes(before[photo]), "--labeled-dir"),
               (dog, lambda: dog.write_bytes(before[dog][::-1][:9] + before[dog]), "--val-dir"),
               (photo, lambda: photo.write_bytes(before[cat]), "--test-dir"),
               (unlabeled, lambda: unlabeled.write_bytes(before[unlabeled] + b"\0"),
                "--unlabeled-dir"), (unlabeled, unlabeled.unlink, "--unlabeled-dir")]
    for path, change, flag in changes:
        change()
        sgan_catsdogs.digest.cache_clear()  # each message would be of a process of its own
        try:
            message = refusal(capsys, "sgan_catsdogs", "--resume", ended)
        finally:
            path.write_bytes(before[path])
        assert path.name in message and ("cannot be used" in message or "must be" in message
                                         or f"{flag} {path.parents[path.parent.name != 'train']}"
                                         in message)
    sgan_catsdogs.digest.cache_clear()


def test_damaged_or_missing_checkpoints_are_refused(ended, whole, tmp_path, capsys, monkeypatch):
    def refused(folder, word):
        message = refusal(capsys, "sgan_catsdogs", "--resume", folder)
        assert str(folder / "last.pt") in message and word in message

    refused(tmp_path, "No such file")
    message = refusal(capsys, "sgan_catsdogs", "--resume", whole)
    assert f"--resume {whole}: that run is finished" in message
    shutil.copy(ended / "last.pt", tmp_path)
    cut_off(tmp_path / "last.pt", 0.7)
    refused(tmp_path, "damaged")
    shutil.copy(whole / "best.pt", tmp_path / "last.pt")
    refused(tmp_path, "another kind of checkpoint")
    state = torch.load(ended / "last.pt", weights_only=True)
    state["classifier"]["head.weight"] = torch.zeros(2, 3)
    torch.save(state, tmp_path / "last.pt")
    refused(tmp_path, "other networks")

    def denied(*args, **kwargs):  # the superuser may read all
        raise PermissionError(13, "Permission denied", "last.pt")

    monkeypatch.setattr(torch, "load", denied)
    refused(tmp_path, "Permission denied")


# ====================================== labels for new photos =====================================


def test_predictions_are_those_of_the_checkpoint_least_certain_first(whole, pets, tmp_path, capsys):
    photos = shutil.copytree(pets / "test", tmp_path / "new photos")
    (photos / "notes.png").write_text("no photo")
    call_main("sgan_catsdogs", "--predict", photos, "--checkpoint", whole / "best.pt", "--device",
              "cpu", "--batch-size", 7)
    [run] = Path("runs").iterdir()
    rows = read_csv(run / "predictions.csv")
    assert sorted(row["file"] for row in rows) == sorted(map(str, photos.rglob("*.jpg")))
    probabilities = [float(row["probability"]) for row in rows]
    assert probabilities == sorted(probabilities)
    classifier = new_classifier("sgan_catsdogs").eval()
    classifier.load_state_dict(torch.load(whole / "best.pt", weights_only=True)["classifier"])
    with torch.no_grad():
        p_of_all = sgan_catsdogs.TwoViews(classifier)(read_part(pets, "test")[0])[1]
    names = [str(path) for path in sorted(photos.rglob("*.jpg"))]
    for row in rows:
        n, k = names.index(row["file"]), ["cat", "dog"].index(row["class"])
        p = p_of_all[n]
        assert float(row["probability"]) == pytest.approx(p.max().item(), abs=0.02)  # bfloat16
        assert p[k] > 0.47
    with Image.open(run / "contact_sheet.png") as sheet:
        assert sheet.width > 500
    assert [Path(row["file"]).name for row in read_csv(run / "left_out.csv")] == ["notes.png"]
    counts = re.findall(r"(\d+) (cat|dog)", capsys.readouterr().out.splitlines()[-1])
    assert counts == [(str([row["class"] for row in rows].count(name)), name)
                      for name in ("cat", "dog")]


def test_bad_checkpoints_for_prediction_are_refused(ended, whole, pets, tmp_path, capsys):
    def refused(*flags):
        return refusal(capsys, "sgan_catsdogs", *flags)

    assert "given together" in refused("--predict", pets / "test")
    assert "given together" in refused("--checkpoint", whole / "best.pt")
    state = torch.load(whole / "best.pt", weights_only=True)
    del state["classifier"]["head.bias"]
    torch.save(state, tmp_path / "best.pt")
    for path, word in ((tmp_path / "missing.pt", "No such file"), (ended, "directory"),
                       (ended / "args.json", "damaged"), (ended / "last.pt", "another kind"),
                       (tmp_path / "best.pt", "other networks")):
        message = refused("--predict", pets / "test", "--checkpoint", path)
        assert f"--checkpoint: {path}" in message
        assert word in message
    assert not Path("runs").exists()


# ======================================= several processes ========================================

def test_two_processes_share_the_photos_are_resumed_and_end_with_the_same_weights(pets_runs, pets):
    run, output = pets_runs["two processes"], pets_runs.completed("two processes").stdout
    assert "`torchrun --nproc-per-node 2 " in output and f" --resume '{run.folder}'`" in output
    assert output.count("if this run ends early") == output.count(" labeled images, ") == 1
    assert output.count("RESULT") == 1  # of the first process alone
    assert [int(row["step"]) for row in run.rows] == [STEPS, 2 * STEPS]
    one, two = (torch.load(run.folder.parent.parent / f"rank{rank}.pt", weights_only=True)
                for rank in range(2))
    assert set(one["weights"]) == {"Classifier", "Generator"}
    assert same_bits(one["weights"], two["weights"])
    known, orders = read_part(pets, "train")[0].flatten(1), []
    for epoch in (slice(0, STEPS), slice(STEPS, 2 * STEPS)):
        seen = torch.cat([one["photos"][epoch], two["photos"][epoch]]).flatten(0, 1).flatten(1)
        distance, index = torch.cdist(seen, known).min(dim=1)
        assert distance.max() < 0.1 and sorted(index.tolist()) == list(range(48))
        orders.append(index.tolist())
    assert orders[0] != orders[1]
    for state in (one, two):
        assert torch.equal(state["gradients"][0], torch.full((2, 2), 1.5))
        assert torch.equal(state["gradients"][1], torch.tensor([0.0, 2.5]))


@pytest.mark.parametrize("batch_size, world, words", [
    (15, 2, "--batch-size 15 must be a multiple of the 2 processes"),
    (6, 2, "--batch-size 6 is too small: the consistency loss on 2 classes needs 8 or more"),
    (36, 9, "only 8 labeled images, fewer than the 9 processes")])
def test_processes_must_share_a_batch_evenly(batch_size, world, words, pets, capsys):
    args = SimpleNamespace(
        labeled_dir=pets / "labeled", unlabeled_dir=pets / "train", val_dir=pets / "val",
        test_dir=pets / "test", batch_size=batch_size, consistency_weight=3.0, image_size=32,
        supervised_only=False, dry_run=False)
    with pytest.raises(SystemExit) as stop:
        sgan_catsdogs.read_folders(args, CPU, world)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_variables_of_a_cluster_start_no_processes_and_predict_wants_one(whole, pets, monkeypatch,
                                                                        capsys):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert sgan_catsdogs.start_processes("cpu") == (0, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # which torchrun sets
    for flags in (["--predict", pets / "test", "--checkpoint", whole / "final.pt"],
                  ["--prepare", pets / "test"]):
        assert "torchrun" in refusal(capsys, "sgan_catsdogs", *flags)
