"""The shipped prior of MNIST and the shipped classifier, without the data."""

import shutil
from pathlib import Path

import pytest
import torch

from priors import DiffusersPrior, MNISTClassifier, MNISTData, mnist

CLASSIFIER = "priors/mnist_classifier"


@pytest.fixture(scope="module")
def prior():
    return DiffusersPrior.from_pretrained("priors/mnist")


@pytest.fixture(scope="module")
def classifier():
    return MNISTClassifier.from_pretrained(CLASSIFIER)


@pytest.fixture(scope="module")
def draws(prior):
    return prior.sample(32, torch.Generator().manual_seed(0))


def sure(classifier, x):
    return float((classifier(x.clamp(-1, 1)).softmax(1).amax(1) > 0.9).float().mean())


def test_the_prior_is_small():
    """What a clone has to carry: the network and the tables, with the draws it keeps in half precision."""
    assert sum(file.stat().st_size for file in Path("priors/mnist").rglob("*.safetensors")) <= 12e6


def test_draws_are_digits(prior, classifier, draws):
    """Sure of 81 % of 500 draws, so of 57 % of 32 but for 3.4 standard errors; of noise of the same mean and variance it is not."""
    assert prior.shape == draws.shape[1:] == (1, 28, 28)
    assert torch.isfinite(draws).all()
    assert sure(classifier, draws) > 0.57
    assert len(classifier(draws.clamp(-1, 1)).argmax(1).unique()) >= 7
    noise = draws.mean() + draws.std() * torch.randn(draws.shape, generator=torch.Generator().manual_seed(1))
    assert sure(classifier, noise) < 0.2


def test_the_recommended_steps_draw_better_than_too_few(prior, classifier, draws):
    few = DiffusersPrior.from_pretrained("priors/mnist", steps=2).sample(32, torch.Generator().manual_seed(0))
    assert torch.isfinite(few).all()
    assert sure(classifier, few) < sure(classifier, draws)


def test_the_measured_error_is_a_share_of_the_variance(prior):
    """r_t^2 grows with the noise, from nearly nothing to the variance of the draws."""
    total = prior.error.variance.flatten(1).sum(1)
    assert prior.error.variance.shape[1:] == (1, 28, 28)
    assert prior.error.factor.shape[1] == 784
    assert 0 < float(total[0]) < 0.1 * float(total[-1])
    assert 784 * 0.1 < float(total[-1]) < 784 * 0.6


def test_logits_and_their_gradient(classifier):
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x.requires_grad_()
    logits = classifier(x)
    assert logits.shape == (3, 10)
    assert torch.equal(logits, classifier.head(classifier.features(x)))
    assert classifier.features(x).shape == (3, classifier.num_features)
    (slope,) = torch.autograd.grad(logits[:, 0].sum(), x)
    assert bool((slope.flatten(1).abs().sum(1) > 0).all())
    assert torch.allclose(classifier(x[:1])[0], logits[0], atol=1e-5)  # one digit's logits do not depend on the others


def test_the_classifier_refuses_other_shapes(classifier):
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 28, 28\)"):
        classifier(torch.zeros(2, 1, 8, 8))


def test_a_saved_classifier_is_the_same(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    again = MNISTClassifier.from_pretrained(tmp_path)
    x = torch.zeros(1, 1, 28, 28)
    assert torch.equal(again(x), classifier(x))
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_weights_that_are_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        MNISTClassifier.from_pretrained(tmp_path)
    shutil.copytree(CLASSIFIER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "classifier.safetensors").write_bytes((tmp_path / "classifier.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        MNISTClassifier.from_pretrained(tmp_path)


def test_without_the_data(tmp_path):
    for read in (mnist, MNISTData):
        with pytest.raises(FileNotFoundError, match=r"folder: no MNIST in .*, expected MNIST/raw below it"):
            read(str(tmp_path))
    with pytest.raises(ValueError, match="part must be one of train, held_out, test, got 'all'"):
        mnist(tmp_path, "all")


def write_idx(folder, images, labels):
    """A small MNIST in its own file format."""
    (raw := folder / "MNIST" / "raw").mkdir(parents=True)
    for prefix in ("train", "t10k"):
        for name, data in {"images-idx3": images, "labels-idx1": labels}.items():
            head = bytes([0, 0, 8, data.ndim]) + b"".join(size.to_bytes(4, "big") for size in data.shape)
            (raw / f"{prefix}-{name}-ubyte").write_bytes(head + data.numpy().tobytes())


def test_the_data_module(tmp_path, monkeypatch):
    """Training and held-out images do not overlap, and lie in [-1, 1]."""
    images = torch.arange(40, dtype=torch.uint8)[:, None, None].expand(40, 28, 28).contiguous()
    images[:, 0, 0] = 255
    labels = torch.arange(40, dtype=torch.uint8) % 10
    write_idx(tmp_path, images, labels)
    monkeypatch.setattr("priors.mnist_data.PARTS", {"train": (True, slice(None, -10)), "held_out": (True, slice(-10, None))})
    data = MNISTData(str(tmp_path), batch_size=6, held_out=4)
    x, c = map(torch.cat, zip(*data.train_dataloader(), strict=True))
    assert x.shape == (30, 1, 28, 28)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    index = ((x[:, 0, 1, 1] + 1) * 127.5).round().long()
    assert sorted(index.tolist()) == list(range(30))
    assert torch.equal(index % 10, c)
    ((x, c),) = data.val_dataloader()
    assert ((x[:, 0, 1, 1] + 1) * 127.5).round().long().tolist() == [30, 31, 32, 33]
