r"""Small generators x = f(z), z ~ N(0, I), of 8x8 digits, for `GeneratorPrior`: the decoder of a variational autoencoder, and a GAN.

VAE     minimise E_q(z | x) |x - f(z)|^2 / (2 s^2) + KL(q(z | x) | N(0, I)),   q diagonal Gaussian (Kingma and Welling 2014)
GAN     f against a critic D of x:  softplus(-D(x)) + softplus(D(f(z))) + (g / 2) |grad D(x)|^2 for D, softplus(-D(f(z))) for f
        (Mescheder, Geiger, Nowozin 2018, arXiv 1801.04406: R1, which makes it converge)
"""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Generator, Tensor, nn
from torch.nn.functional import softplus

from priors.generator import GeneratorPrior
from priors.variational import VariationalTraining
from rtb_inverse.averaging import ExponentialMovingAverage
from rtb_inverse.checkpoints import load_into, load_weights, read_json, save_tensors, shipped, write_json
from rtb_inverse.checks import check_count, check_number, check_positive, check_writable
from rtb_inverse.prior_training import generator_of_step
from rtb_inverse.randomness import generator_on, standard_normal

SHAPE = (1, 8, 8)
FILE, CONFIG = "generator.safetensors", "generator_config.json"


def perceptron(inputs: int, outputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, outputs)
    )  # fmt: skip


class DigitGenerator(nn.Module):
    """z (M, latent) to x (M, 1, 8, 8) in [-1, 1]."""

    def __init__(self, latent: int = 16, width: int = 128):
        super().__init__()
        self.latent, self.width = check_count("latent", latent), check_count("width", width)
        self.layers = perceptron(latent, 64, width)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z).tanh().reshape(-1, *SHAPE)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights (safetensors) and sizes as `from_pretrained` reads them."""
        save_tensors(self.state_dict(), Path(folder) / FILE)
        write_json({"latent": self.latent, "width": self.width}, Path(folder) / CONFIG)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DigitGenerator":
        """The generator of a folder that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: no such file there. ValueError: sizes that are not valid; truncated or pickled weights, or those of another
            network.
        """
        folder = shipped(Path(folder))
        sizes = read_json(folder / CONFIG)
        if sizes.keys() != {"latent", "width"}:
            raise ValueError(f"{folder / CONFIG} must hold latent and width, got {', '.join(sizes) or 'nothing'}")
        generator = cls(**sizes)
        load_into(generator, load_weights(folder / FILE), folder / FILE)
        return generator

    @classmethod
    def prior(cls, folder: str | Path, steps: int = 40) -> GeneratorPrior:
        """A `GeneratorPrior` of such a folder: "priors/digits_vae", "priors/digits_gan", or your own."""
        generator = cls.from_pretrained(folder)
        return GeneratorPrior(generator, generator.latent, steps=steps)


class VAETraining(VariationalTraining):
    """
    Args:
        output: folder for the finished generator.
        latent, width: of the generator. lr, std: see `VariationalTraining`.
    """

    def __init__(self, output: str, latent: int = 16, width: int = 128, lr: float = 1e-3, std: float = 0.2):
        super().__init__(output, lr, std)
        self.generator, self.encoder = DigitGenerator(latent, width), perceptron(64, 2 * latent, width)

    def encode(self, x):
        return self.encoder(x.flatten(1)).chunk(2, 1)

    def decode(self, z):
        return self.generator(z)

    def save(self):
        self.generator.save_pretrained(self.output)


class GANTraining(LightningModule):
    """
    Args:
        output, latent, width, lr: as of `VAETraining`; the learning rate stays.
        penalty: g > 0. ema_decay: of the averaged weights of the generator, which are the ones written.
        blur: standard deviation, >= 0, of noise that real and made images get alike before the critic sees them.
    """

    def __init__(
        self, output: str, latent: int = 16, width: int = 128, lr: float = 1e-3, penalty: float = 1.0, ema_decay: float = 0.999,
        blur: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = DigitGenerator(latent, width), perceptron(64, 1, 2 * width)
        self.output, self.lr, self.penalty = check_writable("output", output), check_positive("lr", lr), check_positive("penalty", penalty)
        self.blur, self.ema = check_number("blur", blur, 0), ExponentialMovingAverage(self.generator.parameters(), ema_decay)

    def judge(self, x: Tensor, generator: Generator) -> Tensor:
        noise = standard_normal(x, generator)
        return self.critic((x + self.blur * noise).flatten(1))[:, 0]

    def make(self, n: int, generator: Generator) -> Tensor:
        z = torch.randn((n, self.generator.latent), generator=generator_on(self.device, generator), device=self.device)
        return self.generator(z)

    def step(self, optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def training_step(self, batch, index):
        for_critic, for_generator = self.optimizers()
        x, generator = batch[0].requires_grad_(), generator_of_step(self)
        real = self.judge(x, generator)
        slope = torch.autograd.grad(real.sum(), x, create_graph=True)[0].square().flatten(1).sum(1)
        made = self.judge(self.make(len(x), generator).detach(), generator)
        loss = (softplus(-real) + softplus(made) + self.penalty / 2 * slope).mean()
        self.step(for_critic, loss)
        fooled = softplus(-self.judge(self.make(len(x), generator), generator)).mean()
        self.step(for_generator, fooled)
        self.ema.update()
        self.log_dict({"critic": loss, "generator": fooled}, prog_bar=True)

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), self.lr, betas=(0.0, 0.99)) for net in (self.critic, self.generator)]

    def on_train_end(self):
        if self.trainer.is_global_zero:
            self.ema.swap()
            self.generator.save_pretrained(self.output)
            self.ema.swap()
