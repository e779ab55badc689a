"""HTTP/2's code for letters of header fields: gRPC's server packs binary ones. Source: RFC 7541, appendix B."""

_LENGTHS = bytes.fromhex(
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c060a0a0c0d06080b0a0a080b08060606"
    "0505050606060606060607080f060c0a0d06070707070707070707070707070707070707070707070807080d130d0e06"
    "0f05060506050606060507070606060506070605050607070707070f0b0e0d1c14161414161616171617171717171817"
    "181816171817171717151617161717181615141616171715171616181516171715151615171617171416161617161617"
    "1a1a1413161716191a1a1a1b1b1a181913151a1b1b1a1b1815151a1a1c1b1b1b14181415161515171616191918181a17"
    "1a1b1a1a1b1b1b1b1b1c1b1b1b1b1b1a1e"
)
"""How many bits each letter has, and the end. By length, then by letter, each is the next number."""
_END = 256


def _codes() -> "dict[tuple[int, int], int]":
    codes: dict[tuple[int, int], int] = {}
    code = length = 0
    for letter in sorted(range(len(_LENGTHS)), key=lambda each: (_LENGTHS[each], each)):
        code <<= _LENGTHS[letter] - length
        length = _LENGTHS[letter]
        codes[length, code] = letter
        code += 1
    return codes


def unpack(packed: bytes) -> bytes:
    """The letters. Raises ValueError for what is none of the code's words; the last byte is filled with ones."""
    codes = _codes()
    letters = bytearray()
    code = length = 0
    for byte in packed:
        for shift in range(7, -1, -1):
            code = code << 1 | byte >> shift & 1
            length += 1
            letter = codes.get((length, code))
            if letter is not None:
                if letter == _END:
                    raise ValueError("a packed text goes on behind its end")
                letters.append(letter)
                code = length = 0
    if length > 7 or code != (1 << length) - 1:
        raise ValueError("a packed text ends within a letter")
    return bytes(letters)
