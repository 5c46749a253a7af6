"""LoRA files: the update in every format against one built by hand, conversions bit for bit, refusals."""
import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flux_model import Flux, FluxConfig
from support.lora_files import FORMATS, ORIGINAL_OF, SPELLINGS, load_lora, parse_key, read_metadata, save_lora
from support.names import FLUX_LINEARS, find_targets, split_number

LAYOUTS = Path(__file__).parents[2] / "shared" / "golden" / "checkpoint_layouts.json"
H, MLP = 16, 48                                              # an MLP ratio of 3, so that nothing relies on 4
CONFIG = FluxConfig(in_channels=12, out_channels=20, vec_in_dim=10, context_in_dim=14, hidden_size=H,
                    mlp_ratio=3.0, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=(2, 2, 4))
Q = "transformer_blocks.0.attn.to_q"
PARTS = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
SINGLE = [f"single_transformer_blocks.1.{part}" for part in PARTS]

# written out by hand, apart from the table under test: original module -> its diffusers parts and their rows
FUSED = {
    r"double_blocks\.(\d+)\.img_attn\.qkv": [(f"transformer_blocks.{{}}.attn.to_{x}", H) for x in "qkv"],
    r"double_blocks\.(\d+)\.txt_attn\.qkv": [(f"transformer_blocks.{{}}.attn.add_{x}_proj", H)
                                             for x in "qkv"],
    r"single_blocks\.(\d+)\.linear1": [(f"single_transformer_blocks.{{}}.attn.to_{x}", H) for x in "qkv"]
                                      + [("single_transformer_blocks.{}.proj_mlp", MLP)]}


def original_linears() -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        flux = Flux(CONFIG)
    return {name: tuple(m.weight.shape) for name, m in flux.named_modules() if isinstance(m, nn.Linear)}


def parts_of(original: str, rows: int) -> list[tuple[str, int]]:
    for pattern, parts in FUSED.items():
        if found := re.fullmatch(pattern, original):
            return [(part.format(found[1]), size) for part, size in parts]
    template, number = split_number(original)
    return [(FLUX_LINEARS[template][0].format(number), rows)]


def whole_lora(seed=0, ranks=(2,)) -> dict:
    """A LoRA, exact in fp16, of every Linear of the small model, each with its own A; ranks in turn."""
    g, lora = torch.Generator().manual_seed(seed), {}
    for name, (rows, width) in original_linears().items():
        for part, size in parts_of(name, rows):
            rank = ranks[len(lora) % len(ranks)]
            lora[part] = tuple(torch.randn(shape, generator=g).half().float()
                               for shape in ((rank, width), (size, rank)))
    return lora


def dense_original(lora: dict) -> dict:
    """By hand, in fp64: the update of every original module, rows in its order; zero without a LoRA."""
    updates = {}
    for name, (rows, width) in original_linears().items():
        blocks = [lora[part][1].double() @ lora[part][0].double() if part in lora
                  else torch.zeros(size, width, dtype=torch.float64) for part, size in parts_of(name, rows)]
        updates[name] = torch.cat(blocks)
        if name == "final_layer.adaLN_modulation.1":       # ours: shift, scale; diffusers: scale, shift
            updates[name] = torch.cat((updates[name][H:], updates[name][:H]))
    return updates


def dense_file(path, prefix, down, up, underscores=False) -> dict:
    """The update of every original module as a plain reader of its own format would compute it, in fp64."""
    tensors, updates = load_file(path), {}
    for name, (rows, width) in original_linears().items():
        key = prefix + (name.replace(".", "_") if underscores else name)
        if key + down in tensors:
            A, B = tensors.pop(key + down).double(), tensors.pop(key + up).double()
            updates[name] = float(tensors.pop(f"{key}.alpha", torch.tensor(len(A)))) / len(A) * (B @ A)
        else:
            updates[name] = torch.zeros(rows, width, dtype=torch.float64)
    assert not tensors
    return updates


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for path in a:
        for x, y in zip(a[path], b[path]):
            assert x.dtype == y.dtype == torch.float32 and torch.equal(x, y), path


def assert_same_update(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-12, atol=1e-12), name


# names

def test_no_two_modules_share_a_spelling():
    meant = {}
    for original, parts in FLUX_LINEARS.items():
        for template, layer in ((original, parts), *((part, (part,)) for part in parts)):
            for spelling in {template, template.replace(".", "_")}:
                assert spelling not in meant
                meant[spelling] = layer
    assert meant.items() <= SPELLINGS.items()


