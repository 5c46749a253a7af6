"""baby/held_out.py: the comparison is paired to the bit, and goes on where it was stopped."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "baby"))

import held_out  # noqa: E402
from flux_model import Flux, find_model, flux_files  # noqa: E402
from metalora import find_targets, random_lomd, save_lomd  # noqa: E402


def test_the_same_lomd_twice_makes_no_difference(tmp_path, monkeypatch, capsys):
    """Against itself a LoMD shows a difference of exactly zero at every step, and both move from step 0 on."""
    with torch.device("meta"):
        targets = find_targets(Flux(flux_files(find_model("baby"))[1]))
    save_lomd(tmp_path / "lomd.safetensors", random_lomd(targets, 4, seed=3), {})
    monkeypatch.setattr(held_out, "STEPS", (0, 1, 3))
    words = [str(tmp_path / "lomd.safetensors"), "--people", "2", "--pictures", "1", "--seed", "3",
             "--out", str(tmp_path / "plot.png")]
    held_out.held_out(words)
    out = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +(-?[\d.]+) \(([\d.]+)\) +(-?[\d.]+) \(([\d.]+)\) +(-?[\d.]+) \(([\d.]+)\)$", out, re.M)
    assert [int(row[0]) for row in rows] == [0, 1, 3]
    assert all(row[1:3] == row[3:5] and float(row[5]) == float(row[6]) == 0 for row in rows)
    results = json.loads((tmp_path / "plot.json").read_text())
    assert len(results) == 2 + 4 and all(len(set(results[k])) == 3 for k in results if k.startswith("random"))
    assert (tmp_path / "plot.png").stat().st_size > 0

    monkeypatch.setattr(held_out, "losses_of", None)                                  # nothing is left to do
    held_out.held_out(words)
    assert capsys.readouterr().out == out


def test_summary_is_relative_to_step_0():
    results = {"random 1": [2.0, 1.0], "random 2": [1.0, 1.5]}
    mean, error, relative = held_out.summary(results, ["random"], [1, 2])["random"]
    assert np.allclose(relative, [[0, -50], [0, 50]]) and np.allclose(mean, 0) and np.allclose(error, [0, 50])
