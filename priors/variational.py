r"""What the trainings of variational autoencoders share (Kingma and Welling 2014):

minimise    E_q(z | x) |x - D(z)|^2 / (2 s^2) + kl KL(q(z | x) | N(0, I)),      q(z | x) = N(mean(x), diag(std(x)^2)).
"""

import torch
from lightning.pytorch import LightningModule
from torch import Generator, Tensor

from rtb_inverse.checks import check_number, check_positive, check_writable
from rtb_inverse.prior_training import generator_of_step
from rtb_inverse.randomness import standard_normal


class VariationalTraining(LightningModule):
    """Subclasses say how to `encode`, `decode` and `save`. AdamW; the learning rate falls to 0 along a cosine.

    Args:
        output: folder for what is trained; must be writable, which is tried before any work.
        lr: learning rate, > 0. std: s > 0, of x about D(z). kl: weight, at least 0.
    """

    def __init__(self, output: str, lr: float, std: float, kl: float = 1.0):
        super().__init__()
        self.output, self.lr = check_writable("output", output), check_positive("lr", lr)
        self.std, self.kl = check_positive("std", std), check_number("kl", kl, 0)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-std of q(z | x), of one shape."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def save(self) -> None:
        """Write what was trained to `output`."""
        raise NotImplementedError

    def loss(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """Of images x (M, C, H, W), per image; for kl = 1 minus their evidence bound, but for a constant."""
        mean, log_std = self.encode(x)
        z = mean + log_std.exp() * standard_normal(mean, generator)
        misfit = (x - self.decode(z)).square().flatten(1).sum(1) / (2 * self.std**2)
        return (misfit + self.kl / 2 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).flatten(1).sum(1)).mean()

    def training_step(self, batch, index):
        loss = self.loss(batch[0], generator_of_step(self))
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, index):
        generator = Generator(self.device).manual_seed(index)
        self.log("val_loss", torch.stack([self.loss(batch[0], generator) for _ in range(4)]).mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self):
        if self.trainer.is_global_zero:
            self.save()
