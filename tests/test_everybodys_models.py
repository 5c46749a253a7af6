"""Base models as other programs write them: small ones made here, right to 1e-6 or refused in one line."""
import json
import shutil
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import personalize
import sample
from flux_model import FluxConfig
from support import checkpoints, finding, tensors
from support.checkpoints import find_model, fingerprint, flux_files, flux_fingerprint, load_autoencoder, load_flux, load_text_encoders
from support.finding import Model
from support.lora_files import read_lomd
from support.memory import E4M3
from support.tensors import TensorFiles

ROOT = Path(__file__).resolve().parents[1]
HUB, BABY = ROOT / "tests" / "golden" / "hub", ROOT / "baby" / "checkpoint"
FLUX = "flux1-dev.safetensors"
T5 = {name: tensor.float() for name, tensor in load_file(HUB / "text_encoder_2" / "model.safetensors").items()}
CLIP = load_file(HUB / "text_encoder" / "model.safetensors")
METADATA = TensorFiles([HUB / FLUX]).metadata
PROMPTS = ["a photo of a person", ""]


def message(function, *arguments, **options):
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def relative(found, expected):
    return ((found.float() - expected).norm() / expected.norm()).item()


def text(mark):
    """A comfy_quant tensor."""
    return torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)


def comfy_norm(name):
    return name.replace("_norm.scale", "_norm.weight")


def write(path, tensors, metadata=METADATA):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def same_weights(model, meant):
    found = dict(model.named_parameters())
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[name], meant[name].float()) for name in meant)


def quantise(weights, kind, scales, chosen, mark=None):
    """Weights as written in 8 bits -> (the tensors of the file, the values that they stand for)."""
    out, meant = {}, dict(weights)
    for name in filter(chosen, weights):
        weight, layer = weights[name].float(), name.removesuffix(".weight")
        largest = weight.abs().amax(dim=1) if scales == "rows" else weight.abs().max()
        top = 127 if kind is torch.int8 else torch.finfo(kind).max
        scale = largest / top
        wide = scale[:, None] if scales == "rows" else scale
        stored = (weight / wide).round().to(kind) if kind is torch.int8 else (weight / wide).to(kind)
        meant[name] = stored.float() * wide
        out |= {name: stored, f"{layer}.{'scale_weight' if scales == 'scale_weight' else 'weight_scale'}": scale}
        if mark:
            out[f"{layer}.comfy_quant"] = text(mark)
    return weights | out, meant


def in_blocks(name):
    return "_blocks." in name and name.endswith(".weight")


def linear_of_t5(name):
    return name.endswith(".weight") and "SelfAttention" in name or "DenseReluDense" in name


# ---------------------------------------------------------------------------------------------------------------------
# What a file holds


def test_norms_as_comfyui_saves_them_and_a_prefix_of_some_keys(tmp_path):
    weights = load_file(HUB / FLUX)
    odd = {("model.diffusion_model." if i % 3 else "") + comfy_norm(name): weights[name] for i, name in enumerate(weights)}
    assert any(name.endswith("_norm.weight") for name in odd)
    for given in ({comfy_norm(name): tensor for name, tensor in weights.items()}, odd):
        path = write(tmp_path / "any name.safetensors", given)
        same_weights(load_flux(path, dtype=torch.float32), weights)
    assert "stray" in message(load_flux, write(path, odd | {"stray": torch.zeros(2)}))
    assert "twice" in message(load_flux, write(path, odd | {name: tensor.clone() for name, tensor in weights.items()}))


@pytest.mark.parametrize("kind, scales, mark", [
    (E4M3, "weight_scale", {"format": "float8_e4m3fn"}), (E4M3, "scale_weight", None), (E4M3, "rows", None),
    (torch.float8_e5m2, "weight_scale", {"format": "float8_e5m2"}), (torch.int8, "weight_scale", {"format": "int8_tensorwise"}),
    (torch.int8, "rows", {"format": "int8_tensorwise", "convrot": False})])
def test_quantised_transformers_and_t5(tmp_path, kind, scales, mark):
    """What is stored times its scales: exactly that in the transformer, and T5's states to 1e-6."""
    given, meant = quantise(load_file(HUB / FLUX), kind, scales, in_blocks, mark)
    path = write(tmp_path / "unet" / "x.safetensors", given)
    same_weights(load_flux(path, dtype=torch.float32), meant)
    assert "1 unexpected" in message(load_flux, write(tmp_path / "y.safetensors", given | {"a.weight_scale": torch.ones(1)}))
    given, meant = quantise(T5, kind, scales, linear_of_t5, mark)
    shutil.copytree(HUB, tmp_path / "plain")
    write(tmp_path / "plain/text_encoder_2/model.safetensors", meant, {"format": "pt"})
    given |= {"scaled_fp8": torch.zeros(2).to(E4M3)} if scales == "scale_weight" else {}
    t5 = write(tmp_path / "t5xxl_whatever.safetensors", given, {})
    model = Model(HUB / FLUX, HUB / "ae.safetensors", HUB / "text_encoder", t5, HUB)
    found, expected = (load_text_encoders(place, dtype=torch.float32).encode(PROMPTS) for place in (model, tmp_path / "plain"))
    plain = load_text_encoders(HUB, dtype=torch.float32).encode(PROMPTS)
    assert relative(found[0], expected[0]) < 1e-6 and torch.equal(found[1], expected[1])
    assert 0 < relative(found[0], plain[0]) < 0.2


