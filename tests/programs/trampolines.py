"""Functions of Python that call each other without end, for an interpreter that tells profilers of them."""


def busy(count):
    total = 0
    for number in range(count):
        total = (total * 31 + number) & 0xFFFF_FFFF
    return total


# The test counts them.
DEPTH = 20


def down(depth):
    return down(depth - 1) + 1 if depth else busy(1000)


# Names are written by blocks of some kilobytes: so many more move those above out.
FILLING = 200


def outermost():
    down(DEPTH)
    for number in range(FILLING):
        exec(f"def filling{number}(): pass\nfilling{number}()", {})
    while True:
        down(DEPTH)


outermost()
