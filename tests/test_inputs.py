"""paper/inputs.py: its folders of one photo and of five, its models, and the whole command in small."""
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "baby"))

from support import checkpoints, identities  # noqa: E402
from support.checkpoints import find_model  # noqa: E402
from paper import compare, inputs  # noqa: E402


def test_one_photo_and_five_are_judged_by_the_same_others(tmp_path, monkeypatch):
    def fake(judges, folder, first, count, pictures, captions):
        (folder / "man" / "7").mkdir(parents=True)
        for i in range(pictures):
            Image.new("RGB", (64, 64), (i, i, i)).save(folder / "man" / "7" / f"{i}.png")
            (folder / "man" / "7" / f"{i}.txt").write_text(f"caption {i}")
    monkeypatch.setattr(inputs, "draw_people", fake)
    inputs.draw(None, tmp_path, "some", 7, 1)
    people = {folder.name: identities.read_people([folder], count=int(folder.name[0]))[0] for folder in (tmp_path / "some").iterdir()}
    assert sorted(people) == ["1 captions", "1 prompt", "5 captions", "5 prompt"]
    names = {name: ([p.name for p in (person.reference, *person.more)], [p.name for p in person.tests]) for name, person in people.items()}
    tests = [f"{i}.png" for i in range(5, 9)]
    for name, own in names.items():
        assert own == ([f"{i}.png" for i in range(int(name[0]))], tests)
        assert (people[name].reference.with_suffix(".txt").exists()) == name.endswith("captions")


def test_every_way_has_a_folder_of_its_own():
    assert len({way.name for way in inputs.WAYS}) == len(inputs.WAYS) and inputs.WAYS[0] == inputs.ONE


def test_a_model_with_the_papers_crops_has_nothing_else_changed(tmp_path):
    home = find_model("baby")
    for crops in inputs.CROPS:
        folder = inputs.model_with(crops, "baby", tmp_path)
        assert inputs.model_with(crops, "baby", tmp_path) == folder                                # twice
        assert {p.name for p in folder.iterdir()} == {p.name for p in home.iterdir()}
        assert checkpoints.flux_fingerprint(folder) == checkpoints.flux_fingerprint(home)
    own, papers, mirror = (checkpoints.model_defaults(place) for place in (home, tmp_path / "models/the paper's", tmp_path / "models/mirror image too"))
    changed = {name for name in own if own[name] != papers[name]}
    assert changed == set(inputs.PAPER) and papers["mirror"] is True and papers["background"] == 1.0
    assert {name for name in own if own[name] != mirror[name]} == {"mirror"}


def test_models_are_there_before_the_workers_begin(tmp_path, monkeypatch):
    """Two workers that made the same one at once would find each other's files."""
    seen = []

    def begin(pool, calls, name):
        seen.extend(call[4] for call in calls)
        assert all((model / "defaults.json").is_file() and (model / "text_encoder_2").is_symlink() for model in seen)
        raise InterruptedError
    for name, fake in {"draw": None, "workers": "a pool", "side_by_side": begin}.items():
        monkeypatch.setattr(inputs, name, fake if name == "side_by_side" else lambda *args, fake=fake: fake)
    with pytest.raises(InterruptedError):
        inputs.inputs(["--run", str(tmp_path)])
    assert len(seen) == len(inputs.WAYS)


def test_a_model_named_from_here_is_found_from_its_copies(tmp_path, monkeypatch):
    """A link's own folder is where its target would be looked for."""
    (tmp_path / "mine").symlink_to(find_model("baby").resolve())
    monkeypatch.chdir(tmp_path)
    folder = inputs.model_with("the paper's", "mine", Path("run"))
    assert (folder / "flux1-dev.safetensors").is_file() and (folder / "text_encoder_2" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_command_in_small_twice(tmp_path, monkeypatch, capsys):
    """Two people, one prompt, two steps; the second time nothing is made again."""
    one, crops, five = inputs.SUBSET["ways"]
    ways = one._replace(iters=(2,)), crops._replace(iters=(2,)), five._replace(iters=(2, 3))
    monkeypatch.setattr(inputs, "SUBSET", dict(choose=2, people=2, ways=ways))
    monkeypatch.setattr(identities, "read_prompts", lambda words, path: ["a photo of a [man/woman]"])
    real = compare.sample_latents
    monkeypatch.setattr(compare, "sample_latents", lambda *args, **kwargs: real(*args[:5], 2, *args[6:], **kwargs))
    words = ["--subset", "--jobs", "1", "--run", str(tmp_path)]
    inputs.inputs(words)
    first = json.loads((tmp_path / "report/inputs.json").read_text())
    assert [(row["people"], row["photos"], row["crops"], row["iterations"]) for row in first["rows"]][:5] == [
        ("choose", 1, "the model's", 2), ("choose", 1, "the paper's", 2), ("choose", 5, "the model's", 2), ("choose", 5, "the model's", 3),
        ("people", 1, "the model's", 2)]
    assert len(first["rows"]) == 7 and len(first["differences"]) == 2
    assert first["rows"][0]["r_facesim"] != first["rows"][1]["r_facesim"]                          # the crops were others
    monkeypatch.setattr(compare, "train_together", None)
    monkeypatch.setattr(compare, "sample_latents", None)
    inputs.inputs(words)
    assert json.loads((tmp_path / "report/inputs.json").read_text()) == first
