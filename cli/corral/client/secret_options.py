"""--secret, in the words of docker and podman."""

from corral.api.engine.v1.engine_pb2 import SecretMount

_KNOWN = "source, target, uid, gid, mode and type=mount|env"


def secret_mount(text: str) -> SecretMount:
    """NAME, or NAME,target=…,uid=…,gid=…,mode=0400,type=mount|env. Raises ValueError."""
    result = SecretMount()
    for place, part in enumerate(text.split(",")):
        key, separator, value = part.partition("=")
        match key:
            case name if place == 0 and not separator:
                result.secret = name
            case "source":
                result.secret = value
            case "target":
                result.target = value
            case "uid" | "gid":
                setattr(result, key, _number(text, part, value, 10, (1 << 32) - 2))
            case "mode":
                result.mode = _number(text, part, value, 8, 0o7777)
            case "type" if value in ("mount", "env"):
                result.env = value == "env"
            case _:
                raise ValueError(f"secret {text!r}: {part!r} is not understood; known are {_KNOWN}")
    if not result.secret:
        raise ValueError(f"secret {text!r} is not understood: give its name first, as 'corral secret ls' has it")
    return result


def _number(text: str, part: str, value: str, base: int, most: int) -> int:
    try:
        number = int(value, base)
    except ValueError:
        number = -1
    if not 0 <= number <= most:
        raise ValueError(f"secret {text!r}: {part!r} is no number{' in octal' if base == 8 else ''} up to {most}")
    return number
