"""The scripts from end to end, on small generated data in the formats of the real ones.

Whole runs are processes of their own (conftest.py). What needs a look inside a training step, and
bad input, calls a script's main() here instead; nothing in the scripts is replaced for that.
"""

import csv
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import (register_optimizer_step_post_hook,
                                   register_optimizer_step_pre_hook)

from common import balanced_split, bf16_autocast, dali_loader
from tests import sweep
from tests.cartoons import draw_dataset
from tests.conftest import (MNIST, PETS, SVHN, Runs, mat_labels, pet_folders, write_idx,
                            write_mnist, write_svhn)

CPU = torch.device("cpu")
DIGITS = ["sgan_mnist", "sgan_svhn"]
SCRIPTS = [*DIGITS, "sgan_catsdogs"]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


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


# ========================================= whole runs =============================================


RUNS = [("mnist", "sgan"), ("mnist", "supervised"), ("svhn", "sgan"), ("svhn", "supervised"),
        ("pets", "sgan"), ("pets", "supervised"), ("pets", "flat")]


@pytest.fixture(params=RUNS, ids="-".join)
def run(request):
    """Each whole run in turn, with what is to be expected of it."""
    data, key = request.param
    run = request.getfixturevalue(f"{data}_runs")[key]
    run.data, run.data_dir = data, request.getfixturevalue(data)
    run.script = {"mnist": "sgan_mnist", "svhn": "sgan_svhn", "pets": "sgan_catsdogs"}[data]
    run.method = "supervised" if key == "supervised" else "sgan"
    run.num_classes = {"pets": 3 if key == "flat" else 2}.get(data, 10)
    run.epochs, run.warmup_steps = {"mnist": (2, 20), "svhn": (1, 20), "pets": (1, 0)}[data]
    if key == "flat":
        run.data_dir = request.getfixturevalue("flat_pets")
    return run


