"""Finding a model: in the hub's layout, in the hub's cache, in ComfyUI's folders, or file by file.

    find_model("flux-dev"), find_model("ComfyUI/models/unet/flux1-krea-dev.safetensors")

A model is a folder in the hub's layout: original files (flux1-dev.safetensors, ae.safetensors),
diffusers files (transformer/, vae/) or both; text_encoder/, tokenizer/ (CLIP), text_encoder_2/,
tokenizer_2/ (T5). Or it is a `Model`, whose parts lie anywhere.
"""
import json
import os
import re
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub.errors import HTTPError                         # its http client's own

from flux_model import AutoEncoderConfig, FluxConfig
from support.common import JsonFile, digest, not_content
from support.names import OTHER_MODELS, first_match
from support.tensors import SHARD, TensorFiles

BABY = Path(__file__).resolve().parents[1] / "baby" / "checkpoint"
HUB = {
    "flux-dev": ("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors",
                 "FLUX.1 [dev] Non-Commercial License"),
    "flux-schnell": ("black-forest-labs/FLUX.1-schnell", "flux1-schnell.safetensors", "Apache 2.0"),
}
# without a pattern the hub's library calls a cache incomplete that holds all that we take
LOCAL = {"local_files_only": True, "allow_patterns": []}
HUB_ERRORS = HTTPError, OSError, ValueError
# the folder of each part in the hub's layout; the original files; the options that name parts
FOLDERS = {"transformer": "transformer", "autoencoder": "vae", "clip": "text_encoder",
           "t5": "text_encoder_2"}
ORIGINALS = {
    "transformer": ["flux1-dev.safetensors", "flux1-schnell.safetensors",
                    "flux1-dev-fp8.safetensors", "flux1-schnell-fp8.safetensors"],
    "autoencoder": ["ae.safetensors"],
}
OPTION = {"autoencoder": "ae", "clip": "clip", "t5": "t5", "tokenizers": "tokenizers"}
# ComfyUI's folders, in the order in which they are looked into
COMFY = "vae", "text_encoders", "clip", "checkpoints", "diffusion_models", "unet"
SUFFIXES = ".safetensors", ".sft", ".gguf", ".bin", ".pt", ".pth", ".ckpt"      # pickles: to refuse
# names that are taken if a folder holds several files that fit, the best first
PREFERRED = "ae", "clip_l", "t5xxl_fp16", "t5xxl_fp8_e4m3fn_scaled", "t5xxl_fp8_e4m3fn"
# tensors that show a part, and its width
SIGNS = {
    "transformer": ["img_in.weight", "x_embedder.weight"],           # a LoRA has none
    "autoencoder": ["decoder.conv_in.weight"],
    "clip": ["final_layer_norm.weight", "text_model.final_layer_norm.weight"],
    "t5": ["encoder.final_layer_norm.weight"],
}
# tensors of a ControlNet and of umt5, which have the signs of a transformer and of T5
OTHER_PARTS = re.compile(r"controlnet|block\.1\.layer\.0\.SelfAttention\.relative_attention_bias")
OTHER_FILES = {                        # that are not a transformer of FLUX.1 as we know it
    "FLUX.1 Redux": r"^redux_(up|down)\.",
    "a ControlNet": r"^controlnet_",
    "a LoRA": r"^lora_|\.lora",
    "FLUX.1 under DiffSynth's own names": r"\.to_qkv_mlp\.",
}
# channels of a token -> model
INPUTS = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny or Depth", 196: "Flex.2"}
# Stable Diffusion 3's autoencoder has the names and shapes of FLUX.1's; known by scale or digest
SD3_SCALE = 1.5305
SD3_BYTES = 167_666_654
SD3_DIGEST = "f9b67a279283625c"        # how its SHA-256 begins
OTHER_AUTOENCODER = re.compile(
    r"(?i)(?<![a-z])(sd[-_. ]?(xl|[1-3])|stable.?diff|qwen|wan|hunyuan|cosmos)")