def test_formats_in_the_files_metadata(tmp_path):
    weights = load_file(HUB / FLUX)
    for kind, known in (("float8_e4m3fn", True), ("nvfp4", False)):
        layers = {"format_version": "1.0", "layers": {"double_blocks.0.img_attn.qkv": {"format": kind}}}
        path = write(tmp_path / "x.safetensors", weights, METADATA | {"_quantization_metadata": json.dumps(layers)})
        same_weights(load_flux(path, dtype=torch.float32), weights) if known else None
        assert known or "nvfp4" in message(load_flux, path)


def test_a_weight_is_read_once_to_be_quantised(monkeypatch):
    """A GGUF file dequantizes each time that it is read."""
    files, _ = flux_files(HUB)
    names = [name for name in files.names if name.endswith("qkv.weight")][:2]
    read, real = [], files.tensor
    monkeypatch.setattr(files, "tensor", lambda name: read.append(name) or real(name))
    files.quantized(names, "cpu")
    assert read == names


def test_a_tokenizer_in_a_t5_file_is_no_weight(tmp_path):
    weights = {**T5, "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    model = Model(HUB / FLUX, HUB / "ae.safetensors", HUB / "text_encoder", write(tmp_path / "t5xxl.safetensors", weights, {}), HUB)
    found, expected = (load_text_encoders(place, dtype=torch.float32).encode(PROMPTS[:1])[0] for place in (model, HUB))
    assert torch.equal(found, expected)


def test_a_part_that_is_not_there_is_named(tmp_path):
    given = Namespace(model_ae=str(tmp_path / "none.safetensors"))
    assert message(find_model, str(HUB / FLUX), given) == f"--ae {tmp_path / 'none.safetensors'} does not exist"


def test_somebodys_private_folder_is_passed_over(tmp_path, monkeypatch):
    """Beside the model lies a folder that may not be read."""
    path = write(tmp_path / "mine" / "x.safetensors", load_file(HUB / FLUX))
    private = tmp_path / "checkpoints"
    private.mkdir()
    may, is_file = os.access, Path.is_file

    def guarded(self):
        if private in self.parents:
            raise PermissionError(13, "Permission denied", str(self))
        return is_file(self)
    monkeypatch.setattr(Path, "is_file", guarded)
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != private and may(folder, mode))
    assert "no autoencoder found" in message(find_model, str(path))


