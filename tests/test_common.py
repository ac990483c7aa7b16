"""What common.py promises: losses, flags, the DALI loader, the draw, evaluation, records, figures.

Image files, folders of photos and their leaks are in test_catsdogs.py.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
from tests.conftest import CPU, needs_gpu, picture, read_csv

# ============================================ losses ==============================================
# The reference: probabilities of a (K+1)-way softmax in float64 whose last logit, "fake", is 0,
# written without logsumexp or softplus.


def fake_probabilities(logits):
    """logits (N, K) -> p(y | x) (N, K) and p(fake | x) (N,), in float64."""
    with_fake = torch.cat([logits.double(), logits.new_zeros(len(logits), 1).double()], dim=1)
    p = with_fake.exp() / with_fake.exp().sum(dim=1, keepdim=True)
    return p[:, :-1], p[:, -1]


def reference_labeled(logits, labels):
    p, p_fake = fake_probabilities(logits)
    return -(p[torch.arange(len(labels)), labels] / (1 - p_fake)).log().mean()


def reference_real(logits, labels):
    return -(1 - fake_probabilities(logits)[1]).log().mean()


LOSSES = {  # name -> ours and the reference, both functions of (logits, labels)
    "labeled": (common.labeled_loss, reference_labeled),
    "unlabeled": (lambda x, y: common.unlabeled_loss(common.real_logit(x)), reference_real),
    "fake": (lambda x, y: common.fake_loss(common.real_logit(x)),
             lambda x, y: -fake_probabilities(x)[1].log().mean()),
    "fool": (lambda x, y: common.fool_loss(common.real_logit(x)), reference_real)}


def some_logits(num_classes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_classes)
    logits = 3 * torch.randn(16, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (16,), generator=generator)
    return logits.float().to(dtype), labels


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("num_classes", [1, 2, 10])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_softmax_with_a_fake_class(name, num_classes, dtype,
                                                                      digits):
    ours, reference = LOSSES[name]
    logits, labels = some_logits(num_classes, dtype)
    value = ours(logits.requires_grad_(), labels)
    exact = logits.detach().double().requires_grad_()
    expected = reference(exact, labels)
    assert value.dtype == dtype
    assert value.item() == pytest.approx(expected.item(), rel=digits, abs=digits)
    value.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=10 * digits, atol=digits)


# r = log Z of these rows: 1e4 + log 2, -1e4 + log 3, 1e4, 0, -1e4 + log 3
EXTREME = torch.tensor([[1e4, -1e4, 1e4], [-1e4, -1e4, -1e4], [1e4, 0, 0], [0, -1e4, -1e4],
                        [-1e4, -1e4, -1e4]])
EXTREME_LABELS = torch.tensor([0, 1, 2, 0, 2])
EXTREME_VALUES = {"labeled": (np.log(2) + np.log(3) + 1e4 + 0 + np.log(3)) / 5,
                  "unlabeled": (2 * (1e4 - np.log(3)) + np.log(2)) / 5,
                  "fake": (2e4 + np.log(2) + np.log(2)) / 5,
                  "fool": (2 * (1e4 - np.log(3)) + np.log(2)) / 5}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_stay_finite_at_extreme_logits(name, bf16):
    x = EXTREME.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = nn.functional.linear(x, torch.eye(3))
        value = LOSSES[name][0](logits, EXTREME_LABELS)
    value.backward()
    assert logits.dtype == (torch.bfloat16 if bf16 else torch.float32) and value.dtype == x.dtype
    exact = LOSSES[name][0](logits.detach().float(), EXTREME_LABELS).item()
    assert value.item() == pytest.approx(exact, rel=1e-6)
    # bfloat16 rounds the logits to 9984
    assert value.item() == pytest.approx(EXTREME_VALUES[name], rel=0.01 if bf16 else 1e-6)
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0.1  # nor has it vanished


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_bf16_logits_is_computed_in_float32(name):
    """At ordinary logits, where a loss in bfloat16 would be off in the third digit."""
    logits, labels = some_logits(10, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[name][0](logits, labels)
    assert value.item() == pytest.approx(LOSSES[name][1](logits, labels).item(), rel=1e-5)


# ======================================== flags and device ========================================


@pytest.mark.parametrize("vendor, flags, native", [
    ("AuthenticAMD", "avx512f avx512_bf16", True),
    ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
    ("GenuineIntel", "avx512f avx512_bf16", False),  # has it, but at half the speed of float32
    ("AuthenticAMD", "avx2", False),
])
def test_bf16_is_used_where_the_processor_gains_by_it(tmp_path, monkeypatch, vendor, flags, native):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(common, "Path", lambda path: cpuinfo)
    with common.bf16_autocast(CPU):
        assert (nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16) == native


def parse(capsys, text, kind, **bounds):
    """The value of `--flag text`, or the last line on stderr of a refusal."""
    parser = argparse.ArgumentParser(prog="script.py")
    parser.add_argument("--flag", type=common.number(kind, **bounds))
    try:
        return parser.parse_args([f"--flag={text}"]).flag
    except SystemExit as stop:
        assert stop.code == 2
        return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("kind, bounds, good, bad, words", [
    (int, {"minimum": 1}, ["1", "70000"], ["0", "-1"], "at least 1"),
    (int, {"minimum": 0, "below": 2**63}, ["0", str(2**63 - 1)], ["-1", str(2**63)],
     f"at least 0 and below {2**63}"),
    (float, {"above": 0}, ["1e-9", "3"], ["0", "-1", "nan"], "above 0"),
    (float, {"minimum": 0, "maximum": 1}, ["0", "1"], ["-0.1", "1.01", "nan"],
     "at least 0 and at most 1")])
def test_number_takes_what_is_within_its_bounds(kind, bounds, good, bad, words, capsys):
    for text in good:
        value = parse(capsys, text, kind, **bounds)
        assert value == kind(text) and type(value) is kind
    for text in bad:
        assert parse(capsys, text, kind, **bounds) == (
            f"script.py: error: argument --flag: it must be {words}, but is {text}")
    for text in ("inf", "-inf") if kind is float else ():
        assert parse(capsys, text, kind, **bounds).endswith(f"but is {text}")
    assert parse(capsys, "many", kind, **bounds) == (
        f"script.py: error: argument --flag: invalid {kind.__name__} value: 'many'")


def test_device_is_the_one_named(capsys):
    assert common.pick_device("cpu") == CPU
    assert common.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        assert common.pick_device("cuda").type == "cuda"
    else:
        with pytest.raises(SystemExit) as stop:
            common.pick_device("cuda")
        assert stop.value.code == 2 and "--device cuda" in capsys.readouterr().err


# ========================================== DALI loader ===========================================

SIZES = [(40, 56), (300, 200), (64, 64), (17, 90), (128, 31), (65, 63), (500, 375)]
SIDE = 64


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """23 JPEGs of seven sizes, smaller and larger than SIDE, none but one of them square."""
    folder = tmp_path_factory.mktemp("jpegs")
    for i in range(23):
        picture(size=SIZES[i % 7], seed=i).save(folder / f"{i:02d}.jpg", quality=92)
    return sorted(folder.iterdir())


def load(files, batch_size, labels=None, device=CPU):
    return list(common.dali_loader(files, labels, batch_size, SIDE, device))


def assert_loaded_right(files, device):
    labels = [(7 * i) % 5 for i in range(len(files))]
    batches = load(files, 8, labels, device)
    assert [len(x) for x, _ in batches] == [8, 8, 7]
    for x, y in batches:
        assert x.dtype == torch.float32 and x.shape[1:] == (3, SIDE, SIDE)
        assert y.dtype == torch.int64 and y.shape == (len(x),)
        assert x.device.type == y.device.type == device.type
        assert x.min() >= 0 and x.max() <= 1
    assert [k for _, y in batches for k in y.tolist()] == labels
    return torch.cat([x.cpu().double() for x, _ in batches])


def test_loader_decodes_and_resizes_as_pillow_does(files):
    by_pillow = [Image.open(f).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                 for f in files]
    expected = torch.from_numpy(np.stack(by_pillow)).permute(0, 3, 1, 2).double() / 255
    gap = (assert_loaded_right(files, CPU) - expected).abs().flatten(1)  # (N, 3 * SIDE * SIDE)
    # in grey levels of 255: two decoders and two resizers round differently, and nothing more
    assert 255 * gap.mean(dim=1).max() < 0.5
    assert 255 * gap.quantile(0.999, dim=1).max() < 2.5


@needs_gpu
def test_loader_on_the_gpu_gives_the_same_images(files):
    on_gpu = assert_loaded_right(files, common.pick_device("cuda"))
    gap = (on_gpu - assert_loaded_right(files, CPU)).abs().flatten(1)
    # the GPU decodes with another inverse DCT and colour upsampling
    assert 255 * gap.mean(dim=1).max() < 2.0
    assert 255 * gap.quantile(0.99, dim=1).max() < 8.0


@pytest.mark.parametrize("count, batch_size, sizes", [
    (0, 4, []), (1, 1, [1]), (1, 8, [1]), (7, 4, [4, 3]), (8, 4, [4, 4]), (9, 4, [4, 4, 1])])
def test_loader_gives_each_file_once_in_order(files, count, batch_size, sizes):
    batches = load(files[:count], batch_size)
    assert [len(x) for x, _ in batches] == [len(y) for _, y in batches] == sizes
    assert [k for _, y in batches for k in y.tolist()] == list(range(count))


def test_loader_without_dali_says_what_to_install(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # import then fails as if it were absent
    with pytest.raises(SystemExit) as stop:
        common.dali_loader(files, None, 4, SIDE, CPU)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "pip install nvidia-dali" in message


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda", 0), marks=needs_gpu)])
def test_photos_are_the_same_whether_kept_or_not(files, device):
    labels, size = [(7 * i) % 5 for i in range(23)], 23 * 3 * SIDE**2
    for given, expected in ((labels, labels), (None, list(range(23)))):
        kept = common.Photos(files, given, SIDE, device, cache_bytes=size)
        decoded = common.Photos(files, given, SIDE, device, cache_bytes=size - 1)
        assert kept.images.dtype == torch.uint8 and kept.images.shape == (23, 3, SIDE, SIDE)
        assert decoded.images is None
        assert kept.labels.tolist() == decoded.labels.tolist() == expected
        for order in (None, np.arange(0), [22, 3, 3, 0], np.random.default_rng(0).permutation(23)):
            batches = [list(photos.batches(4, order)) for photos in (kept, decoded)]
            assert [len(x) for x, _ in batches[0]] == [len(x) for x, _ in batches[1]]
            for (x, y), (x_decoded, y_decoded) in zip(*batches):
                torch.testing.assert_close(x, x_decoded, rtol=0, atol=1 / 509)
                assert x.device == y.device == y_decoded.device == device
                assert y.equal(y_decoded)
            order = range(23) if order is None else order
            assert [k for _, y in batches[0] for k in y.tolist()] == [expected[i] for i in order]


# ============================================ the draw ============================================

LABELS = torch.from_numpy(np.random.default_rng(5).choice(4, 997, p=[0.1, 0.2, 0.3, 0.4]))


def split(num_labeled=40, num_val=100, seed=0, labels=LABELS):
    return common.balanced_split(labels, num_labeled, num_val, 4, seed)


@pytest.mark.parametrize("num_labeled, num_val", [(4, 0), (40, 100), (200, 797)])
def test_split_is_balanced_disjoint_and_complete(num_labeled, num_val):
    labeled, val, unlabeled = split(num_labeled, num_val)
    assert LABELS[labeled].tolist() == sorted([0, 1, 2, 3] * (num_labeled // 4))
    assert len(val) == num_val
    assert sorted(torch.cat([labeled, val, unlabeled]).tolist()) == list(range(997))


def test_split_is_fixed_by_its_seed_and_labels_do_not_depend_on_validation():
    first = split()
    torch.manual_seed(123)
    np.random.seed(123)
    for part, again, other in zip(first, split(), split(seed=1)):
        assert part.equal(again)
        assert set(part.tolist()) != set(other.tolist())
    more = split(num_val=400)
    assert more[0].equal(first[0]) and more[1][:100].equal(first[1])


def test_validation_has_the_class_frequencies_of_the_data():
    _, val, _ = split(num_labeled=4, num_val=500)
    share = LABELS[val].bincount(minlength=4) / 500
    expected = LABELS.bincount(minlength=4) / len(LABELS)
    assert (share - expected).abs().max() < 0.05  # three standard deviations of a draw of 500


def test_class_smaller_than_its_share_is_labeled_as_a_whole():
    counts = LABELS.bincount()  # about 100, 200, 300, 400
    labeled, val, unlabeled = split(600, 100)
    found = LABELS[labeled].bincount()
    assert len(labeled) == len(set(labeled.tolist())) == 600
    assert counts[0] < 150 and found[0] == counts[0]
    assert found[1:].min() >= 150  # the others have their share, and fill the gap
    assert sorted(torch.cat([labeled, val, unlabeled]).tolist()) == list(range(997))


@pytest.mark.parametrize("num_labeled, labels, words", [
    (0, LABELS, "--num-labeled must be a positive multiple of the 4 classes, but it is 0"),
    (-4, LABELS, "--num-labeled must be a positive multiple of the 4 classes, but it is -4"),
    (15, LABELS, "--num-labeled must be a positive multiple of the 4 classes, but it is 15"),
    (1000, LABELS, "--num-labeled is 1000, but there are only 997 to draw from"),
    (4, LABELS.clamp(max=2), "class 3 has no training image, so none can be labeled")])
def test_impossible_draw_is_refused_with_a_sentence(num_labeled, labels, words, capsys):
    with pytest.raises(SystemExit) as stop:
        split(num_labeled, 0, labels=labels)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"error: {words}\n")


# =========================================== evaluation ===========================================


class Probe(nn.Module):
    """Logits are the first 3 inputs; the layers before them act in training mode only."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5, affine=False, eps=1e-12)
        self.dropout = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(()))
        self.outputs = []

    def forward(self, x):
        x = self.scale * self.dropout(self.norm(x))
        self.outputs.append(x)
        return x[:, :3], x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_evaluation_is_the_one_done_by_hand(batch_size, training):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(23, 5)).astype(np.float32), rng.integers(3, size=23)
    p = np.exp(x[:, :3].astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (y, p.argmax(axis=1)), 1)
    batches = zip(torch.from_numpy(x).split(batch_size), torch.from_numpy(y).split(batch_size))
    probe = Probe().train(training)
    result = common.evaluate(probe, batches, 3)
    assert set(result) == {"accuracy", "loss", "confusion", "predicted"}
    assert result["accuracy"] == pytest.approx(np.mean(p.argmax(axis=1) == y), abs=1e-12)
    assert result["loss"] == pytest.approx(-np.mean(np.log(p[range(23), y])), rel=1e-5)
    assert result["confusion"].dtype == torch.int64
    assert result["confusion"].tolist() == confusion.tolist()
    assert result["predicted"].tolist() == p.argmax(axis=1).tolist()
    assert probe.training is probe.norm.training is probe.dropout.training is training
    assert probe.norm.running_mean.eq(0).all() and probe.norm.num_batches_tracked == 0
    assert not any(output.requires_grad for output in probe.outputs)


