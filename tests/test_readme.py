"""The README's commands, taken from it and run as a newcomer would."""
import fnmatch
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_rfacesim
import meta_train
import personalize
import sample
from flux_model import flow_matching_loss
from metalora import MetaLoRA
from support.checkpoints import encode_prompts, load_autoencoder, load_flux
from support.common import read_prompts
from support.finding import find_model
from support.lora_files import load_lora, read_lomd, read_metadata
from support.photos import load_crops
from support.stage_2 import numbered

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [[command.split("#")[0].strip() for line in block.splitlines() for command in line.split(" && ")]
          for block in re.findall(r"```sh\n(.*?)```", README, re.S)]
COMMANDS = [command for block in BLOCKS for command in block if command]
QUICK = [command for command in BLOCKS[0] if command.startswith("python")]


def test_the_oldest_packages_that_are_taken():
    """They may be there already, and pip then leaves them: CLIP's layers lie in .text_model before transformers 5.6, and Pillow's
    has_transparency_data came with 10.1."""
    wanted = dict(re.findall(r"^(\w+)>=([\d.]+)", (ROOT / "requirements.txt").read_text("utf-8"), re.M))
    assert wanted["transformers"] == "5.6" and wanted["pillow"] == "10.1"


def test_quick_start(tmp_path):
    """A face that the baby has never seen becomes a LoRA and a picture, with the very words of the README, but for the number
    of iterations: 250 take a while."""
    for item in ROOT.iterdir():
        if not item.name.startswith("."):
            (tmp_path / item.name).symlink_to(item)
    assert [command.split()[1] for command in QUICK] == ["personalize.py", "sample.py"]
    for command, more in zip(QUICK, (["--iters", "10"], []), strict=True):
        done = subprocess.run([sys.executable, *shlex.split(command)[1:], *more], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert load_lora(tmp_path / "out.safetensors")
    assert read_metadata(tmp_path / "out.safetensors")["iterations"] == "10"
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (128, 128) and np.asarray(picture.convert("RGB")).std() > 10


def test_the_snippet_of_stage_2_runs():
    """With two steps instead of 375, on the quick start's face: it ends, and what it makes is a LoRA that changes the model."""
    snippet = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert "range(375)" in snippet
    folder = find_model("baby")
    flux = load_flux(folder, dtype=torch.float32)
    lomd, _ = read_lomd(folder, None)
    crops = load_crops([ROOT / "baby/example.png"], [128], True, ["1:1"], [4.5])
    latents, weights = personalize.encode_crops(load_autoencoder(folder, dtype=torch.float32), crops, 0.1, False)
    txt, y = encode_prompts(folder, ["a photo of a woman"], "cpu", torch.float32)["a photo of a woman"]
    names = {"torch": torch, "MetaLoRA": MetaLoRA, "batches": personalize.batches, "flow_matching_loss": flow_matching_loss,
             "flux": flux, "lomd": lomd, "latents": latents, "weights": weights, "txt": txt, "y": y}
    exec(snippet.replace("range(375)", "range(2)"), names)
    assert len(names["lora"]) == len(lomd) and all(U.abs().max() > 0 for _, U in names["lora"].values())


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_commands_name_files_and_options_that_exist(command):
    script, *arguments = shlex.split(command)[1:]
    if script == "personalize.py":
        personalize.parse(arguments)
    elif script == "sample.py":
        sample.parse(arguments)
    elif script == "meta_train.py":
        meta_train.parse(arguments)
    elif script == "eval_rfacesim.py":
        eval_rfacesim.parse(arguments)
    elif script != "-m":
        source = (ROOT / script).read_text()                                 # to ask each for its --help takes 10 s
        for option in re.findall(r"--[a-z-]+", command):
            assert f'"{option}"' in source, option


def test_compare_finds_what_the_commands_before_it_wrote():
    """The LoRAs on the way and the last one: out-*.safetensors would leave that one out."""
    written, asked = [], []
    for command in COMMANDS:
        words = shlex.split(command)
        if words[1] == "personalize.py":
            args = personalize.parse(words[2:])
            written = [args.out.name, *(numbered(args.out, count).name for count in args.save_at)]
        elif "--compare" in words:
            asked.append(words[-1])
            assert len(written) > 1 and fnmatch.filter(written, words[-1]) == written, command
    assert asked


def test_what_the_results_say_of_the_papers_prompts_and_scores():
    page = " ".join((ROOT / "docs/RESULTS.md").read_text().split())
    path, = re.findall(r"the ten prompts of `(\S+)`", page)
    assert len(read_prompts([], ROOT / path)) == 10 and "<prompt, counted from 0>_<seed>.png" in page
    methods = json.loads((ROOT / "paper/meta_phd/published.json").read_text())["table 4"]
    lora, crops, ours = (f"{-method['difference']:.0f} %" for method in methods[-3:])
    assert f"(in the paper {lora} for LoRA, {crops} with its crops, {ours} for Meta-LoRA)" in page


def test_files_and_pictures_that_the_readme_and_the_docs_name_exist():
    house = next(block for block in README.split("```") if block.lstrip().startswith("flux_model.py"))
    names = [line.split()[0] for line in house.splitlines() if line] + re.findall(r"\| `([a-z_/]+\.py)`", README)
    assert len(names) > 15 and all((ROOT / name).exists() for name in names), names
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
    assert {path.name for path in (ROOT / "docs" / "assets").iterdir()} == set(
        re.findall(r"assets/([a-z_]+\.(?:png|svg))", README + "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))))


def test_functions_that_the_readme_names_exist():
    for path, functions in re.findall(r"`([a-z_/]+\.py)`: (`[^|]+`)", README):
        for name in re.findall(r"`([A-Za-z_.]+)`", functions):
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", (ROOT / path).read_text()), f"{path}: {name}"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160 and max(map(len, README.splitlines())) <= 460


def test_the_ci_runs_the_test_command_of_the_readme():
    assert any(c.startswith("pip install -r requirements.txt pytest") for c in COMMANDS)
    assert "grep -m1 'pip install -r requirements.txt pytest' README.md" in (ROOT / ".ci" / "run").read_text()
