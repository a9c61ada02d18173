"""Shape annotations: ``Float[Tensor, "tokens vocab"]``.

jaxtyping is a development dependency. Where it is absent the annotation is just the tensor type, so the core needs
torch alone; tests install jaxtyping's import hook and every annotation is then checked at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ModuleNotFoundError:

        class _Unchecked:
            def __class_getitem__(cls, item: tuple[type, str]) -> type:
                return item[0]

        Bool = Float = Int = _Unchecked

__all__ = ["Bool", "Float", "Int", "Tensor"]
