"""What common.py promises: losses, the DALI loader, the draw, evaluation, run records, figures."""

import csv
import itertools
import json
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import find_objects, label
from torch import nn

import common

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


# ============================================ losses ==============================================
# The reference: probabilities of a (K+1)-way softmax in float64 whose last logit, "fake", is 0,
# written without logsumexp or softplus.


def fake_probabilities(logits):
    """logits (N, K) -> p(y | x) (N, K) and p(fake | x) (N,), in float64."""
    with_fake = torch.cat([logits.double(), logits.new_zeros(len(logits), 1).double()], dim=1)
    p = with_fake.exp() / with_fake.exp().sum(dim=1, keepdim=True)
    return p[:, :-1], p[:, -1]


def reference_real(logits, labels):
    return -(1 - fake_probabilities(logits)[1]).log().mean()


def reference_fake(logits, labels):
    return -fake_probabilities(logits)[1].log().mean()


def reference_labeled(logits, labels):
    p, p_fake = fake_probabilities(logits)
    return -(p[torch.arange(len(labels)), labels] / (1 - p_fake)).log().mean()


LOSSES = {  # name -> ours and the reference, both functions of (logits, labels)
    "labeled": (common.labeled_loss, reference_labeled),
    "unlabeled": (lambda x, y: common.unlabeled_loss(common.real_logit(x)), reference_real),
    "fake": (lambda x, y: common.fake_loss(common.real_logit(x)), reference_fake),
    "fool": (lambda x, y: common.fool_loss(common.real_logit(x)), reference_real),
}


def some_logits(num_classes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_classes)
    logits = 3 * torch.randn(16, num_classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (16,), generator=generator)
    return logits.float().to(dtype), labels


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("num_classes", [1, 2, 3, 10])
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


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_central_difference(name, num_classes):
    logits, labels = some_logits(num_classes, torch.float64)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name][0](x, labels), logits.requires_grad_())


# r = log Z of these rows: 1e4 + log 2, -1e4 + log 3, 1e4, 0, -1e4 + log 3
EXTREME = torch.tensor([[1e4, -1e4, 1e4], [-1e4, -1e4, -1e4], [1e4, 0, 0], [0, -1e4, -1e4],
                        [-1e4, -1e4, -1e4]])
