"""The scripts run from end to end, in a small form, say one line of numbers and leave a picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "lensing": "--size 10 --pixels 16 --draws 8 --observations 2",
    "low_dose_ct": "--prior priors/digits --observations 2 --draws 4",
    "navier_stokes": "--draws 8 --time 0.5 --reference 4",
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


@pytest.mark.parametrize("name", SMALL)
def test_a_script_stays_short(name):
    """Under 60 lines, blank ones apart: what the README says."""
    lines = [line for line in (ROOT / "scripts" / f"{name}.py").read_text().splitlines() if line.strip()]
    assert len(lines) < 60
