"""The CUDA attention kernels, run on the CPU by the emulator in tests/emulator.

Emulated, not yet confirmed on hardware: index arithmetic, fragments, masks, pipelining and races of
the very files nvcc compiles, by our reading of the PTX manual. Memory ordering, the compiler and
speed need a GPU (``make gpu``).
"""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from emulated_attention import (
    BF16,
    F16,
    FLOAT,
    I64,
    INT,
    U64,
    P,
    SequenceMap,
    element,
    launch,
    load,
    params,
    poisoned,
    rows,
)
from emulation import assert_order_changes_nothing, emulated, one_kernel
from numerics import assert_parity, double, eager_attention, gradients

from vitkit.ops.flash_attention import reference


class DenseTerm(ctypes.Structure):
    _fields_ = [
        ("data", P),
        ("element", INT),
        *((n, I64) for n in ("batch", "head", "query", "key")),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("params", params(SequenceMap, DenseTerm)),
        *((n, INT) for n in ("element", "rows_q", "rows_k")),
        ("dbias", P),
        ("bias_sizes", INT * 4),
        ("chunks", INT),
        ("seed", U64),
    ]


@pytest.fixture(scope="module")
def library():
    return load(emulated("flash_attention", flags=("-shared",)), Call)


def run(library, q, k, v, bias=None, cu=None, causal=False, scale=None, cotangents=None, chunks=0,
        seed=1):  # fmt: skip
    """(out, lse), and with cotangents of both (dq, dk, dv, dbias)."""
    packed = cu is not None
    out = poisoned(q)
    heads, n_q, n_k = q.shape[-2], q.shape[-3], k.shape[-3]
    sequences = len(cu[0]) - 1 if packed else 1
    lse = torch.full((*q.shape[:-3], heads, n_q), torch.nan)
    call = Call(seed=seed, element=element(q.dtype))
    p = call.params
    p.tensors.set_inputs(q, k, v, causal, q.shape[-1] ** -0.5 if scale is None else scale)
    p.out = rows(out)
    p.lse, p.lse_batch, p.lse_head = lse.data_ptr(), heads * n_q, n_q
    p.map = SequenceMap(1 if packed else q.shape[0], heads, n_q, n_k, sequences)
    if packed:
        p.map.cu_seqlens_q, p.map.cu_seqlens_k = (c.data_ptr() for c in cu)
    call.rows_q, call.rows_k = -(-n_q // sequences), -(-n_k // sequences)
    if bias is not None:
        strides = [0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True)]
        p.term = DenseTerm(bias.data_ptr(), element(bias.dtype), *strides)
        call.bias_sizes = (INT * 4)(*bias.shape)
    launch(library.emulated_forward, call)
    if cotangents is None:
        return out, lse
    grad, grad_lse = cotangents
    delta = poisoned(lse)
    dq, dk, dv = map(poisoned, (q, k, v))
    p.grad, p.dq, p.dk, p.dv = map(rows, (grad, dq, dk, dv))
    p.delta = delta.data_ptr()
    p.tensors.set_grad_lse(grad_lse)
    dbias = None
    if bias is not None and bias.dtype != torch.bool:
        dbias = poisoned(bias)
        call.dbias, call.chunks = dbias.data_ptr(), chunks
    launch(library.emulated_backward, call)
    return out, lse, dq, dk, dv, dbias


def make(dtype, batch, n_q, n_k, heads, head_dim, bias=None, bias_dtype=None, fused=False):
    """q, k, v, bias. fused: views of one qkv tensor, as a Linear leaves them."""
    torch.manual_seed(n_q * 1000 + n_k)
    if fused:
        q, k, v = torch.randn(batch, n_q, 3, heads, head_dim).to(dtype).unbind(2)
    else:
        q = torch.randn(batch, n_q, heads, head_dim).to(dtype)
        k, v = (torch.randn(batch, n_k, heads, head_dim).to(dtype) for _ in range(2))
    if bias is not None:
        bias = torch.randn(bias)
        bias = bias > 0.3 if bias_dtype is torch.bool else bias.to(bias_dtype or dtype)
    return [q, k, v, bias]


