"""LoRA names and files: read what the usual programs write; write any of three formats.

    lora = load_lora("person.safetensors")                 # {diffusers module path: (A, B)}, update = B A
    save_lora("person_kohya.safetensors", lora, "kohya")

    format     keys
    diffusers  transformer.<diffusers path>.lora_A.weight, .lora_B.weight           (PEFT, ai-toolkit)
    kohya      lora_unet_<original path, dots as _>.lora_down.weight, .lora_up.weight, .alpha
    original   diffusion_model.<original path>.lora_A.weight, .lora_B.weight        (ComfyUI)

Also read: .lora.down.weight, .lora_A.<adapter>.weight, prefixes in any mixture, XLabs' and USO's processors,
OneTrainer's parts of fused layers, fused layers of diffusers (to_qkv), DiffSynth's names, ComfyUI's .diff.
The same LoRA under two names counts once.

The original layout fuses q, k, v (and the MLP's input) into one Linear. Its LoRA gives every part the same A
and rows of B of its own. LoRAs of the parts become one by stacking: A above A, B block-diagonal, all padded
with zeros to the largest rank; a part without a LoRA is all padding. Reading undoes either, bit for bit.

The scale is alpha / rank, or 1 without alpha. PEFT keeps its alpha in diffusers' metadata or in
adapter_config.json. Differs from other loaders: a key that nobody recognises is an error. What is no pair
(A, B), as LoKr or DoRA, and what is of another model is refused by name. Only safetensors, no pickle.
"""
import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flux_model import FluxConfig
from support.checkpoints import Place, TensorFiles, flux_files, flux_fingerprint, is_copy, targets_of
from support.common import (JsonFile, check_file, encodable, finite_number, not_content, note,
                            write_whole)
from support.names import FINAL, FLUX_LINEARS, FLUX_NAMES, Target, part_sizes, split_number

Pair = tuple[Tensor, Tensor]                     # A (r, in) and B (out, r); the update of a weight is B A
Lora = dict[str, Pair]                           # by diffusers module paths
Layer = tuple[str, tuple[str, ...]]              # a module, and the diffusers paths its rows are of
WRITTEN = {"diffusers": ("transformer.", ".lora_A.weight", ".lora_B.weight"),
           "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight"),
           "original": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight")}
FORMATS = tuple(WRITTEN)
PREFIX = re.compile(r"(base_model\.model\.)?(model\.)?"
                    r"(transformer\.|diffusion_model\.|lora_unet_|lora_transformer_|lycoris_)?")
# .lora_A.weight, .lora_down.weight, .lora.down.weight, .lora_A.<adapter>.weight; XLabs: .down.weight
ENDING = re.compile(r"\.(?:(?:lora(?:_linear_layer)?[._])?(down|up)|lora_(A|B))(?:\.[^.]+)?\.weight$"
                    r"|\.(alpha)$")
KINDS = {"down": "A", "A": "A", "up": "B", "B": "B", "alpha": "alpha"}
CHANGE = re.compile(r"(?:\.scale)?\.(?:diff(?:_b)?|[wb]_norm|lora_(?:B|up)\.bias)$")  # of a whole tensor
TEXT_ENCODER = re.compile(r"(base_model\.model\.)?"
                          r"(text_encoders?(_\d)?\.|lora_te\d?_|(clip_[lg]|t5(xxl)?)\.)")
EMBEDDING = re.compile(r"bundle_emb\.|emb_params|.*string_to_param|(clip_[lg]|t5(xxl)?|text_encoders_\d)$")
PEFT_METADATA = "lora_adapter_metadata"
ORIGINAL_OF = {part: original for original, parts in FLUX_LINEARS.items() for part in parts}

# Names ------------------------------------------------------------------------------------------------------

def spellings(layers: dict[str, Layer]) -> dict[str, Layer]:
    """{spelling: layer} with dots, and with underscores."""
    return layers | {name.replace(".", "_"): layer for name, layer in layers.items()}


# every spelling of a module -> its template, and the diffusers templates whose rows, in turn, are its rows
NAMES = spellings({original: (original, parts) for original, parts in FLUX_LINEARS.items()}
                  | {part: (part, (part,)) for part in ORIGINAL_OF})
