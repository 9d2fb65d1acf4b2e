"""What the guided start is worth on science's problems, without training: python benchmarks/guided_starts.py

    8x8 digits prior, y simulated: low-dose tomography and inverse scattering; six observations, 32 draws
    a random field behind the Navier-Stokes equations, by the Laplace guide and by the one for large generators (one step of conjugate
    gradients) or for operators (five, twice); four observations, 32 draws

Means over the observations of the ELBO, of log Z by importance (for the flow by SMC too), of the ESS and the PSNR, and CPU seconds per
draw. One thread; prints Markdown.
"""

import time

import torch
from torch import Generator

from priors import DiffusersPrior, RandomField
from rtb_inverse import Posterior, importance, smc
from rtb_inverse.diagnostics import psnr
from rtb_inverse.guidance import GradientGuidance
from tasks import InverseScattering, LowDoseCT, NavierStokes

DIGITS = {
    f"low-dose CT, {photons} photons, 6 angles": lambda shape, photons=photons: LowDoseCT(shape, 6, photons=float(photons))
    for photons in (30, 300, 3000)
} | {
    f"scattering, {model}, contrast {contrast}, noise {std}": lambda shape, m=model, c=contrast, s=std: InverseScattering(
        shape, transmitters=4, receivers=12, contrast=c, model=m, noise_std=s
    )
    for model, contrast, std in (("born", 0.5, 0.02), ("lippmann_schwinger", 0.5, 0.02), ("lippmann_schwinger", 1.0, 0.05))
}


def line(name: str, posterior: Posterior, x, y, n: int, with_smc: bool = False) -> None:
    """Print a row: x in data space, y of it."""
    start = time.process_time()
    draws = importance(posterior, y, n, Generator().manual_seed(1))
    seconds = (time.process_time() - start) / draws.log_w.numel()
    filtered = f"{smc(posterior, y, n, Generator().manual_seed(1)).log_z.mean():.1f}" if with_smc else ""
    values = [f"{draws.log_w.mean():.1f}", f"{draws.log_z.mean():.1f}", filtered, f"{draws.ess.mean():.1f}"]
    print(f"| {name} | {' | '.join(values)} | {psnr(draws.x.mean(0), x).mean():.1f} | {seconds:.2g} |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    print("| problem, start | ELBO | log Z, importance | log Z, SMC | ESS | PSNR | CPU s per draw |\n|---|---|---|---|---|---|---|")
    prior, generator = DiffusersPrior.from_pretrained("priors/digits"), Generator().manual_seed(0)
    x = prior.sample(6, generator)
    for name, make in DIGITS.items():
        problem = make(prior.shape)
        y = problem.simulate(x, generator)
        for start in ("prior", "guided"):
            line(f"{name}, {start}", Posterior(prior, problem, start=start), x, y, 32)
    field = RandomField(16)
    x = field.decode(field.sample(4, generator))
    for T in (1.0, 2.0):
        problem = NavierStokes((1, 16, 16), time=T, steps=int(8 * T), factor=2, noise_std=0.1)
        y = problem.simulate(x, generator)
        for steps, rounds in ((1, 1), (5, 2)):
            posterior = Posterior(field, problem)
            posterior.guide = GradientGuidance(problem, steps, decode=field.decode, event_dim=1, rounds=rounds)
            line(f"flow, T = {T:g}, {rounds} × {steps} conjugate gradients", posterior, x, y, 32)
        line(f"flow, T = {T:g}, Laplace", Posterior(field, problem), x, y, 32, with_smc=True)


if __name__ == "__main__":
    main()
