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
from support.names import (FINAL, FLUX_LINEARS, FLUX_NAMES, OTHER_MODELS, Target, first_match, part_sizes,
                           split_number)

Pair = tuple[Tensor, Tensor]                     # A (r, in) and B (out, r); the update of a weight is B A
Lora = dict[str, Pair]                           # by diffusers module paths
Layer = tuple[str, tuple[str, ...]]              # a module, and the diffusers paths its rows are of
WRITTEN = {
    "diffusers": ("transformer.", ".lora_A.weight", ".lora_B.weight"),
    "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight"),
    "original": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
}
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
ORIGINAL_OF = {}
for original, parts in FLUX_LINEARS.items():
    ORIGINAL_OF |= dict.fromkeys(parts, original)

# Names ------------------------------------------------------------------------------------------------------

def spellings(layers: dict[str, Layer]) -> dict[str, Layer]:
    """{spelling: layer} with dots, and with underscores."""
    return layers | {name.replace(".", "_"): layer for name, layer in layers.items()}


# every spelling of a module -> its template, and the diffusers templates whose rows, in turn, are its rows
OWN = {original: (original, parts) for original, parts in FLUX_LINEARS.items()}
OWN |= {part: (part, (part,)) for part in ORIGINAL_OF}
NAMES = spellings(OWN)
SINGLE_QKV = ("single_blocks.{}.linear1_qkv", FLUX_LINEARS["single_blocks.{}.linear1"][:3])
# what single programs call these: diffusers fused ones, OneTrainer the same in backups, DiffSynth all
MORE = {}
for original, names in {
    "img_in": "img_in.proj",
    "double_blocks.{}.img_attn.qkv":
        "transformer_blocks.{}.attn.to_qkv transformer_blocks.{}.attn.qkv blocks.{}.attn.a_to_qkv",
    "double_blocks.{}.txt_attn.qkv":
        "transformer_blocks.{}.attn.to_added_qkv transformer_blocks.{}.attn.added_qkv "
        "blocks.{}.attn.b_to_qkv",
    "double_blocks.{}.img_mod.lin": "blocks.{}.norm1_a.linear",
    "double_blocks.{}.txt_mod.lin": "blocks.{}.norm1_b.linear",
    "double_blocks.{}.img_attn.proj": "blocks.{}.attn.a_to_out",
    "double_blocks.{}.txt_attn.proj": "blocks.{}.attn.b_to_out",
    "double_blocks.{}.img_mlp.0": "blocks.{}.ff_a.0",
    "double_blocks.{}.img_mlp.2": "blocks.{}.ff_a.2",
    "double_blocks.{}.txt_mlp.0": "blocks.{}.ff_b.0",
    "double_blocks.{}.txt_mlp.2": "blocks.{}.ff_b.2",
    "single_blocks.{}.linear1": "single_transformer_blocks.{}.qkv_mlp single_blocks.{}.to_qkv_mlp",
    "single_blocks.{}.modulation.lin": "single_blocks.{}.norm.linear",
    "single_blocks.{}.linear2": "single_blocks.{}.proj_out",
}.items():
    MORE |= dict.fromkeys(names.split(), OWN[original])
# OneTrainer numbers the parts of a fused layer
for name, (_, parts) in (OWN | MORE).items():
    if len(parts) > 1:
        MORE |= {f"{name}.{i}": (part, (part,)) for i, part in enumerate(parts)}
# XLabs and USO name processors, 1 of the image stream and 2 of the text's
for i, stream in enumerate(("img", "txt"), start=1):
    for layer in ("qkv", "proj"):
        own = OWN[f"double_blocks.{{}}.{stream}_attn.{layer}"]
        MORE[f"double_blocks.{{}}.processor.{layer}_lora{i}"] = own
MORE["single_blocks.{}.processor.proj_lora"] = OWN["single_blocks.{}.linear2"]
MORE["single_blocks.{}.processor.qkv_lora"] = SINGLE_QKV
MORE["single_transformer_blocks.{}.attn.to_qkv"] = SINGLE_QKV
MORE[SINGLE_QKV[0]] = SINGLE_QKV
LINEARS = NAMES | spellings(MORE)
NORMS = {}
for original in FLUX_NAMES.keys() - FLUX_LINEARS.keys():
    for name in (original, *FLUX_NAMES[original]):
        NORMS[name] = (name, ())
NORMS = spellings(NORMS)


def bare(name: str) -> str:
    """A module's name without the prefix of its program."""
    return name[PREFIX.match(name).end():]


