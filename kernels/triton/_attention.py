"""The attention core: online softmax over key tiles, and its gradients.

Plug-ins, jit functions passed as constexpr, turn it into the attention of an op:

*Token map*, how row i of a sequence finds its memory. A pair:
    ``LOCATE(map_args, pid, KEYS, BLOCK) -> (batch, head, first, origin_q, n_q, origin_k, n_k)``
        the tile of program ``pid``: it starts at row ``first`` of its sequence, a sequence of keys
        if KEYS, else of queries. Lengths and origins belong to both sides of the sequence; a tile
        outside the sequence has first >= its length and is skipped.
    ``TOKENS(map_args, origin, i) -> int64 [BLOCK]``
        token index of the rows ``i``; the row lies at batch * stride_batch + head * stride_head +
        token * stride_token. ``origin`` is what LOCATE returned for that side. With ``pads``, a
        token below 0 is a pad: as a key its rows are those of ``pads``, as a query it does not
        exist.
*Score term*, what is done to the scores. None, or
    ``TERM(term_args, batch, head, origin, m, n, inside) -> t``
        a float tile is added to the scores in the exp2 domain (times log2 e), a bool tile says
        which of them to keep. m and n are row and key indices that broadcast against each other in
        either orientation; t may be smaller than the tile. Rows lie inside the sequence, keys where
        ``inside``, shaped like n, is true (None: everywhere). They are not clamped, for that would
        hide from the compiler that they are consecutive. The gradient of the term is the sum of
        the ``ds`` of :func:`score_grad_tile` over whatever shares it.
*Slots*, for an op whose rows are slots that a token may fill or not. All None, or
    ``OUT_TOKENS(map_args, origin, i)``, ``STAT_TOKENS(map_args, origin, i) -> int64 [BLOCK]``
        where out and grad, and where lse and delta of the queries ``i`` lie, if not at TOKENS;
        lse and delta may be read to the end of a tile, so that no mask narrows their loads;
    ``ZEROS(map_args, at, m) -> float32 [BLOCK]``
        how many keys that are zeros (score 0, value 0) a query attends beside its n_k stored ones.
        Queries from n_k on are zeros as well: nothing to read, and no dq.

Rows are held as one block of D0 columns, or two (D0 and D1, both powers of two, D1 = 0 for one),
so that a head dim of 72 costs 64 + 16 columns and not 128. Nothing is padded in memory. Full tiles
need no mask; a second loop takes the ragged and diagonal ones. Strides are triples (batch, head,
token) in units of UNIT elements, the last dimension is dense: Triton knows of an argument whether
it is a multiple of 16, but rows of 72 elements are only multiples of 8, which is all a 16-byte load
needs. Statistics are [batch, head, token] float32, in elements. Rows that attend nothing: out 0,
lse -inf, and no gradient.

``pads``, (k, v), holds [head, D] each. ``log_gain_ptr``, [head] float32, makes it cosine attention:
scores are exp(min(log_gain, ln 100)) times the cosine of q and k (``_cosine.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._cosine import pair_scale, row_grad, row_scale, weigh_score_grad
from ._primitives import LN2, LOG2E


@triton.jit
def _masked_load(ptr, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(ptr, mask=rows & columns, other=0.0)
    elif MASK_ROWS:
        return tl.load(ptr, mask=rows, other=0.0)
    elif MASK_COLUMNS:
        return tl.load(ptr, mask=columns, other=0.0)
    else:
        return tl.load(ptr)


@triton.jit
def load_rows(
    ptr, tokens, stride, valid, MASK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, pad=None,
):  # fmt: skip
    """The rows ``tokens``, zeros where not ``valid`` (if MASK) and beyond column D; the row ``pad``
    (if there is one) where the token is below 0."""
    rows = ptr + (tokens * stride)[:, None]
    if pad is not None:
        rows = tl.where((tokens < 0)[:, None], pad, rows)
    keep = valid[:, None]
    c0 = tl.arange(0, D0)[None, :]
    x = (_masked_load(rows + c0, keep, c0 < D, MASK, D0 > D),)
    if D1 > 0:
        c1 = D0 + tl.arange(0, D1)[None, :]
        x = x + (_masked_load(rows + c1, keep, c1 < D, MASK, D0 + D1 > D),)
    return x


@triton.jit
def store_rows(ptr, tokens, stride, valid, x, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The inverse of load_rows, rounding to the type of ptr."""
    rows = ptr + (tokens * stride)[:, None]
    dtype = ptr.dtype.element_ty
    c0 = tl.arange(0, D0)[None, :]
    tl.store(rows + c0, x[0].to(dtype), mask=valid[:, None] & (c0 < D))
    if D1 > 0:
        c1 = D0 + tl.arange(0, D1)[None, :]
        tl.store(rows + c1, x[1].to(dtype), mask=valid[:, None] & (c1 < D))