# ========================================= record of a run ========================================


def test_atomic_replaces_a_file_as_a_whole_or_leaves_what_was_there():
    path = Path("new folder/file.txt")

    def found():
        return {f.name: f.read_text() for f in path.parent.iterdir() if f.name[0] != "."}

    for before, text in (({}, "old"), ({"file.txt": "old"}, "new")):
        with pytest.raises(KeyboardInterrupt):
            with common.atomic(path) as tmp:
                tmp.write_text("half")
                raise KeyboardInterrupt
        assert found() == before
        with common.atomic(path) as tmp:
            tmp.write_text(text)
            assert found() == before
        assert found() == {"file.txt": text} and list(path.parent.iterdir()) == [path]


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, capsys):
    runs = [common.Run(tmp_path / "new/runs", "name__seed0", {"n": n}) for n in range(5)]
    assert len({run.dir for run in runs}) == 5
    for n, run in enumerate(runs):
        assert run.dir.parent == tmp_path / "new/runs"
        assert run.dir.name.startswith("name__seed0__")
        assert json.loads((run.dir / "args.json").read_text()) == {"n": n}
    with pytest.raises(SystemExit, match="^stopped: .*args.json"):  # a file is no folder
        common.run_script(lambda: common.Run(runs[0].dir / "args.json", "name", {}))


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, ""), (PermissionError(13, "denied", "f.pt"), "stopped: ", "f.pt")])
def test_a_script_ends_with_a_line_where_it_cannot_go_on(error, code, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        common.run_script(main)
    assert str(stop.value.code).startswith(str(code)) and words in str(stop.value.code)
    assert "Traceback" not in capsys.readouterr().err


def test_run_writes_metrics_checkpoints_and_results(tmp_path, capsys):
    run = common.Run(tmp_path, "name", {"path": tmp_path, "lr": 0.1, "seconds": 0})
    assert json.loads((run.dir / "args.json").read_text()) == {
        "path": str(tmp_path), "lr": 0.1, "seconds": 0}
    rows = [{"step": 10, "loss/lab": 0.25}, {"step": 20, "loss/lab": 1e-9, "val_loss": 0.5}]
    for n, row in enumerate(rows, 1):
        run.log(row)
        assert len(read_csv(run.dir / "metrics.csv")) == n  # on disk after each evaluation
    assert read_csv(run.dir / "metrics.csv") == [
        {"step": "10", "loss/lab": "0.25", "val_loss": ""},
        {"step": "20", "loss/lab": "1e-09", "val_loss": "0.5"}]
    run.save("best.pt", {"weights": {"w": torch.arange(3)}, "epoch": 2})
    state = torch.load(run.dir / "best.pt", weights_only=True)
    assert state["weights"]["w"].tolist() == [0, 1, 2] and state["epoch"] == 2

    run.finish(CPU, seconds=3.5, test_accuracy=0.5, val_accuracy=float("nan"))
    last = capsys.readouterr().out.splitlines()[-1]
    results = json.loads(last.removeprefix("RESULT "))
    assert last.startswith("RESULT ")
    assert results == json.loads((run.dir / "results.json").read_text())
    assert 50 < results.pop("peak_memory_mib") < 100_000  # a process with torch in it, in MiB
    assert results == {"path": str(tmp_path), "lr": 0.1, "seconds": 3.5, "test_accuracy": 0.5,
                       "val_accuracy": None, "device": "cpu", "torch": torch.__version__}
    assert sorted(f.name for f in run.dir.iterdir()) == [
        "args.json", "best.pt", "metrics.csv", "results.json"]


def test_run_warns_of_what_was_found_only(tmp_path, capsys):
    run = common.Run(tmp_path, "name", {})
    run.warn("none.csv", ("file", "why"), {}.items(), "files cannot be used")
    assert capsys.readouterr().out == "" and not (run.dir / "none.csv").exists()
    run.warn("some.csv", ("file", "why"), {Path("\udcff,.jpg"): "empty", Path("b"): "no"}.items(),
             "files cannot be used")
    assert capsys.readouterr().out.startswith("warning: 2 files cannot be used: see ")
    assert read_csv(run.dir / "some.csv") == [{"file": "\\udcff,.jpg", "why": "empty"},
                                              {"file": "b", "why": "no"}]


def test_best_weights_are_saved_when_validation_says_so_or_says_nothing(tmp_path):
    run, networks = common.Run(tmp_path, "name", {}), [nn.Linear(1, 1) for _ in range(2)]
    best, nan = -1.0, float("nan")
    for epoch, scores, weights in ((1, (0.2, 0.1), "raw"), (2, (0.2, 0.3), "ema"),
                                   (3, (0.3, 0.25), "ema"), (4, (nan, nan), "ema")):
        best = run.save_best(best, *((network, {"accuracy": accuracy})
                                     for network, accuracy in zip(networks, scores)), epoch=epoch)
        saved = torch.load(run.dir / "best.pt", weights_only=True)
        assert saved["weights"] == weights and saved["epoch"] == (2 if epoch == 3 else epoch)
        network = networks[["raw", "ema"].index(weights)]
        assert saved["classifier"]["weight"].equal(network.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_epoch_means_begin_anew_and_stop_at_what_is_not_finite(bad):
    means, weight = common.EpochMeans(), torch.ones((), requires_grad=True)
    for epoch in range(2):
        for step in range(5):
            means.add(step, {"a": step * weight, "b": torch.tensor(-2.0 - epoch).double()})
        assert means.take() == {"a": 2.0, "b": -2.0 - epoch}
    for step in (7, 8, 9):
        means.add(step, {"a": weight, "b": torch.tensor(bad if step >= 8 else 1.0)})
    assert not any(value.requires_grad for value in means.values)  # which would keep the graph
    with pytest.raises(SystemExit, match=f"stopped: b is {bad} at step 8;"):
        means.take()


# ============================================ figures =============================================


def pixels(path):
    """The PNG file as (H, W, 3) int array."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


class Painter(nn.Module):
    """z (N, 1) -> images (N, C, 8, 8) of brightness z, as long as batch norm is in eval mode."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False, eps=1e-12)
        self.channels = channels

    def forward(self, z):
        return self.norm(z)[:, :, None, None].expand(len(z), self.channels, 8, 8)


@pytest.mark.parametrize("count, columns, rows, channels", [(9, 3, 3, 1), (10, 3, 4, 3),
                                                            (64, 8, 8, 3)])
def test_samples_are_a_grid_in_the_order_of_z(count, columns, rows, channels, tmp_path):
    z = torch.linspace(0, 1, count)[:, None]
    painter = Painter(channels).train()
    common.save_samples(painter, z, tmp_path / "samples/grid.png")
    image = pixels(tmp_path / "samples/grid.png")
    assert image.shape == (rows * 10 + 2, columns * 10 + 2, 3)  # 8 pixels, 2 between them
    centers = image[6::10, 6::10].reshape(-1, 3)[:count]
    assert np.abs(centers - 255 * z.numpy()).max() <= 1
    assert painter.training


def test_a_generator_that_fails_goes_on_in_training_mode(tmp_path, capsys):
    painter = Painter(4).train()
    common.save_samples(painter, torch.zeros(9, 2), tmp_path / "grid.png")  # z of a wrong width
    assert painter.training and not (tmp_path / "grid.png").exists()
    assert "warning: save_samples failed" in capsys.readouterr().err


@pytest.mark.parametrize("count, wrong, shown_wrong, shown_right", [
    (20, [3, 16], 2, 18), (20, [], 0, 20), (20, range(20), 20, 0), (0, [], 0, 0),
    (120, range(0, 120, 2), 30, 30), (200, range(0, 200, 50), 4, 56), (70, range(70), 30, 0)])
def test_errors_come_first_and_are_spread_over_the_data(count, wrong, shown_wrong, shown_right):
    labels = torch.arange(count) % 3
    predicted, shown = labels.clone(), []
    predicted[list(wrong)] = (labels[list(wrong)] + 1) % 3

    def load_images(chosen):
        shown.extend(chosen)
        return torch.rand(len(chosen), 1, 16, 16)

    scores = {"predicted": predicted, "confusion": torch.eye(3).long()}
    common.plot_test(scores, labels, ["cat", "dog", "cow"], load_images, ".")
    for name in ("confusion.png", *(["predictions.png"] if count else [])):
        assert pixels(name).shape[1] > 150 and pixels(name).min() < 100
    right = [i for i in range(count) if i not in wrong]
    for part, everything, expected in ((shown[:shown_wrong], list(wrong), shown_wrong),
                                       (shown[shown_wrong:], right, shown_right)):
        at = [everything.index(i) for i in part]
        assert len(at) == expected and at[:1] == [0][:expected]
        gaps = np.diff(at)
        assert len(gaps) == 0 or (gaps.min() > 0 and gaps.max() - gaps.min() <= 1)
