"""Tensors of everybody's files: safetensors or GGUF, of one part or all in one, plain or quantized.

    files = TensorFiles([Path("t5xxl_fp8_e4m3fn_scaled.safetensors")], "t5")
    files["shared.weight"]                   # its values, however they are stored

A quantization that is not supported is refused by name, not by the shapes of its tensors.
"""
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from support.common import not_content
from support.memory import E4M3, quantize
from support.names import first_match

# patterns of the prefix of a part's names in all-in-one files; each key may have or lack it
PREFIXES = {
    "transformer": r"model\.diffusion_model\.",
    "autoencoder": r"(vae|first_stage_model)\.",
    "clip": r"text_encoders\.clip_l\.(transformer\.)?",
    "t5": r"text_encoders\.t5xxl\.(transformer\.)?",
}
OTHERS = ("model.diffusion_model.", "vae.", "first_stage_model.", "text_encoders.",
          "cond_stage_model.", "conditioner.", "model_ema.")
SCALE = re.compile(r"\.(scale_weight|weight_scale)$")       # of 8-bit weights: ComfyUI's, others'
SHARD = re.compile(r"-\d+-of-(?!0*1\D)\d+")      # in the name of a file that is not the only one
# notes in 8-bit files, and a tokenizer
MARKS = "scaled_fp8", "comfy_quant", "scale_input", "input_scale", "spiece_model"
READ = "float8_e4m3fn", "float8_e5m2", "int8_tensorwise"                   # formats of comfy_quant
FORMATS = {                                      # unsupported quantization -> pattern of its keys
    "nunchaku (SVDQuant)": r"\.(wscales|wtscale|smooth_factor)",
    "NF4 (bitsandbytes)": r"bitsandbytes__nf4",
    "bitsandbytes": r"\.(quant_map|absmax|SCB)",
    "nvfp4": r"\.weight_(scale_2|global_scale)",
    "GPTQ or AWQ": r"\.qzeros",
    "nunchaku (SVDQuant), GPTQ or AWQ": r"\.qweight",
    "optimum-quanto": r"\._data",
    "torchao": r"\._weight_qdata",
    "MLX (mflux)": r"\.biases",
    "DFloat11": r"\.encoded_exponent",
    "SDNQ": r"\.svd_up",
    "flux-fp8-api": r"\.float8_data",
}
INSTEAD = "take a copy in bf16, fp8 or GGUF Q8_0"
# parts of names in other programs' files, and ours: ComfyUI's norms, T5 in GGUF
USUAL_NAMES = {
    "query_norm.weight": "query_norm.scale",
    "key_norm.weight": "key_norm.scale",
    "token_embd.": "shared.",
    "enc.output_norm.": "encoder.final_layer_norm.",
    "enc.blk.": "encoder.block.",
    ".attn_q.": ".layer.0.SelfAttention.q.",
    ".attn_k.": ".layer.0.SelfAttention.k.",
    ".attn_v.": ".layer.0.SelfAttention.v.",
    ".attn_o.": ".layer.0.SelfAttention.o.",
    ".attn_rel_b.": ".layer.0.SelfAttention.relative_attention_bias.",
    ".attn_norm.": ".layer.0.layer_norm.",
    ".ffn_norm.": ".layer.1.layer_norm.",
    ".ffn_gate.": ".layer.1.DenseReluDense.wi_0.",
    ".ffn_up.": ".layer.1.DenseReluDense.wi_1.",
    ".ffn_down.": ".layer.1.DenseReluDense.wo.",
}


class GgufFile:
    """A GGUF file with the methods of safe_open; the gguf package dequantizes each tensor."""
    def __init__(self, path: Path):
        if not find_spec("gguf"):
            raise ValueError(f"{path} is a GGUF file, which needs: pip install gguf")
        from gguf import GGUFReader
        try:
            reader = GGUFReader(path)
        except Exception as error:               # the package raises many kinds of errors
            raise ValueError(f"{path} cannot be read as a GGUF file: {error}") from None
        self.path = path
        self.fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.keys = self.tensors.keys
        one_of_each = {tensor.tensor_type: tensor.name for tensor in reader.tensors}
        for name in one_of_each.values():
            self.get_tensor(name, rows=1)        # refuses an unknown type right away

    def metadata(self) -> dict[str, str]:
        return {"config": self.fields["config"].contents()} if "config" in self.fields else {}

    def get_slice(self, name: str) -> SimpleNamespace:
        tensor = self.tensors[name]
        shape = [int(size) for size in reversed(tensor.shape)]           # innermost first in GGUF
        return SimpleNamespace(get_shape=lambda: shape, get_dtype=lambda: tensor.tensor_type.name)

    def get_tensor(self, name: str, rows: int | None = None) -> Tensor:
        """Dequantized; with `rows` only the first of its rows."""
        from gguf import dequantize
        tensor = self.tensors[name]
        kind = tensor.tensor_type
        try:
            return torch.tensor(dequantize(tensor.data[:rows], kind))
        except NotImplementedError:
            raise ValueError(f"{self.path}: the gguf package does not dequantize {kind.name} "
                             f"({name}): {INSTEAD}") from None


