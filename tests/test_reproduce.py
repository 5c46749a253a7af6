"""paper/reproduce.py: rates are climbed to on other people, what follows from scores, and the whole command in small."""
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
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
from support.checkpoints import flux_fingerprint  # noqa: E402
from support.finding import find_model  # noqa: E402


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


def fake_scores(sums, noise=0.0):
    """`measure` with a sum by rate and number of steps, and of either person; remembers who was asked."""
    asked = []

    def measure(args, trial, steps):
        asked.append((trial.rate, max(steps)))
        values = {}
        for count in steps:
            mean = sums(trial.rate, count)
            values[count] = {"sum": np.array([mean + noise * trial.rate, mean + 0.1 - noise * trial.rate])}
        return values
    return measure, asked


def test_each_number_of_steps_has_a_rate_of_its_own(monkeypatch):
    best = {100: 9.6e-3, 250: 2.4e-3, 625: 8.5e-4}                                   # on the ladder of 1.2e-3
    measure, asked = fake_scores(lambda rate, count: 1 - abs(np.log2(rate / best[count])))
    monkeypatch.setattr(reproduce, "measure", measure)
    chosen, tried = reproduce.choose_rates(None, "lora", 1, (100, 250, 625))
    assert chosen == best
    for count, rate in chosen.items():                       # the ladder goes on beyond the best on either side
        rates = [rate for rate in tried if count in tried[rate]]
        assert min(rates) < rate < max(rates)
        assert tried[rate][count]["sum"][0] == max(tried[rate][count]["sum"][0] for rate in rates) == pytest.approx(1)
    assert len(asked) == len(set(asked))
    assert not [rate for rate, longest in asked if rate > 5e-3 and longest == 625]   # a hot rate is not trained to the end


def test_a_rate_serves_smaller_numbers_while_it_is_level(monkeypatch):
    """Either person prefers another rate, so that the lead of the best is within its error."""
    best = {100: 2.4e-3, 250: 1.7e-3, 625: 1.2e-3}
    for noise, expected in ((0.0, best), (2000.0, dict.fromkeys(best, 1.2e-3))):
        measure, _ = fake_scores(lambda rate, count: 1 - abs(np.log2(rate / best[count])), noise)
        monkeypatch.setattr(reproduce, "measure", measure)
        assert reproduce.choose_rates(None, "lora", 1, (100, 250, 625))[0] == expected


def values(likeness, text, background=0.2):
    """Scores of people, one for each likeness."""
    likeness = np.array(likeness)
    same = np.ones(len(likeness))
    return {"likeness": likeness, "text": text * same, "sum": likeness + text, "found": same, "background": background * same,
            "move": 0.01 * same}


def scores(gap=0.0):
    """Likeness 0.5 and 0.7 at 100 and 400 steps for the others, `gap` more for Meta-LoRA; two people, two trainings.
    The rates were chosen on three others, for whom a second one is worse."""
    found = {"none": {0: values([0, 0], 0.7, 0.4)}}
    tried = {}
    for method in reproduce.FIRST_RATES:
        more = gap if method == "meta-lora" else 0.0
        found[method] = {}
        tried[method] = {1e-3: {}, 2e-3: {}}
        for count, likeness, text in ((100, 0.5 + more, 0.72), (400, 0.7 + more, 0.68)):
            found[method][count] = values([likeness - 0.05, likeness + 0.05], text)
            for rate, worse in ((1e-3, 0), (2e-3, 0.1)):
                tried[method][rate][count] = values([likeness - worse] * 3, text)
    rates = {method: {100: 1e-3, 400: 1e-3} for method in reproduce.FIRST_RATES}
    return report.Found([100, 400], rates, tried, [found, found])


def test_errors_are_over_people_who_have_a_value():
    assert report.mean_error(np.array([0.45, 0.55, np.nan])) == pytest.approx([0.5, 0.05])
    assert report.stacked(scores().scores["lora"], "likeness") == pytest.approx(np.array([[0.45, 0.55], [0.65, 0.75]]))


def test_scores_are_read_as_they_are_kept(tmp_path):
    """People in the order of their names, whatever that of the file."""
    args = SimpleNamespace(run=tmp_path, report=True)
    trial = reproduce.Trial("choose", "lora", 1, 1e-3)
    folder = tmp_path / "scores/choose"
    folder.mkdir(parents=True)
    (folder / "lora_r1_s0_0.001.json").write_text('{"100": {"b": {"sum": 2, "move": NaN}, "a": {"sum": 1, "move": 0.5}}}')
    curve = reproduce.measure(args, trial, [100])
    assert curve[100]["sum"].tolist() == [1, 2] and np.isnan(curve[100]["move"]).tolist() == [False, True]
    with pytest.raises(reproduce.Missing, match="does not hold 250 steps"):
        reproduce.measure(args, trial, [100, 250])


