"""paper/reproduce.py: learning rates chosen on other people, seeds of training together, and the whole command in small."""
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
from support import identities  # noqa: E402
import faces  # noqa: E402
import personalize  # noqa: E402
from paper import compare, reproduce  # noqa: E402


def test_nobody_is_in_two_roles():
    """Seeds of pretraining, meta-training, choosing, testing and judging are disjoint, and what reproduce.py draws lies within."""
    ranges = [faces.BASE, faces.META, faces.CHOOSE, faces.TEST, faces.METRIC]
    assert all(a.stop <= b.start for a, b in zip(ranges, ranges[1:]))
    for size in (reproduce.FULL, reproduce.SUBSET):
        assert faces.CHOOSE.start + 500 + size["choose"] <= faces.CHOOSE.stop and faces.TEST.start + 3000 + 500 <= faces.TEST.stop


def test_the_best_rate_by_the_sum_of_both_scores(tmp_path, monkeypatch):
    seen = {3e-4: (0.2, 0.70), 1e-3: (0.5, 0.65), 3e-3: (0.7, 0.30), 1e-2: (0.6, 0.20)}               # R-FaceSim, CLIP-T

    def scores(pool, out, methods, ranks, *words):
        robust, text = seen[words[words.index("--lr") + 1]]
        row = lambda method, r, c: {"method": method, "r_facesim": {"mean": r}, "clip_t": {"mean": c}}
        rows = [row("none", 0.1, 0.72), row("lora", robust, text), row("meta-lora", robust, 0.1 * text)]
        return {"methods": [own for own in rows if own["method"] in methods]}
    monkeypatch.setattr(reproduce, "evaluate", scores)
    chosen = reproduce.choose_rates(None, [], Path("data"), tmp_path, {"lora": tuple(seen), "meta-lora": (3e-4, 1e-2)})
    assert chosen == {"lora": 1e-3, "meta-lora": 1e-2}                     # its text scores are a tenth
    assert json.loads((tmp_path / "rates.json").read_text())["tried"]["lora"]["0.003"] == {"r_facesim": 0.7, "clip_t": 0.3}


def test_seeds_of_training_count_as_one_identity_and_differences_are_paired():
    people = [eval_rfacesim.Person(name, name, None, Path("r"), (Path("t"),)) for name in "ab"]
    score = lambda method, identity, value: {"method": method, "identity": identity, "number": 0, "seed": 0, "clip_t": value, "r_facesim": value}
    runs = {seed: {m: [score(m, i, base + own + 0.01 * seed) for i, own in (("a", 0.2), ("b", 0.6))] for m, base in (("lora", 0.1), ("none", 0.0))}
            for seed in range(2)}
    runs[0]["lora"][0]["r_facesim"] = None                                 # on a, seed 0: no face
    runs[0]["meta-lora_r1_i2"], runs[0]["meta-lora_r1_i10"] = ([] for _ in range(2))
    persons, rows = reproduce.together(people, runs)
    assert list(rows) == ["none", "lora", "meta-lora_r1_i2", "meta-lora_r1_i10"]
    assert len(persons) == 4 and eval_rfacesim.summarise(rows["none"], persons, "clip_t")["identities"] == 2
    assert eval_rfacesim.summarise(rows["none"], persons, "clip_t")["mean"] == pytest.approx(0.405)
    gap = reproduce.difference(rows, persons, "lora", "none", "clip_t")
    assert gap == {"mean": pytest.approx(0.1), "error": pytest.approx(0, abs=1e-9), "identities": 2}
    strict = reproduce.difference(rows, persons, "lora", "none", "r_facesim")   # a: (0 + .31) / 2 - .205, b: .1
    assert strict["mean"] == pytest.approx((0.155 - 0.205 + 0.1) / 2, abs=1e-6)


def test_what_is_compared_with_meta_lora():
    labels = [f"{m}_r{r}_i{i}" for m in ("meta-lora", "lora-crops") for r in (1, 4) for i in (250, 375, 625)]
    assert [pair for pair in reproduce.compared(["none", *labels]) if "_r4_" in pair[0]] == [
        ("meta-lora_r4_i250", "lora-crops_r4_i625"), ("meta-lora_r4_i250", "lora-crops_r4_i250"), ("meta-lora_r4_i375", "lora-crops_r4_i625"),
        ("meta-lora_r4_i375", "lora-crops_r4_i375"), ("meta-lora_r4_i625", "lora-crops_r4_i625")]
    assert reproduce.compared(["none", "meta-lora_r1_i375", "lora_r1_i625"]) == [("meta-lora_r1_i375", "lora_r1_i625")]


