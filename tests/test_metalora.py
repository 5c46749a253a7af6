"""metalora.py: the fused path against plain matmuls, the bank against AdamW, LoRAs applied, collapsed, saved.

    pytest tests/test_metalora.py

The references here are written out plainly: plain_meta_lora per image and target in a loop, weights merged in
fp64, torch's own AdamW and gradient clipping, one training run per person.
"""
import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flux_model import Flux, FluxConfig, flow_matching_loss, velocity
from metalora import AdaptedLinear, IdentityBank, MetaLoRA, apply_loras, plain_meta_lora, random_lomd, set_update, views
from support.lora_files import FORMATS, check_lomd, load_lomd, load_lora, save_lomd, save_lora
from support.names import find_targets
from torch.utils._python_dispatch import TorchDispatchMode

CONFIG = FluxConfig(vec_in_dim=24, context_in_dim=40, hidden_size=64, num_heads=2, depth=1,
                    depth_single_blocks=2, axes_dim=(4, 14, 14))
LAYERS = {"proj": "double_blocks.0.img_attn.proj", "qkv": "double_blocks.0.txt_attn.qkv",    # 1 and 3 targets
          "linear1": "single_blocks.1.linear1",                                                      # 4
          "modulation": "single_blocks.0.modulation.lin"}                                        # 2-D input


def parts_of(adapter, row):
    """A row (P,) of the bank -> {path: (M (rank, r1) or A (rank, d_in), U (d_out, rank))}."""
    downs = [(adapter.rank, adapter.r1 or t.d_in) for t in adapter.targets]
    parts = views(row, downs + [(t.rows, adapter.rank) for t in adapter.targets])
    return {t.path: pair for t, *pair in zip(adapter.targets, parts, parts[len(downs):])}


def by_module(targets):
    grouped = {}
    for target in targets:
        grouped.setdefault(target.module, []).append(target)
    return grouped


def tiny_flux(dtype=torch.float32):
    torch.manual_seed(1)
    return Flux(CONFIG).requires_grad_(False).to(dtype)


def draws(batch, seed=2):
    """latent, noise, t, txt, y for flow_matching_loss."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 16, 4, 4, generator=g), torch.randn(batch, 16, 4, 4, generator=g),
            torch.rand(batch, generator=g), torch.randn(batch, 5, 40, generator=g),
            torch.randn(batch, 24, generator=g))


def output(flux, batch=2):
    """The network's velocity for fixed draws."""
    latent, _, t, txt, y = draws(batch)
    return velocity(flux, latent, t, txt, y, guidance=1.0)


def adapter_of(flux, method="meta-lora", rank=2, r1=5, size=0.1, **options):
    """A MetaLoRA of random weights in every row, so that no update is zero."""
    lomd = random_lomd(find_targets(flux), r1) if method == "meta-lora" else None
    adapter = MetaLoRA(flux, rank, lomd, **options)
    adapter.bank.weight.add_(size * torch.randn(adapter.bank.weight.shape))
    return adapter


def relative(found, expected):
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def snapshot(module):
    """Every weight and bias by name, also those within AdaptedLinears."""
    linears = {f"{name.removesuffix('.base')}.{kind}": getattr(m, kind).detach().clone() for name, m in module.named_modules()
               if isinstance(m, torch.nn.Linear) for kind in ("weight", "bias") if getattr(m, kind) is not None}
    return linears | {k: v.detach().clone() for k, v in module.named_parameters() if k.endswith("scale")}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def one_line(function, *arguments):
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# The fused path


def by_hand(adapter, targets, linear, x, ids, rows, lomd):
    """What the layer should give: image after image, target after target, with plain_meta_lora."""
    images = []
    for image, identity in zip(x, ids.tolist()):
        parts = parts_of(adapter, rows[identity])
        outputs = []
        for t in targets:
            own, A = slice(t.start, t.start + t.rows), torch.eye(t.d_in) if lomd is None else lomd[t.path]
            outputs.append(plain_meta_lora(image, linear.weight[own], A, *parts[t.path]) + linear.bias[own])
        images.append(torch.cat(outputs, dim=-1))
    return torch.stack(images)


