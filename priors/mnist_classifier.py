"""A small convolutional network that reads 28x28 digits: p(c | x) for noise-free x, and features to compare sets of digits by."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from rtb_inverse.checkpoints import load_into, load_weights, save_tensors, shipped
from rtb_inverse.checks import check_fraction, check_positive, check_tensor, check_writable
from rtb_inverse.distributions import global_state_from
from rtb_inverse.prior_training import generator_of_step

SHAPE = (1, 28, 28)
FILE = "classifier.safetensors"


class MNISTClassifier(nn.Module):
    """log p(c | x) up to a constant, for the ten digits c.

    Attributes:
        num_features: length of `features`, the name by which torchmetrics asks for it.
    """

    num_features = 64

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.25), nn.Linear(64 * 3 * 3, self.num_features), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, 10)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MNISTClassifier":
        """The classifier of a folder that `save_pretrained` wrote, frozen and in eval mode.

        Raises:
            FileNotFoundError: no weights there. ValueError: truncated or pickled weights, or those of another network.
        """
        classifier, file = cls(), shipped(Path(folder)) / FILE
        load_into(classifier, load_weights(file), file)
        return classifier.requires_grad_(False).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights as `from_pretrained` reads them."""
        save_tensors(self.state_dict(), Path(folder) / FILE)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees of x (M, 1, 28, 28) in [-1, 1]: (M, 64), at least 0."""
        return self.body(check_tensor("x", x, SHAPE))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (M, 10) of x (M, 1, 28, 28) in [-1, 1]; differentiable in x."""
        return self.head(self.features(x))


class MNISTClassifierTraining(LightningModule):
    """Cross-entropy on (x, c), and on noise with every c as likely: without it the classifier is sure of any noise. AdamW under one
    cycle of the learning rate.

    Args:
        output: folder for the finished classifier; must be writable, which is tried before any work.
        lr: peak learning rate.
        noise: share of a batch that is seen again as noise: its own pixels in no order, or pixels uniform in [-1, 1].
    """

    def __init__(self, output: str, lr: float = 3e-3, noise: float = 0.25):
        super().__init__()
        self.classifier = MNISTClassifier()
        self.output, self.lr = check_writable("output", output), check_positive("lr", lr)
        self.noise = check_fraction("noise", noise)

    def training_step(self, batch, index):
        x, c = batch
        seen_again = x[: max(2, round(self.noise * len(x)))]
        generator = generator_of_step(self)
        with global_state_from(generator):
            loss = cross_entropy(self.classifier(x), c) + self.noise * self.surety_of_noise(seen_again, generator)
        self.log("loss", loss, prog_bar=True)
        return loss

    def surety_of_noise(self, x: Tensor, generator: Generator) -> Tensor:
        """Cross-entropy of the classifier on noise made from x (M, 1, 28, 28), for uniform c."""
        shuffled = x.flatten()[torch.randperm(x.numel(), generator=generator, device=x.device)].view_as(x)
        noise = torch.cat([shuffled[::2], 2 * torch.rand(x[1::2].shape, generator=generator, device=x.device) - 1])
        return -self.classifier(noise).log_softmax(1).mean()

    def validation_step(self, batch, index):
        x, c = batch
        logits = self.classifier(x)
        self.log_dict({"val_loss": cross_entropy(logits, c), "val_accuracy": (logits.argmax(1) == c).float().mean()}, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self):
        if self.trainer.is_global_zero:
            self.classifier.save_pretrained(self.output)