def find_layer(name: str, names: dict[str, Layer]) -> Layer | None:
    spelling, number = split_number(bare(name))
    if spelling not in names:
        return None
    template, parts = names[spelling]
    return template.replace("{}", number), tuple(part.format(number) for part in parts)


def parse_key(key: str) -> tuple[str, str, tuple[str, ...], str] | None:
    """Key -> (key without its ending, module, diffusers paths, "A" | "B" | "alpha"); None: not recognised."""
    ending = ENDING.search(key)
    if not ending:
        return None
    name = key[:ending.start()]
    layer = find_layer(name, LINEARS)
    is_processors = ".processor." in name
    if not layer or (ending[0] in (".down.weight", ".up.weight") and not is_processors):
        return None
    return name, *layer, KINDS[ending[1] or ending[2] or ending[3]]


def is_change(key: str) -> bool:
    """Is it a whole tensor that is added to a weight, a bias or a norm of FLUX, as ComfyUI writes it?"""
    ending = CHANGE.search(key)
    return bool(ending and find_layer(key[:ending.start()], LINEARS | NORMS))


def named(names: list[str]) -> str:
    more = len(names) - 1
    return f"{names[0]!r} and {more} more" if more else repr(names[0])

# Fused layers -----------------------------------------------------------------------------------------------

def is_stacked(B: Tensor, sizes: list[int]) -> bool:
    """Is B block-diagonal, with the same number of columns for each part?"""
    rank, rest = divmod(B.shape[1], len(sizes))
    if rest:
        return False
    blocks = [torch.ones(size, rank) for size in sizes]
    return not B[torch.block_diag(*blocks) == 0].any()


def unfuse(A: Tensor, B: Tensor, sizes: list[int]) -> list[Pair | None]:
    """(A, B) of a Linear -> (A, B) of each part; None for a part that is all padding."""
    if len(sizes) == 1:
        return [(A, B)]
    if not is_stacked(B, sizes):
        return [(A.clone(), block.clone()) for block in B.split(sizes)]
    pairs = []
    rank = len(A) // len(sizes)
    for i, rows in enumerate(B.split(sizes)):
        own = slice(i * rank, (i + 1) * rank)
        a, b = A[own], rows[:, own]
        # padding is zero in both, a new LoRA only in B
        used = (a.any(dim=1) | b.any(dim=0)).nonzero()
        if len(used):
            last = int(used.max()) + 1
            pairs.append((a[:last].clone(), b[:, :last].clone()))
        else:
            pairs.append(None)
    return pairs


def fuse(pairs: list[Pair | None], sizes: list[int]) -> Pair:
    """(A, B) of each part (None: it has no LoRA) -> (A, B) of the Linear. The inverse of unfuse."""
    there = [pair for pair in pairs if pair]
    first = there[0][0]
    if len(there) == len(pairs) and all(torch.equal(A, first) for A, _ in pairs):
        B = torch.cat([B for _, B in pairs])
        if not is_stacked(B, sizes):                       # else reading would take it for the form below
            return first, B
    rank = max(len(A) for A, _ in there)
    As, Bs = [], []
    for pair, size in zip(pairs, sizes):
        A, B = pair or (first[:0], first.new_zeros(size, 0))
        missing = rank - len(A)
        As.append(F.pad(A, (0, 0, 0, missing)))
        Bs.append(F.pad(B, (0, missing)))
    return torch.cat(As), torch.block_diag(*Bs)

# What is no LoRA of FLUX.1 ----------------------------------------------------------------------------------

# kinds of file, by keys that are not recognised, in the order in which they are looked for
UNSUPPORTED = {
    "a whole model": r"(qkv|to_q|linear1|proj_mlp)\.weight$",
    "a LoKr": r"lokr_",
    "a LoHa": r"hada_",
    "a DoRA": r"dora|magnitude",
    "an OFT": r"[._]b?oft[._]",
    "a VeRA": r"vera_",
    "a LoRA in nunchaku's layout": r"\.lora_(down|up)$",
    "a LoCon with a core": r"lora_mid",
    "an IA3": r"\.on_input$",
    "a GLoRA": r"\.[ab][12]\.",
    "a control LoRA": r"norm\.scale$|norm_(added_)?[qk]\.weight$|\.(reshape|set)_weight$",
    "an IP-Adapter": r"ip_adapter",
    "a ControlNet": r"controlnet",
}