@pytest.mark.parametrize("method", ["meta-lora", "lora"])
@pytest.mark.parametrize("ids", [[0], [2, 2], [3, 0, 3, 1], [1, 3]], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("of_x", [True, False])
def test_fused_equals_plain(method, ids, layer, of_x):
    flux, ids = tiny_flux(), torch.tensor(ids)
    linear = copy.deepcopy(flux.get_submodule(LAYERS[layer]))
    adapter = adapter_of(flux, method, num_identities=4, slots=3)
    targets = by_module(adapter.targets)[LAYERS[layer]]
    assert len(targets) == {"qkv": 3, "linear1": 4}.get(layer, 1)
    shape = (len(ids), linear.in_features) if layer == "modulation" else (len(ids), 7, linear.in_features)
    x = torch.randn(shape, requires_grad=of_x)
    adapter.train_lomd = method == "meta-lora"                                                      # as in stage 1

    adapter.assign(ids)
    y = flux.get_submodule(LAYERS[layer])(x)
    dy = torch.randn_like(y)
    learned = [adapter.flat] if adapter.train_lomd else []
    found = torch.autograd.grad((y * dy).sum(), [adapter.rows, *learned, *[x][:of_x]])

    rows, lomd, shared = adapter.bank.weight.clone().requires_grad_(), None, []
    if learned:
        shared = [adapter.shared.weight[0].clone().requires_grad_()]
        lomd = dict(zip((t.path for t in adapter.targets), views(shared[0], [(adapter.r1, t.d_in) for t in adapter.targets])))
    expected_y = by_hand(adapter, targets, linear, x, ids, rows, lomd)
    expected = torch.autograd.grad((expected_y * dy).sum(), [rows, *shared, *[x][:of_x]])

    assert relative(y, expected_y) < 1e-5
    assert relative(y - linear(x), expected_y - linear(x)) < 1e-5                       # the update by itself
    assert adapter.present.tolist() == sorted(set(ids.tolist()))
    for row, identity in zip(found[0], adapter.present):
        of_row, of_reference = parts_of(adapter, row), parts_of(adapter, expected[0][identity])
        for path in of_row:
            for mine, reference in zip(of_row[path], of_reference[path]):                      # M or A, and U
                if path in {t.path for t in targets}:
                    assert relative(mine, reference) < 1e-5
                else:
                    assert not mine.any() and not reference.any()
    for mine, reference in zip(found[1:], expected[1:]):                                    # A of LoMD, and x
        assert relative(mine, reference) < 1e-5


def test_bf16_is_no_further_from_fp64_than_the_plain_path():
    """Mean relative errors of the output and each gradient over random layers; trainables are fp32."""
    errors = {"fused": [], "plain": []}
    for seed in range(12):
        torch.manual_seed(seed)
        d_in, d_out = (int(n) for n in torch.randint(4, 24, (2,)) * 16)
        r1, r2, tokens = (int(torch.randint(low, high, ())) for low, high in ((4, 33), (1, 9), (20, 200)))
        x, dy = torch.randn(2, tokens, d_in).bfloat16(), torch.randn(2, tokens, d_out).bfloat16()
        linear = torch.nn.Linear(d_in, d_out).bfloat16().requires_grad_(False)
        shapes = (r1, d_in), (r2, r1), (d_out, r2)                                                   # A, M, U
        trained = [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]

        def run(dtype, forward):
            leaves = [x.to(dtype).requires_grad_(), *(w.clone().requires_grad_() for w in trained)]
            y = forward(*leaves)
            return [y, *torch.autograd.grad((y * dy.to(dtype)).sum(), leaves)]

        def fused(x, A, M, U):
            layer = AdaptedLinear(copy.deepcopy(linear), [(slice(0, d_out), slice(0, r2))])
            set_update([layer], [(M @ A).to(layer.dtype)], [U.to(layer.dtype)])
            return layer(x)

        def plain(dtype):
            def forward(x, A, M, U):
                A, M, U = (part.to(dtype) for part in (A, M, U))
                base = F.linear(x, linear.weight.to(dtype), linear.bias.to(dtype))
                return base + F.linear(F.linear(F.linear(x, A), M), U)
            return forward

        exact = run(torch.float64, plain(torch.float64))
        for name, forward in (("fused", fused), ("plain", plain(torch.bfloat16))):
            errors[name].append([relative(a, b) for a, b in zip(run(torch.bfloat16, forward), exact)])
    mine, plain = (torch.tensor(errors[name]).mean(0) for name in ("fused", "plain"))      # y, dx, dA, dM, dU
    assert (plain > 1e-4).all() and (plain < 2e-2).all()              # the comparison is of what it should be
    assert (mine <= plain).all(), f"fused {mine.tolist()}, plain {plain.tolist()}"
    assert mine[0] < 0.8 * plain[0]               # as y is rounded once: the sum of two bf16 results has 0.85


@pytest.mark.parametrize("method", ["meta-lora", "lora"])
def test_an_untrained_adapter_changes_nothing(method):
    flux = tiny_flux()
    before = output(flux, 3), snapshot(flux)
    lomd = random_lomd(find_targets(flux), 5) if method == "meta-lora" else None
    adapter = MetaLoRA(flux, 3, lomd, num_identities=3, slots=3)
    adapter.assign(torch.tensor([2, 0, 1]))
    assert relative(output(flux, 3), before[0]) < 1e-6
    for identity in range(3):
        lora = adapter.collapse(identity)
        assert len(lora) == len(adapter.targets)
        assert all(A.any() and not (B @ A).any() for A, B in lora.values())
    assert adapter.bank.weight[0].ne(adapter.bank.weight[1]).any()                     # each starts elsewhere
    apply_loras(flux, [])
    assert same_bits(snapshot(flux), before[1])


def test_the_weights_must_stay_until_backward():
    flux = tiny_flux()
    adapter = adapter_of(flux, num_identities=2)
    adapter.assign(torch.tensor([0]))
    loss = flow_matching_loss(flux, *draws(1)).sum()
    adapter.assign(torch.tensor([1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    adapter.assign(torch.tensor([1]))
    flow_matching_loss(flux, *draws(1)).sum().backward()                               # and this is as before


def test_more_identities_than_slots():
    adapter = adapter_of(tiny_flux(), num_identities=4, slots=2)
    assert "3 identities" in one_line(adapter.assign, torch.tensor([0, 1, 3]))
    adapter.assign(torch.tensor([3, 1, 3]))


@pytest.mark.parametrize("method", ["meta-lora", "lora"])
def test_only_rows_train_over_a_bf16_base(method):
    flux = tiny_flux(torch.bfloat16)
    before = snapshot(flux)
    adapter = adapter_of(flux, method, num_identities=2)
    assert adapter.bank.weight.dtype == torch.float32
    start = adapter.bank.weight.clone()
    for _ in range(2):
        adapter.assign(torch.tensor([1, 1]))
        flow_matching_loss(flux, *draws(2)).sum().backward()
        norms, _ = adapter.step(1e-2)
        assert norms.isfinite().all() and norms.gt(0).all() and adapter.rows.grad.dtype == torch.float32
        assert all(part.any() for pair in parts_of(adapter, adapter.rows.grad[0]).values() for part in pair)
    assert not any(p.requires_grad or p.grad is not None for p in flux.parameters())
    assert not any(A.requires_grad or A.grad is not None for A in (adapter.lomd or {}).values())
    assert torch.equal(adapter.bank.weight[0], start[0]) and adapter.bank.weight[1].ne(start[1]).any()
    assert same_bits(snapshot(flux), before)
    apply_loras(flux, [])
    assert same_bits(snapshot(flux), before) and all(p.dtype == torch.bfloat16 for p in flux.parameters())


# ------------------------------------------------------------------------------------------------------------
# LoRAs at sampling time


def random_lora(flux, paths, rank):
    targets = {t.path: t for t in find_targets(flux, outside=True)}
    return {p: (torch.randn(rank, targets[p].d_in) / targets[p].d_in ** 0.5,
                torch.randn(targets[p].rows, rank) / 4) for p in paths}


def some_loras(flux):
    """Two of different rank: both adapt a k, one of them alone a q, an mlp and layers outside the blocks."""
    return (random_lora(flux, ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "proj_out",
                               "single_transformer_blocks.1.proj_mlp", "norm_out.linear"], 3),
            random_lora(flux, ["transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.attn.to_v",
                               "single_transformer_blocks.1.proj_mlp", "x_embedder", "norm_out.linear",
                               "time_text_embed.timestep_embedder.linear_1"], 1))


def merged(flux, loras):
    """Flux in fp64 with W + s B A for weights."""
    reference = copy.deepcopy(flux).double()
    where = {t.path: t for t in find_targets(reference, outside=True)}
    for lora, strength in loras:
        for path, (A, B) in lora.items():
            update, t = strength * B.double() @ A.double(), where[path]
            if path == "norm_out.linear":                        # diffusers: scale, shift; here: shift, scale
                update = torch.cat(update.chunk(2)[::-1])
            reference.get_submodule(t.module).weight[t.start:t.start + t.rows] += update
    return reference


@pytest.mark.parametrize("strengths", [(0.0, 0.0), (1.0, 0.0), (1.0, -0.5), (-0.5, 1.7), (1.7, 1.0)], ids=str)
def test_loras_equal_merged_weights_in_fp64(strengths):
    flux = tiny_flux()
    loras = list(zip(some_loras(flux), strengths))
    base, reference, seen = copy.deepcopy(flux).double(), merged(flux, loras), 0
    apply_loras(flux, loras)
    for name in {t.module for t in find_targets(flux, outside=True)}:
        layer = flux.get_submodule(name)
        x = torch.randn(2, 3, layer.weight.shape[1])
        expected = reference.get_submodule(name)(x.double())
        assert relative(layer(x), expected) < 1e-5
        update = expected - base.get_submodule(name)(x.double())
        if update.any():
            seen += 1
            assert relative(layer(x) - base.get_submodule(name)(x.double()), update) < 1e-5
    assert seen == (0 if not any(strengths) else 4 if not all(strengths) else 6)
    assert relative(output(flux), output(reference.float())) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_replaces_and_remove_restores_every_bit(dtype):
    flux = tiny_flux(dtype)
    before, first, second = snapshot(flux), *some_loras(flux)
    base = output(flux)
    apply_loras(flux, [(first, 1.0)])
    once = output(flux)
    apply_loras(flux, [(first, 1.0)])
    assert torch.equal(output(flux), once) and not torch.equal(once, base)
    apply_loras(flux, [(second, 1.7)])
    other = output(flux)
    assert not torch.equal(other, once)
    assert same_bits(snapshot(flux), before)                          # never merged, also while it is applied
    apply_loras(flux, [(first, 1.0), (second, -0.5)])
    apply_loras(flux, [(first, 1.0)])
    assert torch.equal(output(flux), once)                           # nothing of the second is left
    wrong = {"transformer_blocks.9.attn.to_q": first["transformer_blocks.0.attn.to_q"]}
    assert "transformer_blocks.9.attn.to_q" in one_line(apply_loras, flux, [(wrong, 1.0)])
    A, B = first["proj_out"]
    for pair in ((A[:, 1:], B), (A, B[1:])):
        assert "proj_out" in one_line(apply_loras, flux, [({"proj_out": pair}, 1.0)])
    assert torch.equal(output(flux), once)                            # a refused LoRA changes nothing
    apply_loras(flux, [])
    assert same_bits(snapshot(flux), before) and torch.equal(output(flux), base)
    assert not any(isinstance(m, AdaptedLinear) for m in flux.modules())
    assert all(m.weight.is_contiguous() for m in flux.modules() if isinstance(m, torch.nn.Linear))


def test_an_adapter_starts_without_the_loras_applied_before():
    flux = tiny_flux()
    base = output(flux)
    apply_loras(flux, [(lora, 1.0) for lora in some_loras(flux)])
    MetaLoRA(flux, 1).assign(torch.tensor([0, 0]))
    assert relative(output(flux), base) < 1e-6


@pytest.mark.parametrize("method", ["meta-lora", "lora"])
def test_collapse_gives_the_same_output_as_a_plain_lora(method, tmp_path):
    flux = tiny_flux()
    base = output(flux)
    adapter = adapter_of(flux, method, rank=3, size=0.5, num_identities=3)
    adapter.assign(torch.tensor([1, 1]))
    expected, lora = output(flux), adapter.collapse(1)
    assert relative(expected, base) > 0.05
    assert set(lora) == {t.path for t in adapter.targets}
    for t in adapter.targets:
        assert lora[t.path][0].shape == (3, t.d_in) and lora[t.path][1].shape == (t.rows, 3)
    assert all(w.is_contiguous() and w.dtype == torch.float32 for pair in lora.values() for w in pair)
    adapter.bank.weight.zero_()                                                               # lora is a copy
    apply_loras(flux, [])
    apply_loras(flux, [(lora, 1.0)])
    assert relative(output(flux), expected) < 1e-5

    for format in FORMATS:
        save_lora(tmp_path / format, lora, format)
        read = load_lora(tmp_path / format)
        assert set(read) == set(lora)
        for path, (A, B) in lora.items():                     # two factors, each rounded to 11 bits, relative
            assert relative(read[path][1].float() @ read[path][0].float(), B @ A) < 2 ** -10
        apply_loras(flux, [(read, 1.0)])
        assert relative(output(flux) - base, expected - base) < 2e-3


# ------------------------------------------------------------------------------------------------------------
# The people


def adamw(weight, lr):
    return torch.optim.AdamW([weight], lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)


def test_a_bank_of_one_is_adamw():
    weight = torch.randn(1, 300)
    bank, reference = IdentityBank(weight.clone()), weight.clone().requires_grad_()
    optimizer = adamw(reference, 3e-3)
    for step in range(50):
        grad = torch.randn(1, 300) * torch.logspace(-6, 2, 300) * (step % 7 != 3)  # with steps of no gradient
        bank.step(torch.tensor([0]), grad, 3e-3)
        reference.grad = grad
        optimizer.step()
        assert torch.allclose(bank.weight, reference, rtol=1e-6, atol=1e-6)
    state = optimizer.state[reference]
    assert relative(bank.weight - weight, reference.detach() - weight) < 1e-5
    for name in ("exp_avg", "exp_avg_sq"):
        assert relative(getattr(bank, name), state[name]) < 1e-6
    assert bank.steps.tolist() == [50]


def test_rows_stepped_now_and_then_are_adamws_of_their_own():
    weight = torch.randn(5, 60)
    bank = IdentityBank(weight.clone())
    bank.make_moments()
    rows = [w.clone().requires_grad_() for w in weight]
    optimizers = [adamw(row, 1e-2) for row in rows]
    for step in range(40):
        ids = torch.tensor([i for i in (4, 0, 1, 2) if step % (i + 1) == 0])                   # never the 3rd
        grad = torch.randn(len(ids), 60)
        names = ("weight", "exp_avg", "exp_avg_sq", "steps")
        before = {name: getattr(bank, name).clone() for name in names}
        bank.step(ids, grad, 1e-2)
        absent = torch.tensor([i for i in range(5) if i not in ids.tolist()])
        for name in names:
            assert torch.equal(getattr(bank, name)[absent], before[name][absent])
        for i, g in zip(ids.tolist(), grad):
            rows[i].grad = g
            optimizers[i].step()
    assert torch.allclose(bank.weight, torch.stack(rows).detach(), rtol=1e-6, atol=1e-6)
    assert bank.steps.tolist() == [40, 20, 14, 0, 8] and torch.equal(bank.weight[3], weight[3])


class FullCard(TorchDispatchMode):
    """No memory is left for a tensor of `size` numbers or more."""
    def __init__(self, size):
        super().__init__()
        self.size = size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        places = [given.untyped_storage().data_ptr() for given in args if isinstance(given, torch.Tensor)]
        if isinstance(out, torch.Tensor) and out.numel() >= self.size and out.untyped_storage().data_ptr() not in places:
            raise torch.OutOfMemoryError
        return out


def test_lomd_steps_without_further_memory(monkeypatch):
    """Else the rows would have stepped alone, and a checkpoint of that be resumed as the state before the step."""
    adapter = adapter_of(tiny_flux())
    adapter.train_lomd = True
    adapter.shared.make_moments()
    adapter.assign(torch.tensor([0]))
    adapter.rows.grad, adapter.flat.grad = torch.randn(adapter.rows.shape), torch.randn(adapter.flat.shape)
    full, real = FullCard(adapter.flat.numel()), adapter.bank.step
    monkeypatch.setattr(adapter.bank, "step", lambda *args: real(*args) or full.__enter__())
    try:
        adapter.step(1e-3)
    finally:
        full.__exit__(None, None, None)
    assert adapter.bank.steps.tolist() == adapter.shared.steps.tolist() == [1]


def test_each_row_is_clipped_by_its_own_norm():
    adapter = adapter_of(tiny_flux(), num_identities=3, slots=3)
    sizes = torch.tensor([0.3, 40.0, 2.0])
    adapter.assign(torch.tensor([0, 1, 2]))
    grad = F.normalize(torch.randn(adapter.rows.shape), dim=1) * sizes[:, None]
    adapter.rows.grad = grad.clone()
    expected = []
    for g in grad:
        row = torch.zeros_like(g).requires_grad_()
        row.grad = g.clone()
        torch.nn.utils.clip_grad_norm_([row], 1.0)
        expected.append(row.grad)
    assert torch.allclose(adapter.step(1e-3)[0], sizes, rtol=1e-5)
    # after one step from zero, exp_avg is a tenth of the gradient that AdamW was given
    assert relative(adapter.bank.exp_avg, 0.1 * torch.stack(expected)) < 1e-5


@pytest.mark.parametrize("method", ["meta-lora", "lora"])
def test_identities_trained_together_equal_separate_runs(method):
    flux, steps, batches = tiny_flux(), 6, [[0, 1, 2, 1], [2, 0, 2, 0], [1, 2, 0, 0]]
    alone = copy.deepcopy(flux)
    lomd = random_lomd(find_targets(flux), 5) if method == "meta-lora" else None
    together = MetaLoRA(flux, 2, lomd, num_identities=3, slots=3)
    start = together.bank.weight.clone()
    for step in range(steps):
        together.assign(torch.tensor(batches[step % 3]))
        flow_matching_loss(flux, *draws(4, seed=step)).sum().backward()
        together.step(5e-3)
    for identity in range(3):
        single = MetaLoRA(alone, 2, lomd)
        single.bank.weight.copy_(start[identity:identity + 1])
        for step in range(steps):
            mine = torch.tensor(batches[step % 3]) == identity
            if mine.any():
                single.assign(torch.zeros(int(mine.sum()), dtype=torch.long))
                flow_matching_loss(alone, *(d[mine] for d in draws(4, seed=step))).sum().backward()
                single.step(5e-3)
        for (A, B), (C, D) in zip(together.collapse(identity).values(), single.collapse().values()):
            assert (D @ C).any() and relative(B @ A, D @ C) < 1e-4
        moved = together.bank.weight[identity] - start[identity]
        assert relative(moved, single.bank.weight[0] - start[identity]) < 1e-4
        assert together.bank.steps[identity] == single.bank.steps[0]
        apply_loras(alone, [])


def test_targets_of_the_full_model():
    with torch.device("meta"):
        flux = Flux(FluxConfig())
    targets, everything = find_targets(flux), find_targets(flux, outside=True)
    assert len(targets) == 494 and sum(t.rows + t.d_in for t in targets) == 5_369_856
    golden = json.loads((Path(__file__).parent / "golden" / "checkpoint_layouts.json").read_text())
    tensors = golden["transformer/ (diffusers layout)"]["tensors"]
    linears = {name.removesuffix(".weight"): shape for name, shape in tensors.items()
               if name.endswith(".weight") and len(shape) == 2}
    assert {t.path: [t.rows, t.d_in] for t in everything} == linears
    assert {t.path for t in targets} == {path for path in linears if "blocks." in path}
    for module, parts in by_module(everything).items():                   # they tile the rows of their Linear
        assert parts[0].start == 0 and all(a.start + a.rows == b.start for a, b in zip(parts, parts[1:]))
        assert parts[-1].start + parts[-1].rows == flux.get_submodule(module).out_features


# ------------------------------------------------------------------------------------------------------------
# LoMD files


def test_lomd_file(tmp_path):
    targets = find_targets(tiny_flux())
    lomd = random_lomd(targets, 6, seed=3)
    assert all(torch.equal(lomd[k], v) for k, v in random_lomd(targets, 6, seed=3).items())
    assert any(not torch.equal(lomd[k], v) for k, v in random_lomd(targets, 6, seed=4).items())
    save_lomd(tmp_path / "lomd.safetensors", lomd, {"random": "true", "iterations": "0"})
    read, metadata = load_lomd(tmp_path / "lomd.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "lomd.safetensors"]
    assert same_bits(read, lomd)
    assert metadata == {"format": "pt", "r1": "6", "targets": str(len(targets)),
                        "random": "true", "iterations": "0"}
    check_lomd(read, targets)


def test_wrong_lomd_files(tmp_path):
    path, targets = tmp_path / "x.safetensors", find_targets(tiny_flux())
    lomd = random_lomd(targets, 4)
    first = targets[0].path
    assert str(path) in one_line(load_lomd, path)                                                  # not there
    assert str(tmp_path) in one_line(load_lomd, tmp_path)                                           # a folder
    for content in (b"", b"no tensors", b"\x80\x04\x95 pickle"):
        path.write_bytes(content)
        assert str(path) in one_line(load_lomd, path)
    save_lomd(path, lomd, {})
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in one_line(load_lomd, path)                                                       # torn
    save_file({}, path)
    assert "empty" in one_line(load_lomd, path)
    save_file({f"{first}.lomd": lomd[first], f"transformer.{first}.lora_A.weight": torch.zeros(4, 64)}, path)
    assert f"transformer.{first}.lora_A.weight" in one_line(load_lomd, path)
    for value in (float("nan"), float("inf")):
        bad = lomd[first].clone()
        bad[1, 2] = value
        save_lomd(path, lomd | {first: bad}, {})
        assert first in one_line(load_lomd, path)


def test_lomd_of_another_model():
    flux = tiny_flux()
    targets = find_targets(flux)
    lomd = random_lomd(targets, 4)
    path = targets[7].path
    assert path in one_line(check_lomd, {k: v for k, v in lomd.items() if k != path}, targets)
    foreign = "transformer_blocks.7.ff.net.2"
    assert foreign in one_line(check_lomd, lomd | {foreign: lomd[path]}, targets)
    for shape in ((4, 63), (0, targets[7].d_in), (targets[7].d_in,), (1, 4, targets[7].d_in), ()):
        message = one_line(check_lomd, lomd | {path: torch.zeros(shape)}, targets)
        assert path in message and str(list(shape)) in message and str(targets[7].d_in) in message
    assert "5" in one_line(check_lomd, lomd | {path: torch.zeros(5, targets[7].d_in)}, targets)            # two kinds of r1


def test_what_never_learns_takes_no_room():
    """A LoMD that stays has no moments, and those that are given are taken as they are."""
    flux = tiny_flux()
    adapter = MetaLoRA(flux, 1, lomd=random_lomd(find_targets(flux), 5))
    assert adapter.shared.exp_avg is None and adapter.shared.exp_avg_sq is None
    for adapter.train_lomd in (False, True):
        adapter.assign(torch.tensor([0]))
        flow_matching_loss(flux, *draws(1), guidance=1.0).sum().backward()
        adapter.step(1e-3)
        assert (adapter.shared.exp_avg is not None) == adapter.train_lomd
    assert adapter.shared.exp_avg.abs().max() > 0
    state = [torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 3), torch.tensor([4, 5])]
    bank = IdentityBank(*state)
    assert all(getattr(bank, part) is given for part, given in zip(IdentityBank.PARTS, state))


def test_a_modulation_keeps_its_own_weight():
    """It sees one vector an image: a wide copy of its weight would be for nothing."""
    flux = tiny_flux()
    before = {name: p.data_ptr() for name, p in flux.named_parameters()}
    adapter = MetaLoRA(flux, 1)
    narrow = {t.module for t in adapter.targets if flux.get_submodule(t.module).S is None}
    assert narrow == {t.module for t in adapter.targets if "mod" in t.module} != set()
    for name in narrow:
        assert flux.get_submodule(name).base.weight.data_ptr() == before[f"{name}.weight"]