LAYER = "double_blocks.0.img_attn.qkv"
U8 = torch.zeros(8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("extra, name", [
    ({f"{LAYER}.comfy_quant": text({"format": "int8_tensorwise", "convrot": True})}, "int8_tensorwise with rotated weights"),
    ({f"{LAYER}.comfy_quant": text({"format": "int8_tensorwise", "params": {"convrot": True}})}, "rotated weights"),
    ({f"{LAYER}.comfy_quant": text({"format": "mxfp8"}), f"{LAYER}.weight_scale": U8}, "mxfp8"),
    ({f"{LAYER}.weight_scale": U8}, "mxfp8"), ({f"{LAYER}.weight_scale": torch.ones(192, 1, dtype=torch.uint8)}, "mxfp8"),
    ({f"{LAYER}.comfy_quant": text({"format": "nvfp4"}), f"{LAYER}.weight_scale": U8}, "nvfp4"),
    ({f"{LAYER}.weight_scale_2": torch.ones(1)}, "nvfp4"),
    ({f"{LAYER}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "cannot be read"),
    ({f"{LAYER}.weight": torch.zeros(192, 64, dtype=torch.int8)}, "8-bit integers without scales"),
    ({"transformer_blocks.0.qkv_proj.qweight": U8, "transformer_blocks.0.qkv_proj.wscales": torch.ones(2)}, "nunchaku"),
    ({f"{LAYER}._weight_qdata": U8, f"{LAYER}._weight_scale": torch.ones(2)}, "torchao"),
    ({f"{LAYER}.scales": torch.ones(2), f"{LAYER}.biases": torch.ones(2)}, "MLX"),
    ({f"{LAYER}.encoded_exponent": U8, f"{LAYER}.luts": U8[:4].clone()}, "DFloat11"),
    ({f"{LAYER}.svd_up": torch.ones(2), f"{LAYER}.svd_down": torch.ones(2)}, "SDNQ"), ({f"{LAYER}.float8_data": U8}, "flux-fp8-api"),
    ({f"{LAYER}.weight.absmax": torch.ones(2), f"{LAYER}.weight.quant_state.bitsandbytes__nf4": U8}, "NF4 (bitsandbytes)")])
def test_formats_that_are_not_read_are_refused_by_name(tmp_path, extra, name):
    path = write(tmp_path / "x.safetensors", load_file(HUB / FLUX) | extra)
    for function in (load_flux, lambda path: find_model(str(path))):
        found = message(function, path)
        assert name in found and str(path) in found
    t5 = {key.replace(LAYER, "encoder.block.0.layer.0.SelfAttention.q"): tensor for key, tensor in extra.items()}
    path = write(tmp_path / "t5.safetensors", T5 | t5, {})
    model = Model(HUB / FLUX, HUB / "ae.safetensors", HUB / "text_encoder", path, HUB)
    assert name in message(load_text_encoders, model)
    assert name in message(find_model, str(HUB), Given(t5=str(path)))


@pytest.mark.parametrize("change, make", [
    ({"img_in.weight": torch.zeros(64, 384)}, "FLUX.1 Fill"), ({"img_in.weight": torch.zeros(64, 128)}, "Canny or Depth"),
    ({"distilled_guidance_layer.in_proj.weight": torch.zeros(2)}, "Chroma"), ({"redux_up.weight": torch.zeros(2)}, "Redux"),
    ({"double_stream_modulation_img.lin.weight": torch.zeros(2)}, "FLUX.2"), ({"joint_blocks.0.x": torch.zeros(2)}, "SD3"),
    ({"single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight": torch.zeros(2)}, "FLUX.2"),
    ({"single_blocks.0.to_qkv_mlp.weight": torch.zeros(2)}, "DiffSynth"),
    ({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(2)}, "LoRA")])
def test_models_of_another_make_are_refused_by_name(tmp_path, change, make):
    path = write(tmp_path / "flux1.safetensors", load_file(HUB / FLUX) | change)
    for function in (load_flux, lambda path: find_model(str(path))):
        found = message(function, path)
        assert make in found and str(path) in found


@pytest.mark.parametrize("part, key", [("clip", "text_model.encoder.layers.9.mlp.fc1.weight"), ("t5", "encoder.block.9.x.weight")])
def test_a_tensor_of_a_text_encoder_that_is_not_used(tmp_path, part, key):
    harmless = {"logit_scale": torch.ones(()), "text_projection.weight": torch.zeros(24, 24),
                "text_model.embeddings.position_ids": torch.arange(77)[None]} if part == "clip" else \
        {"encoder.embed_tokens.weight": T5["shared.weight"].clone()}
    own = {f"text_model.{name}": t for name, t in CLIP.items()} if part == "clip" else T5
    plain = load_text_encoders(HUB, dtype=torch.float32).encode(PROMPTS)
    model = Model(HUB / FLUX, HUB / "ae.safetensors", HUB / "text_encoder", HUB / "text_encoder_2", HUB)
    given = model._replace(**{part: write(tmp_path / "x.safetensors", own | harmless, {})})
    assert all(map(torch.equal, load_text_encoders(given, dtype=torch.float32).encode(PROMPTS), plain))
    assert fingerprint(given, part) == fingerprint(model, part)                  # a run of stage 1 resumes with either
    write(tmp_path / "x.safetensors", own | {key: torch.zeros(2)}, {})
    found = message(load_text_encoders, given)
    assert "1 unexpected" in found and key.removeprefix("text_model.") in found


def test_quantised_text_encoders_are_others(tmp_path):
    """Their texts are other numbers: stage 1 does not resume with them. 32 and 16 bits are the same to it."""
    model, found = Model(HUB / FLUX, HUB / "ae.safetensors", HUB / "text_encoder", HUB / "text_encoder_2", HUB), []
    for i, dtype in enumerate((torch.float32, torch.bfloat16, E4M3)):
        weights = {name: t.to(E4M3).to(dtype) if t.dim() > 1 else t for name, t in T5.items()}    # the same numbers
        found.append(fingerprint(model._replace(t5=write(tmp_path / f"{i}.safetensors", weights, {})), "t5"))
    assert found[0] == found[1] and found[2] == f"F8_E4M3 {found[0]}"


# ---------------------------------------------------------------------------------------------------------------------
# Where the files are


def comfy(root, flux="unet/my own merge.safetensors", hub=BABY, t5="t5xxl_fp8_e4m3fn_scaled"):
    """The folders of a ComfyUI installation, with a scaled T5 and what else people have there."""
    models = root / "ComfyUI" / "models"
    weights, metadata = load_file(hub / FLUX), TensorFiles([hub / FLUX]).metadata
    write(models / flux, {comfy_norm(name): tensor for name, tensor in weights.items()}, metadata)
    (models / "vae").mkdir()
    shutil.copy(hub / "ae.safetensors", models / "vae")
    write(models / "vae" / "sdxl_vae.safetensors", {"decoder.conv_in.weight": torch.zeros(16, 4, 3, 3)}, {})
    clip = load_file(hub / "text_encoder" / "model.safetensors")
    write(models / "text_encoders" / "clip_l.safetensors", {f"text_model.{name}": t for name, t in clip.items()}, {})
    write(models / "text_encoders" / "clip_g.safetensors", {"text_model.final_layer_norm.weight": torch.zeros(1280)}, {})
    given, _ = quantise(load_file(hub / "text_encoder_2" / "model.safetensors"), E4M3, "scale_weight", linear_of_t5)
    write(models / "clip" / f"{t5}.safetensors", given | {"scaled_fp8": torch.zeros(2).to(E4M3)}, {})
    (models / "loras").mkdir()
    return models


def tokenizers(folder, hub=BABY):
    """The small files alone."""
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(hub / part, folder / part)
    for part in ("text_encoder", "text_encoder_2"):
        (folder / part).mkdir(parents=True)
        shutil.copy(hub / part / "config.json", folder / part)
    return folder


def command(script, *words):
    return script.main([str(word) for word in words])


def test_a_comfyui_installation_personalises_and_draws(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    models, small = comfy(tmp_path), tokenizers(tmp_path / "small")
    shutil.copy(BABY / "lomd.safetensors", tmp_path)
    transformer = models / "unet" / "my own merge.safetensors"
    rest = ["--model", transformer, "--tokenizers", small, "--device", "cpu"]
    code = command(personalize, ROOT / "baby" / "example.png", *rest, "--iters", 2, "--no-augment", "--resolution", 64)
    out, errors = capfd.readouterr()
    assert code == 0, errors
    assert f"sample.py --model '{transformer}' --tokenizers {small} --device cpu --lora out.safetensors" in out
    assert str(models / "vae" / "ae.safetensors") in out and "clip_l" in out and "t5xxl_fp8" in out and str(small) in out
    code = command(sample, "a photo of a woman", *rest, "--lora", "out.safetensors", "--width", 64, "--height", 64, "--steps", 2)
    assert code == 0, capfd.readouterr().err
    assert Image.open("out.png").size == (64, 64)


def test_a_folder_and_a_link_to_it_hold_one_transformer(tmp_path):
    models = comfy(tmp_path, "diffusion_models/krea.safetensors", HUB)
    tokenizers(models.parent, HUB)
    (models / "unet").symlink_to("diffusion_models")
    assert find_model(str(models.parent)) == find_model(str(models / "diffusion_models/krea.safetensors"))


def test_the_configuration_of_all_of_clip_is_one_of_its_text_encoder(tmp_path):
    """As the folder of openai/clip-vit-large-patch14 has it."""
    models = comfy(tmp_path, "unet/krea.safetensors", HUB)
    path = tokenizers(models.parent, HUB) / "text_encoder" / "config.json"
    path.write_text(json.dumps({"model_type": "clip", "text_config": json.loads(path.read_text()), "vision_config": {}}))
    found, expected = (load_text_encoders(find_model(str(m)), dtype=torch.float32).encode(PROMPTS) for m in (models.parent, HUB))
    assert torch.equal(found[1], expected[1])


def test_the_parts_of_a_comfyui_installation_are_the_right_ones(tmp_path):
    models = comfy(tmp_path, "diffusion_models/flux/krea.safetensors", HUB)
    tokenizers(models.parent, HUB)
    model = find_model(str(models / "diffusion_models/flux/krea.safetensors"))
    assert model == find_model(str(models.parent)) == find_model(str(models))
    plain = find_model(str(HUB))
    same_weights(load_flux(model, dtype=torch.float32), load_file(HUB / FLUX))
    assert all(map(torch.equal, load_autoencoder(model).parameters(), load_autoencoder(plain).parameters()))
    found, expected = (load_text_encoders(m, dtype=torch.float32).encode(PROMPTS) for m in (model, plain))
    assert relative(found[0], expected[0]) < 0.2 and torch.equal(found[1], expected[1])
    write(models / "unet" / "fill.safetensors", load_file(HUB / FLUX))
    several = message(find_model, str(models.parent))
    assert "krea.safetensors" in several and "fill.safetensors" in several
    (models / "clip" / "t5xxl_fp8_e4m3fn_scaled.safetensors").rename(models / "clip" / "mine.safetensors")
    shutil.copy(models / "clip" / "mine.safetensors", models / "clip" / "other.safetensors")
    several = message(find_model, str(models / "unet" / "fill.safetensors"))
    assert "mine.safetensors" in several and "other.safetensors" in several and "--t5" in several


def test_all_in_one(tmp_path, capsys):
    everything = {f"model.diffusion_model.{comfy_norm(name)}": t for name, t in load_file(HUB / FLUX).items()}
    everything |= {f"vae.{name}": t for name, t in load_file(HUB / "ae.safetensors").items()}
    for name, own, start in (("clip_l", CLIP, "text_model."), ("t5xxl", T5, "")):
        everything |= {f"text_encoders.{name}.transformer.{start}{key}": tensor for key, tensor in own.items()}
        everything[f"text_encoders.{name}.logit_scale"] = torch.ones(())
    own = TensorFiles([HUB / "ae.safetensors"]).metadata["config"]
    path = write(tmp_path / "checkpoints" / "flux1-dev-all.safetensors", everything, METADATA | {"vae.config": own})
    small = tokenizers(tmp_path / "small", HUB)
    model = find_model(str(path), Given(tokenizers=str(small)))
    assert model[:4] == (path,) * 4 and capsys.readouterr().out.count("in the same file") == 3
    same_weights(load_flux(model, dtype=torch.float32), load_file(HUB / FLUX))
    assert all(map(torch.equal, load_autoencoder(model).parameters(), load_autoencoder(HUB).parameters()))
    expected = load_text_encoders(HUB, dtype=torch.float32).encode(PROMPTS)
    assert all(map(torch.equal, load_text_encoders(model, dtype=torch.float32).encode(PROMPTS), expected))


def Given(**options):
    """A command line."""
    return Namespace(**{f"model_{word}": value for word, value in options.items()})


def test_parts_by_name_and_what_is_not_found(tmp_path):
    path = write(tmp_path / "a" / "x.safetensors", load_file(HUB / FLUX))
    assert "--ae" in message(find_model, str(path))
    given = dict(ae=str(HUB / "ae.safetensors"), clip=str(HUB / "text_encoder"), t5=str(HUB / "text_encoder_2"))
    assert "--tokenizers" in message(find_model, str(path), Given(**given))
    model = find_model(str(path), Given(**given, tokenizers=str(HUB)))
    assert model == Model(path, HUB / "ae.safetensors", HUB / "text_encoder", HUB / "text_encoder_2", HUB)
    assert find_model(str(path.parent), Given(**given, tokenizers=str(HUB))) == model
    for option in given:
        found = message(find_model, str(path), Given(**given | {option: "nowhere"}))
        assert found == f"--{option} nowhere does not exist"
    assert "--clip" in message(find_model, str(path), Given(**given | {"clip": str(tmp_path)}))
    assert find_model(str(HUB), Given(ae=str(HUB / "vae"), clip=None, t5=None, tokenizers=None)).autoencoder == HUB / "vae"


def in_parts(folder, stem, variant=""):
    """A folder's one file of weights as two and their index, as save_pretrained(variant=...) names them."""
    weights, names = load_file(folder / f"{stem}.safetensors"), {}
    for i, part in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        name = f"{stem}{variant}-{i:05}-of-00002.safetensors"
        write(folder / name, {key: weights[key] for key in part}, {"format": "pt"})
        names |= dict.fromkeys(part, name)
    index = folder / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"weight_map": names}))
    (folder / f"{stem}.safetensors").unlink()
    return index


def test_weights_of_a_variant(tmp_path):
    folder, diffusion = tmp_path / "hub", "diffusion_pytorch_model"
    shutil.copytree(HUB, folder)
    for name in (FLUX, "ae.safetensors"):
        (folder / name).unlink()
    index = in_parts(folder / "text_encoder_2", "model", ".bf16")
    in_parts(folder / "transformer", diffusion, ".fp16").rename(folder / "transformer" / f"{diffusion}.safetensors.fp16.index.json")
    for part, stem in (("vae", diffusion), ("text_encoder", "model")):
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
    same_weights(load_flux(find_model(str(folder)), dtype=torch.float32), load_file(HUB / FLUX))
    assert all(map(torch.equal, load_autoencoder(folder).parameters(), load_autoencoder(HUB).parameters()))
    found, expected = (load_text_encoders(place, dtype=torch.float32).encode(PROMPTS) for place in (folder, HUB))
    assert all(map(torch.equal, found, expected))
    shutil.copy(HUB / "text_encoder/model.safetensors", folder / "text_encoder")
    assert finding.part_files(folder, "clip")[0] == [folder / "text_encoder/model.safetensors"]           # before a variant
    missing = "model.bf16-00002-of-00002.safetensors"
    (folder / "text_encoder_2" / missing).unlink()
    found = message(find_model, str(folder))
    assert missing in found and index.name in found and "complete" in found


def test_one_part_of_several_by_name(tmp_path):
    folder = tmp_path / "hub"
    shutil.copytree(HUB, folder)
    in_parts(folder / "transformer", "diffusion_pytorch_model")
    in_parts(folder / "text_encoder_2", "model")
    for inner, given in (("transformer", None), ("text_encoder_2", "t5")):
        part = next((folder / inner).glob("*-00002-of-00002.safetensors"))
        found = message(find_model, str(folder), Given(t5=str(part))) if given else message(find_model, str(part))
        assert f"name its folder, {folder / inner}" in found
    write(tmp_path / "x" / "all-00001-of-00001.safetensors", load_file(HUB / FLUX))
    assert "--ae" in message(find_model, str(tmp_path / "x" / "all-00001-of-00001.safetensors"))          # the only one is whole


@pytest.mark.parametrize("name", ["pytorch_model.bin", "t5.pt", "whatever.ckpt"])
def test_pickles_are_called_what_they_are(tmp_path, name):
    folder = tmp_path / "hub"
    shutil.copytree(HUB, folder)
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    torch.save(T5, folder / "text_encoder_2" / name, _use_new_zipfile_serialization=name[0] == "p")
    for given in (Given(), Given(t5=str(folder / "text_encoder_2" / name))):
        found = message(find_model, str(folder), given)
        assert name in found and "pickle, which is never loaded" in found and "torn" not in found


def test_a_length_that_looks_like_a_pickle(tmp_path):
    path = tmp_path / "x.safetensors"
    text = b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}'.ljust(0x280)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"ab")
    assert path.read_bytes()[:2] == b"\x80\x02" and finding.not_content(path) is None and "a" in TensorFiles([path]).names