def check(library, tensors, causal=False, scale=None, backward=True, **options):
    """Forward and backward against float64."""
    q, k, v, bias = tensors
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    torch.manual_seed(5)
    grad = torch.randn(q.shape).to(q.dtype)
    grad_lse = torch.randn(q.shape[0], q.shape[2], q.shape[1])

    def exact(q, k, v, bias):
        return reference(q, k, v, bias, None, None, causal, factor)

    def eager(q, k, v, bias):
        scores = torch.einsum("bqhd,bkhd->bhqk", q * factor, k)
        if bias is not None and bias.dtype != torch.bool:
            scores = scores + bias.to(scores.dtype)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(mask, -torch.inf)
        if bias is not None and bias.dtype == torch.bool:
            scores = scores.masked_fill(~bias, -torch.inf)
        return eager_attention(q, k, v, bias, causal, factor), torch.logsumexp(scores.float(), -1)

    terms = k.shape[1] + q.shape[-1]
    if not backward:
        found = run(library, q, k, v, bias, None, causal, scale, **options)
        want, near = exact(*double(q, k, v, bias)), eager(q, k, v, bias)
        names = ("out", "lse")
        for name, a, e, w in zip(names, found, near, want, strict=True):
            assert_parity(name, a, e, w, dtype=q.dtype, terms=terms)
        return
    found = run(library, q, k, v, bias, None, causal, scale, (grad, grad_lse), **options)
    cotangents = [grad, grad_lse]
    want, want_grads = gradients(exact, double(*tensors), double(*cotangents))
    near, near_grads = gradients(eager, tensors, cotangents)
    names = ("out", "lse", "dq", "dk", "dv", "dbias")
    found = [f for f in found if f is not None]
    # The sums of dk run over the queries, those of a shared bias over all that shares it.
    terms = max(terms, q.shape[1] + q.shape[-1], q.shape[0] * q.shape[1] * q.shape[2])
    for name, a, e, w in zip(
        names, found, (*near, *near_grads), (*want, *want_grads), strict=False
    ):
        assert_parity(name, a, e, w, dtype=q.dtype, terms=terms)


