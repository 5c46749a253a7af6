"""LoRA names and files: read what the usual programs write; write any of three formats.

    lora = load_lora("person.safetensors")           # {diffusers module path: (A, B)}, update = B A
    save_lora("person_kohya.safetensors", lora, "kohya")

    format     keys
    diffusers  transformer.<diffusers path>.lora_A.weight, .lora_B.weight      (PEFT, ai-toolkit)
    kohya      lora_unet_<original path, dots as _>.lora_down.weight, .lora_up.weight, .alpha
    original   diffusion_model.<original path>.lora_A.weight, .lora_B.weight   (ComfyUI)

Also read: .lora.down.weight, .lora_A.<adapter>.weight, prefixes in any mixture, the processors of
XLabs and USO, OneTrainer's parts of fused layers, fused layers of diffusers (to_qkv), DiffSynth's
names, ComfyUI's .diff. The same LoRA under two names counts once.

The original layout fuses q, k, v (and the MLP's input) into one Linear. Its LoRA gives every part
the same A and its own rows of B. LoRAs of the parts become one by stacking: A above A, B
block-diagonal, all padded with zeros to the largest rank; a part without a LoRA is all padding.
Reading undoes either, bit for bit.

The scale is alpha / rank, or 1 without alpha. PEFT keeps its alpha in diffusers' metadata or in
adapter_config.json. Unlike other loaders, this one raises an error for a key that it does not
recognize. Files without pairs (A, B), such as LoKr or DoRA, and LoRAs of other models are refused
by name. Pickles are never read.
"""
import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from flux_model import FluxConfig
from support.checkpoints import Place, flux_files, flux_fingerprint, targets_of
from support.common import check_file, encodable, finite_number, note, write_whole
from support.names import (FLUX_LINEARS, FLUX_NAMES, OTHER_MODELS, Target, first_match, part_sizes,
                           split_number)
from support.tensors import open_tensors

Pair = tuple[Tensor, Tensor]           # A (r, in) and B (out, r); the update of a weight is B A
Lora = dict[str, Pair]                 # by diffusers module paths
FORMATS = {
    "diffusers": ("transformer.", ".lora_A.weight", ".lora_B.weight"),
    "kohya": ("lora_unet_", ".lora_down.weight", ".lora_up.weight"),
    "original": ("diffusion_model.", ".lora_A.weight", ".lora_B.weight"),
}
PEFT_METADATA = "lora_adapter_metadata"

# Names ------------------------------------------------------------------------------------------

PREFIX = re.compile(
    r"^(base_model\.model\.)?(model\.)?"
    r"(transformer\.|diffusion_model\.|lora_unet_|lora_transformer_|lycoris_)?")
# .lora_A.weight, .lora_down.weight, .lora.down.weight, .lora_A.<adapter>.weight; XLabs writes
# .down.weight; ComfyUI changes whole tensors
ENDING = re.compile(
    r"\.(?P<A>lora_A|lora(?:_linear_layer)?[._]down|(?:(?<=_lora\.)|(?<=_lora[12]\.))down)"
    r"(?:\.[^.]+)?\.weight$"
    r"|\.(?P<B>lora_B|lora(?:_linear_layer)?[._]up|(?:(?<=_lora\.)|(?<=_lora[12]\.))up)"
    r"(?:\.[^.]+)?\.weight$"
    r"|\.(?P<alpha>alpha)$"
    r"|(?P<change>(?:\.scale)?\.(?:diff(?:_b)?|[wb]_norm|lora_(?:B|up)\.bias))$")
