"""What can be wrong with a layer."""


class BadLayer(Exception):
    """The data is corrupt, truncated or unsafe: nobody should use it. The text is a sentence for the user."""


class Truncated(BadLayer):
    """The data ends too early."""