SINGLE_QKV = ("single_blocks.{}.linear1_qkv", FLUX_LINEARS["single_blocks.{}.linear1"][:3])
# what single programs call these: diffusers fused ones, OneTrainer the same in backups, DiffSynth all
ALIASES = {}
for original, names in {
        "double_blocks.{}.img_attn.qkv":
            "transformer_blocks.{}.attn.to_qkv transformer_blocks.{}.attn.qkv blocks.{}.attn.a_to_qkv",
        "double_blocks.{}.txt_attn.qkv":
            "transformer_blocks.{}.attn.to_added_qkv transformer_blocks.{}.attn.added_qkv "
            "blocks.{}.attn.b_to_qkv",
        "double_blocks.{}.img_mod.lin": "blocks.{}.norm1_a.linear",
        "double_blocks.{}.txt_mod.lin": "blocks.{}.norm1_b.linear",
        "double_blocks.{}.img_attn.proj": "blocks.{}.attn.a_to_out",
        "double_blocks.{}.txt_attn.proj": "blocks.{}.attn.b_to_out",
        "double_blocks.{}.img_mlp.0": "blocks.{}.ff_a.0", "double_blocks.{}.img_mlp.2": "blocks.{}.ff_a.2",
        "double_blocks.{}.txt_mlp.0": "blocks.{}.ff_b.0", "double_blocks.{}.txt_mlp.2": "blocks.{}.ff_b.2",
        "single_blocks.{}.linear1": "single_transformer_blocks.{}.qkv_mlp single_blocks.{}.to_qkv_mlp",
        "single_blocks.{}.modulation.lin": "single_blocks.{}.norm.linear",
        "single_blocks.{}.linear2": "single_blocks.{}.proj_out"}.items():
    ALIASES |= dict.fromkeys(names.split(), NAMES[original])
# OneTrainer numbers the parts of a fused layer; XLabs and USO name processors
MORE_NAMES = spellings(
    ALIASES
    | {f"{name}.{i}": (part, (part,)) for name, (_, parts) in (NAMES | ALIASES).items() if len(parts) > 1
       for i, part in enumerate(parts)}
    | {"single_transformer_blocks.{}.attn.to_qkv": SINGLE_QKV, SINGLE_QKV[0]: SINGLE_QKV,
       "img_in.proj": NAMES["img_in"],
       "single_blocks.{}.processor.qkv_lora": SINGLE_QKV,
       "single_blocks.{}.processor.proj_lora": NAMES["single_blocks.{}.linear2"]}
    | {f"double_blocks.{{}}.processor.{layer}_lora{i}": NAMES[f"double_blocks.{{}}.{stream}_attn.{layer}"]
       for i, stream in ((1, "img"), (2, "txt")) for layer in ("qkv", "proj")})
NORMS = spellings({name: (name, ()) for original, parts in FLUX_NAMES.items() if original not in FLUX_LINEARS
                   for name in (original, *parts)})
LINEARS = NAMES | MORE_NAMES


def bare(name: str) -> str:
    """A module's name without the prefix of its program."""
    return name[PREFIX.match(name).end():]


def find_layer(name: str, names: dict[str, Layer]) -> Layer | None:
    spelling, number = split_number(bare(name))
    template, parts = names.get(spelling, (None, ()))
    return template and (template.replace("{}", number), tuple(part.format(number) for part in parts))


def parse_key(key: str) -> tuple[str, str, tuple[str, ...], str] | None:
    """Key -> (key without its ending, module, diffusers paths, "A" | "B" | "alpha"); None: not recognised."""
    ending = ENDING.search(key)
    name = key[:ending.start()] if ending else key
    layer = find_layer(name, LINEARS) if ending else None
    if not layer or ending[0] in (".down.weight", ".up.weight") and ".processor." not in name:
        return None
    return name, *layer, KINDS[next(filter(None, ending.groups()))]


def is_change(key: str) -> bool:
    """Is it a whole tensor that is added to a weight, a bias or a norm of FLUX, as ComfyUI writes it?"""
    ending = CHANGE.search(key)
    return bool(ending and find_layer(key[:ending.start()], LINEARS | NORMS))


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

# What is no LoRA of FLUX.1 ----------------------------------------------------------------------------------

