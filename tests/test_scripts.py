"""The scripts from end to end, on small generated data in the formats of the real ones.

First a smoke run of each script and method, and of each baseline. Then what a run depends on, dry
runs, --help, failures, the demo, tests/sweep.py and tests/errors_in_common.py.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import sgan_catsdogs
import sgan_mnist
from common import bf16_autocast, multiplies_in_bf16
from tests import sweep
from tests.cartoons import draw_dataset
from tests.conftest import (CPU, MNIST, PETS, ROOT, SCRIPTS, SVHN, Runs, call_main, needs_gpu,
                            new_classifier, photo_folders, read_part, same_bits, train,
                            untimed)

# ========================================== smoke runs ============================================
# conftest.py starts them; those of toy_rings.py are looked at in test_rings.py.

RUNS = [("mnist", "sgan"), ("mnist", "supervised"), ("svhn", "sgan"), ("svhn", "supervised"),
        ("pets", "sgan"), ("pets", "supervised"), ("pets", "flat")]


@pytest.fixture(params=RUNS, ids="-".join)
def run(request):
    """Each smoke run in turn, with what is to be expected of it."""
    data, key = request.param
    run = request.getfixturevalue(f"{data}_runs")[key]
    run.data, run.root = data, request.getfixturevalue("flat_pets" if key == "flat" else data)
    run.script = {"mnist": "sgan_mnist", "svhn": "sgan_svhn", "pets": "sgan_catsdogs"}[data]
    run.method = "supervised" if key == "supervised" else "sgan"
    run.class_names = ["cat", "dog", "zebra"][:3 if key == "flat" else 2]
    run.num_classes = len(run.class_names) if data == "pets" else 10
    run.epochs, run.warmup_steps, run.steps_per_epoch = {
        "mnist": (4, 0, 10), "svhn": (1, 20, 10), "pets": (1, 0, 3)}[data]
    run.alone = 2 if data == "mnist" else 0  # epochs in which no average labels
    if (data, key) == ("pets", "supervised"):
        run.steps_per_epoch = 100
    return run


def test_run_ends_with_its_result(run):
    results, args = run.results, json.loads((run.folder / "args.json").read_text())
    assert results == json.loads((run.folder / "results.json").read_text())
    own = {"left_out", "duplicates"} if run.data == "pets" else {"split_seed"}
    assert set(results) == set(args) | own | {
        "script", "method", "num_labeled", "steps", "val_accuracy", "test_accuracy",
        "test_accuracy_best_val", "seconds", "peak_memory_mib", "device", "torch"}
    assert all(results[name] == args[name] for name in set(args) - {"device"})
    assert (results["script"], results["method"]) == (run.script, run.method)
    assert results["num_labeled"] == (4 * run.num_classes if run.data == "pets" else 100)
    assert results["epochs"] == run.epochs
    assert results["steps"] == run.warmup_steps + run.epochs * run.steps_per_epoch
    assert results["device"] == "cpu" and results["torch"] == torch.__version__
    assert results["seconds"] > 0
    name = [run.script, run.method, f"n{results['num_labeled']}", f"seed{results['seed']}"]
    assert set(name) < set(run.folder.name.split("__"))
    assert run.stderr == ""  # so no progress bar either, where nobody looks at it


def test_run_writes_metrics(run):
    columns = {"step", "epoch", "seconds", "loss/lab", "val_loss", "val_accuracy", "val_loss_ema",
               "val_accuracy_ema", "images_per_s"}
    gan = {"loss/unl", "loss/fake", "loss/g", "monitor/p_real_unl", "monitor/p_real_fake",
           *(["loss/fm", "loss/turn"] if run.data == "pets" else [])}
    taught = {"loss/con", "monitor/picked"}
    epochs = range(0 if run.warmup_steps else 1, run.epochs + 1)
    for epoch, row in zip(epochs, run.rows, strict=True):
        numbers = {column: float(number) for column, number in row.items() if number != ""}
        # the baseline and the warm-up know labeled images only
        expected = columns | gan if run.method == "sgan" and epoch else set(columns)
        if run.method == "sgan" and epoch > run.alone:
            expected |= taught
        if run.data == "mnist":
            expected |= {"loss/student"}
        if (run.data, run.method) == ("mnist", "supervised"):
            expected -= {"loss/lab"}
        assert set(numbers) == expected
        assert all(map(math.isfinite, numbers.values()))
        assert numbers["epoch"] == epoch
        assert numbers["step"] == run.warmup_steps + epoch * run.steps_per_epoch
        assert all(0 <= number <= 1 for column, number in numbers.items()
                   if "accuracy" in column or "monitor" in column)
    assert float(run.rows[-1]["val_accuracy_ema"]) == run.results["val_accuracy"]


def test_run_writes_pictures(run):
    pictures = ["curves.png", "confusion.png", "predictions.png"]
    for name in pictures:
        with Image.open(run.folder / name) as image:
            assert image.format == "PNG" and image.width > 150 and image.height > 150
            assert image.convert("L").getextrema()[0] < 100  # something is drawn on the white
            if name == "curves.png":  # two panels, and one of mean D if there is a GAN
                assert image.width == (1200 if run.method == "sgan" else 800)
    epochs = range(1, run.epochs + 1) if run.method == "sgan" else []
    samples = [run.folder / "samples" / f"epoch_{epoch:03d}.png" for epoch in epochs]
    assert sorted((run.folder / "samples").glob("*")) == samples
    for path in samples:
        with Image.open(path) as image:
            side = {"mnist": 10 * (28 + 2), "svhn": 10 * (32 + 2), "pets": 8 * (32 + 2)}[run.data]
            assert image.size == (side + 2, side + 2)
    files = {"args.json", "metrics.csv", "results.json", "best.pt", "final.pt", *pictures,
             *(["samples"] if samples else [])}
    assert {path.name for path in run.folder.iterdir()} == files  # nothing half written


def logits_of(run, weights, x):
    """In batches as large as the script's: the rounding of bfloat16 depends on them."""
    classifier = new_classifier(run.script, run.num_classes)
    classifier = classifier.to(memory_format=torch.channels_last).eval()
    classifier.load_state_dict(weights)
    if run.data == "pets":
        classifier = sgan_catsdogs.TwoViews(classifier)
    with torch.no_grad(), bf16_autocast(CPU):
        batches = x.split(16 if run.data == "pets" else 1000)
        return torch.cat([classifier(batch)[0].float() for batch in batches])


