"""One posterior for a range of noise levels, beside posteriors that are each for one: python benchmarks/noise_range.py [--steps 0]

Of the 8x8 digits, noise_std 0.02 to 0.5: the posterior of the `NoiseRange`, trained for --steps on all levels, on observations of a few
levels; and posteriors of the same problem with the one level, untrained. The same observations; means and standard errors over them.
One thread; prints Markdown.
"""

import argparse

import torch
from torch import Generator

from priors import DiffusersPrior
from rtb_inverse import NoiseRange, Posterior, evaluate, fit
from rtb_inverse.evaluation import Observations
from tasks import HDR, Deblurring

PROBLEMS = {
    "deblurring": lambda shape, level: Deblurring(shape, size=5, std=1.0, noise_std=level),
    "high dynamic range": lambda shape, level: HDR(shape, noise_std=level),
}
LOW, HIGH, LEVELS = 0.02, 0.5, (0.02, 0.1, 0.5)
COLUMNS = ("elbo", "log_z_is", "log_likelihood", "psnr", "crps", "chi_squared", "coverage_90")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 0, "observations": 24, "draws": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    torch.set_num_threads(1)
    prior = DiffusersPrior.from_pretrained("priors/digits")
    print(f"| problem | level | posterior | {' | '.join(COLUMNS)} |\n|---|---|---|{'---|' * len(COLUMNS)}")
    for title, make in PROBLEMS.items():
        family = Posterior(prior, NoiseRange(make(prior.shape, 1.0), LOW, HIGH))
        if o.steps:
            fit(family, o.steps, seed=0, warm_start=1.0, lr=1e-3, bounds=0, progress=False)
        x = prior.sample(o.observations, Generator().manual_seed(1))
        for level in LEVELS:
            alone = Posterior(prior, make(prior.shape, level))
            measured = alone.problem.simulate(x, Generator().manual_seed(2))
            known = {"for all levels": (family, family.problem.observation(measured, level)), "for this one": (alone, measured)}
            for name, (posterior, y) in known.items():
                found = evaluate(posterior, Observations(y, x), o.draws, Generator().manual_seed(3)).numbers
                print(f"| {title} | {level:g} | {name} | {' | '.join(str(found[column]) for column in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