def test_run_ends_with_its_result(run):
    results = run.results
    assert results == json.loads((run.folder / "results.json").read_text())
    args = json.loads((run.folder / "args.json").read_text())
    own = {"left_out", "leaks"} if run.data == "pets" else set()
    assert set(results) == set(args) | own | {
        "script", "method", "num_labeled", "split_seed", "steps", "val_accuracy", "test_accuracy",
        "test_accuracy_best_val", "seconds", "peak_memory_mib", "device", "torch"}
    assert all(results[name] == args[name] for name in set(args) - {"device", "split_seed"})
    assert (results["script"], results["method"]) == (run.script, run.method)
    assert results["num_labeled"] == (4 * run.num_classes if run.data == "pets" else 100)
    assert results["split_seed"] == (None if run.data == "pets" else args["split_seed"])
    assert results["seed"] == args["seed"]
    assert results["epochs"] == args["epochs"] == run.epochs
    steps = {"mnist": 500 // 50, "svhn": 400 // 40, "pets": 48 // 16}[run.data]
    if run.data == "pets" and run.method == "supervised":
        steps = 100
    assert results["steps"] == run.epochs * steps + run.warmup_steps
    assert results["device"] == "cpu" and results["torch"] == torch.__version__
    assert results["seconds"] > 0
    name = [run.script, run.method, f"n{results['num_labeled']}", f"seed{results['seed']}"]
    assert set(name) < set(run.folder.name.split("__"))
    assert run.stderr == ""  # so no progress bar either, where nobody looks at it


def test_run_writes_metrics(run):
    columns = {"step", "epoch", "seconds", "loss/lab", "val_loss", "val_accuracy", "val_loss_ema",
               "val_accuracy_ema", "images_per_s"}
    first_epoch = 0 if run.warmup_steps else 1
    assert len(run.rows) == run.epochs + 1 - first_epoch
    gan = {"loss/unl", "loss/fake", "loss/g", "monitor/p_real_unl", "monitor/p_real_fake"}
    for epoch, row in enumerate(run.rows, first_epoch):
        numbers = {column: float(number) for column, number in row.items() if number != ""}
        if run.method == "sgan" and epoch:
            assert columns | gan <= set(numbers)
            assert all(name.startswith(("loss/", "monitor/")) for name in set(numbers) - columns)
        else:  # the baseline and the warm-up know labeled images only
            assert set(numbers) == columns
        assert all(map(math.isfinite, numbers.values()))
        assert numbers["epoch"] == epoch
        steps = (run.results["steps"] - run.warmup_steps) / run.epochs
        assert numbers["step"] == run.warmup_steps + epoch * steps
        assert all(0 <= numbers[column] <= 1 for column in columns
                   if "accuracy" in column or "monitor" in column)
    assert float(run.rows[-1]["val_accuracy_ema"]) == run.results["val_accuracy"]


def test_run_writes_pictures(run):
    for name in ("curves.png", "confusion.png", "predictions.png"):
        with Image.open(run.folder / name) as image:
            assert image.format == "PNG" and image.width > 150 and image.height > 150
            assert image.convert("L").getextrema()[0] < 100  # something is drawn on the white
    samples = sorted(path.name for path in (run.folder / "samples").glob("*"))
    epochs = range(1, run.epochs + 1) if run.method == "sgan" else []
    assert samples == [f"epoch_{epoch:03d}.png" for epoch in epochs]
    for name in samples:
        with Image.open(run.folder / "samples" / name) as image:
            side = {"mnist": 10 * (28 + 2), "svhn": 10 * (32 + 2), "pets": 8 * (32 + 2)}[run.data]
            assert image.size == (side + 2, side + 2)
    files = {"args.json", "metrics.csv", "results.json", "curves.png", "confusion.png",
             "predictions.png", "best.pt", "final.pt", *(["samples"] if samples else [])}
    assert {path.name for path in run.folder.iterdir()} == files  # nothing half written


def held_out(run, part):
    """Images in [0, 1] and labels of a part of the run's data, read without the script."""
    if run.data == "mnist":
        raw = run.data_dir / "MNIST/raw"
        x = np.frombuffer((raw / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8)
        y = np.frombuffer((raw / "t10k-labels-idx1-ubyte").read_bytes()[8:], np.uint8)
        return torch.from_numpy(x.reshape(-1, 1, 28, 28) / np.float32(255)), y.astype(int)
    if run.data == "svhn":
        data = loadmat(run.data_dir / "SVHN/test_32x32.mat")
        x = data["X"].transpose(3, 2, 0, 1) / np.float32(255)
        return torch.from_numpy(np.ascontiguousarray(x)), data["y"].flatten().astype(int) % 10
    files = sorted((run.data_dir / part).rglob("*.jpg"))
    names = [path.name[:3] if path.parent.name == part else path.parent.name for path in files]
    x = torch.cat([x for x, _ in dali_loader(files, None, 16, 32, CPU)])
    return x, np.unique(names, return_inverse=True)[1]


def new_classifier(name, num_classes=2):
    """The untrained classifier of a script; num_classes is of pets, which are 32 pixels wide."""
    arguments = {"sgan_catsdogs": (num_classes, 32, "logsumexp"), "sgan_mnist": ("logsumexp",),
                 "sgan_svhn": ("logsumexp",)}
    return importlib.import_module(name).Classifier(*arguments[name])


def logits_of(run, weights, x, batch_size):
    classifier = new_classifier(run.script, run.num_classes)
    classifier = classifier.to(memory_format=torch.channels_last).eval()
    classifier.load_state_dict(weights)
    with torch.no_grad(), bf16_autocast(CPU):
        return torch.cat([classifier(batch)[0].float() for batch in x.split(batch_size)])


def test_accuracies_are_those_of_the_saved_weights(run):
    x, y = held_out(run, "test")
    batch_size = 16 if run.data == "pets" else 1000
    for checkpoint, name in ((run.final, "test_accuracy"), (run.best, "test_accuracy_best_val")):
        guesses = logits_of(run, checkpoint["classifier"], x, batch_size).argmax(dim=1).numpy()
        assert run.results[name] == pytest.approx(np.mean(guesses == y), abs=1e-9)
    assert run.final["weights"] == "ema" and run.final["epoch"] == run.epochs


def test_best_checkpoint_is_the_best_on_validation(run):
    scores = [(float(row[column]), weights, int(row["epoch"])) for row in run.rows
              for column, weights in (("val_accuracy", "raw"), ("val_accuracy_ema", "ema"))]
    first_best = max(scores, key=lambda score: score[0])
    best = run.best["val_accuracy"], run.best["weights"], run.best["epoch"]
    assert best == first_best


@pytest.mark.parametrize("key", ["sgan", "supervised", "flat"])
def test_pets_checkpoint_tells_how_to_use_it(pets_runs, key):
    run = pets_runs[key]
    names = ["cat", "dog", "zebra"] if key == "flat" else ["cat", "dog"]
    for checkpoint in (run.best, run.final):
        assert checkpoint["class_names"] == names and checkpoint["image_size"] == 32


def test_validation_loss_is_that_of_the_saved_weights(pets_runs, pets):
    run = pets_runs["sgan"]
    run = SimpleNamespace(**vars(run), data="pets", data_dir=pets, script="sgan_catsdogs",
                          num_classes=2)
    x, y = held_out(run, "val")
    x = (x * 255).round() / 255  # bit for bit what the script makes of the bytes it keeps
    log_p = logits_of(run, run.final["classifier"], x, 16).double().log_softmax(dim=1)
    loss = -log_p[torch.arange(len(y)), torch.from_numpy(y)].mean().item()
    assert float(run.rows[-1]["val_loss_ema"]) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("data, key", [("mnist", "sgan"), ("mnist", "supervised"),
                                       ("svhn", "sgan")])
def test_stripes_are_learned(data, key, request):
    # ten equally frequent classes: 10% by chance; 10 or 20 steps on 100 labels are to do better
    results = request.getfixturevalue(f"{data}_runs")[key].results
    assert results["test_accuracy"] > 0.3
    assert results["test_accuracy_best_val"] > 0.3


# ================================ what a run depends on, bit for bit ==============================


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


def untimed(run):
    return [{column: number for column, number in row.items()
             if column not in ("seconds", "images_per_s")} for row in run.rows]


@pytest.mark.parametrize("data", ["mnist", "svhn", "pets"])
def test_seed_fixes_a_run_bit_for_bit_whatever_the_hidden_labels(data, request):
    """A run again, in which nothing differs but the labels of unlabeled images."""
    runs = request.getfixturevalue(f"{data}_runs")
    first, again = runs["sgan"], runs["relabeled"]
    assert untimed(again) == untimed(first)
    assert same_bits(again.final, first.final)
    assert same_bits(again.best, first.best)
    assert again.results["test_accuracy"] == first.results["test_accuracy"]


@pytest.mark.parametrize("data", ["mnist", "pets"])
def test_another_seed_gives_another_run(data, request):
    runs = request.getfixturevalue(f"{data}_runs")
    first, other = runs["sgan"], runs["other seed"]
    assert untimed(other)[0]["loss/lab"] != untimed(first)[0]["loss/lab"]
    assert not same_bits(other.final["classifier"], first.final["classifier"])


# ======================================= the official size ========================================


def test_mat_file_of_the_official_size_is_read_in_seconds(tmp_path):
    n = 73_257
    x = np.frombuffer(np.random.default_rng(0).bytes(32 * 32 * 3 * n), np.uint8)
    x, y = x.reshape((32, 32, 3, n), order="F"), np.arange(n) % 10  # as savemat stores it
    path = tmp_path / "SVHN/train_32x32.mat"
    path.parent.mkdir()
    savemat(path, {"X": x, "y": mat_labels(y)})
    started = time.process_time()  # other processes do not count
    images, labels = importlib.import_module("sgan_svhn").load_images(tmp_path, path.name)
    seconds = time.process_time() - started
    path.unlink()  # pytest keeps its folders, and this one holds 225 MB
    assert images.shape == (n, 3, 32, 32) and images.is_contiguous()
    assert labels.tolist() == y.tolist()
    for i in (0, 1, n // 2, n - 1):
        assert np.array_equal(images[i], x[..., i].transpose(2, 0, 1))
    assert seconds < 5


# ====================================== inside the training step ==================================
# Two steps on images that tell their role by their brightness: labeled ones are bright, unlabeled
# ones dark, and those of an untrained generator in between.


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """Data directories of the three scripts: {name: flags}."""
    root = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    y = rng.integers(10, size=300)
    # sizes as the scripts draw them: 10 labeled, half of the others for validation
    labeled, _, _ = balanced_split(torch.from_numpy(y), 10, 145, 10, seed=0)
    x = rng.integers(10, 30, (300, 32, 32, 3))
    x[labeled] = rng.integers(225, 245, (10, 32, 32, 3))
    write_mnist(root, x[:, :28, :28, 0], y, x[:20, :28, :28, 0], y[:20])
    write_svhn(root, x.astype(np.uint8), y, x[:20].astype(np.uint8), y[:20])
    for part, names in {"labeled": ("cat", "dog"), "val": ("cat", "dog"), "test": ("cat", "dog"),
                        "train": ("",)}.items():
        for n in range(40):
            folder = root / part / names[n % len(names)]
            folder.mkdir(parents=True, exist_ok=True)
            image = x[-1 - n]
            if part == "labeled":  # cats are reddish, dogs bluish
                image = x[labeled[n % 10]] * ([0.85, 0.95, 1.0] if n % 2 else [1.0, 0.95, 0.85])
            Image.fromarray(image.astype(np.uint8)).save(folder / f"{n:02d}.jpg")
    flags = ["--device", "cpu", "--dry-run", "--batch-size", 20]
    flags += ["--gan-weight", 0.7, "--consistency-weight", 0.4]
    data = ["--data-dir", root, "--num-labeled", 10]
    # as it is, the tone of an image tells its kind: no warm-up, and no black from beyond the border
    digits = ["--warmup-steps", 0, "--augmentation", 0.1]
    return {"sgan_mnist": [*flags, *data, *digits], "sgan_svhn": [*flags, *data, *digits],
            "sgan_catsdogs": [*flags, *pet_folders(root), "--image-size", 32]}


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


def surest(p, done):
    """1 for each class's surest images, by a share that grows from 0 at 1/5 of a run to 1/2."""
    count = round(0.5 * (done - 0.2) / 0.8 * len(p) / p.shape[1])
    chosen = torch.zeros(p.shape, dtype=torch.long)
    for k in range(p.shape[1]):
        chosen[p[:, k].topk(count).indices, k] = 1  # logits of 8 bits may tie: as the script does
    for i in (chosen.sum(dim=1) > 1).nonzero().flatten().tolist():  # the likeliest of several
        chosen[i] = torch.nn.functional.one_hot((chosen[i] * p[i]).argmax(), p.shape[1])
    return chosen


def watch(name, flags, out_dir, num_steps=2):
    """A dry run, watched through torch's global hooks: its forward passes and its updates.

    passes: of the classifier in training mode, with the mean of its input, over all ("tone") and by
    image and channel ("colors"), its outputs, the gradient that came back to its logits, the
    batch-norm buffers that it moved, whether its input came from the generator with a gradient,
    and what the EMA classifier taught in its pass before: 1 at the class of each image that it was
    sure of, else 0 ("teacher", (N, K), None where it was not asked in that step).
    updates: the network they belong to, their learning rate, the names of the weights of both
    networks that they moved and of the gradients that changed since the update before, and the
    classifier's state after.
    """
    networks, passes, updates, teacher = {}, [], [], [None]
    script = importlib.import_module(name)

    def before_forward(module, inputs):
        if module.training and isinstance(module, (script.Classifier, script.Generator)):
            if isinstance(module, script.Generator):  # a step begins
                teacher.append(None)
            if type(module).__name__ not in networks:  # seen first in the first step, untrained
                networks[type(module).__name__] = module
                module.at_first = copied(module.state_dict().items())
                module.latest = gradients(module)
            module.buffers_before = copied(module.named_buffers())

    def after_forward(module, inputs, outputs):
        if isinstance(module, script.Classifier) and not module.training:
            p_all = outputs[0].float().softmax(dim=1)
            if name == "sgan_catsdogs":
                step = 1 + sum(update.of == "Classifier" for update in updates)
                teacher.append(surest(p_all, step / num_steps))
            else:  # nobody is sure of anything in two steps: let it be of half of its guesses
                p, guess = p_all.max(dim=1)
                script.CONFIDENCE = p.median().item()
                teacher.append((p > script.CONFIDENCE)[:, None]
                               * torch.nn.functional.one_hot(guess, p_all.shape[1]))
        elif isinstance(module, script.Classifier):
            logits, features, *rest = outputs
            moved = changed(module.buffers_before, dict(module.named_buffers()))
            seen = SimpleNamespace(
                tone=inputs[0].mean().item(), colors=inputs[0].detach().mean(dim=(2, 3)),
                real_logit=rest[0].detach() if rest else None,
                logits=logits.detach().float(), features=features.detach().float(), grad=None,
                for_generator=inputs[0].requires_grad,
                moved={n for n in moved if not n.endswith("num_batches_tracked")},
                teacher=teacher[-1])
            passes.append(seen)
            logits.register_hook(lambda grad: setattr(seen, "grad", grad.float()))
            if rest:
                rest[0].register_hook(lambda grad: setattr(seen, "real_grad", grad.float()))

    def before_update(optimizer, args, kwargs):
        update = SimpleNamespace(
            of=next(n for n, net in networks.items()
                    if next(net.parameters()) is optimizer.param_groups[0]["params"][0]),
            lr=optimizer.param_groups[0]["lr"],
            new_gradients={n: changed(net.latest, gradients(net)) for n, net in networks.items()})
        updates.append(update)
        for network in networks.values():
            network.latest = gradients(network)
            network.weights_before = copied(network.named_parameters())

    def after_update(optimizer, args, kwargs):
        updates[-1].moved = {n: changed(net.weights_before, dict(net.named_parameters()))
                             for n, net in networks.items()}
        updates[-1].state = copied(networks["Classifier"].state_dict().items())

    handles = [register_module_forward_pre_hook(before_forward),
               register_module_forward_hook(after_forward),
               register_optimizer_step_pre_hook(before_update),
               register_optimizer_step_post_hook(after_update)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "CONFIDENCE", None, raising=False)  # after_forward sets it
        try:
            call_main(name, *flags, "--out-dir", out_dir)
        finally:
            for handle in handles:
                handle.remove()
    [folder] = out_dir.iterdir()
    with open(folder / "metrics.csv", newline="") as f:
        row = list(csv.DictReader(f))[-1]
    args = json.loads((folder / "args.json").read_text())
    return SimpleNamespace(name=name, passes=passes, updates=updates, networks=networks, row=row,
                           gan_weight=args["gan_weight"],
                           consistency_weight=args["consistency_weight"],
                           final=torch.load(folder / "final.pt", weights_only=True),
                           results=json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="session", params=SCRIPTS)
def watched(request, tones, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("watched") / "runs"
    return watch(request.param, tones[request.param], out_dir)


def kind(seen):
    """Which images a pass was given, told by their mean brightness."""
    return "unlabeled" if seen.tone < 0.3 else "fake" if seen.tone < 0.68 else "labeled"


def test_dry_run_takes_two_steps(watched):
    assert watched.results["steps"] == 2
    assert [update.of for update in watched.updates] == ["Classifier", "Generator"] * 2


def test_labeled_unlabeled_and_fake_images_pass_apart(watched):
    for step in (watched.passes[:4], watched.passes[4:]):
        assert sorted(map(kind, step[:3])) == ["fake", "labeled", "unlabeled"]
        assert kind(step[3]) == "fake"
        assert [seen.for_generator for seen in step] == [False, False, False, True]


def statistics_of(classifier):
    return {f"{n}.{statistic}" for n, module in classifier.named_modules()
            if isinstance(module, torch.nn.BatchNorm2d)
            for statistic in ("running_mean", "running_var")}


def test_only_unlabeled_images_move_batch_norm_statistics(watched):
    norms = statistics_of(watched.networks["Classifier"])
    assert len(norms) >= 10
    for seen in watched.passes:
        assert seen.moved == (norms if kind(seen) == "unlabeled" else set())


def test_statistics_of_all_images_are_moved_by_each_pass(tones, tmp_path):
    watched = watch("sgan_catsdogs", [*tones["sgan_catsdogs"], "--statistics", "all"],
                    tmp_path / "runs")
    assert len(watched.passes) == 8
    for seen in watched.passes:
        assert seen.moved == statistics_of(watched.networks["Classifier"])


def test_each_update_moves_its_own_network_by_its_own_gradient(watched):
    weights = {n: dict(net.named_parameters()) for n, net in watched.networks.items()}
    for update in watched.updates:
        other = "Generator" if update.of == "Classifier" else "Classifier"
        assert update.moved == {update.of: set(weights[update.of]), other: set()}
        # the backward pass has left the other network's gradients as they were, at first None
        assert update.new_gradients[other] == set()
        assert update.new_gradients[update.of] == set(weights[update.of])


def consistency_gradient(seen):
    """N times that of E [teacher is sure] -log p(teacher's label | x) by the logits: (N, K)."""
    p = seen.logits.double().softmax(dim=1)
    if seen.teacher is None:
        return torch.zeros_like(p)
    return seen.teacher.sum(dim=1, keepdim=True) * p - seen.teacher


def real_gradient(seen, target):
    """N times that of -log D(x), target 1, or -log(1 - D(x)), target 0, by the logits: (N, K)."""
    z = seen.logits.double().exp().sum(dim=1, keepdim=True)
    return (z / (1 + z) - target) * seen.logits.double().softmax(dim=1)


def test_classifier_minimises_the_losses_with_their_weights(watched):
    for seen in watched.passes:
        if seen.for_generator:
            continue
        n, p = len(seen.logits), seen.logits.double().softmax(dim=1)
        grad = n * seen.grad.double()
        if kind(seen) == "labeled":  # p - 1[y]
            y = (p - grad).argmax(dim=1)
            expected = p - torch.nn.functional.one_hot(y, p.shape[1])
        else:  # 0.5 (softplus(-r))' = -0.5 (1 - D) p, and 0.5 (softplus(r))' = 0.5 D p
            target = 0 if kind(seen) == "fake" else 1
            expected = watched.gan_weight * 0.5 * real_gradient(seen, target)
        if kind(seen) == "unlabeled":
            expected = expected + watched.consistency_weight * consistency_gradient(seen)
        # the logits and their gradient may be bfloat16, of 8 bits
        torch.testing.assert_close(grad, expected, rtol=0.02, atol=1e-4)


def test_labeled_photos_keep_their_labels(tones, tmp_path):
    flags = [*tones["sgan_catsdogs"], "--augmentation", 0]  # colours tell the class
    seen = watch("sgan_catsdogs", flags, tmp_path / "runs")
    for one in (one for one in seen.passes if kind(one) == "labeled"):
        n, p = len(one.logits), one.logits.double().softmax(dim=1)
        y = (p - n * one.grad.double()).argmax(dim=1)
        assert y.tolist() == (one.colors[:, 0] < one.colors[:, 2]).long().tolist()


def test_more_and_more_photos_of_each_class_are_learned_from_at_falling_rates(tones, tmp_path):
    flags = [flag for flag in tones["sgan_catsdogs"] if flag != "--dry-run"]
    flags += ["--epochs", 3, "--lr", 0.002, "--lr-generator", 0.004]
    seen = watch("sgan_catsdogs", flags, tmp_path / "runs", num_steps=6)
    assert seen.results["steps"] == 6
    falling = [1, 1, 1, 1, 2 / 3, 1 / 3]  # in the second half of the run
    for of, lr in (("Classifier", 0.002), ("Generator", 0.004)):
        assert [update.lr for update in seen.updates if update.of == of] == pytest.approx(
            [lr * rate for rate in falling])
    unlabeled = [one for one in seen.passes if kind(one) == "unlabeled"]
    assert unlabeled[0].teacher is None  # in the first fifth the labels alone teach
    assert [one.teacher.sum(dim=0).tolist() for one in unlabeled[1:]] == [
        [1, 1], [2, 2], [3, 3], [4, 4], [5, 5]]
    for one in unlabeled:
        expected = (seen.gan_weight * 0.5 * real_gradient(one, 1)
                    + seen.consistency_weight * consistency_gradient(one))
        grad = len(expected) * one.grad.double()
        torch.testing.assert_close(grad, expected, rtol=0.02, atol=1e-4)


def test_a_photo_is_taught_as_one_class_of_several_at_most(tones, tmp_path):
    root = tmp_path / "tones"
    shutil.copytree(Path(tones["sgan_catsdogs"][-3]).parent, root)
    for part in ("labeled", "val", "test"):
        for path in sorted((root / part).rglob("*.jpg"))[::2]:
            for name in ("emu", "fox"):
                (root / part / name).mkdir(exist_ok=True)
                shutil.copy(path, root / part / name)
    flags = ["--device", "cpu", "--dry-run", "--batch-size", 40, "--image-size", 32]
    seen = watch("sgan_catsdogs", [*flags, *pet_folders(root)], tmp_path / "runs", num_steps=1)
    for one in seen.passes:
        if kind(one) == "unlabeled":
            assert one.teacher.shape == (40, 4) and one.teacher.sum(dim=1).max() == 1
            expected = (seen.gan_weight * 0.5 * real_gradient(one, 1)
                        + seen.consistency_weight * consistency_gradient(one))
            torch.testing.assert_close(40 * one.grad.double(), expected, rtol=0.02, atol=1e-4)


def test_logged_losses_are_those_of_the_outputs(watched):
    logged = {}
    for step in (watched.passes[:4], watched.passes[4:]):
        unlabeled = next(seen for seen in step if kind(seen) == "unlabeled")
        fake = next(seen for seen in step if kind(seen) == "fake")
        gap = unlabeled.features.double().mean(dim=0) - step[3].features.double().mean(dim=0)
        z_unl, z_fake, z_gen = (seen.logits.double().exp().sum(dim=1)
                                for seen in (unlabeled, fake, step[3]))
        values = {"loss/unl": (1 / z_unl).log1p().mean(), "loss/fake": z_fake.log1p().mean(),
                  "loss/g": gap.square().mean(),
                  "monitor/p_real_unl": (z_unl / (1 + z_unl)).mean(),
                  "monitor/p_real_fake": (z_fake / (1 + z_fake)).mean()}
        if watched.name == "sgan_catsdogs":
            values["loss/fm"] = values["loss/g"]
            values["loss/g"] = values["loss/fm"] + (1 / z_gen).log1p().mean()
        log_p = unlabeled.logits.double().log_softmax(dim=1)
        values["loss/con"] = -(unlabeled.teacher * log_p).sum(dim=1).mean()
        picked = "monitor/picked" if watched.name == "sgan_catsdogs" else "monitor/sure"
        values[picked] = unlabeled.teacher.sum(dim=1).double().mean()
        for name, value in values.items():
            logged[name] = logged.get(name, 0) + value.item() / 2
    assert set(logged) | {"loss/lab"} == {
        name for name in watched.row if name.startswith(("loss/", "monitor/"))}
    assert 0 < logged[picked] < 1
    for name, value in logged.items():
        assert float(watched.row[name]) == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_final_weights_are_the_moving_average(watched):
    average = watched.networks["Classifier"].at_first
    for step, update in enumerate(watched.updates[1::2], 1):
        decay = (1 + step) / (10 + step)  # at these first steps below its limit
        for name, now in update.state.items():
            average[name] = (decay * average[name].double() + (1 - decay) * now.double()
                             if now.is_floating_point() else now)
    for name, weights in watched.final["classifier"].items():
        torch.testing.assert_close(weights.double(), average[name].double(), rtol=1e-5, atol=1e-6)
    generator = copied(watched.networks["Generator"].state_dict().items())
    assert same_bits(watched.final["generator"], generator)


def build_classifier(name):
    script = importlib.import_module(name)
    torch.manual_seed(0)
    return script, new_classifier(name), torch.rand(
        2, 16, *((1, 28, 28) if name == "sgan_mnist" else (3, 32, 32)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_batch_norm_statistics_stand_still_when_off_and_average_when_on(name):
    script, classifier, (x, x_other) = build_classifier(name)
    norm = next(m for m in classifier.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen = []
    norm.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out.clone())))

    script.update_batch_norm_statistics(classifier, False)
    buffers = {n: b.clone() for n, b in classifier.named_buffers() if "running" in n}
    classifier(x)
    classifier(3 * x_other - 1)
    assert changed(buffers, dict(classifier.named_buffers())) == set()
    for x_in, x_out in seen:  # yet each batch is normalised by itself
        variance, mean = torch.var_mean(x_in, dim=(0, 2, 3), correction=0, keepdim=True)
        torch.testing.assert_close(x_out, (x_in - mean) / (variance + norm.eps).sqrt(),
                                   rtol=1e-3, atol=1e-4)

    script.update_batch_norm_statistics(classifier, True)
    classifier(x)
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[0][0].mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * seen[0][0].var(dim=(0, 2, 3)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_networks_have_the_promised_shapes(name):
    script, classifier, (x, _) = build_classifier(name)
    generator = script.Generator(32) if name == "sgan_catsdogs" else script.Generator()
    images = generator(torch.randn(16, script.LATENT_DIM))
    assert images.shape == x.shape
    assert images.min() >= 0 and images.max() <= 1
    logits, features, *_ = classifier(images)
    assert logits.shape == (16, 2 if name == "sgan_catsdogs" else 10)
    assert features.shape == (16, 512 if name == "sgan_catsdogs" else 128)


@pytest.mark.parametrize("name", DIGITS)
def test_real_logit_of_each_form(name):
    """Against the softmax of K + 1 classes, of K and a zero, and against the plain linear unit."""
    script, _, (x, _) = build_classifier(name)
    for form in ("logsumexp", "fake-class", "sigmoid-head"):
        classifier = script.Classifier(form).eval()
        with torch.no_grad():
            logits, features, r = classifier(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert classifier(x)[2].dtype == torch.float32
        assert r.shape == (16,)
        extra = torch.zeros(16, 1)
        if form != "logsumexp":
            extra = features @ classifier.extra.weight.T + classifier.extra.bias
        if form == "sigmoid-head":
            real = torch.sigmoid(extra[:, 0].double())
        else:
            real = 1 - torch.cat([logits, extra], dim=1).double().softmax(dim=1)[:, -1]
        torch.testing.assert_close(r.double().sigmoid(), real, rtol=1e-5, atol=1e-6)


def assert_targets_of_d(seen, step, targets):
    """The gradient by r(x) is that of the cross-entropy of D(x) with the target of its kind."""
    for one in step[:3]:
        if kind(one) != "labeled":
            grad = len(one.real_logit) * one.real_grad.double()
            d = one.real_logit.double().sigmoid() - targets[kind(one)]
            torch.testing.assert_close(grad, seen.gan_weight * 0.5 * d, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name, flags", [
    *itertools.product(DIGITS, [["--generator-loss", "fool"],
                                ["--generator-loss", "complement"],
                                ["--generator-loss", "fool", "--real-logit", "fake-class"],
                                ["--generator-loss", "fool", "--real-logit", "sigmoid-head"]]),
    ("sgan_catsdogs", ["--generator-loss", "fool", "--real-logit", "fake-class"]),
    ("sgan_catsdogs", ["--generator-loss", "feature-matching"])])
def test_generator_minimises_what_its_flag_says(name, flags, tones, tmp_path):
    seen = watch(name, [*tones[name], *flags], tmp_path / "runs")
    expected = 0
    for step in (seen.passes[:4], seen.passes[4:]):
        unlabeled = next(one for one in step[:3] if kind(one) == "unlabeled")
        real, fake = unlabeled.features.double(), step[3].features.double()
        loss = (real.mean(dim=0) - fake.mean(dim=0)).square().mean()
        if "complement" in flags:
            cosines = torch.nn.functional.cosine_similarity(fake[:, None], fake[None], dim=2)
            others = ~torch.eye(len(fake), dtype=torch.bool)
            loss = loss + cosines[others].square().mean()
        if "fool" in flags:  # -log D(G(z))
            loss = -step[3].real_logit.double().sigmoid().log().mean()
        expected += loss.item() / 2
        assert_targets_of_d(seen, step, {"unlabeled": 1, "fake": 0})
    assert float(seen.row["loss/g"]) == pytest.approx(expected, rel=1e-3)
    if "--real-logit" in flags:
        for update in seen.updates:
            assert ("extra.weight" in update.moved["Classifier"]) == (update.of == "Classifier")


def test_smoothing_moves_the_target_of_unlabeled_images_alone(tones, tmp_path):
    seen = watch("sgan_svhn", [*tones["sgan_svhn"], "--real-label-smoothing", 0.1],
                 tmp_path / "runs")
    expected = 0
    for step in (seen.passes[:4], seen.passes[4:]):
        assert_targets_of_d(seen, step, {"unlabeled": 0.9, "fake": 0})
        unlabeled = next(one for one in step[:3] if kind(one) == "unlabeled")
        d = unlabeled.real_logit.double().sigmoid()
        expected += -(0.9 * d.log() + 0.1 * (1 - d).log()).mean().item() / 2
    assert float(seen.row["loss/unl"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", DIGITS)
def test_warm_up_sees_labeled_images_alone_and_the_learning_rate_falls(name, tones, tmp_path):
    seen = watch(name, [*tones[name], "--warmup-steps", 5, "--lr", 0.002], tmp_path / "runs")
    assert seen.results["steps"] == 4  # a dry run takes two of each
    assert [update.of for update in seen.updates] == ["Classifier"] * 2 + ["Classifier",
                                                                           "Generator"] * 2
    assert [kind(one) for one in seen.passes[:2]] == ["labeled", "labeled"]
    assert "fake" in map(kind, seen.passes[2:6])
    # the half of 4 steps at the full rate, then 2 (1 - step / 4) of it
    assert [update.lr for update in seen.updates] == pytest.approx([0.002] * 4 + [0.001] * 2)


def test_constant_learning_rates_of_photos_do_not_fall(tones, tmp_path):
    flags = [flag for flag in tones["sgan_catsdogs"] if flag != "--dry-run"]
    seen = watch("sgan_catsdogs", [*flags, "--epochs", 2, "--constant-lr", "--lr", 0.002,
                                   "--lr-generator", 0.004], tmp_path / "runs", num_steps=4)
    assert [update.lr for update in seen.updates] == [0.002, 0.004] * 4


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_ema_the_raw_weights_are_scored(name, tones, tmp_path):
    seen = watch(name, [*tones[name], "--ema-decay", 0], tmp_path / "runs")
    assert same_bits(seen.final["classifier"],
                     copied(seen.networks["Classifier"].state_dict().items()))


@pytest.mark.parametrize("image_size", [64, 224])
def test_pets_generator_grows_with_the_image_size(image_size):
    script = importlib.import_module("sgan_catsdogs")
    images = script.Generator(image_size)(torch.randn(2, script.LATENT_DIM))
    assert images.shape == (2, 3, image_size, image_size)
    logits, features, _ = script.Classifier(5, image_size, "logsumexp")(images)
    assert logits.shape == (2, 5) and features.shape == (2, 512)


@pytest.mark.parametrize("name", SCRIPTS)
def test_augmentation_differs_by_image_and_lets_the_gradient_through(name):
    script, _, (x, _) = build_classifier(name)
    x = x[:1].repeat(16, 1, 1, 1).requires_grad_()
    out = script.augment(x, 1)
    assert out.shape == x.shape
    assert len({tuple(image.flatten().tolist()) for image in out}) > 8
    out.sum().backward()
    assert (x.grad.flatten(1).abs().sum(dim=1) > 0).all()


def test_photos_without_augmentation_stay_as_they_are():
    script, _, (x, _) = build_classifier("sgan_catsdogs")
    assert torch.equal(script.augment(x, 0), x)


@pytest.mark.parametrize("name", DIGITS)
def test_augmentation_of_strength_0_changes_nothing_and_grows_with_strength(name):
    script, _, (x, _) = build_classifier(name)
    rounding = 1e-4 if name == "sgan_mnist" else 0
    torch.testing.assert_close(script.augment(x, 0.0), x, rtol=0, atol=rounding)
    far = [(script.augment(x, strength) - x).abs().mean().item() for strength in (0.02, 0.2, 1.0)]
    assert 0 < far[0] < far[1] < far[2]


def test_mnist_augmentation_moves_a_dot_by_a_few_pixels_and_seldom_loses_it():
    script, _, _ = build_classifier("sgan_mnist")
    x = torch.zeros(200, 1, 28, 28)
    x[:, :, 13:15, 13:15] = 1.0
    out = script.augment(x, 1.0)
    mass = out.sum(dim=(1, 2, 3))
    assert (mass > 0.1).float().mean() > 0.9
    seen = out[mass > 0.1, 0]
    along = torch.arange(28.0) - 13.5
    for axis in (1, 2):
        center = (seen.sum(dim=3 - axis) * along).sum(dim=1) / seen.sum(dim=(1, 2))
        # uniform up to 2 has a standard deviation of 1.2, the warp adds about 1, rarely 4
        assert 1 < center.std() < 2.5 and center.abs().max() < 7
        assert center.mean().abs() < 0.5


def test_svhn_augmentation_moves_a_dot_by_a_few_pixels():
    script, _, _ = build_classifier("sgan_svhn")
    x = torch.zeros(200, 3, 32, 32)
    x[:, :, 15:17, 15:17] = 1.0
    gray = script.augment(x, 1.0).mean(dim=1)
    dot = (gray - gray.flatten(1).median(dim=1).values[:, None, None]).clamp(min=0.15) - 0.15
    mass = dot.sum(dim=(1, 2))
    assert (mass > 0.1).float().mean() > 0.8  # the others are erased, or blurred too far
    seen = dot[mass > 0.1]
    along = torch.arange(32.0) - 15.5
    for axis in (1, 2):
        center = (seen.sum(dim=3 - axis) * along).sum(dim=1) / seen.sum(dim=(1, 2))
        assert 1 < center.std() < 1.5 and center.abs().max() < 4  # uniform up to 2: 1.15
        assert center.mean().abs() < 0.3


def test_svhn_augmentation_of_one_colour_is_one_colour():
    script, _, _ = build_classifier("sgan_svhn")
    colors = torch.rand(100, 3, 1, 1)
    out = script.augment(colors.expand(100, 3, 32, 32), 1.0)
    assert out.std(dim=(2, 3)).max() < 1e-5  # nothing comes in from beyond the border
    std, mean = torch.std_mean(colors.expand(100, 3, 32, 32), dim=(1, 2, 3), keepdim=True)
    limit = 0.2 * (colors - mean).abs() + 0.5 * std
    moved = (out.mean(dim=(2, 3), keepdim=True) - colors).abs() / limit
    assert 0.8 < moved.max() < 1.001
    assert (moved.amax(dim=1) - moved.amin(dim=1)).median() > 0.2  # by channel


def test_svhn_augmentation_erases_a_small_rectangle():
    script, _, _ = build_classifier("sgan_svhn")
    sides = []
    for image in script.augment(torch.rand(300, 3, 32, 32), 1.0):
        _, which, counts = image.flatten(1).unique(dim=1, return_inverse=True,
                                                   return_counts=True)
        rows, columns = (which == counts.argmax()).view(32, 32).nonzero().T
        edge = torch.cat([rows, columns])
        if counts.max() > 1 and edge.min() > 0 and edge.max() < 31:  # the border repeats as well
            height, width = (int(at.max() - at.min()) + 1 for at in (rows, columns))
            assert height * width == counts.max()
            sides.append((height, width))
    assert len(sides) > 100
    for lengths in zip(*sides):
        assert max(lengths) == 8 and min(lengths) == 1


# ============================================ flags ===============================================

COMMON_FLAGS = ["--seed", "--device", "--out-dir", "--dry-run", "--supervised-only", "--epochs",
                "--batch-size", "--lr", "--split-seed", "--gan-weight", "--consistency-weight",
                "--real-logit", "--generator-loss", "--augmentation", "--ema-decay"]
DIGIT_FLAGS = ["--data-dir", "--num-labeled", "--warmup-steps"]
FLAGS = {"sgan_mnist": [*COMMON_FLAGS, *DIGIT_FLAGS],
         "sgan_svhn": [*COMMON_FLAGS, *DIGIT_FLAGS, "--real-label-smoothing"],
         "sgan_catsdogs": [*COMMON_FLAGS, "--labeled-dir", "--unlabeled-dir", "--val-dir",
                           "--test-dir", "--image-size", "--lr-generator",
                           "--statistics", "--constant-lr", "--prepare", "--download",
                           "--labels-per-class", "--demo", "--resume", "--predict", "--checkpoint"],
         "toy_rings": ["--seed", "--split-seed", "--device", "--out-dir", "--dry-run",
                       "--num-labeled", "--supervised-only", "--epochs"]}


@pytest.mark.parametrize("name", FLAGS)
def test_help_shows_each_flag_with_its_default(name, capsys):
    with pytest.raises(SystemExit) as stop:
        call_main(name, "--help")
    assert stop.value.code == 0
    parts = re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    described = {re.match(r"(?:-h, )?(--[\w-]+)", part)[1]: " ".join(part.split())
                 for part in parts}
    assert set(described) == {"--help", *FLAGS[name]}
    for flag in FLAGS[name]:
        assert "(default: " in described[flag], flag


@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run_of_the_baseline_takes_two_steps(name, tones, tmp_path, capsys):
    call_main(name, *tones[name], "--supervised-only", "--out-dir", tmp_path)
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert result["steps"] == 2 and result["method"] == "supervised"


@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run_does_with_a_single_batch(name, tones, tmp_path, capsys):
    batch_size = 40 if name == "sgan_catsdogs" else 155  # all unlabeled images
    call_main(name, *tones[name], "--batch-size", batch_size, "--out-dir", tmp_path)
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert 1 <= result["steps"] <= 2


def test_all_labels_leave_none_for_validation(mnist, tmp_path, capsys):
    call_main("sgan_mnist", *MNIST, "--data-dir", mnist, "--num-labeled", 900, "--dry-run",
              "--out-dir", tmp_path)
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert result["num_labeled"] == 900 and result["val_accuracy"] is None
    assert 0 <= result["test_accuracy"] <= 1 and 0 <= result["test_accuracy_best_val"] <= 1


@needs_gpu
@pytest.mark.parametrize("method", [[], ["--supervised-only"]])
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run_on_the_gpu(name, method, tones, tmp_path):
    run = Runs({"gpu": [name, *tones[name], *method, "--device", "cuda"]}, tmp_path)["gpu"]
    assert run.results["device"] == torch.cuda.get_device_name()
    assert 0 < run.results["peak_memory_mib"] < 10_000
    assert all(math.isfinite(float(number)) for number in run.rows[0].values())


# ========================================== bad input =============================================


def assert_refused(capsys, words, tmp_path, name, *flags):
    """Exit status 2, a sentence on stderr that names the trouble, and no run folder."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.chdir(tmp_path)  # flags left out have defaults under data/, where a user has data
        call_main(name, *flags, "--dry-run", "--out-dir", tmp_path / "runs")
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ")
    assert all(line.startswith("  ") for line in message.splitlines()[1:])  # a list of files
    for word in words:
        assert word in message
    assert not (tmp_path / "runs").exists()


BAD_FLAGS = {
    "epochs zero": (["--epochs", 0], "--epochs"),
    "epochs negative": (["--epochs", -3], "--epochs"),
    "batch size zero": (["--batch-size", 0], "--batch-size"),
    "batch size negative": (["--batch-size", -1], "--batch-size"),
    "batch size one": (["--batch-size", 1], "--batch-size"),
    "batch size over all": (["--batch-size", 100_000], "--batch-size"),
    "lr zero": (["--lr", 0], "--lr"),
    "lr negative": (["--lr", -1e-3], "--lr"),
    "lr nan": (["--lr", "nan"], "--lr"),
    "seed negative": (["--seed", -1], "--seed"),
    "split seed negative": (["--split-seed", -1], "--split-seed"),
    "gan weight negative": (["--gan-weight", -1], "--gan-weight"),
    "consistency weight nan": (["--consistency-weight", "nan"], "--consistency-weight"),
    "ema decay negative": (["--ema-decay", -0.1], "--ema-decay"),
    "ema decay one": (["--ema-decay", 1], "--ema-decay"),
}
BAD_NUM_LABELED = {"num labeled 15": (15, "15"), "num labeled zero": (0, "0"),
                   "num labeled negative": (-10, "-10"), "num labeled too many": (100_000, "900")}
BAD_DIGIT_FLAGS = {
    "warm-up negative": (["--warmup-steps", -1], "--warmup-steps"),
    "augmentation negative": (["--augmentation", -0.1], "--augmentation"),
    "augmentation above one": (["--augmentation", 1.5], "--augmentation"),
}
BAD_PETS_FLAGS = {
    "image size 48": (["--image-size", 48], "--image-size"),
    "image size zero": (["--image-size", 0], "--image-size"),
    "image size negative": (["--image-size", -32], "--image-size"),
    "lr generator zero": (["--lr-generator", 0], "--lr-generator"),
    "no labeled folder": (["--labeled-dir", "nowhere"], "--labeled-dir nowhere"),
    "no unlabeled folder": (["--unlabeled-dir", "nowhere"], "--unlabeled-dir nowhere"),
    "no val folder": (["--val-dir", "nowhere"], "--val-dir nowhere"),
    "no test folder": (["--test-dir", "nowhere"], "--test-dir nowhere"),
    "no source": (["--prepare", "nowhere"], "--prepare nowhere"),
    "no labels": (["--labels-per-class", 0], "--labels-per-class"),
    "batch below two a class": (["--batch-size", 3], "--batch-size 3"),
}


@pytest.fixture
def good_flags(mnist, svhn, pets):
    return {"sgan_mnist": [*MNIST, "--data-dir", mnist], "sgan_svhn": [*SVHN, "--data-dir", svhn],
            "sgan_catsdogs": [*PETS, *pet_folders(pets)]}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("flags, word", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_are_refused(name, flags, word, good_flags, tmp_path, capsys):
    assert_refused(capsys, [word], tmp_path, name, *good_flags[name], *flags)


@pytest.mark.parametrize("num_labeled, word", BAD_NUM_LABELED.values(), ids=BAD_NUM_LABELED)
def test_bad_number_of_labels_is_refused(num_labeled, word, mnist, tmp_path, capsys):
    assert_refused(capsys, ["--num-labeled", word], tmp_path, "sgan_mnist", *MNIST,
                   "--data-dir", mnist, "--num-labeled", num_labeled)


@pytest.mark.parametrize("flags, word", BAD_DIGIT_FLAGS.values(), ids=BAD_DIGIT_FLAGS)
@pytest.mark.parametrize("name", DIGITS)
def test_bad_flags_for_digits_are_refused(name, flags, word, good_flags, tmp_path, capsys):
    assert_refused(capsys, [word], tmp_path, name, *good_flags[name], *flags)


@pytest.mark.parametrize("value", [-0.1, 1.1, "nan"])
def test_bad_smoothing_is_refused(value, good_flags, tmp_path, capsys):
    assert_refused(capsys, ["--real-label-smoothing"], tmp_path, "sgan_svhn",
                   *good_flags["sgan_svhn"], "--real-label-smoothing", value)


@pytest.mark.parametrize("flags, word", BAD_PETS_FLAGS.values(), ids=BAD_PETS_FLAGS)
def test_bad_flags_for_pets_are_refused(flags, word, pets, tmp_path, capsys):
    folders = [] if "--prepare" in flags else pet_folders(pets)
    assert_refused(capsys, [word], tmp_path, "sgan_catsdogs", *PETS, *folders, *flags)


def emptied(folder):
    for path in folder.iterdir():
        path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


BAD_PETS = {  # what is done to the folders, and the words of the message
    "empty labeled folder": (lambda root: (shutil.rmtree(root / "labeled"),
                                           (root / "labeled").mkdir()), ["--labeled-dir"]),
    "empty unlabeled folder": (lambda root: emptied(root / "train"), ["--unlabeled-dir"]),
    "empty class": (lambda root: emptied(root / "labeled/dog"), ["--labeled-dir", "dog"]),
    "one class only": (lambda root: shutil.rmtree(root / "labeled/dog"), ["--labeled-dir", "cat"]),
    "validation class never seen": (lambda root: (root / "val/dog").rename(root / "val/cow"),
                                    ["--val-dir", "cow"]),
    "test class never seen": (lambda root: (root / "test/dog").rename(root / "test/cow"),
                              ["--test-dir", "cow"]),
    "text instead of a labeled image": (lambda root: (root / "labeled/cat/001.jpg").write_text("x"),
                                        ["labeled/cat/001.jpg"]),
    "empty labeled file": (lambda root: (root / "labeled/cat/001.jpg").write_bytes(b""),
                           ["labeled/cat/001.jpg"]),
    "labeled image cut off": (lambda root: cut(root / "labeled/cat/001.jpg"),
                              ["labeled/cat/001.jpg"]),
    "name without a class": (lambda root: shutil.move(root / "labeled/cat/001.jpg",
                                                      root / "labeled/12.jpg"), ["12.jpg"]),
    "fewer unlabeled images than a batch": (
        lambda root: [path.unlink() for path in sorted((root / "train").iterdir())[15:]],
        ["--unlabeled-dir", "15", "--batch-size"]),
}


@pytest.mark.parametrize("damage, words", BAD_PETS.values(), ids=BAD_PETS)
def test_bad_folders_are_refused(damage, words, pets, tmp_path, capsys):
    shutil.copytree(pets, tmp_path / "pets")
    damage(tmp_path / "pets")
    assert_refused(capsys, words, tmp_path, "sgan_catsdogs", *PETS, *pet_folders(tmp_path / "pets"))


def test_files_that_are_no_images_are_left_out_of_the_unlabeled(pets, tmp_path, capsys):
    train = tmp_path / "train"
    shutil.copytree(pets / "train", train)
    (train / "00003.jpg").write_bytes(b"")
    (train / "notes.txt").write_text("pets")
    (train / ".hidden.jpg").write_text("not even counted")
    call_main("sgan_catsdogs", *PETS, *pet_folders(pets), "--unlabeled-dir", train, "--dry-run",
              "--out-dir", tmp_path / "runs")
    output = capsys.readouterr().out
    assert "47 unlabeled" in output and "2 files" in output and "left_out.csv" in output
    [listed] = (tmp_path / "runs").glob("*/left_out.csv")
    assert "00003.jpg" in listed.read_text() and "notes.txt" in listed.read_text()


RAW = "MNIST/raw/train-images-idx3-ubyte"
BAD_MNIST = {
    "garbage": lambda root: (root / RAW).write_bytes(b"no digits here" * 100),
    "empty": lambda root: (root / RAW).write_bytes(b""),
    "cut off": lambda root: cut(root / RAW),
    "other type": lambda root: (root / RAW).write_bytes(
        b"\0\0\x0d" + (root / RAW).read_bytes()[3:]),  # 13: float32
    "images are labels": lambda root: shutil.copy(root / "MNIST/raw/train-labels-idx1-ubyte",
                                                  root / RAW),
    "fewer labels": lambda root: write_idx(root / "MNIST/raw/train-labels-idx1-ubyte",
                                           np.arange(800) % 10),
}


@pytest.mark.parametrize("damage", BAD_MNIST.values(), ids=BAD_MNIST)
def test_damaged_idx_files_are_refused(damage, mnist, tmp_path, capsys):
    shutil.copytree(mnist, tmp_path / "data")
    damage(tmp_path / "data")
    assert_refused(capsys, [str(tmp_path / "data")], tmp_path, "sgan_mnist", *MNIST,
                   "--data-dir", tmp_path / "data")


BAD_SVHN = {
    "garbage": lambda path: path.write_bytes(b"no digits here" * 100),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": cut,
    "no labels": lambda path: savemat(path, {"X": np.zeros((32, 32, 3, 30), np.uint8)}),
    "images first": lambda path: savemat(path, {"X": np.zeros((30, 32, 32, 3), np.uint8),
                                                "y": np.ones((30, 1))}),
    "float images": lambda path: savemat(path, {"X": np.zeros((32, 32, 3, 30)),
                                                "y": np.ones((30, 1))}),
    "fewer labels": lambda path: savemat(path, {"X": np.zeros((32, 32, 3, 30), np.uint8),
                                                "y": np.ones((29, 1))}),
}


@pytest.mark.parametrize("damage", BAD_SVHN.values(), ids=BAD_SVHN)
def test_damaged_mat_files_are_refused(damage, svhn, tmp_path, capsys):
    shutil.copytree(svhn, tmp_path / "data")
    path = tmp_path / "data/SVHN/train_32x32.mat"
    damage(path)
    assert_refused(capsys, [str(path)], tmp_path, "sgan_svhn", *SVHN,
                   "--data-dir", tmp_path / "data")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
@pytest.mark.parametrize("name", SCRIPTS)
def test_cuda_without_a_gpu_is_refused(name, tmp_path, capsys):
    assert_refused(capsys, ["--device cuda"], tmp_path, name, "--device", "cuda")


def test_refusals_and_failures_of_real_processes(mnist, tmp_path):
    """What the tests above see in this process is what a shell sees."""
    flags = ["--data-dir", mnist, *MNIST, "--lr", 1e30, "--batch-size", 500, "--epochs", 3,
             "--warmup-steps", 0, "--supervised-only"]
    runs = Runs({"sgan_mnist": ["sgan_mnist", "--data-dir", mnist, "--num-labeled", 15],
                 "sgan_catsdogs": ["sgan_catsdogs", "--labeled-dir", "nowhere"],
                 "lost": ["sgan_mnist", *flags]}, tmp_path)
    lost = runs.completed("lost")
    for name, word in (("sgan_mnist", "--num-labeled"),
                       ("sgan_catsdogs", "--labeled-dir nowhere")):
        refused = runs.completed(name)
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1
        assert refused.stderr.startswith("error: ") and word in refused.stderr
        assert refused.stdout == "" and list((tmp_path / name).iterdir()) == []

    # One step an epoch: the first loss is finite, that of the weights it leads to is not.
    assert lost.returncode == 1
    assert len(lost.stderr.splitlines()) == 1
    assert re.match(r"stopped: loss/lab is (nan|inf) at step 2;", lost.stderr)
    assert "RESULT" not in lost.stdout
    [folder] = (tmp_path / "lost" / "runs").iterdir()
    assert not (folder / "results.json").exists() and not (folder / "final.pt").exists()
    assert torch.load(folder / "best.pt", weights_only=True)["epoch"] == 1


# =================================== making the four folders ======================================

CLASSES = ("cat", "dog")


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """1,060 tiny photos a class, in Kaggle's flat layout and in that of PetImages; one is damaged.

    They are hard links to a few files: names of their own, so that a draw shows in them.
    """
    root = tmp_path_factory.mktemp("archives")
    rng = np.random.default_rng(0)
    for i in range(8):
        image = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8))
        image.save(root / f"{i}.jpg")
    for name in CLASSES:
        (root / "PetImages" / name.capitalize()).mkdir(parents=True)
        (root / "kaggle").mkdir(exist_ok=True)
        for i in range(1060):
            os.link(root / f"{i % 8}.jpg", root / "kaggle" / f"{name}.{i}.jpg")
            os.link(root / f"{i % 8}.jpg", root / "PetImages" / name.capitalize() / f"{i}.jpg")
    for path in (root / "kaggle/cat.666.jpg", root / "PetImages/Cat/666.jpg"):
        path.unlink()
        path.write_bytes(b"")  # as there are in Microsoft's archive
    return root


def drawn(source, root, split_seed):
    """Run --prepare: {folder: its links, sorted, and the files that they lead to}."""
    call_main("sgan_catsdogs", "--prepare", source, "--split-seed", split_seed,
              *pet_folders(root))
    parts = {}
    for part in ("labeled", "val", "test", "train"):
        links = sorted(path for path in (root / part).rglob("*") if path.is_file())
        parts[part] = links, [path.resolve() for path in links]
    return parts


def class_in_archive(path):
    """The class of a photo by its place in either archive."""
    return path.name.split(".")[0] if path.parent.name == "kaggle" else path.parent.name.lower()


@pytest.mark.parametrize("layout", ["kaggle", "PetImages"])
def test_prepare_draws_balanced_disjoint_folders(layout, archives, tmp_path, capsys):
    source = archives / layout
    parts = drawn(source, tmp_path, split_seed=3)
    sizes = {part: len(links) for part, (links, _) in parts.items()}
    assert sizes == {"labeled": 100, "val": 1000, "test": 1000, "train": 19}
    originals = [path for _, files in parts.values() for path in files]
    everything = {path for path in source.rglob("*.jpg") if path.stat().st_size}
    assert len(set(originals)) == len(originals) and set(originals) == everything
    output = capsys.readouterr()
    assert "1 file" in output.err  # the damaged one is spoken of
    assert "classes: cat, dog\n" in output.out
    for part in ("labeled", "val", "test"):
        links, files = parts[part]
        assert [path.parent.name for path in links] == [class_in_archive(path) for path in files]
        assert [path.parent.name for path in links].count("dog") == len(links) / 2
    links, files = parts["train"]
    assert all(re.fullmatch(r"\d{5}\.jpg", path.name) for path in links)  # tells no class
    classes = [class_in_archive(path) for path in files]
    assert classes.count("cat") == 9  # 1,059 - 50 - 500 - 500, one of 1,060 being damaged
    assert classes != sorted(classes) and classes != sorted(classes, reverse=True)
    record = json.loads((tmp_path / "labeled.json").read_text())
    assert record["split_seed"] == 3 and record["source"] == str(source)
    assert sorted(source / name for name in record["files"]) == sorted(parts["labeled"][1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "labeled", "labeled.json", "test", "train", "val"]


def test_prepare_draws_as_many_labels_as_asked(archives, tmp_path):
    call_main("sgan_catsdogs", "--prepare", archives / "kaggle", *pet_folders(tmp_path),
              "--labels-per-class", 3)
    assert {path.name: len(list(path.iterdir())) for path in (tmp_path / "labeled").iterdir()} == {
        "cat": 3, "dog": 3}


def test_prepare_is_fixed_by_its_seed(archives, tmp_path):
    first, again, other = (drawn(archives / "kaggle", tmp_path / str(n), seed)
                           for n, seed in enumerate((0, 0, 1)))
    for part in first:
        assert [path.name for path in again[part][0]] == [path.name for path in first[part][0]]
        assert again[part][1] == first[part][1]
        assert set(other[part][1]) != set(first[part][1])


def test_an_unpacking_that_was_interrupted_is_begun_again(pets, tmp_path, monkeypatch, capsys):
    """The archive lies there already, so that nothing is fetched; it is too small to draw from."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    photos = sorted((pets / "test").rglob("*.jpg"))
    with zipfile.ZipFile("data/kagglecatsanddogs_5340.zip", "w") as archive:
        for path in photos:
            archive.write(path, Path("PetImages") / path.relative_to(pets / "test"))
    taken = []

    def half(archive, folder):
        taken.extend(archive.extract(name, folder) for name in archive.namelist()[::2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(zipfile.ZipFile, "extractall", half)
        call_main("sgan_catsdogs", "--download")
    assert taken and os.listdir("data") == ["kagglecatsanddogs_5340.zip"]
    with pytest.raises(SystemExit) as refusal:
        call_main("sgan_catsdogs", "--download")
    assert refusal.value.code == 2 and "class cat" in capsys.readouterr().err
    unpacked = sorted(Path("data/PetImages").rglob("*.jpg"))
    assert [path.read_bytes() for path in unpacked] == [path.read_bytes() for path in photos]


@pytest.mark.parametrize("part", ["labeled", "val", "test", "train"])
def test_prepare_leaves_existing_folders_alone(part, archives, tmp_path, capsys):
    (tmp_path / part).mkdir()
    (tmp_path / part / "mine.txt").write_text("")
    assert_refused(capsys, [str(tmp_path / part), "exists"], tmp_path, "sgan_catsdogs",
                   "--prepare", archives / "kaggle", *pet_folders(tmp_path))
    assert list(tmp_path.iterdir()) == [tmp_path / part]
    assert [path.name for path in (tmp_path / part).iterdir()] == ["mine.txt"]


def test_prepare_needs_enough_photos_of_each_class(pets, tmp_path, capsys):
    assert_refused(capsys, ["class cat", str(pets / "test"), "15"], tmp_path, "sgan_catsdogs",
                   "--prepare", pets / "test", *pet_folders(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_prepare_needs_the_folder_of_the_classes_not_the_one_above(archives, tmp_path, capsys):
    (tmp_path / "above").mkdir()
    (tmp_path / "above/PetImages").symlink_to(archives / "PetImages")
    assert_refused(capsys, [str(tmp_path / "above"), "one class only"], tmp_path, "sgan_catsdogs",
                   "--prepare", tmp_path / "above", *pet_folders(tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["above"]


# ====================================== the demo's drawings =======================================

FEW = {"labeled_per_class": 2, "unlabeled": 10, "val": 4, "test": 6, "size": 32}


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}


def test_drawn_data_set_has_its_counts_and_hides_labels(tmp_path):
    draw_dataset(tmp_path / "pets", **FEW)
    names = list(contents(tmp_path / "pets"))
    for part, count in (("labeled", 4), ("val", 4), ("test", 6)):
        for species in CLASSES:
            assert sum(name.startswith(f"{part}/{species}/") for name in names) == count / 2
    assert [name for name in names if name.startswith("train")] == [
        f"train/{n:05d}.jpg" for n in range(10)]
    assert len(set(contents(tmp_path / "pets").values())) == len(names) == 24  # no picture twice
    with Image.open(tmp_path / "pets/labeled/cat/000.jpg") as image:
        assert image.format == "JPEG" and image.size == (32, 32) and image.mode == "RGB"


def test_drawn_data_set_is_fixed_by_its_seed(tmp_path):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        draw_dataset(tmp_path / name, **FEW, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))
    assert again == first
    assert not set(first.values()) & set(other.values())


def test_interrupted_drawing_leaves_no_folder(tmp_path):
    with pytest.raises(TypeError):
        draw_dataset(tmp_path / "pets", **FEW | {"test": None})  # fails when all else is drawn
    assert list(tmp_path.iterdir()) == []


def test_drawing_does_not_touch_an_existing_folder(tmp_path):
    (tmp_path / "pets").mkdir()
    with pytest.raises(FileExistsError):
        draw_dataset(tmp_path / "pets", **FEW)
    assert list((tmp_path / "pets").iterdir()) == []


def test_demo_trains_on_its_drawings_and_other_flags_still_count(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_dataset("data/demo", **FEW | {"unlabeled": 20})  # there already, so not drawn again
    before = contents(tmp_path / "data")
    call_main("sgan_catsdogs", "--demo", "--dry-run", "--device", "cpu", "--batch-size", 10,
              "--lr", 1e-3)
    assert contents(tmp_path / "data") == before
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert result["num_labeled"] == 4 and result["image_size"] == 32
    [folder] = (tmp_path / "runs").iterdir()
    args = json.loads((folder / "args.json").read_text())
    assert (args["batch_size"], args["lr"]) == (10, 1e-3)
    assert args["unlabeled_dir"] == "data/demo/train"


# ============================================ sweeps ==============================================


def test_sweep_prints_mean_and_deviation_and_draws_curves(mnist, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call_main("tests.sweep", "--seeds", "3,4", "sgan_mnist.py", "--data-dir", mnist, *MNIST,
              "--dry-run")
    results = [json.loads(path.read_text()) for path in Path("runs").glob("*/results.json")]
    assert {(result["seed"], result["split_seed"]) for result in results} == {(3, 3), (4, 4)}
    a, b = (100 * result["test_accuracy"] for result in results)
    expected = f"test, %: {(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f} of 2"
    assert expected in capsys.readouterr().out.splitlines()
    call_main("tests.sweep", "--curves", "curves.png", "runs")
    with Image.open("curves.png") as image:
        assert image.width > 300


def test_sweep_draws_photos_for_each_seed(archives, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call_main("tests.sweep", "--seeds", 5, "--labels-per-class", 4, "--photos",
              archives / "PetImages", "sgan_catsdogs.py", *PETS, "--dry-run")
    [run] = Path("runs").iterdir()
    result = json.loads((run / "results.json").read_text())
    assert (result["split_seed"], result["seed"], result["num_labeled"]) == (5, 5, 8)
    assert "split5" in run.name.split("__")
    found = sweep.draw_photos("nowhere", "4", "5")  # drawn already
    assert found[:2] == ["--labeled-dir", Path(result["labeled_dir"])]


def test_sweep_stops_when_a_run_does(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="--seed 0 stopped"):
        call_main("tests.sweep", "sgan_mnist.py", "--epochs", 0)
    assert "--epochs" in capfd.readouterr().err