def test_a_folder_with_another_programs_format(tmp_path):
    """mflux saves numbered files without a config, DFloat11 files of other names than the config's."""
    weights = load_file(HUB / "transformer/diffusion_pytorch_model.safetensors")
    write(tmp_path / "mflux/transformer/0.safetensors", weights | {"x_embedder.scales": U8, "x_embedder.biases": U8.clone()}, {})
    write(tmp_path / "df11/model.safetensors", weights | {"x_embedder.encoded_exponent": U8}, {})
    shutil.copy(HUB / "transformer/config.json", tmp_path / "df11")
    assert "MLX" in message(find_model, str(tmp_path / "mflux")) and "DFloat11" in message(find_model, str(tmp_path / "df11"))


@pytest.mark.parametrize("name, taken", [("sd3.5_vae", False), ("SDXL/ae16", False), ("sd3/diffusion_pytorch_model", False),
                                         ("qwen_image_vae", False), ("mine", True), ("swansdown-flux", True)])
def test_a_lone_autoencoder_that_is_named_for_another_model(tmp_path, name, taken):
    models = comfy(tmp_path, hub=HUB)
    tokenizers(models, HUB)
    path = models / "vae" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    (models / "vae" / "ae.safetensors").rename(path)
    transformer = str(models / "unet" / "my own merge.safetensors")
    if taken:
        assert find_model(transformer).autoencoder == path
    else:
        found = message(find_model, transformer)
        assert str(path) in found and "--ae" in found
    assert find_model(transformer, Given(ae=str(path))).autoencoder == path


