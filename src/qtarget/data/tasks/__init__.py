"""Twelve small skills with exact answers, in two formats.

The embedded base model learns the skills from documents in its *own* format (``reverse: KDQF = FQDK``). Demonstrations
ask for the same skills in an *instruction* format that the base model has never seen, so that fine-tuning has something
to teach while the knowledge to answer is already there.

Letters in questions are upper case and digits stand alone, because the embedded tokenizer never merges these: a model
of a million parameters then sees every character that it has to reverse, sort or add.
"""

from qtarget.data.tasks.rendering import (
    INSTRUCTION_TEMPLATE,
    Problem,
    check,
    check_pretraining,
    demonstration,
    extract_answer,
    framed_example,
    pretraining_example,
    pretraining_text,
    problem_split,
    sample_problem,
    sample_problem_in,
)
from qtarget.data.tasks.skills import DEMONSTRATED_SKILLS, FORGETTING_SKILLS, SKILLS, Skill

__all__ = [
    "DEMONSTRATED_SKILLS",
    "FORGETTING_SKILLS",
    "INSTRUCTION_TEMPLATE",
    "SKILLS",
    "Problem",
    "Skill",
    "check",
    "check_pretraining",
    "demonstration",
    "extract_answer",
    "framed_example",
    "pretraining_example",
    "pretraining_text",
    "problem_split",
    "sample_problem",
    "sample_problem_in",
]
