"""Inside the steps of SVHN and photos: what passes, which losses move what, and by how much.

Training runs are watched through torch's global hooks; nothing in the scripts is replaced.
frozen_statistics, surest_of_each_class, networks and augment are called on their own below.
"""

import importlib
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common import balanced_split
from tests.conftest import (SCRIPTS, averaged, call_main, changed, copied, find, forced_bf16,
                            gradients, hooked, needs_gpu, new_classifier, photo_folders, read_csv,
                            read_part, real_gradient, same_bits, train)

# ==================================== runs of two steps an epoch ==================================

GAN_WEIGHT, CONSISTENCY_WEIGHT, ROTATION_WEIGHT = 0.7, 0.4, 0.6
STEPPED = ["sgan_svhn", "sgan_catsdogs"]  # test_mnist.py looks into the steps of MNIST
DIGIT_PASSES = ["labeled", "fake", "unlabeled", "generator"]  # of the classifier, in their order
PHOTO_PASSES = ["photos", "fake", "generator"]  # photos: labeled, picked, unlabeled and turned


@pytest.fixture(scope="session")
def few_steps(svhn, pets):
    """Of both scripts: flags for epochs of two steps, labeled images and labels, unlabeled images.
    """
    weights = ["--gan-weight", GAN_WEIGHT, "--consistency-weight", CONSISTENCY_WEIGHT]
    photos = SimpleNamespace(
        flags=["--device", "cpu", *weights, "--rotation-weight", ROTATION_WEIGHT,
               *photo_folders(pets), "--image-size", 32, "--batch-size", 20, "--epochs", 3],
        labeled=read_part(pets, "labeled"), unlabeled=read_part(pets, "train")[0])
    x, y = read_part(svhn, "train")
    labeled, _, others = balanced_split(y, 10, (len(y) - 10) // 2, 10, seed=0)
    digits = SimpleNamespace(
        flags=["--device", "cpu", *weights, "--data-dir", svhn, "--num-labeled", 10,
               "--batch-size", 160, "--epochs", 1, "--warmup-steps", 0],
        labeled=(x[labeled], y[labeled]), unlabeled=x[torch.cat([labeled, others])])
    return {"sgan_svhn": digits, "sgan_catsdogs": photos}


def watch(name, flags, bf16, out_dir="runs"):
    """A run in this process, seen through torch's global hooks, step by step.

    passes: {kind of images: a forward pass of the classifier in training mode}. Those of kind
    "generator" are fakes through which a gradient goes back. A pass holds its input, its outputs,
    N times the gradients that come back to them, and the names of the running statistics that it
    moves. It also holds the generator's latest images, the teacher's pass of this step, and the
    weights of the linear heads.
    updates: {network: its update}. An update holds its learning rate. For each network it holds the
    weights that it moves, and the gradients that are not those of the update before.
    state: the classifier's after the step.
    """
    script, networks, steps = importlib.import_module(name), {}, []
    order = PHOTO_PASSES if name == "sgan_catsdogs" else DIGIT_PASSES
    latest = SimpleNamespace(fakes=None, teacher=None)

    def before_forward(module, inputs):
        if module.training and isinstance(module, (script.Classifier, script.Generator)):
            if type(module).__name__ not in networks:  # seen first in the first step, untrained
                networks[type(module).__name__] = module
                module.at_first = copied(module.state_dict().items())
                module.latest = gradients(module)
            module.buffers_before = copied(module.named_buffers())

    def after_forward(module, inputs, outputs):
        if isinstance(module, script.Generator) and module.training:
            latest.fakes = outputs.detach()
        elif isinstance(module, script.Classifier) and not module.training:
            p = outputs[0].float().softmax(dim=1)
            if not any(frame.name == "evaluate" for frame in traceback.extract_stack()):
                latest.teacher = SimpleNamespace(x=inputs[0], p=p)
        elif isinstance(module, script.Classifier):
            logits, features, r = outputs
            if not inputs[0].requires_grad and (not steps or steps[-1].updates):
                steps.append(SimpleNamespace(passes={}, updates={}))
            kind = order[len(steps[-1].passes)]
            moved = changed(module.buffers_before, dict(module.named_buffers()))
            seen = steps[-1].passes[kind] = SimpleNamespace(
                x=inputs[0].detach(), logits=logits.detach().double(),
                features=features.detach().double(), r=r.detach().double(),
                moved={n for n in moved if "num_batches" not in n}, **vars(latest),
                heads={n: p.detach().double().clone() for n, p in module.named_parameters()
                       if "head" in n})
            for name, output in zip(("grad", "grad_features", "grad_r"), outputs):
                output.register_hook(lambda grad, name=name: setattr(
                    seen, name, len(grad) * grad.double()))

    def before_update(optimizer, args, kwargs):
        weight = optimizer.param_groups[0]["params"][0]
        name = next(n for n, net in networks.items() if next(net.parameters()) is weight)
        steps[-1].updates[name] = SimpleNamespace(
            lr=optimizer.param_groups[0]["lr"],
            new_gradients={n: changed(net.latest, gradients(net)) for n, net in networks.items()})
        latest.teacher = None
        for network in networks.values():
            network.latest = gradients(network)
            network.weights_before = copied(network.named_parameters())

    def after_update(optimizer, args, kwargs):
        list(steps[-1].updates.values())[-1].moved = {
            n: changed(net.weights_before, dict(net.named_parameters()))
            for n, net in networks.items()}
        steps[-1].state = copied(networks["Classifier"].state_dict().items())

    with (forced_bf16(bf16),
          hooked(before_forward, after_forward, before_update, after_update)):
        folder, results = train(name, *flags, out_dir=out_dir)
    assert len(steps) == results["steps"]
    return SimpleNamespace(name=name, script=script, networks=networks, steps=steps,
                           row=read_csv(folder / "metrics.csv")[-1],
                           final=torch.load(folder / "final.pt", weights_only=True))


WARM_UP = 30  # steps after which the teacher is sure of some digits


@pytest.fixture(scope="session", params=STEPPED)
def watched(request, few_steps, bf16, tmp_path_factory):
    """Six steps of photos, of digits two after the warm-up; images stay as they are in the files.
    """
    flags = ["--augmentation", 0, "--ema-decay", 0.4, "--lr", 0.002]
    flags += ["--warmup-steps", WARM_UP] if request.param == "sgan_svhn" else []
    data = few_steps[request.param]
    seen = watch(request.param, [*data.flags, *flags], bf16,
                 tmp_path_factory.mktemp("watched") / "runs")
    seen.data, seen.bf16 = data, bf16
    seen.warm_up, seen.gan_steps = ((seen.steps[:WARM_UP], seen.steps[WARM_UP:])
                                    if request.param == "sgan_svhn" else ([], seen.steps))
    return seen


def part(watched, step, kind):
    """A pass, or of photos, which pass together, the labeled, picked or unlabeled ones of it."""
    if kind not in ("labeled", "picked", "unlabeled") or "photos" not in step.passes:
        return step.passes[kind]
    whole, n, size = step.passes["photos"], len(watched.data.labeled[1]), 20
    of = {"labeled": slice(n), "picked": slice(n, -size), "unlabeled": slice(-size, None)}[kind]
    return SimpleNamespace(**{name: value[of] if torch.is_tensor(value) else value
                              for name, value in vars(whole).items() if name != "fakes"})


def test_steps_pass_labeled_unlabeled_and_fake_images_apart(watched):
    for step in watched.warm_up:
        assert list(step.passes) == ["labeled"] and list(step.updates) == ["Classifier"]
    seen = []
    photos = watched.name == "sgan_catsdogs"
    for n, step in enumerate(watched.gan_steps):
        assert list(step.passes) == (PHOTO_PASSES if photos else DIGIT_PASSES)
        assert list(step.updates) == ["Classifier", "Generator"]
        fakes = step.passes["fake"].fakes.float()
        unlabeled = part(watched, step, "unlabeled").x
        if photos:  # image i is turned by i mod 4 quarters
            fakes, unlabeled = turned(fakes, 1), turned(unlabeled, -1)
        for kind in ("fake", "generator"):
            torch.testing.assert_close(step.passes[kind].x, fakes, rtol=0, atol=1e-4)
        seen.append(find(unlabeled, watched.data.unlabeled))
        if photos:  # those picked are taught as well, upright
            picked = find(part(watched, step, "picked").x, watched.data.unlabeled)
            assert set(picked.tolist()) >= set(
                seen[-1][taught(watched, n).sum(dim=1) > 0].tolist())
    for one, other in zip(seen[::2], seen[1::2]):  # no image twice in an epoch
        assert len(torch.cat([one, other]).unique()) == 2 * len(one)
    for step in watched.steps:
        labeled = part(watched, step, "labeled").x
        assert len(find(labeled, watched.data.labeled[0]).unique()) == len(labeled)


def turned(x, direction):
    """Image i turned by i mod 4 quarters, counterclockwise or back, by numpy."""
    return torch.stack([torch.from_numpy(np.rot90(image, direction * (i % 4), (1, 2)).copy())
                        for i, image in enumerate(x.numpy())])


def statistics_of(classifier):
    return {f"{n}.{statistic}" for n, module in classifier.named_modules()
            if isinstance(module, torch.nn.BatchNorm2d)
            for statistic in ("running_mean", "running_var")}


def test_no_fake_moves_batch_norm_statistics(watched):
    """Of photos all do, of digits the unlabeled ones; before there is a GAN, the labeled ones."""
    norms = statistics_of(watched.networks["Classifier"])
    assert len(norms) >= 10
    for step in watched.gan_steps:
        for kind, seen in step.passes.items():
            assert seen.moved == (norms if kind in ("unlabeled", "photos") else set())
    assert all(step.passes["labeled"].moved == norms for step in watched.warm_up)


def test_each_update_moves_its_own_network_by_its_own_gradient(watched):
    for step in watched.steps:
        for name, update in step.updates.items():
            for other, network in watched.networks.items():
                own = set(dict(network.named_parameters())) if other == name else set()
                assert update.moved.get(other, set()) == own
                # the backward pass leaves the other network's gradients as they are, at first None
                assert update.new_gradients.get(other, set()) == own


def test_learning_rates_fall_towards_the_end(watched):
    photos = watched.name == "sgan_catsdogs"  # there over the last two thirds
    falling = ([1, 1, 1, 3 / 4, 2 / 4, 1 / 4] if photos
               else [1] * 16 + [1 - k / 16 for k in range(16)])
    highest = {"Classifier": 2e-3, "Generator": 2e-4 if photos else 2e-3}
    for step, rate in zip(watched.steps, falling, strict=True):
        assert {name: update.lr for name, update in step.updates.items()} == pytest.approx(
            {name: highest[name] * rate for name in step.updates})


def test_learning_rate_of_photos_rises_first(few_steps, monkeypatch):
    monkeypatch.setattr(importlib.import_module("sgan_catsdogs"), "WARM_UP", 0.5)
    seen = watch("sgan_catsdogs", [*few_steps["sgan_catsdogs"].flags, "--lr", 3e-3], False)
    assert [step.updates["Classifier"].lr for step in seen.steps] == pytest.approx(
        [1e-3, 2e-3, 3e-3, 3e-3 * 3 / 4, 3e-3 * 2 / 4, 3e-3 * 1 / 4])


def surest(p, count):
    """1 for the surest images of each class, of an image that several want at the likeliest."""
    chosen = torch.zeros(p.shape, dtype=torch.long)
    for k in range(p.shape[1]):
        chosen[p[:, k].topk(count).indices, k] = 1  # logits of 8 bits may tie: as the script does
    for i in (chosen.sum(dim=1) > 1).nonzero().flatten().tolist():
        chosen[i] = F.one_hot((chosen[i] * p[i]).argmax(), p.shape[1])
    return chosen


TAUGHT = [0, 0, 1, 2, 4, 5]  # photos of each class by step: the share grows up to a half of 20


def taught(watched, n):
    """What the teacher taught in step n: (N, K), 1 at the label of each image picked, else 0."""
    seen = part(watched, watched.gan_steps[n], "unlabeled")
    if seen.teacher is None:
        return torch.zeros_like(seen.logits)
    if watched.name == "sgan_catsdogs":
        return surest(seen.teacher.p.view(2, 20, -1).mean(dim=0), TAUGHT[n])
    p, label = seen.teacher.p.max(dim=1)
    return F.one_hot(label, 10) * (p > watched.script.CONFIDENCE)[:, None]


def test_teacher_labels_some_images_as_they_are(watched):
    photos = watched.name == "sgan_catsdogs"
    for n, step in enumerate(watched.gan_steps):
        seen = part(watched, step, "unlabeled")
        if photos and TAUGHT[n] == 0:  # in the first third of a run
            assert seen.teacher is None
            continue
        x, x_unl = seen.teacher.x[:len(seen.x)], turned(seen.x, -1) if photos else seen.x
        assert find(x, watched.data.unlabeled).equal(find(x_unl, watched.data.unlabeled))
        assert 0 < taught(watched, n).sum() < len(x)
        if photos:  # it looks twice: the second time at the mirror image's middle, enlarged
            middle = F.interpolate(x_unl.flip(3)[:, :, 6:26, 6:26], size=32, mode="bilinear")
            torch.testing.assert_close(seen.teacher.x[len(x):], middle, rtol=0, atol=1e-4)


def test_classifier_minimises_the_losses_with_their_weights(watched):
    for n, step in enumerate([*watched.gan_steps, *watched.warm_up]):
        labeled = part(watched, step, "labeled")
        y = watched.data.labeled[1][find(labeled.x, watched.data.labeled[0])]
        p = labeled.logits.softmax(dim=1)
        by_labels = p - F.one_hot(y, p.shape[1])
        if n < len(watched.gan_steps):
            label = taught(watched, n)
            fake, seen = step.passes["fake"], part(watched, step, "unlabeled")
            by_fakes = GAN_WEIGHT * 0.5 * real_gradient(fake.logits, 0)
            real = len(seen.x)  # images that should be real
            if watched.name == "sgan_catsdogs":  # the labeled ones are among them
                real += len(y)
                by_labels += GAN_WEIGHT * 0.5 * real_gradient(labeled.logits, 1) * len(y) / real
            expected = GAN_WEIGHT * 0.5 * real_gradient(seen.logits, 1) * len(seen.x) / real
            if watched.name == "sgan_svhn":
                p = seen.logits.softmax(dim=1)
                expected += CONSISTENCY_WEIGHT * (label.sum(dim=1, keepdim=True) * p - label)
            # the logits and their gradient may be bfloat16, of 8 bits
            torch.testing.assert_close(fake.grad, by_fakes, rtol=0.02, atol=1e-4)
            whole = len(step.passes["photos"].x) if "photos" in step.passes else len(seen.x)
            torch.testing.assert_close(seen.grad * len(seen.x) / whole, expected,
                                       rtol=0.02, atol=1e-4)
        whole = len(step.passes["photos"].x) if "photos" in step.passes else len(labeled.x)
        torch.testing.assert_close(labeled.grad * len(y) / whole, by_labels, rtol=0.02, atol=1e-4)


def test_photos_that_were_picked_and_turned_teach_with_their_weights(watched):
    if watched.name != "sgan_catsdogs":
        pytest.skip("SVHN has no such photos")
    for n, step in enumerate(watched.gan_steps):
        whole = len(step.passes["photos"].x)
        picked, seen = (part(watched, step, kind) for kind in ("picked", "unlabeled"))
        if TAUGHT[n]:
            where = find(picked.x, turned(seen.x, -1))
            label, counts = taught(watched, n), picked.grad.any(dim=1)  # a photo may be there twice
            assert sorted(where[counts]) == sorted(label.any(dim=1).nonzero()[:, 0])
            expected = CONSISTENCY_WEIGHT * (picked.logits.softmax(dim=1) - label[where])
            torch.testing.assert_close((picked.grad * len(seen.x) / whole)[counts],
                                       expected[counts], rtol=0.02, atol=1e-4)

        # to the features come back the gradient of the turns and, from the K logits, none or two
        # times that: dropout
        weight, bias = seen.heads["turn_head.weight"], seen.heads["turn_head.bias"]
        p = (seen.features @ weight.T + bias).softmax(dim=1)
        turns = ROTATION_WEIGHT * (p - F.one_hot(torch.arange(len(p)) % 4)) @ weight
        left = seen.grad_features * len(p) / whole - turns
        through = 2 * seen.grad * len(p) / whole @ seen.heads["head.weight"]
        near = (torch.minimum(left.abs(), (left - through).abs())
                < 0.05 * (turns.abs() + through.abs()) + 1e-3)
        assert near.all()
        assert torch.cosine_similarity(left.flatten(), through.flatten(), dim=0) > 0.5


def test_logged_losses_are_those_of_the_outputs(watched):
    logged, photos = [], watched.name == "sgan_catsdogs"
    for n, step in list(enumerate(watched.gan_steps))[-2:]:  # of the last epoch
        labeled, unlabeled, fake, generator = (part(watched, step, kind) for kind in (
            "labeled", "unlabeled", "fake", "generator"))
        y = watched.data.labeled[1][find(labeled.x, watched.data.labeled[0])]
        gap = unlabeled.features.mean(dim=0) - generator.features.mean(dim=0)
        z_unl, z_fake, z_gen = (seen.logits.exp().sum(dim=1)
                                for seen in (unlabeled, fake, generator))
        z_real = torch.cat([labeled.logits.exp().sum(dim=1), z_unl]) if photos else z_unl
        label, told = taught(watched, n), unlabeled.logits
        values = {"loss/lab": -labeled.logits.log_softmax(dim=1)[range(len(y)), y].mean(),
                  "loss/unl": (1 / z_real).log1p().mean(), "loss/fake": z_fake.log1p().mean(),
                  "loss/g": gap.square().mean(),
                  "monitor/picked": label.sum(dim=1).double().mean(),
                  "monitor/p_real_unl": (z_unl / (1 + z_unl)).mean(),
                  "monitor/p_real_fake": (z_fake / (1 + z_fake)).mean()}
        if photos:
            picked = part(watched, step, "picked")
            head = [unlabeled.heads[f"turn_head.{kind}"].float() for kind in ("weight", "bias")]
            # rounded as in the script, or 1e-4 below could not hold
            with torch.autocast("cpu", torch.bfloat16, enabled=watched.bf16):
                turns = F.linear(unlabeled.features.float(), *head)
            told_turns = turns.double().log_softmax(dim=1)
            values |= {"loss/fm": values["loss/g"],
                       "loss/g": values["loss/g"] + (1 / z_gen).log1p().mean(),
                       "loss/turn": -told_turns[range(20), torch.arange(20) % 4].mean()}
            where, counts = find(picked.x, turned(unlabeled.x, -1)), picked.grad.any(dim=1)
            told = torch.zeros_like(told)
            told[where[counts]] = picked.logits[counts]
        values["loss/con"] = -(label * told.log_softmax(dim=1)).sum(dim=1).mean()
        logged.append(values)
    assert set(logged[0]) == {name for name in watched.row if "/" in name}
    for name in logged[0]:
        mean = sum(values[name].item() for values in logged) / 2
        assert float(watched.row[name]) == pytest.approx(mean, rel=1e-4, abs=1e-7), name


def test_final_weights_are_the_moving_average(watched):
    average = averaged(watched.networks["Classifier"].at_first,
                       [step.state for step in watched.steps], 0.4)
    for name, values in average.items():
        torch.testing.assert_close(watched.final["classifier"][name].double(), values.double(),
                                   rtol=1e-5, atol=1e-6)
    generator = copied(watched.networks["Generator"].state_dict().items())
    assert same_bits(watched.final["generator"], generator)


class Waits(TorchDispatchMode):
    """Lists where the host would wait for a GPU: to read a number, or to count what is true.

    Functions named in `outside` are no part of a step.
    """

    outside = {"read_data", "read_folders", "batches", "evaluate", "take", "save_samples",
               "plot_test", "standardise", "snapshot", "draw_figures", "draw_panel",
               "score_good_generator", "draw_rings", "balanced_split"}

    def __init__(self, script):
        super().__init__()
        self.script, self.found = script, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero") or (name in ("index", "index_put_") and any(
                index is not None and index.dtype == torch.bool for index in args[1])):
            stack = [frame for frame in traceback.extract_stack()
                     if Path(frame.filename).name in ("common.py", f"{self.script}.py")]
            on_cpu_only = "one_hot" in stack[-1].line  # there torch checks the labels
            if not on_cpu_only and not self.outside & {frame.name for frame in stack}:
                self.found.append(f"{name}: {stack[-1].name}, {stack[-1].line}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, flags", [
    ("sgan_catsdogs", []), ("sgan_catsdogs", ["--supervised-only"]), ("sgan_svhn", []),
    ("sgan_mnist", []), ("sgan_mnist", ["--good-generator", "--gan-weight", 0]), ("toy_rings", [])])