def test_the_autoencoder_of_stable_diffusion_3_by_its_numbers(tmp_path, monkeypatch):
    """The published file by its digest, a folder by its scale, and one with everything by its transformer."""
    models = comfy(tmp_path, hub=HUB)
    tokenizers(models, HUB)
    transformer, path = str(models / "unet" / "my own merge.safetensors"), models / "vae" / "ae.safetensors"
    find_model(transformer)
    monkeypatch.setattr(finding, "SD3_BYTES", path.stat().st_size)
    find_model(transformer)                                             # as many bytes are not enough
    monkeypatch.setattr(finding, "SD3_DIGEST", finding.digest(path.read_bytes()))
    assert "no autoencoder" in message(find_model, transformer)
    assert "Stable Diffusion 3" in message(find_model, transformer, Given(ae=str(path)))
    path.unlink()
    shutil.copytree(HUB / "vae", tmp_path / "vae3")
    config = json.loads((tmp_path / "vae3/config.json").read_text()) | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    (tmp_path / "vae3/config.json").write_text(json.dumps(config))
    assert "Stable Diffusion 3" in message(find_model, transformer, Given(ae=str(tmp_path / "vae3")))
    everything = {f"first_stage_model.{name}": tensor for name, tensor in load_file(HUB / "ae.safetensors").items()}
    everything["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"] = torch.zeros(2)
    write(models / "checkpoints" / "everything.safetensors", everything, {})
    assert "no autoencoder" in message(find_model, transformer)