EXTREME_LABELS = torch.tensor([0, 1, 2, 0, 2])
EXTREME_VALUES = {"labeled": (np.log(2) + np.log(3) + 1e4 + 0 + np.log(3)) / 5,
                  "unlabeled": (2 * (1e4 - np.log(3)) + np.log(2)) / 5,
                  "fake": (2e4 + np.log(2) + np.log(2)) / 5,
                  "fool": (2 * (1e4 - np.log(3)) + np.log(2)) / 5}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_stay_finite_at_extreme_logits(name):
    logits = EXTREME.clone().requires_grad_()
    value = LOSSES[name][0](logits, EXTREME_LABELS)
    value.backward()
    assert value.item() == pytest.approx(EXTREME_VALUES[name], rel=1e-6)
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0.1  # nor have they vanished


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_stay_finite_and_exact_under_bf16_autocast(name):
    x, identity = EXTREME.clone().requires_grad_(), torch.eye(3)
    with torch.autocast("cpu", torch.bfloat16):
        logits = nn.functional.linear(x, identity)
        value = LOSSES[name][0](logits, EXTREME_LABELS)
    value.backward()
    assert logits.dtype == torch.bfloat16  # the logits are rounded (to 9984), the loss is not
    assert value.dtype == torch.float32
    exact = LOSSES[name][0](logits.detach().float(), EXTREME_LABELS).item()
    assert value.item() == pytest.approx(exact, rel=1e-6)
    assert value.item() == pytest.approx(EXTREME_VALUES[name], rel=0.01)
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0.1


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_bf16_logits_is_computed_in_float32(name):
    # at ordinary logits, where a loss in bfloat16 would be off in the third digit
    logits, labels = some_logits(10, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[name][0](logits, labels)
    assert value.item() == pytest.approx(LOSSES[name][1](logits, labels).item(), rel=1e-5)


# ======================================== errors and seeds ========================================


def test_positive_refuses_the_first_flag_that_is_not(capsys):
    common.positive(epochs=1, lr=1e-9)
    for value in (0, -1, float("nan")):
        with pytest.raises(SystemExit) as stop:
            common.positive(epochs=1, batch_size=value, lr=-1)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: --batch-size") and str(value) in message


def test_device_is_the_one_named():
    assert common.pick_device("cpu") == CPU
    assert common.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_seed_fixes_python_numpy_and_torch():
    def draw(seed):
        common.seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first, again, other = draw(3), draw(3), draw(4)
    assert first == again
    assert all(a != b for a, b in zip(first, other))


# ========================================== DALI loader ===========================================

SIZES = [(40, 56), (300, 200), (64, 64), (17, 90), (128, 31), (65, 63), (500, 375)]
SIDE = 64


def picture(index):
    """A smooth picture with an edge and some grain, different for each index: (W, H) RGB image."""
    width, height = SIZES[index % len(SIZES)]
    rng = np.random.default_rng(index)
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    waves = rng.uniform(-5, 5, (3, 2)) @ [x.ravel(), y.ravel()] + rng.uniform(0, 6, (3, 1))
    pixels = 127 + 80 * np.sin(waves).T.reshape(height, width, 3)
    center, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.1, 0.25)
    pixels[np.hypot(x - center[0], y - center[1]) < radius] += 40
    return Image.fromarray(np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype("uint8"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """23 JPEGs of seven sizes, smaller and larger than SIDE, none but one of them square."""
    folder = tmp_path_factory.mktemp("jpegs")
    for i in range(23):
        picture(i).save(folder / f"{i:02d}.jpg", quality=92)
    return sorted(folder.iterdir())


def reference_images(files):
    """Decoded and resized by Pillow: (N, 3, SIDE, SIDE) float64 in [0, 1]."""
    images = [Image.open(f).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
              for f in files]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double() / 255


def positions(batches):
    """The labels of all batches in one list; without given labels, each file's position."""
    return [label for _, y in batches for label in y.tolist()]


def load(files, batch_size, labels=None, device=CPU, **settings):
    return list(common.dali_loader(files, labels, batch_size, SIDE, device, **settings))


def assert_loaded_right(files, device):
    labels = [(7 * i) % 5 for i in range(len(files))]
    batches = load(files, 8, labels, device)
    assert [len(x) for x, _ in batches] == [8, 8, 7]
    for x, y in batches:
        assert x.dtype == torch.float32 and x.shape[1:] == (3, SIDE, SIDE)
        assert y.dtype == torch.int64 and y.shape == (len(x),)
        assert x.device.type == y.device.type == device.type
        assert x.min() >= 0 and x.max() <= 1
    assert positions(batches) == labels
    return torch.cat([x.cpu().double() for x, _ in batches])


def test_loader_decodes_and_resizes_as_pillow_does(files):
    images = assert_loaded_right(files, CPU)
    gap = (images - reference_images(files)).abs().flatten(1)  # (N, 3 * SIDE * SIDE)
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


def test_loader_reaches_black_and_white_and_keeps_channels_apart(tmp_path):
    colors = [(0, 0, 0), (255, 255, 255), (200, 100, 20)]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, color in zip(paths, colors):
        Image.new("RGB", (50, 30), color).save(path)
    [(x, _)] = load(paths, 3)
    expected = torch.tensor(colors)[:, :, None, None].expand(3, 3, SIDE, SIDE) / 255
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count, batch_size", [(1, 1), (1, 8), (2, 3), (7, 4), (8, 4), (9, 4),
                                               (23, 10)])
def test_loader_yields_each_image_once_in_order_whatever_the_batch_size(files, count, batch_size):
    batches = load(files[:count], batch_size)
    assert positions(batches) == list(range(count))
    assert [len(x) for x, _ in batches] == [len(y) for _, y in batches]
    assert all(len(x) == batch_size for x, _ in batches[:-1])


