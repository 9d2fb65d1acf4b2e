"""How real the draws of the MNIST prior are, beside real test digits:

    python benchmarks/mnist_prior.py [--folder ../shared/data] [--prior priors/mnist] [--draws 1920] [--steps 20 30 40]

FID and KID (mean and standard deviation over subsets) to the training digits, on the features of the shipped classifier: they compare
with each other, not with numbers on other features. The floor is as many real test digits. Then the share of digits that the classifier
is sure of, and how often it sees each class. Draws with the recommended steps are those that the prior keeps, if these are enough. Writes a
grid of draws, its last two rows real test digits, to the prior's folder.

Needs MNIST in `--folder` (see `priors.mnist`); the classifier's test accuracy is printed too.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from priors import DiffusersPrior, LatentPrior, MNISTClassifier, mnist
from rtb_inverse.plots import image_grid

REAL = 10_000  # training digits that all are compared with


class Features(nn.Module):
    """`MNISTClassifier.features` as torchmetrics calls them, in units of their root mean square on real digits: the cubic kernel of KID
    is about features of size 1."""

    def __init__(self, classifier: MNISTClassifier, real: Tensor):
        super().__init__()
        self.classifier, self.num_features = classifier, classifier.num_features
        self.scale = classifier.features(real).square().mean().sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier.features(x) / self.scale


def distances(features: nn.Module, real: Tensor, x: Tensor) -> tuple[float, float, float]:
    """FID, and mean and standard deviation of KID."""
    fid = FrechetInceptionDistance(features, normalize=True)
    kid = KernelInceptionDistance(features, normalize=True, subset_size=min(1000, len(x) // 2))
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(x, real=False)
    return float(fid.compute()), *map(float, kid.compute())


def table(rows: dict[str, Tensor], classifier: MNISTClassifier, real: Tensor) -> str:
    lines = ["| digits | FID | KID x 1000 | sure > 0.9 | sure > 0.99 | share of 0 to 9, % |", "|---|---|---|---|---|---|"]
    features = Features(classifier, real)
    for name, x in rows.items():
        fid, kid, spread = distances(features, real, x)
        sure, c = classifier(x).softmax(1).max(1)
        shares = " ".join(f"{100 * share:.1f}" for share in torch.bincount(c, minlength=10) / len(c))
        lines.append(
            f"| {name} | {fid:.3f} | {1000 * kid:.2f} ± {1000 * spread:.2f} | {(sure > 0.9).float().mean():.3f} "
            f"| {(sure > 0.99).float().mean():.3f} | {shares} |"
        )
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="../shared/data")
    parser.add_argument("--prior", default="priors/mnist")
    parser.add_argument("--draws", type=int, default=1920)
    parser.add_argument("--steps", type=int, nargs="+", help="of the chain; several are compared; by default what the prior recommends")
    args = parser.parse_args()
    torch.manual_seed(0)  # KID draws subsets

    x, c = mnist(args.folder, "test")
    x, c = x[(order := torch.randperm(len(x)))], c[order]
    real = mnist(args.folder, "train")[0][torch.randperm(55_000)[:REAL]]
    classifier = MNISTClassifier.from_pretrained("priors/mnist_classifier")
    print(f"the classifier is right on {(classifier(x).argmax(1) == c).float().mean():.2%} of {len(x)} test digits", flush=True)

    load = LatentPrior if (Path(args.prior) / "vae").is_dir() else DiffusersPrior
    prior, rows = load.from_pretrained(args.prior), {"real test digits": x[: args.draws]}
    recommended, kept = prior.steps, 0 if prior.draws is None else len(prior.draws)
    for steps in args.steps or [recommended]:
        if steps == recommended and kept >= args.draws:
            draws = prior.draws[: args.draws]
        else:
            draws = prior.set_steps(steps).sample(args.draws, torch.Generator().manual_seed(0))
        rows[f"draws, {steps} steps"] = draws = prior.decode(draws).clamp(-1, 1)
        if len(rows) == 2:
            image_grid(torch.cat([draws[:96], x[:32]]), Path(args.prior) / "samples.png")
    print(table(rows, classifier, real))


if __name__ == "__main__":
    main()
