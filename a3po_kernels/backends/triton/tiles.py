"""How a row of logits is read: tiles whose every sum has one order, whatever the address or stride of the row.

A tile is [LANES, 2, ...], lanes of one 16-byte vector of columns each: two 64-bit words, and in each word 1, 2 or 4
elements as further axes of 2. A sum over an axis of two entries has no order to get wrong, so that no layout that the
compiler chooses for a load can change a bit. Rows off the 16-byte grid take the same wide loads, of the vectors that
they lie in, and shift the words into place.
"""

import triton
import triton.language as tl

from .math import softcapped


@triton.jit
def row_pointer(pointer, row32, rows_per_batch, batch_stride, row_stride):
    """First column of a row of [batch, rows_per_batch, columns], in 64 bits; the division needs only 32."""
    batch = row32 // rows_per_batch
    offset = batch.to(tl.int64) * batch_stride + (row32 - batch * rows_per_batch).to(tl.int64) * row_stride
    return pointer + offset


@triton.jit
def exponent_scale_of(exponent_scale, temperature_ptr, temperature_stride, row, COMPUTE: tl.constexpr):
    """k with y = k * u; a temperature tensor divides what the host knows of it."""
    k = tl.full((), exponent_scale, COMPUTE)
    if temperature_ptr is not None:
        k = k / tl.load(temperature_ptr + row.to(tl.int64) * temperature_stride).to(COMPUTE)
    return k


@triton.jit
def misalignment(pointer):
    """Elements between the last 16-byte boundary and the pointer."""
    return (pointer.to(tl.int64) & 15) // (pointer.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def _low_half(word, FLOAT: tl.constexpr):
    """The lower element of a 32-bit word of two 16-bit floats, in fp32."""
    if FLOAT == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True)
    else:
        return word.to(tl.uint16).to(FLOAT, bitcast=True).to(tl.float32)


