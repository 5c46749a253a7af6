"""Finding a model: in a folder of the hub's layout, the hub's cache, a ComfyUI installation, or
file by file.

    find_model("flux-dev"), find_model("ComfyUI/models/unet/flux1-krea-dev.safetensors")

A model is a folder in the hub's layout: original files (flux1-dev.safetensors, ae.safetensors),
diffusers files (transformer/, vae/) or both; text_encoder/, tokenizer/ (CLIP), text_encoder_2/,
tokenizer_2/ (T5). Or it is a `Model`, whose parts lie anywhere. """
import os
import re
import shlex
import textwrap
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from support.common import JsonFile, digest, not_content
from support.names import OTHER_MODELS, first_match
from support.tensors import SHARD, TensorFiles

FLUX_FILES = ("flux1-dev.safetensors", "flux1-schnell.safetensors", "flux1-dev-fp8.safetensors",
              "flux1-schnell-fp8.safetensors")
HUB = {"flux-dev": ("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors",
                    "FLUX.1 [dev] Non-Commercial License"),
       "flux-schnell": ("black-forest-labs/FLUX.1-schnell", "flux1-schnell.safetensors", "Apache 2.0")}
TEXT = {"clip": "text_encoder", "t5": "text_encoder_2"}                    # the hub's folders
OPTION = {"autoencoder": "--ae", "clip": "--clip", "t5": "--t5"}
COMFY = {"transformer": ("unet", "diffusion_models", "checkpoints"),
         "autoencoder": ("vae", "checkpoints"),
         "clip": ("text_encoders", "clip", "checkpoints"),
         "t5": ("text_encoders", "clip", "checkpoints")}
SUFFIXES = ".safetensors", ".sft", ".gguf"
PICKLES = ".bin", ".pt", ".pth", ".ckpt"
PREFERRED = {"autoencoder": ("ae",), "clip": ("clip_l",),          # if a folder holds several
             "t5": ("t5xxl_fp16", "t5xxl_fp8_e4m3fn_scaled", "t5xxl_fp8_e4m3fn")}

OTHER_FILES = {                                  # that are no transformer of FLUX.1 as we know it
    "FLUX.1 Redux": r"^redux_(up|down)\.",
    "a ControlNet": r"^controlnet_",
    "a LoRA": r"^lora_|\.lora",
    "FLUX.1 under DiffSynth's own names": r"\.to_qkv_mlp\.",
}
# Stable Diffusion 3's autoencoder has the names and shapes of FLUX.1's; known by scale or digest
SD3_SCALE = 1.5305
SD3_BYTES = 167_666_654
SD3_DIGEST = "f9b67a279283625c"                  # how its SHA-256 begins
OTHER_AUTOENCODER = re.compile(r"(?i)(?<![a-z])(sd[-_. ]?(xl|[1-3])|stable.?diff|qwen|wan|hunyuan"
                               r"|cosmos)")
# channels of a token -> model
INPUTS = {384: "FLUX.1 Fill", 128: "FLUX.1 Canny or Depth", 196: "Flex.2"}


class Model(NamedTuple):
    """Where the parts of a model lie: files, or folders with a config.json as the hub has them.

    As a path it is the folder of its transformer, where its LoMD and its defaults.json are looked
    for. """
    transformer: Path
    autoencoder: Path
    clip: Path
    t5: Path
    tokenizers: Path         # tokenizer/, tokenizer_2/, and config.json of encoders in single files

    def __fspath__(self) -> str:
        return str(self.transformer.parent)

    def __str__(self) -> str:
        return str(self.transformer)


Place = str | Path | Model

# The parts of a folder --------------------------------------------------------------------------

def check_content(path: Path) -> None:
    """ValueError where a pointer, a web page or nothing stands in the place of a file's content."""
    if why := not_content(path):
        raise ValueError(f"{path} cannot be read: {why}")


def name_formats(folder: Path) -> None:
    """ValueError where a folder without usable weights holds pickles, or a format that is not
    read."""
    for path in sorted(folder.glob("*")):
        if path.suffix in (".safetensors", *PICKLES) and not SHARD.search(path.name):
            TensorFiles([path])


