"""Random damage of files."""

import re
import struct

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)
NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 2**62, 3 << 40)


def mutate(data, draw, start):
    """One to three random changes of bytes, most in the first `start`: sizes, offsets, types."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        limit = len(data) if draw.random() < 0.3 else min(start, len(data))
        at = draw.randrange(max(limit, 1))
        kind = draw.randrange(8)
        if kind == 0:
            data[at : at + 1] = bytes(
                [(data[at] if at < len(data) else 0) ^ 1 << draw.randrange(8)]
            )
        elif kind == 1:
            data[at : at + 1] = bytes([draw.choice(EXTREMES)])
        elif kind == 2:
            data[at : at + 8] = struct.pack("<Q", draw.choice(NUMBERS))
        elif kind == 3:
            data[at : at + 4] = struct.pack("<I", draw.choice(NUMBERS) % 2**32)
        elif kind == 4:
            del data[at : at + draw.choice((1, 2, 8, len(data)))]
        elif kind == 5:
            data[at:at] = draw.randbytes(draw.choice((1, 2, 8)))
        elif kind == 6:
            data[at : at + 8] = data[draw.randrange(max(len(data), 1)) :][:8]
        else:
            digits = [m.start() for m in re.finditer(rb"[0-9]", data[:start])]
            if digits:
                at = draw.choice(digits)
                data[at : at + 1] = draw.choice((b"9", b"0", b"-1", b"99999999999", b'"', b"1e9"))
    return bytes(data)