def test_each_method_at_each_rank_is_a_call_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "scores.json").write_text("{}")
    calls, last = [], []
    monkeypatch.setattr(reproduce, "side_by_side", lambda pool, some, name: calls.extend(some))
    monkeypatch.setattr(compare, "compare", lambda words, quiet: last.append(words))
    methods, words = ["none", "lora", "meta-lora"], ["--lr", "lora=1", "--iters", 2, 3]
    assert reproduce.evaluate("a pool", tmp_path, methods, [1, 4], *words) == {}
    call = lambda methods, ranks: ["--lr", "lora=1", "--iters", "2", "3", "--out", str(tmp_path), "--methods", *methods, "--ranks", *ranks]
    assert last == [call(methods, ["1", "4"])]
    assert [words for _, words, quiet in calls] == [
        call(["none"], ["1"]), *(call([method], [rank]) for method in methods[1:] for rank in ("1", "4"))]


@pytest.mark.slow
def test_side_by_side_is_as_one_after_the_other(tmp_path):
    reproduce.draw_people(eval_rfacesim.Judges("baby"), tmp_path / "people", faces.TEST.start + 3000, 2, 2)
    args, found = SimpleNamespace(jobs=None, device="cpu"), []
    (tmp_path / "prompts.txt").write_text("a photo of a [man/woman]")
    for jobs in (1, 2):
        args.jobs = jobs
        scores = reproduce.evaluate(reproduce.workers(args), tmp_path / str(jobs), ["none", "lora", "meta-lora"], [1, 2], "--model", "baby",
                                    "--steps", 2, "--iters", 2, "--seeds", 1, "--prompts", tmp_path / "prompts.txt", "--data", tmp_path / "people")
        found.append({(row["method"], row["identity"]): row["clip_t"] for row in scores["pictures"]})
    assert len(found[0]) == 10 and found[0] == pytest.approx(found[1], abs=1e-3)
    with pytest.raises(ValueError, match="another setting of steps"):           # an error of a worker is the command's
        reproduce.side_by_side(reproduce.workers(args), [(compare.compare, [
            "--model", "baby", "--steps", "3", "--methods", "none", "--prompts", str(tmp_path / "prompts.txt"), "--data", str(tmp_path / "people"),
            "--out", str(tmp_path / "1")])], "a call")


@pytest.fixture
def small(monkeypatch):
    """Two people, three photos, one prompt, two steps, one learning rate, two or three iterations."""
    monkeypatch.setattr(reproduce, "PHOTOS", 3)
    monkeypatch.setattr(reproduce, "SUBSET", dict(
        people=2, choose=2, rates=dict.fromkeys(reproduce.METHODS, (1e-3,)), noises=2, trainings=2, sweep=2, ranks=(1,), iters=(2, 3)))
    monkeypatch.setattr(personalize, "ITERATIONS", {"meta-lora": 2, "lora": 3})
    monkeypatch.setattr(identities, "read_prompts", lambda words, path: ["a photo of a [man/woman]"])
    real = compare.sample_latents
    monkeypatch.setattr(compare, "sample_latents", lambda *args, **kwargs: real(*args[:5], 2, *args[6:], **kwargs))