# marks in keys that are not recognised -> the kind of file, in the order in which they are looked for
UNSUPPORTED = {r"(qkv|to_q|linear1|proj_mlp)\.weight$": "whole model", r"lokr_": "LoKr", r"hada_": "LoHa",
               r"dora|magnitude": "DoRA", r"[._]b?oft[._]": "OFT", r"vera_": "VeRA",
               r"\.lora_(down|up)$": "LoRA in nunchaku's layout",
               r"lora_mid": "LoCon with a core", r"\.on_input$": "IA3", r"\.[ab][12]\.": "GLoRA",
               r"norm\.scale$|norm_(added_)?[qk]\.weight$|\.(reshape|set)_weight$": "control LoRA",
               r"ip_adapter": "IP-Adapter", r"controlnet": "ControlNet"}
OTHER_MODELS = {
    r"(double|single)_stream_modulation|to_qkv_mlp_proj|[._]linear_(in|out)\b|time_guidance_embed|"
    r"single_transformer_blocks[._]\d+[._]attn[._]to_out[._]lora": "FLUX.2",
    r"(img|txt)_mlp[._]net[._]|(img|txt)_mod[._]1\b": "Qwen-Image",
    r"\.(img|txt)_attn_(qkv|proj|q|k|v)\b|(img|txt)_mlp[._]fc[12]|(img|txt)_mod[._]linear|"
    r"modulation[._]linear|token_refiner": "HunyuanVideo",
    r"distilled_guidance_layer": "Chroma",
    r"joint_transformer_blocks|(double|single)_layers[._]": "AuraFlow",
    r"joint_blocks|context_block|x_block": "SD3 or SD3.5",
    r"down_blocks[._]0[._]att|up_blocks[._]3[._]att": "Stable Diffusion 1.5 or 2",
    r"(in|out)put_blocks|middle_block|mid_block_attentions_0_transformer_blocks_[1-9]|"
    r"down_blocks[._]2[._]attentions[._]\d[._]transformer_blocks[._][1-9]": "SDXL",
    r"(down|mid|up)_blocks?[._]": "SDXL or Stable Diffusion 1.5",
    r"(double|single)_stream_blocks": "HiDream",
    r"transformer_blocks[._]\d+[._]attn1": "LTX-Video, CogVideoX, PixArt or Sana",
    r"transformer_blocks[._]\d+[._]attn2": "SD3.5",
    r"\bblocks[._]\d+[._](self|cross)_attn|unet_blocks_": "Wan or Cosmos",
    r"layers[._]\d+[._](attention|feed_forward)|(noise|context)_refiner": "Z-Image or Lumina"}
# where all names are FLUX.1's: (double, single) blocks, the width of the blocks, and what the metadata say
BY_BLOCKS = {(60, 0): "Qwen-Image", (20, 40): "HunyuanVideo", (8, 48): "FLUX.2", (8, 24): "FLUX.2 [klein]",
             (5, 20): "FLUX.2 [klein]", (19, 38): "FLUX.1 in full size",
             (38, 0): "SD3.5 large", (24, 0): "SD3 or SD3.5 medium"}
BY_WIDTH = {6144: "FLUX.2", 4096: "FLUX.2 [klein]", 2432: "SD3.5 large", 1536: "SD3 or SD3.5 medium"}
BY_METADATA = {r"flux[-_. ]?2": "FLUX.2", "qwen": "Qwen-Image", "hunyuan": "HunyuanVideo",
               r"sd[-_]?3|stable-diffusion-3": "SD3 or SD3.5"}


def first_match(patterns: dict[str, str], keys: list[str]) -> tuple[str, list[str]]:
    """The meaning of the first pattern that is found, and the keys with it."""
    for pattern, meaning in patterns.items():
        if found := [key for key in keys if re.search(pattern, key, re.IGNORECASE)]:
            return meaning, found
    return "", []


