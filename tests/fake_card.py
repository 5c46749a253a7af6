"""A CUDA card that is not there: full-size runs on tensors that have a shape, a dtype and a device and no numbers.

    with FakeCard(gib=80, capability=(9, 0)) as card:
        card.model()                                # what the product opens from now on is FLUX.1-dev, of shapes
        flux = checkpoints.load_flux("flux", card.device)
        ...
        print(card.report())

What lies on the CPU is real, but for tensors of more than 5 million numbers; what lies on "cuda" is torch's FakeTensor. Found out:
devices and dtypes that do not go together, ops that do not exist, waits of the CPU for the card with the line of the project, kernel
launches, bytes moved, FLOPs, pinned memory, and the memory that PyTorch's caching allocator would hold, by a simulation of it that
raises torch.OutOfMemoryError where the card would be full. Not found out: numbers, speed, a kernel's workspace.
"""
import bisect
import collections
import contextlib
import math
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

from flux_model import Flux, FluxConfig
from support import checkpoints, memory

aten, prim = torch.ops.aten, torch.ops.prim
MIB, GIB = 2 ** 20, 2 ** 30
BIG = 5_000_000


class Pool:
    """A segment of addresses that grows and shrinks by pages; blocks follow each other: start -> [size, state, start before, start
    behind], where state is "used", "free" or "unmapped"."""
    def __init__(self, page, size):
        self.page, self.blocks = page, {0: [size, "unmapped", None, None]}
        self.free, self.unmapped = [], [0]                      # sorted [(size, start)], [start]

    def put(self, start, size, state, before, behind):
        """A block where none is, merged with neighbours of the same state -> its start."""
        if state != "used":
            if before is not None and self.blocks[before][1] == state:
                size, start, before = size + self.blocks[before][0], before, self.take(before)[2]
            if behind is not None and self.blocks[behind][1] == state:
                own, behind = self.blocks[behind][0], self.take(behind)[3]
                size += own
            bisect.insort(*((self.free, (size, start)) if state == "free" else (self.unmapped, start)))
        self.blocks[start] = [size, state, before, behind]
        if before is not None:
            self.blocks[before][3] = start
        if behind is not None:
            self.blocks[behind][2] = start
        return start

    def take(self, start):
        block = self.blocks.pop(start)
        if block[1] == "free":
            self.free.pop(bisect.bisect_left(self.free, (block[0], start)))
        elif block[1] == "unmapped":
            self.unmapped.pop(bisect.bisect_left(self.unmapped, start))
        return block

    def cut(self, start, sizes, states):
        """A block becomes several -> their starts."""
        _, _, before, behind = self.take(start)
        starts = []
        for i, (size, state) in enumerate(zip(sizes, states)):
            if size:
                last = not any(sizes[i + 1:])
                before = self.put(start, size, state, before, behind if last else None)
                starts.append(before)
            start += size
        return starts

    def best(self, size):
        """The free block to take, or None. What could still grow counts as large as it could become."""
        at = bisect.bisect_left(self.free, (size, -1))
        if at == len(self.free):
            return None
        def room(entry):
            behind = self.blocks[entry[1]][3]
            return entry[0] + (self.blocks[behind][0] if behind is not None and self.blocks[behind][1] == "unmapped" else 0)
        while at + 1 < len(self.free) and room(self.free[at + 1]) < room(self.free[at]):
            at += 1
        return self.free[at][1]

    def place_to_grow(self, size):
        """Where pages are mapped for a block of this size -> its start, and the bytes that must be mapped."""
        for start in self.unmapped:
            before = self.blocks[start][2]
            first = before if before is not None and self.blocks[before][1] == "free" else start
            at, have, missing = first, 0, 0
            while at is not None and self.blocks[at][1] != "used" and have < size:
                own, state = self.blocks[at][:2]
                if state == "unmapped":
                    missing += min(own, -(-min(own, size - have) // self.page) * self.page)
                have, at = have + own, self.blocks[at][3]
            if have >= size:
                return first, missing
        raise torch.OutOfMemoryError("simulated: no addresses are left")

    def map(self, start, size):
        """Maps pages from a block on until it is a free one of that size -> its start."""
        while self.blocks[start][1] == "unmapped" or self.blocks[start][0] < size:
            own, state, _, behind = self.blocks[start]
            target, have = (start, 0) if state == "unmapped" else (behind, own)
            whole = self.blocks[target][0]
            pages = min(whole, -(-(size - have) // self.page) * self.page)
            start = self.cut(target, (pages, whole - pages), ("free", "unmapped"))[0]
        return start

    def unmap(self):
        """Gives back all pages that are free as a whole -> their bytes."""
        total = 0
        for size, start in list(self.free):
            first = -(-start // self.page) * self.page
            pages = (start + size) // self.page * self.page - first
            if pages > 0:
                self.cut(start, (first - start, pages, start + size - first - pages), ("free", "unmapped", "free"))
                total += pages
        return total


class Allocator:
    """PyTorch's caching allocator with expandable_segments:True, one stream."""
    def __init__(self, capacity):
        self.capacity, self.reserved, self.allocated = capacity, 0, 0
        self.peak_allocated = self.peak_reserved = 0
        self.pools = {"small": Pool(2 * MIB, 2 ** 40), "large": Pool(20 * MIB, 2 ** 40)}
        self.releases = 0

    def reset_peaks(self):
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def malloc(self, nbytes):
        size = max(512, -(-nbytes // 512) * 512)
        name = "small" if size <= MIB else "large"
        pool = self.pools[name]
        start = pool.best(size)
        if start is None:
            first, missing = pool.place_to_grow(size)
            if self.reserved + missing > self.capacity:
                self.release()
                first, missing = pool.place_to_grow(size)
            if self.reserved + missing > self.capacity:
                raise torch.OutOfMemoryError(f"CUDA out of memory, simulated: {nbytes / MIB:.0f} MiB wanted, allocated "
                                             f"{self.allocated / GIB:.2f}, reserved {self.reserved / GIB:.2f} of {self.capacity / GIB:.2f} GiB")
            self.reserved += missing
            self.peak_reserved = max(self.peak_reserved, self.reserved)
            start = pool.map(first, size)
        rest = pool.blocks[start][0] - size
        start = pool.cut(start, (size, rest), ("used", "free"))[0]
        self.allocated += size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return name, start

    def drop(self, block):
        pool, start = self.pools[block[0]], block[1]
        self.allocated -= pool.blocks[start][0]
        pool.cut(start, (pool.blocks[start][0],), ("free",))

    def release(self):
        self.releases += 1
        self.reserved -= sum(pool.unmap() for pool in self.pools.values())


VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "split_with_sizes", "unbind", "detach",
         "unsqueeze", "squeeze", "alias", "as_strided", "lift_fresh", "chunk", "narrow", "_reshape_alias", "view_as", "diagonal", "unfold",
         "view_as_complex", "view_as_real"}
NOTHING = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "is_same_size", "_local_scalar_dense"}
LAUNCHES = {"constant_pad_nd": 2, "_scaled_dot_product_flash_attention_backward": 3, "_scaled_dot_product_cudnn_attention_backward": 3,
            "_scaled_dot_product_efficient_attention_backward": 3, "native_group_norm": 3, "_unique2": 8, "var_mean": 2, "repeat_interleave": 2}


class FakeCard(TorchDispatchMode):
    def __init__(self, gib=80.0, capability=(9, 0), context_gib=0.5, attention="flash", project=str(Path(__file__).resolve().parents[1])):
        super().__init__()
        self.total, self.context = int((gib - context_gib) * GIB), context_gib
        self.memory, self.capability, self.attention, self.project = Allocator(self.total), capability, attention, project
        self.device = torch.device("cuda:0")
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.in_backward, self.big = False, BIG
        self.pinned = 0
        self.phase, self.problems = "other", []
        self.seen, self.shadows, self.locked = {}, WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self.reset()

    def reset(self):
        zeros = lambda: collections.defaultdict(float)
        self.launches, self.bytes, self.flops = collections.Counter(), zeros(), zeros()
        self.syncs, self.times = collections.Counter(), []
        self.by_op = collections.defaultdict(lambda: [0, 0.0, 0.0])
        self.memory.reset_peaks()

    # -- where in the project

    def where(self):
        frame, found = sys._getframe(1), []
        while frame:
            name = frame.f_code.co_filename
            if name.startswith(self.project) and not name.startswith(str(Path(__file__).parent)):
                found.append(f"{Path(name).name}:{frame.f_lineno}")
            frame = frame.f_back
        return found[0] if found else "?"

    def sync(self, what):
        self.syncs[self.phase, what, self.where()] += 1

    def problem(self, what):
        entry = f"{what} at {self.where()}"
        if entry not in self.problems:
            self.problems.append(entry)

    # -- memory

    def track(self, tensor):
        if not isinstance(tensor, FakeTensor) or tensor.fake_device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        self.seen[key] = self.memory.malloc(storage.nbytes())
        weakref.finalize(storage, self.gone, key)

    def gone(self, key):
        block = self.seen.pop(key, None)
        if block is not None:
            self.memory.drop(block)

    def place(self, tensors, flat, fill=False):
        """memory.Offload.place: where they are is all there is to a fake tensor; `flat` stands for their memory."""
        for tensor in tensors:
            tensor.fake_device = flat.fake_device
            storage = tensor.untyped_storage()
            if storage._cdata not in self.seen:
                weakref.finalize(storage, self.gone, storage._cdata)
            block, self.seen[storage._cdata] = self.seen.get(storage._cdata), None
            if block is not None:
                self.memory.drop(block)

    def transient(self, nbytes):
        if nbytes:
            self.memory.drop(self.memory.malloc(int(nbytes)))

    # -- one op

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is prim.device.default:             # what C++ sees: its autograd engine has no card to look for
            return torch.device("meta") if args[0].fake_device.type == "cuda" else args[0].fake_device
        name = func._schema.name.removeprefix("aten::")
        flat = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, torch.Tensor)]
        fakes = [a for a in flat if isinstance(a, FakeTensor)]
        device = kwargs.get("device")
        device = torch.device(device) if device is not None else None
        if device is not None and device.type == "meta" and (fakes or self.in_backward or name == "_to_copy"):  # .to(like)
            kwargs["device"] = device = self.device
        if kwargs.pop("pin_memory", False):              # torch's own allocator of pinned memory rounds up
            self.pinned += 2 ** math.ceil(math.log2(math.prod(args[0]) * kwargs.get("dtype", torch.float32).itemsize))
        if not fakes and (device is None or device.type != "cuda"):
            size = math.prod(args[0]) if args and isinstance(args[0], (list, tuple)) and all(isinstance(n, int) for n in args[0]) and not flat else 0
            if size < self.big or device is not None and device.type == "meta":
                with _disable_current_modes():
                    return func(*args, **kwargs)
        cuda = [a for a in fakes if a.fake_device.type == "cuda"]
        generator, place = kwargs.get("generator"), device or (cuda[0].fake_device if cuda else None)
        if generator is not None and place is not None and generator.device.type != place.type:
            self.problem(f"{name}: a generator on {generator.device} for a tensor on {place}")
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_scaled_dot_product_flash_attention",
                    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"):
            dtypes = {a.dtype for a in flat if a.dim()}
            if len(dtypes) > 1:
                self.problem(f"{name}: dtypes {dtypes}")
        if name == "index" and not isinstance(args[0], FakeTensor) and cuda:
            self.problem("index: a CPU tensor indexed by one on the card")
        if name in ("index", "index_put_", "index_put") and cuda:
            for index in args[1]:
                if isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor):
                    self.sync("index from the CPU (H2D)")
                elif isinstance(index, torch.Tensor) and index.dtype == torch.bool:
                    self.sync("boolean mask (nonzero)")
        # values that only a real card has
        if name == "_local_scalar_dense" and fakes:
            if cuda:
                self.sync("item / bool (D2H)")
            shadow = self.shadows.get(args[0])
            if shadow is not None:
                with _disable_current_modes():
                    return shadow.item()
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 0)
        if name == "_unique2" and cuda:
            self.sync("unique (size of the result, D2H)")
            self.count(name, flat, [], func, args)
            with _disable_current_modes():
                real = func(self.shadows[args[0]], *args[1:], **kwargs)
            return tuple(self.on_card(each) for each in real)
        if name == "nonzero" and cuda:
            self.sync("nonzero (D2H)")
            return self.on_card(torch.zeros(0, args[0].dim(), dtype=torch.long))
        if name == "_to_copy" and cuda and device is not None and device.type == "cpu" and self.big:
            self.sync("copy to the CPU (D2H)")
            with _disable_current_modes():
                shadow = self.shadows.get(args[0])
                return shadow.clone() if shadow is not None else torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        h2d = name == "_to_copy" and not cuda and device is not None and device.type == "cuda" or \
            name == "copy_" and cuda and len(flat) == 2 and not (isinstance(args[1], FakeTensor) and args[1].fake_device.type == "cuda")
        non_blocking = kwargs.get("non_blocking") or name == "copy_" and len(args) > 2 and args[2]
        source = flat[-1] if h2d else None
        if h2d and not (non_blocking and (isinstance(source, FakeTensor) or source in self.locked)):
            self.sync("copy to the card (H2D, not pinned)")
        if name == "copy_" and cuda and not any(a is flat[0] for a in cuda) and not non_blocking:
            self.sync("copy to the CPU (D2H)")
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            if type(error).__name__ != "OutOfMemoryError":
                self.problem(f"{name} failed: {type(error).__name__}: {str(error)[:200]}")
            raise
        if name == "_to_copy" and not cuda and h2d and flat[0].dtype in (torch.int64,) and flat[0].numel() <= 4096 and not fakes:
            with _disable_current_modes():
                self.shadows[out] = flat[0].clone()
        outs = [a for a in tree_flatten(out)[0] if isinstance(a, torch.Tensor)]
        for each in outs:
            self.track(each)
        self.count(name, flat, outs, func, args)
        return out

    def on_card(self, real):
        with self.fake:
            out = torch.empty(real.shape, dtype=real.dtype, device=self.device)
        self.track(out)
        self.shadows[out] = real
        return out

    def count(self, name, flat, outs, func, args):
        tensors = [a for a in (*flat, *outs) if isinstance(a, FakeTensor) and a.fake_device.type == "cuda"]
        if not tensors or name in VIEWS or name in NOTHING:
            return
        launches = LAUNCHES.get(name, 1)
        if name == "addmm" and args[0].dim() == 2:                 # a copy of the matrix, then the product is added
            launches = 2
        sources = {}
        for a in flat:
            if isinstance(a, FakeTensor):
                sources[id(a)] = min(a.numel() * a.itemsize, a.untyped_storage().nbytes())
        if name.startswith("new_") or name.endswith("_like"):
            sources = {}
        moved = sum(sources.values()) + sum(a.numel() * a.itemsize for a in outs)
        if name in ("copy_", "zero_", "fill_"):
            moved = sum(sources.values()) if name == "copy_" else args[0].numel() * args[0].itemsize
        flops, extra = 0, 0
        if name in ("mm", "_scaled_mm"):
            flops = 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
        elif name == "addmm":
            flops = 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif name in ("bmm", "baddbmm"):
            a, b = args[-2:] if name == "bmm" else args[1:3]
            flops = 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
        elif "scaled_dot_product" in name:
            back = name.endswith("backward")
            q = args[1] if back else args[0]
            b, h, l, d = q.shape
            flops = (10 if back else 4) * b * h * l * args[2 if back else 1].shape[2] * d
            extra = q.numel() * 4 if back else 0                 # dq is summed up in fp32
        elif name in ("convolution",):
            w, o = args[1], outs[0]
            flops = 2 * o.numel() * w[0].numel()
            extra = 64 * MIB
        self.transient(extra)
        phase = self.phase
        self.launches[phase] += launches
        self.bytes[phase] += moved
        self.flops[phase] += flops
        self.times.append((phase, name, flops, moved, launches, "fp8" if name == "_scaled_mm" else str(tensors[0].dtype)))
        entry = self.by_op[phase, name]
        entry[0], entry[1], entry[2] = entry[0] + launches, entry[1] + moved, entry[2] + flops

    # -- a model of time

    def seconds(self, bf16=790e12, fp8=1400e12, fp32=40e12, attention=None, bandwidth=4.3e12, launch=0.0, phases=None):
        """Sum over ops of the longer of arithmetic and memory; `attention`: its rate; `launch`: the least an op takes."""
        total = collections.defaultdict(float)
        for phase, name, flops, moved, launches, dtype in self.times:
            rate = (attention or bf16) if "scaled_dot" in name else fp8 if dtype == "fp8" else fp32 if dtype == "torch.float32" else bf16
            total[phase] += max(flops / rate, moved / bandwidth, launch * launches)
        return dict(total)

    # -- the pieces of torch that would ask a driver

    def __enter__(self):
        stack = self.stack = contextlib.ExitStack()
        card = self

        class Stream:
            def __init__(self, *a, **k): pass
            def wait_stream(self, other): pass
            def wait_event(self, event): pass
            def synchronize(self): card.sync("stream.synchronize")

        class Event:
            def __init__(self, *a, **k): pass
            def record(self, *a): pass
            def synchronize(self): card.sync("event.synchronize")
            def elapsed_time(self, other): return 1.0
        patch = lambda where, name, new: stack.enter_context(mock.patch.object(where, name, new))
        memory = self.memory
        for name, new in {
                "mem_get_info": lambda *a: (card.total - memory.reserved, card.total), "memory_reserved": lambda *a: memory.reserved,
                "memory_allocated": lambda *a: memory.allocated, "max_memory_allocated": lambda *a: memory.peak_allocated,
                "reset_peak_memory_stats": lambda *a: memory.reset_peaks(), "empty_cache": lambda: memory.release(), "Stream": Stream, "Event": Event,
                "current_stream": lambda *a: Stream(), "stream": lambda s: contextlib.nullcontext(),
                "get_device_capability": lambda *a: card.capability, "synchronize": lambda *a: card.sync("synchronize")}.items():
            patch(torch.cuda, name, new)
        tolist, backward = torch.Tensor.tolist, torch.Tensor.backward

        def fake_tolist(tensor):
            if not isinstance(tensor, FakeTensor):
                return tolist(tensor)
            card.sync("tolist (D2H)")
            shadow = card.shadows.get(tensor)
            return shadow.tolist() if shadow is not None else torch.ones(tensor.shape).to(tensor.dtype).tolist()

        def fake_backward(tensor, *a, **k):
            before, card.phase, card.in_backward = card.phase, "backward", True
            try:
                return backward(tensor, *a, **k)
            except torch.OutOfMemoryError:
                # with one thread, the engine's queue keeps the rest of the graph until the next backward pass empties it
                with _disable_current_modes():
                    backward(torch.zeros((), requires_grad=True).clone())
                raise
            finally:
                card.phase, card.in_backward = before, False

        def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
            if query.device.type != "cuda":
                return real_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            if attn_mask is not None or query.shape[-1] > 256:
                return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, query.requires_grad)[0]
            if card.attention == "cudnn":
                return aten._scaled_dot_product_cudnn_attention(query, key, value, None, query.requires_grad)[0]
            return aten._scaled_dot_product_flash_attention(query, key, value)[0]

        def rms_norm(x, shape, weight=None, eps=None):           # as on a card: one kernel where the dtypes agree
            if x.device.type != "cuda" or weight is not None and weight.dtype != x.dtype:
                return real_norm(x, shape, weight, eps)
            return aten._fused_rms_norm(x, shape, weight, eps)[0]
        real_pointer = torch.Tensor.data_ptr
        real_sdpa, real_norm = torch.nn.functional.scaled_dot_product_attention, torch.rms_norm
        # in C++ it would make its zeros where C++ believes the tensor to be
        patch(torch.nn.functional, "one_hot", lambda x, n: (x[..., None] == torch.arange(n, device=x.device)).long())
        patch(torch.Tensor, "tolist", fake_tolist)
        patch(FakeTensor, "tolist", fake_tolist)                 # its own asks for one number after the other
        patch(torch.Tensor, "backward", fake_backward)
        patch(torch.nn.functional, "scaled_dot_product_attention", sdpa)
        patch(torch, "rms_norm", rms_norm)

        def pin_memory(tensor):
            if isinstance(tensor, FakeTensor):
                return tensor
            with _disable_current_modes():
                copy = tensor.clone()
            card.locked[copy] = True
            return copy
        patch(torch.Tensor, "pin_memory", pin_memory)
        patch(torch.version, "cuda", "13.0")

        class Cudart:
            @staticmethod
            def cudaHostRegister(pointer, size, flags):
                card.pinned += size
                return 0

            @staticmethod
            def cudaHostUnregister(pointer):
                pass
        patch(torch.cuda, "cudart", Cudart)
        patch(torch.Tensor, "data_ptr", lambda tensor: 0 if isinstance(tensor, FakeTensor) else real_pointer(tensor))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(self.fake)
        super().__enter__()
        self.memory.malloc((32 if self.capability >= (9, 0) else 8) * MIB + 128 * 1024)         # cuBLAS's workspace
        return self

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def model(self, config=None, host_gib=64):
        """From now on the product's transformer is one of this configuration, FLUX.1-dev, beside so much memory of the CPU."""
        config = config or FluxConfig()
        with _disable_current_modes(), torch.device("meta"):
            files = Shapes(Flux(config))
        fill = checkpoints.fill_flux

        def fill_flux(files, config, device, dtype, fp8=False, offload=False, stay=0):
            self.big = 0 if offload else BIG                 # what moves between the two is fake on either side
            try:
                return fill(files, config, device, dtype, fp8, offload, stay)
            finally:
                self.big = BIG
        patch = lambda where, name, new: self.stack.enter_context(mock.patch.object(where, name, new))
        patch(checkpoints, "flux_files", lambda folder: (files, config))
        patch(checkpoints, "fill_flux", fill_flux)
        patch(checkpoints, "text_length", lambda folder: 512)
        patch(memory.Offload, "place", staticmethod(self.place))
        patch(memory, "host_memory", lambda: host_gib * GIB)

    def phased(self, where, name, phase):
        """From now on what runs within where.name counts for `phase`."""
        original = getattr(where, name)

        def wrapped(*a, **k):
            before, self.phase = self.phase, phase
            try:
                return original(*a, **k)
            finally:
                self.phase = before
        self.stack.enter_context(mock.patch.object(where, name, wrapped))

    def report(self, ops=0):
        lines = [f"memory: now {self.memory.allocated / GIB:.2f}, peak {self.memory.peak_allocated / GIB:.2f} allocated, "
                 f"{self.memory.peak_reserved / GIB:.2f} reserved GiB of {self.total / GIB:.2f}; cache released {self.memory.releases} times"]
        for phase in self.launches:
            lines.append(f"  {phase:<10} {self.launches[phase]:>7} launches {self.bytes[phase] / 1e9:>9.1f} GB {self.flops[phase] / 1e12:>8.2f} TFLOP")
            for (p, name), (n, moved, flops) in sorted(self.by_op.items(), key=lambda item: -item[1][1])[:10 ** 6] if ops else []:
                if p == phase and ops and n:
                    lines.append(f"      {name:<46} {n:>6} {moved / 1e9:>8.2f} GB {flops / 1e12:>8.2f} TFLOP")
        for (phase, what, where), n in sorted(self.syncs.items()):
            lines.append(f"  sync {phase:<9} {n:>4} x {what:<36} {where}")
        lines += [f"  PROBLEM {p}" for p in self.problems]
        return "\n".join(lines)


class Shapes:
    """What checkpoints.TensorFiles is to a checkpoint, for one that has shapes only."""
    metadata, path = {}, Path("shapes")

    def __init__(self, model):
        self.shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        self.names = self.shapes

    def shape(self, name):
        return self.shapes[name]

    def __getitem__(self, name):
        return torch.zeros(self.shapes[name], dtype=torch.bfloat16)

    def quantized(self, names, device):
        return memory.quantize(torch.cat([torch.empty(self.shapes[name], dtype=torch.bfloat16, device=device) for name in names]))


def full_size_flux(card, fp8=False, offload=False, stay=0, config=None):
    """The project's load_flux over shapes."""
    card.model(config)
    return checkpoints.load_flux(Path("flux"), card.device, torch.bfloat16, fp8=fp8, offload=offload, stay=stay)
