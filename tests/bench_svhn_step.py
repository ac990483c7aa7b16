"""Images a second of a training step of sgan_svhn.py, and of the SVHN article's way of doing it.

    python tests/bench_svhn_step.py

Both train the same two networks with batches of the same sizes, in turn, in one process. The
article's way: float32 in the default memory layout, plain Adam, no augmentation, no EMA; labeled
and unlabeled images pass as one batch, of which a mask picks the labeled loss; one-sided label
smoothing; both gradients from the same forward passes; the number of right answers read back at
every step. Ours does more work in a step: it augments all images, asks the EMA classifier about
the unlabeled ones, updates the generator through the new classifier, and averages. The ceiling is
that of bench_mnist_step.py.
"""

import time

import torch
import torch.nn.functional as F
from bench_mnist_step import compare  # makes the scripts importable as well

import sgan_svhn

BATCH, STEPS, NUM_LABELED = 100, 15, 1000


def articles(device):
    """Unlabeled images a second of STEPS plain steps, on random images."""
    classifier = sgan_svhn.Classifier("logsumexp").to(device)
    generator = sgan_svhn.Generator().to(device)
    opt_d = torch.optim.Adam(classifier.parameters(), 3e-3)
    opt_g = torch.optim.Adam(generator.parameters(), 3e-3)
    x_lab = torch.rand(min(NUM_LABELED, sgan_svhn.LABELED_BATCH), 3, 32, 32, device=device)
    y = torch.randint(10, (len(x_lab) + BATCH,), device=device)
    mask = (torch.arange(len(y), device=device) < len(x_lab)).float()
    x_all = torch.rand(BATCH * STEPS, 3, 32, 32, device=device)
    started = time.perf_counter()
    for x_unl in x_all.split(BATCH):
        x_fake = generator(torch.randn(sgan_svhn.FAKE_BATCH, sgan_svhn.LATENT_DIM, device=device))
        logits, features, r = classifier(torch.cat([x_lab, x_unl]))
        _, features_fake, r_fake = classifier(x_fake)
        loss_lab = (F.cross_entropy(logits, y, reduction="none") * mask).sum() / mask.sum()
        loss_real = F.binary_cross_entropy_with_logits(r, torch.full_like(r, 0.9))
        loss_fake = F.binary_cross_entropy_with_logits(r_fake, torch.zeros_like(r_fake))
        loss_g = (features.mean(0) - features_fake.mean(0)).abs().mean()
        opt_d.zero_grad()
        opt_g.zero_grad()
        loss_g.backward(inputs=list(generator.parameters()), retain_graph=True)
        (loss_lab + loss_real + loss_fake).backward(inputs=list(classifier.parameters()))
        opt_d.step()
        opt_g.step()
        ((logits.argmax(dim=1) == y) * mask).sum().item()
    return BATCH * STEPS / (time.perf_counter() - started)


if __name__ == "__main__":
    compare(sgan_svhn, ["--warmup-steps", "0"], articles, sgan_svhn.Classifier("logsumexp"),
            sgan_svhn.FAKE_BATCH, (3, 32, 32), BATCH, NUM_LABELED, STEPS)
