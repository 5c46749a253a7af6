"""paper/reproduce.py: rates are climbed to on other people, what follows from scores, and the whole command in small."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "baby"))

import eval_rfacesim  # noqa: E402
import faces  # noqa: E402
from paper import compare, report, reproduce  # noqa: E402


def test_nobody_is_in_two_roles():
    """Seeds of pretraining, meta-training, choosing, testing and judging are disjoint, and what reproduce.py draws lies within."""
    ranges = [faces.BASE, faces.META, faces.CHOOSE, faces.TEST, faces.METRIC]
    assert all(a.stop <= b.start for a, b in zip(ranges, ranges[1:]))
    for size in (reproduce.FULL, reproduce.SUBSET):
        most = max(sweep["people"] for sweep in size["sweeps"])
        assert faces.CHOOSE.start + 500 + size["choose"] <= faces.CHOOSE.stop
        assert faces.TEST.start + 3000 + most <= faces.TEST.stop


@pytest.mark.parametrize("top, start", [(0, 0), (5, 0), (-4, 2), (7, -6), (-3, -3)])
def test_climbing_ends_on_the_top_with_a_worse_place_on_either_side(top, start):
    tried = []

    def score(place):
        tried.append(place)
        return -abs(place - top)
    assert reproduce.climb(score, start) == top
    assert {top - 1, top + 1} <= set(tried)


def fake_scores(sums):
    """`measure` with one sum for everybody by (method, rate), and the number of steps; remembers who was asked."""
    asked = []

    def measure(args, trial, steps, noises, copies=False):
        asked.append((trial.method, trial.rate, tuple(steps)))
        values = {}
        for count in steps:
            values[str(count)] = {name: {"sum": sums(trial.rate, count) + own} for name, own in (("a", 0.0), ("b", 0.1))}
        return values
    return measure, asked


def test_each_number_of_steps_has_a_rate_of_its_own(monkeypatch):
    best = {100: 9.6e-3, 250: 2.4e-3, 625: 8.5e-4}                                   # on the ladder of 1.2e-3
    measure, asked = fake_scores(lambda rate, count: 1 - abs(np.log2(rate / best[count])))
    monkeypatch.setattr(reproduce, "measure", measure)
    chosen = reproduce.choose_rates(None, "lora", 1, (100, 250, 625))
    assert {count: own["rate"] for count, own in chosen.items()} == best
    for count, own in chosen.items():                        # the ladder goes on beyond the best on either side
        rates = [float(rate) for rate in own["sums"]]
        assert min(rates) < own["rate"] < max(rates) and own["lead"][0] > 0
    assert not [steps for _, rate, steps in asked if rate > 5e-3 and 625 in steps]   # a hot rate is not trained to the end


def person(likeness, text, background=0.2):
    return {"likeness": likeness, "text": text, "sum": likeness + text, "found": 1.0, "background": background, "move": 0.01}


def scores(gap=0.0):
    """Likeness 0.5 and 0.7 at 100 and 400 steps for the others, `gap` more for Meta-LoRA; two people, two seeds of training."""
    found = {("none", 0.0): [{"0": {"a": person(0, 0.7, 0.4), "b": person(0, 0.7, 0.4)}}]}
    for method in reproduce.METHODS:
        more = gap if method == "meta-lora" else 0.0
        seeds = []
        for seed in (-0.01, 0.01):
            own = {}
            for count, likeness, text in (("100", 0.5, 0.72), ("400", 0.7, 0.68)):
                own[count] = {"a": person(likeness + more + seed - 0.05, text), "b": person(likeness + more + seed + 0.05, text)}
            seeds.append(own)
        found[method, 1e-3] = seeds
    rates = {m: {count: {"rate": 1e-3, "second": 2e-3, "lead": [0.01, 0.002]} for count in (100, 400)} for m in reproduce.METHODS}
    return report.Found([100, 400], rates, found)


def test_seeds_of_training_are_averaged_before_people_are():
    found = scores()
    assert report.of_people(found.scores["lora", 1e-3], 100, "likeness") == pytest.approx([0.45, 0.55])
    assert report.mean_error([0.45, 0.55, np.nan]) == pytest.approx([0.5, 0.05])
    assert found.curve("lora", "likeness").shape == (2, 2)


def test_steps_to_draw_level():
    sums = np.array([0.2, 0.6, 0.5, 0.8])
    steps = [100, 200, 400, 800]
    assert report.steps_to_reach(0.1, steps, sums) == 100 and report.steps_to_reach(0.9, steps, sums) == np.inf
    assert report.steps_to_reach(0.4, steps, sums) == pytest.approx(100 * 2 ** 0.5)    # half-way in the logarithm
    assert report.steps_to_reach(0.7, steps, sums) == pytest.approx(400 * 2 ** (2 / 3))
    own, other = (scores(gap=0.08).curve(method, "sum") for method in ("meta-lora", "lora"))
    needed = report.steps_needed(own, other[1], [100, 400])                # 1.38 of a curve from 1.30 to 1.46, all people alike
    assert needed["needed"] == pytest.approx(200) and needed["reached"] == 1
    assert needed["low"] == pytest.approx(needed["high"])
    behind = report.steps_needed(other, own[1], [100, 400])
    assert behind["needed"] == np.inf and behind["reached"] == 0


def test_text_at_equal_likeness_is_the_best_of_all_rates():
    lines = [np.array([[0.5, 0.7], [0.72, 0.68]]), np.array([[0.4, 0.6, 0.62], [0.74, 0.72, 0.60]])]
    assert report.text_at(0.6, lines) == pytest.approx(0.72)             # the second line's, 0.70 on the first
    assert report.text_at(0.65, lines) == pytest.approx(0.69)
    assert np.isnan(report.text_at(0.8, lines))
    found = scores(gap=0.05)
    texts = {m: report.text_at_levels([*found.lines(m).values()]) for m in ("lora", "meta-lora")}
    assert texts["lora"][0] == pytest.approx([0.70, 0.69, 0.68]) and texts["meta-lora"][0] == pytest.approx([0.71, 0.70, 0.69])
    assert len(texts["lora"]) == 1 + report.RESAMPLES


def test_the_tables_and_figures(tmp_path):
    found = scores(gap=0.05)
    text = report.write_report(found)
    assert "| Meta-LoRA | 400 | 0.001 | 75.0 (5.0) | 68.0 (0.0) | 143.0 (5.0) | 100.0 (0.0) | 50.0 (0.0) |" in text
    assert "| LoRA | 100 | +5.0 (0.0) | +0.0 (0.0) | +5.0 (0.0) |" in text
    report.draw_steps(found, tmp_path / "steps.png")
    report.draw_front(found, tmp_path / "front.png")
    for name in ("steps", "front"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 5


def test_what_the_scores_do_not_see(tmp_path, monkeypatch):
    """A picture equal to the crop copies its background whole; a face that moves by 0.1 of the width has a move of that size."""
    crop = Image.new("RGB", (32, 32), (100, 100, 100))
    head = Image.new("L", (32, 32))
    head.paste(255, (8, 8, 24, 24))
    own = SimpleNamespace(picture=crop, head=head)
    monkeypatch.setattr(reproduce.photos, "load_crops", lambda *args: [own])
    places = {}
    monkeypatch.setattr(reproduce.photos, "find_faces", lambda image: [places[image.getpixel((16, 16))[0]]])
    for seed, left in ((0, 4), (1, 8)):
        picture = crop.copy()
        picture.paste((seed, 0, 0), (8, 8, 24, 24))                       # only the head differs
        picture.save(tmp_path / f"0_{seed}.png")
        places[seed] = (left, 4, left + 8, 12, 1.0)
    args = SimpleNamespace(model="baby")
    someone = SimpleNamespace(reference=tmp_path / "photo.png")
    found = reproduce.copy_of(args, tmp_path, someone)
    assert found["background"] == 0 and found["move"] == pytest.approx(np.std([8 / 32, 12 / 32], ddof=1))
    Image.new("RGB", (32, 32), (151, 151, 151)).save(tmp_path / "5_0.png")  # of a later prompt: no face is looked for
    assert reproduce.copy_of(args, tmp_path, someone)["background"] == pytest.approx(51 / 255 / 3)


def test_an_error_in_a_worker_is_the_commands(tmp_path):
    pool = reproduce.workers(SimpleNamespace(jobs=2, device="cpu"))
    with pytest.raises(FileNotFoundError, match="nothing"):
        reproduce.side_by_side(pool, [(Path.read_text, tmp_path / "nothing")], "a call")


@pytest.fixture
def small(monkeypatch):
    """Two people, two photos, one rate, two or three iterations, two Euler steps."""
    sweep = dict(rank=1, steps=(2, 3), people=2)
    monkeypatch.setattr(reproduce, "PHOTOS", 2)
    monkeypatch.setattr(reproduce, "SHEET_STEPS", 3)
    monkeypatch.setattr(reproduce, "EULER_STEPS", 2)
    monkeypatch.setattr(reproduce, "climb", lambda score, start: max((0, 1), key=score))
    monkeypatch.setattr(reproduce, "SUBSET", dict(choose=2, sweeps=(sweep,), trainings=2, noises=1))


@pytest.mark.slow
def test_the_command_in_small(tmp_path, monkeypatch, capsys, small):
    words = ["--subset", "--jobs", "1", "--run", str(tmp_path / "run")]
    reproduce.reproduce(words)
    out = capsys.readouterr().out
    assert "| Meta-LoRA | 3 |" in out and "Meta-LoRA needs" in out
    folder = tmp_path / "run/report"
    assert {p.name for p in folder.iterdir()} == {"rates_r1.json", "report_r1.md", "steps_r1.png", "front_r1.png", "sheet_r1.png"}
    rates = json.loads((folder / "rates_r1.json").read_text())
    assert set(rates) == set(reproduce.METHODS) and set(rates["lora"]) == {"2", "3"}
    trial = next((tmp_path / "run/trials/people2").glob("meta-lora_r1_s1_*"))          # a second seed of training
    kept = json.loads((tmp_path / "run/scores/people2" / f"{trial.name}.json").read_text())["3"]
    rows = json.loads((trial / "scores.json").read_text())["pictures"]
    for someone in eval_rfacesim.read_people([tmp_path / "run/people2"]):
        own = [row for row in rows if (row["method"], row["identity"]) == ("meta-lora_r1_i3", someone.name)]
        assert kept[someone.name]["text"] == eval_rfacesim.summarise(own, [someone], "clip_t")["mean"]
        assert set(kept[someone.name]) == {*report.METRICS, "facesim"}

    monkeypatch.setattr(compare, "compare", None)                                  # all is there: nothing is made again
    reproduce.reproduce(words)
    assert capsys.readouterr().out == out
