"""paper/study.py: its variants, and the whole command in small."""
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "baby"))

from support import identities  # noqa: E402
import meta_train  # noqa: E402
import personalize  # noqa: E402
from paper import compare, study  # noqa: E402


def test_variants_differ_from_the_base_in_one_thing():
    base, *others = study.variants(SimpleNamespace(**study.FULL))
    assert base.words == () and base.photos == 1 and len(others) == 10
    assert len({variant.name for variant in (base, *others)}) == 11
    for variant in others:
        assert (variant.people != base.people) + bool(variant.words) + (variant.photos != 1) \
            + (variant.warmup != base.warmup) == 1
    size = SimpleNamespace(**study.FULL)
    for variant in (base, *others):
        args = meta_train.parse(study.stage_1(variant, size, Path("run"), Path("lomd.safetensors")))
        length = math.ceil(meta_train.USES * variant.people * study.PICTURES / args.batch_size)
        first = meta_train.schedule([variant.people * study.PICTURES], args.iters, args.batch_size, args.warmup)[0]
        assert args.identities_per_bucket == variant.people                  # one bucket: everybody is drawn
        assert abs(first.joint - variant.warmup * min(args.iters, length)) <= 1          # of the run, not of a longer pass


@pytest.mark.slow
def test_the_study_in_small(tmp_path, monkeypatch, capsys):
    """Two people, four photos, one prompt, two steps, one learning rate, LoMDs of four iterations, three variants."""
    monkeypatch.setattr(study, "PHOTOS", 4)
    monkeypatch.setattr(study, "SUBSET", dict(meta=(2, 3, 4), iters=4, people=2, choose=2, rates=(1e-3,), rates_photos=(1e-3,)))
    monkeypatch.setattr(personalize, "ITERATIONS", {"meta-lora": 2, "lora": 3})
    monkeypatch.setattr(identities, "read_prompts", lambda words, path: ["a photo of a [man/woman]"])
    real, every = compare.sample_latents, study.variants
    monkeypatch.setattr(compare, "sample_latents", lambda *args, **kwargs: real(*args[:5], 2, *args[6:], **kwargs))
    monkeypatch.setattr(study, "variants", lambda size: [v for v in every(size) if v.question in ("base", "warm-up") and v.warmup < 0.3 or v.photos == 2])
    study.study(["--subset", "--jobs", "1", "--run", str(tmp_path)])
    rows = json.loads((tmp_path / "report/study.json").read_text())
    assert [(row["question"], row["value"]) for row in rows] == [
        ("base", "r1 16, r2 1, no warm-up"), ("warm-up", "0.2"), ("photos", "2")]
    assert all(row["r_facesim"]["identities"] == 2 and row["learning rate"] == 1e-3 for row in rows)
    assert rows[0]["r_facesim"]["less base"]["mean"] == 0
    assert sorted(path.name for path in (tmp_path / "lomds").iterdir()) == ["3_0.0", "3_0.2"]       # two photos over the base's
    assert (tmp_path / "report/study.png").stat().st_size > 1000
    used = json.loads((tmp_path / "photos_2/scores at 0.001/scores.json").read_text())["people"]
    assert all(len(p["more"]) == 1 and len(p["tests"]) == 2 for p in used.values())
