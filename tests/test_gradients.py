"""A LoMD from gradients: the sketch is the gradient, the algebra is Fisher's, and a run may be hit anywhere."""
import itertools
import shutil
import signal
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_meta_train_runs import MODEL, arguments, die, die_at_file, draw, run, run_pair, server, start_with_cache  # noqa: F401
from test_metalora import relative, tiny_flux

import meta_train
from flux_model import flow_matching_loss
from metalora import MetaLoRA
from support import gradients
from support.checkpoints import find_targets
from support.gradients import RHO, Gradients, Sums, discriminant, sketches


class Alone:
    """A Group of one."""
    rank, size = 0, 1

    def sum(self, tensor):
        return tensor

    def gather(self, thing):
        return [thing]


def batch(flux, count, seed):
    g, config = torch.Generator().manual_seed(seed), flux.config
    return [torch.randn(count, 16, 4, 4, generator=g), torch.randn(count, 16, 4, 4, generator=g), torch.rand(count, generator=g),
            torch.randn(count, 5, config.context_in_dim, generator=g), torch.randn(count, config.vec_in_dim, generator=g)]


def with_sketch(flux, tmp_path, r1=4):
    """Gradients on a model, of nobody: what is tested is given to its sums."""
    adapter = MetaLoRA(flux, gradients.SKETCH, num_identities=0)
    return Gradients(adapter, [], Namespace(seed=0, r1=r1, folder=MODEL), None, Alone(), tmp_path)


def test_a_sketch_is_the_gradient_of_the_weight(tmp_path):
    flux = tiny_flux()
    own = with_sketch(flux, tmp_path).adapter
    *_, ups = (own.bank.weight[0].split([own.size - sum(t.rows for t in own.targets) * gradients.SKETCH,
                                         sum(t.rows for t in own.targets) * gradients.SKETCH]))
    U = dict(zip([t.path for t in own.targets], ups.view(-1, gradients.SKETCH).split([t.rows for t in own.targets])))
    batches = [batch(flux, 3, 0), batch(flux, 1, 1)]
    found = dict(zip([t.path for t in own.targets], [each for part in sketches(own, batches) for each in part]))
    plain = tiny_flux().requires_grad_()
    plain.load_state_dict({name.replace(".base", ""): value for name, value in flux.state_dict().items()
                           if not name.endswith(".S")})
    sum(flow_matching_loss(plain, *each, guidance=1.0).sum() for each in batches).backward()
    for t in find_targets(plain):
        G = plain.get_submodule(t.module).weight.grad[t.start:t.start + t.rows] / 4
        assert relative(found[t.path], U[t.path].T @ G) < 1e-4


def test_more_rows_than_the_model_has_inputs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at most 64 rows in this model, not --r1 65"):
        with_sketch(tiny_flux(), tmp_path, r1=65)


def fishers(first, second, rho, count):
    """By its definition, without a sketch's range: K_b v = lambda (K_w + rho tr(K_w) / d I) v through a general solver."""
    n, d = len(first), first.shape[-1]
    a, b = (half - half.mean(0) for half in (first, second))
    K_b = sum(x.T @ y + y.T @ x for x, y in zip(a, b)) / 2 / n
    K_w = sum((x - y).T @ (x - y) for x, y in zip(first, second)) / 4 / n
    floor = rho * K_w.trace() / d
    values, vectors = torch.linalg.eig(torch.linalg.solve(K_w + floor * torch.eye(d), K_b))
    best = values.real.argsort(descending=True)[:count]
    return vectors.real[:, best], K_b, K_w


def people(n, targets, d, rows=gradients.SKETCH):
    """Pictures of people who differ in three directions, with differences of their own in all."""
    torch.manual_seed(0)
    who = torch.randn(n, targets, rows, 3) @ torch.randn(targets, 3, d) * 2
    return [who + torch.randn(n, targets, rows, d) * torch.linspace(0.2, 3, d) for _ in range(2)]


def test_two_passes_are_fishers_discriminant():
    first, second = (half.double() for half in people(40, 2, 24))
    torch.set_default_dtype(torch.float64)
    try:
        sums = Sums([torch.randn(2, 24, 24)], False)
        for halves in zip(first, second):
            sums.add([[half] for half in halves])
        (between, *_), = sums.means(Alone())
        sums = Sums([torch.linalg.qr(between)[0]], True)
        for halves in zip(first, second):
            sums.add([[half] for half in halves])
        (between, within, trace), = sums.means(Alone())
        rows = discriminant(between, within, RHO * trace / 24, 5) @ sums.right[0].mT
        for t in range(2):
            expected, K_b, K_w = fishers(first[:, t], second[:, t], RHO, 5)
            assert relative(trace[t], K_w.trace()) < 1e-9
            assert relative(rows[t] @ rows[t].T, torch.eye(5)) < 1e-9
            Q = torch.linalg.qr(expected)[0]
            assert (torch.linalg.svdvals(rows[t] @ Q) > 1 - 1e-6).all()
            # the order is theirs too: the first row is the first solution
            assert (rows[t][0] @ expected[:, 0]).abs() / expected[:, 0].norm() > 1 - 1e-6
    finally:
        torch.set_default_dtype(torch.float32)