def check_kind(path: Place, keys: list[str], unknown: list[str], metadata: dict[str, str]) -> None:
    """ValueError that says what a file is that is not wholly a LoRA of FLUX.1."""
    kind, found = first_match(UNSUPPORTED, unknown)
    if kind:
        kind = f"an {kind}" if kind[0] in "IO" else f"a {kind}"
        raise ValueError(f"{path} is {kind} ({named(found)}), which is not supported: plain LoRA only")
    said = [metadata.get(field, "") for field in ("modelspec.architecture", "ss_base_model_version")]
    for model, found in first_match(OTHER_MODELS, unknown), first_match(BY_METADATA, said):
        if model:
            raise ValueError(f"{path} is a LoRA of {model}, not of FLUX.1 (it has {named(found)})")
    if unknown:
        hint = "".join(f"; its metadata say {text!r}" for text in filter(None, said[:1]))
        raise ValueError(f"{path}: {len(unknown)} of {len(keys)} keys are of no FLUX LoRA: "
                         f"{named(unknown)}{hint}")


def guess_model(lora: Lora) -> str:
    """What a LoRA that does not fit may be of: " (...)", or nothing."""
    numbers = list(map(split_number, lora))
    blocks = [max((int(number) + 1 for template, number in numbers if template.startswith(kind)), default=0)
              for kind in ("transformer_", "single_transformer_")]
    widths = {A.shape[1] for path, (A, _) in lora.items() if ".attn." in path}
    gated = any(path.endswith(("proj_mlp", ".ff.net.0.proj")) and len(B) == 6 * A.shape[1]
                for path, (A, B) in lora.items())                   # twice 3 times the width; FLUX.1's is 4
    other = "FLUX.2" if gated else BY_BLOCKS.get(tuple(blocks)) or next(
        (BY_WIDTH[width] for width in widths if width in BY_WIDTH), None)
    return f" (it looks like a LoRA of {other})" if other else ""

# Reading ----------------------------------------------------------------------------------------------------

def open_lora(path: Place) -> safe_open:
    """Names, metadata and (when asked for) tensors of a safetensors file; ValueError where it is not one."""
    if not Path(path).is_file():
        why = not_content(path)
        raise ValueError(f"there is no LoRA file {path}" + (f", {why}" if why else ""))
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        why = not_content(path) or error
        raise ValueError(f"{path} cannot be read as a safetensors file: {why}") from None


def read_metadata(path: Place) -> dict[str, str]:
    """The metadata of a LoRA file, {} where it has none. ValueError where it is no safetensors file."""
    return open_lora(path).metadata() or {}


def tell_replaced(path: Path, photo_digests: str) -> None:
    """A note where the LoRA in the place of a new one is of other photos, or not of personalize.py."""
    if path.is_file():
        try:
            found = read_metadata(path)
        except ValueError:
            found = {}
        if found.get("photo_digests") != photo_digests:
            note(f"{path} will be replaced: it is of {found.get('photos', 'something else')}")


def peft_settings(path: Path, metadata: dict[str, str]) -> dict:
    """PEFT's settings, of diffusers' metadata or the adapter_config.json beside; {} where there are none."""
    beside = path.with_name("adapter_config.json")
    try:
        if metadata.get(PEFT_METADATA):
            settings = dict(json.loads(metadata[PEFT_METADATA]))
        elif path.name == "adapter_model.safetensors" and beside.is_file():
            settings, path = JsonFile(beside), beside
        else:
            return {}
        settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
        settings["alpha_pattern"] = {re.compile(rf"(.*\.)?({pattern})$"): float(alpha) for pattern, alpha
                                     in (settings.get("alpha_pattern") or {}).items()}
        if settings.get("lora_alpha") is not None:
            settings["lora_alpha"] = float(settings["lora_alpha"])
    except (AttributeError, TypeError, ValueError, re.error) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: PEFT's settings cannot be used: {error}") from None
    if settings.get("use_dora") or settings.get("peft_type", "LORA") != "LORA":
        kind = "DoRA" if settings.get("use_dora") else settings["peft_type"]
        raise ValueError(f"{path}: its LoRA is a {kind}, which is not supported: plain LoRA only")
    return settings


def peft_alpha(settings: dict, name: str, rank: int) -> float | None:
    """The alpha of a module without one of its own, as its scale is alpha / rank; None: the scale is 1."""
    alpha = settings.get("lora_alpha")
    found = (own for pattern, own in settings.get("alpha_pattern", {}).items() if pattern.match(bare(name)))
    alpha = next(found, alpha)
    return alpha * rank ** 0.5 if settings.get("use_rslora") and alpha is not None else alpha


