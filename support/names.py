"""FLUX.1's module names in both layouts, the Linears that a LoRA adapts, signs of other models.

The original layout fuses q, k, v (and the MLP's input) into one Linear; diffusers keeps a Linear
for each. This file imports nothing else of the project.
"""
import re
from typing import NamedTuple

from torch import nn


# original module -> diffusers modules, {} for a block's number; a fused layer stacks their rows
FLUX_NAMES = {}
for (original, diffusers), modules in {
    ("", ""): {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",         # diffusers: scale before shift
    },
    ("double_blocks.{}.", "transformer_blocks.{}."): {
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
        "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "img_attn.norm.query_norm": "attn.norm_q",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": "ff.net.0.proj",
        "txt_mlp.0": "ff_context.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.2": "ff_context.net.2",
    },
    ("single_blocks.{}.", "single_transformer_blocks.{}."): {
        "modulation.lin": "norm.linear",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
        "linear2": "proj_out",
    },
}.items():
    for name, parts in modules.items():
        FLUX_NAMES[original + name] = tuple(diffusers + part for part in parts.split())

FLUX_LINEARS = {name: parts for name, parts in FLUX_NAMES.items() if not name.endswith("_norm")}

AUTOENCODER_NAMES = (                            # original pattern, diffusers replacement
    (r"(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"(down|up)\.(\d+)\.(down|up)sample\.", r"\1_blocks.\2.\3samplers.0."),
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.", "mid_block.attentions.0."),
    (r"attentions\.0\.norm\.", "attentions.0.group_norm."),
    (r"attentions\.0\.([qkv])\.", r"attentions.0.to_\1."),
    (r"\.proj_out\.", ".to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."))

BLOCK = re.compile(r"blocks[._](0|[1-9]\d*)[._]")


def split_number(name: str) -> tuple[str, str]:
    """Module path -> its template, with {} for the block's number, and that number ("" if none)."""
    found = BLOCK.search(name)
    if not found:
        return name, ""
    return f"{name[:found.start(1)]}{{}}{name[found.end(1):]}", found[1]


def diffusers_flux_names(name: str) -> list[str]:
    """Parameter of Flux -> the diffusers parameters that are stacked in it."""
    module, _, kind = name.rpartition(".")
    template, number = split_number(module)
    kind = kind.replace("scale", "weight")
    return [f"{part.format(number)}.{kind}" for part in FLUX_NAMES[template]]


def diffusers_autoencoder_names(name: str, levels: int) -> list[str]:
    """Parameter of an AutoEncoder with `levels` resolutions -> the diffusers parameter."""
    for pattern, replacement in AUTOENCODER_NAMES:
        name = re.sub(pattern, replacement, name)
    # diffusers counts the upper levels from the top
    swap = lambda found: f"up_blocks.{levels - 1 - int(found[1])}"
    return [re.sub(r"up_blocks\.(\d+)", swap, name)]


def part_sizes(num_parts: int, rows: int, width: int) -> list[int]:
    """Rows of each part of a Linear: q, k, v are as wide as its input, the MLP gets the rest."""
    if num_parts == 1:
        return [rows]
    return [width] * 3 + [rows - 3 * width] * (num_parts - 3)


class Target(NamedTuple):
    """A Linear of the transformer as in diffusers: q, k, v, and the MLP's input are separate."""
    path: str             # diffusers module path
    module: str           # the Linear of Flux that contains it
    start: int            # first of its rows there
    rows: int             # d_out
    d_in: int


def find_targets(flux: nn.Module, outside: bool = False) -> list[Target]:
    """The Linears that a LoRA adapts: 14 in each double block, 6 in each single block.

    outside: also those outside the blocks."""
    targets = []
    for name, module in flux.named_modules():
        name = name.removesuffix(".base")        # an adapted Linear keeps its own as `base`
        if not isinstance(module, nn.Linear) or not (outside or "_blocks." in name):
            continue
        template, number = split_number(name)
        paths = FLUX_LINEARS[template]
        start = 0
        sizes = part_sizes(len(paths), module.out_features, module.in_features)
        for path, rows in zip(paths, sizes):
            targets.append(Target(path.format(number), name, start, rows, module.in_features))
            start += rows
    return targets


# patterns that only another model's names or metadata match; tried in this order
OTHER_MODELS = {
    "FLUX.2": r"(double|single)_stream_modulation|to_qkv_mlp_proj|[._]linear_(in|out)\b"
              r"|time_guidance_embed|single_transformer_blocks[._]\d+[._]attn[._]to_out[._]lora"
              r"|flux[-_. ]?2",
    "Qwen-Image": r"(img|txt)_mlp[._]net[._]|(img|txt)_mod[._]1\b|qwen",
    "HunyuanVideo": r"\.(img|txt)_attn_(qkv|proj|q|k|v)\b|(img|txt)_mlp[._]fc[12]"
                    r"|(img|txt)_mod[._]linear|modulation[._]linear|token_refiner|hunyuan",
    "Chroma": r"distilled_guidance_layer|chroma",
    "AuraFlow": r"joint_transformer_blocks|(double|single)_layers[._]",
    "SD3 or SD3.5": r"joint_blocks|context_block|x_block|sd[-_]?3|stable-diffusion-3",
    "Stable Diffusion 1.5 or 2": r"down_blocks[._]0[._]att|up_blocks[._]3[._]att",
    "SDXL": r"(in|out)put_blocks|middle_block|mid_block_attentions_0_transformer_blocks_[1-9]"
            r"|down_blocks[._]2[._]attentions[._]\d[._]transformer_blocks[._][1-9]",
    "SDXL or Stable Diffusion 1.5": r"(down|mid|up)_blocks?[._]",
    "HiDream": r"(double|single)_stream_blocks",
    "LTX-Video, CogVideoX, PixArt or Sana": r"transformer_blocks[._]\d+[._]attn1",
    "SD3.5": r"transformer_blocks[._]\d+[._]attn2",
    "Wan or Cosmos": r"\bblocks[._]\d+[._](self|cross)_attn|unet_blocks_",
    "Z-Image or Lumina": r"layers[._]\d+[._](attention|feed_forward)|(noise|context)_refiner",
}


def first_match(patterns: dict[str, str], texts: list[str]) -> tuple[str, str]:
    """{meaning: pattern} -> the first meaning that is found and the text with it, or ("", "")."""
    for meaning, pattern in patterns.items():
        for text in texts:
            if re.search(pattern, text, re.IGNORECASE):
                return meaning, text
    return "", ""
