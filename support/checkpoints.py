"""Checkpoints: strict loading of either layout, what a model's folder says of itself.

    flux = load_flux(find_model("flux-dev"), "cuda", torch.bfloat16)

A tensor that is missing, misshapen or not used is an error, also in the text encoders. Where the files are
is finding.py's, what they hold tensors.py's.
"""
import hashlib
import itertools
import gc
import json
import math
import os
import re
from argparse import BooleanOptionalAction, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from flux_model import AutoEncoder, AutoEncoderConfig, Flux, FluxConfig, TextEncoders
from support.common import JsonFile, count, free
from support.finding import (HUB, Model, Place, add_model_options, autoencoder_files, check_make,
                             check_text_files, find_model, text_files, tokenizers_of, transformer_files)
from support.memory import (E4M3, Fp8Linear, GIB, Offload, TiledDecoder, blocks_of, blocks_on_device,
                            check_memory, compile_blocks, memory_left, multiplies_fp8, step_bytes,
                            training_bytes, update_bytes)
from support.names import (BLOCK, Target, diffusers_autoencoder_names, diffusers_flux_names, find_targets,
                           part_sizes)
from support.tensors import TensorFiles
from support.text import CheckedTextEncoders

Device = str | torch.device
BF16 = torch.bfloat16
GUIDANCE = "guidance_in.in_layer.weight"          # of dev; schnell has none

# Loading ----------------------------------------------------------------------------------------------------

NEUTRAL = re.compile(               # in files of text encoders, and nothing to them; T5's embeddings are tied
    r"logit_scale|text_projection(\.weight)?|(.*\.)?position_ids|encoder\.embed_tokens\.weight|spiece_model"
    r"|(decoder|lm_head|vision_model|visual_projection)\b.*")


