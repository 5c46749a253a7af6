"""paper/several.py: its folders of one photo and of five, and the whole command in small."""
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "baby"))

from support import identities  # noqa: E402
from paper import compare, several  # noqa: E402


def test_one_photo_and_five_are_judged_by_the_same_others(tmp_path, monkeypatch):
    def fake(judges, folder, first, count, pictures, captions):
        (folder / "man" / "7").mkdir(parents=True)
        for i in range(pictures):
            Image.new("RGB", (64, 64), (i, i, i)).save(folder / "man" / "7" / f"{i}.png")
            (folder / "man" / "7" / f"{i}.txt").write_text(f"caption {i}")
    monkeypatch.setattr(several, "draw_people", fake)
    several.draw(None, tmp_path, "some", 7, 1)
    people = {folder.name: identities.read_people([folder], count=int(folder.name[0]))[0] for folder in (tmp_path / "some").iterdir()}
    assert sorted(people) == ["1 captions", "1 prompt", "5 captions", "5 prompt"]
    names = {name: ([p.name for p in (person.reference, *person.more)], [p.name for p in person.tests]) for name, person in people.items()}
    tests = [f"{i}.png" for i in range(5, 9)]
    for name, own in names.items():
        assert own == ([f"{i}.png" for i in range(int(name[0]))], tests)
        assert (people[name].reference.with_suffix(".txt").exists()) == name.endswith("captions")


def test_every_way_has_a_folder_of_its_own():
    assert len({way.name for way in several.WAYS}) == len(several.WAYS) and several.WAYS[0] == several.ONE


@pytest.mark.slow
def test_the_command_in_small_twice(tmp_path, monkeypatch, capsys):
    """Two people, one prompt, two steps; the second time nothing is made again."""
    one, *_, five = several.SUBSET["ways"]
    monkeypatch.setattr(several, "SUBSET", dict(choose=2, people=2, ways=(one._replace(iters=(2,)), five._replace(iters=(2, 3)))))
    monkeypatch.setattr(identities, "read_prompts", lambda words, path: ["a photo of a [man/woman]"])
    real = compare.sample_latents
    monkeypatch.setattr(compare, "sample_latents", lambda *args, **kwargs: real(*args[:5], 2, *args[6:], **kwargs))
    words = ["--subset", "--jobs", "1", "--run", str(tmp_path)]
    several.several(words)
    first = json.loads((tmp_path / "report/several.json").read_text())
    assert [(row["people"], row["way"][0] if isinstance(row["way"], list) else row["way"]["photos"], row["iterations"]) for row in first["rows"]][:4] == [
        ("choose", 1, 2), ("choose", 5, 2), ("choose", 5, 3), ("people", 1, 2)]
    monkeypatch.setattr(compare, "train_together", None)
    monkeypatch.setattr(compare, "sample_latents", None)
    several.several(words)
    assert json.loads((tmp_path / "report/several.json").read_text()) == first
