"""eval_rfacesim.py: the metric by hand, the judges against facenet-pytorch's own use, foreign pictures, the whole run."""
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import eval_rfacesim as ev
from support import judges as judges_files, people as people_files
from support.common import read_prompts
from support.checkpoints import find_model
from support.people import Person
from support.photos import read_photo

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
BABY = find_model("baby")
sys.path.insert(0, str(ROOT / "baby"))
import faces  # noqa: E402


def paint(path, colour, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path


class GivenEmbeddings:
    """Judges whose embedding and CLIP-T of a picture are written in its colour: (angle in degrees or 255, .., CLIP-T)."""
    names = {"face": "given", "text": "given"}

    def embed(self, image):
        angle = image.getpixel((0, 0))[0]
        radians = torch.deg2rad(torch.tensor(float(angle)))
        return None if angle == 255 else torch.stack([radians.cos(), radians.sin()])

    def count(self, image):
        return 1 + (image.getpixel((0, 0))[1] == 77)

    def match(self, images, texts):
        return torch.tensor([image.getpixel((0, 0))[2] / 100 for image in images])


@pytest.fixture
def by_hand(tmp_path):
    """Three identities, two prompts. Angles: reference, tests -> generated; 255 is no face. The third colour is 100 CLIP-T."""
    world = {"anna": ((0, 60, 90), ((30, 20), (0, 40))), "bert": ((90, 30), ((90, 10), (255, 30))), "cleo": ((10, 10), ((70, 50), (10, 30)))}
    for i, (name, (real, generated)) in enumerate(world.items()):
        for j, angle in enumerate(real):                               # the second colour makes pictures differ
            paint(tmp_path / "people" / name / f"{j}.png", (angle, j, i))
        for j, (angle, clip) in enumerate(generated):
            paint(tmp_path / "results" / "mine" / name / f"{j}_0.png", (angle, 100 + j, clip))
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    return tmp_path


def evaluated(root):
    """rows and people of the folders in root, by GivenEmbeddings."""
    judges, people = GivenEmbeddings(), ev.read_people([root / "people"])
    prompts = ev.prompts_for(people, root / "prompts.txt", "flux-dev")
    pictures, _ = ev.find_pictures(root / "results", prompts)
    real = ev.embed_real(judges, people)
    rows, _ = ev.score_all(judges, real, pictures, root / "parts")
    return rows, people


def test_the_metrics_equal_a_case_worked_out_by_hand(by_hand):
    """cos 30 = .8660254, cos 60 = .5; R-FaceSim of anna: prompt one (cos(30-60) + cos(30-90)) / 2 = .6830127, prompt two
    (cos 60 + cos 90) / 2 = .25; bert: cos(90-30) = .5, and no face; cleo: cos 60 = .5, and cos 0 = 1."""
    rows, people = evaluated(by_hand)
    a, b, c = (0.6830127 + 0.25) / 2, 0.5, (0.5 + 1) / 2
    mean = (a + b + c) / 3
    error = math.sqrt(((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 2 / 3)
    found = ev.summarise(rows, people, "r_facesim")
    assert found == {"mean": pytest.approx(mean, abs=2e-6), "error": pytest.approx(error, abs=2e-6), "identities": 3, "pictures": 5,
                     "of": 6, "found": pytest.approx(5 / 6, abs=1e-6)}

    strict = ev.summarise(rows, people, "r_facesim", no_face_as_zero=True)
    mean = (a + b / 2 + c) / 3                                                   # bert: (.5 + 0) / 2
    error = math.sqrt(((a - mean) ** 2 + (b / 2 - mean) ** 2 + (c - mean) ** 2) / 2 / 3)
    assert strict == {"mean": pytest.approx(mean, abs=2e-6), "error": pytest.approx(error, abs=2e-6), "identities": 3, "pictures": 6,
                      "of": 6, "found": pytest.approx(5 / 6, abs=1e-6)}

    # FaceSim: anna cos(30 - 0), cos(0 - 0); bert cos(90 - 90); cleo cos(70 - 10), cos(10 - 10)
    a, b, c = (0.8660254 + 1) / 2, 1.0, (0.5 + 1) / 2
    assert ev.summarise(rows, people, "facesim")["mean"] == pytest.approx((a + b + c) / 3, abs=2e-6)
    assert ev.summarise(rows, people, "facesim", True)["mean"] == pytest.approx((a + b / 2 + c) / 3, abs=2e-6)

    # CLIP-T needs no face: anna .2, .4; bert .1, .3; cleo .5, .3
    text = ev.summarise(rows, people, "clip_t", True)
    assert text["mean"] == pytest.approx((0.3 + 0.2 + 0.4) / 3, abs=1e-6) and text["pictures"] == text["of"] == 6
    assert text["error"] == pytest.approx(0.1 / math.sqrt(3), abs=1e-6)


def test_a_person_of_whom_no_face_was_found_is_counted_out_or_zero(by_hand):
    paint(by_hand / "results/mine/bert/0_0.png", (255, 0, 10))
    rows, people = evaluated(by_hand)
    assert ev.summarise(rows, people, "r_facesim")["identities"] == 2
    strict = ev.summarise(rows, people, "r_facesim", no_face_as_zero=True)
    assert strict["identities"] == 3 and strict["found"] == pytest.approx(4 / 6, abs=1e-6)


def test_seeds_are_averaged_within_a_prompt_before_prompts(by_hand):
    """Three seeds of one prompt weigh as much as the one seed of the other."""
    paint(by_hand / "results/mine/cleo/0_1.png", (10, 50, 0))
    paint(by_hand / "results/mine/cleo/0_2.png", (10, 51, 0))
    rows, people = evaluated(by_hand)
    own = [row for row in rows if row["identity"] == "cleo"]
    assert ev.summarise(own, people, "r_facesim")["mean"] == pytest.approx(((0.5 + 1 + 1) / 3 + 1) / 2, abs=2e-6)


@pytest.mark.parametrize("reference", ["first", "all"])
def test_the_reference_is_never_among_the_test_pictures(by_hand, reference):
    """What equals the reference and no other picture scores FaceSim 1 and R-FaceSim 0: with the reference among the tests it
    would be above 0. And whichever is the reference, all others are tests."""
    for name, angles in (("anna", (0, 90, 90)), ("bert", (90, 0)), ("cleo", (10, 100))):
        for j, angle in enumerate(angles):
            paint(by_hand / f"people/{name}/{j}.png", (angle, j, 0))
        for j in range(2):
            paint(by_hand / f"results/mine/{name}/{j}_0.png", (angles[0], 100 + j, 0))
    people = ev.read_people([by_hand / "people"], reference)
    for person in people:
        every = set((by_hand / "people" / person.identity).glob("*.png"))
        assert person.reference not in person.tests and {person.reference, *person.tests} == every
        assert len(person.tests) == len(every) - 1
    if reference == "first":
        rows, people = evaluated(by_hand)
        assert ev.summarise(rows, people, "facesim")["mean"] == pytest.approx(1, abs=1e-6)
        assert ev.summarise(rows, people, "r_facesim")["mean"] == pytest.approx(0, abs=1e-6)
    else:
        assert sorted(p.name for p in people) == ["anna@0", "anna@1", "anna@2", "bert@0", "bert@1", "cleo@0", "cleo@1"]


@pytest.mark.parametrize("reference", ["first", "all"])
def test_further_photos_are_no_test_pictures_either(by_hand, reference):
    for j in range(2, 5):
        for name in ("anna", "bert", "cleo"):
            paint(by_hand / f"people/{name}/{j}.png", (20 * j, j, ord(name[0])))
    for person in ev.read_people([by_hand / "people"], reference, count=2):
        own = [person.reference, *person.more, *person.tests]
        assert len(person.more) == 1 and len(person.tests) == 3 and sorted(own) == sorted((by_hand / "people" / person.identity).glob("*.png"))
    with pytest.raises(ValueError, match="has 5 pictures: R-FaceSim needs 5 as reference"):
        ev.read_people([by_hand / "people"], reference, count=5)


def test_a_copy_of_the_reference_among_the_tests_is_refused(by_hand):
    shutil.copyfile(by_hand / "people/anna/0.png", by_hand / "people/anna/copy.png")
    with pytest.raises(ValueError, match="copy.png is the same picture as .*0.png"):
        ev.read_people([by_hand / "people"])


def test_with_every_reference_an_identity_still_counts_once():
    people = [ev.Person(f"{name}@{i}", name, None, Path(f"{i}"), (Path("x"),)) for name in "ab" for i in range(3 if name == "a" else 1)]
    rows = [{"identity": p.name, "number": 0, "seed": 0, "r_facesim": 0.2 if p.identity == "a" else 0.8} for p in people]
    assert ev.summarise(rows, people, "r_facesim") == {
        "mean": 0.5, "error": pytest.approx(0.3), "identities": 2, "pictures": 4, "of": 4, "found": 1.0}


def test_clip_t_is_of_the_people_with_a_single_picture_if_there_are_any():
    """As in the paper; and a face that was not found counts as 0 where that is asked for, but never in CLIP-T."""
    people = [ev.Person("anna", "anna", None, Path("0"), (Path("1"),)), ev.Person("solo", "solo", None, Path("2"), ())]
    rows = [{"method": "m", "number": 0, "seed": 0, "identity": name, "clip_t": clip, "facesim": None, "r_facesim": None}
            for name, clip in (("anna", 0.25), ("solo", 0.75))]
    both, = ev.summarise_methods(rows, people, no_face_as_zero=False)
    assert (both["clip_t"]["mean"], both["clip_t"]["identities"]) == (0.75, 1) and both["facesim"] is both["r_facesim"] is None
    alone, = ev.summarise_methods(rows[:1], people, no_face_as_zero=True)
    assert [alone[metric]["mean"] for metric in ("clip_t", "facesim", "r_facesim")] == [0.25, 0, 0]


def test_scores_are_kept_by_all_that_they_depend_on(by_hand, monkeypatch):
    """What is the same is not judged again; what another picture, face, prompt or judge changes is."""
    monkeypatch.setattr(ev.photos, "find_anywhere", lambda image, path: (image, []))              # slow, and not of interest
    def judged():
        before = len([*by_hand.glob("parts/*")])
        evaluated(by_hand)
        return len([*by_hand.glob("parts/*")]) - before
    assert (judged(), judged()) == (3, 0)                                                # one file for each person
    paint(by_hand / "results/mine/cleo/0_0.png", (10, 100, 50))
    assert judged() == 1
    paint(by_hand / "people/anna/2.png", (45, 2, 0))
    assert judged() == 1
    (by_hand / "prompts.txt").write_text("one\nother\n")
    assert judged() == 3
    monkeypatch.setattr(GivenEmbeddings, "names", {"face": "another", "text": "given"})
    assert judged() == 3


# ---------------------------------------------------------------------------------------------------------------------
# Folders and prompts


def test_layouts_genders_and_references(tmp_path):
    for name, gender in (("anna", "female"), ("bert", "male")):
        for i in range(3):
            paint(tmp_path / "unsplash" / gender / name / f"{i}.png", (i, 1, ord(name[0])))
    (tmp_path / "unsplash/male/bert/1.png").rename(tmp_path / "unsplash/male/bert/reference.png")
    for i in range(2):
        paint(tmp_path / "ffhq" / "man" / f"{i:05d}.png", (50 + i, 0, 0))
    people = ev.read_people([tmp_path / "unsplash", tmp_path / "ffhq"])
    assert [(p.name, p.gender, p.reference.name, len(p.tests)) for p in people] == [
        ("anna", "woman", "0.png", 2), ("bert", "man", "reference.png", 2), ("00000", "man", "00000.png", 0), ("00001", "man", "00001.png", 0)]
    prompts = ev.prompts_for(people, None, "flux-dev")
    assert len(prompts["anna"]) == 10 and prompts["anna"][1].startswith("A woman in a casual outfit") and " her eyes " in prompts["anna"][1]
    assert len(prompts["00000"]) == 20 and prompts["00000"].keys() == prompts["00001"].keys() < set(range(40))
    assert prompts["bert"][8].endswith("as he looks at the camera.")


def test_meta_phd_is_the_papers_tables():
    ffhq, unsplash = (read_prompts([], ROOT / "paper" / "meta_phd" / f"{part}.txt") for part in ("ffhq", "unsplash"))
    for gender in ("man", "woman"):
        own = [text for text in (people_files.fill(prompt, gender) for prompt in ffhq) if text]
        assert len(own) == 20 and all(gender in text.split(",")[0].split() or gender == "man" and "man" in text for text in own)
        for prompt in unsplash:
            assert "[" not in people_files.fill(prompt, gender)
    assert len(ffhq) == 40 and len(unsplash) == 10 and all("[man/woman]" in prompt for prompt in unsplash)
    quoted = json.loads((ROOT / "paper" / "meta_phd" / "published.json").read_text())
    assert quoted["table 4"][-1] == {"method": "Meta-LoRA", "base": "FLUX.1-dev", "facesim": 79.45, "r_facesim": 77.16, "difference": -2.9}


def test_several_faces_in_a_real_picture_are_named(by_hand, capsys):
    evaluated(by_hand)
    assert "several faces" not in capsys.readouterr().err
    for path in (by_hand / "people/anna/1.png", by_hand / "people/cleo/0.png"):
        paint(path, (Image.open(path).getpixel((0, 0))[0], 77, len(path.parent.name)))
    evaluated(by_hand)
    line, = (line for line in capsys.readouterr().err.splitlines() if "several faces" in line)
    assert line.endswith(f"{by_hand / 'people/anna/1.png'}, {by_hand / 'people/cleo/0.png'}")


def test_faces_are_counted(baby_judges):
    one = Image.open(ROOT / "tests" / "photos" / "astronaut.png").convert("RGB").crop((100, 0, 400, 300))
    two = Image.new("RGB", (600, 300))
    two.paste(one, (0, 0))
    two.paste(one.resize((150, 150)), (300, 100))
    assert [baby_judges.count(image) for image in (one, two)] == [1, 2]


def test_what_other_programs_leave_in_a_folder_of_people(tmp_path, capsys):
    for i in range(2):
        paint(tmp_path / "anna" / f"{i}.png", (i, 0, 0))
        paint(tmp_path / "anna" / f"{i}-masklabel.png", (i, i, i))
        paint(tmp_path / "#recycle" / "bob" / f"{i}.png", (i, 9, 0))
    (tmp_path / "dataset.toml").write_text("x")
    (tmp_path / "metadata.csv").write_text('file_name,text\nanna/0.png,"a woman,\nsmiling"\n')
    person, = ev.read_people([tmp_path])
    assert (person.name, person.gender, len(person.tests)) == ("anna", "woman", 1)
    root, own = capsys.readouterr().err.splitlines()
    assert root.endswith(": #recycle/, dataset.toml") and own.endswith(": 0-masklabel.png, 1-masklabel.png")


def test_captions_of_all_kinds_litter_and_unused_files(tmp_path, capsys):
    for i in range(2):
        paint(tmp_path / "data" / "anna" / f"{i}.png", (i, 0, 0))
    for litter in ("__MACOSX/anna/0.png", "anna/__MACOSX/0.png", "__MACOSX/._x.png"):
        paint(tmp_path / "data" / litter, "red")
    for name in (".DS_Store", "anna/Thumbs.db", "Desktop.ini"):
        (tmp_path / "data" / name).write_text("x")
    for name, text in (("anna/1.png.TXT", "a woman"), ("anna/1.CAPTION", "a woman"),
                       ("metadata.jsonl", '{"file_name": "anna/0.png", "text": "a woman"}')):
        (tmp_path / "data" / name).write_text(text)
        person, = ev.read_people([tmp_path / "data"])
        assert (person.name, person.gender, len(person.tests)) == ("anna", "woman", 1) and capsys.readouterr().err == ""
        (tmp_path / "data" / name).unlink()
    (tmp_path / "data/anna/film.mp4").write_text("x")
    paint(tmp_path / "data/anna/raw/0.png", "red")
    ev.read_people([tmp_path / "data"])
    assert capsys.readouterr().err.endswith("nor the caption of one: film.mp4, raw/\n")
    (tmp_path / "data/anna/1.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "data/anna/gone.jpg").symlink_to("nowhere")
    (tmp_path / "data/bob").symlink_to("nowhere")
    assert ev.main(["--data", str(tmp_path / "data"), "--images", str(tmp_path), "--model", "baby", "--out", str(tmp_path / "r")]) == 2
    err = capsys.readouterr().err
    assert "gone.jpg, it is a dead link" in err and "bob is a dead link" in err and "1.txt is not text in UTF-8" in err and "Traceback" not in err


def test_captions_tell_the_gender_and_a_slot_without_one_is_refused(tmp_path):
    for i in range(2):
        paint(tmp_path / "anna" / f"{i}.png", (i, 0, 0))
    person, = ev.read_people([tmp_path])
    assert person.gender is None
    with pytest.raises(ValueError, match="depends on the gender"):
        people_files.fill("a [man/woman]", person.gender)
    (tmp_path / "anna/1.txt").write_text("A photo of a woman on a beach\n")
    assert ev.read_people([tmp_path])[0].gender == "woman" and people_files.fill("a [man/woman]", "woman") == "a woman"
    assert ev.read_people([tmp_path], gender="man")[0].gender == "woman"              # what the caption says is nearer
    assert people_files.fill("man: a man", "woman") is None and people_files.fill("woman: a [b/c]", "woman") == "a c"
    assert people_files.fill("5:00 in the morning", None) == "5:00 in the morning"


def test_a_caption_of_a_man_and_a_woman_tells_no_gender():
    captions = ("a man and a woman", None, "a photo of a woman", "a man")
    assert people_files.gender_of(captions) == "woman" and people_files.gender_of(captions[:2]) is None


def test_a_prompt_for_one_gender_has_a_colon(tmp_path):
    """`woman` and `man` alone are prompts like others."""
    assert people_files.fill("woman", "woman") == "woman" and people_files.fill("man", "woman") == "man"
    assert people_files.fill("woman: a hat", "woman") == "a hat" and people_files.fill("man: a hat", "woman") is None
    people = [people_files.Person("anna", "anna", "woman", Path("0.png"), ())]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("man: a hat")
    with pytest.raises(ValueError, match="prompts.txt has no prompt for any of these people"):
        ev.prompts_for(people, prompts, "flux-dev")


def test_one_picture_in_two_peoples_folders_is_named(tmp_path):
    for i, name in enumerate(("anna", "bea")):
        paint(tmp_path / name / "0.png", (i, 0, 0))
        paint(tmp_path / name / "1.png", (7, 7, 7))
    with pytest.raises(ValueError, match="anna/1.png is the same picture as .*bea/1.png"):
        ev.read_people([tmp_path])


@pytest.mark.parametrize("damage, message", [
    (lambda d: (d / "anna/1.png").write_bytes(b"no"), "1.png cannot be read: it is not a picture"),
    (lambda d: (d / "anna/1.png").unlink(), "has 1 pictures"),
    (lambda d: paint(d / "loose.png", "red"), "holds both"),
    (lambda d: shutil.rmtree(d / "anna"), "holds neither"),
    (lambda d: paint(d / "man/bob/1.png", "red"), "by gender, or none")])
def test_bad_folders_are_refused_by_name(tmp_path, damage, message):
    for i in range(2):
        paint(tmp_path / "d" / "anna" / f"{i}.png", (i, 0, 0))
    damage(tmp_path / "d")
    with pytest.raises(ValueError, match=message):
        ev.read_people([tmp_path / "d"])


# ---------------------------------------------------------------------------------------------------------------------
# Judges


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """An InceptionResnetV1 of random weights, as facenet-pytorch's own file has them, with the classifier's."""
    from facenet_pytorch import InceptionResnetV1
    torch.manual_seed(1)
    model = InceptionResnetV1(pretrained=None)
    for module in model.modules():                   # with the statistics of noise in its norms it tells pictures apart
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 160, 160))
    model.eval()
    path = tmp_path_factory.mktemp("inception") / "weights.pt"
    torch.save(model.state_dict() | {"logits.weight": torch.zeros(2, 512), "logits.bias": torch.zeros(2)}, path)
    return model, path


@pytest.mark.skipif(not (SHARED / "photos").is_dir(), reason="the photos are not here")
def test_crops_and_embeddings_equal_facenet_pytorchs_own_use(inception):
    from facenet_pytorch import MTCNN
    model, path = inception
    judges = ev.Judges(face_weights=path, clip=str(BABY / "scorer"))
    detector, files = MTCNN(image_size=160, margin=0), sorted((SHARED / "photos").rglob("*.[jp][pn]g"))
    assert len(files) >= 1
    own = [detector(Image.open(file).convert("RGB")) for file in files]
    images = [ev.photos.read_photo(file) for file in files]
    crops = [judges.detector(image) for image in images]
    assert all(torch.equal(a, b) for a, b in zip(own, crops)) and crops[0].shape == (3, 160, 160)
    with torch.no_grad():
        expected = torch.stack([model(crop[None])[0] for crop in own])
    assert torch.allclose(torch.stack([judges.embed(image) for image in images]), expected, atol=1e-5)
    assert (expected[0] - expected[-1]).abs().max() > 1e-2 or len(files) == 1


def drawn(count, size=128, start=faces.METRIC.stop - 200):
    return [Image.fromarray(faces.sample(start + i, 0, size, size, style="photo", yaw=0)[0]) for i in range(count)]


@pytest.fixture(scope="module")
def baby_judges():
    return ev.Judges("baby")


@pytest.mark.parametrize("change", ["vision", "pixels"])
def test_another_clip_has_another_name(baby_judges, tmp_path, change):
    """Scores are kept by it: all that decides about them is in it, not only what embeds the text."""
    shutil.copytree(BABY / "scorer", tmp_path / "scorer")
    if change == "vision":
        path = tmp_path / "scorer/model.safetensors"
        weights = load_file(path)
        weights["visual_projection.weight"][0, 0] += 1
        save_file(weights, path, {"format": "pt"})
    else:
        path = tmp_path / "scorer/preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.4, 0.4, 0.4]}))
    other, same = (ev.Judges("baby", clip=str(folder / "scorer")).names["text"] for folder in (tmp_path, BABY))
    assert other != same == baby_judges.names["text"]


def test_scoring_together_equals_one_by_one(baby_judges):
    images = drawn(35)
    faces_found, texts = [baby_judges.embed(image) for image in images], [f"a photo of a {'wo' * (i % 2)}man" for i in range(35)]
    assert all(face.shape == (128,) and abs(face.norm() - 1) < 1e-5 for face in faces_found)
    crops = torch.stack([baby_judges.detector(image) for image in images])
    with torch.no_grad():
        assert (baby_judges.embedder(crops) - torch.stack(faces_found)).abs().max() < 1e-5
    match, single = baby_judges.match(images, texts), torch.cat([baby_judges.match([i], [t]) for i, t in zip(images, texts)])
    assert match.shape == (35,) and (match - single).abs().max() < 1e-5


def test_the_babys_judges_know_people_and_words(baby_judges):
    """On people they never saw: two pictures of one are nearer than those of two, and captions fit their own picture."""
    people = range(faces.TEST.start + 900, faces.TEST.start + 920)
    pairs = [[faces.sample(p, i, style="photo") for i in range(2)] for p in people]
    found = [[baby_judges.embed(Image.fromarray(image)) for image, _ in pair] for pair in pairs]
    first, second = (torch.stack([pair[i] for pair in found if not any(face is None for face in pair)]) for i in range(2))
    cosines = first @ second.T
    same, different = cosines.diagonal(), cosines[~torch.eye(len(cosines), dtype=bool)]
    assert len(first) >= 18 and (same[:, None] > different).float().mean() > 0.97            # AUC
    images, texts = zip(*((Image.fromarray(image), text) for pair in pairs for image, text in pair[:1]))
    grid = torch.stack([baby_judges.match(list(images), [text] * len(images)) for text in texts], dim=1)
    assert (grid.argmax(dim=1) == torch.arange(len(texts))).float().mean() > 0.8


@pytest.mark.parametrize("make, message", [
    (lambda p: torch.save({"model": torch.nn.Linear(2, 2)}, p), "not a file of weights"),             # a pickle with code
    (lambda p: torch.save({"last_bn.weight": torch.zeros(3)}, p), "not a state dict of InceptionResnetV1"),
    (lambda p: torch.save({"last_bn.weight": 3}, p), "not a state dict of InceptionResnetV1"),
    (lambda p: torch.save([1], p), "not a state dict of InceptionResnetV1"), (lambda p: p.write_bytes(b"torn"), "not a file of weights")])
def test_face_weights_that_are_none_are_refused_in_one_line(tmp_path, make, message):
    make(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message) as error:
        judges_files.FaceNetwork(None, tmp_path / "weights.pt", torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_missing_weights_say_in_one_line_what_to_do(tmp_path, monkeypatch, inception):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"--face-weights; --model baby needs neither$"):
        ev.Judges()
    (tmp_path / "checkpoints").mkdir(exist_ok=True)                                # as facenet-pytorch caches it
    shutil.copyfile(inception[1], tmp_path / "checkpoints" / judges_files.INCEPTION.rpartition("/")[2])
    with pytest.raises(ValueError, match=r"^CLIP cannot be loaded .*--clip; --model baby needs neither$"):
        ev.Judges()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of another method


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Four drawn people of three pictures each, frontal."""
    folder = tmp_path_factory.mktemp("eval") / "people"
    for p in range(4):
        for i in range(3):
            image, caption = faces.sample(faces.METRIC.stop - 100 + p, i, 192, 192, style="photo", yaw=8.0 * (i - 1))
            (folder / f"p{p}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"p{p}" / f"{i}.png")
            (folder / f"p{p}" / f"{i}.txt").write_text(caption)
    return folder


def run(*words):
    return ev.main([str(word) for word in words])


def test_a_foreign_methods_folder_makes_a_row_and_each_fault_is_reported(people, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a [man/woman]\na pencil drawing of a [man/woman], smiling\n")
    results = tmp_path / "results"
    for p in range(4):
        for name in ("0_0", "01_0"):
            path = results / "Other" / f"p{p}" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(people / f"p{p}" / "1.png", path)
    base = ["--data", people, "--images", results, "--prompts", prompts, "--model", "baby", "--out", tmp_path / "report"]
    assert run(*base) == 0
    out, err = capsys.readouterr()
    assert err.count("note:") == 0 and "| Other | – | " in out and "4, 8 of 8" in out
    scores = json.loads((tmp_path / "report" / "scores.json").read_text())
    assert len(scores["pictures"]) == 8 and scores["methods"][0]["facesim"]["mean"] > 0.3 and not scores["problems"]

    (results / "Other/p0/wrong name.png").write_bytes(b"x")
    (results / "Other/p0/9_0.png").write_bytes(b"x")
    (results / "Other/p0/notes.txt").write_text("x")
    (results / "Other/p0/.DS_Store").write_text("x")                                      # nobody put that there
    (results / "Other/p1/0_0.png").write_bytes(b"torn")
    (results / "Other/p2/0_0.png").unlink()
    shutil.copyfile(people / "p3/2.png", results / "Other/p3/00_0.png")
    paint(results / "Other/nobody/0_0.png", "red")
    paint(results / "grid.png", "red")
    assert run(*base) == 0
    out, err = capsys.readouterr()
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    for words in ("wrong name.png is not scored: its name", "9_0.png is not scored: 9 is not a prompt", "notes.txt is not scored",
                  "not scored: " + str(results / "Other/p1/0_0.png"), "1 of 2 pictures of p2 are missing, the first is prompt 0, seed 0",
                  "is the same prompt and seed", "nobody is not scored: no identity", "grid.png is not scored: it is not in a method"):
        assert sum(words in line for line in notes) == 1, words
    assert len(notes) == 8 and "4, 6 of 6" in out
    assert json.loads((tmp_path / "report" / "scores.json").read_text())["problems"] == [n.removeprefix("note: ") for n in notes]

    shutil.copyfile(people / "p3/2.png", results / "Other/p3/0_1.png")    # now everybody else's second seed is missing too
    assert run(*base) == 0
    assert "3 of 4 pictures of p2 are missing" in capsys.readouterr().err


def test_pictures_of_other_people_are_no_likeness(people, tmp_path):
    for p in range(4):
        for method in ("A", "B"):
            path = tmp_path / "results" / method / f"p{p}" / "0_3.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(people / f"p{p if method == 'A' else 3 - p}" / "2.png", path)
    (tmp_path / "prompts.txt").write_text("a photo of a person\n")
    assert run("--data", people, "--model", "baby", "--images", tmp_path / "results", "--prompts", tmp_path / "prompts.txt",
               "--out", tmp_path / "a") == 0
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())
    of = {m["label"]: m["r_facesim"]["mean"] for m in scores["methods"]}
    assert of["A"] > of["B"] + 0.2 and len(scores["pictures"]) == 8


def test_real_pictures_without_a_face_are_an_error_that_names_each(people, tmp_path, capsys):
    shutil.copytree(people, tmp_path / "people")
    for p in range(2):
        paint(tmp_path / "people" / f"p{p}" / "empty.png", "blue", 128)
    paint(tmp_path / "results/A/p0/0_0.png", "red", 128)
    assert run("--data", tmp_path / "people", "--images", tmp_path / "results", "--model", "baby", "--out", tmp_path / "r") == 2
    err = capsys.readouterr().err
    assert "p0/empty.png" in err and "p1/empty.png" in err and "Traceback" not in err and not (tmp_path / "r").exists()


def test_a_lying_photo_is_turned_as_stage_2_turns_it(tmp_path, capsys):
    """Its own picture, upright, has a likeness of 1 to it."""
    image = read_photo(ROOT / "tests/photos/astronaut.png")
    judges = SimpleNamespace(embed=lambda image: torch.from_numpy(np.array(image.resize((16, 16)), dtype=np.float32)).flatten(), count=lambda image: 1)
    upright = judges.embed(image)
    for angle in (0, 90, 180, 270):
        path = tmp_path / f"{angle}.png"
        image.rotate(angle, expand=True).save(path)
        person = Person("a", "a", None, path, ())
        found = ev.embed_real(judges, [person])["a"][0]
        assert torch.equal(found, upright), angle


def test_two_references_of_one_stem_have_names_of_their_own(tmp_path):
    for name, color in (("0.png", "red"), ("0.webp", "blue"), ("1.png", "green")):
        paint(tmp_path / "anna" / name, color)
    assert [person.name for person in ev.read_people([tmp_path], "all")] == ["anna@0.png", "anna@0.webp", "anna@1"]


def test_a_picture_too_small_for_the_detector_has_no_face():
    network = judges_files.FaceNetwork(find_model("baby"), None, torch.device("cpu"))
    for size in ((16, 16), (18, 400)):
        image = Image.new("RGB", size)
        assert network.embed(image) is None


@pytest.mark.parametrize("words, said", [
    (["--images", "nowhere"], "no such folder"), (["--prompts", "nowhere"], "No such file")])
def test_bad_words_end_in_one_line(people, tmp_path, capsys, words, said):
    (tmp_path / "results").mkdir()
    assert run("--data", people, "--images", tmp_path / "results", "--model", "baby", "--out", tmp_path / "r", *words) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and "\n" not in err and not (tmp_path / "r").exists()


def compared(root, prompts):
    """As sample.py --compare leaves them: two rows of two prompts."""
    for row, angles in (("no LoRA", (255, 80)), ("out", (30, 50))):
        for i, angle in enumerate(angles):
            paint(root / row / "person" / f"{i}_0.png", (angle, i, 40))
    (root / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    paint(root / "compare.png", "red")


def test_a_single_photo_has_facesim_and_clip_t(tmp_path, monkeypatch, capsys):
    """cos 80 = .1736482 and no face; cos 30 = .8660254, cos 50 = .6427876. Prompts are those beside the pictures."""
    monkeypatch.setattr(ev, "Judges", lambda *words: GivenEmbeddings())
    photo = paint(tmp_path / "face.png", (0, 1, 1))
    paint(tmp_path / "other.png", (1, 1, 1))                                      # of nobody
    compared(tmp_path / "compare", ["one", "two"])
    assert run("--data", photo, "--images", tmp_path / "compare", "--out", tmp_path / "r") == 0
    out, err = capsys.readouterr()
    scores = json.loads((tmp_path / "r/scores.json").read_text())
    assert err.count("note:") == 0 and {row["prompt"] for row in scores["pictures"]} == {"one", "two"}
    base, own = scores["methods"]
    assert (base["label"], own["label"]) == ("no LoRA", "out") and base["facesim"]["mean"] == pytest.approx(0.1736482, abs=1e-6)
    assert own["facesim"]["mean"] == pytest.approx((0.8660254 + 0.6427876) / 2, abs=1e-6)
    assert own["clip_t"]["mean"] == pytest.approx(0.4) and own["r_facesim"] is None
    assert "| out | – | 75.44 | – | – | 100.0% | 1, 2 of 2 |" in out and "| no LoRA | – | 17.36 | – | – | 50.0% | 1, 1 of 2 |" in out
    assert run("--data", photo, "--images", tmp_path / "compare", "--out", tmp_path / "r", "--no-face-as-zero") == 0
    assert "| no LoRA | – | 8.68 | – | – | 50.0% | 1, 2 of 2 |" in capsys.readouterr().out


def test_several_photos_are_of_one_person(tmp_path, monkeypatch, capsys):
    """The first is the reference, the others are tests; a copy and a photo that is not there are named."""
    monkeypatch.setattr(ev, "Judges", lambda *words: GivenEmbeddings())
    files = [paint(tmp_path / place / "face.png", (angle, i, 1)) for i, (place, angle) in enumerate((("a", 0), ("b", 60), ("c", 90)))]
    person, = ev.read_people(files)
    assert (person.name, person.reference, person.tests) == ("person", files[0], (files[1], files[2]))
    compared(tmp_path / "compare", ["one", "two"])
    assert run("--data", *files, "--images", tmp_path / "compare", "--out", tmp_path / "r") == 0
    out = json.loads((tmp_path / "r/scores.json").read_text())["methods"][1]                    # cos 30, cos 60; cos 10, cos 40
    assert out["r_facesim"]["mean"] == pytest.approx((0.8660254 + 0.5 + 0.9848078 + 0.7660444) / 4, abs=1e-6)
    copied = json.loads((tmp_path / "r/scores.json").read_text())["reference"]                  # the first photo: cos 60, cos 90
    assert copied["mean"] == pytest.approx(0.5 / 2, abs=1e-6) and copied["identities"] == 1
    shutil.copy(files[0], tmp_path / "copy.png")
    assert run("--data", *files, tmp_path / "copy.png", tmp_path / "none.png", "--images", tmp_path / "compare", "--out", tmp_path / "r") == 2
    err = capsys.readouterr().err
    assert "copy.png is the same picture as " in err and "face.png" in err and "none.png" in err and "Traceback" not in err