def test_seeds_of_training_are_averaged_before_people_are(tmp_path, monkeypatch):
    """Each report has the mean of the trainings so far, by person, the step counts in their order."""
    found = []
    monkeypatch.setattr(reproduce, "report", lambda args, folder, rank, so_far: found.append(so_far))
    monkeypatch.setattr(reproduce, "choose_rates", lambda args, method, rank, steps: ({400: 2e-3, 100: 1e-3}, {}))

    def measure(args, trial, steps):
        return {count: values([count + trial.seed, 2 * count + 3 * trial.seed], 0.7) for count in steps}
    monkeypatch.setattr(reproduce, "measure", measure)
    args = SimpleNamespace(jobs=1, out=tmp_path, trainings=2)
    reproduce.run_sweep(args, 1, (100, 400), 2)
    first, one, two = found
    assert first.scores == {} and [len(each.trainings) for each in found] == [0, 1, 2]
    assert [*two.scores["lora"]] == [100, 400] and two.scores["none"][0]["likeness"].tolist() == [0, 0]
    assert one.scores["lora"][400]["likeness"].tolist() == [400, 800]
    assert two.scores["lora"][400]["likeness"].tolist() == [400.5, 801.5]


def test_steps_to_draw_level():
    sums = np.array([0.2, 0.6, 0.5, 0.8])[:, None]
    steps = [100, 200, 400, 800]
    assert report.steps_to_reach(0.1, steps, sums) == 100 and report.steps_to_reach(0.9, steps, sums) == np.inf
    assert report.steps_to_reach(0.4, steps, sums) == pytest.approx(100 * 2 ** 0.5)    # half-way in the logarithm
    assert report.steps_to_reach(0.55, steps, sums) == pytest.approx(100 * 2 ** 0.875)   # where it gets there first of three times
    assert report.steps_to_reach(0.7, steps, sums) == pytest.approx(400 * 2 ** (2 / 3))
    several = report.steps_to_reach(np.array([0.4, 0.1]), [100, 200], np.array([[0.2, 0.2], [0.6, 0.3]]))
    assert several == pytest.approx([100 * 2 ** 0.5, 100])                # each curve has a target of its own


def test_steps_needed_are_in_the_table():
    """1.38 of a curve from 1.30 to 1.46, all people alike: half-way in the logarithm, and in all resamples."""
    header, rows = report.lead_table(scores(gap=0.08))
    needs = header.index("Meta-LoRA needs")
    assert header[needs:] == ["Meta-LoRA needs", "16 % quantile", "84 %", "reached in"]
    for row in rows:
        assert row[needs:] == (["100", "100", "100", "100%"] if row[1] == 100 else ["200", "200", "200", "100%"])
    _, rows = report.lead_table(scores(gap=-0.2))
    assert [row[needs:] for row in rows if row[1] == 400] == [["more", "more", "more", "0%"]] * 3


def test_text_at_equal_likeness_is_the_best_of_all_rates():
    lines = [np.array([[0.5, 0.7], [0.72, 0.68]])[..., None], np.array([[0.4, 0.6, 0.62], [0.74, 0.72, 0.60]])[..., None]]
    assert report.text_at(0.6, lines) == pytest.approx(0.72)             # the second line's, 0.70 on the first
    assert report.text_at(0.65, lines) == pytest.approx(0.69)
    assert np.isnan(report.text_at(0.8, lines))
    found = scores(gap=0.05)
    for method, expected in (("lora", [0.70, 0.69, 0.68]), ("meta-lora", [0.71, 0.70, 0.69])):
        curve = found.scores[method]
        line = report.resampled(np.stack([report.stacked(curve, "likeness"), report.stacked(curve, "text")]))
        assert line.shape == (2, 2, 1 + report.RESAMPLES)
        assert [report.text_at(level, [line])[0] for level in report.LEVELS] == pytest.approx(expected)
    _, rows = report.front_table("title", {method: [found.scores[method]] for method in found.rates})
    cells = {row[0]: row[1:] for row in rows}
    assert [cell.split()[0] for cell in cells["LoRA"]] == ["70.0", "+1.0", "69.0", "+1.0", "68.0", "+1.0"]
    assert [cell.split()[0] for cell in cells["Meta-LoRA"]] == ["71.0", "+0.0", "70.0", "+0.0", "69.0", "+0.0"]
    _, rows = report.front_table("title", {method: curves.values() for method, curves in found.tried.items()})
    assert [cell.split()[0] for cell in rows[0][1:5]] == ["70.0", "+1.0", "69.0", "+1.0"]


