"""Latent diffusion: a tiny network in the latents of a tiny autoencoder, both with random weights."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel, VQModel
from einops import rearrange
from lightning.pytorch import Trainer
from torch.utils.data import TensorDataset

import rtb_inverse.posterior
from priors import LatentPrior, MNISTClassifier, digits
from priors.autoencoders import AutoencoderTraining, LatentData
from priors.tensor_data import TensorData
from rtb_inverse import Posterior, evaluate, fit, importance, path_log_prob, rollout, simulate_observations
from rtb_inverse.guidance import guidance
from rtb_inverse.lightning import quiet
from rtb_inverse.networks import on_grid
from rtb_inverse.prior_training import PriorTraining
from tasks import Inpainting

FLOAT32 = {"rtol": 1e-3, "atol": 1e-3}  # convolutions of batches of other sizes
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (4, 8)}
COMMON = BLOCKS | {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "norm_num_groups": 4}


def autoencoder(kind="kl", **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderKL(**COMMON, **options) if kind == "kl" else VQModel(**COMMON, num_vq_embeddings=16, **options)
    with torch.no_grad():  # so that what it decodes is far from constant
        model.decoder.conv_out.weight.mul_(10)
    return model


def unet(channels=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return UNet2DModel(
            sample_size=4, in_channels=channels, out_channels=channels, block_out_channels=(8,), down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",), layers_per_block=1, norm_num_groups=4,
        )  # fmt: skip


def latent_prior(kind="kl", **options):
    return LatentPrior(unet(), DDPMScheduler(), autoencoder(kind, scaling_factor=0.5), steps=3, **options)


@pytest.fixture(params=["kl", "vq"])
def prior(request):
    return latent_prior(request.param)


def test_x_is_the_decoded_rescaled_latent(prior, generator):
    z = torch.randn((3, 2, 2, 4, 4), generator=generator)
    assert prior.decodes and prior.shape == (2, 4, 4) and prior.data_shape == (1, 8, 8)
    x = prior.decode(z)
    torch.testing.assert_close(x[2, 1], prior.autoencoder.decode(z[2, 1][None] / 0.5).sample[0], **FLOAT32)
    prior.chunk_size = 1
    torch.testing.assert_close(prior.decode(z), x, **FLOAT32)
    assert not any(p.requires_grad for p in prior.parameters()) and not prior.train().autoencoder.training


def test_latents_of_images_have_the_chains_scale(prior, generator):
    x = torch.randn((3, 1, 8, 8), generator=generator)
    code = prior.autoencoder.encode(x)
    expected = code.latents if hasattr(code, "latents") else code.latent_dist.mean
    torch.testing.assert_close(prior.encode(x), 0.5 * expected)


def test_a_shift_is_undone(generator):
    prior = LatentPrior(unet(), DDPMScheduler(), autoencoder(scaling_factor=0.5, shift_factor=0.3), steps=3)
    z = torch.randn((2, 2, 4, 4), generator=generator)
    torch.testing.assert_close(prior.decode(z), prior.autoencoder.decode(z / 0.5 + 0.3).sample)
    x = torch.randn((2, 1, 8, 8), generator=generator)
    torch.testing.assert_close(prior.encode(x) / 0.5 + 0.3, prior.autoencoder.encode(x).latent_dist.mean)


def test_a_posterior_in_latents_for_a_likelihood_of_pixels(prior, generator):
    posterior = Posterior(prior, Inpainting(prior.data_shape, "half", noise_std=0.2))
    assert posterior.start == "guided" and posterior.shape == (2, 4, 4)
    held = simulate_observations(posterior, 4, generator)
    assert held.x.shape == (4, 1, 8, 8)
    seen = posterior.log_likelihood(torch.zeros((1, 4, 2, 4, 4)), held.y)
    torch.testing.assert_close(
        seen[0], posterior.problem.log_likelihood(prior.decode(torch.zeros((1, 2, 4, 4)))[None], held.y)[0], **FLOAT32
    )
    report = evaluate(posterior, held, 4, generator)
    assert report.draws.x.shape == (4, 4, 1, 8, 8)
    assert all(torch.isfinite(torch.tensor(n.value)) for n in report.numbers.values())
    fit(posterior, 4, seed=0, progress=False, bounds=0, pool=16, states=8, observations=2, draws=2, warm_start=0.5)
    assert evaluate(posterior, held, 4, generator).numbers["elbo"].value != report.numbers["elbo"].value


def test_a_second_look_in_latents_is_for_those_who_ask(prior, generator):
    problem = Inpainting(prior.data_shape, "half", noise_std=0.2)
    assert Posterior(prior, problem).local_gate is None
    posterior = Posterior(prior, problem, second_look=True)
    posterior.looks.fill_(True)  # three steps, all outside the levels at which it pays
    posterior.local_gate.data.fill_(0.4)
    y = simulate_observations(posterior, 2, generator).y
    paths = rollout(posterior, 3, y, generator)
    torch.testing.assert_close(path_log_prob(posterior, paths, 4), paths.log_prob, rtol=1e-3, atol=1e-2)
    posterior.local_gate.data.fill_(0.0)
    assert (path_log_prob(posterior, paths) - paths.log_prob).abs().min() > 1e-3  # it had moved the steps


def test_references_in_latents(prior, generator):
    """Their likelihood is that of their decoded images."""
    problem = Inpainting(prior.data_shape, "half", noise_std=0.2)
    prior.keep_draws(40, generator)
    posterior = Posterior(prior, problem)
    posterior.draws.regressed.fill_(0.4)
    posterior.draws.share.fill_(0.3)
    posterior.draws.temper.fill_(0.1)
    y = simulate_observations(posterior, 2, generator).y
    log_lik = posterior.draws.told(posterior.problem, y)[1]
    off = log_lik - posterior.log_likelihood(posterior.draws.x[:, None], y)
    torch.testing.assert_close(off, off[:1].expand_as(off), rtol=1e-3, atol=1e-2)
    paths = rollout(posterior, 3, y, generator)
    torch.testing.assert_close(path_log_prob(posterior, paths, 4), paths.log_prob, rtol=1e-3, atol=1e-2)


def test_saved_and_loaded(prior, tmp_path, generator):
    posterior = Posterior(prior, Inpainting(prior.data_shape, "half", noise_std=0.2))
    posterior.save_pretrained(tmp_path)
    again = Posterior.from_pretrained(tmp_path)
    assert isinstance(again.prior, LatentPrior) and again.prior.scaling_factor == 0.5
    y = simulate_observations(posterior, 2, generator).y
    path = rollout(posterior, 3, y, generator)
    torch.testing.assert_close(path_log_prob(again, path), path_log_prob(posterior, path), rtol=0, atol=0)
    torch.testing.assert_close(again.decode(path.x_0), posterior.decode(path.x_0), rtol=0, atol=0)
    assert LatentPrior.from_pretrained(tmp_path / "prior", steps=5).steps == 5


def test_a_chain_from_the_prior_is_shown_one_gradient(prior, generator):
    """It is no guide there, and is asked at every state of the training."""
    problem = Inpainting(prior.data_shape, "half", noise_std=0.2)
    posterior = Posterior(prior, problem, start="prior")
    assert posterior.guide.covariance is None and posterior.guide.iterations == 1 and not posterior.exact_end
    y = simulate_observations(posterior, 2, generator).y
    x, t, s = torch.randn((3, 2, *prior.shape), generator=generator), prior.times[0].expand(3, 1), prior.times[1].expand(3, 1)
    torch.testing.assert_close(posterior.transition(x, t, s, y).mean, prior.transition(x, t, s).mean)


def test_pixels_become_channels_of_a_coarser_grid():
    condition = torch.arange(2 * 3 * 8 * 12.0).reshape(2, 3, 8, 12)
    coarse = on_grid(condition, torch.Size((4, 4)))
    assert coarse.shape == (2, 18, 4, 4)
    blocks = rearrange(condition, "b c (h p) (w q) -> b (c p q) h w", p=2, q=3)
    assert torch.equal(coarse.sort(1).values, blocks.sort(1).values)
    assert on_grid(condition, torch.Size((8, 12))) is condition
    with pytest.raises(ValueError, match=r"condition must lie on x's grid \(3, 4\) or a multiple of it, got \(8, 12\)"):
        on_grid(condition, torch.Size((3, 4)))


def test_bad_input(tmp_path):
    with pytest.raises(TypeError, match="autoencoder must be an AutoencoderKL or a VQModel, got UNet2DModel"):
        LatentPrior(unet(), DDPMScheduler(), unet())
    with pytest.raises(ValueError, match="autoencoder must have the network's 3 latent channels, got 2"):
        LatentPrior(unet(3), DDPMScheduler(), autoencoder())
    with pytest.raises(ValueError, match="scaling_factor must be"):
        latent_prior(scaling_factor=-1.0)
    without = autoencoder()
    without.register_to_config(scaling_factor=None)
    with pytest.raises(ValueError, match="scaling_factor must be given, got None: the autoencoder's config has none"):
        LatentPrior(unet(), DDPMScheduler(), without)
    prior = latent_prior()
    prior.save_pretrained(tmp_path / "left_out")
    config = tmp_path / "left_out" / "vae" / "config.json"
    config.write_text(json.dumps({name: value for name, value in json.loads(config.read_text()).items() if name != "scaling_factor"}))
    with pytest.raises(ValueError, match=r"scaling_factor must be given, got None: .* \(0.18215 is Stable Diffusion 1's\)"):
        LatentPrior.from_pretrained(tmp_path / "left_out")
    assert LatentPrior.from_pretrained(tmp_path / "left_out", scaling_factor=0.7).scaling_factor == 0.7
    with pytest.raises(ValueError, match=r"x must have shape"):
        prior.encode(torch.zeros((2, 1, 4, 4)))
    super(LatentPrior, prior).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no autoencoder, expected a folder vae/ or vqvae/ beside unet/"):
        LatentPrior.from_pretrained(tmp_path)


def images():
    return TensorData(*(TensorDataset(digits()[0][part]) for part in (slice(64), slice(64, 80))), batch_size=16)


def test_the_recipes_make_a_prior(tmp_path):
    """Autoencoder, then the network of its latents, which have mean 0 and variance 1 over the held-out images."""
    options = {"max_steps": 4, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        Trainer(**options).fit(AutoencoderTraining(COMMON, str(tmp_path)), images())
        data = LatentData(images(), str(tmp_path), batch_size=16)
        Trainer(**options).fit(PriorTraining(unet(), DDPMScheduler(), str(tmp_path), steps=3, error_draws=16), data)
    z = data.val_set.tensors[0]
    assert z.shape == (16, 2, 4, 4) and abs(float(z.mean())) < 0.1 and abs(float(z.std()) - 1) < 0.1
    prior = LatentPrior.from_pretrained(tmp_path)
    assert prior.decode(prior.sample(2)).shape == (2, 1, 8, 8)
    latents = data.train_set.tensors[0]  # each a draw about the code of its image
    code = prior.autoencoder.encode(digits()[0][:64]).latent_dist
    off = (latents / prior.scaling_factor + prior.shift_factor - code.mean) / code.std
    assert abs(float(off.mean())) < 4 / off.numel() ** 0.5 and abs(float(off.square().mean()) - 1) < 4 * (2 / off.numel()) ** 0.5


def test_the_autoencoders_loss(tmp_path):
    """Where the decoder says 0 and the code is N(0, I), the misfit of x alone; with code N(m, 1), |m|^2 / 2 more."""
    training = AutoencoderTraining(autoencoder(), str(tmp_path), std=0.5, kl=2.0)
    with torch.no_grad():
        for layer in (training.autoencoder.quant_conv, training.autoencoder.decoder.conv_out):
            layer.weight.zero_()
            layer.bias.zero_()
        training.autoencoder.quant_conv.bias[:2] = 0.3  # the means; the others are log-variances
    x = digits()[0][:5]
    expected = x.square().flatten(1).sum(1).mean() / (2 * 0.5**2) + 2.0 * 2 * 16 * 0.3**2 / 2
    torch.testing.assert_close(training.loss(x).detach(), expected)


def test_the_shipped_prior_draws_digits(generator):
    """Of 32 draws the classifier is sure of at least half (0.84 of 500 are), among them at least five digits."""
    prior, classifier = (
        LatentPrior.from_pretrained("priors/mnist_latent", steps=20),
        MNISTClassifier.from_pretrained("priors/mnist_classifier"),
    )
    sure, digit = classifier(prior.decode(prior.sample(32, generator))).softmax(1).max(1)
    assert prior.shape == (3, 7, 7) and prior.data_shape == (1, 28, 28)
    assert float((sure > 0.9).float().mean()) > 0.5 and len(digit.unique()) >= 5


def test_guided_through_the_decoder(generator, monkeypatch):
    """Small latents, a known covariance of their error: Gauss-Newton is nearer to the evidence than one gradient step at each of six y (if
    neither were nearer: one time in 64)."""
    monkeypatch.setattr(rtb_inverse.posterior, "PAIRS", 1)
    prior = LatentPrior.from_pretrained("priors/mnist_latent", steps=5)
    problem = Inpainting(prior.data_shape, "random", noise_std=0.3)
    posterior = Posterior(prior, problem)
    assert posterior.guide.covariance is not None and (posterior.guide.iterations, posterior.guide.rounds) == (5, 2)
    y = problem.simulate(prior.decode(prior.sample(6, generator)), generator)
    near = importance(posterior, y, 2, torch.Generator().manual_seed(0)).log_w.mean(0)
    posterior.guide = guidance(problem, prior.decode, 3)
    assert (posterior.guide.iterations, posterior.guide.covariance) == (1, None)
    assert (near > importance(posterior, y, 2, torch.Generator().manual_seed(0)).log_w.mean(0)).all()
