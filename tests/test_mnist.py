"""Inside sgan_mnist.py: what passes through which network, which losses move it, and by how much.

Training runs are watched through torch's global hooks; nothing in the script is replaced.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sgan_mnist
from common import balanced_split
from tests.conftest import (averaged, changed, copied, find, forced_bf16, gradients, hooked,
                            read_csv, read_part, real_gradient, same_bits, train)
from tests.referee import right_class

N, LABELED, GAN_WEIGHT = 160, 10, 0.7  # unlabeled images and labeled ones in a step
NETWORKS = (sgan_mnist.Perceptron, sgan_mnist.Generator, sgan_mnist.Student)


def watch(bf16, *flags, out_dir="runs"):
    """A run in this process: events, in order, of each network's passes and updates.

    A pass has the network's name, whether it trains, the input, the outputs, and under grad what
    comes back to the first output. An update has the name, the learning rate, and of each network
    the names of weights that it moves and of gradients that are new since the update before.
    The run's steps hold these events; those of the averages in evaluation are left out.
    Of two networks of a class the names are those below, in the order of their first passes.
    """
    networks, events, latest, names = {}, [], {}, {}
    pair_d = ["pair discriminator"] if "--good-generator" in flags else []
    left = {"Generator": ["Generator", "good generator"], "Student": ["Student"],
            "Perceptron": [*pair_d, "Perceptron"]}

    def name_of(module):
        kind = type(module).__name__
        if not module.training:  # an average
            return kind
        if module not in names:
            names[module] = left[kind].pop(0)
        return names[module]

    def before_forward(module, inputs):
        if isinstance(module, NETWORKS) and module.training and module not in names:
            name = name_of(module)
            networks[name] = module
            module.at_first = copied(module.state_dict().items())
            latest[name] = gradients(module)

    def after_forward(module, inputs, outputs):
        if not isinstance(module, NETWORKS):
            return
        name = name_of(module)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        seen = SimpleNamespace(name=name, update=False, training=module.training,
                               x=inputs[0].detach(),
                               outputs=[output.detach().double() for output in outputs])
        if outputs[0].requires_grad:
            outputs[0].register_hook(lambda grad: setattr(seen, "grad", grad.double()))
        events.append(seen)

    def before_update(optimizer, args, kwargs):
        weight = optimizer.param_groups[0]["params"][0]
        name = next(n for n, net in networks.items()
                    if any(p is weight for p in net.parameters()))
        events.append(SimpleNamespace(
            name=name, update=True, training=True, lr=optimizer.param_groups[0]["lr"],
            before={n: copied(net.named_parameters()) for n, net in networks.items()},
            new_gradients={n: changed(latest[n], gradients(net))
                           for n, net in networks.items()}))
        latest.update({n: gradients(net) for n, net in networks.items()})

    def after_update(optimizer, args, kwargs):
        update = events[-1]
        update.moved = {n: changed(update.before[n], dict(net.named_parameters()))
                        for n, net in networks.items()}
        update.state = copied(networks[update.name].state_dict().items())

    with (forced_bf16(bf16),
          hooked(before_forward, after_forward, before_update, after_update)):
        folder, _ = train("sgan_mnist", "--device", "cpu", "--num-labeled", LABELED,
                          "--batch-size", N, "--gan-weight", GAN_WEIGHT, *flags, out_dir=out_dir)
    alone = {"--supervised-only", "--student-only"} & set(flags)
    first = "Student" if alone else "Generator"
    starts = [i for i, e in enumerate(events)
              if e.name == first and e.training and not e.update]
    steps = []
    for start, end in zip(starts, [*starts[1:], len(events)]):
        last = max(i for i in range(start, end) if events[i].update)  # then comes the evaluation
        steps.append(events[start:last + 1])
    return SimpleNamespace(networks=networks, steps=steps, folder=folder, events=events,
                           rows=read_csv(folder / "metrics.csv"),
                           final=torch.load(folder / "final.pt", weights_only=True))


@pytest.fixture(scope="module")
def digits(mnist):
    """Labeled images and labels, and unlabeled images, of the run that the tests watch."""
    x, y = read_part(mnist, "train")
    labeled, _, others = balanced_split(y, LABELED, (len(y) - LABELED) // 2, 10, seed=0)
    return SimpleNamespace(x=x[labeled], y=y[labeled], unlabeled=x[torch.cat([labeled, others])])


@pytest.fixture(scope="module")
def watched(mnist, bf16, tmp_path_factory):
    """Three epochs of two steps; the averages label from the second on; nothing is augmented."""
    return watch(bf16, "--data-dir", mnist, "--augmentation", 0, "--epochs", 3, "--lr", 0.002,
                 out_dir=tmp_path_factory.mktemp("watched") / "runs")


@pytest.fixture(scope="module")
def made(mnist, bf16, tmp_path_factory):
    """The same, with a good generator, and one epoch less: four steps."""
    return watch(bf16, "--data-dir", mnist, "--augmentation", 0, "--epochs", 2, "--good-generator",
                 out_dir=tmp_path_factory.mktemp("made") / "runs")


def parts(step):
    """Of a step: passes of fakes, of all images at once, of fakes and others for the generator."""
    fakes, *_ = step
    together, of_fakes, of_others = (e for e in step if e.name == "Perceptron" and e.training
                                     and not e.update)
    return SimpleNamespace(fakes=fakes, together=together, of_fakes=of_fakes, of_others=of_others)


def taught(run):
    """Of each step: p (N, 10) that the averages give together, in float64, all classes as often."""
    found, p_mean = [], torch.full((10,), 0.1).double()
    for step in run.steps:
        asked = [e for e in step if not e.training]
        assert [e.name for e in asked] == ["Perceptron", "Student"]
        for e in asked:  # plain digits
            assert torch.equal(e.x, parts(step).together.x[LABELED:LABELED + N])
        p = torch.stack([e.outputs[0].softmax(dim=1) for e in asked]).log().mean(dim=0).exp()
        p = p / p.sum(dim=1, keepdim=True)
        p_mean = 0.99 * p_mean + 0.01 * p.mean(dim=0)
        found.append(p / p_mean / (p / p_mean).sum(dim=1, keepdim=True))
    return found


# ============================================= the GAN ============================================


def test_the_perceptron_sees_all_images_at_once_and_others_for_the_generator(watched, digits):
    order = [("Generator", False), ("Perceptron", False), ("Perceptron", True),
             ("Perceptron", False), ("Perceptron", False), ("Generator", True),
             ("Student", False), ("Student", True)]
    assert len(watched.steps) == 6  # two an epoch, of 445 unlabeled images in batches of 160
    seen, others = [], []
    for step in watched.steps:
        assert [(e.name, e.update) for e in step if e.training] == order
        of = parts(step)
        x_lab, x_unl, x_fake = of.together.x.split([LABELED, N, N])
        assert find(x_lab, digits.x).sort().values.tolist() == list(range(LABELED))
        seen.append(find(x_unl, digits.unlabeled))
        others.append(find(of.of_others.x, digits.unlabeled))
        for x in (x_fake, of.of_fakes.x):
            torch.testing.assert_close(x.double(), of.fakes.outputs[0], rtol=0, atol=1e-6)
        z = of.fakes.x
        assert 0 <= z.min() and z.max() < 1 and z.std() > 0.25  # uniform
    for indices in (seen, others):  # no image twice in an epoch
        for one, other in zip(indices[::2], indices[1::2]):
            assert len(torch.cat([one, other]).unique()) == 2 * N
    assert not torch.equal(seen[0], others[0])


def test_the_perceptron_minimises_its_losses(watched, digits):
    for n, (step, p) in enumerate(zip(watched.steps, taught(watched))):
        together = parts(step).together
        logits_lab, logits_unl, logits_fake = together.outputs[0].split([LABELED, N, N])
        y = digits.y[find(together.x[:LABELED], digits.x)]
        of_unl = GAN_WEIGHT * 0.5 * real_gradient(logits_unl, 1)
        if n >= 2:  # from the second epoch on
            p_max, y_both = p.max(dim=1)
            picked = p_max > sgan_mnist.CONFIDENCE
            of_unl += picked[:, None] * (logits_unl.softmax(dim=1) - F.one_hot(y_both, 10))
        expected = torch.cat([(logits_lab.softmax(dim=1) - F.one_hot(y, 10)) / LABELED, of_unl / N,
                              GAN_WEIGHT * 0.5 * real_gradient(logits_fake, 0) / N])
        # the logits and their gradient may be bfloat16, of 8 bits
        torch.testing.assert_close(together.grad, expected, rtol=0.02, atol=1e-5)


def test_the_perceptron_learns_what_both_averages_are_sure_of(mnist, bf16):
    """After a while, when they are sure of some digits."""
    seen, logged = watch(bf16, "--data-dir", mnist, "--epochs", 12), []
    for step, p in list(zip(seen.steps, taught(seen)))[-2:]:
        p_max, y = p.max(dim=1)
        log_p = parts(step).together.outputs[0].log_softmax(dim=1)[LABELED:LABELED + N]
        picked = (p_max > sgan_mnist.CONFIDENCE).double()
        logged.append(((-log_p[range(N), y] * picked).mean(), picked.mean()))
    for name, values in zip(("loss/con", "monitor/picked"), zip(*logged)):
        assert 0 < sum(values) / 2 < 1
        assert float(seen.rows[-1][name]) == pytest.approx(sum(values).item() / 2, rel=1e-3), name


def test_updates_move_their_own_network_and_never_the_hidden_scales(watched, made):
    scales = {f"hidden.{i}.parametrizations.weight.original0" for i in range(5)}
    for run, count in ((made, 4 * 5), (watched, 6 * 3)):
        updates = [e for step in run.steps for e in step if e.update]
        assert len(updates) == count
        for update in updates:
            own = set(dict(run.networks[update.name].named_parameters())) - scales
            for name in update.moved:
                assert update.moved[name] == (own if name == update.name else set())
                assert update.new_gradients[name] == (own if name == update.name else set())
    rates = {name: [e.lr for e in updates if e.name == name] for name in watched.networks}
    assert rates["Perceptron"] == rates["Generator"] == [0.002] * 6
    assert rates["Student"] == pytest.approx([0.002] * 4 + [0.002 * 2 / 3, 0.002 / 3])


def test_logged_losses_are_those_of_the_outputs(watched, digits):
    for row, pair in zip(watched.rows, (watched.steps[:2], watched.steps[2:4], watched.steps[4:])):
        logged = []
        for step in pair:
            of = parts(step)
            log_p = of.together.outputs[0].log_softmax(dim=1)
            y = digits.y[find(of.together.x[:LABELED], digits.x)]
            z_unl, z_fake = of.together.outputs[0].exp().sum(dim=1)[LABELED:].split(N)
            gap = of.of_others.outputs[1].mean(dim=0) - of.of_fakes.outputs[1].mean(dim=0)
            logged.append({"loss/lab": -log_p[range(LABELED), y].mean(),
                           "loss/unl": (1 / z_unl).log1p().mean(),
                           "loss/fake": z_fake.log1p().mean(), "loss/g": gap.square().mean(),
                           "monitor/p_real_unl": (z_unl / (1 + z_unl)).mean(),
                           "monitor/p_real_fake": (z_fake / (1 + z_fake)).mean()})
        for name in logged[0]:
            mean = sum(values[name].item() for values in logged) / 2
            assert float(row[name]) == pytest.approx(mean, rel=1e-3, abs=1e-6), name


# ======================================= the good generator =======================================


def pairs(step):
    """Of a step: passes of the good generator, and of the pair discriminator for both updates."""
    [good] = [e for e in step if e.name == "good generator" and not e.update]
    for_pair_d, for_good = (e for e in step if e.name == "pair discriminator" and not e.update)
    return SimpleNamespace(good=good, for_pair_d=for_pair_d, for_good=for_good)


def asked_for(step):
    """The classes (N,) that the good generator is asked for."""
    z, one_hot = pairs(step).good.x.split([100, 10], dim=1)
    assert 0 <= z.min() and z.max() < 1 and torch.equal(one_hot.sum(dim=1), torch.ones(N))
    y = one_hot.argmax(dim=1)
    assert y.bincount().tolist() == [N // 10] * 10
    return y


def test_pairs_are_real_digits_and_digits_made_to_order(made, digits):
    for step in made.steps:
        of = pairs(step)
        x_lab, x_unl, x_made = of.for_pair_d.x.split([LABELED, N, N])
        together = parts(step).together.x
        assert torch.equal(together[:LABELED + N], torch.cat([x_lab, x_unl]))
        assert torch.equal(together[-N:], x_made) and torch.equal(of.for_good.x, x_made)
        torch.testing.assert_close(x_made.double(), of.good.outputs[0].view_as(x_made), rtol=0,
                                   atol=1e-6)
        find(x_unl, digits.unlabeled)


def test_the_pair_discriminator_and_the_good_generator_minimise_their_losses(made, digits):
    logged = []
    for step, p in zip(made.steps, taught(made)):
        of = pairs(step)
        d = of.for_pair_d.outputs[0]
        y_lab = F.one_hot(digits.y[find(of.for_pair_d.x[:LABELED], digits.x)], 10).double()
        y_made = F.one_hot(asked_for(step), 10).double()
        y_unl = F.one_hot(p.argmax(dim=1), 10).double()  # the labels of the averages
        real = torch.cat([0.1 * y_lab / LABELED, 0.9 * y_unl / N, 0 * y_made])
        fake = torch.cat([0 * y_lab, 0.5 * p / N, 0.5 * y_made / N])
        expected = real * (d.sigmoid() - 1) + fake * d.sigmoid()
        torch.testing.assert_close(of.for_pair_d.grad, expected, rtol=0.02, atol=1e-6)
        d_made = of.for_good.outputs[0]
        torch.testing.assert_close(of.for_good.grad, y_made * (d_made.sigmoid() - 1) / N,
                                   rtol=0.02, atol=1e-6)
        logged.append({"loss/pair": -(real * F.logsigmoid(d) + fake * F.logsigmoid(-d)).sum(),
                       "loss/good": -(y_made * F.logsigmoid(d_made)).sum() / N})
    for row, one, other in zip(made.rows, logged[::2], logged[1::2], strict=True):
        for name in one:
            assert float(row[name]) == pytest.approx((one[name] + other[name]).item() / 2, rel=1e-3)


def test_the_perceptron_learns_digits_made_to_order_from_a_quarter_of_the_run_on(made):
    for step, ramp in zip(made.steps, (0, 1, 1, 1), strict=True):
        together = parts(step).together
        expected = together.outputs[0][-N:].softmax(dim=1) - F.one_hot(asked_for(step), 10)
        torch.testing.assert_close(together.grad[-N:], sgan_mnist.MADE_WEIGHT * ramp * expected / N,
                                   rtol=0.02, atol=1e-6)


def test_without_the_gan_the_perceptron_wants_its_pairs_to_pass_for_real(mnist, digits, bf16):
    """Triple-GAN, before the averages teach it and before the ramp."""
    seen = watch(bf16, "--data-dir", mnist, "--augmentation", 0, "--epochs", 8, "--good-generator",
                 "--gan-weight", 0)
    for step in seen.steps[:4]:
        together, d = parts(step).together, pairs(step).for_pair_d.outputs[0]
        logits_lab, logits_unl, *_ = together.outputs[0].split([LABELED, N, N, N])
        y = digits.y[find(together.x[:LABELED], digits.x)]
        p, cost = logits_unl.softmax(dim=1), d[LABELED:LABELED + N].neg().exp().log1p()
        of_unl = p * (cost - (p * cost).sum(dim=1, keepdim=True)) / N
        expected = torch.cat([(logits_lab.softmax(dim=1) - F.one_hot(y, 10)) / LABELED,
                              sgan_mnist.PASS_WEIGHT * of_unl, torch.zeros(2 * N, 10)])
        torch.testing.assert_close(together.grad, expected, rtol=0.02, atol=1e-9)


def test_the_final_good_generator_is_the_moving_average_and_its_samples_are_kept(
        mnist, monkeypatch):
    monkeypatch.setattr(sgan_mnist, "GOOD_EMA", 0.1)  # less than at first in any case
    seen = watch(False, "--data-dir", mnist, "--good-generator", "--epochs", 2)
    states = [e.state for step in seen.steps for e in step if e.update and "good" in e.name]
    average = averaged(seen.networks["good generator"].at_first, states, 0.1)
    for key, values in average.items():
        torch.testing.assert_close(seen.final["good_generator"][key].double(), values.double(),
                                   rtol=1e-4, atol=1e-5)
    for path in (seen.folder / "samples" / f"good_00{epoch}.png" for epoch in (1, 2)):
        with Image.open(path) as image:
            assert image.size == (302, 302) and image.convert("L").getextrema()[1] > 20


def test_referee_counts_digits_of_the_class_asked_for():
    def generator(x):  # the class asked for in the first pixel, as one that is wrong for 3
        y = x[:, 100:].argmax(dim=1)
        return torch.where(y == 3, 4, y)[:, None, None, None].float()

    def referee(x):
        return (F.one_hot(x.flatten().long(), 10).float(),)

    assert right_class(generator, referee, 5).tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]


# =========================================== the student ==========================================


def test_the_student_learns_true_labels_and_in_the_second_half_those_of_both_averages(
        watched, digits):
    losses = []
    for n, (step, p) in enumerate(zip(watched.steps, taught(watched))):
        [seen] = [e for e in step if e.name == "Student" and e.training and not e.update]
        y, share = digits.y[find(seen.x[:LABELED], digits.x)], torch.full((LABELED,), 1 / LABELED)
        if n >= 2:
            assert torch.equal(find(seen.x[LABELED:], digits.unlabeled),
                               find(parts(step).together.x[LABELED:LABELED + N], digits.unlabeled))
            y = torch.cat([y, p.argmax(dim=1)])
            share = torch.cat([share, torch.full((N,), 1 / N)])
        log_p = seen.outputs[0].log_softmax(dim=1)
        assert len(log_p) == len(y)
        torch.testing.assert_close(seen.grad, share[:, None] * (log_p.exp() - F.one_hot(y, 10)),
                                   rtol=0.02, atol=1e-4)
        losses.append(-(share * log_p[range(len(y)), y]).sum().item())
    for row, one, other in zip(watched.rows, losses[::2], losses[1::2], strict=True):
        assert float(row["loss/student"]) == pytest.approx((one + other) / 2, rel=1e-3)


@pytest.mark.parametrize("flags, name, decay", [(["--gan-only"], "Perceptron", 0.1),
                                                ([], "Student", 0.05)])
def test_final_weights_are_the_moving_average(flags, name, decay, mnist, monkeypatch):
    monkeypatch.setattr(sgan_mnist, "PERCEPTRON_EMA", 0.1)  # less than at first in any case
    monkeypatch.setattr(sgan_mnist, "STUDENT_EMA", 0.05)
    seen = watch(False, "--data-dir", mnist, "--epochs", 2, *flags)
    assert ("Student" in seen.networks) == (name == "Student")
    states = [e.state for step in seen.steps for e in step if e.update and e.name == name]
    average = averaged(seen.networks[name].at_first, states, decay)
    for key, values in average.items():
        torch.testing.assert_close(seen.final["classifier"][key].double(), values.double(),
                                   rtol=1e-4, atol=1e-5)
    assert same_bits(seen.final["generator"], seen.networks["Generator"].state_dict())


def test_the_student_sees_digits_augmented_and_its_teachers_see_them_plain(mnist, digits):
    seen = watch(True, "--data-dir", mnist, "--dry-run")
    for step in seen.steps[2:]:
        [taught_x] = [e.x for e in step if e.name == "Student" and e.training and not e.update]
        plain = parts(step).together.x[:LABELED + N]
        find(plain[LABELED:], digits.unlabeled)
        assert (taught_x - plain).abs().mean() > 0.01


def test_the_baseline_trains_the_student_on_labeled_digits_alone(mnist, digits, bf16):
    seen = watch(bf16, "--data-dir", mnist, "--supervised-only", "--epochs", 1, "--augmentation", 0)
    assert len(seen.steps) == 2  # as many as with the GAN
    for one, update in seen.steps:
        assert find(one.x, digits.x).sort().values.tolist() == list(range(LABELED))
        assert update.name == "Student"


# ==================================== the perceptron, on its own ==================================


def test_the_student_alone_is_taught_by_its_own_average(mnist, digits, bf16):
    """No pass of perceptron or generator; from the second epoch on labels by the student's average.
    """
    flags = ["--data-dir", mnist, "--augmentation", 0, "--epochs", 2, "--student-only"]
    seen = watch(bf16, *flags)
    assert list(seen.networks) == ["Student"] and len(seen.steps) == 4
    assert not (seen.folder / "samples").exists()
    assert [set(row) & {"loss/lab", "loss/fake"} for row in seen.rows] == [set(), set()]
    passes = [event for event in seen.events if event.training and not event.update]
    assert [len(event.x) for event in passes] == [LABELED, LABELED, LABELED + N, LABELED + N]
    teachers = [event for event in seen.events if not event.training and len(event.x) == N]
    p_mean = torch.full((10,), 0.1).double()
    for teacher, one in zip(teachers, passes, strict=True):  # no evaluation has N images
        p_mean = p_mean.lerp(teacher.outputs[0].softmax(dim=1).mean(dim=0), 0.01)
        label = (teacher.outputs[0] - p_mean.log()).argmax(dim=1)
        if len(one.x) > LABELED:
            x, logits, grad = one.x[LABELED:], one.outputs[0][LABELED:], one.grad[LABELED:]
            assert find(x, digits.unlabeled).equal(find(teacher.x, digits.unlabeled))
            torch.testing.assert_close(grad * N, logits.softmax(dim=1) - F.one_hot(label, 10),
                                       rtol=0.02, atol=1e-4)


def test_the_complement_generator_spreads_its_features_out(mnist, bf16):
    seen = watch(bf16, "--data-dir", mnist, "--epochs", 1, "--generator-loss", "complement",
                 "--gan-only")
    losses = []
    for step in seen.steps:
        of_fakes, of_others = (parts(step).of_fakes.outputs[1], parts(step).of_others.outputs[1])
        cosines = F.cosine_similarity(of_fakes[:, None], of_fakes[None], dim=2)
        apart = cosines[~torch.eye(N, dtype=torch.bool)].square().mean()
        losses.append((of_others.mean(0) - of_fakes.mean(0)).square().mean() + apart)
    assert float(seen.rows[0]["loss/g"]) == pytest.approx((sum(losses) / len(losses)).item(),
                                                          rel=1e-3)


def test_standardise_gives_each_unit_mean_0_and_deviation_1():
    torch.manual_seed(0)
    perceptron, seen = sgan_mnist.Perceptron(), []
    x = torch.rand(4000, 1, 28, 28)
    perceptron.standardise(x)
    for layer in [*perceptron.hidden, perceptron.head]:
        layer.register_forward_hook(lambda layer, inputs, out: seen.append(out.detach()))
    perceptron(x)  # in training mode, with noise drawn anew
    assert len(seen) == 6
    for out in seen:
        assert out.mean(dim=0).abs().max() < 0.15 and (out.std(dim=0) - 1).abs().max() < 0.15


def test_weights_have_the_norm_of_their_scale_and_noise_is_for_training_alone():
    torch.manual_seed(0)
    perceptron = sgan_mnist.Perceptron()
    x = torch.rand(50, 1, 28, 28)
    perceptron.standardise(x)
    for layer in [*perceptron.hidden, perceptron.head]:
        scale = layer.parametrizations.weight.original0
        torch.testing.assert_close(layer.weight.norm(dim=1, keepdim=True), scale)
    assert not torch.equal(perceptron(x)[0], perceptron(x)[0])
    perceptron.eval()
    logits, features, r = perceptron(x)
    assert torch.equal(logits, perceptron(x)[0])
    assert logits.shape == (50, 10) and features.shape == (50, 250) and r.shape == (50,)
    h = x.flatten(1).double()
    for layer in perceptron.hidden:
        h = (h @ layer.weight.double().T + layer.bias.double()).clamp(min=0)
    torch.testing.assert_close(features.double(), h, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(r.double(), logits.double().exp().sum(dim=1).log(),
                               rtol=1e-5, atol=1e-5)