# (dtype, batch, n_q, n_k, heads, head_dim), options of make, options of check
CASES = {
    "bf16_ragged": ((BF16, 1, 37, 75, 2, 32), {}, {}),
    "f16_two_blocks_qkv_views": ((F16, 1, 133, 133, 1, 64), {"fused": True}, {}),
    "bf16_head_dim_72": ((BF16, 1, 49, 49, 2, 72), {}, {}),
    "f16_head_dim_24": ((F16, 2, 17, 9, 1, 24), {}, {}),
    "bf16_head_dim_160_in_slices": ((BF16, 1, 19, 35, 1, 160), {}, {}),
    "f32_ragged": ((FLOAT, 1, 37, 53, 2, 32), {}, {}),
    "f32_head_dim_88": ((FLOAT, 1, 21, 35, 1, 88), {}, {"causal": True}),
    "f32_head_dim_136_in_slices": ((FLOAT, 1, 18, 17, 1, 136), {}, {}),
    "one_token": ((BF16, 1, 1, 1, 1, 16), {}, {}),
    "causal": ((BF16, 1, 101, 101, 1, 32), {}, {"causal": True}),
    "causal_fewer_keys": ((F16, 1, 70, 40, 1, 32), {}, {"causal": True}),
    "negative_scale": ((F16, 1, 20, 33, 1, 32), {}, {"scale": -0.2}),
    "zero_scale": ((BF16, 1, 20, 33, 1, 32), {}, {"scale": 0.0}),
    "bias_shared_by_all": ((BF16, 2, 37, 37, 2, 32), {"bias": (1, 1, 37, 37)}, {"chunks": 2}),
    "bias_of_float32": (
        (F16, 1, 20, 70, 2, 32), {"bias": (1, 1, 20, 70), "bias_dtype": FLOAT}, {"causal": True},
    ),
    "bias_of_keys": ((FLOAT, 2, 37, 21, 2, 32), {"bias": (2, 1, 1, 21)}, {"chunks": 2}),
    "bias_of_queries": ((BF16, 1, 37, 21, 2, 32), {"bias": (1, 2, 37, 1)}, {}),
    "mask_with_empty_rows": (
        (BF16, 1, 33, 5, 2, 32), {"bias": (1, 2, 33, 5), "bias_dtype": torch.bool}, {},
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@every_case
def test_emulated_attention(library, case):
    arguments, making, options = case
    check(library, make(*arguments, **making), **options)


def test_emulated_offsets_beyond_32_bits(library):
    """Tokens 2^30 elements apart, in memory that is mapped and not filled."""
    stride = 2**30 + 8
    memory = torch.frombuffer(mmap.mmap(-1, (2 * stride + 256) * 2), dtype=BF16)
    torch.manual_seed(0)
    tensors = [memory.as_strided((1, 3, 1, 32), (0, stride, 32, 1), i * 32) for i in range(3)]
    for t in tensors:
        t.copy_(torch.randn(t.shape))
    check(library, [*tensors, None])


def far_below_zero():
    """Scores of about -800: what stands for a key behind the last would weigh exp(800)."""
    q, k, v, _ = make(BF16, 1, 37, 75, 1, 32)
    return [q + 12, k - 12, v, None]


def test_emulated_scores_far_below_zero(library):
    check(library, far_below_zero())


def test_emulated_lowest_float_bias_attends(library):
    """A row of torch.finfo.min attends evenly; one of -inf attends nothing."""
    q, k, v, _ = make(FLOAT, 1, 3, 20, 1, 32)
    bias = torch.zeros(1, 1, 3, 20)
    bias[0, 0, 1] = torch.finfo(torch.float32).min
    bias[0, 0, 2] = -torch.inf
    out, lse = run(library, q, k, v, bias)
    torch.testing.assert_close(out[0, 1], v.mean(1)[0], rtol=1e-5, atol=1e-6)
    assert (out[0, 2] == 0).all() and lse[0, 0, 2] == -torch.inf


@pytest.mark.parametrize(
    ("causal", "more_q", "more_k"),
    [(False, 2, 0), (True, 0, 3)],
    ids=["queries_behind_the_last", "causal_keys_behind_the_last"],
)
def test_emulated_packed_sequences(library, causal, more_q, more_k):
    """Empty sequences, and sequences without keys."""
    lengths_q, lengths_k = [20, 0, 5, 33, 3], [7, 4, 0, 33, 21]
    cu = [
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32)
        for x in (lengths_q, lengths_k)
    ]
    torch.manual_seed(3)
    q, grad = (torch.randn(sum(lengths_q) + more_q, 2, 32).bfloat16() for _ in range(2))
    k, v = (torch.randn(sum(lengths_k) + more_k, 2, 32).bfloat16() for _ in range(2))
    grad_lse = torch.randn(2, q.shape[0])
    found = run(library, q, k, v, None, cu, causal, None, (grad, grad_lse))

    def exact(q, k, v):
        return reference(q, k, v, None, *cu, causal, 32**-0.5)

    want, want_grads = gradients(exact, double(q, k, v), double(grad, grad_lse))
    near, near_grads = gradients(exact, [q, k, v], [grad, grad_lse])
    names = ("out", "lse", "dq", "dk", "dv")
    for name, a, e, w in zip(
        names, found, (*near, *near_grads), (*want, *want_grads), strict=False
    ):
        assert_parity(name, a, e, w, dtype=torch.bfloat16, terms=80)


def test_emulated_bad_cu_seqlens_stay_inside(library):
    """Whatever cu_seqlens holds, nothing outside the tensors is touched: the sanitized run would
    see it, here the calls must end."""
    cu = [torch.tensor([5, -7, 900, 3], dtype=torch.int32) for _ in range(2)]
    q = torch.randn(40, 1, 32).half()
    run(library, q, q, q, None, cu, False, None, (q, None))


@pytest.mark.parametrize("dtype", [BF16, FLOAT], ids=["bf16", "f32"])
def test_emulated_thread_order_changes_nothing(library, dtype):
    tensors = make(dtype, 1, 70, 70, 1, 32, bias=(1, 1, 70, 70))
    torch.manual_seed(7)
    cotangents = torch.randn(1, 70, 1, 32).to(dtype), None
    assert_order_changes_nothing(
        lambda seed: run(library, *tensors, cotangents=cotangents, seed=seed)
    )


def catch(csrc):
    """Raises AssertionError if the kernels in ``csrc`` are broken."""
    broken = load(emulated("flash_attention", csrc=csrc, flags=("-shared", *one_kernel(32))), Call)
    for name in ("bf16_ragged", "causal", "bias_shared_by_all"):
        arguments, making, options = CASES[name]
        check(broken, make(*arguments, **making), **options)
    check(broken, far_below_zero())
    test_emulated_packed_sequences(broken, causal=False, more_q=2, more_k=0)
