"""Inside sgan_mnist.py: what passes through which network, which losses move it, and by how much.

Training runs are watched through torch's global hooks; nothing in the script is replaced.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import (register_optimizer_step_post_hook,
                                   register_optimizer_step_pre_hook)

import sgan_mnist
from common import balanced_split
from tests.conftest import read_csv, read_part, same_bits, train

N, LABELED, GAN_WEIGHT = 160, 10, 0.7  # unlabeled images and labeled ones in a step
NETWORKS = (sgan_mnist.Perceptron, sgan_mnist.Generator, sgan_mnist.Student)


def weights_of(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def gradients_of(network):
    return {name: None if p.grad is None else p.grad.clone()
            for name, p in network.named_parameters()}


def changed(before, after):
    """Names of the tensors that are not the same bit for bit, None included."""
    return {name for name, old in before.items()
            if (old is None) != (after[name] is None)
            or (old is not None and not torch.equal(old, after[name]))}


def watch(*flags, out_dir="runs"):
    """A run in this process: events, in order, of each network's passes and updates.

    A pass has the network's name, whether it trains, the input, the outputs, and under grad what
    comes back to the first output. An update has the name, the learning rate, and of each network
    the names of weights that it moves and of gradients that are new since the update before.
    """
    networks, events, latest = {}, [], {}

    def before_forward(module, inputs):
        name = type(module).__name__
        if isinstance(module, NETWORKS) and module.training and name not in networks:
            networks[name] = module
            module.at_first = {n: t.clone() for n, t in module.state_dict().items()}
            latest[name] = gradients_of(module)

    def after_forward(module, inputs, outputs):
        if not isinstance(module, NETWORKS):
            return
        name = type(module).__name__
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
            before={n: weights_of(net) for n, net in networks.items()},
            new_gradients={n: changed(latest[n], gradients_of(net))
                           for n, net in networks.items()}))
        latest.update({n: gradients_of(net) for n, net in networks.items()})

    def after_update(optimizer, args, kwargs):
        update = events[-1]
        update.moved = {n: changed(update.before[n], weights_of(net))
                        for n, net in networks.items()}
        update.state = {n: t.clone() for n, t in networks[update.name].state_dict().items()}

    handles = [register_module_forward_pre_hook(before_forward),
               register_module_forward_hook(after_forward),
               register_optimizer_step_pre_hook(before_update),
               register_optimizer_step_post_hook(after_update)]
    try:
        folder, results = train("sgan_mnist", "--device", "cpu", "--num-labeled", LABELED,
                                "--batch-size", N, "--gan-weight", GAN_WEIGHT, *flags,
                                out_dir=out_dir)
    finally:
        for handle in handles:
            handle.remove()
    trained = [e for e in events if e.training]
    starts = [i for i, e in enumerate(trained) if e.name == "Generator" and not e.update]
    of_student = [e for e in trained if e.name == "Student"]
    return SimpleNamespace(
        networks=networks, events=events, rows=read_csv(folder / "metrics.csv"), results=results,
        final=torch.load(folder / "final.pt", weights_only=True),
        gan_steps=[[e for e in trained[i:j] if e.name != "Student"]
                   for i, j in zip(starts, [*starts[1:], len(trained)])],
        student_steps=list(zip(of_student[::2], of_student[1::2])))


@pytest.fixture(scope="module")
def digits(mnist):
    """Labeled images and labels, and unlabeled images, of the run that the tests watch."""
    x, y = read_part(mnist, "train")
    labeled, _, others = balanced_split(y, LABELED, (len(y) - LABELED) // 2, 10, seed=0)
    return SimpleNamespace(x=x[labeled], y=y[labeled], unlabeled=x[torch.cat([labeled, others])])


@pytest.fixture(scope="module")
def watched(mnist, tmp_path_factory):
    """An epoch of the GAN and two of the student; digits stay as they are in the files."""
    return watch("--data-dir", mnist, "--augmentation", 0, "--epochs", 1, "--student-epochs", 2,
                 "--lr", 0.002, out_dir=tmp_path_factory.mktemp("watched") / "runs")


def find(images, known):
    """The index in known of each image, which is there up to rounding."""
    distance, index = torch.cdist(images.double().flatten(1), known.double().flatten(1)).min(dim=1)
    assert (distance < 0.01).all()
    return index


# ============================================= the GAN ============================================


def test_a_step_of_the_gan_passes_all_images_at_once_and_others_for_the_generator(watched, digits):
    assert len(watched.gan_steps) == 2  # of 445 unlabeled images in batches of 160
    seen, others = [], []
    for step in watched.gan_steps:
        assert [(e.name, e.update) for e in step] == [
            ("Generator", False), ("Perceptron", False), ("Perceptron", True),
            ("Perceptron", False), ("Perceptron", False), ("Generator", True)]
        fakes, together, _, of_fakes, of_others, _ = step
        x_lab, x_unl, x_fake = together.x.split([LABELED, N, N])
        assert find(x_lab, digits.x).sort().values.tolist() == list(range(LABELED))
        seen.append(find(x_unl, digits.unlabeled))
        others.append(find(of_others.x, digits.unlabeled))
        for x in (x_fake, of_fakes.x):
            torch.testing.assert_close(x.double(), fakes.outputs[0], rtol=0, atol=1e-6)
        assert 0 <= fakes.x.min() and fakes.x.max() < 1 and fakes.x.std() > 0.25  # uniform
    for indices in (seen, others):  # no image twice in an epoch
        assert len(torch.cat(indices).unique()) == 2 * N
    assert not torch.equal(seen[0], others[0])


def real_gradient(logits, target):
    """That of -log D(x), target 1, or -log(1 - D(x)), target 0, by the logits: (N, K)."""
    z = logits.exp().sum(dim=1, keepdim=True)
    return (z / (1 + z) - target) * logits.softmax(dim=1)


def test_the_perceptron_minimises_the_three_losses(watched, digits):
    for step in watched.gan_steps:
        together = step[1]
        logits_lab, logits_unl, logits_fake = together.outputs[0].split([LABELED, N, N])
        y = digits.y[find(together.x[:LABELED], digits.x)]
        expected = torch.cat([
            (logits_lab.softmax(dim=1) - F.one_hot(y, 10)) / LABELED,
            GAN_WEIGHT * 0.5 * real_gradient(logits_unl, 1) / N,
            GAN_WEIGHT * 0.5 * real_gradient(logits_fake, 0) / N])
        # the logits and their gradient may be bfloat16, of 8 bits
        torch.testing.assert_close(together.grad, expected, rtol=0.02, atol=1e-5)


def test_updates_move_their_own_network_and_never_the_hidden_scales(watched):
    scales = {f"hidden.{i}.parametrizations.weight.original0" for i in range(5)}
    for step in watched.gan_steps:
        for update in (step[2], step[5]):
            own = set(weights_of(watched.networks[update.name])) - scales
            for name in ("Perceptron", "Generator"):
                assert update.moved[name] == (own if name == update.name else set())
                assert update.new_gradients[name] == (own if name == update.name else set())
            assert update.lr == 0.002  # constant


def test_logged_losses_of_the_gan_are_those_of_the_outputs(watched, digits):
    logged = []
    for _, together, _, of_fakes, of_others, _ in watched.gan_steps:
        log_p = together.outputs[0].log_softmax(dim=1)
        y = digits.y[find(together.x[:LABELED], digits.x)]
        z_unl, z_fake = together.outputs[0].exp().sum(dim=1)[LABELED:].split(N)
        gap = of_others.outputs[1].mean(dim=0) - of_fakes.outputs[1].mean(dim=0)
        logged.append({"loss/lab": -log_p[range(LABELED), y].mean(),
                       "loss/unl": (1 / z_unl).log1p().mean(), "loss/fake": z_fake.log1p().mean(),
                       "loss/g": gap.square().mean(),
                       "monitor/p_real_unl": (z_unl / (1 + z_unl)).mean(),
                       "monitor/p_real_fake": (z_fake / (1 + z_fake)).mean()})
    row = watched.rows[0]
    assert set(logged[0]) == {name for name, value in row.items() if "/" in name and value}
    for name in logged[0]:
        mean = sum(values[name].item() for values in logged) / 2
        assert float(row[name]) == pytest.approx(mean, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("loss", ["feature-matching", "fool", "complement"])
@pytest.mark.parametrize("form", ["logsumexp", "fake-class", "sigmoid-head"])
def test_the_generator_minimises_what_the_flags_say(loss, form, mnist):
    seen = watch("--data-dir", mnist, "--student-epochs", 0, "--dry-run",
                 "--generator-loss", loss, "--real-logit", form)
    total = 0
    for _, together, update, of_fakes, of_others, _ in seen.gan_steps:
        fake, real = of_fakes.outputs[1], of_others.outputs[1]
        value = (real.mean(dim=0) - fake.mean(dim=0)).square().mean()
        if loss == "complement":
            cosines = F.cosine_similarity(fake[:, None], fake[None], dim=2)
            value = value + cosines[~torch.eye(N, dtype=torch.bool)].square().mean()
        if loss == "fool":  # -log D(G(z))
            value = -of_fakes.outputs[2].sigmoid().log().mean()
        total += value.item() / 2
        extra = {n for n in update.moved["Perceptron"] if n.startswith("extra")}
        assert bool(extra) == (form != "logsumexp")
    assert float(seen.rows[0]["loss/g"]) == pytest.approx(total, rel=1e-3)


# =========================================== the student ==========================================


def test_the_student_learns_the_labels_of_the_averaged_perceptron(watched, digits):
    asked = [e for e in watched.events if e.name == "Perceptron" and not e.training
             and len(e.x) == len(digits.unlabeled)]
    assert len(asked) == 1  # validation and test are of other sizes
    taught = torch.empty(len(digits.unlabeled), dtype=torch.long)
    taught[find(asked[0].x, digits.unlabeled)] = asked[0].outputs[0].argmax(dim=1)
    assert len(watched.student_steps) == 4
    for one, _ in watched.student_steps:
        y = torch.cat([digits.y[find(one.x[:LABELED], digits.x)],
                       taught[find(one.x[LABELED:], digits.unlabeled)]])
        expected = one.outputs[0].softmax(dim=1) - F.one_hot(y, 10)
        expected[:LABELED] /= LABELED
        expected[LABELED:] /= N
        torch.testing.assert_close(one.grad, expected, rtol=0.02, atol=1e-4)


def test_the_students_learning_rate_falls_and_nothing_else_moves(watched):
    assert [update.lr for _, update in watched.student_steps] == pytest.approx(
        [0.002, 0.002, 0.002, 0.001])
    for _, update in watched.student_steps:
        assert update.moved == {"Generator": set(), "Perceptron": set(),
                                "Student": set(weights_of(watched.networks["Student"]))}


def averaged(network, states, decay):
    """The moving average of a network's state after each step, in float64."""
    average = network.at_first
    for n, state in enumerate(states, 1):
        share = min(decay, (1 + n) / (10 + n))
        for name, now in state.items():
            average[name] = (share * average[name].double() + (1 - share) * now.double()
                             if now.is_floating_point() else now)
    return average