def read_config(kind: type, text: str, path: Path) -> Any:
    """Dataclass `kind` from JSON with the same fields; an unknown one would change the model: ValueError."""
    try:
        return kind(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the {kind.__name__} in its metadata cannot be used: {error}") from None


def check_tensors(model: nn.Module, files: TensorFiles, plan: dict[str, list[str]]) -> None:
    """ValueError that names the first missing, misshapen and unexpected tensor, where the plan cannot be."""
    missing, misshapen, unexpected = [], [], {*files.names}
    for name, parameter in model.named_parameters():
        parts = plan[name]
        unexpected -= {*parts}
        absent = [part for part in parts if part not in files.names]
        missing += absent
        if absent:
            continue
        size, *rest = parameter.shape
        shapes = [files.shape(part) for part in parts]
        width = getattr(model.get_submodule(name.rpartition(".")[0]), "in_features", 0)
        wanted = [[rows, *rest] for rows in part_sizes(len(shapes), size, width)]
        # diffusers keeps the autoencoder's 1 x 1 convolutions as Linears
        if shapes != wanted and [shape + [1, 1] for shape in shapes] != wanted:
            have = " + ".join(f"{part} {shape}" for part, shape in zip(parts, shapes))
            misshapen.append(f"{have} instead of {[size, *rest]}")
    faults = {"missing": missing, "misshapen": misshapen, "unexpected": sorted(unexpected)}
    problems = [f"{len(found)} {kind} ({found[0]})" for kind, found in faults.items() if found]
    if problems:
        raise ValueError(f"{files.path} does not fit this {type(model).__name__}: {', '.join(problems)}")


def bar_off() -> bool | None:
    """For tqdm's `disable`: one bar for all processes of torchrun, and none where nobody looks."""
    return None if os.environ.get("RANK", "0") == "0" else True


def load_weights(model: nn.Module, files: TensorFiles, sources: Callable[[str], list[str]],
                 dtype: torch.dtype, place: Callable[[str], Device], fp8: bool = False) -> nn.Module:
    """Fills a model built on the meta device, strictly: the peak of memory is the model and one tensor.

    A parameter's rows are those of the tensors sources(name), on place(name). fp8: in the blocks' Linears.
    """
    plan = {name: sources(name) for name, _ in model.named_parameters()}
    check_tensors(model, files, plan)
    # all of these before the first is filled: what that takes for a moment would leave holes between them
    for name, layer in [*model.named_modules()] if fp8 else []:
        if isinstance(layer, nn.Linear) and "_blocks." in name:
            size, device = (layer.in_features, layer.out_features), place(f"{name}.weight")
            model.set_submodule(name, Fp8Linear(*size, layer.bias is not None, dtype, device))
    for name in tqdm(plan, f"loading {type(model).__name__}", disable=bar_off(), leave=False):
        module, _, attribute = name.rpartition(".")
        layer = model.get_submodule(module)
        if isinstance(layer, Fp8Linear) and attribute == "weight":
            # quantised where the other weights go: a card takes seconds for what costs a CPU minutes
            layer.fill(*files.quantized(plan[name], place("img_in")))
            continue
        parameter = getattr(layer, attribute)
        if parameter.is_meta:
            weight = torch.empty(parameter.shape, dtype=dtype, device=place(name))
            parameter = nn.Parameter(weight, requires_grad=False)
            setattr(layer, attribute, parameter)
        row = 0
        for part in plan[name]:
            tensor = files[part]
            tensor = tensor.view(tensor.shape + (1,) * (parameter.dim() - tensor.dim()))
            parameter[row:row + len(tensor)].copy_(tensor)
            row += len(tensor)
        if plan[name][0].startswith("norm_out.linear."):
            parameter.copy_(parameter.roll(row // 2, 0))
    return model.eval()


def depths(files: TensorFiles) -> dict[str, int]:
    """The depths of a FLUX.1 of the published width, of which some have lost blocks; {}: as published."""
    first = "x_embedder.weight" if "x_embedder.weight" in files.names else "img_in.weight"
    if first not in files.names or files.shape(first)[0] != FluxConfig().hidden_size:
        return {}
    counts = {"depth": 0, "depth_single_blocks": 0}
    for name in files.names:
        found = BLOCK.search(name)
        if found and name.endswith((".weight", ".scale")):
            kind = "depth_single_blocks" if name.startswith("single") else "depth"
            counts[kind] = max(counts[kind], int(found[1]) + 1)
    return counts


def flux_files(folder: Place) -> tuple[TensorFiles, FluxConfig, bool]:
    """Tensors and configuration of a model's transformer, and whether it is in the diffusers layout."""
    paths, config = transformer_files(folder)
    files = TensorFiles(paths)
    check_make(files)
    if config is not None:
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
        ), True
    theirs = "x_embedder.weight" in files.names
    if "config" in files.metadata:
        return files, read_config(FluxConfig, files.metadata["config"], files.path), theirs
    known = depths(files)
    if isinstance(folder, Model) and not known:
        with suppress(ValueError):               # a small model's, of the folder of its tokenizers
            return files, flux_files(folder.tokenizers)[1], theirs
    guidance = diffusers_flux_names(GUIDANCE)[0] if theirs else GUIDANCE
    return files, FluxConfig(guidance_embed=guidance in files.names, **known), theirs


def targets_of(config: FluxConfig, outside: bool = False) -> list[Target]:
    """`find_targets` of a model that is not loaded."""
    with torch.device("meta"):
        return find_targets(Flux(config), outside)


def load_flux(folder: Place, device: Device = "cpu", dtype: torch.dtype = BF16,
              fp8: bool = False, offload: bool = False, stay: int = 0) -> Flux:
    """The transformer of a snapshot folder, frozen, on `device` in `dtype`.

    fp8: the blocks' Linears in 8 bits. offload: the blocks live in CPU memory, but for the first `stay`.
    ValueError, in one line, where the files are missing, torn or of another model.
    """
    return fill_flux(*flux_files(folder), device, dtype, fp8, offload, stay)


def fill_flux(files: TensorFiles, config: FluxConfig, is_diffusers: bool, device: Device, dtype: torch.dtype,
              fp8: bool = False, offload: bool = False, stay: int = 0) -> Flux:
    """load_flux of what flux_files gives."""
    sources = diffusers_flux_names if is_diffusers else lambda name: [name]
    with torch.device("meta"):
        model = Flux(config)
    offloaded = set()
    for block in blocks_of(model)[stay:] if offload else []:
        offloaded |= {id(parameter) for parameter in block.parameters()}
    away = {name for name, parameter in model.named_parameters() if id(parameter) in offloaded}
    load_weights(model, files, sources, dtype, lambda name: "cpu" if name in away else device, fp8)
    free(device)
    if offload:
        Offload(model, device).keep(stay)
    return model


def autoencoder_config(folder: Place) -> tuple[TensorFiles, AutoEncoderConfig, bool]:
    """Tensors and configuration of a model's autoencoder, and whether it is in the diffusers layout."""
    paths, config = autoencoder_files(folder)
    files = TensorFiles(paths, "autoencoder")
    if config is not None:
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
        ), True
    theirs = any(".up_blocks." in name for name in files.names)
    said = files.metadata.get("vae.config" if files.whole else "config")
    first = "encoder.conv_in.weight"
    small = first in files.names and files.shape(first)[0] != AutoEncoderConfig().ch
    if said is None and small and isinstance(folder, Model):
        with suppress(ValueError):               # as `flux_files`
            return files, autoencoder_config(folder.tokenizers)[1], theirs
    return files, read_config(AutoEncoderConfig, said or "{}", files.path), theirs


def load_autoencoder(folder: Place, device: Device = "cpu", dtype: torch.dtype = BF16) -> AutoEncoder:
    """The autoencoder of a model, frozen, on `device` in `dtype`; errors as `load_flux`."""
    files, config, is_diffusers = autoencoder_config(folder)
    levels = len(config.ch_mult)
    sources = lambda name: diffusers_autoencoder_names(name, levels) if is_diffusers else [name]
    with torch.device("meta"):
        model = AutoEncoder(config)
    load_weights(model, files, sources, dtype, lambda name: device)
    if torch.device(device).type == "cuda":      # on a CPU GroupNorm is then a hundred times less exact
        model = model.to(memory_format=torch.channels_last)
    model.decoder.__class__ = TiledDecoder
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no reports of transformers on the way; what is wrong is raised by us."""
    from transformers.utils import logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_transformers_model(kind: type, folder: Place, dtype: torch.dtype,
                            use_safetensors: bool | None = True, **options: object) -> nn.Module:
    """A model of transformers, strictly: by itself it gives random weights to what a file lacks."""
    model, report = kind.from_pretrained(None if options else folder, dtype=dtype, **options,
                                         use_safetensors=use_safetensors, ignore_mismatched_sizes=True,
                                         output_loading_info=True)
    report["unexpected_keys"] = [n for n in report["unexpected_keys"] if options and not NEUTRAL.fullmatch(n)]
    for fault in ("missing", "mismatched", "unexpected"):
        if names := sorted(map(str, report[f"{fault}_keys"])):
            problem = f"{len(names)} {fault} ({names[0]})"
            name = f"{Path(folder).name}{'' if Path(folder).is_file() else '/'}"
            raise ValueError(f"{name} does not fit its config.json: {problem}")
    return model.eval()


def load_text_encoder(kind: type, folder: Place, part: str, dtype: torch.dtype) -> nn.Module:
    """CLIP or T5 of a model, from values and not from files: those may be quantised, or hold more."""
    paths, home = text_files(folder, part)
    files = TensorFiles(paths, part)
    names = [name for name in files.names if not NEUTRAL.fullmatch(name)]
    bar = tqdm(names, f"loading {kind.__name__}", disable=bar_off(), leave=False)
    state = {name: files[name].to(dtype) for name in bar}
    tied = "encoder.embed_tokens.weight"
    if tied in files.names and "shared.weight" not in files.names:
        state["shared.weight"] = files[tied].to(dtype)
    JsonFile(home / "config.json")               # of a torn one transformers would not say what is wrong
    config = kind.config_class.from_pretrained(home)
    where = paths[0] if paths[0].parent != home else home
    return load_transformers_model(kind, where, dtype, config=config, state_dict=state)


def text_length(folder: Place) -> int:
    """Text tokens of a model."""
    path = tokenizers_of(folder) / "tokenizer_2" / "tokenizer_config.json"
    limit = JsonFile(path).get("model_max_length", 512) if path.is_file() else 512
    return min(limit, 512 if flux_files(folder)[1].guidance_embed else 256)


def load_text_encoders(folder: Place, device: Device = "cpu", dtype: torch.dtype = BF16,
                       max_length: int | None = None) -> TextEncoders:
    """Text encoders of a model; T5 sees `max_length` tokens, else 512, with schnell 256."""
    check_text_files(folder)
    tokenizers = tokenizers_of(folder)
    max_length = max_length or text_length(folder)
    try:
        with quiet_transformers():
            from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer
            clip = load_text_encoder(CLIPTextModel, folder, "clip", dtype).to(device)
            t5 = load_text_encoder(T5EncoderModel, folder, "t5", dtype).to(device)
            return CheckedTextEncoders(clip, CLIPTokenizer.from_pretrained(tokenizers / "tokenizer"), t5,
                                    T5Tokenizer.from_pretrained(tokenizers / "tokenizer_2"), max_length)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                   # of foreign files transformers raises anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder}: the text encoders cannot be loaded: {reason}") from None

# Which model it is ------------------------------------------------------------------------------------------

ROUNDED = "e4m3"               # begins a fingerprint of values rounded to it


def fingerprint(files: TensorFiles, names: list[str] | None = None) -> str:
    """A short hash of tensors' values in bf16, of `names` or of all of up to 4,096 elements."""
    if names is None:
        names = [name for name in sorted(files.names) if math.prod(files.shape(name)) <= 4096]
    digest = hashlib.sha256()
    for name in names:
        digest.update(files[name].bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint_names(folder: Place) -> tuple[TensorFiles, list[str]]:
    """The file of a model's transformer, and those of its small tensors that tell it from others."""
    files, config, is_diffusers = flux_files(folder)
    with torch.device("meta"):
        names = [name for name, _ in Flux(config).named_parameters()
                 if name.endswith(".scale") or name == "img_in.bias"]
    if is_diffusers:
        parts = map(diffusers_flux_names, names)
        names = [*itertools.chain.from_iterable(parts)]
    return files, names


def flux_fingerprint(folder: Place) -> str:
    """A short hash of a model's transformer, the same for every copy: in either layout and any precision
    down to e4m3, to which values are rounded first."""
    files, names = fingerprint_names(folder)
    digest = hashlib.sha256()
    for name in names:
        digest.update(files[name].to(E4M3).view(torch.uint8).numpy().tobytes())
    return ROUNDED + digest.hexdigest()[:12]


def is_copy(folder: Place, theirs: str) -> bool | None:
    """Whether a fingerprint is of this model; None: this copy is too coarse for it to be known.

    Fingerprints of older LoMDs are of values in bf16."""
    files, names = fingerprint_names(folder)
    stored = {files.tensor(name).dtype for name in names}
    rounded = theirs.startswith(ROUNDED)
    if theirs == (flux_fingerprint(folder) if rounded else fingerprint(files, names)):
        return True
    coarse = torch.float8_e5m2 in stored or (E4M3 in stored and not rounded)
    return None if coarse else False


def autoencoder_fingerprint(folder: Place) -> str:
    """`fingerprint` of a snapshot's autoencoder, of the file that `load_autoencoder` reads."""
    return fingerprint(TensorFiles(autoencoder_files(folder)[0], "autoencoder"))


def text_fingerprints(folder: Place) -> list[str]:
    """`fingerprint` of a model's CLIP and T5."""
    return [fingerprint(TensorFiles(text_files(folder, part)[0], part)) for part in ("clip", "t5")]

# What a command asks of a model -----------------------------------------------------------------------------

LONG_RUN = 300                 # steps of a large model after which compiling may pay: a guess, never measured


def model_defaults(folder: Place) -> dict:
    """What suits a model: FLUX.1's values, or those of its own defaults.json.

    learning_rate: one, or {use: rate}. iterations: of stage 2, {method: number}; a method that is not
    named has the paper's. guidance: of pictures. warmup: of stage 1. aspects, scales: of crops, None is all
    of the paper's; background: its weight in the loss of a crop; mirror: crops mirrored too.
    """
    path = Path(folder) / "defaults.json"
    if not path.is_file():
        path = tokenizers_of(folder) / "defaults.json"
    own = JsonFile(path) if path.is_file() else {}
    defaults = {
        "resolution": 1024,
        "learning_rate": 4e-4,
        "prompt": "a photo of a person",
        "guidance": 3.5,
        "warmup": 0.4,
        "aspects": None,
        "scales": None,
        "background": 1.0,
        "mirror": True,
        "iterations": {},
    }
    kinds = {
        "prompt": str,
        "mirror": bool,
        "aspects": list | None,
        "scales": list | None,
        "learning_rate": float | int | dict,
        "iterations": dict,
    }
    for name, value in own.items():
        kind = kinds.get(name, float | int)
        fits = name in defaults and isinstance(value, kind)
        if fits and name == "iterations":
            counted = all(type(count) is int and count > 0 for count in value.values())
            fits = counted and value.keys() <= {"lora", "meta-lora"}
        if not fits:
            raise ValueError(f"{path}: {name}, {value!r:.60}, is no default of a model: they are "
                             f"{', '.join(defaults)}")
    return defaults | own


def learning_rate(folder: Place, use: str) -> float:
    """The model's default for a use: "meta-lora", "lora" or "stage 1"."""
    rate = model_defaults(folder)["learning_rate"]
    return rate[use] if isinstance(rate, dict) else rate


def pick_dtype(device: Device, folder: Place) -> torch.dtype:
    """bf16, but fp32 on a CPU for models small enough that memory is no matter."""
    return torch.float32 if torch.device(device).type == "cpu" and is_small(folder) else torch.bfloat16


def is_small(folder: Place) -> bool:
    """Under a billion parameters in the transformer: memory is no matter then, and batches pay."""
    files = flux_files(folder)[0]
    return sum(math.prod(files.shape(name)) for name in files.names) < 1e9


def add_speed_options(add: Callable[..., object], training: bool, parts: bool = True) -> None:
    """The switches of large models, and with `parts` those of models in single files, for a parser."""
    if parts:
        add_model_options(add)
    add("--fp8", action="store_true", help="8-bit weights in the blocks: half the memory, and often faster")
    add("--offload", action="store_true", help="keep the blocks' weights in CPU memory: for small cards")
    add("--compile", action=BooleanOptionalAction, help="compile the blocks (default: long runs on a GPU)")
    if training:
        add("--recompute", type=count, metavar="N", help="blocks run twice to save memory (default: few)")


def speed_words(args: Namespace) -> str:
    """The switches that were given, and --device as given, for another command's line."""
    words = "--fp8 " * args.fp8 + "--offload " * args.offload
    if args.compile is not None:
        words += "--compile " if args.compile else "--no-compile "
    return words + (f"--device {args.device} " if args.device else "")


def bare_flux(args: Namespace) -> Flux:
    """The transformer of args.folder on the meta device: no numbers, but all that decides about memory."""
    files, config, is_diffusers = flux_files(args.folder)
    with torch.device("meta"):
        flux = Flux(config)
    plan = {}
    for name, _ in flux.named_parameters():
        plan[name] = diffusers_flux_names(name) if is_diffusers else [name]
    check_tensors(flux, files, plan)
    for block in blocks_of(flux) if args.fp8 or args.offload else []:
        for module in block.modules():
            module.widen = False                             # for metalora.py, as Fp8Linear and Offload do
    return flux


def text_device(args: Namespace, device: torch.device) -> str | torch.device:
    """Where text is encoded: with --offload on the CPU, unless FLUX.1's T5, of 9.5 GB, fits on the device."""
    return "cpu" if args.offload and memory_left(device) < 11 * GIB else device


def encode_prompts(folder: Place, prompts: list[str], device: Device,
                   dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """{prompt: its txt (1, T, context_in_dim) and y (1, vec_in_dim)}, on the CPU; the encoders are gone."""
    encoders = load_text_encoders(folder, device, dtype)
    encoders.check(prompts)
    embeddings = {}
    for prompt in dict.fromkeys(prompts):
        txt, y = encoders.encode([prompt])
        embeddings[prompt] = txt.cpu(), y.cpu()
    del encoders
    gc.collect()                                     # transformers' models hold reference cycles
    free(device)
    return embeddings


def encode_texts(args: Namespace, texts: list[str]) -> dict[str, list[Tensor]]:
    """As encode_prompts, but on args.device, whatever --offload says of the encoders."""
    embeddings = encode_prompts(args.folder, texts, text_device(args, args.device), args.dtype)
    return {text: [txt.to(args.device), y.to(args.device)] for text, (txt, y) in embeddings.items()}


def check_fit(args: Namespace, device: torch.device, beside: int) -> None:
    """Before anything large is read: prints the run's share of the device's memory, with so many bytes beside
    the weights; ValueError where that is too much. args.beside: kept for open_flux."""
    if args.fp8 and device.type == "mps":
        raise ValueError("--fp8 does not work on mps, which has no 8-bit floats: try --offload")
    args.beside = beside
    line = check_memory(bare_flux(args), device, args.dtype, args.fp8, args.offload, beside)
    if device.type != "cpu" and beside:
        print(line)


def check_training_memory(args: Namespace, device: torch.device, size: tuple[int, int], rank: int, r1: int,
                          slots: int = 1, people: int = 1, joint: bool = False) -> None:
    """`check_fit` for `slots` pictures of so many latent pixels, and an adapter as of `training_bytes`."""
    tokens = math.prod(size) // 4 + text_length(args.folder)
    needed = training_bytes(bare_flux(args), args.dtype, tokens, rank, r1, slots, people, joint)
    check_fit(args, device, needed)


def check_sampling_memory(args: Namespace, device: torch.device, size: tuple[int, int],
                          sets: list[list[tuple[dict, float]]], batch: int = 1) -> None:
    """`check_fit` for a batch of pictures of so many latent pixels, with any one of these sets of LoRAs of
    `load_loras`."""
    flux = bare_flux(args)
    updates = []
    for loras in sets:
        columns = Counter()
        for lora, _ in loras:
            columns.update({path: len(A) for path, (A, B) in lora.items()})
        updates.append(update_bytes(flux, columns, args.dtype))
    tokens = batch * (math.prod(size) // 4 + text_length(args.folder))
    check_fit(args, device, max(updates) + step_bytes(flux, tokens, args.dtype))


def compiling_pays(args: Namespace, device: torch.device, steps: int) -> bool:
    """Not in 8 bits on cards before 8.9: their Triton has no such type, and torch before 2.14 fails."""
    able = device.type == "cuda" and find_spec("triton") and (not args.fp8 or multiplies_fp8(device))
    return bool(able) and steps >= LONG_RUN and not is_small(args.folder)


def open_flux(args: Namespace, device: torch.device, steps: int) -> Flux:
    """The transformer as `args` wants it, for so many steps. After check_fit."""
    stay = 0
    if args.offload and device.type != "cpu":
        stay = blocks_on_device(bare_flux(args), device, args.dtype, args.fp8, args.beside)
    flux = load_flux(args.folder, device, args.dtype, args.fp8, args.offload, stay)
    if compiling_pays(args, device, steps) if args.compile is None else args.compile:
        compile_blocks(flux)
    return flux


def take_model(args: Namespace, device: torch.device, use: str) -> None:
    """args.model -> args.folder (may download) and args.dtype; what is not given is the model's default.

    ValueError where the device's memory does not even take the weights."""
    args.folder = find_model(args.model, args)
    args.dtype = pick_dtype(device, args.folder)
    defaults = model_defaults(args.folder)
    args.lr = args.lr or learning_rate(args.folder, use)
    args.resolution = args.resolution or [defaults["resolution"]]
    for name in ("prompt", "guidance", "warmup", "aspects", "scales", "background", "mirror"):
        if getattr(args, name, None) is None:
            setattr(args, name, defaults[name])
    check_fit(args, device, 0)