# what other programs call these: diffusers when it fuses them, OneTrainer, DiffSynth, XLabs and USO
ALIASES = {
    "img_in": "img_in.proj",
    "double_blocks.{}.img_attn.qkv":
        "transformer_blocks.{}.attn.to_qkv transformer_blocks.{}.attn.qkv blocks.{}.attn.a_to_qkv "
        "double_blocks.{}.processor.qkv_lora1",
    "double_blocks.{}.txt_attn.qkv":
        "transformer_blocks.{}.attn.to_added_qkv transformer_blocks.{}.attn.added_qkv "
        "blocks.{}.attn.b_to_qkv double_blocks.{}.processor.qkv_lora2",
    "double_blocks.{}.img_mod.lin": "blocks.{}.norm1_a.linear",
    "double_blocks.{}.txt_mod.lin": "blocks.{}.norm1_b.linear",
    "double_blocks.{}.img_attn.proj":
        "blocks.{}.attn.a_to_out double_blocks.{}.processor.proj_lora1",
    "double_blocks.{}.txt_attn.proj":
        "blocks.{}.attn.b_to_out double_blocks.{}.processor.proj_lora2",
    "double_blocks.{}.img_mlp.0": "blocks.{}.ff_a.0",
    "double_blocks.{}.img_mlp.2": "blocks.{}.ff_a.2",
    "double_blocks.{}.txt_mlp.0": "blocks.{}.ff_b.0",
    "double_blocks.{}.txt_mlp.2": "blocks.{}.ff_b.2",
    "single_blocks.{}.linear1_qkv":
        "single_transformer_blocks.{}.attn.to_qkv single_blocks.{}.processor.qkv_lora",
    "single_blocks.{}.linear1": "single_transformer_blocks.{}.qkv_mlp single_blocks.{}.to_qkv_mlp",
    "single_blocks.{}.modulation.lin": "single_blocks.{}.norm.linear",
    "single_blocks.{}.linear2": "single_blocks.{}.proj_out single_blocks.{}.processor.proj_lora",
}
LAYERS = {"single_blocks.{}.linear1_qkv": FLUX_LINEARS["single_blocks.{}.linear1"][:3]}
# every spelling of a module -> the diffusers modules whose rows, in turn, are its rows
SPELLINGS = {}
ORIGINAL_OF = {}
for original, parts in (LAYERS | FLUX_NAMES).items():
    if original in FLUX_LINEARS:
        ORIGINAL_OF |= dict.fromkeys(parts, original)
    SPELLINGS |= {part: (part,) for part in parts}
    for name in (original, *ALIASES.get(original, "").split()):
        SPELLINGS[name] = parts
        if len(parts) > 1:                       # OneTrainer numbers the parts of a fused layer
            SPELLINGS |= {f"{name}.{i}": (part,) for i, part in enumerate(parts)}
SPELLINGS |= {name.replace(".", "_"): parts for name, parts in SPELLINGS.items()}

# kinds of tensors that a LoRA may come with
UNUSED = {
    "text encoders":
        r"^(base_model\.model\.)?(text_encoders?(_\d)?\.|lora_te\d?_|(clip_[lg]|t5(xxl)?)\.)",
    "embeddings":
        r"^(bundle_emb\.|emb_params|(clip_[lg]|t5(xxl)?|text_encoders_\d)$)|string_to_param",
}
# kinds of files, by keys that are not recognized, in the order in which they are looked for
UNSUPPORTED = {
    "a whole model": r"(qkv|to_q|linear1|proj_mlp)\.weight$",
    "a LoKr": r"lokr_",
    "a LoHa": r"hada_",
    "a DoRA": r"dora|magnitude",
    "an OFT": r"[._]b?oft[._]",
    "a LoRA in nunchaku's layout": r"\.lora_(down|up)$",
    "a LoCon with a core": r"lora_mid",
    "a control LoRA": r"norm\.scale$|norm_(added_)?[qk]\.weight$|\.(reshape|set)_weight$|\.bias$",
    "an IP-Adapter": r"ip_adapter",
    "a ControlNet": r"controlnet",
}
UNSUPPORTED |= {f"a LoRA of {model}": pattern for model, pattern in OTHER_MODELS.items()}


def parse_key(key: str) -> tuple[str, tuple[str, ...], str] | None:
    """Key -> (module without its prefix, diffusers paths, kind); None: not recognized.

    The kind is "A", "B", "alpha", "change", or a key of UNUSED.
    """
    unused, _ = first_match(UNUSED, [key])
    if unused:
        return key, (), unused
    ending = ENDING.search(key)
    if not ending:
        return None
    name = PREFIX.sub("", key[:ending.start()])
    template, number = split_number(name)
    if template not in SPELLINGS:
        return None
    parts = tuple(part.format(number) for part in SPELLINGS[template])
    return name, parts, ending.lastgroup

# Fused layers -----------------------------------------------------------------------------------

def diagonal_blocks(B: Tensor, sizes: list[int]) -> list[Tensor]:
    """The blocks of a block-diagonal B, with as many columns for each part; [] for any other B."""
    count = len(sizes)
    if B.shape[1] % count:
        return []
    blocks = [rows.chunk(count, dim=1)[i] for i, rows in enumerate(B.split(sizes))]
    return blocks if torch.equal(torch.block_diag(*blocks), B) else []


