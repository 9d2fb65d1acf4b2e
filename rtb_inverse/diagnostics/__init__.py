r"""How good draws are: pure functions of tensors, each with a standard error where it is an average over observations.

N draws for each of B observations: draws (N, B, *shape), truth (B, *shape), log-weights (N, B),

    log w = log p(tau) + beta log p(y | x_0) - log q(tau | y).

Calibration: if the truths were drawn from the prior, the observations from the truths and the draws from p(x | y), then any number
computed from a truth ranks uniformly among the same numbers computed from its N draws. Draws are unweighted here (resample first) and
independent of each other (thin chains first).

Every function raises TypeError or ValueError for an argument that is no floating-point tensor, has the wrong shape, is empty or holds NaN
or infinity (of a log-weight: NaN or +infinity); what a function asks beyond that is under its own "Raises".

What each of them sees, and what it is blind to, is measured in tests/test_calibration.py.
"""

from rtb_inverse.diagnostics.calibration import (
    ELEMENTS,
    LEAST_OBSERVATIONS,
    ChiSquared,
    Coverage,
    chi_squared,
    interval_coverage,
    interval_level,
    rank_uniformity,
    sbc_ranks,
    tarp,
)
from rtb_inverse.diagnostics.common import Estimate
from rtb_inverse.diagnostics.distances import (
    classifier_two_sample_test,
    clustered_p_value,
    energy_distance,
    sliced_wasserstein,
    total_variation,
)
from rtb_inverse.diagnostics.mixing import effective_draws, split_r_hat
from rtb_inverse.diagnostics.truth import crps, psnr, ssim
from rtb_inverse.diagnostics.weights import effective_sample_size, elbo, eubo, fit_generalised_pareto, log_mean_weight, pareto_smooth

__all__ = [
    "ELEMENTS", "LEAST_OBSERVATIONS", "ChiSquared", "Coverage", "Estimate", "chi_squared", "classifier_two_sample_test",
    "clustered_p_value", "crps", "effective_draws", "effective_sample_size", "elbo", "energy_distance", "eubo",
    "fit_generalised_pareto", "interval_coverage", "interval_level", "log_mean_weight", "pareto_smooth", "psnr", "rank_uniformity",
    "sbc_ranks", "sliced_wasserstein", "split_r_hat", "ssim", "tarp", "total_variation",
]  # fmt: skip
