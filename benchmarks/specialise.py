"""What an amortised posterior gains by training on the one observation that matters:

    python benchmarks/specialise.py [--amortised 0] [--steps 150] [--lr-rtb 1e-4]

    phase retrieval, and lensing by a family of lenses, of the shipped 8x8 digits; the guided posterior, trained for --amortised steps on
    all y, then `fit(posterior, steps, y=y_obs)` with replay and backtracking, once for each of a few observations

Before and after, with 128 draws: ELBO, importance-sampled log Z, effective sample size, log-likelihood of the draws; means and standard
errors over observations, and those of the gains. One thread; prints Markdown.
"""

import argparse
import copy
import time

import torch
from torch import Generator, Tensor

from priors import DiffusersPrior
from rtb_inverse import Posterior, fit, importance
from rtb_inverse.diagnostics import Estimate
from tasks import Lensing, LensingFamily, PhaseRetrieval

PROBLEMS = ["phase retrieval", "lensing, any lens"]
WHAT = ("ELBO", "log Z", "ESS", "log-likelihood")


def numbers(posterior: Posterior, y: Tensor, n: int) -> Tensor:
    draws = importance(posterior, y, n, Generator().manual_seed(1))
    log_lik = posterior.problem.log_likelihood(draws.x, y).mean(0)
    return torch.stack([draws.log_w.mean(0), draws.log_z, draws.ess, log_lik], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"amortised": 0, "steps": 150, "observations": 4, "draws": 128, "lr-rtb": 1e-4}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--problems", nargs="+", default=PROBLEMS, choices=PROBLEMS)
    o = parser.parse_args()
    torch.set_num_threads(1)
    prior = DiffusersPrior.from_pretrained("priors/digits")
    lenses = LensingFamily(Lensing(prior.shape, pixels=16, noise_std=0.1, sky=-1.0))
    print(f"| problem | posterior | {' | '.join(WHAT)} | CPU s |\n|---|---|{'---|' * len(WHAT)}---|")
    known = dict(zip(PROBLEMS, (PhaseRetrieval(prior.shape), lenses), strict=True))
    for title, problem in ((title, known[title]) for title in o.problems):
        generator = Generator().manual_seed(0)
        y = problem.simulate(prior.sample(o.observations, generator), generator)
        posterior = Posterior(prior, problem)
        if o.amortised:
            fit(posterior, o.amortised, seed=0, warm_start=1.0, lr=1e-3, bounds=0, progress=False)
        start = time.process_time()
        before = numbers(posterior, y, o.draws)
        options = {"lr_rtb": o.lr_rtb, "bounds": 0, "step_fraction": 0.25}
        own = [fit(copy.deepcopy(posterior), o.steps, seed=0, y=one[None], progress=False, **options) for one in y]
        after = torch.cat([numbers(one, of[None], o.draws) for one, of in zip(own, y, strict=True)])
        rows = {f"amortised, {o.amortised} steps": before, f"{o.steps} steps on the one y": after, "gain": after - before}
        for name, values in rows.items():
            cells = [str(Estimate.of(v)) for v in values.T]
            seconds = f"{(time.process_time() - start) / len(y):.0f} per y" if name == "gain" else ""
            print(f"| {title} | {name} | {' | '.join(cells)} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