def test_the_tables_and_figures(tmp_path):
    found = scores(gap=0.05)
    text = report.report_text(found)
    assert "| Meta-LoRA | 400 | 0.001 | 75.0 (5.0) | 68.0 (0.0) | 143.0 (5.0) | 100.0 (0.0) | 50.0 (0.0) |" in text
    assert "| LoRA | 100 | +5.0 (0.0) | +0.0 (0.0) | +5.0 (0.0) |" in text
    assert "| people: 2, trainings of each: 2 | steps |" in text and "| 70.0 / 68.0 (138.0); 70.0 / 68.0 (138.0) |" in text
    assert "| rates, chosen on 3 people | rate | 100 steps | 400 steps |" in text
    assert "| LoRA | 0.001 | **50.0 / 72.0 (122.0)** | **70.0 / 68.0 (138.0)** |" in text
    assert "| LoRA | 0.002 | 40.0 / 72.0 (112.0) | 60.0 / 68.0 (128.0) |" in text
    assert "| LoRA | lead | +10.0 (0.0) | +10.0 (0.0) |" in text
    assert "| no LoRA | 0 |  | 0.0 (0.0) | 70.0 (0.0) | 70.0 (0.0) | 100.0 (0.0) | 0.0 (0.0) | 1.0 (0.0) |" in text
    first = report.report_text(found._replace(trainings=[]))                         # before the other people are measured
    assert text.startswith(first) and "trainings" not in first
    for name, some in (("scores", found), ("first", found._replace(trainings=[]))):
        report.draw_found(tmp_path / f"{name}.png", some)
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 5


def test_what_the_scores_do_not_see(tmp_path, monkeypatch):
    """A picture equal to the crop copies its background whole; a face that moves by 0.1 of the width has a move of that size."""
    crop = Image.new("RGB", (32, 32), (100, 100, 100))
    head = Image.new("L", (32, 32))
    head.paste(255, (8, 8, 24, 24))
    own = SimpleNamespace(picture=crop, head=head)
    monkeypatch.setattr(reproduce.photos, "load_crops", lambda *args, **more: [own])
    places = {}
    monkeypatch.setattr(reproduce.photos, "find_faces", lambda image: [places[image.getpixel((16, 16))[0]]])
    for seed, left in ((0, 4), (1, 8)):
        picture = crop.copy()
        picture.paste((seed, 0, 0), (8, 8, 24, 24))                       # only the head differs
        picture.save(tmp_path / f"0_{seed}.png")
        places[seed] = (left, 4, left + 8, 12, 1.0)
    args = SimpleNamespace(resolution=[32], aspects=None, scales=None)
    someone = SimpleNamespace(reference=tmp_path / "photo.png")
    found = reproduce.copy_of(args, tmp_path, someone)
    assert found["background"] == 0 and found["move"] == pytest.approx(np.std([8 / 32, 12 / 32], ddof=1))
    Image.new("RGB", (32, 32), (151, 151, 151)).save(tmp_path / "5_0.png")  # of a later prompt: no face is looked for
    assert reproduce.copy_of(args, tmp_path, someone)["background"] == pytest.approx(51 / 255 / 3)


