"""LoRA names and files: read diffusers, kohya and original keys; write any of them.

    lora = load_lora("person.safetensors")                 # {diffusers module path: (A, B)}, update = B A
    save_lora("person_kohya.safetensors", lora, "kohya")

    format     keys
    diffusers  transformer.<diffusers path>.lora_A.weight, .lora_B.weight           (PEFT, ai-toolkit)
    kohya      lora_unet_<original path, dots as _>.lora_down.weight, .lora_up.weight, .alpha
    original   diffusion_model.<original path>.lora_A.weight, .lora_B.weight        (ComfyUI)

The original layout fuses q, k, v (and the MLP's input) into one Linear. Its LoRA gives every part the same A
and rows of B of its own. LoRAs of the parts become one by stacking: A above A, B block-diagonal, all padded
with zeros to the largest rank; a part without a LoRA is all padding. Reading undoes either, bit for bit.

The scale is alpha / rank, or 1 without alpha. PEFT keeps its alpha in diffusers' metadata or in
adapter_config.json. Differs from other loaders: a key that nobody recognises is an error. LoKr, LoHa and
DoRA are no pairs (A, B) and are refused. Only safetensors is loaded, no pickle.
"""
import hashlib
import json
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_model import Flux, FluxConfig
from support.checkpoints import (FLUX_LINEARS, Place, Target, TensorFiles, find_targets, flux_files,
                                 flux_fingerprint, is_copy, part_sizes, split_number)
from support.common import finite_number, note, JsonFile, whole

Pair = tuple[Tensor, Tensor]                     # A (r, in) and B (out, r); the update of a weight is B A
Lora = dict[str, Pair]                           # by diffusers module paths
WRITTEN = {"diffusers": ("transformer.", ".lora_A.weight", ".lora_B.weight"),
           "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight"),
           "original": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight")}
FORMATS = tuple(WRITTEN)
READ = {".lora_A.weight": "A", ".lora_A.default.weight": "A", ".lora_down.weight": "A", ".alpha": "alpha",
        ".lora_B.weight": "B", ".lora_B.default.weight": "B", ".lora_up.weight": "B"}