def sort_keys(path: Place, file: safe_open) -> tuple[list[str], list[str]]:
    """The keys of pairs, and those of whole changes that are not zero. ValueError for what is no LoRA."""
    all_keys, unused = sorted(file.keys()), {}
    for kind, pattern in (("text encoders", TEXT_ENCODER), ("embeddings", EMBEDDING)):
        unused[kind] = [key for key in all_keys if pattern.match(key)]
    keys = [key for key in all_keys if not any(key in found for found in unused.values())]
    if not keys:
        what = " and ".join(kind for kind in unused if unused[kind])
        raise ValueError(f"{path} holds no LoRA of the transformer: it has {len(all_keys) or 'no'} tensors"
                         + (f", all of {what}, which are not used" if what else ""))
    pairs = [key for key in keys if parse_key(key)]
    changes = [key for key in keys if is_change(key)]
    check_kind(path, keys, sorted({*keys} - {*pairs, *changes}), file.metadata() or {})
    for kind, found in unused.items():
        if found:
            names = f": {named(found)}" if kind == "embeddings" else ""
            warnings.warn(f"{path}: {len(found)} tensors of {kind} are not used{names}", stacklevel=4)
    return pairs, [key for key in changes if file.get_tensor(key).float().any()]


def group_keys(keys: list[str]) -> Iterator[tuple[str, str, tuple[str, ...], dict[str, list[str]]]]:
    """Yields (name, module, parts, {"A" | "B" | "alpha": keys}) of each LoRA of a module.

    A module may have several, under several prefixes. Where one of them is not whole, they are one: a prefix
    is a single key's.
    """
    modules = {}
    for key in keys:
        name, *layer, kind = parse_key(key)
        modules.setdefault(tuple(layer), {}).setdefault(name, {}).setdefault(kind, []).append(key)
    for layer, loras in modules.items():
        if not all({"A", "B"} <= lora.keys() for lora in loras.values()):
            together = {kind: sum((lora.get(kind, []) for lora in loras.values()), [])
                        for kind in ("A", "B", "alpha")}
            loras = {next(iter(loras)): {kind: found for kind, found in together.items() if found}}
        yield from ((name, *layer, lora) for name, lora in loras.items())


def read_one(path: Place, file: safe_open, keys: list[str]) -> Tensor:
    """The tensor that all these keys hold."""
    first, *others = map(file.get_tensor, keys)
    if not all(first.shape == other.shape and torch.equal(first.float(), other.float()) for other in others):
        raise ValueError(f"{path}: {keys[0]!r} is there twice, with two endings or prefixes ({keys[1]!r}), "
                         "and they differ")
    return first


def check_pair(where: str, A: Tensor, B: Tensor) -> None:
    if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1] or not len(A):
        raise ValueError(f"{where}: A {list(A.shape)} and B {list(B.shape)} are no (r, in) and (out, r)")
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError(f"{where} holds values that are not finite (in {A.dtype})")


def read_pair(path: Place, name: str, entry: dict[str, Tensor], settings: dict) -> Pair:
    """A (r, in) and B (out, r), fp32, the scale folded into B; `settings`: PEFT's."""
    where = f"{path}: {name}"
    if missing := sorted({"A", "B"} - set(entry)):
        raise ValueError(f"{where} has {' and '.join(sorted(entry))} but no {' and no '.join(missing)}")
    if integers := [x.dtype for x in (entry["A"], entry["B"]) if not x.is_floating_point()]:
        raise ValueError(f"{where} is in {integers[0]}: quantised LoRAs are not supported")
    A, B = entry["A"].float(), entry["B"].float()
    check_pair(where, A, B)
    alpha = peft_alpha(settings, name, len(A))
    if "alpha" in entry:
        if entry["alpha"].numel() != 1:
            raise ValueError(f"{where}: its alpha is {list(entry['alpha'].shape)}, not one number")
        alpha = float(entry["alpha"])
    if alpha is not None:
        B = B * (alpha / len(A))
        check_pair(f"{where}, scaled by its alpha {alpha},", A, B)
    return A, B