def weight_files(folder: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """Weights of a model's folder: what the index lists, if there is one, so that half a download
    shows.

    Where there are none without a variant (model.fp16.safetensors), those of the first variant by
    name."""
    places = [folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"]
    for pattern in (f"{stem}.safetensors*.json", f"{stem}.*.safetensors"):
        places += sorted(folder.glob(pattern))
    there = (path for path in places if path.is_file() and not SHARD.search(path.name))
    index = next(there, places[1])
    names = [index.name]
    why = ""
    if index.suffix == ".json":
        listed = JsonFile(index)["weight_map"]
        if not isinstance(listed, dict):
            raise ValueError(f"{index} is not an index of weights: its weight_map is not an object")
        names = sorted(set(listed.values()))
        why = f", which {index.name} lists"
    for name in names:
        if not (folder / name).is_file():
            name_formats(folder)
            raise ValueError(f"{folder} lacks {name}{why}: complete the download")
        check_content(folder / name)
    return [folder / name for name in names]


def locate(
    folder: Place,
    names: Sequence[str],
    diffusers: str,
    what: str,
) -> tuple[list[Path], dict | None]:
    """The files of one part of a model, and its diffusers config (None: original layout)."""
    if isinstance(folder, Model):
        path = inner = getattr(folder, what)
    else:
        path, inner = Path(folder), Path(folder) / diffusers
    if path.is_file():
        return [path], None
    for name in names:
        if (path / name).is_file():
            return [path / name], None
    if (inner / "config.json").is_file():
        return weight_files(inner), JsonFile(inner / "config.json")
    name_formats(inner)
    raise ValueError(f"{folder} holds no {what}: neither {' nor '.join(names)} nor {diffusers}/")


def transformer_files(folder: Place) -> tuple[list[Path], dict | None]:
    return locate(folder, FLUX_FILES, "transformer", "transformer")


def autoencoder_files(folder: Place) -> tuple[list[Path], dict | None]:
    """As `locate`: ae.safetensors, or vae/ and its config."""
    paths, config = locate(folder, ("ae.safetensors",), "vae", "autoencoder")
    if is_sd3(paths[0]) or config and config.get("scaling_factor") == SD3_SCALE:
        raise ValueError(f"{paths[0]} is the autoencoder of Stable Diffusion 3, not of FLUX.1")
    return paths, config


def is_sd3(path: Path) -> bool:
    """Is it the published autoencoder of Stable Diffusion 3, whatever it is called?"""
    return path.stat().st_size == SD3_BYTES and digest(path.read_bytes()) == SD3_DIGEST


def text_files(folder: Place, part: str) -> tuple[list[Path], Path]:
    """The weights of "clip" or "t5", and the folder of its config.json."""
    path = getattr(folder, part) if isinstance(folder, Model) else Path(folder) / TEXT[part]
    if path.is_file():
        return [path], folder.tokenizers / TEXT[part]
    return weight_files(path, "model"), path


def tokenizers_of(folder: Place) -> Path:
    return folder.tokenizers if isinstance(folder, Model) else Path(folder)


def check_tokenizers(folder: Path, configs: Sequence[str] = ()) -> Path:
    """The folder. ValueError unless tokenizers and these encoders' configs are there: transformers
    makes up a missing vocabulary."""
    needed_files = {"tokenizer": ["vocab.json", "merges.txt"], "tokenizer_2": ["spiece.model"]}
    for part, names in needed_files.items():
        there = {path.name for path in (folder / part).glob("*") if path.is_file()}
        if "tokenizer.json" not in there and not there.issuperset(names):
            needed = f"tokenizer.json or {' and '.join(names)}"
            raise ValueError(f"{folder} holds no whole {part}/: it needs {needed}")
        for name in there & {"tokenizer.json", *names}:
            check_content(folder / part / name)
        for path in (folder / part).glob("*.json"):
            JsonFile(path)                       # transformers would not name a torn one
    for part in configs:
        if not (folder / TEXT[part] / "config.json").is_file():
            raise ValueError(f"{folder} lacks {TEXT[part]}/config.json")
    return folder


def check_text_files(folder: Place) -> None:
    """ValueError unless the files of text encoders and tokenizers are there."""
    if isinstance(folder, Model):
        return
    check_tokenizers(Path(folder))
    for part in TEXT.values():
        if not (Path(folder) / part / "config.json").is_file():
            raise ValueError(f"{folder} holds no whole {part}/: it needs config.json and weights")
        JsonFile(Path(folder) / part / "config.json")
        weight_files(Path(folder) / part, "model")


def check_snapshot(folder: Path) -> Path:
    """The folder. ValueError that names the first part it lacks, in either layout."""
    transformer_files(folder)
    autoencoder_files(folder)
    check_text_files(folder)
    return folder

# Parts that lie elsewhere -----------------------------------------------------------------------

def holds(path: Path, part: str, widths: dict[str, int]) -> bool:
    """Whether a file holds such a part, by its names and the width that the transformer asks
    for."""
    try:
        files = TensorFiles([path], part, check=False)
        if part == "autoencoder":                # that of another model, in a file with everything
            check_make(TensorFiles([path], check=False))
    except (OSError, ValueError):                # without the gguf package only the name tells
        guess = "t5" if "t5" in path.stem.lower() else "transformer"
        return path.suffix == ".gguf" and part == guess
    names = files.names

    def has_width(name: str) -> bool:
        return name in names and files.shape(name)[-1] == widths[part]

    if part == "transformer":
        blocks = any(re.search(r"(double|transformer)_blocks\.0\.", name) for name in names)
        first_layer = "img_in.weight" in names or "x_embedder.weight" in names  # a LoRA has none
        return blocks and first_layer and not any("controlnet" in name for name in names)
    if part == "autoencoder":
        layer = "decoder.conv_in.weight"
        return layer in names and files.shape(layer)[1] == 16 and not is_sd3(path)
    if part == "clip":
        norms = "final_layer_norm.weight", "text_model.final_layer_norm.weight"
        return any(map(has_width, norms))
    second = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"         # umt5's
    return has_width("encoder.final_layer_norm.weight") and second not in names


def check_make(files: TensorFiles) -> None:
    """ValueError, by name, where a file is of another model than FLUX.1."""
    # an autoencoder in the same file has names of its own, as Stable Diffusion has them
    names = [name for name in files.names if not name.startswith(("encoder.", "decoder."))]
    make, found = first_match(OTHER_FILES | OTHER_MODELS, names)
    if make:
        raise ValueError(f"{files.path} is {make} ({found[0]}), and not the transformer of FLUX.1")
    for name in ("img_in.weight", "x_embedder.weight"):
        channels = files.shape(name)[-1] if name in files.names else 64
        if channels in INPUTS:
            raise ValueError(f"{files.path} is {INPUTS[channels]} ({name} takes {channels} "
                             "channels), which is not supported: FLUX.1 takes 64")


def widths_of(transformer: Path) -> dict[str, int]:
    """Of the text encoders that a transformer takes. ValueError, by name, where it is none of
    FLUX.1's."""
    files = TensorFiles(locate(transformer, (), "", "transformer")[0])
    check_make(files)
    widths = {"clip": 768, "t5": 4096}
    for name, part in (
        ("vector_in.in_layer.weight", "clip"),
        ("time_text_embed.text_embedder.linear_1.weight", "clip"),
        ("txt_in.weight", "t5"),
        ("context_embedder.weight", "t5"),
    ):
        if name in files.names:
            widths[part] = files.shape(name)[1]
    return widths


def files_in(folder: Path, deep: bool = False) -> list[Path]:
    """Whole files of weights, sorted; deep: of the folders inside too, linked ones as well, each
    once."""
    found = []
    seen = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        found += [Path(place, name) for name in names if not SHARD.search(name)]
        if not deep:
            break
    return sorted(path for path in found if path.suffix in SUFFIXES and path.is_file())


def places_of(part: str, path: Path) -> list[tuple[Path, list[Path]]]:
    """Folders near a transformer, the nearest first, with the files in each that may hold another
    part."""
    near = path.parent if path.is_file() else path
    places = [(near, files_in(near))]
    for root in (near, *near.absolute().parents[:4]):
        for folder in comfy_folders(root, part):
            if not (folder / "config.json").is_file():
                places.append((folder, files_in(folder, deep=True)))
        places.append((root, []))
    return places


def comfy_folders(root: Path, part: str) -> list[Path]:
    """Folders below `root` where ComfyUI keeps files of this part."""
    folders = []
    for inner in ("", "models"):
        folders += [root / inner / name for name in COMFY[part]]
    return list(filter(Path.is_dir, folders))


def in_hub_layout(part: str, folder: Path) -> Path | None:
    """The part of a folder as the hub has it: its file or its folder."""
    try:
        if part == "autoencoder":
            paths, config = autoencoder_files(folder)
            return paths[0] if config is None else paths[0].parent
        there = (folder / TEXT[part] / "config.json").is_file()
        return text_files(folder, part)[1] if there else None
    except ValueError:
        return None


def cached(name: str) -> Path | None:
    """What the hub's cache has of a model, without asking the hub."""
    import huggingface_hub
    try:
        # without a pattern a cache counts as incomplete that holds all that we take
        return Path(huggingface_hub.snapshot_download(
            HUB[name][0], allow_patterns=[], local_files_only=True))
    except (OSError, ValueError):
        return None


def find_part(part: str, transformer: Path, widths: dict[str, int]) -> Path:
    """Where the autoencoder or a text encoder is that goes with a transformer. ValueError:
    nowhere."""
    if transformer.is_file() and holds(transformer, part, widths):
        return transformer
    foreign = []
    for folder, files in places_of(part, transformer):
        if found := in_hub_layout(part, folder):
            return found
        fit = [path for path in files if path != transformer and holds(path, part, widths)]
        if part == "autoencoder":
            for path in fit:
                if OTHER_AUTOENCODER.search(str(path.relative_to(folder))):
                    foreign.append(path)
            fit = [path for path in fit if path not in foreign]
        best = []
        for stem in PREFERRED[part]:
            best += [path for path in fit if path.stem == stem]
        best = best or fit
        if len(best) == 1 or best and best is not fit:
            return best[0]
        if best:
            names = ", ".join(path.name for path in best)
            raise ValueError(f"{folder} holds several that could be the {part} of {transformer.name} "
                             f"({names}): name one with {OPTION[part]}")
    for folder in filter(None, map(cached, HUB)):
        if found := in_hub_layout(part, folder):
            return found
    raise ValueError(f"no {part} found for {transformer}, neither in the file nor beside it, nor in "
                     f"the folders of ComfyUI or the hub's cache: name it with {OPTION[part]}"
                     + "".join(f" ({path} is named for another model)" for path in foreign[:1]))


def find_tokenizers(transformer: Path, configs: Sequence[str]) -> Path:
    """The folder of tokenizers and of these encoders' configs: near the transformer, or from the
    hub."""
    near = transformer.parent if transformer.is_file() else transformer
    for folder in (near, *near.absolute().parents[:4], *filter(None, map(cached, HUB))):
        try:
            return check_tokenizers(folder, configs)
        except ValueError:
            continue
    import huggingface_hub
    from huggingface_hub.errors import HTTPError
    wanted = ["tokenizer/*", "tokenizer_2/*", "text_encoder/config.json", "text_encoder_2/config.json"]
    for repo, _, _ in reversed(HUB.values()):                        # a few MB
        try:
            folder = huggingface_hub.snapshot_download(repo, allow_patterns=wanted)
            return check_tokenizers(Path(folder), configs)
        except (HTTPError, OSError, ValueError):
            continue
    raise ValueError(f"no tokenizers for {transformer}, neither near it nor in the hub's cache: --tokenizers "
                     "names a folder with tokenizer/, tokenizer_2/, text_encoder/config.json and "
                     "text_encoder_2/config.json, as FLUX.1 has them on the hub")


def check_named(path: str | None, option: str) -> Path | None:
    if path is not None and not Path(path).exists():
        raise ValueError(f"{option} {path}: there is no such file or folder")
    return None if path is None else Path(path)


def assemble(transformer: Path, given: dict[str, str | None]) -> Model:
    """A model from its transformer, what the command line names, and what is found; a line says
    what."""
    named = {part: check_named(given.get(option[2:]), option) for part, option in OPTION.items()}
    widths = widths_of(transformer)
    parts = {part: path or find_part(part, transformer, widths) for part, path in named.items()}
    for part, path in parts.items():
        if path.is_dir() and not (path / "config.json").is_file():
            if (inner := in_hub_layout(part, path)) is None:
                raise ValueError(f"{OPTION[part]} {path} holds no {part}")
            parts[part] = inner
    for part, path in parts.items():
        if path.is_file():
            TensorFiles([path], part)                         # raises for a format that is not read
    configs = [part for part in TEXT if parts[part].is_file()]
    tokenizers = check_named(given.get("tokenizers"), "--tokenizers")
    tokenizers = (check_tokenizers(tokenizers, configs) if tokenizers else
                  find_tokenizers(transformer, configs))
    where = {part: "in the same file" if path == transformer else path for part, path in parts.items()}
    print(f"{transformer}: autoencoder {where['autoencoder']}, CLIP {where['clip']}, T5 {where['t5']}, "
          f"tokenizers {tokenizers}")
    model = Model(transformer, **parts, tokenizers=tokenizers)
    autoencoder_files(model)                                       # raises for Stable Diffusion 3's
    return model


def find_transformer(folder: Path) -> Path:
    """The one transformer of a folder. ValueError lists them where there are several, or there is
    none."""
    if (folder / "config.json").is_file():                           # transformer/ of a hub folder
        return folder
    files = files_in(folder)
    for inner in comfy_folders(folder, "transformer"):
        files += files_in(inner, deep=True)
    found = [path for path in files if holds(path, "transformer", {})]
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise ValueError(f"{folder} holds {len(found)} transformers ({names}): name one of the files")
    if found:
        return found[0]
    paths, config = transformer_files(folder)
    return paths[0] if config is None else paths[0].parent

# A name -----------------------------------------------------------------------------------------

def add_model_options(add: Callable[..., object]) -> None:
    """What a model of single files may lack, for the parser of a script."""
    for option, what in (("ae", "autoencoder"), ("clip", "CLIP"), ("t5", "T5")):
        add(f"--{option}", dest=f"model_{option}", metavar="FILE",
            help=f"the model's {what} (default: found beside it, or in ComfyUI)")
    add("--tokenizers", dest="model_tokenizers", metavar="DIR",
        help="a folder with tokenizer/ and tokenizer_2/ (default: the hub's)")


def named_parts(args: Namespace | None) -> dict[str, str | None]:
    """{option of add_model_options: its value}; a judge of paper/ is called --clip too."""
    return {word: getattr(args, f"model_{word}", None) for word in ("ae", "clip", "t5", "tokenizers")}


def model_words(args: Namespace) -> str:
    """The options of a command line that say which model, for another command; "" for the default
    one."""
    options = {"model": args.model} | named_parts(args)
    return "".join(f"--{word} {shlex.quote(value)} " for word, value in options.items()
                   if value not in (None, "flux-dev"))


def from_hub(name: str) -> Path:
    """A snapshot from the hub's cache or the hub. A download takes the user's own token (`hf auth
    login`)."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError                      # its http client's own
    repo, weights, licence = HUB[name]
    wanted = [weights, "ae.safetensors", "text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*"]
    for options in ({"local_files_only": True, "allow_patterns": []}, {"allow_patterns": wanted}):
        try:                                 # without network the hub gives what it has, in silence
            return check_snapshot(Path(huggingface_hub.snapshot_download(repo, **options)))
        except (HTTPError, OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            status = getattr(getattr(error, "response", None), "status_code", None)
    todo = "connect to the network"
    if status in (401, 403):
        todo = f"accept its licence ({licence}) at huggingface.co/{repo}, run `hf auth login`"
    raise ValueError(
        f"{repo} is neither in the hub cache nor could it be downloaded "
        f"({textwrap.shorten(reason, 300, placeholder=' ...')}): {todo} and run this command again (it "
        "downloads 34 GB), name a folder, or try --model baby, which needs no download")


def model_name(text: str) -> str:
    """What --model says; of a name or an address on the hub flux-dev or flux-schnell."""
    repos = {repo.lower(): name for name, (repo, *_) in HUB.items()}
    repo = text.rpartition("huggingface.co/")[2].rstrip("/")
    return text if Path(text).exists() else repos.get(repo.lower(), text)


def home_of(name: str) -> Path | None:
    """The folder of a --model, as far as it is there without a download."""
    if name == "baby":
        return Path(__file__).resolve().parents[1] / "baby" / "checkpoint"
    if name in HUB:
        return cached(name)
    return Path(name).parent if Path(name).is_file() else Path(name)


def find_model(name: str, given: Namespace | None = None) -> Path | Model:
    """--model -> a folder in the hub's layout, or where the parts lie: `baby`, a folder, a
    transformer's file, or `flux-dev` / `flux-schnell` from the hub's cache or the hub.

    given: a command line with --ae, --clip, --t5, --tokenizers. ValueError says in one line what to
    do instead. """
    options = named_parts(given)
    path = from_hub(name) if name in HUB else home_of(name) if name == "baby" else Path(name)
    if path.is_file():
        return assemble(path, options)
    if not path.is_dir():
        raise ValueError(f"no model {str(name)!r}: --model takes flux-dev, flux-schnell, baby, a file of a "
                         "transformer, or a folder in the hub's layout")
    if name in HUB or name == "baby":
        return assemble(find_transformer(path), options) if any(options.values()) else check_snapshot(path)
    transformer = find_transformer(path)
    lacks = None
    try:
        if not any(options.values()) and transformer.name in (*FLUX_FILES, "transformer"):
            return check_snapshot(path)
    except ValueError as error:
        # what a folder in the hub's layout lacks says more than where else it was looked for
        lacks = ValueError(f"{error} (--ae, --clip, --t5 and --tokenizers name parts that lie elsewhere)")
    try:
        return assemble(transformer, options)
    except ValueError as error:
        raise (lacks or error) from None
