"""Building blocks of masked image modeling, as pure functions of tensors: import each from the module of its theme.

Example:
    >>> from mimkit.masking import random_tokens
    >>> from mimkit.tokens import patchify, split, take
"""

__version__ = "0.1.0"