def read_changes(path: Place, file: safe_open, keys: list[str]) -> Iterator[tuple[str, str, tuple, Pair]]:
    """Yields (name, module, parts, pair) of whole changes of weights; warns of those of biases and norms."""
    rest = []
    for key in keys:
        name = key[:CHANGE.search(key).start()]
        layer, change = find_layer(name, LINEARS), file.get_tensor(key).float()
        if not layer or change.dim() != 2 or not key.endswith(".diff"):
            rest.append(key)
            continue
        unit = torch.eye(min(change.shape))
        pair = (change, unit) if len(change) < change.shape[1] else (unit, change)
        check_pair(f"{path}: {key}", *pair)
        yield name, *layer, pair
    if biased := [key for key in rest if key.endswith(".bias")]:
        raise ValueError(f"{path} is a control LoRA, or another with biases ({named(biased)}), which is not "
                         "supported: plain LoRA only")
    if rest:
        warnings.warn(f"{path}: {len(rest)} changes of biases and norms are not used: {named(rest)}",
                      stacklevel=4)


def same_update(one: Pair | None, other: Pair | None) -> bool:
    """Do two pairs (None: no update) make the same update, up to the rounding of fp32?"""
    if one and other and all(map(torch.equal, one, other)):
        return True
    a, b = (pair[1] @ pair[0] if pair else torch.zeros(()) for pair in (one, other))
    return (a.shape == b.shape or not (one and other)) and bool((a - b).norm() <= 1e-5 * a.norm())


def check_model(path: Place, lora: Lora, config: FluxConfig) -> None:
    """ValueError unless every module of a LoRA is in this model and has the shape of its weight."""
    blocks = f"{config.depth} double and {config.depth_single_blocks} single blocks"
    shapes = {target.path: [target.rows, target.d_in] for target in targets_of(config, outside=True)}
    for part, (A, B) in lora.items():
        shape = [len(B), A.shape[1]]
        if part not in shapes:
            raise ValueError(f"{path}: {part} is not in this model, which has {blocks}{guess_model(lora)}")
        if part == "x_embedder" and shape[1] > config.in_channels:
            raise ValueError(f"{path} is a control LoRA ({part} of {shape[1]} channels instead of "
                             f"{config.in_channels}), which is not supported: plain LoRA only")
        if shapes[part] != shape:
            raise ValueError(f"{path}: {part} is {shape}, but {shapes[part]} in this model"
                             f"{guess_model(lora)}")


