"""Number formats in plain Python, a part of `reference`: what is stored and how it is rounded.

Arrays are flat, in the order of the parameters.
"""

import numpy as np


def _mix(x):
    """The finaliser of SplitMix64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def noise(n, seed, t, group, quantity):
    """Make one 32-bit word for each of n elements, by which a number is rounded up or down.

    Parameters
    ----------
    n : int
        The number of elements of the group.
    seed : int in [0, 2**64)
        The option `seed`.
    t : int >= 1
        The number of the step.
    group : int
        The index of the group.
    quantity : int
        What is rounded: 0 for the parameters, 1 + slot for a state array.

    Returns
    -------
    (n,) array of uint32
        The words.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c import reference
    >>> reference.noise(3, seed=0, t=1, group=0, quantity=0).dtype
    dtype('uint32')
    """
    golden, first = np.uint64(0x9E3779B97F4A7C15), np.zeros(256, "uint64")
    for i in range(256):  # shuffles the first bytes, so that they are a permutation of 0 .. 255
        j = int(_mix(np.uint64(i))) % (i + 1)
        first[i], first[j] = first[j], i
    table = first << np.uint64(24) | _mix(np.arange(256, 512, dtype="uint64")) >> np.uint64(40)
    with np.errstate(over="ignore"):
        key = _mix(_mix(_mix(np.uint64(seed) + golden) + np.uint64(t)) + np.uint64(16 * group + quantity))
        blocks = _mix(key + np.arange(-(-n // 256), dtype="uint64") * golden) >> np.uint64(32)
    return (blocks[:, None] ^ table).ravel()[:n].astype("uint32")


NEAREST = np.uint32(0x80000000)  # used instead of noise, this word rounds to nearest, and halves away from 0


def to_bfloat16(x, words):
    """Convert float32 to bfloat16, as uint16.

    Parameters
    ----------
    x : array of float32
        The numbers.
    words : array of uint32, or uint32
        What `noise` gives, or NEAREST.

    Returns
    -------
    array of uint16
        The bits of the rounded numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c import reference
    >>> reference.from_bfloat16(reference.to_bfloat16(np.float32([1.0, 0.1]), reference.NEAREST))
    array([1.        , 0.10009766], dtype=float32)
    """
    u = np.where(np.isnan(x), np.float32(np.nan), x).astype("float32").view("uint32").astype("uint64")
    return ((u + (words >> np.uint32(16))) >> np.uint64(16)).astype("uint16")


def from_bfloat16(x):
    """Convert bfloat16, as uint16, to float32.

    Parameters
    ----------
    x : array of uint16
        The bits.

    Returns
    -------
    array of float32
        The same numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c import reference
    >>> reference.from_bfloat16(np.uint16([0x3F80]))
    array([1.], dtype=float32)
    """
    return (x.astype("uint32") << np.uint32(16)).view("float32")


def to_float16(x, words):
    """Convert float32 to float16, as uint16.

    Only numbers that rounding to nearest would make infinite become infinite.

    Parameters
    ----------
    x : array of float32
        The numbers.
    words : array of uint32, or uint32
        What `noise` gives, or NEAREST.

    Returns
    -------
    array of uint16
        The bits of the rounded numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c import reference
    >>> reference.to_float16(np.float32([1.0, 0.1]), reference.NEAREST).view("float16")
    array([1. , 0.1], dtype=float16)
    """
    a = np.abs(x).astype("float32")
    u = a.view("uint32").astype("int64")
    normal = np.minimum((u - 0x38000000 + (words >> np.uint32(19)).astype("int64")) >> 13, 0x7BFF)
    units = np.minimum(a, np.float32(2.0**-14)) * np.float32(2.0**24)
    rest = (units - np.floor(units)) * np.float32(2.0**24)
    small = units.astype("int64") + ((words >> np.uint32(8)).astype("int64") < rest.astype("int64"))
    r = np.where(u >= 0x38800000, normal, small)
    r = np.where(np.isnan(x), 0x7E00, np.where(a >= 65520, 0x7C00, r))
    return (r | np.where(np.signbit(x), 0x8000, 0)).astype("uint16")


def to_uint8(x, words, signed):
    """Convert float32 to 8-bit codes and a scale for each block of 256; from_uint8 says what they mean.

    Parameters
    ----------
    x : (n,) array of float32
        The numbers.
    words : (n,) array of uint32, or uint32
        What `noise` gives, or NEAREST.
    signed : bool
        Whether numbers may be negative.  Then one bit of the code is the sign.

    Returns
    -------
    codes : (n,) array of uint8
        The codes.
    scales : (ceil(n / 256),) array of float32
        The scales.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c import reference
    >>> reference.to_uint8(np.float32([1.0, -0.5, 0.0]), reference.NEAREST, signed=True)[0]
    array([120, 240,   0], dtype=uint8)
    """
    shape, pad = x.shape, -x.size % 256
    x = np.pad(np.where(np.isnan(x), np.float32(np.nan), x).astype("float32"), (0, pad)).reshape(-1, 256)
    words = np.pad(np.broadcast_to(words, shape), (0, pad)).reshape(-1, 256).astype("int64") >> 12
    u = np.abs(x).view("uint32").astype("int64")
    rounded = np.where(u < 0x7F800000, np.minimum((u + words) >> 20, 0x7F7), u >> 20)  # exponent and 3 bits of fraction
    rounded.ravel()[shape[0] :] = 0
    low, binades = (21, 15) if signed else (8, 31)
    bottom = np.maximum((rounded.max(1, keepdims=True) >> 3) - binades, low) << 3
    if signed:  # numbers below the smallest code go to it or to 0, by chance
        smallest = ((bottom + 1) << 20).astype("uint32").view("float32")
        chance = (np.minimum(np.abs(x), smallest) * (np.float32(2.0**20) / smallest)).astype("int64")
        code = np.where(np.abs(x) < smallest, words < chance, rounded - bottom) | np.where(np.signbit(x), 128, 0)
    else:  # numbers below the smallest code go up to it
        code = np.maximum(rounded - bottom, 0)
    return code.astype("uint8").ravel()[: shape[0]], (bottom << 20).astype("uint32").view("float32").ravel()


def from_uint8(code, scales, signed):
    """Convert 8-bit codes c to float32: scale 2^(c // 8) (1 + c % 8 / 8), which is a sum of bit patterns.

    Parameters
    ----------
    code : (n,) array of uint8
        The codes.
    scales : (ceil(n / 256),) array of float32
        The scales.
    signed : bool
        Whether c = 0 is 0, and 128 + c is minus c.

    Returns
    -------
    (n,) array of float32
        The numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c import reference
    >>> codes, scales = reference.to_uint8(np.float32([1.0, -0.5, 0.0]), reference.NEAREST, signed=True)
    >>> reference.from_uint8(codes, scales, signed=True)
    array([ 1. , -0.5,  0. ], dtype=float32)
    """
    c = code.astype("uint32") & np.uint32(127 if signed else 255)
    x = ((c << np.uint32(20)) + np.repeat(scales.view("uint32"), 256)[: c.size]).view("float32")
    x = np.where(signed & (c == 0), np.float32(0), x)
    return np.where(signed & (code >= 128), -x, x)