def test_scores_of_another_lomd_are_not_taken_for_these(tmp_path):
    (tmp_path / "scores").mkdir()
    other = {"model": flux_fingerprint(find_model("baby")), "lomd": "sha256 of another"}
    (tmp_path / "scores/settings.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="scores was made with other settings: lomd was"):
        reproduce.reproduce(["--run", str(tmp_path), "--report"])


def test_a_rate_that_serves_two_numbers_is_not_given_up_for_an_older_one(monkeypatch):
    """At 100 steps the best is that of 250, and level with that of 625."""
    best = {100: 2.4e-3, 250: 2.4e-3, 625: 1.2e-3}
    measure, _ = fake_scores(lambda rate, count: 1 - abs(np.log2(rate / best[count])))

    def level_at_100(args, trial, steps):
        return {count: {"sum": scores["sum"] + (count == 100) * np.array([9, -9]) * (trial.rate == 1.2e-3)}
                for count, scores in measure(args, trial, steps).items()}
    monkeypatch.setattr(reproduce, "measure", level_at_100)
    assert reproduce.choose_rates(None, "lora", 1, (100, 250, 625))[0] == best


def hanging(folder):
    """Workers that would go on for a minute, beside a process that is killed once both have begun."""
    begin = [(Path(folder) / f"{i}",) for i in range(2)]
    reproduce.side_by_side(SimpleNamespace(jobs=2), sleep_after, begin, "calls")


def sleep_after(path):
    path.touch()
    time.sleep(60)


def die(path):
    os.kill(os.getpid(), signal.SIGKILL)


def test_kill_ends_the_workers_too(tmp_path):
    """A terminal sends Ctrl-C to all of them; `kill` reaches one process."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_reproduce, support.common as common; " \
           "sys.exit(common.run_script('x', lambda argv: test_reproduce.hanging(sys.argv[2])))"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not all((tmp_path / f"{i}").exists() for i in range(2)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and errors.endswith("x: interrupted\n") and "Traceback" not in errors


def test_a_worker_that_is_killed_is_one_line(tmp_path):
    with pytest.raises(OSError, match="perhaps for lack of memory"):
        reproduce.side_by_side(SimpleNamespace(jobs=2), die, [(tmp_path,)], "calls")


def test_an_error_in_a_worker_is_the_commands(tmp_path):
    (tmp_path / "a").write_text("text")
    args = SimpleNamespace(jobs=2)
    assert reproduce.side_by_side(args, Path.read_text, [(tmp_path / "a",)] * 3, "calls") == ["text"] * 3
    with pytest.raises(FileNotFoundError, match="nothing"):
        reproduce.side_by_side(args, Path.read_text, [(tmp_path / "nothing",), (tmp_path / "a",)], "calls")


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
    run = tmp_path / "run"
    words = ["--subset", "--jobs", "1", "--run", str(run)]
    trained = []
    run_trial = reproduce.run_trial
    monkeypatch.setattr(reproduce, "run_trial", lambda args, trial, steps: trained.append(trial) or run_trial(args, trial, steps))
    reproduce.reproduce(words)
    out = capsys.readouterr().out
    assert "| Meta-LoRA | 3 |" in out and "Meta-LoRA needs" in out
    first, second = (out.index(f"people: 2, trainings of each: {count}") for count in (1, 2))
    assert first < second                                                          # a report after each seed of training
    seeds = [trial.seed for trial in trained]
    assert seeds == sorted(seeds) and {trial.method for trial in trained if trial.seed} == set(reproduce.FIRST_RATES)
    folder = run / "report"
    assert {p.name for p in folder.iterdir()} == {"report_r1.md", "scores_r1.png", "sheet_r1.png"}
    trial = next((run / "trials/people2").glob("meta-lora_r1_s1_*"))                  # a second seed of training
    kept = json.loads((run / "scores/people2" / f"{trial.name}.json").read_text())["3"]
    rows = json.loads((trial / "scores.json").read_text())["pictures"]
    for someone in eval_rfacesim.read_people([run / "people2"]):
        own = [row for row in rows if (row["method"], row["identity"]) == ("meta-lora_r1_i3", someone.name)]
        assert kept[someone.name]["text"] == eval_rfacesim.summarise(own, [someone], "clip_t")["mean"]
        assert set(kept[someone.name]) == {*report.AXES, "facesim", "found", "background", "move"}

    monkeypatch.setattr(compare, "compare", None)                                  # all is there: nothing is made again
    reproduce.reproduce(words)
    assert capsys.readouterr().out == out

    # --scores of a stopped run, given back to an empty folder: the tables of the seeds that are whole
    again = tmp_path / "again"
    shutil.copytree(run / "scores", again / "scores")
    (again / "scores/people2" / f"{trial.name}.json").unlink()
    reproduce.reproduce(["--subset", "--report", "--run", str(again)])
    printed, said = capsys.readouterr()
    assert {p.name for p in (again / "report").iterdir()} == {"report_r1.md", "scores_r1.png"}   # no sheet without images
    assert printed == out[:out.rindex("| rates, chosen on")] and f"{trial.name}.json does not hold 2 steps yet" in said
    with pytest.raises(TypeError):                                                 # without --report it would train
        reproduce.reproduce(["--subset", "--jobs", "1", "--run", str(again)])


def test_people_are_the_same_after_an_interruption(tmp_path, monkeypatch):
    """Also where a picture in which no face was found was drawn again."""
    turns = itertools.cycle([False, True, True])
    judges = SimpleNamespace(embed=lambda image: next(turns) or None)
    reproduce.draw_people(judges, tmp_path / "whole", 110500, 1)
    save = reproduce.save_png

    def dies(image, path):
        if path.name == "2.png":
            raise KeyboardInterrupt
        save(image, path)
    monkeypatch.setattr(reproduce, "save_png", dies)
    turns = itertools.cycle([False, True, True])
    with pytest.raises(KeyboardInterrupt):
        reproduce.draw_people(judges, tmp_path / "hit", 110500, 1)
    monkeypatch.setattr(reproduce, "save_png", save)
    turns = itertools.cycle([False, True, True])
    reproduce.draw_people(judges, tmp_path / "hit", 110500, 1)
    whole, hit = ({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.png")} for name in ("whole", "hit"))
    assert whole == hit and len(whole) == 6