class Model(NamedTuple):
    """Where the parts of a model lie: files, or folders with a config.json as the hub has them.

    As a path it is the folder of its transformer, where its LoMD and its defaults.json are looked
    for.
    """
    transformer: Path
    autoencoder: Path | None = None
    clip: Path | None = None
    t5: Path | None = None
    tokenizers: Path | None = None   # tokenizer/, tokenizer_2/, configs of encoders in single files

    def __fspath__(self) -> str:
        return str(self.transformer.parent)

    def __str__(self) -> str:
        return str(self.transformer)


Place = str | Path | Model

# The parts of a folder --------------------------------------------------------------------------

def name_formats(folder: Path):
    """ValueError if a folder without usable weights holds pickles, or a format that is not read."""
    for path in files_in(folder):
        TensorFiles([path])


def check_whole(path: Path, why: str = "") -> Path:
    """The path. ValueError if the file is missing, or a pointer or a web page is in its place."""
    if not path.is_file():
        name_formats(path.parent)
        raise ValueError(f"{path.parent} lacks {path.name}{why}: complete the download")
    fault = not_content(path)
    if fault:
        raise ValueError(f"{path} cannot be read: {fault}")
    return path


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Weights in a folder: what the index lists, if there is one, so that half a download shows.

    Without plain ones, those of a variant (model.fp16.safetensors).
    """
    found = [*folder.glob(f"{stem}.safetensors*.json"), *folder.glob(f"{stem}*.safetensors")]
    whole = [path for path in found if not SHARD.search(path.name)]
    # .json comes before .safetensors, and a variant's name is longer
    index = min(whole, key=lambda path: (path.suffix, len(path.name), path),
                default=folder / f"{stem}.safetensors")
    if index.suffix != ".json":
        return [check_whole(index)]
    listed = JsonFile(index)["weight_map"]
    if not isinstance(listed, dict):
        raise ValueError(f"{index} lists no files: download it again")
    names = sorted(set(listed.values()))
    return [check_whole(folder / name, f", which {index.name} lists") for name in names]


def part_files(place: Place, part: str) -> tuple[list[Path], JsonFile | None]:
    """The files of one part of a model, and its diffusers config (None: original layout)."""
    is_model = isinstance(place, Model)
    path = getattr(place, part) if is_model else Path(place)
    originals = ORIGINALS.get(part, [])
    folder = path / FOLDERS[part]
    if is_model and (path / "config.json").is_file():
        folder = path
    paths = [file for file in (path, *map(path.joinpath, originals)) if file.is_file()][:1]
    config = None
    if not paths and (folder / "config.json").is_file():
        config = JsonFile(folder / "config.json")
        stem = "model" if part in ("clip", "t5") else "diffusion_pytorch_model"
        paths = weight_files(folder, stem)
    if not paths:
        name_formats(folder)
        raise ValueError(f"{path} holds no {part} ({' or '.join([*originals, FOLDERS[part]])}/): "
                         f"name one with --{OPTION.get(part, 'model')}")
    if is_sd3(paths[0]) or config and config.get("scaling_factor") == SD3_SCALE:
        raise ValueError(f"{paths[0]} is the autoencoder of Stable Diffusion 3, not of FLUX.1")
    return paths, config


def open_part(place: Place, part: str) -> tuple[TensorFiles, JsonFile | None]:
    """The tensors of one part of a model, and its diffusers config (None: original layout)."""
    paths, config = part_files(place, part)
    return TensorFiles(paths, part), config


def is_sd3(path: Path) -> bool:
    """Is it the published autoencoder of Stable Diffusion 3, whatever it is called?"""
    return path.stat().st_size == SD3_BYTES and digest(path.read_bytes()) == SD3_DIGEST


def in_hub_layout(folder: Path, part: str) -> Path:
    """A part of a folder as the hub has it: its file, or its folder. ValueError: it has none."""
    paths, config = part_files(folder, part)
    return config.path.parent if config else paths[0]


def tokenizers_of(folder: Place) -> Path:
    return folder.tokenizers if isinstance(folder, Model) else Path(folder)


def check_tokenizers(folder: Path) -> Path:
    """The folder. ValueError if a tokenizer or the config of a text encoder is missing.

    transformers would make up a missing vocabulary.
    """
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model",
                 "text_encoder/config.json", "text_encoder_2/config.json"):
        path = folder / name
        if path.is_file() or not path.with_name("tokenizer.json").is_file():
            check_whole(path)
    for path in folder.glob("tokenizer*/[!.]*.json"):
        JsonFile(path)                           # transformers would not name a torn one
    return folder


def check_snapshot(folder: Path) -> Path:
    """The folder. ValueError that names the first part it lacks, in either layout."""
    for part in FOLDERS:
        part_files(folder, part)
    return check_tokenizers(folder)

# What the files of a part say ---------------------------------------------------------------------

def stored_config(kind: type, files: TensorFiles, field: str, known: dict) -> Any:
    """The configuration of files without a config.json: the published one, with what is `known`
    from the tensors, and what the files' metadata say."""
    try:
        return kind(**(known | json.loads(files.metadata.get(field, "{}"))))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{files.path}: the {kind.__name__} in its metadata cannot be used: "
                         f"{error}") from None