def test_loader_shuffles_by_its_seed_and_keeps_images_with_their_labels(files):
    first = load(files, 5, shuffle_seed=[0, 1])
    again = load(files, 5, shuffle_seed=[0, 1])
    order = positions(first)
    assert sorted(order) == list(range(len(files))) and order != sorted(order)
    assert positions(again) == order
    assert positions(load(files, 5, shuffle_seed=[0, 2])) != order  # another epoch
    assert positions(load(files, 5, shuffle_seed=[1, 1])) != order  # another seed
    shuffled, in_order = torch.cat([x for x, _ in first]), torch.cat([x for x, _ in load(files, 5)])
    torch.testing.assert_close(shuffled, in_order[order], rtol=0, atol=0)
    given = [100 + i for i in range(len(files))]
    assert positions(load(files, 5, given, shuffle_seed=[0, 1])) == [100 + i for i in order]


@pytest.mark.parametrize("count, num_shards, batch_size", [(23, 4, 3), (12, 3, 4), (2, 4, 3)])
@pytest.mark.parametrize("shuffle_seed", [None, [0, 1]])
def test_shards_share_out_the_files(files, count, num_shards, batch_size, shuffle_seed):
    shards = [positions(load(files[:count], batch_size, shuffle_seed=shuffle_seed, shard_id=i,
                             num_shards=num_shards)) for i in range(num_shards)]
    assert sorted(itertools.chain(*shards)) == list(range(count))  # so no file is in two of them
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("count, num_shards, batch_size, full", [(23, 1, 10, 2), (23, 2, 4, 2),
                                                                 (20, 2, 5, 2), (9, 2, 5, 0)])
def test_drop_last_gives_every_shard_as_many_full_batches(files, count, num_shards, batch_size,
                                                          full):
    seen = []
    for shard_id in range(num_shards):
        batches = load(files[:count], batch_size, shuffle_seed=[0, 1], drop_last=True,
                       shard_id=shard_id, num_shards=num_shards)
        assert [len(x) for x, _ in batches] == [batch_size] * full
        seen += positions(batches)
    assert len(set(seen)) == len(seen) == full * batch_size * num_shards


def test_loader_without_files_is_empty():
    assert load([], 4) == []


def test_loader_without_dali_says_what_to_install(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # import then fails as if it were absent
    with pytest.raises(SystemExit) as stop:
        common.dali_loader(files, None, 4, SIDE, CPU)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "pip install nvidia-dali" in message


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


def test_split_is_fixed_by_its_seed_alone():
    first = split()
    torch.manual_seed(123)
    np.random.seed(123)
    for part, again in zip(first, split()):
        assert part.tolist() == again.tolist()
    for part, other in zip(first, split(seed=1)):
        assert set(part.tolist()) != set(other.tolist())


def test_labeled_draw_does_not_depend_on_the_size_of_validation():
    labeled, val, _ = split(num_val=100)
    more = split(num_val=400)
    assert more[0].tolist() == labeled.tolist()
    assert more[1][:100].tolist() == val.tolist()  # and a smaller validation set is part of it


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
    assert split(600, 0)[0].tolist() == labeled.tolist()


@pytest.mark.parametrize("num_labeled, labels, words", [
    (0, LABELS, "--num-labeled must be a positive multiple of the 4 classes, but it is 0"),
    (-4, LABELS, "--num-labeled must be a positive multiple of the 4 classes, but it is -4"),
    (15, LABELS, "--num-labeled must be a positive multiple of the 4 classes, but it is 15"),
    (1000, LABELS, "--num-labeled is 1000, but there are 997 training images"),
    (4, LABELS.clamp(max=2), "class 3 has no training image")])
def test_impossible_draw_is_refused_with_a_sentence(num_labeled, labels, words, capsys):
    with pytest.raises(SystemExit) as stop:
        split(num_labeled, 0, labels=labels)
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1
    assert output.err.startswith(f"error: {words}")


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


def scored_inputs(count=23):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(count, 5)).astype(np.float32)
    y = rng.integers(3, size=count)
    p = np.exp(x[:, :3].astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    confusion = np.zeros((3, 3), int)
    for true, guess in zip(y, p.argmax(axis=1)):
        confusion[true, guess] += 1
    expected = {"accuracy": np.mean(p.argmax(axis=1) == y), "confusion": confusion.tolist(),
                "loss": -np.mean(np.log(p[range(count), y])),
                "predicted": p.argmax(axis=1).tolist()}
    return torch.from_numpy(x), torch.from_numpy(y), expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_evaluation_is_the_one_done_by_hand(batch_size, training):
    x, y, expected = scored_inputs()
    probe = Probe().train(training)
    result = common.evaluate(probe, zip(x.split(batch_size), y.split(batch_size)), 3)
    assert set(result) == set(expected)
    assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-12)
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert result["confusion"].dtype == torch.int64
    assert result["confusion"].tolist() == expected["confusion"]
    assert result["predicted"].tolist() == expected["predicted"]
    assert probe.training is probe.norm.training is probe.dropout.training is training
    assert probe.norm.running_mean.eq(0).all() and probe.norm.num_batches_tracked == 0
    assert not any(output.requires_grad for output in probe.outputs)