@triton.jit
def add_rows(
    x, ptr, tokens, stride, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):  # fmt: skip
    """x and what store_rows would overwrite with it."""
    held = load_rows(ptr, tokens, stride, valid, True, D, D0, D1)
    y = (x[0] + held[0],)
    if D1 > 0:
        y = y + (x[1] + held[1],)
    return y


@triton.jit
def zero_rows(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    x = (tl.zeros([ROWS, D0], tl.float32),)
    if D1 > 0:
        x = x + (tl.zeros([ROWS, D1], tl.float32),)
    return x


@triton.jit
def scale_rows(x, factor, D1: tl.constexpr):
    y = (x[0] * factor,)
    if D1 > 0:
        y = y + (x[1] * factor,)
    return y


@triton.jit
def dot_rows(a, b, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the head dim."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if D1 > 0:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision=PRECISION)
    return s


@triton.jit
def add_weighted_rows(acc, w, x, D1: tl.constexpr, PRECISION: tl.constexpr):
    """acc + w x, w rounded to the type of x."""
    w = w.to(x[0].dtype)
    y = (tl.dot(w, x[0], acc[0], input_precision=PRECISION),)
    if D1 > 0:
        y = y + (tl.dot(w, x[1], acc[1], input_precision=PRECISION),)
    return y


@triton.jit
def pad_rows(pads, head, D: tl.constexpr):
    """Pointers to the (k, v) of this head's pads, None without pads."""
    if pads is None:
        return None, None
    else:
        return pads[0] + head * D, pads[1] + head * D


@triton.jit
def existing(tokens, i, n, pads):
    """Which of the rows i < n are queries."""
    if pads is None:
        return i < n
    else:
        return (i < n) & (tokens >= 0)


@triton.jit
def store_row_sums(ptr, x, keep, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """[D] sums of the rows x that ``keep`` says."""
    c0 = tl.arange(0, D0)
    tl.store(ptr + c0, tl.sum(tl.where(keep[:, None], x[0], 0.0), 0), mask=c0 < D)
    if D1 > 0:
        c1 = D0 + tl.arange(0, D1)
        tl.store(ptr + c1, tl.sum(tl.where(keep[:, None], x[1], 0.0), 0), mask=c1 < D)


@triton.jit
def term_tile(
    term_args, at, m, n, valid_n, MASK: tl.constexpr, ORIENTATION: tl.constexpr, TERM: tl.constexpr
):
    """The term of rows m and keys n, vectors. ORIENTATION 0: rows are rows of the
    tile, 1: they are columns. MASK: some keys are not valid.

    To be called before the tile's rows are loaded: bringing the term into the layout of a product
    takes a barrier, and operands loaded before it would be held in registers across it. (For the
    same reason no rows are loaded before they are needed; the compiler prefetches them anyway.)"""
    if MASK:
        inside = tl.expand_dims(valid_n, ORIENTATION)
        rows = tl.expand_dims(tl.minimum(m, at[4] - 1), 1 - ORIENTATION)
        return TERM(term_args, at[0], at[1], at[3], rows, tl.expand_dims(n, ORIENTATION), inside)
    else:
        rows = tl.expand_dims(tl.minimum(m, at[4] - 1), 1 - ORIENTATION)
        return TERM(term_args, at[0], at[1], at[3], rows, tl.expand_dims(n, ORIENTATION), None)


@triton.jit
def score_tile(a, b, scale, t, FOLD: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr):
    """Scores a b^T in the exp2 domain with term t; scale is a number or a tile. With FOLD it is
    still missing: it is a positive number and there is no term, so it becomes part of the
    multiply-add of the exponent."""
    s = dot_rows(a, b, D1, PRECISION)
    if not FOLD:
        s = s * scale
    if t is not None:
        s = tl.where(t, s, float("-inf")) if t.dtype == tl.int1 else s + t
    return s


@triton.jit
def softmax_tile(s, m_i, l_i, scale, FOLD: tl.constexpr):
    """One step of the online softmax: (p, factor of what was accumulated so far, m_i, l_i)."""
    if FOLD:
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    else:
        m_new = tl.maximum(m_i, tl.max(s, 1))
    # A row that has attended nothing yet: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    if FOLD:
        p = tl.exp2(s * scale - shift[:, None])
    else:
        p = tl.exp2(s - shift[:, None])
    factor = tl.exp2(m_i - shift)
    return p, factor, m_new, l_i * factor + tl.sum(p, 1)


@triton.jit
def attend(
    q, acc, m_i, l_i, lo, hi, offs_m, at, k_ptr, k_stride, v_ptr, v_stride, pad, scale, map_args,
    term_args, TOKENS: tl.constexpr, TERM: tl.constexpr, COSINE: tl.constexpr,
    CAUSAL: tl.constexpr, FOLD: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Query rows against keys [lo, hi), tile by tile. MASK: tiles may be ragged or diagonal."""
    _, _, _, _, _, origin_k, n_k = at
    for start in tl.range(lo, hi, BLOCK_N, num_stages=1 if MASK else None):
        offs_n = start + tl.arange(0, BLOCK_N)
        valid = offs_n < n_k
        t = None
        if TERM is not None:
            t = term_tile(term_args, at, offs_m, offs_n, valid, MASK, 0, TERM)
        tokens = TOKENS(map_args, origin_k, offs_n)
        k = load_rows(k_ptr, tokens * UNIT, k_stride, valid, MASK, D, D0, D1, pad[0])
        factor, inverse = pair_scale(scale, k, D1, COSINE)
        s = score_tile(q, k, factor, t, FOLD, D1, PRECISION)
        if MASK:
            keep = valid[None, :]
            if CAUSAL:
                keep = keep & (offs_n[None, :] <= offs_m[:, None])
            s = tl.where(keep, s, float("-inf"))
        p, factor, m_i, l_i = softmax_tile(s, m_i, l_i, scale, FOLD)
        v = load_rows(v_ptr, tokens * UNIT, v_stride, valid, MASK, D, D0, D1, pad[1])
        acc = scale_rows(acc, factor[:, None], D1)
        acc = add_weighted_rows(acc, p, v, D1, PRECISION)
    return acc, m_i, l_i


@triton.jit
def key_range(first, n_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(keys in full tiles that no row of the query tile masks, keys that any row may attend)."""
    if CAUSAL:
        full = tl.minimum(n_k, first + 1) // BLOCK_N * BLOCK_N
        return full, tl.minimum(n_k, first + BLOCK_M)
    else:
        return n_k // BLOCK_N * BLOCK_N, n_k


@triton.jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, out_strides, lse_strides,
    scale,  # times log2(e)
    map_args, term_args,
    LOCATE: tl.constexpr, TOKENS: tl.constexpr, TERM: tl.constexpr, CAUSAL: tl.constexpr,
    FOLD: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,  # tile of the ragged and diagonal keys; 0: there are none
    PRECISION: tl.constexpr, pads=None, log_gain_ptr=None, OUT_TOKENS: tl.constexpr = None,
    STAT_TOKENS: tl.constexpr = None, ZEROS: tl.constexpr = None,
):  # fmt: skip
    """One program: one tile of queries of one head, all keys it may attend."""
    at = LOCATE(map_args, tl.program_id(0), False, BLOCK_M)
    batch, head, first, origin_q, n_q, _, n_k = at
    if first >= n_q:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    tokens = TOKENS(map_args, origin_q, offs_m)
    valid = existing(tokens, offs_m, n_q, pads)
    q_ptr += (batch * q_strides[0] + head * q_strides[1]) * UNIT
    k_ptr += (batch * k_strides[0] + head * k_strides[1]) * UNIT
    v_ptr += (batch * v_strides[0] + head * v_strides[1]) * UNIT
    held = valid if ZEROS is None else valid & (offs_m < n_k)
    q = load_rows(q_ptr, tokens * UNIT, q_strides[2], held, True, D, D0, D1)

    scale = row_scale(q, head, scale, log_gain_ptr, D1)
    pad = pad_rows(pads, head, D)
    COSINE: tl.constexpr = log_gain_ptr is not None
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if ZEROS is not None:
        # As if they were the first keys: with a maximum of at least 0 their share cannot overflow.
        l_i += ZEROS(map_args, at, offs_m)
        m_i = tl.where(l_i > 0.0, 0.0, m_i)
    acc = zero_rows(BLOCK_M, D0, D1)
    full, end = key_range(first, n_k, CAUSAL, BLOCK_M, BLOCK_N)
    acc, m_i, l_i = attend(
        q, acc, m_i, l_i, 0, full, offs_m, at, k_ptr, k_strides[2], v_ptr, v_strides[2], pad,
        scale, map_args, term_args, TOKENS, TERM, COSINE, CAUSAL, FOLD, False, D, D0, D1, UNIT,
        BLOCK_N, PRECISION,
    )  # fmt: skip
    if TAIL > 0:
        acc, m_i, l_i = attend(
            q, acc, m_i, l_i, full, end, offs_m, at, k_ptr, k_strides[2], v_ptr, v_strides[2], pad,
            scale, map_args, term_args, TOKENS, TERM, COSINE, CAUSAL, FOLD, True, D, D0, D1, UNIT,
            TAIL, PRECISION,
        )  # fmt: skip

    empty = l_i == 0.0
    l_i = tl.where(empty, 1.0, l_i)
    out_ptr += (batch * out_strides[0] + head * out_strides[1]) * UNIT
    out = scale_rows(acc, (1.0 / l_i)[:, None], D1)
    outer = tokens if OUT_TOKENS is None else OUT_TOKENS(map_args, origin_q, offs_m)
    store_rows(out_ptr, outer * UNIT, out_strides[2], valid, out, D, D0, D1)
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(l_i)) * LN2)
    lse_ptr += batch * lse_strides[0] + head * lse_strides[1]
    rows = tokens if STAT_TOKENS is None else STAT_TOKENS(map_args, origin_q, offs_m)
    tl.store(lse_ptr + rows * lse_strides[2], lse, mask=valid)


@triton.jit
def attention_delta_kernel(
    grad_ptr, out_ptr, dlse_ptr, delta_ptr,
    grad_strides, out_strides, dlse_strides, delta_strides, map_args,
    LOCATE: tl.constexpr, TOKENS: tl.constexpr, HAS_DLSE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, pads=None,
):  # fmt: skip
    """delta = sum_d grad * out - grad_lse: what every ds of a row has in common."""
    batch, head, first, origin_q, n_q, _, _ = LOCATE(map_args, tl.program_id(0), False, BLOCK_M)
    if first >= n_q:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    tokens = TOKENS(map_args, origin_q, offs_m)
    valid = existing(tokens, offs_m, n_q, pads)
    grad_ptr += (batch * grad_strides[0] + head * grad_strides[1]) * UNIT
    out_ptr += (batch * out_strides[0] + head * out_strides[1]) * UNIT
    grad = load_rows(grad_ptr, tokens * UNIT, grad_strides[2], valid, True, D, BLOCK_D, 0)
    out = load_rows(out_ptr, tokens * UNIT, out_strides[2], valid, True, D, BLOCK_D, 0)
    delta = tl.sum(grad[0].to(tl.float32) * out[0].to(tl.float32), 1)
    if HAS_DLSE:
        dlse_ptr += batch * dlse_strides[0] + head * dlse_strides[1]
        dlse = tl.load(dlse_ptr + tokens * dlse_strides[2], mask=valid, other=0.0)
        delta -= dlse.to(tl.float32)
    delta_ptr += batch * delta_strides[0] + head * delta_strides[1]
    tl.store(delta_ptr + tokens * delta_strides[2], delta, mask=valid)


@triton.jit
def load_lse_delta(
    lse_ptr, delta_ptr, offsets, valid, MASK: tl.constexpr, PADDED: tl.constexpr = False
):  # fmt: skip
    """lse in the exp2 domain, +inf where the row attends nothing or (if MASK) is not ``valid``:
    every p = exp2(s - lse) of such a row is 0. So is its delta: the gradient of a -inf lse may be
    NaN. PADDED: rows that are not valid may be read as well."""
    if MASK and not PADDED:
        lse = tl.load(lse_ptr + offsets, mask=valid, other=float("-inf"))
        delta = tl.load(delta_ptr + offsets, mask=valid, other=0.0)
    else:
        lse = tl.load(lse_ptr + offsets)
        delta = tl.load(delta_ptr + offsets)
    if MASK and PADDED:
        lse = tl.where(valid, lse, float("-inf"))
    empty = lse == float("-inf")
    return tl.where(empty, float("inf"), lse * LOG2E), tl.where(empty, 0.0, delta)


@triton.jit
def weight_tile(
    a, b, lse, scale, t, keep, FOLD: tl.constexpr, MASK: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax weights of a tile, p = exp2(a b^T - lse). a and b are q and k, or k and q for the
    transposed tile; lse broadcasts accordingly."""
    s = score_tile(a, b, scale, t, FOLD, D1, PRECISION)
    x = s * scale - lse if FOLD else s - lse
    if t is not None:
        # p <= 1 but for rounding, which is without bounds where a term of -1e38 is part of lse.
        x = tl.where(x > 0.0, 0.0, x)
    p = tl.exp2(x)
    if MASK:
        p = tl.where(keep, p, 0.0)
    return p


@triton.jit
def score_grad_tile(p, c, d, delta, D1: tl.constexpr, PRECISION: tl.constexpr):
    """ds = p (c d^T - delta). c and d are grad and v, or v and grad for the transposed tile."""
    return p * (dot_rows(c, d, D1, PRECISION) - delta)


@triton.jit
def accumulate_dq(
    dq, q, grad, lse, delta, lo, hi, offs_m, at, k_ptr, k_stride, v_ptr, v_stride, pad, scale,
    map_args, term_args, TOKENS: tl.constexpr, TERM: tl.constexpr, COSINE: tl.constexpr,
    CAUSAL: tl.constexpr, FOLD: tl.constexpr, MASK: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq + ds k over keys [lo, hi)."""
    _, _, _, _, _, origin_k, n_k = at
    for start in tl.range(lo, hi, BLOCK_N, num_stages=1 if MASK else None):
        offs_n = start + tl.arange(0, BLOCK_N)
        valid = offs_n < n_k
        t = None
        if TERM is not None:
            t = term_tile(term_args, at, offs_m, offs_n, valid, MASK, 0, TERM)
        tokens = TOKENS(map_args, origin_k, offs_n)
        k = load_rows(k_ptr, tokens * UNIT, k_stride, valid, MASK, D, D0, D1, pad[0])
        factor, inverse = pair_scale(scale, k, D1, COSINE)
        keep = valid[None, :]
        if CAUSAL:
            keep = keep & (offs_n[None, :] <= offs_m[:, None])
        p = weight_tile(q, k, lse[:, None], factor, t, keep, FOLD, MASK, D1, PRECISION)
        v = load_rows(v_ptr, tokens * UNIT, v_stride, valid, MASK, D, D0, D1, pad[1])
        ds = score_grad_tile(p, grad, v, delta[:, None], D1, PRECISION)
        ds = weigh_score_grad(ds, inverse, k[0].dtype)
        dq = add_weighted_rows(dq, ds, k, D1, PRECISION)
    return dq


@triton.jit
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_strides, k_strides, v_strides, grad_strides, lse_strides, dq_strides,
    scale, dscale,  # scale times log2(e), scale
    map_args, term_args,
    LOCATE: tl.constexpr, TOKENS: tl.constexpr, TERM: tl.constexpr, CAUSAL: tl.constexpr,
    FOLD: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    pads=None, log_gain_ptr=None, dlog_gain_ptr=None, OUT_TOKENS: tl.constexpr = None,
    STAT_TOKENS: tl.constexpr = None, ZEROS: tl.constexpr = None, ADD: tl.constexpr = False,
):  # fmt: skip
    """One program: dq of one tile of queries, added to the old if ADD, and dlog_gain [programs].
    delta lies like lse."""
    at = LOCATE(map_args, tl.program_id(0), False, BLOCK_M)
    batch, head, first, origin_q, n_q, _, n_k = at
    if first >= n_q:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    tokens = TOKENS(map_args, origin_q, offs_m)
    outer = tokens if OUT_TOKENS is None else OUT_TOKENS(map_args, origin_q, offs_m)
    rows = tokens if STAT_TOKENS is None else STAT_TOKENS(map_args, origin_q, offs_m)
    if ZEROS is None:
        valid = existing(tokens, offs_m, n_q, pads)
    else:
        valid = offs_m < tl.minimum(n_q, n_k)
    q_ptr += (batch * q_strides[0] + head * q_strides[1]) * UNIT
    k_ptr += (batch * k_strides[0] + head * k_strides[1]) * UNIT
    v_ptr += (batch * v_strides[0] + head * v_strides[1]) * UNIT
    grad_ptr += (batch * grad_strides[0] + head * grad_strides[1]) * UNIT
    statistics = batch * lse_strides[0] + head * lse_strides[1] + rows * lse_strides[2]
    q = load_rows(q_ptr, tokens * UNIT, q_strides[2], valid, True, D, D0, D1)
    grad = load_rows(grad_ptr, outer * UNIT, grad_strides[2], valid, True, D, D0, D1)
    padded = STAT_TOKENS is not None
    lse, delta = load_lse_delta(lse_ptr, delta_ptr, statistics, valid, True, padded)

    scale = row_scale(q, head, scale, log_gain_ptr, D1)
    pad = pad_rows(pads, head, D)
    COSINE: tl.constexpr = log_gain_ptr is not None
    dq = zero_rows(BLOCK_M, D0, D1)
    full, end = key_range(first, n_k, CAUSAL, BLOCK_M, BLOCK_N)
    dq = accumulate_dq(
        dq, q, grad, lse, delta, 0, full, offs_m, at, k_ptr, k_strides[2], v_ptr, v_strides[2],
        pad, scale, map_args, term_args, TOKENS, TERM, COSINE, CAUSAL, FOLD, False, D, D0, D1,
        UNIT, BLOCK_N, PRECISION,
    )  # fmt: skip
    if TAIL > 0:
        dq = accumulate_dq(
            dq, q, grad, lse, delta, full, end, offs_m, at, k_ptr, k_strides[2], v_ptr,
            v_strides[2], pad, scale, map_args, term_args, TOKENS, TERM, COSINE, CAUSAL, FOLD,
            True, D, D0, D1, UNIT, TAIL, PRECISION,
        )  # fmt: skip
    dq_ptr += (batch * dq_strides[0] + head * dq_strides[1]) * UNIT
    if COSINE:
        dq, along = row_grad(dq, q, scale, D1)
        tl.store(dlog_gain_ptr + tl.program_id(0), tl.sum(tl.where(valid, along, 0.0), 0))
    else:
        dq = scale_rows(dq, dscale, D1)
    if ADD:
        dq = add_rows(dq, dq_ptr, tokens * UNIT, dq_strides[2], valid, D, D0, D1)
    store_rows(dq_ptr, tokens * UNIT, dq_strides[2], valid, dq, D, D0, D1)


@triton.jit
def accumulate_dkv(
    dk, dv, k, v, lo, hi, offs_n, at, q_ptr, q_stride, grad_ptr, grad_stride, lse_ptr, delta_ptr,
    lse_stride, pads, scale, map_args, term_args, TOKENS: tl.constexpr, TERM: tl.constexpr,
    COSINE: tl.constexpr, CAUSAL: tl.constexpr, FOLD: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, OUT_TOKENS: tl.constexpr,
    STAT_TOKENS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """dv + p^T grad and dk + ds^T q over queries [lo, hi). Tiles are transposed, so that p^T and
    ds^T are left operands and stay in registers. A row that does not exist has p = 0 (its lse is
    +inf), a key that does not exist gets a gradient nobody stores: only the diagonal is masked."""
    _, _, _, origin_q, n_q, _, n_k = at
    for start in tl.range(lo, hi, BLOCK_M, num_stages=1 if MASK else None):
        offs_m = start + tl.arange(0, BLOCK_M)
        t = None
        if TERM is not None:
            t = term_tile(term_args, at, offs_m, offs_n, offs_n < n_k, True, 1, TERM)
        tokens = TOKENS(map_args, origin_q, offs_m)
        outer = tokens if OUT_TOKENS is None else OUT_TOKENS(map_args, origin_q, offs_m)
        rows = tokens if STAT_TOKENS is None else STAT_TOKENS(map_args, origin_q, offs_m)
        valid = existing(tokens, offs_m, n_q, pads)
        SOME: tl.constexpr = MASK or pads is not None
        held = valid if ZEROS is None else valid & (offs_m < n_k)
        q = load_rows(q_ptr, tokens * UNIT, q_stride, held, SOME, D, D0, D1)
        factor, inverse = pair_scale(scale, q, D1, COSINE)
        padded = STAT_TOKENS is not None
        lse, delta = load_lse_delta(lse_ptr, delta_ptr, rows * lse_stride, valid, SOME, padded)
        keep = offs_n[:, None] <= offs_m[None, :]
        masked = CAUSAL and MASK
        p = weight_tile(k, q, lse[None, :], factor, t, keep, FOLD, masked, D1, PRECISION)
        grad = load_rows(grad_ptr, outer * UNIT, grad_stride, valid, SOME, D, D0, D1)
        ds = score_grad_tile(p, v, grad, delta[None, :], D1, PRECISION)
        ds = weigh_score_grad(ds, inverse, q[0].dtype)
        dv = add_weighted_rows(dv, p, grad, D1, PRECISION)
        dk = add_weighted_rows(dk, ds, q, D1, PRECISION)
    return dk, dv


@triton.jit
def attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, grad_strides, lse_strides, dk_strides, dv_strides,
    scale, dscale,  # scale times log2(e), scale
    map_args, term_args,
    LOCATE: tl.constexpr, TOKENS: tl.constexpr, TERM: tl.constexpr, CAUSAL: tl.constexpr,
    FOLD: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,  # tile of the ragged queries; 0: there are none
    PRECISION: tl.constexpr, pads=None, log_gain_ptr=None, dpads_ptr=None,
    OUT_TOKENS: tl.constexpr = None, STAT_TOKENS: tl.constexpr = None, ZEROS: tl.constexpr = None,
    ADD: tl.constexpr = False,
):  # fmt: skip
    """One program: dk and dv of one tile of keys, added to what they hold if ADD, and of its pads
    summed, [programs, 2, D]. delta lies like lse."""
    at = LOCATE(map_args, tl.program_id(0), True, BLOCK_N)
    batch, head, first, _, n_q, origin_k, n_k = at
    if first >= n_k:
        return
    offs_n = first + tl.arange(0, BLOCK_N)
    valid = offs_n < n_k
    tokens = TOKENS(map_args, origin_k, offs_n)
    q_ptr += (batch * q_strides[0] + head * q_strides[1]) * UNIT
    k_ptr += (batch * k_strides[0] + head * k_strides[1]) * UNIT
    v_ptr += (batch * v_strides[0] + head * v_strides[1]) * UNIT
    grad_ptr += (batch * grad_strides[0] + head * grad_strides[1]) * UNIT
    lse_ptr += batch * lse_strides[0] + head * lse_strides[1]
    delta_ptr += batch * lse_strides[0] + head * lse_strides[1]
    pad = pad_rows(pads, head, D)
    k = load_rows(k_ptr, tokens * UNIT, k_strides[2], valid, True, D, D0, D1, pad[0])
    v = load_rows(v_ptr, tokens * UNIT, v_strides[2], valid, True, D, D0, D1, pad[1])
    scale = row_scale(k, head, scale, log_gain_ptr, D1)
    COSINE: tl.constexpr = log_gain_ptr is not None

    dk = zero_rows(BLOCK_N, D0, D1)
    dv = zero_rows(BLOCK_N, D0, D1)
    whole = (n_q if ZEROS is None else tl.minimum(n_q, n_k)) // BLOCK_M * BLOCK_M
    # Queries before `diagonal` attend none of these keys, from `below` on all of them.
    diagonal = first // BLOCK_M * BLOCK_M if CAUSAL else 0
    below = tl.cdiv(first + BLOCK_N - 1, BLOCK_M) * BLOCK_M if CAUSAL else 0
    if CAUSAL:
        dk, dv = accumulate_dkv(
            dk, dv, k, v, diagonal, tl.minimum(below, whole), offs_n, at, q_ptr, q_strides[2],
            grad_ptr, grad_strides[2], lse_ptr, delta_ptr, lse_strides[2], pads, scale, map_args,
            term_args, TOKENS, TERM, COSINE, CAUSAL, FOLD, True, D, D0, D1, UNIT, BLOCK_M,
            PRECISION, OUT_TOKENS, STAT_TOKENS, ZEROS,
        )  # fmt: skip
    dk, dv = accumulate_dkv(
        dk, dv, k, v, below, whole, offs_n, at, q_ptr, q_strides[2], grad_ptr, grad_strides[2],
        lse_ptr, delta_ptr, lse_strides[2], pads, scale, map_args, term_args, TOKENS, TERM, COSINE,
        CAUSAL, FOLD, False, D, D0, D1, UNIT, BLOCK_M, PRECISION, OUT_TOKENS, STAT_TOKENS, ZEROS,
    )  # fmt: skip
    if TAIL > 0:
        dk, dv = accumulate_dkv(
            dk, dv, k, v, tl.maximum(diagonal, whole), n_q, offs_n, at, q_ptr, q_strides[2],
            grad_ptr, grad_strides[2], lse_ptr, delta_ptr, lse_strides[2], pads, scale, map_args,
            term_args, TOKENS, TERM, COSINE, CAUSAL, FOLD, True, D, D0, D1, UNIT, TAIL, PRECISION,
            OUT_TOKENS, STAT_TOKENS, ZEROS,
        )  # fmt: skip
    dk_ptr += (batch * dk_strides[0] + head * dk_strides[1]) * UNIT
    dv_ptr += (batch * dv_strides[0] + head * dv_strides[1]) * UNIT
    if COSINE:
        dk, _ = row_grad(dk, k, scale, D1)
    else:
        dk = scale_rows(dk, dscale, D1)
    exists = existing(tokens, offs_n, n_k, pads)
    if ADD:
        dk = add_rows(dk, dk_ptr, tokens * UNIT, dk_strides[2], exists, D, D0, D1)
        dv = add_rows(dv, dv_ptr, tokens * UNIT, dv_strides[2], exists, D, D0, D1)
    store_rows(dk_ptr, tokens * UNIT, dk_strides[2], exists, dk, D, D0, D1)
    store_rows(dv_ptr, tokens * UNIT, dv_strides[2], exists, dv, D, D0, D1)
    if pads is not None:
        dpads_ptr += tl.program_id(0).to(tl.int64) * 2 * D
        store_row_sums(dpads_ptr, dk, valid & (tokens < 0), D, D0, D1)
        store_row_sums(dpads_ptr + D, dv, valid & (tokens < 0), D, D0, D1)