def open_tensors(path: Path) -> Any:
    """The open file, whose tensors are read on demand. ValueError names a torn or foreign file."""
    try:
        with open(path, "rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        return GgufFile(path) if is_gguf else safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        why = not_content(path) or f"{error}; if it is torn, download it again"
        raise ValueError(f"{path} cannot be read as a safetensors file: {why}") from None


class TensorFiles:
    """Tensors of one file, or of all shards of a folder, by name; read only when asked for.

    part: a key of PREFIXES. check: raise ValueError for an unsupported quantization. `names`: the
    tensors of the part; scales and other notes on quantized weights are in `places` only.
    """
    def __init__(self, files: list[Path], part: str = "transformer", check: bool = True):
        self.path, *others = files
        if others:
            self.path = self.path.parent
        elif SHARD.search(self.path.name):
            raise ValueError(f"{self.path} is one part of several: name its folder, "
                             f"{self.path.parent}")
        self.metadata = {}
        self.places = {}                         # {name: (open file, key in that file)}
        for path in files:
            file = open_tensors(path)
            self.metadata |= file.metadata() or {}
            for key in file.keys():
                name = re.sub(f"^{PREFIXES[part]}", "", key)
                if name == key and key.startswith(OTHERS):
                    continue                     # another part's
                for theirs, ours in USUAL_NAMES.items():
                    name = name.replace(theirs, ours)
                if name in self.places:
                    keys = f"{self.places[name][1]} and {key}"
                    raise ValueError(f"{self.path} holds {name} twice: as {keys}")
                self.places[name] = file, key

        self.scales = {}
        for name in self.places:
            weight = SCALE.sub(".weight", name)
            # a scale without its weight stays among the tensors, as an unexpected one
            if weight != name and weight in self.places:
                self.scales[weight] = name
        notes = set(self.scales.values())
        self.names = [n for n in self.places if n not in notes and not n.endswith(MARKS)]
        if check:
            for kind, name in self.unsupported():
                raise ValueError(f"{self.path} is quantized as {kind} ({name}), which is not read: "
                                 f"{INSTEAD}")

    def unsupported(self) -> Iterator[tuple[str, str]]:
        """(format, name) of weights that are stored in a format that is not supported."""
        kind, found = first_match(FORMATS, self.names)
        if kind:
            yield kind, found
        for layer, mark in self.marks().items():
            if mark.get("format") not in READ:
                yield mark.get("format"), layer
            if mark.get("convrot"):
                yield f"{mark['format']} with rotated weights (convrot)", layer
        for name in self.names:
            if self.slice(name).get_dtype() in ("I8", "U8") and name not in self.scales:
                yield "8-bit integers without scales", name
        for name, scale in self.scales.items():
            shape = self.shape(scale)
            rows = self.shape(name)[0]
            blocks = self.slice(scale).get_dtype() in ("U8", "F8_E8M0")
            if blocks or shape not in ([], [1], [rows], [rows, 1], [1, 1]):
                yield f"mxfp8 or other blocks with scales: scales {shape} of {rows} rows", scale

    def marks(self) -> dict[str, dict]:
        """{layer: its comfy_quant, or its entry in the file's metadata}."""
        try:
            said = self.metadata.get("_quantization_metadata", '{"layers": {}}')
            layers = json.loads(said)["layers"]
            for name in self.places:
                if name.endswith(".comfy_quant"):
                    layers[name] = json.loads(self.tensor(name).numpy().tobytes())
            return {layer: mark | mark.get("params", {}) for layer, mark in layers.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: the marks of its quantized layers cannot be read: "
                             f"{error}") from None

    def slice(self, name: str) -> Any:
        file, key = self.places[name]
        return file.get_slice(key)

    def shape(self, name: str) -> list[int]:
        return self.slice(name).get_shape()

    def tensor(self, name: str) -> Tensor:
        """As stored."""
        file, key = self.places[name]
        return file.get_tensor(key)

    def __getitem__(self, name: str) -> Tensor:
        return self.scaled(name, self.tensor(name))

    def scaled(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype.itemsize > 1 and name not in self.scales:
            return tensor
        return (tensor.float() * self.scale(name)).view(tensor.shape)

    def scale(self, name: str) -> Tensor:
        """The factor of a weight: fp32, (1, 1), or (d_out, 1) with one for each row."""
        if name not in self.scales:
            return torch.ones(1, 1)
        return self.tensor(self.scales[name]).float().view(-1, 1)

    def quantized(self, names: list[str], device: str | torch.device) -> tuple[Tensor, Tensor]:
        """Stacks weights (.., d_in) -> float8_e4m3 (d_out, d_in) on `device`, and a scale (1, 1).

        Weights that have 8 bits already are kept, with scales (d_out, 1) if theirs differ."""
        parts = [self.tensor(name) for name in names]
        if any(part.dtype != E4M3 for part in parts):
            scaled = map(self.scaled, names, parts)
            return quantize(torch.cat([part.to(device) for part in scaled]))
        rows = [self.scale(name).expand(len(part), 1) for name, part in zip(names, parts)]
        scales = torch.cat(rows)
        if (scales == scales[0]).all():
            scales = scales[:1]
        return torch.cat(parts).to(device), scales