def test_linked_folders_are_looked_into_once(tmp_path):
    models = comfy(tmp_path, hub=HUB)
    tokenizers(models, HUB)
    expected = find_model(str(models))
    (tmp_path / "disk").mkdir()
    (models / "vae" / "ae.safetensors").rename(tmp_path / "disk" / "my_vae.safetensors")
    (models / "vae" / "flux").symlink_to(tmp_path / "disk")
    (models / "vae" / "again").symlink_to(models / "vae")
    (models / "unet").rename(tmp_path / "unets")
    (models / "unet").mkdir()
    (models / "unet" / "elsewhere").symlink_to(tmp_path / "unets")
    found = find_model(str(models))
    assert found.autoencoder.resolve() == tmp_path / "disk" / "my_vae.safetensors" and "vae/" in str(found.autoencoder)
    assert found.t5 == expected.t5 and found.transformer.resolve() == tmp_path / "unets" / expected.transformer.name


def test_a_folder_with_one_transformer_of_any_name_or_several(tmp_path):
    for part in ("ae.safetensors", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (tmp_path / part).symlink_to(HUB / part)
    (tmp_path / "lomd.safetensors").symlink_to(BABY / "lomd.safetensors")
    weights = load_file(HUB / FLUX)
    path = write(tmp_path / "my merge.sft", weights)
    assert find_model(str(tmp_path)) == find_model(str(path)) == Model(
        path, tmp_path / "ae.safetensors", tmp_path / "text_encoder", tmp_path / "text_encoder_2", tmp_path)
    same_weights(load_flux(find_model(str(tmp_path)), dtype=torch.float32), weights)
    write(tmp_path / FLUX, weights)
    found = message(find_model, str(tmp_path))
    assert "my merge.sft" in found and FLUX in found


def test_a_diffusers_file_without_its_config(tmp_path):
    path = tmp_path / "transformer.safetensors"
    write(path, load_file(HUB / "transformer" / "diffusion_pytorch_model.safetensors"))
    same_weights(load_flux(path, dtype=torch.float32), load_file(HUB / FLUX))
    assert find_model(str(HUB / "transformer")) == Model(
        HUB / "transformer", HUB / "ae.safetensors", HUB / "text_encoder", HUB / "text_encoder_2", HUB)


def test_misshapen_files_are_refused_before_anything_large_is_read(tmp_path, monkeypatch, capfd):
    path = write(tmp_path / "x.safetensors", {n: t for n, t in load_file(BABY / FLUX).items() if "blocks.2" not in n},
                 TensorFiles([BABY / FLUX]).metadata)
    monkeypatch.setattr(checkpoints, "load_text_encoders", lambda *_: pytest.fail("reads T5"))
    given = ["--ae", BABY / "ae.safetensors", "--clip", BABY / "text_encoder", "--t5", BABY / "text_encoder_2"]
    assert command(sample, "a", "--model", path, *given, "--tokenizers", BABY) == 2
    assert "missing" in capfd.readouterr().err


def test_defaults_come_with_the_tokenizers(tmp_path):
    """A small model of single files whose folder has none."""
    given = dict(ae=str(BABY / "ae.safetensors"), clip=str(BABY / "text_encoder"), t5=str(BABY / "text_encoder_2"), tokenizers=str(BABY))
    path = write(tmp_path / "x.safetensors", load_file(BABY / FLUX), TensorFiles([BABY / FLUX]).metadata)
    assert checkpoints.model_defaults(find_model(str(path), Given(**given))) == checkpoints.model_defaults(BABY)


@pytest.mark.parametrize("source", [FLUX, "transformer/diffusion_pytorch_model.safetensors"])
def test_a_file_without_a_configuration_may_have_lost_blocks(tmp_path, source):
    """It has the published width, and as many blocks as it holds; of the small one there are two and three."""
    weights = load_file(HUB / source)
    for gone, kept in ((("none",), (2, 3)), (("double_blocks.1.", "single_blocks.2."), (1, 2))):
        names = [name for name in weights if not name.replace("_transformer", "").replace("transformer", "double").startswith(gone)]
        path = write(tmp_path / "x.safetensors", {name: weights[name] for name in names}, {})
        assert checkpoints.flux_files(path)[1] == FluxConfig(depth=kept[0], depth_single_blocks=kept[1])


def test_a_judge_called_clip_is_no_part_of_the_model():
    assert finding.named_parts(Namespace(clip="judges/", model_t5="x")) == {"ae": None, "clip": None, "t5": "x", "tokenizers": None}


def test_small_files_from_the_hubs_cache(tmp_path, monkeypatch):
    small, path = tokenizers(tmp_path / "cache", HUB), comfy(tmp_path, hub=HUB) / "unet" / "my own merge.safetensors"
    monkeypatch.setattr(finding, "cached", lambda name: small if name == "flux-schnell" else None)
    assert find_model(str(path)).tokenizers == small


# ---------------------------------------------------------------------------------------------------------------------
# GGUF


def write_gguf(path, tensors, config=None, kind="Q8_0"):
    """As the converters write it: matrices quantised, the rest in 32 bits. -> the values that it stands for."""
    gguf = pytest.importorskip("gguf")
    writer, meant, wanted = gguf.GGUFWriter(path, "flux"), {}, gguf.GGMLQuantizationType[kind]
    if config:
        writer.add_string("config", config)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            stored = gguf.quantize(values, wanted)
            writer.add_tensor(name, stored, raw_dtype=wanted)
            values = gguf.dequantize(stored, wanted)
        else:
            writer.add_tensor(name, values)
        meant[name] = torch.from_numpy(values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("kind, distance", [("Q8_0", 0.01), ("Q4_0", 0.15), ("BF16", 0.003)])
def test_gguf(tmp_path, kind, distance):
    plain, path = load_file(BABY / FLUX), tmp_path / "baby.gguf"
    meant = write_gguf(path, plain, TensorFiles([BABY / FLUX]).metadata["config"], kind)
    same_weights(load_flux(path, dtype=torch.float32), meant)
    weights = [name for name in plain if in_blocks(name)]
    assert max(relative(meant[name], plain[name].float()) for name in weights) < distance
    for name, module in load_flux(path, fp8=True).named_modules():
        if isinstance(module, checkpoints.Fp8Linear):
            assert relative(module.weight.float() * module.scale, meant[f"{name}.weight"]) < 0.04
    assert flux_fingerprint(path) == flux_fingerprint(BABY)
    path.write_bytes(path.read_bytes()[:5000])
    assert "GGUF" in message(load_flux, path)


def test_gguf_of_a_type_that_the_package_does_not_dequantise(tmp_path):
    gguf, path = pytest.importorskip("gguf"), tmp_path / "x.gguf"
    writer, kind = gguf.GGUFWriter(path, "flux"), gguf.GGMLQuantizationType.Q8_K
    size = gguf.GGML_QUANT_SIZES[kind][1]
    writer.add_tensor("img_in.weight", torch.zeros(2, size, dtype=torch.uint8).numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "Q8_K" in message(load_flux, path)


def test_gguf_of_t5_has_other_names(tmp_path):
    path, given = tmp_path / "t5-v1_1-xxl-encoder-Q8_0.gguf", {}
    for name, tensor in T5.items():
        for theirs, ours in tensors.USUAL_NAMES.items():
            name = name.replace(ours, theirs)
        given[name] = tensor
    assert {"token_embd.weight", "enc.output_norm.weight", "enc.blk.1.attn_q.weight", "enc.blk.0.attn_rel_b.weight",
            "enc.blk.0.ffn_gate.weight", "enc.blk.0.ffn_norm.weight"} < given.keys()
    meant = write_gguf(path, given)
    model = Model(HUB / FLUX, HUB / "ae.safetensors", HUB / "text_encoder", path, HUB)
    assert finding.holds(path, "t5", 40) and not finding.holds(path, "transformer")
    found = load_text_encoders(model, dtype=torch.float32)
    assert torch.equal(found.t5.shared.weight, meant["token_embd.weight"])
    assert relative(found.encode(PROMPTS)[0], load_text_encoders(HUB, dtype=torch.float32).encode(PROMPTS)[0]) < 0.02


def test_gguf_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "find_spec", lambda name: None)
    (tmp_path / "flux1-dev-Q8_0.gguf").write_bytes(b"GGUF" + bytes(100))
    for path in (tmp_path, tmp_path / "flux1-dev-Q8_0.gguf"):
        assert "pip install gguf" in message(find_model, str(path))


# ---------------------------------------------------------------------------------------------------------------------
# The LoMD that goes with it


def copy_as(path, dtype, scaled=False):
    """The baby with every tensor in this dtype, or only the blocks' weights, with scales."""
    weights = load_file(BABY / FLUX)
    given = quantise(weights, dtype, "scale_weight", in_blocks)[0] if scaled else {n: t.to(dtype) for n, t in weights.items()}
    return write(path, given, TensorFiles([BABY / FLUX]).metadata)


@pytest.mark.parametrize("dtype, scaled", [(torch.float32, False), (torch.float16, False), (E4M3, False), (E4M3, True)])
def test_a_lomd_fits_every_copy_of_its_model(tmp_path, dtype, scaled, capsys):
    copy = copy_as(tmp_path / "copy.safetensors", dtype, scaled)
    assert flux_fingerprint(copy) == flux_fingerprint(BABY)
    lomd, metadata = load_file(BABY / "lomd.safetensors"), TensorFiles([BABY / "lomd.safetensors"]).metadata
    for trained_on in (BABY, copy):
        metadata["model_fingerprint"] = flux_fingerprint(trained_on)
        new = write(tmp_path / "lomd.safetensors", lomd, metadata)
        for used_on in (BABY, copy):
            read_lomd(used_on, new)
    assert "note" not in capsys.readouterr().err
    other = load_file(copy)
    other["img_in.bias"] = (other["img_in.bias"].float() * 1.2).to(other["img_in.bias"].dtype)
    other = write(tmp_path / "other.safetensors", other, TensorFiles([BABY / FLUX]).metadata)
    assert "another model" in message(read_lomd, other, new)


def test_what_is_coarser_than_e4m3_cannot_be_told(tmp_path, capsys):
    copy = copy_as(tmp_path / "copy.safetensors", torch.float8_e5m2)
    read_lomd(copy, BABY / "lomd.safetensors")
    assert "cannot be known" in capsys.readouterr().err


def test_the_lomd_is_looked_for_before_a_download(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finding, "from_hub", lambda name: pytest.fail("asked the hub"))
    assert command(personalize, ROOT / "baby" / "example.png") == 2
    assert "no LoMD" in capfd.readouterr().err