# ----------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("data") / "buckets", 96)


@pytest.fixture(scope="module")
def reference(server, data, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("reference")
    code, out, err = run(server, folder, words(data))
    assert (code, err.count("note")) == (0, 0), err
    assert "LoMD of r1 4 from the gradients of 7 people" in out
    return folder


def words(data, *more):
    return [*arguments(data, "--from-gradients", *more), "--iters", "0"]


def lomd_of(folder):
    return load_file(folder / "lomd.safetensors")


def test_a_lomd_from_gradients(reference, data):
    lomd = lomd_of(reference)
    norms = torch.stack([rows.norm(dim=1) for rows in lomd.values()])
    assert norms.shape[1] == 4 and relative(norms, torch.full_like(norms, gradients.NORM)) < 1e-5
    assert not list((reference / "run" / "rank0" / "gradients").glob("*-*"))             # states go when it is done


@pytest.mark.parametrize("count, when", [(2, "torn"), pytest.param(1, "before", marks=pytest.mark.slow)])
def test_killed_at_a_checkpoint_it_goes_on_bit_for_bit(server, data, reference, tmp_path, count, when):  # noqa: F811
    folder = start_with_cache(tmp_path, reference)
    argv = words(data, "--save-every", "2")
    assert run(server, folder, argv, (die_at_file, "*-*.safetensors", when, count))[0] == -9
    assert not (folder / "lomd.safetensors").exists()
    assert run(server, folder, argv)[0] == 0
    assert all(torch.equal(own, lomd_of(reference)[name]) for name, own in lomd_of(folder).items())


def test_ctrl_c_saves_and_says_so(server, data, reference, tmp_path):  # noqa: F811
    folder = start_with_cache(tmp_path, reference)
    code, _, err = run(server, folder, words(data), (ctrl_c_at_person, 3))
    assert code == 130 and "3 of 14 gradients of people; the same command goes on" in err
    assert max(path.name for path in (folder / "run/rank0/gradients").iterdir()) == "00000003-00000000.safetensors"


def ctrl_c_at_person(count):
    add, calls = gradients.Sums.add, itertools.count(1)

    def hit(self, halves):
        add(self, halves)
        if next(calls) == count:
            signal.raise_signal(signal.SIGINT)
    gradients.Sums.add = hit


def test_stage_1_goes_on_from_there(server, data, reference, tmp_path):  # noqa: F811
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    argv = [*arguments(data, "--from-gradients"), "--iters", "3"]
    assert run(server, tmp_path, argv, (no_gradients,))[0] == 0                          # they are read again
    changed = sum(not torch.equal(own, lomd_of(reference)[name]) for name, own in lomd_of(tmp_path).items())
    assert 0 < changed
    code, _, err = run(server, tmp_path, [*arguments(data), "--iters", "9"])
    assert code == 2 and "start" in err


def no_gradients():
    gradients.Gradients.run = lambda *args: die()


@pytest.mark.slow
def test_two_processes_equal_one(server, data, reference, tmp_path):  # noqa: F811
    folder = start_with_cache(tmp_path, reference)
    assert run_pair(server, folder, words(data))[0] == [0, 0]
    spans = [[own.T @ own for own in lomd_of(each).values()] for each in (folder, reference)]
    close = [relative(own, other) < 1e-3 for own, other in zip(*spans)]
    assert sum(close) > 0.9 * len(close)        # of seven people some targets' 4th and 5th solutions are worth the same


def test_nothing_to_do_is_refused(server, data, tmp_path):  # noqa: F811
    code, _, err = run(server, tmp_path, [*arguments(data), "--iters", "0"])
    assert code == 2 and "--from-gradients" in err


def test_a_picture_whose_gradient_is_not_finite_is_named(server, data, reference, tmp_path):  # noqa: F811
    folder = start_with_cache(tmp_path, reference)
    latent = next((folder / "run" / "cache").glob("*-64x64-*"))
    save_file({"posterior": torch.full_like(load_file(latent)["posterior"], torch.nan)}, latent)
    code, _, err = run(server, folder, words(data))
    assert code == 1 and "not finite at a picture of p" in err and "run" in err


def test_default_iterations():
    assert meta_train.parse(["--data", "x"]).iters is None