@triton.jit
def _high_half(word, FLOAT: tl.constexpr):
    if FLOAT == tl.bfloat16:
        return (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return (word >> 16).to(tl.uint16).to(FLOAT, bitcast=True).to(tl.float32)


@triton.jit
def _unpack(words, FLOAT: tl.constexpr):
    """The elements of 64-bit words in fp32 (fp64 for fp64), lowest first, as further axes of 2."""
    if FLOAT == tl.float64:
        return words.to(tl.float64, bitcast=True)
    else:
        low = words.to(tl.uint32)
        high = (words >> 32).to(tl.uint32)
        if FLOAT == tl.float32:
            return tl.join(low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
        else:
            even = tl.join(_low_half(low, FLOAT), _low_half(high, FLOAT))
            return tl.join(even, tl.join(_high_half(low, FLOAT), _high_half(high, FLOAT)))


@triton.jit
def tile_columns(first, LANES: tl.constexpr, FLOAT: tl.constexpr):
    """The columns of the tile that begins at `first`, in the tile's shape."""
    elements: tl.constexpr = 64 // FLOAT.primitive_bitwidth
    words = first + (tl.arange(0, LANES) * 2)[:, None] * elements + (tl.arange(0, 2) * elements)[None, :]
    if elements == 1:
        return words
    elif elements == 2:
        return tl.join(words, words + 1)
    else:
        return tl.join(tl.join(words, words + 2), tl.join(words + 1, words + 3))


@triton.jit
def _funnel(low, high, bits):
    """64 bits from bit `bits` on of the pair; a shift by 64 is none of the machine's."""
    return (low >> bits) | ((high << 1) << (63 - bits))


@triton.jit
def _nothing(FLOAT: tl.constexpr):
    """A 64-bit word of -inf."""
    if FLOAT == tl.bfloat16:
        return tl.full((), 0xFF80FF80FF80FF80, tl.uint64)
    elif FLOAT == tl.float16:
        return tl.full((), 0xFC00FC00FC00FC00, tl.uint64)
    elif FLOAT == tl.float32:
        return tl.full((), 0xFF800000FF800000, tl.uint64)
    else:
        return tl.full((), 0xFFF0000000000000, tl.uint64)


@triton.jit
def _load_words(
    base, first, stop, MASKED: tl.constexpr, LOADS: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Words [LANES, 2] of the columns from `first` on; MASKED reads no word past the one that holds column stop - 1.

    A word that is not read is -inf.
    """
    FLOAT: tl.constexpr = base.dtype.element_ty
    elements: tl.constexpr = 64 // FLOAT.primitive_bitwidth
    lane = (tl.arange(0, LANES) * 2)[:, None]
    index = lane + tl.arange(0, 2)[None, :]
    # Whole vectors are masked as such, and stay one load.
    step = lane if EVEN else index
    if LOADS == "aligned":
        words = tl.multiple_of((base + first).to(tl.pointer_type(tl.uint64), bitcast=True), 16)
        if MASKED:
            inside = (first + step * elements < stop) & (index >= 0)
            return tl.load(words + index, mask=inside, other=_nothing(FLOAT), eviction_policy=KEEP)
        else:
            return tl.load(words + index, eviction_policy=KEEP)
    else:
        skip = misalignment(base)
        words = tl.multiple_of((base - skip + first).to(tl.pointer_type(tl.uint64), bitcast=True), 16)
        if MASKED:
            last = stop - 1 + skip - first
            inside = index * elements <= last
            here = tl.load(words + index, mask=inside, other=_nothing(FLOAT), eviction_policy=KEEP)
            inside = (index + 2) * elements <= last
            after = tl.load(words + 2 + index, mask=inside, other=_nothing(FLOAT), eviction_policy=KEEP)
        else:
            here = tl.load(words + index, eviction_policy=KEEP)
            after = tl.load(words + 2 + index, eviction_policy=KEEP)
        w0, w1 = tl.split(here)
        w2, w3 = tl.split(after)
        second = skip >= elements
        bits = ((skip % elements) * (64 // elements)).to(tl.uint64)
        a = tl.where(second, w1, w0)
        b = tl.where(second, w2, w1)
        c = tl.where(second, w3, w2)
        return tl.join(_funnel(a, b, bits), _funnel(b, c, bits))


@triton.jit
def _load_strided(base, first, stop, stride, offset, LANES: tl.constexpr):
    """Element `offset` of each word, [LANES, 2], from columns any distance apart."""
    elements: tl.constexpr = 64 // base.dtype.element_ty.primitive_bitwidth
    columns = first + tl.arange(0, LANES) * (2 * elements) + offset
    low = tl.load(base + columns.to(tl.int64) * stride, mask=columns < stop, other=float("-inf"))
    columns += elements
    high = tl.load(base + columns.to(tl.int64) * stride, mask=columns < stop, other=float("-inf"))
    return tl.join(low, high)


@triton.jit
def load_tile(
    base, first, stop, column_stride, logit_scale, softcap,
    MASKED: tl.constexpr, LOADS: tl.constexpr, EVEN: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr,
    COMPUTE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Capped logits u of a tile in the compute dtype; a column from `stop` on is -inf, so that it weighs nothing.

    LOADS: "aligned" where every row starts on 16 bytes, "shifted" where it may not, "strided" where columns are apart.
    EVEN: the columns are whole 16-byte vectors. KEEP: the cache's eviction policy.
    """
    FLOAT: tl.constexpr = base.dtype.element_ty
    elements: tl.constexpr = 64 // FLOAT.primitive_bitwidth
    if LOADS == "strided":
        z = _load_strided(base, first, stop, column_stride, 0, LANES)
        if elements == 2:
            z = tl.join(z, _load_strided(base, first, stop, column_stride, 1, LANES))
        if elements == 4:
            even = tl.join(z, _load_strided(base, first, stop, column_stride, 2, LANES))
            odd = tl.join(
                _load_strided(base, first, stop, column_stride, 1, LANES),
                _load_strided(base, first, stop, column_stride, 3, LANES),
            )
            z = tl.join(even, odd)
        z = z.to(COMPUTE)
    else:
        z = _unpack(_load_words(base, first, stop, MASKED, LOADS, EVEN, LANES, KEEP), FLOAT)
    if HAS_SOFTCAP:
        z = softcapped(z * logit_scale, softcap, COMPUTE)
    if MASKED and not (LOADS == "strided" or (LOADS == "aligned" and EVEN)):
        z = tl.where(tile_columns(first, LANES, FLOAT) < stop, z, float("-inf"))
    return z


@triton.jit
def lane_sum(x):
    """Sums over all axes but the first; each has two entries, so that the order of the sum is the source's."""
    for _ in tl.static_range(len(x.shape) - 1):
        x = tl.sum(x, axis=len(x.shape) - 1)
    return x


@triton.jit
def lane_max(x):
    for _ in tl.static_range(len(x.shape) - 1):
        x = tl.max(x, axis=len(x.shape) - 1)
    return x


@triton.jit
def per_lane(x, like):
    """x [LANES] in as many axes as a tile has."""
    for _ in tl.static_range(len(like.shape) - 1):
        x = tl.expand_dims(x, -1)
    return x


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def pair_sums(x, y):
    """The sums of two [LANES], neighbours first: pair by pair, in an order that no layout changes."""
    for _ in tl.static_range(11):
        if x.shape[0] > 1:
            pairs = (tl.reshape(x, (x.shape[0] // 2, 2)), tl.reshape(y, (y.shape[0] // 2, 2)))
            both = tl.reduce(pairs, 1, _add_both)
            x = both[0]
            y = both[1]
    return tl.sum(x, axis=0), tl.sum(y, axis=0)