def flux_files(folder: Place) -> tuple[TensorFiles, FluxConfig]:
    """Tensors and configuration of a transformer. ValueError, by name, if it is not FLUX.1's."""
    files, config = open_part(folder, "transformer")
    check_make(files)
    if config is None:
        double = "img_mod.lin.bias", "norm1.linear.bias"
        single = ".modulation.lin.bias", ".norm.linear.bias"
        known = {
            "guidance_embed": any("guidance_" in name for name in files.names),   # not schnell
            # some files have lost blocks
            "depth": sum(name.endswith(double) for name in files.names),
            "depth_single_blocks": sum(name.endswith(single) for name in files.names),
        }
        return files, stored_config(FluxConfig, files, "config", known)
    return files, FluxConfig(
        in_channels=config["in_channels"],
        out_channels=config.get("out_channels") or config["in_channels"],
        vec_in_dim=config["pooled_projection_dim"],
        context_in_dim=config["joint_attention_dim"],
        hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
        num_heads=config["num_attention_heads"],
        depth=config["num_layers"],
        depth_single_blocks=config["num_single_layers"],
        guidance_embed=config["guidance_embeds"],
        axes_dim=config.get("axes_dims_rope", (16, 56, 56)),
    )


def autoencoder_files(folder: Place) -> tuple[TensorFiles, AutoEncoderConfig]:
    """Tensors and configuration of a model's autoencoder."""
    files, config = open_part(folder, "autoencoder")
    if config is None:
        field = "vae.config" if "vae.config" in files.metadata else "config"
        return files, stored_config(AutoEncoderConfig, files, field, {})
    widths = config["block_out_channels"]
    return files, AutoEncoderConfig(
        ch=widths[0],
        ch_mult=[width // widths[0] for width in widths],
        z_channels=config["latent_channels"],
        num_res_blocks=config["layers_per_block"],
        scale_factor=config["scaling_factor"],
        shift_factor=config["shift_factor"],
        num_groups=config["norm_num_groups"],
        resolution=config["sample_size"],
    )


def widths_in(files: TensorFiles, part: str) -> list[int]:
    """Widths of the tensors that show a part; [] in files without it."""
    return [files.shape(name)[:2][-1] for name in SIGNS[part] if name in files.names]


def check_make(files: TensorFiles):
    """ValueError, by name, if a file is of another model than FLUX.1."""
    # an autoencoder in the same file has names of its own, as Stable Diffusion has them
    names = [name for name in files.names if not name.startswith(("encoder.", "decoder."))]
    make, found = first_match(OTHER_FILES | OTHER_MODELS, names)
    if make:
        raise ValueError(f"{files.path} is {make} ({found}), and not the transformer of FLUX.1")
    for channels in widths_in(files, "transformer"):
        if channels in INPUTS:
            raise ValueError(f"{files.path} is {INPUTS[channels]} (a token has {channels} "
                             "channels), which is not supported: FLUX.1 takes 64")

# Parts that lie elsewhere -----------------------------------------------------------------------

def holds(path: Path, part: str, width: int | None = None) -> bool:
    """Does a file hold this part, by its names and the width that the transformer asks for?"""
    try:
        files = TensorFiles([path], part, check=False)
        if part == "autoencoder":                # not another model's, in a file with everything
            check_make(TensorFiles([path], check=False))
    except (OSError, ValueError):                # without the gguf package only the name tells
        guess = "t5" if "t5" in path.stem.lower() else "transformer"
        return path.suffix == ".gguf" and part == guess
    widths = widths_in(files, part)
    fits = width in widths
    if part == "transformer":                    # others begin like it, and go on with "layers.0."
        fits = bool(widths) and any("_blocks.0." in name for name in files.names)
    return fits and not any(map(OTHER_PARTS.search, files.names)) and not is_sd3(path)


def files_in(folder: Path, deep: bool = False) -> list[Path]:
    """Files of weights, sorted, without shards. deep: also in the folders inside and linked ones,
    once."""
    found = {}                                   # {folder without links: what is in it}
    for place, inner, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in found or not deep:
            inner.clear()
        found.setdefault(real, [Path(place, name) for name in names if name[0] != "."])
    return sorted(path for path in chain(*found.values())
                  if path.suffix in SUFFIXES and path.is_file() and not SHARD.search(path.name))


def comfy_folders(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yields the folders below `root` where ComfyUI keeps weights, and their files."""
    for names in product(("", "models"), COMFY):
        folder = root.joinpath(*names)
        if not os.access(folder, os.R_OK | os.X_OK):
            continue                                                 # missing, or somebody's own
        if not (folder / "config.json").is_file():                   # else it is the hub's
            yield folder, files_in(folder, deep=True)


def places(transformer: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yields folders that may hold the other parts of a model, nearest first, with their files."""
    near = transformer.parent if transformer.is_file() else transformer
    yield near, files_in(near)
    for root in (near, *near.absolute().parents[:4]):
        yield from comfy_folders(root)
        yield root, []
    for folder in filter(None, map(cached, HUB)):
        yield folder, []


def find_part(part: str, transformer: Path, width: int) -> Path:
    """Where the autoencoder or a text encoder of a transformer is. ValueError: nowhere, or in
    several places alike."""
    if transformer.is_file() and holds(transformer, part, width):
        return transformer
    hint = ""
    for folder, files in places(transformer):
        with suppress(ValueError, OSError):
            return in_hub_layout(folder, part)
        fit = []
        for path in files:
            if not holds(path, part, width):
                continue
            if part == "autoencoder" and OTHER_AUTOENCODER.search(str(path.relative_to(folder))):
                hint = f" ({path} is named for another model)"
            else:
                fit.append(path)
        fit.sort(key=lambda path: (*PREFERRED, path.stem).index(path.stem))
        if len(fit) > 1 and fit[0].stem not in PREFERRED:
            names = ", ".join(path.name for path in fit)
            raise ValueError(f"{folder} holds several that could be the {part} of "
                             f"{transformer.name} ({names}): name one with --{OPTION[part]}")
        if fit:
            return fit[0]
    raise ValueError(f"no {part} found for {transformer}, neither in the file nor beside it, nor "
                     f"in the folders of ComfyUI or the hub's cache: name it with --{OPTION[part]}"
                     f"{hint}")


def find_tokenizers(transformer: Path) -> Path:
    """The folder of tokenizers and encoders' configs: near the transformer, or the hub's."""
    for folder, _ in places(transformer):
        with suppress(ValueError, OSError):
            return check_tokenizers(folder)
    wanted = ["tokenizer*/*", "text_encoder*/config.json"]
    for name in reversed(HUB):                                       # a few MB
        with suppress(*HUB_ERRORS):
            return check_tokenizers(snapshot(name, allow_patterns=wanted))
    raise ValueError(f"no tokenizers for {transformer}, neither near it nor in the hub's cache: "
                     "--tokenizers names a folder with tokenizer/, tokenizer_2/, "
                     "text_encoder/config.json and text_encoder_2/config.json, as FLUX.1 has them "
                     "on the hub")


def assemble(transformer: Path, given: dict[str, str | None]) -> Model:
    """A model of a transformer, the parts that the command line names, and those that are found.

    Prints where they are.
    """
    named = {part: Path(given[word]) for part, word in OPTION.items() if given[word]}
    for part, path in named.items():
        if not path.exists():
            raise ValueError(f"--{OPTION[part]} {path} does not exist")
    model = Model(transformer, **named)
    _, config = flux_files(model)
    widths = {"autoencoder": 16, "clip": config.vec_in_dim, "t5": config.context_in_dim}
    where = []
    for part, width in widths.items():
        path = named.get(part) or find_part(part, transformer, width)
        model = model._replace(**{part: path})
        open_part(model, part)                                       # raises if it cannot be used
        where.append(f"{part} {'in the same file' if path == transformer else path}")
    home = model.tokenizers
    home = check_tokenizers(home) if home else find_tokenizers(transformer)
    print(f"{transformer}: {', '.join(where)}, tokenizers {home}")
    return model._replace(tokenizers=home)


def find_transformer(folder: Path) -> Path:
    """The one transformer of a folder. ValueError lists them if there are several, or none."""
    if (folder / "config.json").is_file():                           # transformer/ of a hub folder
        return folder
    files = files_in(folder)
    for _, more in comfy_folders(folder):
        files += more
    once = {}
    for path in files:                           # models/unet may be a link to diffusion_models
        once.setdefault(path.resolve(), path)
    found = [path for path in once.values() if holds(path, "transformer")]
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise ValueError(f"{folder} holds {len(found)} transformers ({names}): name one of the "
                         "files")
    if found:
        return found[0]
    return in_hub_layout(folder, "transformer")

# A name -----------------------------------------------------------------------------------------

def named_parts(args: Namespace | None) -> dict[str, str | None]:
    """{option that names a part: its value}; a judge of paper/ is called --clip too."""
    return {word: getattr(args, f"model_{word}", None) for word in OPTION.values()}


def snapshot(name: str, **options: object) -> Path:
    return Path(huggingface_hub.snapshot_download(HUB[name][0], **options))


def cached(name: str) -> Path | None:
    """What the hub's cache has of a model, without asking the hub."""
    with suppress(*HUB_ERRORS):
        return snapshot(name, **LOCAL)
    return None


def from_hub(name: str) -> Path:
    """A snapshot from the hub's cache or the hub, by the user's own token (`hf auth login`)."""
    repo, weights, license = HUB[name]
    wanted = [weights, "ae.safetensors", "text_encoder*/*", "tokenizer*/*"]
    for options in (LOCAL, {"allow_patterns": wanted}):
        try:                                 # without network the hub gives what it has, in silence
            return check_snapshot(snapshot(name, **options))
        except HUB_ERRORS as error:
            reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
            status = getattr(getattr(error, "response", None), "status_code", None)
    todo = "connect to the network, or free disk space,"
    if status in (401, 403):
        todo = f"accept its license ({license}) at huggingface.co/{repo}, run `hf auth login`"
    raise ValueError(
        f"{repo} is neither in the hub cache nor could it be downloaded ({reason}): {todo} and run "
        "this command again (it downloads 34 GB), name a folder, or try --model baby, which needs "
        "no download")


def model_name(text: str) -> str:
    """What --model says; for a name or an address on the hub, flux-dev or flux-schnell."""
    asked = text.rpartition("huggingface.co/")[2].rstrip("/").lower()
    for name, (repo, _, _) in HUB.items():
        if asked == repo.lower() and not Path(text).exists():
            return name
    return text


def home_of(name: str) -> Path | None:
    """The folder of a --model, as far as it is there without a download."""
    if name in HUB:
        return cached(name)
    path = BABY if name == "baby" else Path(name)
    return path.parent if path.is_file() else path


def find_model(name: str, given: Namespace | None = None) -> Path | Model:
    """--model -> a folder in the hub's layout, or where the parts lie.

    name: `baby`, a folder, a transformer's file, or `flux-dev` / `flux-schnell` from the hub's
    cache or the hub. given: a command line with --ae, --clip, --t5, --tokenizers. ValueError says
    in one line what to do instead.
    """
    path = from_hub(name) if name in HUB else BABY if name == "baby" else Path(name)
    if not path.exists():
        raise ValueError(f"no model {name!r}: --model takes flux-dev, flux-schnell, baby, a file "
                         "of a transformer, or a folder in the hub's layout")
    options = named_parts(given)
    transformer = path if path.is_file() else find_transformer(path)
    usual = transformer.name in (*ORIGINALS["transformer"], "transformer")
    if path == transformer or not usual or any(options.values()):
        return assemble(transformer, options)
    try:
        return check_snapshot(path)
    except ValueError:
        # what the folder lacks says more than where else the part was looked for
        with suppress(ValueError):
            return assemble(transformer, options)
        raise