def test_accuracies_are_those_of_the_saved_weights(run):
    x, y = read_part(run.root, "test")
    for checkpoint, name in ((run.final, "test_accuracy"), (run.best, "test_accuracy_best_val")):
        logits = logits_of(run, checkpoint["classifier"], x)
        first, second = logits.topk(2, dim=1).values.T
        # so near that bfloat16, rounding in another batch, can decide
        tied = (first - second < 2e-4) & multiplies_in_bf16(CPU)
        correct = logits.argmax(dim=1) == y
        counted = round(run.results[name] * len(y))
        assert abs(counted - correct.sum().item()) <= tied.sum() <= len(y) // 10
        assert run.results[name] == pytest.approx(counted / len(y), abs=1e-9)
        if run.data == "pets":  # what --predict needs
            assert checkpoint["class_names"] == run.class_names
            assert checkpoint["flags"]["image_size"] == 32
        elif run.method == "sgan":  # few steps are to do better than 10% by chance
            assert run.results[name] > 0.3
    assert run.final["weights"] == "ema" and run.final["epoch"] == run.epochs


def test_best_checkpoint_is_the_best_on_validation(run):
    scores = [(float(row[column]), weights, int(row["epoch"])) for row in run.rows
              for column, weights in (("val_accuracy", "raw"), ("val_accuracy_ema", "ema"))]
    first_best = max(scores, key=lambda score: score[0])
    assert (run.best["val_accuracy"], run.best["weights"], run.best["epoch"]) == first_best
    if run.data == "pets":  # the validation images of the digits are drawn by the script
        x, y = read_part(run.root, "val")
        log_p = logits_of(run, run.final["classifier"], x).double().log_softmax(dim=1)
        loss = -log_p[torch.arange(len(y)), y].mean().item()
        assert float(run.rows[-1]["val_loss_ema"]) == pytest.approx(loss, rel=1e-4)


# ================================ what a run depends on, bit for bit ==============================