def check_kind(path: Place, keys: list[str], unknown: list[str], metadata: dict[str, str]) -> None:
    """ValueError that says what a file is that is not wholly a LoRA of FLUX.1."""
    kind, found = first_match(UNSUPPORTED, unknown)
    if kind:
        raise ValueError(f"{path} is {kind} ({named(found)}), which is not supported: plain LoRA only")
    fields = "modelspec.architecture", "ss_base_model_version"
    said = [metadata[field] for field in fields if field in metadata]
    model, found = first_match(OTHER_MODELS, unknown + said)
    if model:
        raise ValueError(f"{path} is a LoRA of {model}, not of FLUX.1 (it has {named(found)})")
    if unknown:
        hint = f"; its metadata say {said[0]!r}" if said else ""
        raise ValueError(f"{path}: {len(unknown)} of {len(keys)} keys are of no FLUX LoRA: "
                         f"{named(unknown)}{hint}")

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
        alphas = settings.get("alpha_pattern") or {}
        settings["alpha_pattern"] = {
            re.compile(rf"(.*\.)?({pattern})$"): float(alpha) for pattern, alpha in alphas.items()}
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
    for pattern, own in settings.get("alpha_pattern", {}).items():
        if pattern.match(bare(name)):
            alpha = own
            break
    if alpha is not None and settings.get("use_rslora"):
        alpha *= rank ** 0.5
    return alpha


def sort_keys(path: Place, file: safe_open) -> tuple[list[str], list[str]]:
    """The keys of pairs, and those of whole changes that are not zero. ValueError for what is no LoRA."""
    all_keys = sorted(file.keys())
    texts = [key for key in all_keys if TEXT_ENCODER.match(key)]
    embeddings = [key for key in all_keys if EMBEDDING.match(key) and key not in texts]
    keys = sorted({*all_keys} - {*texts, *embeddings})
    if not keys:
        kinds = {"text encoders": texts, "embeddings": embeddings}
        what = " and ".join(kind for kind, found in kinds.items() if found)
        what = f", all of {what}, which are not used" if what else ""
        raise ValueError(f"{path} holds no LoRA of the transformer: it has {len(all_keys) or 'no'} "
                         f"tensors{what}")
    pairs = [key for key in keys if parse_key(key)]
    changes = [key for key in keys if is_change(key)]
    unknown = sorted({*keys} - {*pairs, *changes})
    check_kind(path, keys, unknown, file.metadata() or {})
    if texts:
        warnings.warn(f"{path}: {len(texts)} tensors of text encoders are not used", stacklevel=4)
    if embeddings:
        warnings.warn(f"{path}: {len(embeddings)} tensors of embeddings are not used: {named(embeddings)}",
                      stacklevel=4)
    return pairs, [key for key in changes if file.get_tensor(key).float().any()]


def group_keys(keys: list[str]) -> Iterator[tuple[str, str, tuple[str, ...], dict[str, list[str]]]]:
    """Yields (name, module, parts, {"A" | "B" | "alpha": keys}) of each LoRA of a module.

    A module may have several, under several prefixes. Where one of them is not whole, they are one: a prefix
    is a single key's.
    """
    modules = {}
    for key in keys:
        name, *layer, kind = parse_key(key)
        loras = modules.setdefault(tuple(layer), {})
        loras.setdefault(name, {}).setdefault(kind, []).append(key)
    for layer, loras in modules.items():
        if not all({"A", "B"} <= lora.keys() for lora in loras.values()):
            together = {}
            for lora in loras.values():
                for kind, found in lora.items():
                    together.setdefault(kind, []).extend(found)
            loras = {next(iter(loras)): together}
        for name, lora in loras.items():
            yield name, *layer, lora


def read_one(path: Place, file: safe_open, keys: list[str]) -> Tensor:
    """The tensor that all these keys hold."""
    first, *others = map(file.get_tensor, keys)
    for other in others:
        if first.shape != other.shape or not torch.equal(first.float(), other.float()):
            raise ValueError(f"{path}: {keys[0]!r} is there twice, with two endings or prefixes "
                             f"({keys[1]!r}), and they differ")
    return first


def check_pair(where: str, A: Tensor, B: Tensor) -> None:
    fit = A.dim() == B.dim() == 2 and len(A) == B.shape[1] > 0
    if not fit:
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
    a = one[1] @ one[0] if one else torch.zeros(())
    b = other[1] @ other[0] if other else torch.zeros(())
    if one and other and a.shape != b.shape:
        return False
    return bool((a - b).norm() <= 1e-5 * a.norm())


