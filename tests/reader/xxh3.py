"""XXH3-64 with seed 0 and the default secret, from `xxhash_spec.md` of the xxHash project.

Python's standard library has no XXH3, and the second reader of unwind tables is to need nothing else. Only what
the checksum of a table needs is here: no seed, no secret of one's own, no streaming. Names are the specification's.
"""

from struct import unpack_from

MASK64 = (1 << 64) - 1
PRIME32_1, PRIME32_2, PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
PRIME64_1, PRIME64_2, PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
PRIME64_4, PRIME64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
PRIME_MX1, PRIME_MX2 = 0x165667919E3779F9, 0x9FB21C651E98DF25

SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
STRIPE = 64
"""Bytes of a stripe: eight lanes of eight."""
STRIPES_PER_BLOCK = (len(SECRET) - STRIPE) // 8


def words(data: bytes, offset: int, count: int) -> tuple[int, ...]:
    """`count` little-endian 64-bit words at a byte offset."""
    return unpack_from(f"<{count}Q", data, offset)


def fold(a: int, b: int) -> int:
    """The two halves of the 128-bit product, xored."""
    product = a * b
    return (product & MASK64) ^ (product >> 64)


def avalanche(x: int) -> int:
    """The final mix of XXH3."""
    x = ((x ^ (x >> 37)) * PRIME_MX1) & MASK64
    return x ^ (x >> 32)


def avalanche_xxh64(x: int) -> int:
    """The final mix of XXH64."""
    x = ((x ^ (x >> 33)) * PRIME64_2) & MASK64
    x = ((x ^ (x >> 29)) * PRIME64_3) & MASK64
    return x ^ (x >> 32)


def small(data: bytes) -> int:
    """0 to 16 bytes."""
    n = len(data)
    if n == 0:
        a, b = words(SECRET, 56, 2)
        return avalanche_xxh64(a ^ b)
    if n <= 3:
        a, b = unpack_from("<2I", SECRET)
        return avalanche_xxh64(a ^ b ^ (data[-1] | n << 8 | data[0] << 16 | data[n >> 1] << 24))
    if n <= 8:
        a, b = words(SECRET, 8, 2)
        (first,), (last,) = unpack_from("<I", data), unpack_from("<I", data, n - 4)
        value = a ^ b ^ (last | first << 32)
        value ^= ((value << 49 | value >> 15) ^ (value << 24 | value >> 40)) & MASK64
        value = value * PRIME_MX2 & MASK64
        value = (value ^ ((value >> 35) + n)) * PRIME_MX2 & MASK64
        return value ^ (value >> 28)
    a, b, c, d = words(SECRET, 24, 4)
    low, high = a ^ b ^ words(data, 0, 1)[0], c ^ d ^ words(data, n - 8, 1)[0]
    swapped = int.from_bytes(low.to_bytes(8, "little"), "big")
    return avalanche((n + swapped + high + fold(low, high)) & MASK64)


def mix_step(data: bytes, offset: int, secret_offset: int) -> int:
    """16 bytes of data with 16 bytes of the secret."""
    (a, b), (c, d) = words(data, offset, 2), words(SECRET, secret_offset, 2)
    return fold(a ^ c, b ^ d)


def medium(data: bytes) -> int:
    """17 to 240 bytes."""
    n = len(data)
    acc = n * PRIME64_1
    if n <= 128:
        for i in range((n - 1) // 32 + 1):
            acc += mix_step(data, 16 * i, 32 * i) + mix_step(data, n - 16 * i - 16, 32 * i + 16)
        return avalanche(acc & MASK64)
    acc = avalanche((acc + sum(mix_step(data, 16 * i, 16 * i) for i in range(8))) & MASK64)
    acc += sum(mix_step(data, 16 * i, 16 * (i - 8) + 3) for i in range(8, n // 16))
    return avalanche((acc + mix_step(data, n - 16, 119)) & MASK64)


def accumulate(acc: list[int], stripe: tuple[int, ...], secret: tuple[int, ...]) -> None:
    """One stripe into the eight accumulators."""
    for i in range(8):
        value = stripe[i] ^ secret[i]
        acc[i ^ 1] += stripe[i]
        acc[i] = (acc[i] + (value & 0xFFFFFFFF) * (value >> 32)) & MASK64


def large(data: bytes) -> int:
    """241 bytes and more."""
    n = len(data)
    acc = [PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1]
    secrets = [words(SECRET, 8 * i, 8) for i in range(STRIPES_PER_BLOCK)]
    scramble = words(SECRET, len(SECRET) - STRIPE, 8)
    # The last stripe is kept back, even where it is a whole one.
    for number in range((n - 1) // STRIPE):
        accumulate(acc, words(data, STRIPE * number, 8), secrets[number % STRIPES_PER_BLOCK])
        if number % STRIPES_PER_BLOCK == STRIPES_PER_BLOCK - 1:
            acc = [((a & MASK64) ^ ((a & MASK64) >> 47) ^ s) * PRIME32_1 & MASK64 for a, s in zip(acc, scramble)]
    accumulate(acc, words(data, n - STRIPE, 8), words(SECRET, len(SECRET) - 71, 8))
    keys = words(SECRET, 11, 8)
    acc = [(a & MASK64) ^ key for a, key in zip(acc, keys)]
    return avalanche((n * PRIME64_1 + sum(fold(acc[i], acc[i + 1]) for i in range(0, 8, 2))) & MASK64)


def xxh3_64(data: bytes) -> int:
    """The hash of all of `data`. The vectors are those of xxHash's own sanity check, its generator included:

    >>> generator, data = PRIME32_1, bytearray()
    >>> for _ in range(2400):
    ...     data.append(generator >> 56)
    ...     generator = generator * 0x9E3779B185EBCA8D & MASK64
    >>> for n in (0, 1, 6, 12, 24, 48, 80, 195, 403, 512, 2048, 2099, 2240, 2367):
    ...     print(f"{n} {xxh3_64(bytes(data[:n])):016x}")
    0 2d06800538d394c2
    1 c44bdff4074eecdb
    6 27b56a84cd2d7325
    12 a713daf0dfbb77e7
    24 a3fe70bf9d3510eb
    48 397da259ecba1f11
    80 bcdefbbb2c47c90a
    195 cd94217ee362ec3a
    403 cdeb804d65c6dea4
    512 617e49599013cb6b
    2048 dd59e2c3a5f038e0
    2099 c6b9d9b3fc9ac765
    2240 6e73a90539cf2948
    2367 cb37aeb9e5d361ed
    """
    if len(data) <= 16:
        return small(data)
    return medium(data) if len(data) <= 240 else large(data)