def test_no_step_waits_for_the_device(name, flags, few_steps, mnist):
    known = {"sgan_mnist": ["--data-dir", mnist, "--device", "cpu"], "toy_rings": []}
    data = few_steps[name].flags if name in few_steps else known[name]
    with Waits(name) as waits:
        call_main(name, *data, *flags, "--dry-run")
    assert waits.found == []


def test_a_step_that_waits_is_found():
    def step(x):
        return x[x > 0], x.max().item(), x.nonzero()

    with Waits("test_steps") as waits:
        step(torch.randn(9))
    assert [found.split(":")[0] for found in waits.found] == ["index", "_local_scalar_dense",
                                                              "nonzero"]


@needs_gpu
@pytest.mark.parametrize("name", STEPPED)
def test_no_step_waits_for_the_gpu(name, few_steps, monkeypatch):
    script = importlib.import_module(name)
    add, take = script.EpochMeans.add, script.EpochMeans.take

    def after_a_step(*args):
        torch.cuda.set_sync_debug_mode("error")  # from the second step of an epoch on
        add(*args)

    def before_validation(*args):
        torch.cuda.set_sync_debug_mode("default")
        return take(*args)

    monkeypatch.setattr(script.EpochMeans, "add", after_a_step)
    monkeypatch.setattr(script.EpochMeans, "take", before_validation)
    try:
        train(name, *few_steps[name].flags, "--device", "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ====================================== what the flags change =====================================


@pytest.mark.parametrize("flags", ["fool", "complement", "fool --real-logit fake-class",
                                   "fool --real-logit sigmoid-head"])
def test_networks_of_svhn_minimise_what_the_flags_say(flags, few_steps, bf16):
    if bf16 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        pytest.skip("this processor emulates bfloat16: a minute a run, and the scripts avoid it")
    seen = watch("sgan_svhn", [*few_steps["sgan_svhn"].flags, "--generator-loss", *flags.split()],
                 bf16)
    loss_g = loss_unl = 0
    for step in seen.steps:
        one, fake = step.passes["unlabeled"], step.passes["fake"]
        for of, target in ((one, 1), (fake, 0)):
            torch.testing.assert_close(of.grad_r, GAN_WEIGHT * 0.5 * (of.r.sigmoid() - target),
                                       rtol=1e-3, atol=1e-6)  # of the cross-entropy of D(x)
        loss_unl += -one.r.sigmoid().log().mean().item() / 2
        real, fake = one.features, step.passes["generator"].features
        loss = (real.mean(dim=0) - fake.mean(dim=0)).square().mean()
        if "complement" in flags:
            cosines = F.cosine_similarity(fake[:, None], fake[None], dim=2)
            loss = loss + cosines[~torch.eye(len(fake), dtype=torch.bool)].square().mean()
        if "fool" in flags:  # -log D(G(z))
            loss = -step.passes["generator"].r.sigmoid().log().mean()
        loss_g += loss.item() / 2
        for of, update in step.updates.items():
            assert ("extra.weight" in update.moved["Classifier"]) == (
                of == "Classifier" and "--real-logit" in flags)
        find(one.teacher.x, few_steps["sgan_svhn"].unlabeled)  # it sees images as they are
        assert (one.teacher.x - one.x).abs().mean() > 0.01
    assert float(seen.row["loss/g"]) == pytest.approx(loss_g, rel=1e-3)
    assert float(seen.row["loss/unl"]) == pytest.approx(loss_unl, rel=1e-4)


def test_without_the_gan_svhn_makes_no_more_fakes_than_batch_norm_needs(few_steps):
    seen = watch("sgan_svhn", [*few_steps["sgan_svhn"].flags, "--gan-weight", 0, "--dry-run"], True)
    for step in seen.steps:
        assert len(step.passes["fake"].x) == 2
        assert len(step.passes["unlabeled"].x) == 160
        assert not step.passes["fake"].grad_r.any()
        assert not step.passes["unlabeled"].grad_r.any()


def test_without_the_gan_photos_have_no_fakes(few_steps):
    flags = [*few_steps["sgan_catsdogs"].flags, "--gan-weight", 0]
    seen = watch("sgan_catsdogs", flags, True)
    assert all(list(step.passes) == ["photos"] and list(step.updates) == ["Classifier"]
               for step in seen.steps)
    assert "loss/fake" not in seen.row and not list(Path("runs").glob("*/samples"))


def test_without_rotation_photos_stay_upright(few_steps):
    flags = [*few_steps["sgan_catsdogs"].flags, "--rotation-weight", 0, "--augmentation", 0]
    seen = watch("sgan_catsdogs", flags, True)
    seen.data = few_steps["sgan_catsdogs"]
    for step in seen.steps:
        find(part(seen, step, "unlabeled").x, seen.data.unlabeled)
        torch.testing.assert_close(step.passes["fake"].x, step.passes["fake"].fakes.float(),
                                   rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", STEPPED)
def test_without_ema_the_raw_weights_are_scored(name, few_steps):
    seen = watch(name, [*few_steps[name].flags, "--ema-decay", 0, "--dry-run"], False)
    for key, weights in seen.networks["Classifier"].state_dict().items():
        assert "num_batches" in key or seen.final["classifier"][key].equal(weights)


@pytest.mark.parametrize("baseline", [[], ["--supervised-only"]], ids=["full", "baseline"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_images_are_augmented_in_float32_though_networks_compute_in_bfloat16(
        name, baseline, few_steps, mnist, monkeypatch):
    """Each result of augment() that reaches a network is the one in float32, bit for bit."""
    script, seen, augmented = importlib.import_module(name), [], []

    def augment(x, strength):
        assert x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        augmented.append(whole(x, strength))
        return augmented[-1]

    def before_forward(module, inputs):
        if isinstance(module, network) and module.training:
            seen.append(inputs[0].detach())

    whole, network = script.augment, script.Student if name == "sgan_mnist" else script.Classifier
    monkeypatch.setattr(script, "augment", augment)
    flags = few_steps[name].flags if name in few_steps else ["--data-dir", mnist, "--device", "cpu"]
    flags = [*flags, *(["--rotation-weight", 0] if name == "sgan_catsdogs" else [])]
    handle = torch.nn.modules.module.register_module_forward_pre_hook(before_forward)
    try:
        with forced_bf16(True):
            train(name, *flags, *baseline, "--dry-run")
    finally:
        handle.remove()
    known = {tuple(x.tolist()) for images in augmented for x in images.detach().flatten(1)}
    found = [tuple(x.tolist()) in known for images in seen for x in images.flatten(1)]
    assert all(x.dtype == torch.float32 for x in seen)
    assert len(found) > 1 and all(found)


# ===================================== the parts, on their own ====================================


@pytest.mark.parametrize("per_class", [1, 3, 10])
def test_surest_of_each_class_teach_one_class_at_most(per_class):
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = logits[:, 0] - 0.1  # wanted by two classes
    script = importlib.import_module("sgan_catsdogs")
    index, label, weight = script.surest_of_each_class(logits.softmax(dim=1), per_class)
    assert len(index) == len(label) == len(weight) == 4 * per_class
    assert index.equal(index.sort().values) and label.bincount().tolist() == [per_class] * 4
    found = torch.zeros(40, 4, dtype=torch.long)
    found.index_put_((index, label), weight.long())
    assert found.equal(surest(logits.softmax(dim=1), per_class))
    assert 2 * per_class <= weight.sum() < 4 * per_class


def build(name):
    """A script, its untrained classifier, and two batches of noise."""
    torch.manual_seed(0)
    shape = (1, 28, 28) if name == "sgan_mnist" else (3, 32, 32)
    return importlib.import_module(name), new_classifier(name), torch.rand(2, 16, *shape)


@pytest.mark.parametrize("name", STEPPED)
def test_frozen_statistics_stand_still_and_move_again_afterwards(name):
    script, classifier, (x, x_other) = build(name)
    norm = next(m for m in classifier.modules() if isinstance(m, torch.nn.BatchNorm2d))
    seen = []
    norm.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out.clone())))
    before = copied(classifier.named_buffers())
    with script.frozen_statistics(classifier):
        classifier(x)
        classifier(3 * x_other - 1)
    assert not changed(before, dict(classifier.named_buffers())) & statistics_of(classifier)
    for x_in, x_out in seen:  # yet each batch is normalised by itself
        variance, mean = torch.var_mean(x_in, dim=(0, 2, 3), correction=0, keepdim=True)
        torch.testing.assert_close(x_out, (x_in - mean) / (variance + norm.eps).sqrt(),
                                   rtol=1e-3, atol=1e-4)
    classifier(x)
    assert changed(before, dict(classifier.named_buffers())) >= statistics_of(classifier)
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[0][0].mean(dim=(0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * seen[0][0].var(dim=(0, 2, 3)))


@pytest.mark.parametrize("name, size", [("sgan_mnist", 28), ("sgan_svhn", 32),
                                        *(("sgan_catsdogs", size) for size in (32, 64, 224))])
def test_networks_have_the_promised_shapes(name, size):
    script, photos = importlib.import_module(name), name == "sgan_catsdogs"
    generator = script.Generator(size) if photos else script.Generator()
    classifier = script.Classifier(5, size) if photos else new_classifier(name)
    images = generator(torch.randn(2, script.LATENT_DIM))
    assert images.shape == (2, 1 if name == "sgan_mnist" else 3, size, size)
    assert images.min() >= 0 and images.max() <= 1
    logits, features, *r = classifier(images)  # MNIST's student has no r
    assert logits.shape == (2, 5 if photos else 10) and all(part.shape == (2,) for part in r)
    assert features.shape == (2, 512 if photos else 128)


@pytest.mark.parametrize("name, form", [
    ("sgan_catsdogs", "logsumexp"), *(("sgan_svhn", form) for form in (
        "logsumexp", "fake-class", "sigmoid-head"))])
def test_real_logit_of_each_form(name, form):
    """Against the softmax of K + 1 classes, of K and a zero, and against the plain linear unit."""
    script, classifier, (x, _) = build(name)
    if name == "sgan_svhn":
        classifier = script.Classifier(form)
    classifier.eval()
    with torch.no_grad():
        logits, features, r = classifier(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert classifier(x)[2].dtype == torch.float32
    extra = torch.zeros(16, 1)
    if form != "logsumexp":
        extra = features @ classifier.extra.weight.T + classifier.extra.bias
    if form == "sigmoid-head":
        real = torch.sigmoid(extra[:, 0].double())
    else:
        real = 1 - torch.cat([logits, extra], dim=1).double().softmax(dim=1)[:, -1]
    torch.testing.assert_close(r.double().sigmoid(), real, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [32, 64, 96])
def test_local_contrast_sees_edges_but_no_brightness_or_colour_of_the_whole(size):
    script, _, _ = build("sgan_catsdogs")
    x = 0.3 + 0.4 * torch.rand(4, 3, size, size)
    colour = 0.3 * torch.rand(4, 3, 1, 1) - 0.15
    torch.testing.assert_close(script.local_contrast(x + colour), script.local_contrast(x),
                               rtol=0, atol=1e-4)
    flat = torch.rand(4, 3, 1, 1).expand(-1, -1, size, size)
    assert script.local_contrast(flat).abs().max() < 1e-4
    slope = torch.linspace(0, 1, size).expand(1, 3, size, size)
    edge = (slope > 0.5).float()
    inside = slice(size // 4, -size // 4)
    smooth, sharp = (script.local_contrast(image)[0, 0, inside, inside].abs().max()
                     for image in (slope, edge))
    assert sharp > 2.5 and sharp > 5 * smooth


# ========================================== augmentation ==========================================


@pytest.mark.parametrize("name", SCRIPTS)
def test_augmentation_differs_by_image_and_lets_the_gradient_through(name):
    script, _, (x, _) = build(name)
    x = x[:1].repeat(16, 1, 1, 1).requires_grad_()
    out = script.augment(x, 1)
    assert out.shape == x.shape
    assert len({tuple(image.flatten().tolist()) for image in out}) > 8
    out.sum().backward()
    assert (x.grad.flatten(1).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("name", SCRIPTS)
def test_augmentation_of_strength_0_changes_nothing_and_grows_with_strength(name):
    script, _, (x, _) = build(name)
    rounding = 1e-4 if name == "sgan_mnist" else 0
    torch.testing.assert_close(script.augment(x, 0.0), x, rtol=0, atol=rounding)
    far = [(script.augment(x, strength) - x).abs().mean().item() for strength in (0.02, 0.2, 1.0)]
    assert 0 < far[0] < far[1] < far[2]


@pytest.mark.parametrize("name, share, spread, reach, bias", [
    ("sgan_mnist", 0.9, 2.5, 7, 0.5),  # the warp adds about 1 to the deviation, rarely 4
    ("sgan_svhn", 0.8, 1.5, 4, 0.3)])  # some dots are erased, or blurred too far
def test_augmentation_moves_a_dot_by_a_few_pixels(name, share, spread, reach, bias):
    script, _, (x, _) = build(name)
    side = x.shape[-1]
    x = torch.zeros(200, *x.shape[1:])
    x[:, :, side // 2 - 1:side // 2 + 1, side // 2 - 1:side // 2 + 1] = 1.0
    grey = script.augment(x, 1.0).mean(dim=1)
    if name == "sgan_svhn":
        background = grey.flatten(1).median(dim=1).values[:, None, None]
        grey = (grey - background).clamp(min=0.15) - 0.15
    mass = grey.sum(dim=(1, 2))
    assert (mass > 0.1).float().mean() > share
    seen, along = grey[mass > 0.1], torch.arange(side) - (side - 1) / 2
    for axis in (1, 2):
        center = (seen.sum(dim=3 - axis) * along).sum(dim=1) / seen.sum(dim=(1, 2))
        # uniform up to 2 has a standard deviation of 1.15
        assert 1 < center.std() < spread and center.abs().max() < reach
        assert center.mean().abs() < bias


def test_svhn_augmentation_of_one_colour_is_one_colour():
    script, _, _ = build("sgan_svhn")
    colors = torch.rand(100, 3, 1, 1)
    out = script.augment(colors.expand(100, 3, 32, 32), 1.0)
    assert out.std(dim=(2, 3)).max() < 1e-5  # nothing comes in from beyond the border
    std, mean = torch.std_mean(colors.expand(100, 3, 32, 32), dim=(1, 2, 3), keepdim=True)
    limit = 0.2 * (colors - mean).abs() + 0.5 * std
    moved = (out.mean(dim=(2, 3), keepdim=True) - colors).abs() / limit
    assert 0.8 < moved.max() < 1.001
    assert (moved.amax(dim=1) - moved.amin(dim=1)).median() > 0.2  # by channel


def test_svhn_augmentation_erases_a_small_rectangle():
    script, _, _ = build("sgan_svhn")
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
