"""The op contract of DESIGN §4, for every op, backend and sample."""

import copy
import io

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from numerics import double
from samples import SAMPLES
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import vitkit
from vitkit import _library, backends

KERNEL_BACKENDS = {"cpu": ["cpu", "triton"], "cuda": ["cuda", "triton"]}
every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)


@pytest.fixture(params=["native", "triton"])
def backend(request, device):
    """A kernel backend of the device: the C++ one and Triton (in its interpreter on CPU
    tensors)."""
    return request.param if request.param == "triton" else device


def usable(sample, backend, function, values):
    reason = vitkit.explain(sample.op, **dict_of(sample, values)).reasons[backend]
    if reason is not None:
        pytest.skip(reason)


def dict_of(sample, values):
    tensors, options = sample.make(str(values[0].device.type), values[0].dtype)
    return sample.arguments({**tensors, **options})


def loss(outputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(
        (o.float() * torch.arange(1, o.numel() + 1, device=o.device).view(o.shape).cos()).sum()
        for o in outputs
    )


def test_every_op_has_samples():
    assert {s.op for s in SAMPLES} == set(backends.OPS)
    assert all(getattr(vitkit, op) is entry.public for op, entry in backends.OPS.items())


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the vitkit operators a call runs, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitkit":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def record(function, values, backend):
    with Recorder() as recorder:
        leaves = [v.clone().requires_grad_() for v in values]
        loss(function(*leaves, backend=backend)).backward()
    return recorder.calls


@every_sample
def test_opcheck(sample, backend, device):
    function, values = sample.differentiable(device, torch.float32)
    usable(sample, backend, function, values)
    calls = record(function, values, backend)
    assert [c[0].name().split("_")[-1].split(".")[0] for c in calls] == ["fwd", "bwd"]
    for op, args, kwargs in calls:
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(op, args, kwargs)


@every_sample
def test_compile_fullgraph_with_dynamic_shapes(sample, backend, device):
    function, values = sample.differentiable(device, torch.float32)
    usable(sample, backend, function, values)
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda *v: function(*v, backend=backend), fullgraph=True, dynamic=True, backend=keep
    )
    expected = function(*values, backend=backend)
    torch.testing.assert_close(compiled(*values), expected)
    assert len(graphs) == 1


@every_sample
def test_compiled_training_step(sample, device):
    """AOTAutograd traces forward and backward; both must call the kernels and nothing else of the
    op."""
    from torch._dynamo.backends.common import aot_autograd

    function, values = sample.differentiable(device, torch.float32)
    usable(sample, device, function, values)
    torch._dynamo.reset()
    called = []

    def note(graph, _inputs):
        called.extend(str(n.target) for n in graph.graph.nodes if "vitkit" in str(n.target))
        return graph

    compiled = torch.compile(
        lambda *v: loss(function(*v, backend=device)),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=note),
    )
    leaves = [v.clone().requires_grad_() for v in values]
    expected = [v.clone().requires_grad_() for v in values]
    compiled(*leaves).backward()
    loss(function(*expected, backend=device)).backward()
    for got, want in zip(leaves, expected, strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    names = [f"vitkit.{sample.operator}_{direction}.default" for direction in ("fwd", "bwd")]
    assert called == names


@every_sample
def test_export(sample, device):
    function, values = sample.differentiable(device, torch.float32)
    usable(sample, device, function, values)

    class Module(torch.nn.Module):
        def forward(self, *v):
            return function(*v, backend=device)

    program = torch.export.export(Module(), tuple(values))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert f"vitkit.{sample.operator}_fwd" in loaded.graph_module.code
    torch.testing.assert_close(loaded.module()(*values), function(*values, backend=device))


@every_sample
def test_gradgrad_through_the_reference(sample, device):
    """create_graph=True gives gradients that can be differentiated again, equal to the
    reference's."""
    function, values = sample.differentiable(device, torch.float32)
    usable(sample, device, function, values)

    def second(backend, inputs):
        leaves = [v.clone().requires_grad_() for v in inputs]
        outputs = function(*leaves, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # Squared: an op that is linear in a tensor would have a constant gradient of it.
        first = torch.autograd.grad(
            loss(tuple(o.square() for o in outputs)), leaves, create_graph=True
        )
        assert all(g.requires_grad for g in first)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)

    for got, want in zip(second(device, values), second("reference", double(*values)), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)


@every_sample
def test_gradcheck_of_the_reference(sample, device):
    if sample.op == "dilated_attention":
        pytest.skip("its weights are detached: test_weights_are_detached checks the gradient")
    function, values = sample.differentiable(device, torch.float64)
    leaves = [v.requires_grad_() for v in values]
    torch.autograd.gradcheck(lambda *v: function(*v, backend="reference"), leaves, fast_mode=True)
    torch.autograd.gradgradcheck(
        lambda *v: function(*v, backend="reference"), leaves, fast_mode=True
    )


@every_sample
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(sample, device, dtype):
    """Same output dtype under autocast as the torch function it stands for, and gradients in the
    inputs' dtype."""
    function, values = sample.differentiable(device, torch.float32)
    leaves = [v.clone().requires_grad_() for v in values]
    with torch.autocast(device, dtype=dtype):
        outputs = function(*leaves)
        out = outputs[0] if isinstance(outputs, tuple) else outputs
        if sample.op.endswith("attention"):
            t = torch.zeros(1, 1, 1, 8, device=device)
            expected = torch.nn.functional.scaled_dot_product_attention(t, t, t).dtype
        elif sample.op.startswith("patch_embed"):
            t = torch.zeros(1, 1, 1, 1, device=device)
            expected = torch.nn.functional.conv2d(t, t).dtype
        else:
            expected = torch.nn.functional.group_norm(torch.zeros(1, 2, 3, device=device), 1).dtype
    assert out.dtype == expected
    loss(outputs).backward()
    assert all(v.grad is not None and v.grad.dtype == torch.float32 for v in leaves)


@every_sample
def test_checkpointing(sample, device):
    function, values = sample.differentiable(device, torch.float32)
    plain, recomputed = ([v.clone().requires_grad_() for v in values] for _ in range(2))
    loss(function(*plain)).backward()
    loss(checkpoint(function, *recomputed, use_reentrant=False)).backward()
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a.grad, b.grad)