def unfuse(A: Tensor, B: Tensor, sizes: list[int]) -> list[Pair]:
    """(A, B) of a Linear -> (A, B) of each part, of rank 0 for a part that is all padding."""
    blocks = diagonal_blocks(B, sizes)
    if len(sizes) == 1 or not blocks:
        return [(A.clone(), rows.clone()) for rows in B.split(sizes)]
    pairs = []
    for a, b in zip(A.chunk(len(sizes)), blocks):
        # padding is zero in both, a new LoRA only in B
        used = (a.any(dim=1) | b.any(dim=0)).nonzero()
        rank = int(used.max()) + 1 if len(used) else 0
        pairs.append((a[:rank].clone(), b[:, :rank].clone()))
    return pairs


def fuse(pairs: list[Pair]) -> Pair:
    """(A, B) of each part -> (A, B) of the Linear. The inverse of unfuse."""
    As, Bs = zip(*pairs)
    if all(torch.equal(A, As[0]) for A in As):
        B = torch.cat(Bs)
        # else reading would take it for the form below
        if not diagonal_blocks(B, [*map(len, Bs)]):
            return As[0], B
    rank = max(map(len, As))
    A = torch.cat([F.pad(A, (0, 0, 0, rank - len(A))) for A in As])
    return A, torch.block_diag(*(F.pad(B, (0, rank - B.shape[1])) for B in Bs))


def to_original(lora: Lora, mlp_ratio: float) -> Lora:
    """LoRA by diffusers paths -> by original module paths, the parts of fused layers together."""
    fused = {}
    for path, (A, B) in lora.items():
        part, number = split_number(path)
        original = ORIGINAL_OF[part]
        layer = original.format(number)
        if layer in fused:
            continue
        width = A.shape[1]
        pairs = []
        for template, rows in zip(FLUX_LINEARS[original], [width] * 3 + [int(mlp_ratio * width)]):
            absent = A[:0], A.new_zeros(rows, 0)
            pairs.append(lora.get(template.format(number), absent))
        sizes = {A.shape[1] for A, _ in pairs} | {len(B) for _, B in pairs[:3]}
        if len(pairs) > 1 and sizes != {width}:
            raise ValueError(f"{layer}: its parts do not fit together: {sorted(sizes)}")
        A, B = fuse(pairs)
        if "adaLN" in layer:     # diffusers has the halves, shift and scale, in the other order
            B = B.roll(len(B) // 2, 0)
        fused[layer] = A, B
    return fused

# Reading ----------------------------------------------------------------------------------------

def read_metadata(path: Place) -> dict[str, str]:
    """The metadata of a LoRA file. ValueError if it is not a safetensors file."""
    return open_tensors(path).metadata() or {}


def tell_replaced(path: Path, photo_digests: str):
    """Notes that the file in the place of a new LoRA is of other photos, or by other programs."""
    if path.is_file():
        try:
            found = read_metadata(path)
        except ValueError:
            found = {}
        if found.get("photo_digests") != photo_digests:
            note(f"{path} will be replaced: it is of {found.get('photos', 'something else')}")


def peft_alphas(path: Path, metadata: dict[str, str]) -> tuple[dict, float]:
    """PEFT's settings for modules without an alpha in the file: {pattern of names: alpha}, power.

    The first pattern that matches counts; the scale is alpha / rank ** power. The settings are in
    diffusers' metadata, or in adapter_config.json beside the file.
    """
    text = metadata.get(PEFT_METADATA)
    beside = path.with_name("adapter_config.json")
    alphas = {}
    try:
        if not text and path.name == "adapter_model.safetensors" and beside.is_file():
            path = beside
            text = beside.read_text("utf-8")
        settings = {name.removeprefix("transformer."): value
                    for name, value in json.loads(text or "{}").items()}
        if settings.get("use_dora") or settings.get("peft_type", "LORA") != "LORA":
            raise ValueError("only plain LoRA is supported, not DoRA or another type")
        patterns = dict(settings.get("alpha_pattern") or {})
        if settings.get("lora_alpha") is not None:
            patterns.setdefault(".*", settings["lora_alpha"])
        for pattern, alpha in patterns.items():
            alphas[re.compile(rf"(.*\.)?({pattern})$")] = float(alpha)
    except (AttributeError, RecursionError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"{path}: PEFT's settings cannot be used: {error}") from None
    return alphas, 0.5 if settings.get("use_rslora") else 1


def sort_keys(path: Place, file: Any) -> tuple[dict[str, tuple], dict[str, list[str]]]:
    """-> {module: (diffusers paths, {kind: keys})}, and {kind: keys that are not used}.

    Each key has a prefix of its own, so the halves of a LoRA may have different ones. ValueError
    for a key that is not recognized: says what the file is instead.
    """
    layers = {}
    unused = {}
    for key in sorted(file.keys()):
        name, parts, kind = parse_key(key) or (key, (), "unknown")
        if kind == "change":
            change = file.get_tensor(key).float()
            if not change.any():
                continue
            if key.endswith(".bias"):
                kind = "unknown"
            elif change.dim() < 2:
                kind = "biases and norms"
        if kind in ENDING.groupindex:            # "A", "B", "alpha" or "change"
            _, keys = layers.setdefault(key if kind == "change" else name, (parts, {}))
            keys.setdefault(kind, []).append(key)
        else:
            unused.setdefault(kind, []).append(key)
    unknown = unused.pop("unknown", [])
    metadata = file.metadata() or {}
    said = [metadata[field] for field in ("modelspec.architecture", "ss_base_model_version")
            if field in metadata]
    kind, found = first_match(UNSUPPORTED, unknown + said)
    if kind:
        raise ValueError(f"{path} is {kind} ({found!r}), which is not supported: "
                         "only plain LoRAs of FLUX.1 are")
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} of {len(file.keys())} keys are not those of a "
                         f"FLUX LoRA: {unknown[0]!r}; its metadata say {said or 'nothing'}")
    return layers, unused