def test_faces_that_stay_and_faces_that_move(tmp_path, monkeypatch):
    """The spread is that of the centre over the seeds, the mean over people; one face alone has none, other prompts do not count."""
    boxes = {}

    def picture(label, person, prompt, seed, *box):
        path = tmp_path / f"{label}_{person}_{prompt}_{seed}.png"
        Image.new("RGB", (200, 100), (len(boxes), 0, 0)).save(path)
        boxes[len(boxes)] = [(*box, 1.0)] if box else []
        return eval_rfacesim.Picture(label, person, prompt, seed, path, "")
    monkeypatch.setattr(reproduce.photos, "find_faces", lambda image: boxes[image.getpixel((0, 0))[0]])
    pictures = [picture("still", p, 0, seed, 80, 30, 120, 70) for p in "ab" for seed in range(3)]
    for person, step in (("a", 20), ("b", 40)):                                   # to the right, and down by half as much
        pictures += [picture("moving", person, 0, seed, 20 + step * seed, 10 + step / 2 * seed, 60 + step * seed, 50 + step / 2 * seed)
                     for seed in range(3)]
    pictures += [picture("moving", "a", 1, 5, 180, 0, 200, 10), picture("lost", "a", 0, 0, 1, 1, 9, 9), picture("lost", "a", 0, 1)]
    found = reproduce.spread(pictures)
    assert found["still"] == {"mean": 0, "error": 0, "people": 2} and set(found) == {"still", "moving"}
    # steps of 0.1 and 0.2 of the width, and of the height: standard deviations over three seeds 0.1 and 0.2 each way
    assert found["moving"] == {"mean": pytest.approx(0.15 * 2 ** 0.5), "error": pytest.approx(0.05 * 2 ** 0.5), "people": 2}


@pytest.mark.parametrize("words, said", [(["--people", "1"], "--people is 2 to 500"), (["--sweep", "1"], "--sweep is 0 or 2 to 48"),
                                         (["--people", "4", "--sweep", "5"], "--sweep is 0 or 2 to 4")])
def test_bad_numbers_of_people(words, said):
    with pytest.raises(ValueError, match=said):
        reproduce.reproduce(words)


@pytest.mark.slow
def test_the_command_in_small(tmp_path, monkeypatch, capsys, small):
    words = ["--subset", "--jobs", "1", "--run", str(tmp_path / "run")]
    reproduce.reproduce(words)
    out = capsys.readouterr().out
    assert "meta-lora_r1_i2 less lora-crops_r1_i3" in out and "learning rates: lora " in out
    report = json.loads((tmp_path / "run/report/scores.json").read_text())
    labels = ["none", *(f"{m}_r1_i{i}" for m in reproduce.METHODS for i in (2, 3))]
    assert [(m["label"], m["r_facesim"]["of"]) for m in report["methods"]] == [(label, 8) for label in labels]      # two seeds of each kind
    assert set(report["settings"]["differences"]) == {
        *(f"meta-lora_r1_i2 less {m}" for m in ("lora_r1_i3", "lora-crops_r1_i3", "random-lomd_r1_i2", "lora_r1_i2", "lora-crops_r1_i2")),
        *(f"meta-lora_r1_i3 less {m}" for m in ("lora_r1_i3", "lora-crops_r1_i3", "random-lomd_r1_i2", "random-lomd_r1_i3"))}
    means = [np.mean([row["clip_t"] for row in report["pictures"] if row["method"] == "lora_r1_i3" and row["identity"].endswith(f" seed {s}")])
             for s in range(2)]
    assert means[0] != means[1]
    assert next(m for m in report["methods"] if m["label"] == "lora_r1_i3")["clip_t"]["mean"] == pytest.approx(np.mean(means), abs=2e-6)
    sweep = json.loads((tmp_path / "run/report/sweep/scores.json").read_text())
    assert [m["label"] for m in sweep["methods"]] == ["none", *(f"{m}_r1_i{i}" for m in reproduce.METHODS for i in (2, 3))]
    assert all(m["r_facesim"]["of"] == 2 for m in sweep["methods"])
    same = [next(row for row in of["pictures"] if row["method"] == "lora_r1_i3" and row["seed"] == 0) for of in (report, sweep)]
    assert same[0] == pytest.approx(same[1], abs=2e-6)                                 # the first of the same people, in other batches
    for folder in ("report", "report/sweep"):
        assert {p.name for p in (tmp_path / "run" / folder).iterdir()} >= {"tables.md", "scores.png", "ranks.png", "sheet_seeds.png"}

    monkeypatch.setattr(compare, "train_together", None)                                  # all is there: nothing is made again
    monkeypatch.setattr(compare, "sample_latents", None)
    for slow in ("figures", "sheets"):
        monkeypatch.setattr(reproduce, slow, lambda *args: None)
    reproduce.reproduce(words)
    assert capsys.readouterr().out == out
