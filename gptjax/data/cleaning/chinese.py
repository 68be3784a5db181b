"""Conversion of traditional to simplified Chinese."""

import functools
from typing import Any

from gptjax.data.scripts import count_han
from gptjax.errors import UserError


def simplified(text: str) -> str:
    """Converts traditional to simplified characters; the phrase decides if there are several (OpenCC's t2s).

    Raises:
      UserError: OpenCC is not installed.
    """
    return _converter().convert(text) if not text.isascii() and count_han(text) else text


@functools.cache
def _converter() -> Any:
    try:
        import opencc
    except ImportError:
        raise UserError(
            "the cleaning step simplified needs OpenCC, which is not installed: pip install 'gptjax[data]'"
        ) from None
    return opencc.OpenCC("t2s")