def test_final_weights_are_the_moving_average(watched, mnist):
    alone = watch("--data-dir", mnist, "--epochs", 2, "--student-epochs", 0)
    for seen, name, decay, updates in (
            (watched, "Student", 0.99, [update for _, update in watched.student_steps]),
            (alone, "Perceptron", 0.9999, [step[2] for step in alone.gan_steps])):
        average = averaged(seen.networks[name], [update.state for update in updates], decay)
        assert seen.final["network"] == name and set(seen.final["classifier"]) == set(average)
        for key, weights in seen.final["classifier"].items():
            torch.testing.assert_close(weights.double(), average[key].double(),
                                       rtol=1e-4, atol=1e-5)
        generator = seen.networks["Generator"].state_dict()
        assert same_bits(seen.final["generator"], generator)


def test_the_baseline_trains_the_student_on_labeled_digits_alone(mnist, digits):
    seen = watch("--data-dir", mnist, "--supervised-only", "--student-epochs", 1,
                 "--augmentation", 0)
    assert set(seen.networks) == {"Student"} and "generator" not in seen.final
    for one, _ in seen.student_steps:
        assert find(one.x, digits.x).sort().values.tolist() == list(range(LABELED))


# ==================================== the perceptron, on its own ==================================


def test_standardise_gives_each_unit_mean_0_and_deviation_1():
    torch.manual_seed(0)
    perceptron, seen = sgan_mnist.Perceptron("logsumexp"), []
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
    perceptron = sgan_mnist.Perceptron("logsumexp")
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


@pytest.mark.parametrize("form", ["logsumexp", "fake-class", "sigmoid-head"])
def test_real_logit_of_each_form(form):
    """Against the softmax of K + 1 classes, of K and a zero, and against the plain linear unit."""
    torch.manual_seed(0)
    perceptron = sgan_mnist.Perceptron(form).eval()
    with torch.no_grad():
        logits, features, r = perceptron(torch.rand(16, 1, 28, 28))
        extra = perceptron.extra(features) if form != "logsumexp" else torch.zeros(16, 1)
    if form == "sigmoid-head":
        real = extra[:, 0].double().sigmoid()
    else:
        real = 1 - torch.cat([logits, extra], dim=1).double().softmax(dim=1)[:, -1]
    torch.testing.assert_close(r.double().sigmoid(), real, rtol=1e-5, atol=1e-6)