PREFIX = re.compile(r"(base_model\.model\.)?(transformer\.|diffusion_model\.|lora_unet_|lora_transformer_)?")
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoders?(_\d)?\.|lora_te\d?_)")
UNSUPPORTED = {"lokr_": "LoKr", "hada_": "LoHa", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA"}
FINAL = "final_layer.adaLN_modulation.1"                    # diffusers swaps its halves: scale before shift
PEFT_METADATA = "lora_adapter_metadata"
ORIGINAL_OF = {part: original for original, parts in FLUX_LINEARS.items() for part in parts}

# Names ------------------------------------------------------------------------------------------------------

# every spelling of a module -> its template, and the diffusers templates whose rows, in turn, are its rows
NAMES = {spelling: (template, meaning)
         for original, parts in FLUX_LINEARS.items()
         for template, meaning in [(original, parts)] + [(part, (part,)) for part in parts]
         for spelling in (template, template.replace(".", "_"))}


def parse_key(key: str) -> tuple[str, str, tuple[str, ...], str] | None:
    """Key -> (key without suffix, template, diffusers paths, "A" | "B" | "alpha"); None: not recognised."""
    suffix = next((suffix for suffix in READ if key.endswith(suffix)), "")
    name = key.removesuffix(suffix)
    spelling, number = split_number(name[PREFIX.match(name).end():])
    if not suffix or spelling not in NAMES:
        return None
    template, parts = NAMES[spelling]
    return name, template, tuple(part.format(number) for part in parts), READ[suffix]


def named(names: list[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")

# Fused layers -----------------------------------------------------------------------------------------------

def is_stacked(B: Tensor, sizes: list[int]) -> bool:
    """Is B block-diagonal, with the same number of columns for each part?"""
    rank, rest = divmod(B.shape[1], len(sizes))
    return not rest and not any(block[:, :i * rank].any() or block[:, (i + 1) * rank:].any()
                                for i, block in enumerate(B.split(sizes)))


def unfuse(A: Tensor, B: Tensor, sizes: list[int]) -> list[Pair | None]:
    """(A, B) of a Linear -> (A, B) of each part; None for a part that is all padding."""
    if len(sizes) == 1:
        return [(A, B)]
    if not is_stacked(B, sizes):
        return [(A.clone(), block.clone()) for block in B.split(sizes)]
    pairs = []
    for i, (a, b) in enumerate(zip(A.chunk(len(sizes)), B.split(sizes))):
        b = b[:, i * len(a):(i + 1) * len(a)]
        used = (a.any(dim=1) | b.any(dim=0)).nonzero()       # padding is zero in both, a new LoRA only in B
        rank = int(used.max()) + 1 if len(used) else 0
        pairs.append((a[:rank].clone(), b[:, :rank].clone()) if rank else None)
    return pairs


def fuse(pairs: list[Pair | None], sizes: list[int]) -> Pair:
    """(A, B) of each part (None: it has no LoRA) -> (A, B) of the Linear. The inverse of unfuse."""
    if all(pairs) and all(torch.equal(A, pairs[0][0]) for A, _ in pairs):
        B = torch.cat([B for _, B in pairs])
        if not is_stacked(B, sizes):                       # else reading would take it for the form below
            return pairs[0][0], B
    like = next(A for A, _ in filter(None, pairs))
    pairs = [pair or (like[:0], like.new_zeros(size, 0)) for pair, size in zip(pairs, sizes)]
    rank = max(len(A) for A, _ in pairs)
    return (torch.cat([F.pad(A, (0, 0, 0, rank - len(A))) for A, _ in pairs]),
            torch.block_diag(*(F.pad(B, (0, rank - B.shape[1])) for _, B in pairs)))

# Reading ----------------------------------------------------------------------------------------------------

def open_lora(path: Place) -> TensorFiles:
    """Names, metadata and (when asked for) tensors of a safetensors file; ValueError where it is not one."""
    if not Path(path).is_file():
        raise ValueError(f"there is no LoRA file {path}")
    try:
        return TensorFiles([Path(path)])
    except ValueError as error:
        raise ValueError(f"{error} (and a .pt, .ckpt or .bin is a pickle, which is never loaded)") from None


def read_metadata(path: Place) -> dict[str, str]:
    """The metadata of a LoRA file, {} where it has none. ValueError where it is no safetensors file."""
    return open_lora(path).metadata


def peft_alpha(path: Path, metadata: dict[str, str]) -> float | None:
    """PEFT's alpha, for tensors without one of their own; None (scale 1) where there are no settings."""
    beside = path.with_name("adapter_config.json")
    if PEFT_METADATA not in metadata and not (path.name == "adapter_model.safetensors" and beside.is_file()):
        return None
    settings = json.loads(metadata[PEFT_METADATA]) if metadata.get(PEFT_METADATA) else JsonFile(beside)
    settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
    for name in ("alpha_pattern", "use_rslora", "use_dora"):
        if settings.get(name):
            raise ValueError(f"{path} was made with PEFT's {name}, which is not supported")
    return settings.get("lora_alpha")


def group_keys(path: Place, all_keys: list[str]) -> dict[tuple, dict[str, str]]:
    """The keys of a file by module, {(name, template, parts): {A, B, alpha}}. What is no LoRA is refused."""
    keys = [key for key in all_keys if not TEXT_ENCODER.match(key)]
    unused = len(all_keys) - len(keys)
    if not keys:
        raise ValueError(f"{path} holds no LoRA of the transformer: it has {unused or 'no'} tensors"
                         + (", all of text encoders, which are not used" if unused else ""))
    for mark, kind in UNSUPPORTED.items():
        if found := [key for key in keys if mark in key]:
            raise ValueError(f"{path} is a {kind} ({named(found)}), which is not supported: plain LoRA only")
    if unknown := [key for key in keys if parse_key(key) is None]:
        raise ValueError(f"{path}: {len(unknown)} of {len(keys)} keys are of no FLUX LoRA: {named(unknown)}")
    layers = {}
    for key in keys:
        *layer, kind = parse_key(key)
        entry = layers.setdefault(tuple(layer), {})
        if kind in entry:
            raise ValueError(f"{path}: {key!r} is there twice, with two endings")
        entry[kind] = key
    if unused:
        warnings.warn(f"{path}: {unused} tensors of text encoders are not used", stacklevel=3)
    return layers


def check_pair(where: str, A: Tensor, B: Tensor) -> None:
    if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1] or not len(A):
        raise ValueError(f"{where}: A {list(A.shape)} and B {list(B.shape)} are no (r, in) and (out, r)")
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError(f"{where} holds values that are not finite (in {A.dtype})")


def read_pair(where: str, entry: dict[str, Tensor], alpha: float | None) -> Pair:
    """A (r, in) and B (out, r), fp32, the scale folded into B. `alpha`: where the entry has none itself."""
    if missing := sorted({"A", "B"} - set(entry)):
        raise ValueError(f"{where} has {' and '.join(sorted(entry))} but no {' and no '.join(missing)}")
    if "alpha" in entry:
        if entry["alpha"].numel() != 1:
            raise ValueError(f"{where}: its alpha is {list(entry['alpha'].shape)}, not one number")
        alpha = float(entry["alpha"])
    A, B = entry["A"].float(), entry["B"].float()
    check_pair(where, A, B)
    if alpha is not None:
        B = B * (alpha / len(A))
        check_pair(f"{where}, scaled by its alpha {alpha},", A, B)
    return A, B


def check_model(path: Place, lora: Lora, config: FluxConfig) -> None:
    """ValueError unless every module of a LoRA is in this model and has the shape of its weight."""
    blocks = f"{config.depth} double and {config.depth_single_blocks} single blocks"
    with torch.device("meta"):
        shapes = {target.path: [target.rows, target.d_in] for target in find_targets(Flux(config), True)}
    for part, (A, B) in lora.items():
        shape = [len(B), A.shape[1]]
        if part not in shapes:
            raise ValueError(f"{path}: {part} is not in this model, which has {blocks}")
        if shapes[part] != shape:
            raise ValueError(f"{path}: {part} is {shape}, but {shapes[part]} in this model")


def load_lora(path: Place, config: FluxConfig | None = None) -> Lora:
    """LoRA file of any format -> {diffusers module path: (A (r, in), B (out, r))}, fp32, update = B A.

    `config`: the model that it must fit. Entries of text encoders are not used, and a warning says so.
    ValueError, in one line, for anything that is not wholly understood.
    """
    files = open_lora(path)
    alpha, lora = peft_alpha(Path(path), files.metadata), {}
    for (name, template, parts), keys in group_keys(path, list(files.file_of)).items():
        A, B = read_pair(f"{path}: {name}", {kind: files[key] for kind, key in keys.items()}, alpha)
        sizes = part_sizes(len(parts), len(B), A.shape[1])
        if sum(sizes) != len(B) or min(sizes) < 1 or (template == FINAL and len(B) % 2):
            raise ValueError(f"{path}: {name} cannot be [{len(B)}, {A.shape[1]}]")
        if template == FINAL:
            B = B.roll(len(B) // 2, 0)
        for part, pair in zip(parts, unfuse(A, B, sizes)):
            if part in lora:
                raise ValueError(f"{path}: {part} is there twice, under two names")
            if pair:
                lora[part] = pair
    if config:
        check_model(path, lora, config)
    return lora

# Writing ----------------------------------------------------------------------------------------------------

def to_original(lora: Lora, mlp_ratio: float) -> Lora:
    """LoRA by diffusers paths -> by original module paths, the parts of fused layers together."""
    fused = {}
    for layer, number in dict.fromkeys((ORIGINAL_OF[part], n) for part, n in map(split_number, lora)):
        pairs = [lora.get(part.format(number)) for part in FLUX_LINEARS[layer]]
        shapes = [[len(pair[1]), pair[0].shape[1]] if pair else None for pair in pairs]
        width = next(shape[1] for shape in shapes if shape)
        last = shapes[-1][0] if shapes[-1] else int(mlp_ratio * width)
        sizes = part_sizes(len(pairs), last if len(pairs) == 1 else 3 * width + last, width)
        if any(shape and shape != [size, width] for shape, size in zip(shapes, sizes)):
            there = [shape for shape in shapes if shape]
            raise ValueError(f"{layer.format(number)}: its parts do not fit together: {there}")
        A, B = fuse(pairs, sizes)
        fused[layer.format(number)] = (A, B.roll(len(B) // 2, 0) if layer == FINAL else B)
    return fused


def save_lora(path: Place, lora: Lora, format: str = "diffusers", metadata: dict[str, str] | None = None,
              dtype: torch.dtype = torch.float16, mlp_ratio: float = FluxConfig.mlp_ratio) -> None:
    """Writes {diffusers module path: (A (r, in), B (out, r))} in one of FORMATS; the file is whole or absent.

    ValueError for a LoRA or a path that cannot be written. mlp_ratio: for the rows of an MLP without a LoRA.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"there is no LoRA format {format!r}, only {', '.join(FORMATS)}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}")
    metadata = {key: text for key, text in (metadata or {}).items() if key != PEFT_METADATA}  # now it is in B
    if not all(isinstance(text, str) for text in (*metadata, *metadata.values())):
        raise ValueError("the metadata of a LoRA must be text, str to str")
    if not lora:
        raise ValueError(f"{path}: there is no LoRA to save")
    if unknown := [name for name in lora if split_number(name)[0] not in ORIGINAL_OF]:
        raise ValueError(f"{path}: no Linear of FLUX has the diffusers path {named(unknown)}")
    lora = {name: [tensor.detach().to("cpu", dtype) for tensor in pair] for name, pair in lora.items()}
    for name, (A, B) in lora.items():
        check_pair(f"{path}: {name}", A, B)
    prefix, down, up = WRITTEN[format]
    tensors = {}
    for name, (A, B) in (lora if format == "diffusers" else to_original(lora, mlp_ratio)).items():
        name = prefix + (name.replace(".", "_") if format == "kohya" else name)
        tensors[name + down], tensors[name + up] = A.clone().contiguous(), B.clone().contiguous()
        if format == "kohya":
            tensors[f"{name}.alpha"] = torch.tensor(float(len(A)))        # the rank: scale 1
    with whole(path) as part:
        save_file(tensors, part, metadata=metadata | {"format": "pt"})

# LoMD -------------------------------------------------------------------------------------------------------

def random_lomd(targets: list[Target], r1: int, seed: int | torch.Generator = 0) -> dict[str, Tensor]:
    """An untrained LoMD {path: (r1, d_in)}: where stage 1 starts, and the control of its experiments."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    return {t.path: nn.init.kaiming_uniform_(torch.empty(r1, t.d_in), 5 ** 0.5, generator=generator)
            for t in targets}


def check_lomd(lomd: dict[str, Tensor], targets: list[Target]) -> None:
    """ValueError, naming the first difference, where a LoMD is of another model."""
    d_in = {target.path: target.d_in for target in targets}
    odd = [f"{path} is {'not in the model' if path in lomd else 'missing from it'}"
           for path in sorted(set(lomd) ^ set(d_in))]
    odd = odd or [f"{path} is {list(A.shape)} instead of [r1, {d_in[path]}]" for path, A in lomd.items()
                  if A.dim() != 2 or len(A) == 0 or A.shape[1] != d_in[path]]
    if odd:
        raise ValueError(f"this LoMD is of another model: {odd[0]}")
    if len(ranks := sorted({len(A) for A in lomd.values()})) > 1:
        rows = " and ".join(map(str, ranks))
        raise ValueError(f"this LoMD has matrices of {rows} rows: all must have the same")


def save_lomd(path: Place, lomd: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes {diffusers path: (r1, d_in)} as <path>.lomd, in fp32; the file is whole or absent."""
    r1 = len(next(iter(lomd.values())))
    with whole(path) as part:
        save_file({f"{k}.lomd": v.detach().float().cpu().contiguous() for k, v in lomd.items()}, part,
                  {"format": "pt", "r1": str(r1), "targets": str(len(lomd))} | metadata)


def load_lomd(path: Place) -> tuple[dict[str, Tensor], dict[str, str]]:
    """LoMD and metadata of a file that save_lomd wrote. ValueError, in one line, for any other."""
    files = TensorFiles([Path(path)])
    odd = [key for key in (*files.file_of, *files.raw) if not key.endswith(".lomd")]
    if odd or not files.file_of:
        raise ValueError(f"{path} is no LoMD file: {f'it holds {odd[0]}' if odd else 'it is empty'}")
    lomd = {key.removesuffix(".lomd"): files[key].float() for key in files.file_of}
    if unsound := [key for key, A in lomd.items() if not A.isfinite().all()]:
        raise ValueError(f"{path}: {unsound[0]}.lomd is not finite")
    return lomd, files.metadata


def find_lomd(folder: Place | None, path: Place | None = None) -> Path:
    """The LoMD's file: `path`, else of a model's folder (None: not there yet), else of this one."""
    if path and not Path(path).is_file():
        raise ValueError(f"no such LoMD: {path}")
    places = [Path(path)] if path else [*([Path(folder) / "lomd.safetensors"] if folder else []),
                                        Path("lomd.safetensors")]
    if (found := next(filter(Path.is_file, places), None)) is None:
        raise ValueError(f"no LoMD {' or ./'.join(map(str, places))}: train one with meta_train.py, name "
                         "yours with --lomd, or train a plain LoRA with --method lora")
    return found


def read_lomd(folder: Place, path: Place | None = None) -> tuple[dict[str, Tensor], str, bool]:
    """The LoMD for the model in `folder` -> ({path: (r1, d_in)}, its hash, was it never trained?)."""
    path = find_lomd(folder, path)
    lomd, metadata = load_lomd(path)
    with torch.device("meta"):
        flux = Flux(flux_files(folder)[1])
    mine, name = flux_fingerprint(folder), metadata.get("model", "unnamed")
    theirs = metadata.get("model_fingerprint", mine)
    fits = is_copy(folder, theirs)
    if fits is None:
        note(f"{path}: whether this 8-bit copy is of the model it was trained on, {name}, cannot be known")
    try:
        check_lomd(lomd, find_targets(flux))
        if fits is False:
            raise ValueError(f"it was trained on another model of this shape, {name}"
                             f" with fingerprint {theirs}; this one has {mine}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return lomd, f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}", metadata.get("random") == "true"

# LoRAs of a command line -----------------------------------------------------------------------------------

def split_lora(text: str) -> tuple[str, float]:
    """`file[:strength]` -> (file, strength). File names may contain colons: an existing file wins."""
    path, _, strength = text.rpartition(":")
    if not Path(path).is_file() or Path(text).is_file():
        path, strength = text, "1"
    if not Path(path).is_file():
        raise ValueError(f"--lora {text}: there is no such file")
    try:
        return path, finite_number(strength)
    except ValueError:
        raise ValueError(f"--lora {text}: the strength {strength!r} is not a number") from None


def load_loras(files: list[tuple[str, float]], config: FluxConfig) -> list[tuple[dict, float]]:
    """(file, strength) -> (LoRA, strength), checked against the model; warnings become notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loras = [(load_lora(path, config), strength) for path, strength in files]
    for warning in caught:
        note(warning.message)
    return loras
