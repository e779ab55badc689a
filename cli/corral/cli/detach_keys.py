"""Keys by which a user leaves a process without ending it, as docker names them."""

DEFAULT_DETACH_KEYS = "ctrl-p,ctrl-q"


def parse_detach_keys(text: str) -> bytes:
    """ "ctrl-p,ctrl-q" -> b"\\x10\\x11". Raises ValueError."""
    keys = b""
    for key in filter(None, text.split(",")):
        if len(key) == 1:
            keys += key.encode()
        elif key.startswith("ctrl-") and len(key) == 6 and 0x40 <= ord(key[5].upper()) <= 0x5F:
            keys += bytes([ord(key[5].upper()) & 0x1F])
        else:
            raise ValueError(
                f"detach key {key!r} is not understood: give a character, or ctrl- and one of a-z @ [ \\ ] ^ _"
            )
    return keys


class DetachKeys:
    """Finds a key sequence in what is typed; a beginning of it is held back until the next key tells."""

    def __init__(self, keys: bytes) -> None:
        self.keys = keys
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What to pass on, and whether the whole sequence was typed."""
        if not self.keys:
            return data, False
        passed = bytearray()
        for byte in data:
            self._held += bytes([byte])
            if self._held == self.keys:
                return bytes(passed), True
            while self._held and not self.keys.startswith(self._held):
                passed.append(self._held[0])
                self._held = self._held[1:]
        return bytes(passed), False