def read_one(path: Place, file: Any, keys: list[str]) -> Tensor:
    """The tensor that all these keys hold."""
    first, *others = map(file.get_tensor, keys)
    for other in others:
        if not torch.equal(first.float(), other.float()):
            raise ValueError(f"{path}: {keys[0]!r} is there twice, with two endings or prefixes "
                             f"({keys[1]!r}), and they differ")
    return first


def check_pair(where: str, A: Tensor, B: Tensor):
    if not (A.dim() == B.dim() == 2 and len(A) == B.shape[1] > 0):
        raise ValueError(f"{where}: A {list(A.shape)} and B {list(B.shape)} are not (r, in) and "
                         "(out, r)")
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError(f"{where} holds values that are not finite (in {A.dtype})")


def read_pair(
    path: Place,
    name: str,
    tensors: dict[str, Tensor],
    peft: tuple[dict, float],
) -> Pair:
    """A (r, in) and B (out, r), fp32, with the scale in B. peft: what peft_alphas returned."""
    where = f"{path}: {name}"
    if "change" in tensors:
        change = tensors["change"].float()
        unit = torch.eye(min(change.shape))
        pair = (change, unit) if len(change) < change.shape[1] else (unit, change)
        check_pair(where, *pair)
        return pair
    if not {"A", "B"} <= tensors.keys():
        raise ValueError(f"{where} has only {' and '.join(tensors)}: a LoRA has A and B")
    A = tensors["A"]
    B = tensors["B"]
    if not (A.is_floating_point() and B.is_floating_point()):
        raise ValueError(f"{where} is in {A.dtype}: quantized LoRAs are not supported")
    A = A.float()
    B = B.float()
    check_pair(where, A, B)
    alphas, power = peft
    matching = (alpha for pattern, alpha in alphas.items() if pattern.match(name))
    rank = len(A) ** power
    scale = next(matching, rank) / rank
    if "alpha" in tensors:
        alpha = tensors["alpha"]
        if alpha.numel() != 1:
            raise ValueError(f"{where}: its alpha is {list(alpha.shape)}, not one number")
        scale = float(alpha) / len(A)
    B = B * scale
    check_pair(f"{where}, scaled by {scale},", A, B)
    return A, B


def same_update(one: Pair, other: Pair) -> bool:
    """Do two pairs make the same update, up to the rounding of fp32?"""
    a = one[1] @ one[0]
    b = other[1] @ other[0]
    return a.shape == b.shape and bool((a - b).norm() <= 1e-5 * a.norm())


def check_shapes(what: object, found: dict[str, object], wanted: dict[str, list[int]]):
    """ValueError unless a model has all these matrices, with these shapes."""
    for name, shape in found.items():
        expected = wanted.get(name, "absent")
        if shape != expected:
            hint = " (is it a control LoRA?)" if name == "x_embedder" else ""
            raise ValueError(f"{what}: {name} is {shape}, but {expected} in this model{hint}")


