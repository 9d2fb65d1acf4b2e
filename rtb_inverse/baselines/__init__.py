"""Rival methods, one per file. Those that sample return `Particles`, as ours do; `reinforce` is a loss, as those of `objectives`.

(Conditional denoising on simulated pairs without RTB, "NPE", is `fit(posterior, warm_start=1.0)`.)
"""

from rtb_inverse.baselines.common import tuned
from rtb_inverse.baselines.deepinv_samplers import deepinv_sampler
from rtb_inverse.baselines.dps import dps, tuned_zeta
from rtb_inverse.baselines.fps_smc import fps_smc
from rtb_inverse.baselines.hmc import hmc
from rtb_inverse.baselines.pcn import pcn
from rtb_inverse.baselines.psld import psld
from rtb_inverse.baselines.reinforce import reinforce
from rtb_inverse.baselines.twisted import twisted

__all__ = ["deepinv_sampler", "dps", "fps_smc", "hmc", "pcn", "psld", "reinforce", "tuned", "tuned_zeta", "twisted"]
