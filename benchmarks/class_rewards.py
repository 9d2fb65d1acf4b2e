"""Reward-only posteriors p(x) p(c | x)^beta / Z, and one posterior for all classes, of 8x8 digits:

    python benchmarks/class_rewards.py [--priors digits vae gan] [--ways "wake-sleep" ...] [--steps 400] [--lr 1e-3] [--label 3]

under a diffusion model of the pixels and in the noise of the shipped VAE and GAN; a small classifier, trained here in seconds. The
truth: many draws of the prior, weighted by the reward, which are enough here (their ESS is said).

    log p(c | x)    mean over 256 draws, as they come
    diversity       root mean square distance of a draw from their mean
    SW / floor      sliced Wasserstein to the truth, over that of two independent truths
    ELBO, log Z     of the path weights, log Z beside the truth's, with standard errors; ESS / n

One thread; prints Markdown.
"""

import argparse
import time

import torch
from digit_generators import classifier, diversity
from torch import Generator, nn

from priors import DiffusersPrior, DigitGenerator
from rtb_inverse import Posterior, fit, importance
from rtb_inverse.chains import Prior
from rtb_inverse.diagnostics import sliced_wasserstein
from rtb_inverse.particles import Particles
from tasks import ClassConstraint, ClassReward

DRAWS, BANK = 256, {"digits": 4096, "vae": 32768, "gan": 32768}
NONE, ALL = "none: the prior", "one for all classes, simulated pairs"
WAYS = {
    NONE: {},
    "wake-sleep": {"warm_start": 1.0},
    "wake-sleep, then VarGrad": {"warm_start": 0.75},
    "wake-sleep, then RTB": {"warm_start": 0.75, "objective": "rtb"},
    "VarGrad with replay alone": {"warm_start": 0.0, "lr_rtb": 3e-4},
    ALL: {"warm_start": 1.0},
}
TRAINING = {"bounds": 0, "progress": False, "pool": 2048, "pool_start": 1024, "draws": 64, "step_fraction": 0.25}


def load(name: str) -> Prior:
    return DiffusersPrior.from_pretrained("priors/digits") if name == "digits" else DigitGenerator.prior(f"priors/digits_{name}")


class Comparison:
    """One prior and one beta."""

    def __init__(self, name: str, prior: Prior, seen: nn.Module, label: int, beta: float, bank: torch.Tensor):
        self.title, self.prior, self.beta, self.y = f"| {name} | {beta:g} |", prior, beta, torch.tensor([label])
        self.reward, self.every = ClassReward(seen, label).bind(prior.data_shape), ClassConstraint(seen)
        weighted = Particles(bank, beta * self.reward.log_p(bank[:, 0])[:, None])
        halves = [Particles(weighted.x[i::2], weighted.log_w[i::2]).resample(DRAWS, Generator().manual_seed(3 + i)).x for i in range(2)]
        self.truth, self.log_z = halves[0], f"{float(weighted.log_z):.2f} ± {float(weighted.log_z_error):.2f}"
        self.floor = self.far(halves[1])
        self.add("truth", self.truth, f" | {self.log_z} | {float(weighted.ess):.0f} draws | ", 1.0)

    def far(self, x: torch.Tensor) -> float:
        return float(sliced_wasserstein(x, self.truth, generator=Generator().manual_seed(2)))

    def add(self, way: str, x: torch.Tensor, bounds: str, far: float) -> None:
        cells = f"{self.reward.log_p(x[:, 0]).mean():.2f} | {float(diversity(x)):.2f} | {far:.2f}"
        print(f"{self.title} {way} | {cells} | {bounds} |", flush=True)

    def train(self, way: str, steps: int, lr: float) -> None:
        """Train that way, and print its row."""
        problem, y = (self.every, self.y) if way == ALL else (self.reward, None)
        posterior, start = Posterior(self.prior, problem, "prior", self.beta), time.process_time()
        if way != NONE:
            fit(posterior, steps, 0, lr=lr, **(TRAINING | WAYS[way]))
        seconds = time.process_time() - start
        draws = importance(posterior, y, DRAWS, Generator().manual_seed(1))
        log_z = f"{float(draws.log_z):.2f} ± {float(draws.log_z_error):.2f} ({self.log_z})"
        bounds = f"{float(draws.log_w.mean()):.2f} | {log_z} | {float(draws.ess) / DRAWS:.2f} | {seconds:.0f}"
        self.add(way, draws.x, bounds, self.far(draws.x) / self.floor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 400, "label": 3, "lr": 1e-3}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--priors", nargs="+", default=list(BANK), choices=list(BANK))
    parser.add_argument("--betas", nargs="+", type=float, default=[1.0, 4.0])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    o = parser.parse_args()
    torch.set_num_threads(1)
    seen = classifier()
    print(f"| prior | beta | method | log p(c given x) | diversity | SW / floor | ELBO | log Z (truth) | ESS / n | CPU s |\n{'|---' * 10}|")
    for name in o.priors:
        prior = load(name)
        bank = torch.cat([prior.decode(part) for part in prior.sample(BANK[name], Generator().manual_seed(0)).split(1024)])[:, None]
        for beta in o.betas:
            comparison = Comparison(name, prior, seen, o.label, beta, bank)
            for way in o.ways:
                if way != ALL or beta == 1:  # simulated pairs are of beta 1
                    comparison.train(way, o.steps, o.lr)


if __name__ == "__main__":
    main()
