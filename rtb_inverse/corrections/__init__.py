"""Corrections that use the exact path weights log p(tau) + beta log p(y | x_0) - log q(tau | y), one per file.

    importance      whole paths, weighted
    smc             particles, weighted and resampled at every step
    renoise_mcmc    Markov chains on paths: re-noise, denoise, accept
    refine          the same with several candidates for each draw

The cost of a draw, `info["evaluations"]`: how often a state passes through the posterior's network for each draw that is returned, drawing
and scoring together. Plain sampling costs K, the number of steps, and one more for each second look (`Posterior.evaluations`). `budget` is
the most that a draw may cost; what one run needs at least is said in one ValueError where it is more. The frozen prior's own network, which
the weights need, is not counted: it is called K times a run, and in `renoise_mcmc` and `refine` 2 K times more a sweep where the prior's
chain is not the exact reversal.

Weights of 0 (a log-likelihood of -inf: draws that y, or a reward, forbids) are allowed as long as one draw of every observation has
another; NaN and +inf never are. Either ends in one ValueError.
"""

from rtb_inverse.corrections.importance_sampling import importance
from rtb_inverse.corrections.refinement import refine
from rtb_inverse.corrections.renoising import bridge, climb, redenoise, renoise_mcmc, sweep
from rtb_inverse.corrections.sequential import resample, smc
from rtb_inverse.corrections.twists import own_step, twist_log_likelihood
from rtb_inverse.corrections.weights import path_log_weights

__all__ = [
    "bridge", "climb", "importance", "own_step", "path_log_weights", "redenoise", "refine", "renoise_mcmc", "resample", "smc", "sweep",
    "twist_log_likelihood",
]  # fmt: skip
