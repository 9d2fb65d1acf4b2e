"""Reward-only posteriors p(x) p(c | x)^beta / Z, and one posterior for all classes, of 8x8 digits:

    python benchmarks/class_rewards.py [--steps 400] [--priors digits vae gan] [--label 3]

under a diffusion model of the pixels and in the noise of the shipped VAE and GAN; a small classifier, trained here in seconds. The
truth: many draws of the prior, weighted by the reward, which are enough here (their ESS is said).

    log p(c | x)    mean over 256 draws, as they come
    diversity       root mean square distance of a draw from their mean
    SW / floor      sliced Wasserstein to the truth, over that of two halves of the truth
    ELBO, log Z     of the path weights, beside the truth's log Z; ESS / n

One thread; prints Markdown.
"""

import argparse
import time

import torch
from digit_generators import classifier
from torch import Generator, Tensor

from priors import DiffusersPrior, DigitGenerator
from rtb_inverse import Posterior, fit, importance
from rtb_inverse.chains import Prior
from rtb_inverse.diagnostics import sliced_wasserstein
from rtb_inverse.particles import Particles
from tasks import ClassConstraint, ClassReward

DRAWS, BANK = 256, {"digits": 4096, "vae": 32768, "gan": 32768}
WAYS = {
    "wake-sleep": {"warm_start": 1.0},
    "wake-sleep, then VarGrad": {"warm_start": 0.75},
    "wake-sleep, then RTB": {"warm_start": 0.75, "objective": "rtb"},
    "VarGrad with replay alone": {"warm_start": 0.0, "lr_rtb": 3e-4},
}


def load(name: str) -> Prior:
    return DiffusersPrior.from_pretrained("priors/digits") if name == "digits" else DigitGenerator.prior(f"priors/digits_{name}")


def spread(x: Tensor) -> float:
    return float((x - x.mean(0)).flatten(2).square().sum(-1).mean().sqrt())


def row(posterior: Posterior, y: Tensor | None, truth: Tensor, log_p: Tensor, log_z: float) -> str:
    """Cells of the draws of a posterior; truth (2 DRAWS, 1, *shape), log_p that of p(c | x) on a batch."""
    draws = importance(posterior, y, DRAWS, Generator().manual_seed(1))
    floor = sliced_wasserstein(truth[::2], truth[1::2], generator=Generator().manual_seed(2))
    far = sliced_wasserstein(draws.x, truth[:DRAWS], generator=Generator().manual_seed(2)) / floor
    cells = [f"{log_p(draws.x[:, 0]).mean():.2f}", f"{spread(draws.x):.2f}", f"{far.mean():.2f}", f"{draws.log_w.mean():.2f}"]
    return " | ".join([*cells, f"{draws.log_z.mean():.2f} ({log_z:.2f})", f"{draws.ess.mean() / DRAWS:.2f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--label", type=int, default=3)
    parser.add_argument("--priors", nargs="+", default=list(BANK), choices=list(BANK))
    parser.add_argument("--betas", nargs="+", type=float, default=[1.0, 4.0])
    parser.add_argument("--lr", type=float, default=1e-3)
    o = parser.parse_args()
    torch.set_num_threads(1)
    seen = classifier()
    print(f"| prior | beta | method | log p(c given x) | diversity | SW / floor | ELBO | log Z (truth) | ESS / n | CPU s |\n{'|---' * 10}|")
    for name in o.priors:
        prior, reward = load(name), ClassReward(seen, o.label)
        reward.bind(prior.data_shape)
        bank = torch.cat([prior.decode(part) for part in prior.sample(BANK[name], Generator().manual_seed(0)).split(1024)])[:, None]
        for beta in o.betas:
            weighted = Particles(bank, beta * reward.log_p(bank[:, 0])[:, None])
            truth, log_z = weighted.resample(2 * DRAWS, Generator().manual_seed(3)).x, float(weighted.log_z)
            known = (
                f"{reward.log_p(truth[:, 0]).mean():.2f} | {spread(truth):.2f} | 1 |  | {log_z:.2f} | {float(weighted.ess):.0f} draws |  |"
            )
            print(f"| {name} | {beta:g} | truth | {known}", flush=True)
            every = ClassConstraint(seen)
            ways = {"none: the prior": (reward, None, {})} | {way: (reward, None, options) for way, options in WAYS.items()}
            ways["one for all classes, simulated pairs"] = (every, torch.tensor([o.label]), {"warm_start": 1.0})
            for way, (problem, y, options) in ways.items():
                if y is not None and beta != 1:
                    continue
                posterior, start = Posterior(prior, problem, "prior", beta), time.process_time()
                if options:
                    own = {"lr": o.lr, "bounds": 0, "progress": False, "pool": 2048, "pool_start": 1024, "draws": 64, "step_fraction": 0.25}
                    fit(posterior, o.steps, 0, **(own | options))
                seconds = time.process_time() - start
                y = None if y is None else posterior.check_y(y)
                print(f"| {name} | {beta:g} | {way} | {row(posterior, y, truth, reward.log_p, log_z)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
