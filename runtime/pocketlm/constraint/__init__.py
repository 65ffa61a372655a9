"""Answers that follow a grammar: JSON schema, regex, Lark or a list of choices become token masks.

`grammar` says what an answer may be, `json_schema` keeps JSON schemas to what can be promised, `masks` holds
one model's tokens against a grammar. The parser is llguidance's (https://github.com/guidance-ai/llguidance).
"""

from pocketlm.constraint.grammar import Grammar
from pocketlm.constraint.masks import Constraint, ConstraintError, ConstraintFactory

__all__ = ["Constraint", "ConstraintError", "ConstraintFactory", "Grammar"]