@pytest.mark.parametrize("data", ["mnist", "svhn", "pets"])
def test_seed_fixes_a_run_bit_for_bit_whatever_the_hidden_labels(data, request):
    """A run again, in which nothing differs but the labels of unlabeled images."""
    runs = request.getfixturevalue(f"{data}_runs")
    first, again = runs["sgan"], runs["relabeled"]
    assert untimed(again.rows) == untimed(first.rows)
    for one, two in ((first.final, again.final), (first.best, again.best)):
        one, two = ({key: part for key, part in each.items() if key != "flags"}
                    for each in (one, two))
        assert same_bits(one, two)
    assert again.results["test_accuracy"] == first.results["test_accuracy"]


def test_unlabeled_images_make_the_full_recipe_better_than_its_baseline(mnist_runs):
    full, baseline = mnist_runs["ten labels"], mnist_runs["ten labels alone"]
    assert full.results["steps"] == baseline.results["steps"]
    assert full.results["test_accuracy"] > baseline.results["test_accuracy"] + 0.05


@pytest.mark.parametrize("data", ["mnist", "pets"])
def test_another_seed_gives_another_run(data, request):
    runs = request.getfixturevalue(f"{data}_runs")
    first, other = runs["sgan"], runs["other seed"]
    assert other.rows[0]["loss/lab"] != first.rows[0]["loss/lab"]
    assert not same_bits(other.final["classifier"], first.final["classifier"])


# =========================================== dry runs =============================================


@pytest.fixture
def good_flags(mnist, svhn, pets):
    """What each script needs to run on its small data."""
    return {"sgan_mnist": [*MNIST, "--data-dir", mnist], "sgan_svhn": [*SVHN, "--data-dir", svhn],
            "sgan_catsdogs": [*PETS, *photo_folders(pets)], "toy_rings": ["--device", "cpu"]}


@pytest.mark.parametrize("name, flags, steps", [
    # two steps of the GAN or a warm-up, and two more; or the one that all unlabeled images make
    ("sgan_mnist", [], 4), ("sgan_mnist", ["--batch-size", 500], 2),
    ("sgan_mnist", ["--supervised-only"], 4), ("sgan_mnist", ["--gan-only"], 4),
    ("sgan_svhn", [], 4), ("sgan_svhn", ["--batch-size", 400], 3),
    ("sgan_svhn", ["--supervised-only"], 4), ("sgan_svhn", ["--warmup-steps", 0], 2),
    ("sgan_catsdogs", [], 2), ("sgan_catsdogs", ["--batch-size", 48], 1),
    ("sgan_catsdogs", ["--supervised-only"], 2), ("toy_rings", ["--supervised-only"], 2)])
def test_dry_run_takes_two_steps(name, flags, steps, good_flags):
    _, results = train(name, *good_flags[name], *flags, "--dry-run")
    assert results["steps"] == steps
    supervised = "--supervised-only" in flags
    assert results["method"] == ("supervised" if supervised else
                                 "gan-only" if "--gan-only" in flags else "sgan")


@pytest.mark.parametrize("name", [*SCRIPTS, "toy_rings"])
def test_a_copy_needs_common_py_alone_and_goes_by_its_own_name(name, good_flags, tmp_path):
    shutil.copy(ROOT / "common.py", tmp_path)
    shutil.copy(ROOT / f"{name}.py", tmp_path / "mine.py")
    flags = [*good_flags[name], "--supervised-only", "--dry-run", "--out-dir", tmp_path / "runs"]
    process = subprocess.run([sys.executable, "mine.py", *map(str, flags)], cwd=tmp_path, text=True,
                             capture_output=True, check=True)
    assert '"script": "mine"' in process.stdout
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine__")
    if name == "sgan_catsdogs":
        assert f"`python {tmp_path / 'mine.py'} --resume {folder}`" in process.stdout


def test_all_labels_leave_none_for_validation(good_flags):
    _, results = train("sgan_mnist", *good_flags["sgan_mnist"], "--num-labeled", 900, "--dry-run")
    assert results["num_labeled"] == 900 and results["val_accuracy"] is None
    assert 0 <= results["test_accuracy"] <= 1 and 0 <= results["test_accuracy_best_val"] <= 1


