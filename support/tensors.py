"""Tensors of everybody's files: safetensors or GGUF, of one part or all in one, plain or quantised.

    files = TensorFiles([Path("t5xxl_fp8_e4m3fn_scaled.safetensors")], "t5")
    files["shared.weight"]                   # the values themselves, whatever is stored

A quantization that is not supported is refused by its name, not by the shapes it has.
"""
import json
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from support.common import not_content
from support.memory import E4M3, quantize

# prefixes of a part's names in all-in-one files; each key by itself has or lacks one
PREFIXES = {
    "transformer": ("model.diffusion_model.",),
    "autoencoder": ("vae.", "first_stage_model."),
    "clip": ("text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
    "t5": ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
}
OTHERS = ("model.diffusion_model.", "vae.", "first_stage_model.", "text_encoders.",
          "cond_stage_model.", "conditioner.", "model_ema.")
SCALES = ".scale_weight", ".weight_scale"        # of 8-bit weights: ComfyUI's, and those of others
SHARD = re.compile(r"-\d+-of-(?!0*1\D)\d+")      # in the name of a file that is not the only one
MARKS = "scaled_fp8", "comfy_quant", "scale_input", "input_scale"          # notes in 8-bit files
READ = "float8_e4m3fn", "float8_e5m2", "int8_tensorwise"                   # formats of comfy_quant
FORMATS = {                                      # part of a key -> the quantization that it shows
    ".wscales": "nunchaku (SVDQuant)",
    ".wtscale": "nunchaku (SVDQuant)",
    ".smooth_factor": "nunchaku (SVDQuant)",
    "bitsandbytes__nf4": "NF4 (bitsandbytes)",
    "bitsandbytes__fp4": "FP4 (bitsandbytes)",
    ".quant_map": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".SCB": "LLM.int8 (bitsandbytes)",
    ".weight_scale_2": "nvfp4",
    ".weight_global_scale": "nvfp4",
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "nunchaku (SVDQuant), GPTQ or AWQ",
    "._data": "optimum-quanto",
    "._weight_qdata": "torchao",
    ".biases": "MLX (mflux)",
    ".encoded_exponent": "DFloat11",
    ".svd_up": "SDNQ",
    ".float8_data": "flux-fp8-api",
}
INSTEAD = "take a copy in bf16, fp8 or GGUF Q8_0"
NORM = re.compile(r"(query|key)_norm\.weight$")  # ComfyUI's; the original names end in .scale
T5_GGUF = {
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "attn_norm": "0.layer_norm",
    "ffn_norm": "1.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
}


def is_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


class GgufFile:
    """A GGUF file with the methods of safe_open; the gguf package dequantizes each tensor."""
    def __init__(self, path: Path) -> None:
        if not find_spec("gguf"):
            raise ValueError(f"{path} is a GGUF file, which needs: pip install gguf")
        from gguf import GGUFReader
        try:
            reader = GGUFReader(path)
        except Exception as error:               # the package raises all sorts of things
            raise ValueError(f"{path} cannot be read as a GGUF file: {error}") from None
        self.path = path
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.fields = reader.fields
        one_of_each = {tensor.tensor_type: tensor for tensor in reader.tensors}
        for tensor in one_of_each.values():
            self.values(tensor, tensor.data[:1])             # refuses an unknown type right away

    def keys(self) -> list[str]:
        return [*self.tensors]

    def metadata(self) -> dict[str, str]:
        return {"config": self.fields["config"].contents()} if "config" in self.fields else {}

    def get_slice(self, name: str) -> SimpleNamespace:
        tensor = self.tensors[name]
        shape = [int(size) for size in reversed(tensor.shape)]           # innermost first in GGUF
        return SimpleNamespace(get_shape=lambda: shape, get_dtype=lambda: tensor.tensor_type.name)

    def values(self, tensor: Any, data: Any) -> Any:
        """Data of a tensor, dequantized to an array."""
        from gguf import dequantize
        try:
            return dequantize(data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise ValueError(f"{self.path}: the gguf package does not dequantise {kind} "
                             f"({tensor.name}): {INSTEAD}") from None

    def get_tensor(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        values = self.values(tensor, tensor.data).copy()
        return torch.from_numpy(values).view(self.get_slice(name).get_shape())


def open_tensors(path: Path) -> Any:
    """The open file; tensors are read on demand. ValueError names a torn or foreign file."""
    try:
        return GgufFile(path) if is_gguf(path) else safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        why = not_content(path) or f"{error}; if it is torn, download it again"
        raise ValueError(f"{path} cannot be read as a safetensors file: {why}") from None


def own_name(key: str, part: str) -> str | None:
    """A key of an all-in-one file -> its name in `part`; None: it belongs to another part."""
    for prefix in PREFIXES[part]:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return None if key.startswith(OTHERS) else key


def usual_name(name: str, part: str) -> str:
    """Our name of a tensor; other programs may have their own."""
    if part == "transformer":
        return NORM.sub(r"\1_norm.scale", name)
    if part == "t5" and (found := re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.weight", name)):
        return f"encoder.block.{found[1]}.layer.{T5_GGUF.get(found[2], found[2])}.weight"
    return {"token_embd.weight": "shared.weight",
            "enc.output_norm.weight": "encoder.final_layer_norm.weight"}.get(name, name)


class TensorFiles:
    """Tensors of one file, or of all shards of a folder, by name; read only when asked for.

    part: a key of PREFIXES. check: raise ValueError for an unsupported quantization.
    """
    def __init__(self, files: list[Path], part: str = "transformer", check: bool = True) -> None:
        if check and len(files) == 1 and SHARD.search(files[0].name):
            folder = files[0].parent
            raise ValueError(f"{files[0]} is one part of several: name its folder, {folder}")
        self.metadata = {}
        found = {}
        for path in files:
            file = open_tensors(path)
            self.metadata |= file.metadata() or {}
            found |= dict.fromkeys(file.keys(), file)
        self.path = files[0] if len(files) == 1 else files[0].parent
        self.whole = any(key.startswith(PREFIXES[part]) for key in found)
        self.key_of = {}
        self.file_of = {}
        for key, file in found.items():
            name = own_name(key, part) if self.whole else key
            if name is None:
                continue
            name = usual_name(name, part)
            if name in self.file_of:
                keys = f"{self.key_of[name]} and {key}"
                raise ValueError(f"{self.path} holds {name} twice: as {keys}")
            self.key_of[name] = key
            self.file_of[name] = file

        self.scales = {}
        marked = [name for name in self.file_of if name.endswith(MARKS)]
        for name in sorted(self.file_of):
            layer, dot, kind = name.rpartition(".")
            # a scale without its weight stays among the tensors, as an unexpected one
            if dot + kind in SCALES and f"{layer}.weight" in self.file_of:
                self.scales[f"{layer}.weight"] = name
        self.raw = {name: self.file_of.pop(name) for name in [*marked, *self.scales.values()]}
        if check:
            self.check_formats()

    def check_formats(self) -> None:
        """ValueError that names the format if a weight is stored in one that is not supported."""
        def refuse(kind: str, name: str) -> ValueError:
            return ValueError(f"{self.path} is quantised as {kind} ({name}), which is not read: "
                              f"{INSTEAD}")

        for piece, kind in FORMATS.items():
            for name in self.file_of:
                if piece in name:
                    raise refuse(kind, name)
        for layer, mark in self.marks().items():
            if mark.get("format") not in READ or mark.get("convrot"):
                rotated = " with rotated weights (convrot)" if mark.get("convrot") else ""
                raise refuse(f"{mark.get('format')}{rotated}", layer)
        for name in self.file_of:
            kind = self.slice(name).get_dtype()
            if kind in ("I8", "U8") and name not in self.scales:
                raise refuse("8-bit integers without scales", name)
        for name, scale in self.scales.items():
            shape, rows = self.slice(scale).get_shape(), self.shape(name)[0]
            exponents = self.slice(scale).get_dtype() in ("U8", "F8_E8M0")
            if exponents or shape not in ([], [1], [rows], [rows, 1], [1, 1]):
                kind = "mxfp8" if exponents else "blocks with scales"
                raise refuse(f"{kind}: scales {shape} of {rows} rows", scale)

    def marks(self) -> dict[str, dict]:
        """{layer: its comfy_quant, or its entry in the file's metadata}."""
        layers = {}
        try:
            if "_quantization_metadata" in self.metadata:
                layers |= json.loads(self.metadata["_quantization_metadata"])["layers"]
            for name in self.raw:
                if name.endswith(".comfy_quant"):
                    mark = self.tensor(name).view(torch.uint8).flatten()
                    layers[name] = json.loads(bytes(mark.tolist()))
            return {layer: mark | mark.get("params", {}) for layer, mark in layers.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: the marks of its quantised layers cannot be read: "
                             f"{error}") from None

    def slice(self, name: str) -> Any:
        return (self.raw if name in self.raw else self.file_of)[name].get_slice(self.key_of[name])

    def shape(self, name: str) -> list[int]:
        return self.slice(name).get_shape()

    def tensor(self, name: str) -> Tensor:
        """As stored."""
        return (self.raw if name in self.raw else self.file_of)[name].get_tensor(self.key_of[name])

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensor(name)
        if tensor.dtype.itemsize > 1 and name not in self.scales:
            return tensor
        return tensor.float() * self.scale(name)

    def scale(self, name: str) -> Tensor:
        """The factor of a weight: fp32, (1,), or (d_out, 1) with one for each row."""
        if name not in self.scales:
            return torch.ones(1)
        scale = self.tensor(self.scales[name]).float()
        return scale.view(-1, 1) if scale.numel() > 1 else scale.view(1)

    def quantized(
        self,
        names: list[str],
        device: str | torch.device = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """Stacks weights (.., d_in) -> float8_e4m3 (d_out, d_in) on `device`, and a scale (1, 1).

        Weights that have 8 bits already are kept, with scales (d_out, 1) if theirs differ."""
        parts = [self.tensor(name) for name in names]
        if any(part.dtype != E4M3 for part in parts):
            return quantize(torch.cat([self[name].to(device) for name in names]))
        rows = [self.scale(name).expand(len(part), 1) for name, part in zip(names, parts)]
        scales = torch.cat(rows)
        if (scales == scales[0]).all():
            scales = scales[:1]
        return torch.cat(parts).to(device), scales
