"""The shipped generators of digits, and the recipes that train them."""

import pytest
import torch

from priors import DigitGenerator, digits, held_out_digits
from priors.digit_generators import CONFIG, FILE, GANTraining, VAETraining
from rtb_inverse import Posterior, fit, importance, smc
from rtb_inverse.cli import run
from rtb_inverse.diagnostics import energy_distance
from rtb_inverse.particles import Particles
from tasks import ClassConstraint, Inpainting


@pytest.mark.parametrize("name", ["vae", "gan"])
def test_shipped_generators_draw_digits(name, generator):
    """Half as far from held-out digits as independent pixels of the same means and spreads are, and in [-1, 1]."""
    prior = DigitGenerator.prior(f"priors/digits_{name}", steps=10)
    x = prior.decode(prior.sample(1000, generator))
    assert x.shape == (1000, 1, 8, 8) and float(x.abs().max()) <= 1
    train, real = digits()[0].flatten(1), held_out_digits().flatten(1)
    pixels = train.mean(0) + train.std(0) * torch.randn((1000, 64), generator=generator)
    ours, theirs = (float(energy_distance(z.flatten(1)[:, None], real[:, None])) for z in (x, pixels.clamp(-1, 1)))
    assert ours < theirs / 2
    assert float(x.std(0).mean()) > 0.6 * float(real.std(0).mean())  # one picture over and over has none


@pytest.mark.parametrize("name", ["vae", "gan"])
def test_inpainting_in_noise_space(name, generator):
    """Guided, untrained: a fifth of the prior's distance from the evidence at most (0.05 and 0.11 were seen); the evidence is that of SMC
    with four times as many particles."""
    prior, problem = DigitGenerator.prior(f"priors/digits_{name}", steps=20), Inpainting((1, 8, 8), mask="box", noise_std=0.3)
    guided, plain = Posterior(prior, problem, width=32), Posterior(prior, problem, start="prior", width=32)
    y = problem.simulate(prior.decode(prior.sample(12, generator)), generator)
    log_z = smc(guided, y, 256, generator).log_z.mean()
    near, far = (log_z - importance(posterior, y, 64, generator).log_w.mean() for posterior in (guided, plain))
    assert 0 < float(near) < 0.2 * float(far)


@pytest.mark.parametrize("training", [VAETraining, GANTraining])
def test_the_recipes_run_and_save(training, tmp_path):
    options = [f"--model={training.__module__}.{training.__name__}", f"--model.output={tmp_path}", "--model.latent=3", "--model.width=8"]
    options += ["--data=priors.DigitsData", "--data.batch_size=16", "--trainer.max_steps=4", "--trainer.logger=false"]
    options += ["--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu", "--trainer.limit_val_batches=0"]
    run(["fit", *options, "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"])
    saved = DigitGenerator.from_pretrained(tmp_path)
    assert saved.latent == 3 and saved(torch.zeros(2, 3)).shape == (2, 1, 8, 8)


def test_the_vae_learns(tmp_path):
    """A hundred steps lower what it minimises."""
    x = digits()[0][:256]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        training = VAETraining(str(tmp_path), latent=4, width=32)
        optimizer, before = torch.optim.Adam(training.parameters(), 3e-3), float(training.loss(x).detach())
        for _ in range(100):
            loss = training.loss(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert float(training.loss(x).detach()) < 0.7 * before


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG):
        DigitGenerator.prior(tmp_path)
    DigitGenerator(latent=2, width=4).save_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes(b"pickle")
    with pytest.raises(ValueError, match="safetensors"):
        DigitGenerator.prior(tmp_path)
    (tmp_path / CONFIG).write_text('{"latent": 2}')
    with pytest.raises(ValueError, match="must hold latent and width, got latent"):
        DigitGenerator.prior(tmp_path)
    with pytest.raises(ValueError, match="latent"):
        DigitGenerator(latent=0)


def test_a_class_starts_at_the_prior_and_references_are_to_be_asked_for():
    prior, problem = DigitGenerator.prior("priors/digits_vae", steps=3), ClassConstraint(lambda x: x.flatten(1)[:, :3])
    default, guided = Posterior(prior, problem, width=8), Posterior(prior, problem, "guided", width=8)
    assert (default.start, default.references) == ("prior", None)
    assert guided.start == "guided" and guided.references is not None


@pytest.mark.slow
def test_long_training_on_classes_comes_near_the_posterior():
    """600 steps at the default learning rate: without the norm of what the perceptron sees, the ELBO stays 2.3 nats off. A log Z beyond
    4.5 standard errors in one of 10 classes has a probability below 1e-4."""
    x, label = digits()
    means = torch.stack([x[label == k].mean(0) for k in range(10)]).flatten(1)
    prior = DigitGenerator.prior("priors/digits_vae", steps=20)
    problem = ClassConstraint(lambda x: -torch.cdist(x.flatten(1), means).square())
    posterior = fit(Posterior(prior, problem), 600, 0, warm_start=1.0, bounds=0, progress=False)
    y = posterior.check_y(torch.arange(10))
    draws = importance(posterior, y, 500, torch.Generator().manual_seed(1))
    bank = prior.decode(prior.sample(50_000, torch.Generator().manual_seed(2)))
    weighted = Particles(bank[:, None].expand(-1, 10, *bank.shape[1:]), problem.log_likelihood(bank[:, None], y))
    error = (draws.log_z_error.square() + weighted.log_z_error.square()).sqrt()
    assert float(((draws.log_z - weighted.log_z) / error).abs().max()) < 4.5
    assert float((weighted.log_z - draws.log_w.mean(0)).mean()) < 1.5