def load_lora(path: Place, config: FluxConfig | None = None) -> Lora:
    """LoRA file of any format -> {diffusers module path: (A (r, in), B (out, r))}, fp32.

    config: the model that it must fit. What is not used (text encoders, embeddings, changes of
    biases and norms) is named in a note. ValueError, in one line, for anything that is not wholly
    understood.
    """
    check_file(path, "LoRA file")
    file = open_tensors(path)
    layers, unused = sort_keys(path, file)
    peft = peft_alphas(Path(path), file.metadata() or {})
    lora = {}
    for name, (parts, keys) in layers.items():
        tensors = {kind: read_one(path, file, keys[kind]) for kind in keys}
        A, B = read_pair(path, name, tensors, peft=peft)
        some = 0 < len(keys.get("alpha", ())) < len(keys.get("A", ()))
        if some and tensors["alpha"] != len(A):
            raise ValueError(f"{path}: {name} is there twice, and only one has an alpha")
        if "adaLN" in name:
            B = B.roll(len(B) // 2, 0)           # as in to_original
        sizes = part_sizes(len(parts), len(B), A.shape[1])
        if sum(sizes) != len(B) or min(sizes) < 1:
            raise ValueError(f"{path}: {name} cannot be [{len(B)}, {A.shape[1]}]")
        for part, pair in zip(parts, unfuse(A, B, sizes)):
            if part in lora and not same_update(lora[part], pair):
                raise ValueError(f"{path}: {part} is there twice, under two names, and they differ "
                                 f"({name})")
            lora.setdefault(part, pair)
    lora = {part: pair for part, pair in lora.items() if len(pair[0])}
    if not lora:
        kinds = f", of {' and '.join(unused)}" if unused else ""
        raise ValueError(f"{path} holds no LoRA of the transformer: it has "
                         f"{len(file.keys()) or 'no'} tensors{kinds}")
    if config:
        targets = targets_of(config, outside=True)
        found = {part: [len(B), A.shape[1]] for part, (A, B) in lora.items()}
        check_shapes(path, found, {target.path: [target.rows, target.d_in] for target in targets})
    for kind, keys in unused.items():
        note(f"{path}: {len(keys)} tensors of {kind} are not used: {keys[0]!r}")
    return lora

# Writing ----------------------------------------------------------------------------------------

def tensor_bytes(tensors: dict[str, Tensor], metadata: dict[str, object]) -> bytes:
    """A safetensors file. `save` would order the metadata differently each time."""
    data = save(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    texts = {encodable(name): encodable(metadata[name]) for name in sorted(metadata)}
    header = json.dumps({"__metadata__": texts} | json.loads(data[8:start])).encode()
    header += b" " * (-len(header) % 8)          # data starts at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + data[start:]


def standard_metadata(rank: int, metadata: dict[str, object]) -> dict[str, object]:
    """What other programs show and search: model (modelspec), rank and alpha (kohya), prompt.

    No title from the path and no date: equal runs give equal bytes.
    """
    words = metadata.get("prompt")
    kind = "schnell" if "schnell" in metadata.get("model", "").lower() else "dev"
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
    facts |= metadata
    # the scale is in B: alpha is the rank, whatever metadata came along
    facts |= {"ss_network_dim": rank, "ss_network_alpha": float(rank), "format": "pt"}
    facts.pop(PEFT_METADATA, None)
    return facts


def save_lora(
    path: Place,
    lora: Lora,
    format: str = "diffusers",
    metadata: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
    mlp_ratio: float = FluxConfig.mlp_ratio,
):
    """Writes {diffusers module path: (A (r, in), B (out, r))} in one of FORMATS.

    The file is whole or absent. mlp_ratio gives the rows of an MLP without a LoRA. ValueError or
    OSError if the LoRA cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no LoRA format {format!r}, only {', '.join(FORMATS)}")
    if not lora:
        raise ValueError(f"{path}: there is no LoRA to save")
    cast = {}
    for name, pair in lora.items():
        if split_number(name)[0] not in ORIGINAL_OF:
            raise ValueError(f"{path}: no Linear of FLUX has the diffusers path {name!r}")
        # values that are too large for the type become infinite
        A, B = (x.detach().to("cpu", dtype, copy=True).contiguous() for x in pair)
        check_pair(f"{path}: {name}", A, B)
        cast[name] = (A, B)
    facts = standard_metadata(max(len(A) for A, _ in cast.values()), metadata or {})
    if format != "diffusers":
        cast = to_original(cast, mlp_ratio)
    prefix, down, up = FORMATS[format]
    tensors = {}
    for name, (A, B) in cast.items():
        if format == "kohya":
            name = name.replace(".", "_")
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(float(len(A)))         # scale 1
        tensors[prefix + name + down] = A
        tensors[prefix + name + up] = B
    write_whole(path, tensor_bytes(tensors, facts))

# LoMD -------------------------------------------------------------------------------------------

def check_lomd(lomd: dict[str, Tensor], targets: list[Target], what: str = "this LoMD"):
    """ValueError, naming the first difference, if a LoMD does not fit a model."""
    first = next(iter(lomd.values()))
    r1 = max([1, *first.shape[:1]])
    wanted = {target.path: [r1, target.d_in] for target in targets}
    found = dict.fromkeys(wanted, "absent") | {path: list(A.shape) for path, A in lomd.items()}
    check_shapes(what, found, wanted)


def save_lomd(path: Place, lomd: dict[str, Tensor], metadata: dict[str, object]):
    """Writes {diffusers path: (r1, d_in)} as <path>.lomd, in fp32; the file is whole or absent."""
    tensors = {}
    for name, A in lomd.items():
        tensors[f"{name}.lomd"] = A.detach().float().cpu().contiguous()
    facts = {"format": "pt", "r1": len(A), "targets": len(lomd)}
    write_whole(path, tensor_bytes(tensors, facts | metadata))


def load_lomd(path: Place) -> tuple[dict[str, Tensor], dict[str, str]]:
    """LoMD and metadata of a file by save_lomd. ValueError, in one line, for any other file."""
    file = open_tensors(path)
    lomd = {}
    for key in file.keys():
        if not key.endswith(".lomd"):
            raise ValueError(f"{path} is not a LoMD file: it holds {key}")
        A = file.get_tensor(key).float()
        if not A.isfinite().all():
            raise ValueError(f"{path}: {key} has values that are not finite")
        lomd[key.removesuffix(".lomd")] = A
    if not lomd:
        raise ValueError(f"{path} is not a LoMD file: it is empty")
    return lomd, file.metadata() or {}


def find_lomd(folder: Place | None, path: Place | None) -> Path:
    """The LoMD's file: `path`, else in a model's folder (None: not there yet), else in this one."""
    if path:
        check_file(path, "LoMD")
        return Path(path)
    places = [Path(home, "lomd.safetensors") for home in (folder, ".") if home]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"no LoMD {' or ./'.join(map(str, places))}: train one with meta_train.py, "
                     "name yours with --lomd, or train a plain LoRA with --method lora")


def read_lomd(folder: Place, path: Place | None = None) -> tuple[dict[str, Tensor], str]:
    """The LoMD for the model in `folder` -> {path: (r1, d_in)} and its hash. Notes a random one."""
    path = find_lomd(folder, path)
    lomd, metadata = load_lomd(path)
    check_lomd(lomd, targets_of(flux_files(folder)[1]), str(path))
    model = metadata.get("model", "unnamed")
    mine = flux_fingerprint(folder)
    theirs = metadata.get("model_fingerprint", mine)
    if mine != theirs:
        if "e5m2" not in mine + theirs:
            raise ValueError(f"{path}: it was trained on another model of this shape, {model} with "
                             f"fingerprint {theirs}; this one has {mine}")
        note(f"{path}: it cannot be known whether this 8-bit copy is of the model that it was "
             f"trained on, {model}")
    name = f"sha256 {sha256(path.read_bytes()).hexdigest()}"
    if metadata.get("random") == "true":
        note("this LoMD is random and was never trained")
        name = f"random, {name}"
    return lomd, name

# LoRAs of a command line ------------------------------------------------------------------------

def split_lora(text: str, option: str = "--lora") -> tuple[str, float]:
    """`file[:strength]` -> (file, strength). Names may contain colons: an existing file wins."""
    path, _, strength = text.rpartition(":")
    if not Path(path).is_file() or Path(text).is_file():
        path = text
        strength = "1"
    check_file(path, f"file for {option}")
    try:
        return path, finite_number(strength)
    except ValueError:
        raise ValueError(f"{option} {text}: the strength {strength!r} is not a number") from None


def load_loras(files: list[tuple[str, float]], config: FluxConfig) -> list[tuple[Lora, float]]:
    """(file, strength) -> (LoRA, strength), checked against the model."""
    return [(load_lora(path, config), strength) for path, strength in files]