def check_model(path: Place, lora: Lora, config: FluxConfig) -> None:
    """ValueError unless every module of a LoRA is in this model and has the shape of its weight."""
    blocks = f"{config.depth} double and {config.depth_single_blocks} single blocks"
    shapes = {target.path: [target.rows, target.d_in] for target in targets_of(config, outside=True)}
    for part, (A, B) in lora.items():
        shape = [len(B), A.shape[1]]
        if part not in shapes:
            raise ValueError(f"{path}: {part} is not in this model, which has {blocks}")
        if part == "x_embedder" and shape[1] > config.in_channels:
            raise ValueError(f"{path} is a control LoRA ({part} of {shape[1]} channels instead of "
                             f"{config.in_channels}), which is not supported: plain LoRA only")
        if shapes[part] != shape:
            raise ValueError(f"{path}: {part} is {shape}, but {shapes[part]} in this model")


def load_lora(path: Place, config: FluxConfig | None = None) -> Lora:
    """LoRA file of any format -> {diffusers module path: (A (r, in), B (out, r))}, fp32, update = B A.

    `config`: the model that it must fit. What is not used (text encoders, embeddings, changes of biases and
    norms) is named in a warning. ValueError, in one line, for anything that is not wholly understood.
    """
    file = open_lora(path)
    settings = peft_settings(Path(path), file.metadata() or {})
    pairs, changes = sort_keys(path, file)
    layers = []
    for name, module, parts, entry in group_keys(pairs):
        tensors = {kind: read_one(path, file, keys) for kind, keys in entry.items()}
        layers.append((name, module, parts, read_pair(path, name, tensors, settings)))
    layers += read_changes(path, file, changes)
    if not layers:
        raise ValueError(f"{path} holds no LoRA of the transformer: it changes at most biases and norms")
    lora = {}
    for name, module, parts, (A, B) in layers:
        rows, width = len(B), A.shape[1]
        sizes = part_sizes(len(parts), rows, width)
        if sum(sizes) != rows or min(sizes) < 1 or (module == FINAL and rows % 2):
            raise ValueError(f"{path}: {name} cannot be [{rows}, {width}]")
        if module == FINAL:
            B = swap_halves(B)
        for part, pair in zip(parts, unfuse(A, B, sizes)):
            if part in lora and not same_update(lora[part], pair):
                raise ValueError(f"{path}: {part} is there twice, under two names, and they differ ({name})")
            lora[part] = lora.get(part) or pair
    lora = {part: pair for part, pair in lora.items() if pair}
    if config:
        check_model(path, lora, config)
    return lora


def swap_halves(B: Tensor) -> Tensor:
    """Of the final modulation: shift and scale, which diffusers has the other way round."""
    return B.roll(len(B) // 2, 0)

# Writing ----------------------------------------------------------------------------------------------------

def to_original(lora: Lora, mlp_ratio: float) -> Lora:
    """LoRA by diffusers paths -> by original module paths, the parts of fused layers together."""
    layers = {}
    for path in lora:
        part, number = split_number(path)
        original = ORIGINAL_OF[part]
        layers[original.format(number)] = [part.format(number) for part in FLUX_LINEARS[original]]
    fused = {}
    for layer, paths in layers.items():
        pairs = [lora.get(path) for path in paths]
        there = [[len(B), A.shape[1]] for A, B in filter(None, pairs)]
        width = there[0][1]
        last = len(pairs[-1][1]) if pairs[-1] else int(mlp_ratio * width)
        rows = last if len(pairs) == 1 else 3 * width + last
        sizes = part_sizes(len(pairs), rows, width)
        if there != [[size, width] for size, pair in zip(sizes, pairs) if pair]:
            raise ValueError(f"{layer}: its parts do not fit together: {there}")
        A, B = fuse(pairs, sizes)
        fused[layer] = (A, swap_halves(B) if layer == FINAL else B)
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
    rank = max(len(A) for A, _ in lora.values())
    words = metadata.get("prompt")
    kind = "schnell" if "schnell" in metadata.get("model", "") else "dev"
    facts = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"flux-1-{kind}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.title": words or "LoRA",
        "ss_base_model_version": "flux1",
        "ss_network_module": "networks.lora_flux",
    }
    if words:
        facts["modelspec.trigger_phrase"] = words
        facts["ss_tag_frequency"] = json.dumps({"": {words: 1}})
    # last, what is true of this file, whatever metadata came along: the scale is in B, so alpha is the rank
    own = {
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(rank)),
        "format": "pt",
    }
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
    metadata = dict(metadata or {})
    metadata.pop(PEFT_METADATA, None)                       # its scale is in B now
    if not all(isinstance(text, str) for text in (*metadata, *metadata.values())):
        raise ValueError(f"{path}: the metadata of a LoRA must be text, str to str")
    if not lora:
        raise ValueError(f"{path}: there is no LoRA to save")
    if unknown := [name for name in lora if split_number(name)[0] not in ORIGINAL_OF]:
        raise ValueError(f"{path}: no Linear of FLUX has the diffusers path {named(unknown)}")
    pairs = {}
    for name, (A, B) in lora.items():
        A = A.detach().to("cpu", dtype)                     # what is too large for it becomes infinite
        B = B.detach().to("cpu", dtype)
        check_pair(f"{path}: {name}", A, B)
        pairs[name] = [A, B]
    lora = pairs
    metadata = standard_metadata(lora, metadata)
    if format != "diffusers":
        lora = to_original(lora, mlp_ratio)
    prefix, down, up = WRITTEN[format]
    tensors = {}
    for name, (A, B) in lora.items():
        if format == "kohya":
            name = name.replace(".", "_")
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(float(len(A)))        # the rank: scale 1
        tensors[prefix + name + down] = A.clone().contiguous()
        tensors[prefix + name + up] = B.clone().contiguous()
    return tensor_bytes(tensors, metadata)