def test_evaluation_of_nothing():
    probe = Probe().train()
    result = common.evaluate(probe, iter(()), 3)
    assert np.isnan(result["accuracy"]) and np.isnan(result["loss"])
    assert result["confusion"].tolist() == [[0] * 3] * 3
    assert result["predicted"].shape == (0,)
    assert probe.training


# ========================================= record of a run ========================================


def test_atomic_replaces_a_file_as_a_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with common.atomic(path) as tmp:
        tmp.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("earlier", [None, "old"])
def test_interrupted_write_leaves_what_was_there(earlier, tmp_path):
    path = tmp_path / "file.txt"
    if earlier:
        path.write_text(earlier)
    with pytest.raises(KeyboardInterrupt):
        with common.atomic(path) as tmp:
            tmp.write_text("half")
            raise KeyboardInterrupt
    assert [f.read_text() for f in tmp_path.iterdir()] == ([earlier] if earlier else [])


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path):
    runs = [common.Run(tmp_path / "new" / "runs", "name__seed0", {"n": n}) for n in range(5)]
    assert len({run.dir for run in runs}) == 5
    for n, run in enumerate(runs):
        assert run.dir.parent == tmp_path / "new" / "runs"
        assert run.dir.name.startswith("name__seed0__")
        assert json.loads((run.dir / "args.json").read_text()) == {"n": n}


def test_run_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        common.Run(tmp_path / "file", "name", {})
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --out-dir")


def test_run_writes_metrics_checkpoints_and_results(tmp_path, capsys):
    run = common.Run(tmp_path, "name", {"path": tmp_path, "lr": 0.1})
    assert json.loads((run.dir / "args.json").read_text()) == {"path": str(tmp_path), "lr": 0.1}
    rows = [{"step": 10, "loss/lab": 0.25, "val_loss": None}, {"step": 20, "loss/lab": 1e-9,
                                                               "val_loss": 0.5}]
    for n, row in enumerate(rows):
        run.log(row)
        with open(run.dir / "metrics.csv", newline="") as f:
            written = list(csv.DictReader(f))
        assert len(written) == n + 1  # on disk after each evaluation
    assert list(written[0]) == ["step", "loss/lab", "val_loss"]
    assert [row["val_loss"] for row in written] == ["", "0.5"]
    assert [float(row["loss/lab"]) for row in written] == [0.25, 1e-9]

    run.save("best.pt", {"weights": {"w": torch.arange(3)}, "epoch": 2})
    state = torch.load(run.dir / "best.pt", weights_only=True)
    assert state["weights"]["w"].tolist() == [0, 1, 2] and state["epoch"] == 2

    run.finish(CPU, script="name", test_accuracy=0.5)
    last = capsys.readouterr().out.splitlines()[-1]
    results = json.loads(last.removeprefix("RESULT "))
    assert last.startswith("RESULT ")
    assert results == json.loads((run.dir / "results.json").read_text())
    assert results["script"] == "name" and results["test_accuracy"] == 0.5
    assert results["device"] == "cpu" and results["torch"] == torch.__version__
    assert 50 < results["peak_memory_mib"] < 100_000  # a process with torch in it, in MiB
    assert sorted(f.name for f in run.dir.iterdir()) == [
        "args.json", "best.pt", "metrics.csv", "results.json"]