@every_sample
def test_vmap_matches_a_loop(sample, device):
    function, values = sample.differentiable(device, torch.float32)
    batched = [torch.stack([v, v.flip(0)]) for v in values]
    for leaves in (batched, [b.clone().requires_grad_() for b in batched]):
        got = torch.func.vmap(function)(*leaves)
        got = got if isinstance(got, tuple) else (got,)
        for i in range(2):
            want = function(*(b[i] for b in leaves))
            want = want if isinstance(want, tuple) else (want,)
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g[i], w)


@every_sample
def test_functional_grad(sample, device):
    function, values = sample.differentiable(device, torch.float32)
    leaf = values[0].clone().requires_grad_()
    loss(function(leaf, *values[1:])).backward()
    got = torch.func.grad(lambda v: loss(function(v, *values[1:])))(values[0])
    torch.testing.assert_close(got, leaf.grad)


@every_sample
@pytest.mark.parametrize("dual", [False, True], ids=["jvp", "dual"])
def test_forward_mode_derivatives_are_those_of_the_reference(sample, device, dual):
    """Operators have none, and torch would take them for zero."""
    function, values = sample.differentiable(device, torch.float32)
    tangents = [torch.randn_like(v) for v in values]

    def derivative(function, values, tangents):
        return torch.func.jvp(lambda *v: loss(function(*v)), tuple(values), tuple(tangents))[1]

    def plain(*values):
        return function(*values, backend="reference")

    want = derivative(plain, double(*values), double(*tangents))
    assert want != 0
    if not dual:
        got = derivative(function, values, tangents)
    else:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(values, tangents, strict=True)]
            got = forward_ad.unpack_dual(loss(function(*duals))).tangent
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="only the reference has forward-mode derivatives"):
        derivative(lambda *v: function(*v, backend=device), values, tangents)
    # What was found out about these tensors before and after is not mixed up with it.
    assert vitkit.explain(sample.op, **dict_of(sample, values)).backend == device


@every_sample
def test_flops_are_counted(sample, device):
    function, values = sample.differentiable(device, torch.float32)
    usable(sample, device, function, values)
    with FlopCounterMode(display=False) as forward:
        function(*values, backend=device)
    with FlopCounterMode(display=False) as both:
        loss(function(*(v.clone().requires_grad_() for v in values), backend=device)).backward()
    # The gradient of a rotation is a rotation.
    factor = 3.5 if sample.op.endswith("attention") else 2 if sample.op == "rope_2d" else 3
    assert forward.get_total_flops() > 0
    assert both.get_total_flops() == factor * forward.get_total_flops()


@every_sample
def test_inputs_are_not_written(sample, backend, device):
    function, values = sample.differentiable(device, torch.float32)
    usable(sample, backend, function, values)
    before = copy.deepcopy(values)
    record(function, values, backend)
    assert all(torch.equal(a, b) for a, b in zip(before, values, strict=True))


@every_sample
def test_deterministic(sample, backend, device):
    function, values = sample.differentiable(device, torch.float32)
    usable(sample, backend, function, values)

    def run():
        leaves = [v.clone().requires_grad_() for v in values]
        outputs = function(*leaves, backend=backend)
        loss(outputs).backward()
        return [*(outputs if isinstance(outputs, tuple) else (outputs,)), *(v.grad for v in leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_meta_tensors_give_shapes():
    q = torch.empty(2, 5, 3, 16, device="meta")
    assert torch.ops.vitkit.flash_attention_fwd(q, q, q, None, None, None, False, 1.0)[1].shape == (
        2,
        3,
        5,
    )
    x = torch.empty(2, 8, 4, 4, device="meta").contiguous(memory_format=torch.channels_last)
    y = torch.ops.vitkit.group_norm_silu_fwd(x, 4, None, None, 1e-5, True, None, None, None)[0]
    assert y.stride() == x.stride()


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(x, exponent):
        return x**exponent

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.exponent = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ctx.exponent * x ** (ctx.exponent - 1), None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _library.vmap_by_loop(_Cube.apply, info, in_dims, args)


def test_apply_is_that_of_the_function(monkeypatch):
    """Eager calls take the twin, functorch's transforms the function itself; both differentiate
    twice and bear its name."""
    calls = []
    kept = _Cube.apply
    monkeypatch.setattr(_Cube, "apply", lambda *args: calls.append("itself") or kept(*args))

    def cube(x):
        return _library.apply(_Cube, x, 3)

    x = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
    y = cube(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert not calls
    assert type(y.grad_fn).__name__ == "_CubeBackward"
    torch.testing.assert_close(first, 3 * x**2)
    torch.testing.assert_close(second, 6 * x)
    torch.testing.assert_close(torch.func.grad(lambda t: cube(t).sum())(x.detach()), 3 * x**2)
    assert calls
    calls.clear()
    torch.testing.assert_close(torch.func.vmap(cube)(x.detach()), x.detach() ** 3)
    assert calls
