"""What an amortised posterior gains by training on the one observation that matters:

    python benchmarks/specialise.py [--amortised 0] [--steps 100] [--observations 6]

    phase retrieval, and lensing by a family of lenses, of the shipped 8x8 digits and, where it is named, of the 32x32 galaxies (as in
    scripts/lensing_galaxies.py; over an hour a y); the guided posterior, trained for --amortised steps on all y, then
    `fit(posterior, steps, y=y_obs)`, once for each of a few observations: in one step, so that all there is is the linear correction in
    closed form, and in --steps of them, with replay and backtracking

Before and after, with 128 draws: ELBO, importance-sampled log Z, EUBO (the weight of the one path of the prior that made the y),
effective sample size, log-likelihood of the draws; means and standard errors over observations, and those of the gains. One thread;
prints Markdown.
"""

import argparse
import copy
import time

import torch
from torch import Generator, Tensor

from priors import DiffusersPrior
from rtb_inverse import Posterior, fit, importance, simulate_observations
from rtb_inverse.chains import Trajectory
from rtb_inverse.diagnostics import Estimate
from rtb_inverse.evaluation import Observations
from rtb_inverse.training import score
from tasks import Inpainting, Lensing, LensingFamily, PhaseRetrieval

PROBLEMS = ["phase retrieval", "lensing, any lens", "inpainting, box", "lensing of galaxies"]
WHAT = ("ELBO", "log Z", "EUBO", "ESS", "log-likelihood")


def one(held: Observations, i: int) -> Observations:
    y = held.y[i : i + 1]
    return Observations(y, held.x[i : i + 1], Trajectory(held.paths.x[:, :, i : i + 1], held.paths.times, y))


def numbers(posterior: Posterior, held: Observations, n: int) -> Tensor:
    """(5,) of one observation."""
    draws = importance(posterior, held.y, n, Generator().manual_seed(1))
    log_q, log_p, log_lik = score(posterior, held.paths)
    log_lik_of = posterior.problem.log_likelihood(draws.x, held.y).mean(0)
    return torch.stack([draws.log_w.mean(0), draws.log_z, (log_p + log_lik - log_q)[0], draws.ess, log_lik_of], 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"amortised": 0, "steps": 100, "observations": 6, "draws": 128, "lr-rtb": 1e-4}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--problems", nargs="+", default=PROBLEMS[:3], choices=PROBLEMS)
    o = parser.parse_args()
    torch.set_num_threads(1)
    digits, galaxies = (DiffusersPrior.from_pretrained(f"priors/{name}") for name in ("digits", "galaxies"))
    small = LensingFamily(Lensing(digits.shape, pixels=16, noise_std=0.1, sky=-1.0))
    large = LensingFamily(Lensing(galaxies.shape, 32, centre=(0.2, 0.1), image_fov=2.8, noise_std=0.1, sky=-1.0), (0.4, 0.7))
    problems = (PhaseRetrieval(digits.shape), small, Inpainting(digits.shape, "box"), large)
    known = dict(zip(PROBLEMS, problems, strict=True))
    print(f"| problem | posterior | {' | '.join(WHAT)} | CPU s per y |\n|---|---|{'---|' * len(WHAT)}---|")
    for title, problem in ((title, known[title]) for title in o.problems):
        posterior = Posterior(galaxies if problem is large else digits, problem)
        held = simulate_observations(posterior, o.observations, Generator().manual_seed(0))
        if o.amortised:
            fit(posterior, o.amortised, seed=0, warm_start=1.0, lr=1e-3, bounds=0, progress=False)
        each = [one(held, i) for i in range(o.observations)]
        before = torch.stack([numbers(posterior, y, o.draws) for y in each])
        rows = {f"amortised, {o.amortised} steps": (before, 0.0)}
        for steps in sorted({1, o.steps}):
            name = "the one y, in closed form" if steps == 1 else f"and {steps} steps"
            start, after = time.process_time(), []
            for y in each:
                own = copy.deepcopy(posterior)
                fit(own, steps, seed=0, y=y.y, progress=False, lr_rtb=o.lr_rtb, bounds=0, step_fraction=0.25, line_search=steps > 1)
                after.append(numbers(own, y, o.draws))
            gain, seconds = torch.stack(after) - before, (time.process_time() - start) / len(each)
            rows |= {name: (before + gain, seconds), f"gain: {name}": (gain, seconds)}
        for name, (values, seconds) in rows.items():
            print(f"| {title} | {name} | {' | '.join(str(Estimate.of(v)) for v in values.T)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