@pytest.mark.parametrize("key, parts, kind", [
    ("transformer.transformer_blocks.11.attn.to_q.lora_A.weight", ["transformer_blocks.11.attn.to_q"], "A"),
    ("transformer_blocks.1.ff.net.0.proj.lora_B.weight", ["transformer_blocks.1.ff.net.0.proj"], "B"),
    ("base_model.model.transformer_blocks.1.ff.net.2.lora_A.default.weight",
     ["transformer_blocks.1.ff.net.2"], "A"),
    ("base_model.model.proj_out.lora_B.weight", ["proj_out"], "B"),
    ("lora_unet_single_blocks_3_linear1.lora_down.weight",
     [f"single_transformer_blocks.3.{part}" for part in PARTS], "A"),
    ("lora_unet_double_blocks_0_img_mlp_0.lora_up.weight", ["transformer_blocks.0.ff.net.0.proj"], "B"),
    ("lora_unet_double_blocks_10_txt_mlp_2.alpha", ["transformer_blocks.10.ff_context.net.2"], "alpha"),
    ("lora_unet_final_layer_adaLN_modulation_1.lora_up.weight", ["norm_out.linear"], "B"),
    ("lora_unet_time_in_in_layer.lora_up.weight", ["time_text_embed.timestep_embedder.linear_1"], "B"),
    ("lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight", ["transformer_blocks.0.attn.to_q"], "B"),
    ("lora_transformer_single_transformer_blocks_7_proj_out.alpha",
     ["single_transformer_blocks.7.proj_out"], "alpha"),
    ("diffusion_model.single_blocks.37.linear2.lora_up.weight",
     ["single_transformer_blocks.37.proj_out"], "B"),
    ("double_blocks.0.txt_attn.qkv.lora_down.weight",
     [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"], "A"),
])
def test_spellings_people_have(key, parts, kind):
    assert parse_key(key)[1:] == (tuple(parts), kind)


@pytest.mark.parametrize("key", [
    "transformer.transformer_blocks.0.attn.to_q.weight",
    "transformer.transformer_blocks.0.attn.to_z.lora_A.weight",
    "transformer.transformer_blocks.01.attn.to_q.lora_A.weight", "lora_unet_double_blocks_x_img_mlp_0.alpha",
    "double_blocks.0.processor.qkv_lora3.down.weight", "double_blocks.0.img_attn.qkv.down.weight",
    "double_blocks.0.img_attn.qkv.3.lora_A.weight", "lora_unet_down_blocks_0_attentions_0_proj_in.alpha",
    "double_blocks.0.img_attn.qkv.down.me.weight",
    "xlora_unet_img_in.alpha", ".alpha", "",
])
def test_keys_of_something_else(key):
    assert parse_key(key) is None


@pytest.mark.skipif(not LAYOUTS.exists(), reason="checkpoint_layouts.json is not here")
def test_every_matrix_of_both_full_size_layouts_has_a_name():
    layouts = json.loads(LAYOUTS.read_text())
    diffusers = next(v["tensors"] for k, v in layouts.items() if "transformer" in k)
    matrices = {name.removesuffix(".weight"): shape for name, shape in diffusers.items() if len(shape) == 2}
    assert {split_number(name)[0] for name in matrices} == ORIGINAL_OF.keys()
    in_blocks = [name for name in matrices if "blocks." in name]
    assert len(in_blocks) == 494 and sum(sum(matrices[name]) for name in in_blocks) == 5_369_856
    reached = set()
    for name, shape in layouts["flux1-dev.safetensors"]["tensors"].items():
        if len(shape) == 2:
            module = name.removesuffix(".weight")
            dotted = parse_key(f"diffusion_model.{module}.lora_A.weight")[1]
            assert parse_key(f"lora_unet_{module.replace('.', '_')}.lora_down.weight")[1] == dotted
            assert [sum(matrices[part][0] for part in dotted), matrices[dotted[0]][1]] == shape
            reached.update(dotted)
    assert reached == matrices.keys()


# updates and conversions

@pytest.mark.parametrize("ranks", [(2,), (1,), (3,), (1, 2, 4)])
def test_every_format_holds_the_same_update_and_reads_back_unchanged(tmp_path, ranks):
    lora = whole_lora(ranks=ranks)
    expected = dense_original(lora)
    for format in FORMATS:
        save_lora(tmp_path / f"{format}.safetensors", lora, format)
        assert_same(load_lora(tmp_path / f"{format}.safetensors", CONFIG), lora)
    assert_same_update(dense_file(tmp_path / "kohya.safetensors", "lora_unet_", ".lora_down.weight",
                                  ".lora_up.weight", underscores=True), expected)
    assert_same_update(dense_file(tmp_path / "original.safetensors", "diffusion_model.", ".lora_A.weight",
                                  ".lora_B.weight"), expected)
    tensors = load_file(tmp_path / "diffusers.safetensors")
    assert len(tensors) == 2 * len(lora) and all(tensor.dtype == torch.float16 for tensor in tensors.values())
    for path, (A, B) in lora.items():
        assert torch.equal(tensors[f"transformer.{path}.lora_A.weight"].float(), A)
        assert torch.equal(tensors[f"transformer.{path}.lora_B.weight"].float(), B)


def original_file(path, format="original", rank=2, seed=0, scale=1.0, edit=None) -> dict:
    """A file of dense pairs on the fused Linears, as trainers of these formats write it -> its updates."""
    g, tensors, updates = torch.Generator().manual_seed(seed), {}, {}
    for name, (rows, width) in original_linears().items():
        A, B = (torch.randn(shape, generator=g).half() for shape in ((rank, width), (rows, rank)))
        if edit:
            edit(name, A, B)
        updates[name] = scale * (B.double() @ A.double())
        if format == "kohya":
            name = "lora_unet_" + name.replace(".", "_")
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = A, B
            tensors[f"{name}.alpha"] = torch.tensor(scale * rank)
        else:
            name = f"diffusion_model.{name}"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = A, B
    save_file(tensors, path)
    return updates


def no_keys(name, A, B):
    if "qkv" in name or "linear1" in name:
        B[H:2 * H] = 0


def untrained(name, A, B):
    B[:] = 0


@pytest.mark.parametrize("format", ["original", "kohya"])
@pytest.mark.parametrize("rank", [1, 3, 4, 12])
@pytest.mark.parametrize("edit", [None, no_keys, untrained])
def test_fused_files_to_diffusers_and_back_are_unchanged(tmp_path, format, rank, edit):
    updates = original_file(tmp_path / "a.safetensors", format, rank, edit=edit)
    lora = load_lora(tmp_path / "a.safetensors", CONFIG)
    assert_same_update(dense_original(lora), updates)
    save_lora(tmp_path / "b.safetensors", lora)
    save_lora(tmp_path / "c.safetensors", load_lora(tmp_path / "b.safetensors"), format)
    before, after = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "c.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]), key


def test_fused_parts_share_a_but_not_its_memory(tmp_path):
    original_file(tmp_path / "a.safetensors", rank=2)
    lora = load_lora(tmp_path / "a.safetensors")
    a, b = (lora[path][0] for path in SINGLE[:2])
    assert torch.equal(a, b)
    a.zero_()
    assert b.any()


@pytest.mark.parametrize("format", ["kohya", "original"])
@pytest.mark.parametrize("present", [[0], [1], [3], [0, 2], [1, 2, 3]])
def test_parts_without_a_lora_stay_without(tmp_path, format, present):
    lora = {path: pair for path, pair in whole_lora(ranks=(2, 3)).items() if path not in SINGLE
            or SINGLE.index(path) in present}
    save_lora(tmp_path / "a.safetensors", lora, format, mlp_ratio=3.0)
    assert_same(load_lora(tmp_path / "a.safetensors", CONFIG), lora)


def test_shared_a_of_some_parts_and_a_new_lora_read_back_unchanged(tmp_path):
    full = whole_lora(ranks=(4,))
    A = full[SINGLE[0]][0]
    some = {path: (A, full[path][1]) for path in SINGLE[:2]}
    new = {path: (A, torch.zeros_like(full[path][1])) for path in SINGLE}
    part = {path: (full[path][0], full[path][1] * (path == SINGLE[3])) for path in SINGLE}
    zero_a = {path: (full[path][0] * (path == SINGLE[3]), full[path][1]) for path in SINGLE}
    for lora in (some, new, part, zero_a):
        save_lora(tmp_path / "a.safetensors", lora, "kohya", mlp_ratio=3.0)
        assert_same(load_lora(tmp_path / "a.safetensors", CONFIG), lora)


@pytest.mark.parametrize("alpha", [1.0, 16.0, 0.5])
def test_alpha_is_folded_into_b(tmp_path, alpha):
    updates = original_file(tmp_path / "a.safetensors", "kohya", rank=4, scale=alpha / 4)
    lora = load_lora(tmp_path / "a.safetensors", CONFIG)
    assert_same_update(dense_original(lora), updates)
    save_lora(tmp_path / "b.safetensors", lora, "kohya", dtype=torch.float32)    # its alpha is the rank again
    assert_same_update(dense_file(tmp_path / "b.safetensors", "lora_unet_", ".lora_down.weight",
                                  ".lora_up.weight", underscores=True), updates)


def write(path, tensors, metadata=None):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def pair(path=Q, rank=2, width=H, rows=H, prefix="transformer.", names=(".lora_A.weight", ".lora_B.weight")):
    A, B = (prefix + path + name for name in names)
    return {A: torch.ones(rank, width), B: torch.ones(rows, rank)}


@pytest.mark.parametrize("where", ["alpha", "metadata", "adapter_config.json"])
def test_alpha_of_diffusers_and_peft_files(tmp_path, where):
    tensors, metadata = pair(), {}
    settings = {"lora_alpha": 6, "r": 2, "alpha_pattern": {}, "use_rslora": False}
    if where == "alpha":
        tensors[f"transformer.{Q}.alpha"] = torch.tensor([6.0])
    elif where == "metadata":
        settings = {f"transformer.{key}": value for key, value in settings.items()}
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
    else:
        tensors = pair(prefix="base_model.model.")
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    lora = load_lora(write(tmp_path / "adapter_model.safetensors", tensors, metadata))
    assert torch.equal(lora[Q][1], torch.full((H, 2), 3.0)) and torch.equal(lora[Q][0], torch.ones(2, H))
    save_lora(tmp_path / "b.safetensors", lora, metadata=metadata)      # the scale must not be applied again
    assert_same(load_lora(tmp_path / "b.safetensors"), lora)


def test_low_precision_files_are_read_as_fp32(tmp_path):
    lora = whole_lora()
    for dtype in (torch.bfloat16, torch.float32):
        save_lora(tmp_path / "a.safetensors", lora, "kohya", dtype=dtype)
        for path, (A, B) in load_lora(tmp_path / "a.safetensors").items():
            for got, given in zip((A, B), lora[path]):
                assert got.dtype == torch.float32 and torch.equal(got, given.to(dtype).float())


# refusals when reading

def nan(tensors):
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


def doubled(tensors):
    return {key: 2 * tensor for key, tensor in tensors.items()}


LINEAR1 = "single_blocks.1.linear1"
REFUSED = [
    (pair("transformer_blocks.0.attn.to_z") | pair("foo") | pair(),
     r"4 of 6 keys are not those of a FLUX LoRA: 'transformer\S+'"),
    ({f"transformer.{Q}.lora_A.weight": torch.ones(2, H)}, rf": {Q} has only A: a LoRA has A and B$"),
    ({f"transformer.{Q}.lora_B.weight": torch.ones(H, 2)}, rf": {Q} has only B: a LoRA has A and B$"),
    ({f"lora_unet_{LINEAR1.replace('.', '_')}.alpha": torch.tensor(1.0)},
     "single_blocks_1_linear1 has only alpha: a LoRA has A and B$"),
    (pair() | {f"transformer.{Q}.lora_B.weight": torch.ones(H, 3)}, r"A \[2, 16\] and B \[16, 3\] are not"),
    (pair() | {f"transformer.{Q}.lora_A.weight": torch.ones(2, H, 1, 1)}, r"A \[2, 16, 1, 1\] and B"),
    (pair(rank=0), r"A \[0, 16\] and B \[16, 0\]"),
    (pair(rows=H + 1), rf"{Q} is \[17, 16\], but \[16, 16\] in this model"),
    (pair(width=H + 1), rf"{Q} is \[16, 17\], but \[16, 16\] in this model"),
    (pair(LINEAR1, rows=3 * H + MLP + 1, prefix=""), r"proj_mlp is \[49, 16\], but \[48, 16\]"),
    (pair(LINEAR1, rows=3 * H, prefix=""), r"single_blocks.1.linear1 cannot be \[48, 16\]"),
    (pair("double_blocks.0.img_attn.qkv", rows=H, prefix="diffusion_model."), r"qkv cannot be \[16, 16\]"),
    (pair("final_layer.adaLN_modulation.1", rows=31, prefix=""), r"norm_out.linear is \[31, 16\], but \[32, 16\]"),
    (pair("transformer_blocks.2.attn.to_q"),
     r"transformer_blocks.2.attn.to_q is \[16, 16\], but absent in this model"),
    (pair("single_blocks_3_linear2", prefix="lora_unet_", width=H + MLP),
     r"single_transformer_blocks.3.proj_out is \[16, 64\], but absent in"),
    (nan(pair()), rf"{Q} holds values that are not finite"),
    (pair() | {f"transformer.{Q}.alpha": torch.tensor(float("inf"))},
     r"scaled by inf, holds values that are not finite"),
    (pair() | {f"transformer.{Q}.alpha": torch.ones(2)}, r"its alpha is \[2\], not one number"),
    (pair() | doubled(pair(names=(".lora_down.weight", ".lora_up.weight"))), "is there twice, with two endings"),
    (pair() | doubled(pair(prefix="")), f"{Q}.lora_A.weight' is there twice, with two endings or prefixes"),
    (pair() | doubled(pair("double_blocks.0.img_attn.qkv", rows=3 * H, prefix="")),
     f"{Q} is there twice, under two names"),
    ({"lora_unet_img_in.lokr_w1": torch.ones(2, 2), "lora_unet_img_in.lokr_w2": torch.ones(2, 2)},
     r"is a LoKr \('lora_unet_img_in.lokr_w1'\), which is not supported"),
    ({"lora_unet_img_in.hada_w1_a": torch.ones(2, 2)}, "is a LoHa .* not supported"),
    (pair() | {f"transformer.{Q}.dora_scale": torch.ones(2, 2)}, "is a DoRA .* not supported"),
    (pair("text_model.encoder", prefix="lora_te1_"),
     "no LoRA of the transformer: it has 2 tensors, of text encoders"),
    ({}, "no LoRA of the transformer: it has no tensors"),
]


@pytest.mark.parametrize("tensors, message", REFUSED)
def test_refused(tmp_path, tensors, message):
    path = write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(ValueError, match=message) as error:
        load_lora(path, CONFIG)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# what other programs write

def by_module(lora) -> list[tuple[str, list]]:
    """(original module, its pairs) of a whole LoRA, the parts of fused layers in turn."""
    return [(name, [lora[part] for part, _ in parts_of(name, rows)]) for name, (rows, _) in original_linears().items()]


def halves(lora, down, up, rename=lambda path: path) -> dict:
    """{rename(path) + down: A, rename(path) + up: B}"""
    return {rename(path) + end: tensor for path, both in lora.items() for end, tensor in zip((down, up), both)}


def onetrainer(lora, prefix="transformer.", underscores=False) -> tuple[dict, float]:
    """Its parts of fused layers have numbers, each pair an alpha; its final layer is the original's."""
    tensors = {}
    for name, pairs in by_module(lora):
        for i, (A, B) in enumerate(pairs):
            key = f"{'img_in.proj' if name == 'img_in' else name}{f'.{i}' if len(pairs) > 1 else ''}"
            key = prefix + (key.replace(".", "_") if underscores else key)
            B = B.roll(H, 0) if name.startswith("final_layer.ada") else B
            tensors |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B, f"{key}.alpha": torch.tensor(1.0)}
    return tensors, 0.5


def renamed(prefix="transformer.", down=".lora_A.weight", up=".lora_B.weight", underscores=False):
    rename = lambda path: prefix + (path.replace(".", "_") if underscores else path)
    return lambda lora: (halves(lora, down, up, rename), 1.0)


def mixed(lora) -> tuple[dict, float]:
    """Every key has a prefix and an ending of its own."""
    prefixes = ["", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.transformer."]
    endings = [(".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight"),
               (".lora.down.weight", ".lora.up.weight"), (".lora_A.me.weight", ".lora_B.me.weight")]
    tensors = {}
    for i, (path, both) in enumerate(lora.items()):
        for j, tensor in enumerate(both):
            tensors[f"{prefixes[(i + j) % 5]}{path}{endings[i % 4][j]}"] = tensor
    return tensors, 1.0


def fused(names, lora) -> tuple[dict, float]:
    """One pair for the q, k and v of a layer, and for the MLP where `names` has it: A of all, B block-diagonal."""
    tensors, rest = {}, dict(lora)
    for block, count in (("transformer_blocks", CONFIG.depth), ("single_transformer_blocks", CONFIG.depth_single_blocks)):
        for number, (name, parts) in ((i, item) for i in range(count) for item in names[block].items()):
            pairs = [rest.pop(f"{block}.{number}.{part}") for part in parts.split()]
            key = f"transformer.{name}" if "{" in name else f"transformer.{block}.{number}.{name}"
            tensors |= {f"{key.format(number)}.lora_A.weight": torch.cat([A for A, _ in pairs]),
                        f"{key.format(number)}.lora_B.weight": torch.block_diag(*(B for _, B in pairs))}
    return tensors | {f"transformer.{path}{end}": t for path, pair in rest.items() for end, t in zip((".lora_A.weight", ".lora_B.weight"), pair)}, 1.0


QKV, ADDED = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
TO_QKV = {"transformer_blocks": {"attn.to_qkv": QKV, "attn.to_added_qkv": ADDED}, "single_transformer_blocks": {"attn.to_qkv": QKV}}
BACKUP = {"transformer_blocks": {"attn.qkv": QKV, "attn.added_qkv": ADDED}, "single_transformer_blocks": {"qkv_mlp": f"{QKV} proj_mlp"}}
DIFFSYNTH = {
    "transformer_blocks": {
        "blocks.{}.attn.a_to_qkv": QKV, "blocks.{}.attn.b_to_qkv": ADDED, "blocks.{}.attn.a_to_out": "attn.to_out.0",
        "blocks.{}.attn.b_to_out": "attn.to_add_out", "blocks.{}.ff_a.0": "ff.net.0.proj", "blocks.{}.ff_a.2": "ff.net.2",
        "blocks.{}.ff_b.0": "ff_context.net.0.proj", "blocks.{}.ff_b.2": "ff_context.net.2",
        "blocks.{}.norm1_a.linear": "norm1.linear", "blocks.{}.norm1_b.linear": "norm1_context.linear"},
    "single_transformer_blocks": {
        "single_blocks.{}.to_qkv_mlp": f"{QKV} proj_mlp", "single_blocks.{}.norm.linear": "norm.linear",
        "single_blocks.{}.proj_out": "proj_out"}}


def numbered(lora) -> tuple[dict, float]:
    """OneTrainer's parts of fused layers under diffusers' names."""
    numbers = {part: f"attn.{name}.{i}" for name, parts in (("qkv", QKV), ("added_qkv", ADDED)) for i, part in enumerate(parts.split())}
    rename = lambda path: "transformer." + next((path.replace(part, new) for part, new in numbers.items()
                                                if path.startswith("transformer_blocks") and path.endswith(part)), path)
    return halves(lora, ".lora_A.weight", ".lora_B.weight", rename), 1.0


WRITERS = {
    "fused": lambda lora: fused(TO_QKV, lora), "a backup of onetrainer": lambda lora: fused(BACKUP, lora),
    "diffsynth": lambda lora: fused(DIFFSYNTH, lora), "numbered": numbered,
    "lora.down": renamed("", ".lora.down.weight", ".lora.up.weight"),
    "diffusers lora.down": renamed("transformer.", ".lora.down.weight", ".lora.up.weight"),
    "lora_linear_layer": renamed("transformer.", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "named adapter": renamed("transformer.", ".lora_A.my_style.weight", ".lora_B.my_style.weight"),
    "named adapter of peft": renamed("base_model.model.", ".lora_A.default_0.weight", ".lora_B.default_0.weight"),
    "lycoris": renamed("lycoris_", ".lora_down.weight", ".lora_up.weight", underscores=True),
    "model.diffusion_model": renamed("model.diffusion_model."),
    "onetrainer": onetrainer, "onetrainer, diffusion_model": lambda lora: onetrainer(lora, "diffusion_model."),
    "onetrainer, underscores": lambda lora: onetrainer(lora, "lora_unet_", underscores=True), "mixed": mixed,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_other_programs_write_is_read(tmp_path, writer, capsys):
    lora = whole_lora()
    tensors, scale = WRITERS[writer](lora)
    read = load_lora(write(tmp_path / "a.safetensors", tensors), CONFIG)
    assert capsys.readouterr().err == ""
    assert_same(read, {path: (A, scale * B) for path, (A, B) in lora.items()})


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer.", "model.diffusion_model."])
def test_processors_of_xlabs_and_uso(tmp_path, prefix):
    """lora1 is of the picture's stream, lora2 of the text's; a single block's qkv has no rows of the MLP."""
    g, tensors, expected = torch.Generator().manual_seed(1), {}, {}
    layers = {("double_blocks.1", "qkv_lora1", H, 3 * H): ["transformer_blocks.1.attn.to_" + x for x in "qkv"],
              ("double_blocks.1", "qkv_lora2", H, 3 * H): [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"],
              ("double_blocks.1", "proj_lora1", H, H): ["transformer_blocks.1.attn.to_out.0"],
              ("double_blocks.1", "proj_lora2", H, H): ["transformer_blocks.1.attn.to_add_out"],
              ("single_blocks.2", "qkv_lora", H, 3 * H): [f"single_transformer_blocks.2.attn.to_{x}" for x in "qkv"],
              ("single_blocks.2", "proj_lora", H + MLP, H): ["single_transformer_blocks.2.proj_out"]}
    for (block, layer, width, rows), parts in layers.items():
        A, B = torch.randn(4, width, generator=g), torch.randn(rows, 4, generator=g)
        tensors |= {f"{prefix}{block}.processor.{layer}.down.weight": A, f"{prefix}{block}.processor.{layer}.up.weight": B}
        expected |= {part: B[i * H:(i + 1) * H] @ A for i, part in enumerate(parts)}
    lora = load_lora(write(tmp_path / "a.safetensors", tensors), CONFIG)
    assert lora.keys() == expected.keys()
    for part, (A, B) in lora.items():
        assert torch.allclose(B @ A, expected[part], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "transformer.", "diffusion_model.", "base_model.model."])
def test_a_prefix_is_one_keys(tmp_path, prefix):
    """Whichever key has another prefix, all modules are read."""
    path, lora = tmp_path / "a.safetensors", whole_lora()
    save_lora(path, lora, "original", mlp_ratio=3.0)
    tensors = {key.removeprefix("diffusion_model."): tensor for key, tensor in load_file(path).items()}
    for key in list(tensors)[::7]:
        one = {prefix + k if k == key else k: tensor for k, tensor in tensors.items()}
        assert_same(load_lora(write(path, one), CONFIG), lora)
    alpha = pair() | {f"{prefix}{Q}.alpha": torch.tensor(4.0)}
    assert torch.equal(load_lora(write(path, alpha))[Q][1], torch.full((H, 2), 2.0))


def test_the_same_lora_twice_counts_once(tmp_path):
    lora = whole_lora()
    for format in FORMATS:
        save_lora(tmp_path / f"{format}.safetensors", lora, format)
    tensors = {key: tensor for format in FORMATS for key, tensor in load_file(tmp_path / f"{format}.safetensors").items()}
    assert_same(load_lora(write(tmp_path / "a.safetensors", tensors), CONFIG), lora)
    some = {path: both for path, both in lora.items() if path not in SINGLE[1:]}
    save_lora(tmp_path / "some.safetensors", some, "kohya", mlp_ratio=3.0)
    tensors = load_file(tmp_path / "diffusers.safetensors") | load_file(tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match=f"{SINGLE[1]} is there twice, under two names, and they differ"):
        load_lora(write(tmp_path / "a.safetensors", tensors))                     # a fused layer without some parts
    scaled = pair() | pair(prefix="") | {f"{Q}.alpha": torch.tensor(4.0)}
    with pytest.raises(ValueError, match=f"{Q} is there twice, and only one has an alpha"):
        load_lora(write(tmp_path / "a.safetensors", scaled))
    two = pair(names=(".lora_A.me.weight", ".lora_B.me.weight")) | doubled(pair(names=(".lora_A.you.weight", ".lora_B.you.weight")))
    with pytest.raises(ValueError, match="is there twice, with two endings"):
        load_lora(write(tmp_path / "a.safetensors", two))


K, FF = "transformer_blocks.1.attn.to_k", "single_transformer_blocks.0.proj_mlp"


@pytest.mark.parametrize("where", ["metadata", "adapter_config.json"])
@pytest.mark.parametrize("settings, alphas", [
    ({"use_rslora": True}, (4 / 2 ** 0.5, 4 / 3 ** 0.5, 4.0)),
    ({"alpha_pattern": {"to_q": 8, "transformer_blocks.1.attn.to_k": 3}, "rank_pattern": {"to_k": 3, "proj_mlp": 1}},
     (4.0, 1.0, 4.0)),
    ({"alpha_pattern": {r"^transformer_blocks\.\d\.attn\.to_[qk]": 6}, "use_rslora": True},
     (6 / 2 ** 0.5, 6 / 3 ** 0.5, 4.0)),
    ({"alpha_pattern": {"blocks.0.attn.to_q": 9, "0.attn.to_q": 6, "to_q": 1}}, (3.0, 4 / 3, 4.0)),
    ({"alpha_pattern": None, "use_rslora": False}, (2.0, 4 / 3, 4.0)),
])
def test_scales_of_peft(tmp_path, where, settings, alphas):
    """alpha / rank, or with rsLoRA alpha / sqrt(rank); the first pattern that ends a name gives its alpha."""
    settings, metadata = {"lora_alpha": 4, "r": 2, "peft_type": "LORA"} | settings, {}
    prefix = "transformer." if where == "metadata" else "base_model.model."
    tensors = pair(prefix=prefix) | pair(K, rank=3, prefix=prefix) | pair(FF, rank=1, rows=MLP, prefix=prefix)
    if where == "metadata":
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    lora = load_lora(write(tmp_path / "adapter_model.safetensors", tensors, metadata), CONFIG)
    for path, scale in zip((Q, K, FF), alphas):
        assert torch.allclose(lora[path][1], torch.tensor(scale), rtol=1e-6), path


@pytest.mark.parametrize("text", ["{", "[1]", "null", '{"lora_alpha": "x"}', '{"alpha_pattern": {"(": 2}}',
                                  '{"alpha_pattern": [1]}', '{"peft_type": "LOHA"}', '{"use_dora": true}'])
def test_settings_that_cannot_be_used_name_their_file(tmp_path, text):
    path = write(tmp_path / "adapter_model.safetensors", pair(), {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match="adapter_model.safetensors") as error:
        load_lora(path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="adapter_config.json") as error:
        load_lora(write(path, pair()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keys", [
    ["bundle_emb.me.clip_l", "bundle_emb.me.t5_out"], ["bundle_emb.me.string_to_param.*"], ["clip_l", "t5"], ["emb_params"]])
def test_embeddings_beside_a_lora_are_noted(tmp_path, keys, capsys):
    path = write(tmp_path / "a.safetensors", pair() | {key: torch.ones(3, 8) for key in keys})
    assert load_lora(path, CONFIG).keys() == {Q}
    assert capsys.readouterr().err.startswith(f"note: {path}: {len(keys)} tensors of embeddings are not used: '{keys[0]}'")
    with pytest.raises(ValueError, match=f"no LoRA of the transformer: it has {len(keys)} tensors, of embeddings"):
        load_lora(write(path, {key: torch.ones(3, 8) for key in keys}))


NORM = "double_blocks.0.img_attn.norm.query_norm"


def test_zero_changes_are_dropped_in_silence(tmp_path, capsys):
    zeros = {f"{name}{end}": torch.zeros(shape) for name, end, shape in (
        ("diffusion_model.double_blocks.0.img_attn.qkv", ".diff_b", 3 * H), (f"diffusion_model.{NORM}", ".diff", 8),
        ("diffusion_model.img_in", ".diff", (H, 12)), ("transformer.x_embedder", ".lora_B.bias", H))}
    assert load_lora(write(tmp_path / "a.safetensors", pair() | zeros), CONFIG).keys() == {Q}
    assert capsys.readouterr().err == ""


def test_changes_of_biases_and_norms_are_noted_and_those_of_weights_applied(tmp_path, capsys):
    g, path, lora = torch.Generator().manual_seed(2), tmp_path / "a.safetensors", whole_lora()
    save_lora(path, lora, "original", dtype=torch.float32)
    tensors = load_file(path)
    for name in ("double_blocks.1.img_attn.qkv", "single_blocks.0.linear2", "final_layer.adaLN_modulation.1"):
        pairs = tensors.pop(f"diffusion_model.{name}.lora_A.weight"), tensors.pop(f"diffusion_model.{name}.lora_B.weight")
        tensors[f"diffusion_model.{name}.diff"] = pairs[1] @ pairs[0]
    tensors |= {"diffusion_model.img_in.diff_b": torch.randn(H, generator=g),
                f"diffusion_model.{NORM}.diff": torch.randn(8, generator=g)}
    read = load_lora(write(path, tensors), CONFIG)
    assert re.fullmatch(rf"note: {path}: 2 tensors of biases and norms are not used: '\S+'\n", capsys.readouterr().err)
    updates, expected = dense_original(read), dense_original(lora)
    for name in expected:
        assert torch.allclose(updates[name], expected[name], rtol=1e-5, atol=1e-5), name
    for shape in ((H,), ()):
        with pytest.raises(ValueError, match=f"{path} holds no LoRA .* 1 tensors, of biases and norms"):
            load_lora(write(path, {"diffusion_model.img_in.diff_b": torch.ones(shape)}))


SD = "lora_unet_down_blocks_{}_attentions_0_transformer_blocks_{}_attn1_to_q"


@pytest.mark.parametrize("keys, kind", [
    (["diffusion_model.img_in.lokr_w1", "diffusion_model.img_in.lokr_w2", "diffusion_model.img_in.alpha"], "LoKr"),
    (["lycoris_transformer_blocks_0_attn_to_q.lokr_w1_a", "lycoris_transformer_blocks_0_attn_to_q.lokr_w1_b"], "LoKr"),
    (["base_model.model.x_embedder.hada_w1_a.default", "base_model.model.x_embedder.hada_w1_b.default"], "LoHa"),
    (["lora_unet_img_in.dora_scale"], "DoRA"), ([f"transformer.{Q}.lora_magnitude_vector.weight"], "DoRA"),
    ([f"base_model.model.{Q}.lora_magnitude_vector"], "DoRA"), ([f"transformer.{Q}.lora_magnitude_vector.me.weight"], "DoRA"),
    (["lora_unet_img_in.magnitude"], "DoRA"), (["lora_unet_img_in.DoRA_scale"], "DoRA"),
    (["transformer_blocks.0.qkv_proj.lora_down", "transformer_blocks.0.qkv_proj.lora_up"], "LoRA in nunchaku's layout"),
    (["lora_unet_img_in.oft_blocks"], "OFT"), (["lora_unet_img_in.lora_mid.weight"], "LoCon"),
    (["double_blocks.0.img_attn.norm.key_norm.scale", "img_in.lora_A.weight", "img_in.lora_B.bias"], "control LoRA"),
    (["diffusion_model.img_in.reshape_weight"], "control LoRA"), (["img_in.lora_B.bias"], "control LoRA"),
    (["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], "IP-Adapter"),
    (["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.norm.key_norm.scale"], "whole model"),
    (["transformer.transformer_blocks.0.ff.linear_in.lora_A.weight"], r"LoRA of FLUX\.2"),
    (["diffusion_model.double_stream_modulation_img.lin.lora_A.weight"], r"LoRA of FLUX\.2"),
    (["transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight"], r"LoRA of FLUX\.2"),
    (["transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight"], "LoRA of Qwen-Image"),
    (["lora_unet_transformer_blocks_0_img_mod_1.lora_down.weight"], "LoRA of Qwen-Image"),
    (["diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight"], r"LoRA of SD3 or SD3\.5"),
    (["lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight"], r"LoRA of SD3 or SD3\.5"),
    (["transformer.transformer_blocks.0.attn2.to_q.lora_A.weight"], r"LoRA of SD3\.5"),
    (["transformer.double_blocks.0.img_attn_qkv.lora_A.weight"], "LoRA of HunyuanVideo"),
    (["lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight"], "LoRA of HunyuanVideo"),
    (["transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q.lora_A.weight"], "LoRA of HunyuanVideo"),
    ([SD.format(1, 0) + ".lora_down.weight"], "LoRA of SDXL"), ([SD.format(2, 9) + ".lora_down.weight"], "LoRA of SDXL"),
    (["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"], "LoRA of SDXL"),
    ([SD.format(0, 0) + ".lora_down.weight"], r"LoRA of Stable Diffusion 1\.5 or 2"),
    (["unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"], "LoRA of SDXL"),
    (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "LoRA of Wan"),
    (["lora_unet_blocks_0_cross_attn_k.lora_down.weight"], "LoRA of Wan"),
    (["diffusion_model.layers.0.attention.qkv.lora_A.weight"], "LoRA of Z-Image"),
    (["diffusion_model.distilled_guidance_layer.layers.0.in_layer.lora_A.weight"], "LoRA of Chroma"),
    (["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"], "LoRA of LTX-Video"),
])
def test_other_kinds_and_other_models_are_named(tmp_path, keys, kind):
    """Alone, and beside keys that FLUX.1 has too."""
    tensors = {key: torch.ones(2, 2) for key in keys}
    for beside in ({}, pair()):
        path = write(tmp_path / "foreign.safetensors", tensors | beside)
        with pytest.raises(ValueError, match=rf"{path} is an? {kind}") as error:
            load_lora(path, CONFIG)
        assert "\n" not in str(error.value) and keys[0].partition(".")[0] in str(error.value)


@pytest.mark.parametrize("tensors, model", [          # a model whose blocks have FLUX.1's names, but not its shapes
    (pair("transformer_blocks.59.attn.to_q"), "Qwen-Image"), (pair("transformer_blocks.37.attn.add_k_proj"), "SD3.5 large"),
    (pair("transformer_blocks.19.attn.to_q") | pair("single_transformer_blocks.39.attn.to_q"), "HunyuanVideo"),
    (pair("double_blocks.7.img_attn.proj", prefix="") | pair("single_blocks.47.linear2", prefix="", width=64), "FLUX.2"),
    (pair("single_blocks.1.linear1", rows=9 * H, prefix="diffusion_model."), "FLUX.2"),
    (pair("double_blocks.1.img_mlp.0", rows=6 * H, prefix=""), "FLUX.2"),
    (pair(width=6144, rows=6144), "FLUX.2"), (pair(width=2432, rows=2432), "SD3.5 large")])
def test_other_models_with_the_names_of_flux_are_refused(tmp_path, tensors, model):
    path = write(tmp_path / "foreign.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"^{path}: .* in this model") as error:
        load_lora(path, CONFIG)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("metadata, model", [({"modelspec.architecture": "flux-2-dev/lora"}, r"FLUX\.2"),
                                             ({"ss_base_model_version": "qwen_image"}, "Qwen-Image"),
                                             ({"ss_base_model_version": "chroma"}, "Chroma"), ({"modelspec.architecture": "chroma/lora"}, "Chroma")])
def test_metadata_that_name_another_model(tmp_path, metadata, model):
    path = write(tmp_path / "foreign.safetensors", pair(), metadata)
    with pytest.raises(ValueError, match=f"{path} is a LoRA of {model} .*: only plain LoRAs of FLUX.1 are"):
        load_lora(path, CONFIG)
    with pytest.raises(ValueError, match="1 of 3 keys are not those of a FLUX LoRA: 'foo'; its metadata say \\['krea-2/lora'\\]"):
        load_lora(write(path, pair() | {"foo": torch.ones(1)}, {"modelspec.architecture": "krea-2/lora"}))
    load_lora(write(path, pair(), {"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "flux1"}), CONFIG)


def test_control_loras_are_known_by_their_channels_too(tmp_path):
    path = write(tmp_path / "a.safetensors", pair("x_embedder", width=24))
    with pytest.raises(ValueError, match=rf"{path}: x_embedder is \[16, 24\], but \[16, 12\] in this model \(is it a control LoRA\?\)"):
        load_lora(path, CONFIG)


def test_quantised_loras_are_refused(tmp_path):
    path = write(tmp_path / "a.safetensors", {key: tensor.to(torch.int8) for key, tensor in pair().items()})
    with pytest.raises(ValueError, match=rf"{path}: .* is in torch.int8: quantized LoRAs are not supported"):
        load_lora(path)


def test_only_whole_safetensors_files_are_read(tmp_path):
    whole = write(tmp_path / "whole.safetensors", pair()).read_bytes()
    torch.save(pair(), tmp_path / "pickle.pt")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "torn.safetensors").write_bytes(whole[:-8])
    (tmp_path / "page.safetensors").write_text("<html>Access to this repository is gated</html>")
    for name, why in {"pickle.pt": "pickle, which is never loaded", "empty.safetensors": "empty", "torn.safetensors": "",
                      "page.safetensors": "web page"}.items():
        for read in (load_lora, read_metadata):
            message = rf"{name} cannot be read as a safetensors file.*{why}"
            with pytest.raises(ValueError, match=message) as error:
                read(tmp_path / name)
            assert "\n" not in str(error.value)
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(ValueError, match=f"no such LoRA file: {path}"):
            load_lora(path)


@pytest.mark.parametrize("prefix", ["text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_",
                                    "lora_te3_", "text_encoders.t5xxl.transformer."])
def test_text_encoders_are_reported_as_not_used(tmp_path, prefix, capsys):
    path = write(tmp_path / "a.safetensors", pair() | pair("encoder_layers_0_mlp_fc1", prefix=prefix))
    assert load_lora(path, CONFIG).keys() == {Q}
    assert re.fullmatch(r"note: .*: 2 tensors of text encoders are not used: '\S+'\n", capsys.readouterr().err)
    load_lora(write(path, pair()), CONFIG)
    assert capsys.readouterr().err == ""


def test_guidance_is_not_in_schnell(tmp_path):
    path = write(tmp_path / "a.safetensors", pair("time_text_embed.guidance_embedder.linear_1", width=256))
    load_lora(path, CONFIG)
    with pytest.raises(ValueError, match=r"guidance_embedder.linear_1 is \[16, 256\], but absent in this model"):
        load_lora(path, FluxConfig(**{**vars(CONFIG), "guidance_embed": False}))


# writing

def good(rank=2, rows=H, value=1.0):
    return torch.ones(rank, H), torch.full((rows, rank), value)


@pytest.mark.parametrize("lora, options, message", [
    ({Q: good()}, {"format": "peft"}, "no LoRA format 'peft', only diffusers, kohya, original"),
    ({Q: good(value=float("inf"))}, {}, f"{Q} holds values that are not finite"),
    ({Q: good(value=1e5)}, {}, rf"{Q} holds values that are not finite \(in torch.float16\)"),
    ({"foo": good(), "double_blocks.0.img_attn.qkv": good()}, {},
     "no Linear of FLUX has the diffusers path 'foo'"),
    ({Q: (torch.ones(2, H), torch.ones(H, 3))}, {}, r"A \[2, 16\] and B \[16, 3\] are not"),
    ({Q: good(), Q[:-1] + "k": good(rows=H + 1)}, {"format": "kohya"},
     r"double_blocks.0.img_attn.qkv: its parts do not fit"),
    ({}, {}, "there is no LoRA to save"),
])
def test_what_is_not_written(tmp_path, lora, options, message):
    with pytest.raises(ValueError, match=message) as error:
        save_lora(tmp_path / "a.safetensors", lora, **options)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_bad_place_to_write(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("file/a.safetensors", "folder"):
        with pytest.raises(OSError, match=f"{tmp_path / name} cannot be written: ") as error:
            save_lora(tmp_path / name, {Q: good()})
        assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "file", tmp_path / "folder"]
    save_lora(tmp_path / "new" / "a.safetensors", {Q: good()})                  # a folder that is missing is made


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_lora(path, {Q: good()})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot be written: No space left on device"):
        save_lora(path, {Q: good(value=2.0)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("format", FORMATS)
def test_usual_metadata_in_every_file(tmp_path, format):
    """What ComfyUI's and kohya's users look for; nothing of it depends on the day or on the file's name."""
    path, lora = tmp_path / "a.safetensors", whole_lora(ranks=(2, 3))
    save_lora(path, lora, format, {"model": "flux-dev", "prompt": "a photo of a person", "ss_network_alpha": "99"})
    found = read_metadata(path)
    assert found["modelspec.architecture"] == "flux-1-dev/lora" and found["modelspec.sai_model_spec"] == "1.0.1"
    assert found["ss_network_dim"] == "3" and found["ss_network_alpha"] == "3.0"
    assert found["modelspec.trigger_phrase"] == "a photo of a person" and found["ss_base_model_version"] == "flux1"
    assert json.loads(found["ss_tag_frequency"]) == {"": {"a photo of a person": 1}}
    save_lora(path, lora, format, {"model": "flux-schnell"})
    assert read_metadata(path)["modelspec.architecture"] == "flux-1-schnell/lora"
    assert "modelspec.trigger_phrase" not in read_metadata(path)


@pytest.mark.parametrize("format", FORMATS)
def test_equal_loras_give_equal_bytes(tmp_path, format):
    lora, metadata = whole_lora(), {f"é{i}": f'"\u007f\n\\ü{i}' for i in range(20)}
    for i in range(4):
        save_lora(tmp_path / f"{i}.safetensors", lora, format, dict(list(metadata.items())[i:] + list(metadata.items())[:i]))
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(4)}) == 1
    assert read_metadata(tmp_path / "0.safetensors").items() >= metadata.items()
    assert_same(load_lora(tmp_path / "0.safetensors", CONFIG), lora)


def test_metadata_and_inputs_of_any_kind(tmp_path):
    path, A = tmp_path / "Müller.safetensors", torch.ones(H, 2, requires_grad=True)
    lora = {p: (A.t(), torch.ones(H, 2, dtype=torch.float64)) for p in (Q, Q[:-1] + "v")}  # one A
    save_lora(path, lora, metadata={"prompt": "é", "format": "kohya", "rank": 2}, dtype=torch.float32)
    assert read_metadata(path).items() >= {"prompt": "é", "format": "pt", "rank": "2"}.items()
    assert load_lora(str(path)).keys() == lora.keys() and list(tmp_path.iterdir()) == [path]
    assert read_metadata(write(path, pair())) == {}


# the same through diffusers

def diffusers_updates(path, config) -> dict:
    """What diffusers adds to each weight of a transformer of this config, after it has loaded a file."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=config.in_channels, out_channels=config.out_channels, num_layers=config.depth,
        num_single_layers=config.depth_single_blocks, attention_head_dim=8, num_attention_heads=config.num_heads,
        joint_attention_dim=config.context_in_dim, pooled_projection_dim=config.vec_in_dim, guidance_embeds=True,
        axes_dims_rope=config.axes_dim)
    pipeline = diffusers.FluxPipeline
    state, alphas, metadata = pipeline.lora_state_dict(str(path), return_alphas=True, return_lora_metadata=True)
    pipeline.load_lora_into_transformer(state, alphas, transformer, adapter_name="me", metadata=metadata)
    return {name: module.get_delta_weight("me").detach() for name, module in transformer.named_modules()
            if "me" in getattr(module, "lora_A", {})}


def xlabs(lora) -> dict:
    """Attention alone, and of its single blocks none: one A for q, k and v."""
    tensors = {}
    for number in range(2):
        for i, (proj, *qkv) in enumerate((("to_out.0", "to_q", "to_k", "to_v"),
                                          ("to_add_out", "add_q_proj", "add_k_proj", "add_v_proj")), 1):
            pairs = [lora[f"transformer_blocks.{number}.attn.{part}"] for part in qkv]
            name = f"double_blocks.{number}.processor.{{}}_lora{i}.{{}}.weight"
            tensors |= {name.format("qkv", "down"): pairs[0][0], name.format("qkv", "up"): torch.cat([B for _, B in pairs])}
            A, B = lora[f"transformer_blocks.{number}.attn.{proj}"]
            tensors |= {name.format("proj", "down"): A, name.format("proj", "up"): B}
    return tensors


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "kohya with alpha", "lora.down", "underscores",
                                  "alpha", "PEFT", "rsLoRA", "xlabs"])
def test_diffusers_reads_the_same(tmp_path, kind):
    pytest.importorskip("diffusers")
    config = FluxConfig(**{**vars(CONFIG), "mlp_ratio": 4.0})                     # diffusers knows no other
    with torch.device("meta"):
        targets = find_targets(Flux(config))
    path, g = tmp_path / "a.safetensors", torch.Generator().manual_seed(3)
    lora = {t.path: (torch.randn(2, t.d_in, generator=g), torch.randn(t.rows, 2, generator=g)) for t in targets
            if not (kind.startswith("kohya") and t.module.endswith("linear1"))    # there it knows 3072 only,
            and not (kind == "underscores" and ".attn." not in t.path)}           # and here attention only
    save_lora(path, lora, "kohya" if kind.startswith("kohya") else "diffusers", dtype=torch.float32)
    if kind == "kohya with alpha":
        write(path, {key: tensor / 4 if key.endswith("alpha") else tensor for key, tensor in load_file(path).items()})
    elif kind == "lora.down":
        write(path, renamed("transformer.", ".lora.down.weight", ".lora.up.weight")(lora)[0])
    elif kind == "underscores":
        tensors, _ = renamed("lora_transformer_", ".lora_down.weight", ".lora_up.weight", underscores=True)(lora)
        write(path, tensors | {f"lora_transformer_{name.replace('.', '_')}.alpha": torch.tensor(3.0) for name in lora})
    elif kind == "alpha":
        write(path, load_file(path) | {f"transformer.{name}.alpha": torch.tensor(3.0) for name in lora})
    elif kind in ("PEFT", "rsLoRA"):
        settings = {"r": 2, "lora_alpha": 6, "target_modules": list(lora), "use_rslora": kind == "rsLoRA",
                    "alpha_pattern": {"transformer_blocks.1.attn.to_k": 5, "proj_mlp": 1}}
        write(path, load_file(path), {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})})
    elif kind == "xlabs":
        write(path, xlabs(lora))
    theirs, ours = diffusers_updates(path, config), load_lora(path, config)
    assert theirs.keys() == ours.keys() and len(ours) == (16 if kind == "xlabs" else len(lora))
    for name, (A, B) in ours.items():
        assert torch.allclose(B @ A, theirs[name], rtol=1e-5, atol=1e-6), name