@needs_gpu
@pytest.mark.parametrize("method", [[], ["--supervised-only"]])
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run_on_the_gpu(name, method, good_flags, tmp_path):
    flags = [*good_flags[name], *method, "--dry-run", "--device", "cuda"]
    run = Runs(tmp_path, {"gpu": [name, *flags]})["gpu"]
    assert run.results["device"] == torch.cuda.get_device_name()
    assert 0 < run.results["peak_memory_mib"] < 10_000
    assert all(math.isfinite(float(number)) for number in run.rows[-1].values())


# ======================================= help and failures ========================================

def help_of(name, capsys):
    """{flag: its part of --help} of a script."""
    with pytest.raises(SystemExit) as stop:
        call_main(name, "--help")
    assert stop.value.code == 0
    parts = re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    return {re.match(r"(?:-h, )?(--[\w-]+)", part)[1]: " ".join(part.split()) for part in parts}


@pytest.mark.parametrize("name", [*SCRIPTS, "toy_rings"])
def test_help_shows_each_flag_with_its_default(name, capsys):
    described = help_of(name, capsys)
    del described["--help"]
    assert {"--seed", "--epochs", "--supervised-only", "--dry-run"} < set(described)
    for flag, text in described.items():
        assert "(default: " in text, flag


def test_pages_name_no_flag_that_there_is_not(capsys):
    pages = [ROOT / "README.md", *(ROOT / ".github").glob("*.md")]
    named = {flag for page in pages for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+",
                                                           page.read_text())}
    assert len(named) > 20
    known = set().union(*(help_of(name, capsys) for name in (*SCRIPTS, "toy_rings")))
    tools = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    assert {flag for flag in named - known if f'"{flag}"' not in tools} <= {"--nproc-per-node"}