def load_lora(path: Place, config: FluxConfig | None = None) -> Lora:
    """LoRA file of any format -> {diffusers module path: (A (r, in), B (out, r))}, fp32, update = B A.

    `config`: the model that it must fit. What is not used (text encoders, embeddings, changes of biases and
    norms) is named in a warning. ValueError, in one line, for anything that is not wholly understood.
    """
    file, lora = open_lora(path), {}
    settings = peft_settings(Path(path), file.metadata() or {})
    pairs, changes = sort_keys(path, file)
    layers = []
    for name, module, parts, entry in group_keys(pairs):
        tensors = {kind: read_one(path, file, keys) for kind, keys in entry.items()}
        layers.append((name, module, parts, read_pair(path, name, tensors, settings)))
    layers += read_changes(path, file, changes)
    if not layers:
        raise ValueError(f"{path} holds no LoRA of the transformer: it changes at most biases and norms")
    for name, module, parts, (A, B) in layers:
        sizes = part_sizes(len(parts), len(B), A.shape[1])
        if sum(sizes) != len(B) or min(sizes) < 1 or (module == FINAL and len(B) % 2):
            raise ValueError(f"{path}: {name} cannot be [{len(B)}, {A.shape[1]}]")
        if module == FINAL:
            B = B.roll(len(B) // 2, 0)
        for part, pair in zip(parts, unfuse(A, B, sizes)):
            if part in lora and not same_update(lora[part], pair):
                raise ValueError(f"{path}: {part} is there twice, under two names, and they differ ({name})")
            lora[part] = lora.get(part) or pair
    lora = {part: pair for part, pair in lora.items() if pair}
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


def tensor_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file, of the same bytes for the same content.

    `save` puts the metadata in another order each time: they are put in order afterwards.
    """
    metadata = {encodable(name): encodable(text) for name, text in sorted(metadata.items())}
    data = save(tensors, metadata=metadata)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size]) | {"__metadata__": metadata}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(text) <= size, "the same header takes the same room"
    return data[:8] + text.ljust(size) + data[8 + size:]


def standard_metadata(lora: Lora, metadata: dict[str, str]) -> dict[str, str]:
    """What other programs show and search: the model (modelspec), rank and alpha (kohya's), trained words.

    No title from the path and no date: equal runs give equal bytes.
    """
    rank, words = max(len(A) for A, _ in lora.values()), metadata.get("prompt")
    kind = "schnell" if "schnell" in metadata.get("model", "") else "dev"
    facts = {"modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": f"flux-1-{kind}/lora",
             "modelspec.implementation": "https://github.com/black-forest-labs/flux",
             "modelspec.title": words or "LoRA", "ss_base_model_version": "flux1",
             "ss_network_module": "networks.lora_flux"}
    if words:
        facts |= {"modelspec.trigger_phrase": words, "ss_tag_frequency": json.dumps({"": {words: 1}})}
    # last, what is true of this file, whatever metadata came along: the scale is in B, so alpha is the rank
    own = {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank)), "format": "pt"}
    return facts | metadata | own


def save_lora(path: Place, lora: Lora, format: str = "diffusers", metadata: dict[str, str] | None = None,
              dtype: torch.dtype = torch.float16, mlp_ratio: float = FluxConfig.mlp_ratio) -> None:
    """Writes {diffusers module path: (A (r, in), B (out, r))} in one of FORMATS; the file is whole or absent.

    ValueError for a LoRA or a path that cannot be written. mlp_ratio: for the rows of an MLP without a LoRA.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}")
    write_whole(path, lora_bytes(lora, format, metadata, dtype, mlp_ratio, path))


def lora_bytes(lora: Lora, format: str = "diffusers", metadata: dict[str, str] | None = None,
               dtype: torch.dtype = torch.float16, mlp_ratio: float = FluxConfig.mlp_ratio,
               path: Place = "the LoRA") -> bytes:
    """What save_lora writes; `path` is for messages."""
    if format not in FORMATS:
        raise ValueError(f"there is no LoRA format {format!r}, only {', '.join(FORMATS)}")
    metadata = {key: text for key, text in (metadata or {}).items() if key != PEFT_METADATA}  # now it is in B
    if not all(isinstance(text, str) for text in (*metadata, *metadata.values())):
        raise ValueError(f"{path}: the metadata of a LoRA must be text, str to str")
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
    return tensor_bytes(tensors, standard_metadata(lora, metadata))

# LoMD -------------------------------------------------------------------------------------------------------

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
    tensors = {f"{k}.lomd": v.detach().float().cpu().contiguous() for k, v in lomd.items()}
    facts = {"format": "pt", "r1": str(r1), "targets": str(len(lomd))}
    write_whole(path, tensor_bytes(tensors, facts | metadata))


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
    if path:
        check_file(path, "LoMD")
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
    mine, name = flux_fingerprint(folder), metadata.get("model", "unnamed")
    theirs = metadata.get("model_fingerprint", mine)
    fits = is_copy(folder, theirs)
    if fits is None:
        note(f"{path}: whether this 8-bit copy is of the model it was trained on, {name}, cannot be known")
    try:
        check_lomd(lomd, targets_of(flux_files(folder)[1]))
        if fits is False:
            raise ValueError(f"it was trained on another model of this shape, {name}"
                             f" with fingerprint {theirs}; this one has {mine}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return lomd, f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}", metadata.get("random") == "true"

# LoRAs of a command line -----------------------------------------------------------------------------------

def split_lora(text: str, option: str = "--lora") -> tuple[str, float]:
    """`file[:strength]` -> (file, strength). File names may contain colons: an existing file wins."""
    path, _, strength = text.rpartition(":")
    if not Path(path).is_file() or Path(text).is_file():
        path, strength = text, "1"
    if not Path(path).is_file():
        raise ValueError(f"{option} {text}: {not_content(path) or 'there is no such file'}")
    try:
        return path, finite_number(strength)
    except ValueError:
        raise ValueError(f"{option} {text}: the strength {strength!r} is not a number") from None


def load_loras(files: list[tuple[str, float]], config: FluxConfig) -> list[tuple[dict, float]]:
    """(file, strength) -> (LoRA, strength), checked against the model; warnings become notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loras = [(load_lora(path, config), strength) for path, strength in files]
    for warning in caught:
        note(warning.message)
    return loras