# LoMD -------------------------------------------------------------------------------------------------------

def check_lomd(lomd: dict[str, Tensor], targets: list[Target]) -> None:
    """ValueError, naming the first difference, where a LoMD is of another model."""
    d_in = {target.path: target.d_in for target in targets}
    odd = []
    for path in sorted(lomd.keys() ^ d_in.keys()):
        odd.append(f"{path} is {'not in the model' if path in lomd else 'missing from it'}")
    for path, A in lomd.items() if not odd else ():
        if A.dim() != 2 or len(A) == 0 or A.shape[1] != d_in[path]:
            odd.append(f"{path} is {list(A.shape)} instead of [r1, {d_in[path]}]")
    if odd:
        raise ValueError(f"this LoMD is of another model: {odd[0]}")
    ranks = sorted({len(A) for A in lomd.values()})
    if len(ranks) > 1:
        rows = " and ".join(map(str, ranks))
        raise ValueError(f"this LoMD has matrices of {rows} rows: all must have the same")


def save_lomd(path: Place, lomd: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes {diffusers path: (r1, d_in)} as <path>.lomd, in fp32; the file is whole or absent."""
    tensors = {}
    for name, A in lomd.items():
        tensors[f"{name}.lomd"] = A.detach().float().cpu().contiguous()
    facts = {"format": "pt", "r1": str(len(A)), "targets": str(len(lomd))}
    write_whole(path, tensor_bytes(tensors, facts | metadata))


def load_lomd(path: Place) -> tuple[dict[str, Tensor], dict[str, str]]:
    """LoMD and metadata of a file that save_lomd wrote. ValueError, in one line, for any other."""
    files = TensorFiles([Path(path)])
    if not files.places:
        raise ValueError(f"{path} is no LoMD file: it is empty")
    lomd = {}
    for key in files.places:
        if not key.endswith(".lomd"):
            raise ValueError(f"{path} is no LoMD file: it holds {key}")
        A = files[key].float()
        if not A.isfinite().all():
            raise ValueError(f"{path}: {key} is not finite")
        lomd[key.removesuffix(".lomd")] = A
    return lomd, files.metadata


def find_lomd(folder: Place | None, path: Place | None = None) -> Path:
    """The LoMD's file: `path`, else of a model's folder (None: not there yet), else of this one."""
    if path:
        check_file(path, "LoMD")
        return Path(path)
    places = [Path("lomd.safetensors")]
    if folder:
        places.insert(0, Path(folder) / "lomd.safetensors")
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"no LoMD {' or ./'.join(map(str, places))}: train one with meta_train.py, name "
                     "yours with --lomd, or train a plain LoRA with --method lora")


def read_lomd(folder: Place, path: Place | None = None) -> tuple[dict[str, Tensor], str, bool]:
    """The LoMD for the model in `folder` -> ({path: (r1, d_in)}, its hash, was it never trained?)."""
    path = find_lomd(folder, path)
    lomd, metadata = load_lomd(path)
    mine = flux_fingerprint(folder)
    name = metadata.get("model", "unnamed")
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
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return lomd, f"sha256 {digest}", metadata.get("random") == "true"

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