def test_commands_of_readme_are_taken(mnist, svhn, pets, tmp_path):
    """They train for two steps each, on small data under the names that README uses."""
    shutil.copytree(mnist / "MNIST", "data/MNIST")
    shutil.copytree(svhn / "SVHN", "data/SVHN")
    shutil.copytree(pets, "photos")
    for part in ("labeled", "train", "val", "test"):
        shutil.copytree(pets / part, f"data/{part}")
    drawings = {"labeled_per_class": 2, "unlabeled": 40, "val": 4, "test": 6, "size": 32}
    draw_dataset("data/demo", **drawings)
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python (\w+)\.py([^`\n|]*)", text)
    small = {"sgan_svhn": ["--num-labeled", 100], "toy_rings": [], "sgan_mnist": [],
             "sgan_catsdogs": ["--image-size", 32, "--batch-size", 16]}
    assert {name for name, _ in commands} == set(small)
    for name, flags in commands:
        flags = flags.split()
        if "--download" in flags or "--ten-thousand" in flags:
            continue  # they need official files; test_input.py has the second
        if "--predict" in flags:
            [run] = sorted(Path("runs").glob("sgan_catsdogs__sgan*"))[:1]
            flags = [flag.replace("runs/RUN", str(run)) for flag in flags]
        else:
            flags += [*small[name], "--dry-run"]
        call_main(name, *flags, "--device", "cpu")
    assert len(list(Path("runs").glob("*/results.json"))) >= len(commands) - 3


def test_a_process_that_refuses_its_input_says_why(mnist_runs):
    """What test_input.py sees in its own process is what a shell sees."""
    refused = mnist_runs.completed("refused")
    assert refused.returncode == 2 and refused.stdout == ""
    assert re.fullmatch(r"error: --num-labeled .* 15\n", refused.stderr)
    assert list((mnist_runs.folder / "refused").iterdir()) == []


def test_a_loss_that_is_not_finite_ends_the_run(mnist_runs):
    lost = mnist_runs.completed("lost")
    assert lost.returncode == 1 and "RESULT" not in lost.stdout
    assert re.fullmatch(r"stopped: loss/student is (nan|inf) at step 2;.*\n", lost.stderr)
    [folder] = (mnist_runs.folder / "lost/runs").iterdir()
    assert not (folder / "results.json").exists() and not (folder / "final.pt").exists()
    assert torch.load(folder / "best.pt", weights_only=True)["epoch"] == 1


# ======================================== demo and sweeps =========================================


def test_demo_trains_on_its_drawings_and_other_flags_still_count():
    drawings = {"labeled_per_class": 2, "unlabeled": 20, "val": 4, "test": 6, "size": 32}
    draw_dataset("data/demo", **drawings)  # there already, so not drawn again
    before = {path: path.read_bytes() for path in Path("data").rglob("*.*")}
    _, results = train("sgan_catsdogs", "--demo", "--dry-run", "--device", "cpu", "--batch-size",
                       10, "--lr", 2e-3)
    assert {path: path.read_bytes() for path in Path("data").rglob("*.*")} == before
    assert results["num_labeled"] == 4 and results["image_size"] == 32
    assert (results["batch_size"], results["lr"]) == (10, 2e-3)
    assert results["unlabeled_dir"] == str(Path("data/demo/train").absolute())


def test_sweep_prints_mean_and_deviation_and_draws_curves(mnist, capsys):
    call_main("tests.sweep", "--seeds", "3,4", "sgan_mnist.py", "--data-dir", mnist, *MNIST,
              "--dry-run")
    results = [json.loads(path.read_text()) for path in Path("runs").glob("*/results.json")]
    assert {(result["seed"], result["split_seed"]) for result in results} == {(3, 3), (4, 4)}
    a, b = (100 * result["test_accuracy"] for result in results)
    expected = f"test, %: {(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f} of 2"
    assert expected in capsys.readouterr().out.splitlines()
    for x in ("seconds", "step"):
        call_main("tests.sweep", "--curves", f"{x}.png", "--x", x, "runs")
        with Image.open(f"{x}.png") as image:
            assert image.width > 300
    with pytest.raises(SystemExit, match="no folders of runs"):
        call_main("tests.sweep", "--curves", "none.png", next(Path("runs").iterdir()))


def test_sweep_draws_photos_for_each_seed(archives):
    call_main("tests.sweep", "--seeds", 5, "--labels-per-class", 4, "--photos",
              archives / "PetImages", "sgan_catsdogs.py", *PETS, "--dry-run")
    [run] = Path("runs").iterdir()
    result = json.loads((run / "results.json").read_text())
    assert (result["seed"], result["num_labeled"]) == (5, 8)
    found = sweep.draw_photos("nowhere", "4", "5")  # drawn already
    assert found[:2] == ["--labeled-dir", Path("data/draws/4_of_each__split5/labeled")]
    assert result["labeled_dir"] == str(found[1].absolute())
    record = json.loads(Path("data/draws/4_of_each__split5/labeled.json").read_text())
    assert record["split_seed"] == 5


def test_sweep_stops_when_a_run_does(capfd):
    with pytest.raises(SystemExit, match="--seed 0 stopped"):
        call_main("tests.sweep", "sgan_mnist.py", "--epochs", 0)
    assert "--epochs" in capfd.readouterr().err


# ======================================= errors in common =========================================


def test_errors_in_common_are_those_of_all_runs(mnist, capsys):
    x, y = sgan_mnist.load_images(mnist, train=False)
    wrong = []
    for seed in range(2):  # untrained classifiers
        torch.manual_seed(seed)
        student = sgan_mnist.Student().eval()
        torch.save({"classifier": student.state_dict()}, f"{seed}.pt")
        with torch.no_grad():
            wrong.append(student(x / 255)[0].argmax(dim=1) != y)
    call_main("tests.errors_in_common", "wrong.png", "0.pt", "1.pt", "--data-dir", mnist)
    lines = capsys.readouterr().out.splitlines()
    in_common = wrong[0] & wrong[1]
    assert 0 < in_common.sum() < min(map(sum, wrong))
    assert lines[0].startswith("train: 900 digits") and lines[4] == (
        f"test: 200 digits, errors {wrong[0].sum()} {wrong[1].sum()}, in common {in_common.sum()}")
    for line, errors in zip(lines[5:], (*wrong, in_common), strict=True):
        by_class = [str((errors & (y == k)).sum().item()) for k in range(10)]
        assert line.startswith(f"    of 0 to 9: {' '.join(by_class)} (")
    with Image.open("wrong.png") as image:
        assert image.width == 1100
