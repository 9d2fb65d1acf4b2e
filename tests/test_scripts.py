"""The scripts run from end to end, in a small form, say their numbers and leave a picture."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "diffraction": "--draws 8 --observations 2 --rounds 1 --steps 8",
    "lensing": "--size 10 --pixels 16 --draws 8 --observations 2",
    "lensing_galaxies": "--prior priors/digits --pixels 16 --observations 2 --draws 4",
    "low_dose_ct": "--prior priors/digits --observations 2 --draws 4 --zeta 0.003 0.01",
    "navier_stokes": "--draws 8 --time 0.5 --reference 4",
    "scattering": "--prior priors/digits --grid 8 --wavelengths 2 --steps 5 --draws 4",
    "your_forward_model": "--observations 8 --draws 4",
}


def test_every_script_is_run_here():
    assert sorted(SMALL) == sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize("name", SMALL)
def test_a_script_runs(name, tmp_path):
    command = [sys.executable, f"scripts/{name}.py", *SMALL[name].split(), "--output", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nan" not in done.stdout and any(character.isdigit() for character in done.stdout)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert (tmp_path / "report.txt").read_text() == done.stdout


def test_data_of_your_own_are_read(tmp_path):
    np.save(tmp_path / "y.npy", np.full((2, 1, 16), 20))
    command = [sys.executable, "scripts/your_forward_model.py", "--observations", "2", "--draws", "4"]
    command += ["--data", str(tmp_path / "y.npy"), "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.load(tmp_path / "draws.npy").shape == (4, 2, 1, 8, 8) and done.stdout.count("±") > 10


@pytest.mark.parametrize("name", SMALL)
def test_a_script_stays_short(name):
    """Under 60 lines, blank ones apart: what the README says."""
    lines = [line for line in (ROOT / "scripts" / f"{name}.py").read_text().splitlines() if line.strip()]
    assert len(lines) < 60
