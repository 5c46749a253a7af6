"""paper/stage1.py: its LoMDs and rates, and the whole command in small."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "baby"))

from support import identities  # noqa: E402
from paper import compare, stage1  # noqa: E402


def test_every_lomd_has_a_file_of_its_own_and_a_rate_to_begin_with():
    size = SimpleNamespace(**stage1.FULL)
    every = [lomd for chain in stage1.chains(size) for lomd in chain]
    assert len({lomd.name for lomd in every}) == len(every)
    assert all(0 < lomd.guess < len(stage1.GRID) - 1 for lomd in every)
    assert stage1.chains(size)[-1][-1] == stage1.Lomd("random", 200, 5000)                 # the full stage 1 comes last


@pytest.mark.parametrize("begin", range(7))
def test_a_climb_ends_at_the_best_of_a_hill(begin):
    asked = []

    def score(place):
        asked.append(place)
        return -abs(place - 4.2)
    assert stage1.climb(score, begin) == 4
    assert {3, 4, 5} <= set(asked) and max(asked) < len(stage1.GRID) and min(asked) >= 0


@pytest.mark.slow
def test_the_curve_in_small(tmp_path, monkeypatch):
    """Three people, two LoMDs of each kind, one prompt, two steps."""
    monkeypatch.setattr(stage1, "PHOTOS", 3)
    monkeypatch.setattr(stage1, "COST", 2)
    monkeypatch.setattr(stage1, "PICTURES", 4)
    monkeypatch.setattr(stage1, "SUBSET", dict(budgets={3: (2, 4)}, gradients=(0, 2), iters=(2, 3), choose=2, curve=2, people=3, seeds=2))
    monkeypatch.setattr(identities, "read_prompts", lambda words, path: ["a photo of a [man/woman]"])
    monkeypatch.setattr(stage1, "GRID", stage1.GRID[2:7])
    monkeypatch.setattr(stage1.Lomd, "guess", 2)
    real = compare.sample_latents
    monkeypatch.setattr(compare, "sample_latents", lambda *args, **kwargs: real(*args[:5], 2, *args[6:], **kwargs))
    stage1.stage_1(["--subset", "--jobs", "1", "--run", str(tmp_path)])
    found = json.loads((tmp_path / "report/stage1.json").read_text())
    names = ["random", "gradients 3 0", "gradients 3 2", "random 3 2", "random 3 4"]
    assert [row["lomd"] for row in found["curve"]] == [name for name in names for _ in range(2)]
    assert all(row["sum"]["identities"] == 2 for row in found["curve"])
    assert all(row[name]["more"]["mean"] == 0 for row in found["curve"][-2:] for name in (*stage1.SCORES, "sum"))
    assert {(row["lomd"], row["stage 2"]) for row in found["decision"]} == {
        (name, count) for name in ("random", "random 3 2", "random 3 4") for count in (2, 3)}
    assert all(row["sum"]["identities"] == 3 for row in found["decision"])
    assert (tmp_path / "report/stage1.png").stat().st_size > 1000
