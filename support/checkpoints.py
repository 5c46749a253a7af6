"""Checkpoints: strict loading of either layout, and what a model's folder says about itself.

    flux = load_flux(find_model("flux-dev"), "cuda", torch.bfloat16)

A tensor that is missing, misshapen, or not used is an error, also in the text encoders. finding.py
knows where the files are, tensors.py how tensors are stored in them.
"""
import gc
import json
import math
import re
from argparse import BooleanOptionalAction, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux_model import AutoEncoder, Flux, FluxConfig, TextEncoders
from support.common import (JsonFile, command_line, count, digest, free, is_out_of_memory,
                            progress)
from support.finding import (FOLDERS, OPTION, Place, autoencoder_files, check_tokenizers,
                             find_model, flux_files, model_name, named_parts, open_part,
                             tokenizers_of)
from support.memory import (E4M3, GIB, Fp8Linear, Offload, TiledDecoder, adapter_bytes, blocks_of,
                            check_memory, compile_blocks, memory_left, multiplies_fp8, step_bytes,
                            update_bytes)
from support.names import (Target, diffusers_autoencoder_names, diffusers_flux_names, find_targets,
                           part_sizes)
from support.tensors import TensorFiles
from support.text import check_prompts

Device = str | torch.device
BF16 = torch.bfloat16
LONG_RUN = 300       # steps of a large model from which compiling may pay: a guess, never measured

# Which tensors -----------------------------------------------------------------------------------


def bare_model(kind: type, files: TensorFiles, config: Any) -> tuple[Any, dict[str, list[str]]]:
    """A model on the meta device, and its plan: {parameter: the tensors whose rows it stacks}.

    ValueError names the first missing, misshapen, and unexpected tensor."""
    with torch.device("meta"):
        model = kind(config)
    found = {part: files.shape(part) for part in files.names}
    plan = {}
    shapes = {}
    for name, parameter in model.named_parameters():
        plan[name] = [name]
        if "x_embedder.weight" in found:
            plan[name] = diffusers_flux_names(name)
        elif "decoder.conv_norm_out.weight" in found:
            plan[name] = diffusers_autoencoder_names(name, len(config.ch_mult))
        size, *rest = parameter.shape
        width = getattr(config, "hidden_size", 0)
        for part, rows in zip(plan[name], part_sizes(len(plan[name]), size, width)):
            shapes[part] = [rows, *rest]

    misshapen = []
    for part in shapes.keys() & found.keys():
        # diffusers keeps the autoencoder's 1 x 1 convolutions as Linears
        if shapes[part] not in (found[part], found[part] + [1, 1]):
            misshapen.append(f"{part} {found[part]} instead of {shapes[part]}")
    faults = {
        "missing": shapes.keys() - found.keys(),
        "misshapen": misshapen,
        "unexpected": found.keys() - shapes.keys(),
    }
    problems = [f"{len(parts)} {fault} ({min(parts)})" for fault, parts in faults.items() if parts]
    if problems:
        raise ValueError(f"{files.path} does not fit this {kind.__name__}: {', '.join(problems)}")
    return model, plan


def targets_of(config: FluxConfig, outside: bool = False) -> list[Target]:
    """`find_targets` of a model that is not loaded."""
    with torch.device("meta"):
        return find_targets(Flux(config), outside)

# Loading -----------------------------------------------------------------------------------------