@pytest.mark.parametrize("count", [1, 7, 49, 50, 51, 100, 130])  # it reads the device every 50
def test_step_means_are_means_and_begin_anew(count):
    losses = common.StepMeans()
    for window in range(2):
        for step in range(count):
            losses.add(step, {"a": torch.tensor(float(step)), "b": torch.tensor(-2.0 - window)})
        assert losses.means() == {"a": pytest.approx((count - 1) / 2), "b": -2.0 - window}


def test_step_means_keep_no_graph():
    losses, weight = common.StepMeans(), torch.ones((), requires_grad=True)
    losses.add(1, {"a": 2 * weight})
    assert not any(value.requires_grad for value in losses.values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad_step", [1, 37, 50, 51, 120])
def test_loss_that_is_not_finite_ends_the_run_within_50_steps(bad_step, bad):
    losses = common.StepMeans()
    with pytest.raises(SystemExit) as stop:
        for step in range(1, bad_step + 50):
            losses.add(step, {"loss/lab": torch.tensor(1.0),
                              "loss/fake": torch.tensor(bad if step >= bad_step else 1.0)})
    assert step >= bad_step
    assert f"loss/fake is {bad} at step {bad_step};" in str(stop.value.code)


def test_loss_that_is_not_finite_ends_the_run_at_the_mean_at_the_latest():
    losses = common.StepMeans()
    for step in (7, 8, 9):
        losses.add(step, {"loss/lab": torch.tensor(float("nan") if step == 8 else 1.0)})
    with pytest.raises(SystemExit) as stop:
        losses.means()
    assert "loss/lab is nan at step 8;" in str(stop.value.code)


# ============================================ figures =============================================


def pixels(path):
    """The PNG file as (H, W, 3) int array."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def near(image, rgb, tolerance=40):
    """(H, W) bool: which pixels have that color."""
    return (np.abs(image - np.array(rgb)) <= tolerance).all(axis=-1)


class Painter(nn.Module):
    """z (N, 1) -> images (N, C, 8, 8) of brightness z, as long as batch norm is in eval mode."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False, eps=1e-12)
        self.channels = channels

    def forward(self, z):
        return self.norm(z)[:, :, None, None].expand(len(z), self.channels, 8, 8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count, columns, rows", [(9, 3, 3), (10, 3, 4), (64, 8, 8)])
def test_samples_are_a_grid_in_the_order_of_z(count, columns, rows, channels, tmp_path):
    z = torch.linspace(0, 1, count)[:, None]
    painter = Painter(channels).train()
    folder = tmp_path / "samples"
    common.save_samples(painter, z, folder / "grid.png")
    image = pixels(folder / "grid.png")
    assert image.shape == (rows * 10 + 2, columns * 10 + 2, 3)  # 8 pixels, 2 between them
    centers = image[6::10, 6::10].reshape(-1, 3)[:count]
    assert np.abs(centers - 255 * z.numpy()).max() <= 1
    assert painter.training
    assert list(folder.iterdir()) == [folder / "grid.png"]


RED = (255, 0, 0)


@pytest.mark.parametrize("wrong, channels", [([], 3), ([3], 1), ([3, 16], 3), (range(20), 1)])
def test_wrong_predictions_are_framed_in_red_and_only_they(wrong, channels, tmp_path):
    wrong = list(wrong)
    images = torch.rand(20, 1, 16, 16).expand(20, channels, 16, 16)  # grey, whatever the channels
    labels = torch.arange(20) % 3
    predicted = labels.clone()
    predicted[wrong] = (labels[wrong] + 1) % 3
    common.plot_predictions(images, labels, predicted, ["cat", "dog", "cow"], tmp_path / "p.png")
    image = pixels(tmp_path / "p.png")
    height, width = image.shape[:2]
    assert 500 < width < 2000 and 100 < height < 1000
    red = near(image, RED)
    frames = [box for box in find_objects(label(red)[0])  # letters are smaller
              if min(box[0].stop - box[0].start, box[1].stop - box[1].start) > width / 20]
    cells = [10 * int(box[0].start + box[0].stop > 1.06 * height)  # 2 rows of 10, below a title
             + int(10 * (box[1].start + box[1].stop) / 2 / width) for box in frames]
    assert sorted(cells) == wrong
    if not wrong:
        assert not red.any()


@pytest.mark.parametrize("count, errors, right", [
    (6, [4, 9, 15], [0, 7, 14]),  # half errors, half correct
    (10, [4, 9, 15], [0, 2, 5, 7, 10, 12, 14]),  # fewer errors than half: more correct ones
    (2, [4], [0]),
    (100, [4, 9, 15], [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 14]),  # all there are
])
def test_errors_and_others_are_spread_over_the_data(count, errors, right):
    labels = torch.zeros(16, dtype=torch.int64)
    predicted = labels.clone()
    predicted[[4, 9, 15]] = 1
    shown = common.errors_and_others(labels, predicted, count).tolist()
    assert shown == errors + right


@pytest.mark.parametrize("count", [0, 1, 13])
def test_predictions_of_any_number_are_drawn(count, tmp_path):
    labels = torch.zeros(count, dtype=torch.int64)
    common.plot_predictions(torch.rand(count, 3, 8, 8), labels, labels, ["a"], tmp_path / "p.png")
    image = pixels(tmp_path / "p.png")
    assert image.shape[1] > 500
    assert near(image, (255, 255, 255), 0).all() == (count == 0)


def test_confusion_is_shaded_by_the_share_of_each_row(tmp_path):
    def dark(confusion):  # pixels of the darkest color of the map "Blues", which is a share of 1
        common.plot_confusion(torch.tensor(confusion), ["cat", "dog", "cow"], tmp_path / "c.png")
        image = pixels(tmp_path / "c.png")
        assert 150 < image.shape[0] < 800 and 150 < image.shape[1] < 800
        return near(image, (8, 48, 107), 5).sum()

    three = dark([[5, 0, 0], [0, 500, 0], [0, 0, 7]])
    assert three > 1000
    assert dark([[5, 0, 0], [500, 0, 0], [0, 0, 0]]) == pytest.approx(2 / 3 * three, rel=0.1)
    assert dark([[2, 2, 2], [50, 50, 50], [1, 1, 1]]) == 0


BLUE = (31, 119, 180)  # the first color of matplotlib's cycle, of the first line in each panel


@pytest.mark.parametrize("columns, panels", [
    ({"val_accuracy": 0.5, "val_loss": 0.7, "monitor/p_real_unl": 0.6}, [True, True, True]),
    ({"val_accuracy": 0.5, "val_loss": 0.7, "loss/lab": 0.1}, [True, True, False]),
    ({"val_loss": 0.7, "monitor/p_real_fake": 0.6}, [False, True, True]),
])
def test_curves_show_the_columns_that_a_run_has(columns, panels, tmp_path):
    rows = [{"step": step, **columns} for step in (10, 20, 30)]
    common.plot_curves(rows, tmp_path / "curves.png")
    image = pixels(tmp_path / "curves.png")
    assert image.shape[1] > 900 and 200 < image.shape[0] < 600
    thirds = np.array_split(near(image, BLUE, 20), 3, axis=1)
    assert [third.sum() > 50 for third in thirds] == panels
