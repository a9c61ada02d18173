"""Cross-fitting: each row is judged by a copy of the base that was trained on the other rows, and has not seen its prompt."""

from qtarget.integrations.sft.crossfit.recipe import CrossfitRecipe
from qtarget.integrations.sft.crossfit.score import crossfit_score

__all__ = ["CrossfitRecipe", "crossfit_score"]