def load_weights(model: nn.Module, plan: dict[str, list[str]], files: TensorFiles, device: Device,
                 dtype: torch.dtype, away: set[nn.Module], fp8: bool = False) -> nn.Module:
    """Fills what `bare_model` gave. Peak memory is the model and its largest tensor.

    away: modules whose weights stay on the CPU. fp8: 8 bits in the blocks' Linears."""
    # all of these before the first is filled: temporary tensors would leave holes between them
    for name, layer in [*model.named_modules()]:
        if fp8 and isinstance(layer, nn.Linear) and "_blocks." in name:
            Fp8Linear.convert(layer, dtype, "cpu" if layer in away else device)

    bar = progress(plan, f"loading {type(model).__name__}")
    for name in bar:
        module, _, attribute = name.rpartition(".")
        layer = model.get_submodule(module)
        if isinstance(layer, Fp8Linear) and attribute == "weight":
            # quantized on the device: a GPU takes seconds where a CPU takes minutes
            layer.fill(*files.quantized(plan[name], device))
            continue
        home = "cpu" if layer in away else device
        value = torch.cat([files[part].to(home, dtype) for part in plan[name]])
        if plan[name][0].startswith("norm_out.linear."):     # diffusers has scale before shift
            value = value.roll(len(value) // 2, 0)
        value = value.view(getattr(layer, attribute).shape)
        setattr(layer, attribute, nn.Parameter(value, requires_grad=False))
    return model.eval()


def load_flux(folder: Place, device: Device = "cpu", dtype: torch.dtype = BF16,
              **switches: Any) -> Flux:
    """The transformer of a model, frozen, on `device` in `dtype`; switches as in `fill_flux`.

    ValueError, in one line, if the files are missing, torn, or another model's."""
    return fill_flux(*flux_files(folder), device, dtype, **switches)


def fill_flux(files: TensorFiles, config: FluxConfig, device: Device, dtype: torch.dtype,
              fp8: bool = False, offload: bool = False, stay: int = 0) -> Flux:
    """`load_flux` of what `flux_files` returns.

    fp8: 8 bits in the blocks' Linears. offload: all blocks but the first `stay` live in CPU
    memory."""
    model, plan = bare_model(Flux, files, config)
    blocks = blocks_of(model)[stay:] if offload else []
    load_weights(model, plan, files, device, dtype, {*nn.ModuleList(blocks).modules()}, fp8)
    free(device)
    if offload:
        Offload(model, device).keep(stay)
    return model


def load_autoencoder(folder: Place, device: Device = "cpu",
                     dtype: torch.dtype = BF16) -> AutoEncoder:
    """The autoencoder of a model, frozen, on `device` in `dtype`; errors as in `load_flux`."""
    files, config = autoencoder_files(folder)
    model, plan = bare_model(AutoEncoder, files, config)
    load_weights(model, plan, files, device, dtype, away=set())
    if torch.device(device).type == "cuda":      # on a CPU, GroupNorm would be less exact
        model = model.to(memory_format=torch.channels_last)
    model.decoder.__class__ = TiledDecoder
    return model

# Text encoders -----------------------------------------------------------------------------------

# in files of text encoders, and not used by them; T5's embeddings are tied
NEUTRAL = re.compile(
    r"logit_scale|text_projection(\.weight)?|(.*\.)?position_ids|encoder\.embed_tokens\.weight"
    r"|(decoder|lm_head|vision_model|visual_projection)\b.*")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and reports from transformers; faults are raised here."""
    from transformers.utils import logging
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_transformers_model(kind: type, folder: Place, dtype: torch.dtype,
                            **options: object) -> nn.Module:
    """A model of transformers, strictly: it would fill missing tensors with random numbers.

    options: config and state_dict, if they are not to be read from `folder`."""
    model, report = kind.from_pretrained(
        None if options else folder,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
    )
    for fault in ("missing", "mismatched", "unexpected"):
        names = sorted(map(str, report[f"{fault}_keys"]))
        if names and (options or fault != "unexpected"):
            raise ValueError(f"{folder} does not fit its config.json: {len(names)} {fault} "
                             f"({names[0]})")
    return model.eval()


def load_text_encoder(kind: type, folder: Place, part: str, dtype: torch.dtype) -> nn.Module:
    """CLIP or T5 of a model, from values, since files may be quantized or hold more."""
    files, config = open_part(folder, part)
    if config is None:
        config = JsonFile(tokenizers_of(folder) / FOLDERS[part] / "config.json")
    config = config.get("text_config") or config         # in CLIP's own, beside that for images
    names = [name for name in files.names if not NEUTRAL.fullmatch(name)]
    bar = progress(names, f"loading {kind.__name__}")
    state = {name: files[name].to(dtype) for name in bar}
    tied = "encoder.embed_tokens.weight"
    if tied in files.names and "shared.weight" not in files.names:
        state["shared.weight"] = files[tied].to(dtype)
    config = kind.config_class.from_dict(dict(config))
    return load_transformers_model(kind, files.path, dtype, config=config, state_dict=state)


def text_length(folder: Place) -> int:
    """How many text tokens a model takes: at most 512, schnell 256."""
    settings = JsonFile(tokenizers_of(folder) / "tokenizer_2" / "tokenizer_config.json")
    length = min(512, settings.get("model_max_length", 512))
    if length > 256 and not flux_files(folder)[1].guidance_embed:
        return 256
    return length


def load_text_encoders(folder: Place, device: Device = "cpu",
                       dtype: torch.dtype = BF16) -> TextEncoders:
    """Text encoders of a model, which take as many tokens as it does."""
    tokenizers = check_tokenizers(tokenizers_of(folder))
    max_length = text_length(folder)
    try:
        with quiet_transformers():
            from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer
            return TextEncoders(
                load_text_encoder(CLIPTextModel, folder, "clip", dtype).to(device),
                CLIPTokenizer.from_pretrained(tokenizers / "tokenizer"),
                load_text_encoder(T5EncoderModel, folder, "t5", dtype).to(device),
                T5Tokenizer.from_pretrained(tokenizers / "tokenizer_2"),
                max_length,
            )
    except Exception as error:                   # transformers raises anything on foreign files
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder}: the text encoders cannot be loaded: {reason}") from None


def encode_prompts(folder: Place, prompts: list[str], device: Device, dtype: torch.dtype,
                   home: Device = "cpu") -> dict[str, tuple[Tensor, Tensor]]:
    """{prompt: its txt (1, T, context_in_dim) and y (1, vec_in_dim)}, on `home`; encoded on
    `device`, where the encoders are dropped afterwards."""
    encoders = load_text_encoders(folder, device, dtype)
    check_prompts(encoders, prompts)
    embeddings = {}
    for prompt in dict.fromkeys(prompts):
        txt, y = encoders.encode([prompt])
        embeddings[prompt] = txt.to(home), y.to(home)
    del encoders
    gc.collect()                                 # transformers' models hold reference cycles
    free(device)
    return embeddings

# Which model it is -------------------------------------------------------------------------------


def digest_of(files: TensorFiles, names: list[str], dtype: torch.dtype) -> str:
    """A hash of tensors' values in bf16 and then in `dtype`."""
    values = torch.cat([files[name].to(BF16).to(dtype).flatten() for name in names])
    return digest(values.view(torch.uint8).numpy().tobytes())


def fingerprint(folder: Place, part: str) -> str:
    """A hash of the small tensors of the "autoencoder", "clip", or "t5" of a model, after the types
    that its weights are quantized to."""
    files, _ = open_part(folder, part)
    names = sorted(files.names)
    if part != "autoencoder":
        names = [name for name in names if not NEUTRAL.fullmatch(name)]
    types = {files.slice(name).get_dtype() for name in names}
    small = [name for name in names if math.prod(files.shape(name)) <= 4096]
    return " ".join([*sorted(types - {"F32", "F16", "BF16"}), digest_of(files, small, BF16)])


def part_fingerprints(folder: Place) -> dict[str, str]:
    """`fingerprint` of each part of a model beside its transformer."""
    return {part: fingerprint(folder, part) for part in ("autoencoder", "clip", "t5")}


def flux_fingerprint(folder: Place) -> str:
    """A hash of a model's transformer, the same for every copy: in either layout and any precision
    down to e4m3. That of a coarser copy begins with e5m2, and says little."""
    files, config = flux_files(folder)
    names = []
    for name, parts in bare_model(Flux, files, config)[1].items():
        if name.endswith(".scale") or name == "img_in.bias":
            names += parts
    coarse = any(files.tensor(name).dtype == torch.float8_e5m2 for name in names)
    return ("e5m2" if coarse else "e4m3") + digest_of(files, names, E4M3)[:12]

# What a command asks of a model ------------------------------------------------------------------

NUMBER = r"\d+(\.\d+)?(e-?\d+)?"
ASPECT = r'"[1-9]\d*:[1-9]\d*"'
DEFAULTS = {                   # FLUX.1's value, and how a model's own looks in its defaults.json
    "resolution": (1024, r"[1-9]\d*"),
    "learning_rate": (4e-4, NUMBER),
    "iterations": (None, r"[1-9]\d*"),           # of stage 2; None: the paper's
    "prompt": ("a photo of a person", '".*"'),
    "guidance": (3.5, NUMBER),                   # of pictures
    "warmup": (0.4, NUMBER),                     # of stage 1
    "aspects": (None, rf"null|\[{ASPECT}(, {ASPECT})*\]"),     # of crops; None: all of the paper's
    "scales": (None, rf"null|\[{NUMBER}(, {NUMBER})*\]"),
    "background": (1.0, NUMBER),                 # its weight in the loss of a crop
    "mirror": (True, "true|false"),              # train on mirror images of crops too
}
USES = "meta-lora", "lora", "stage 1"


def model_defaults(folder: Place, use: str = "") -> dict:
    """What suits a model: FLUX.1's values, or those of its own defaults.json, which may hold one
    for each use, as {"lora": 1e-3, "stage 1": 4e-3}."""
    path = Path(folder) / "defaults.json"
    if not path.is_file():
        path = tokenizers_of(folder) / "defaults.json"
    own = JsonFile(path) if path.is_file() else {}
    defaults = {name: default for name, (default, _) in DEFAULTS.items()}
    for name, value in own.items():
        by_use = value if isinstance(value, dict) else {use: value}
        fits = name in DEFAULTS and by_use.keys() <= {use, *USES}
        for each in by_use.values():
            fits = fits and re.fullmatch(DEFAULTS[name][1], json.dumps(each))
        if not fits:
            raise ValueError(f"{path}: {name} cannot be {value!r:.60}; a model's defaults are "
                             f"{', '.join(DEFAULTS)}")
        defaults[name] = by_use.get(use, defaults[name])
    return defaults


def is_small(folder: Place) -> bool:
    """Under a billion parameters in the transformer: memory does not matter, and batches pay."""
    files = flux_files(folder)[0]
    return sum(math.prod(files.shape(name)) for name in files.names) < 1e9


def add_speed_options(add: Callable[..., object], training: bool, model: bool = True):
    """The switches for large models, and with `model` those that choose it and the device."""
    if model:
        add("--model", type=model_name, default="flux-dev",
            help="flux-dev (default), flux-schnell, baby, a folder or a file")
        for part, word in OPTION.items():
            kind = "folder" if part == "tokenizers" else "file or folder"
            add(f"--{word}", dest=f"model_{word}", metavar="PATH",
                help=f"{kind} of the model's {part} (default: found near it, or the hub's)")
        add("--device", help="cuda, mps or cpu (default: the best available)")
    add("--fp8", action="store_true",
        help="8-bit weights in the blocks: half the memory, and often faster")
    add("--offload", action="store_true",
        help="keep blocks that do not fit on the GPU in CPU memory")
    add("--compile", action=BooleanOptionalAction,
        help="compile the blocks (default: long runs on a GPU)")
    if training:
        add("--recompute", type=count, metavar="N",
            help="gradient-checkpoint N blocks (default: as few as fit)")


def model_words(args: Namespace) -> str:
    """The options given for a model and its speed, for another command's line."""
    words = ""
    for option, value in {"model": args.model, **named_parts(args)}.items():
        if value not in (None, "flux-dev"):
            words += f"--{option} {command_line(value)} "
    flags = {
        "--fp8 ": args.fp8,
        "--offload ": args.offload,
        "--compile ": args.compile,
        "--no-compile ": args.compile is False,
        f"--device {args.device} ": args.device,
    }
    return words + "".join(flag for flag, given in flags.items() if given)


def bare_flux(args: Namespace) -> Flux:
    """The transformer of args.folder on the meta device, which decides about memory."""
    flux, _ = bare_model(Flux, *flux_files(args.folder))
    for module in nn.ModuleList(blocks_of(flux)).modules():
        module.widen = not (args.fp8 or args.offload)        # for metalora.py, as when loaded
    return flux


def check_training_memory(args: Namespace, size: tuple[int, int], rank: int, r1: int,
                          slots: int = 1, people: int = 1, joint: bool = False):
    """`check_memory` for `slots` pictures of `size` latent pixels, and an adapter as in
    `adapter_bytes`; all blocks may run twice."""
    flux = bare_flux(args)
    step = step_bytes(flux, slots, size, text_length(args.folder), args.dtype,
                      twice=len(blocks_of(flux)))
    adapter = adapter_bytes(flux, args.dtype, rank, r1, slots, people, joint)
    check_memory(args, flux, adapter + step)


def check_sampling_memory(args: Namespace, size: tuple[int, int],
                          sets: list[list[tuple[dict, float]]]):
    """`check_memory` for a picture of `size` latent pixels, with any one of these sets of LoRAs
    from `load_loras`."""
    flux = bare_flux(args)
    updates = []
    for loras in sets:
        columns = Counter()
        for lora, _ in loras:
            columns.update({path: len(A) for path, (A, B) in lora.items()})
        updates.append(update_bytes(flux, columns, args.dtype))
    step = step_bytes(flux, 1, size, text_length(args.folder), args.dtype)
    check_memory(args, flux, max(updates) + step)


def compiling_pays(args: Namespace, steps: int) -> bool:
    """Not in 8 bits on GPUs before 8.9: their Triton has no such type, and torch < 2.14 fails."""
    able = args.device.type == "cuda" and find_spec("triton") is not None
    able = able and (not args.fp8 or multiplies_fp8(args.device))
    return able and steps >= LONG_RUN and not is_small(args.folder)


def open_flux(args: Namespace, steps: int) -> Flux:
    """The transformer as `args` wants it, for so many steps. After `check_memory`."""
    flux = load_flux(args.folder, args.device, args.dtype, fp8=args.fp8, offload=args.offload,
                     stay=args.stay)
    wanted = compiling_pays(args, steps) if args.compile is None else args.compile
    if wanted:
        compile_blocks(flux)
    return flux


def choose_model(args: Namespace):
    """args.model -> args.folder (may download), args.dtype: fp32 for small models on a CPU, and
    args.text_device: where text is encoded."""
    device = args.device
    args.folder = find_model(args.model, args)
    small = device.type == "cpu" and is_small(args.folder)
    args.dtype = torch.float32 if small else BF16
    # with --offload on the CPU, unless FLUX.1's T5 (9.5 GB) fits
    args.text_device = "cpu" if args.offload and memory_left(device) < 11 * GIB else device


def take_model(args: Namespace, use: str):
    """`choose_model`; options that are not given become the model's defaults. ValueError if the
    device cannot even hold the weights."""
    choose_model(args)
    defaults = model_defaults(args.folder, use)
    args.lr = args.lr or defaults["learning_rate"]
    args.resolution = args.resolution or [defaults["resolution"]]
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    check_memory(args, bare_flux(args))
