"""How answers are graded, rewards called and rows read. Importing it loads neither torch nor a tokenizer."""

from src.tasks.accuracy import answers_of, confidence, mean, pass_at_k, ranking_metrics, solved, summarize
from src.tasks.answers import final_answer, graded, has_think_answer_format, last_answer
from src.tasks.expressions import (
    MAX_DIGITS,
    ExpressionError,
    evaluate_expression,
    expression_is_correct,
    plain_expression,
)
from src.tasks.given import given_groups
from src.tasks.gym import GYM_PREFIX, ReasoningGym
from src.tasks.mathematics import math_is_correct, math_reference
from src.tasks.numbers import gsm8k_reference, number_is_correct, parse_number
from src.tasks.prompts import check_chat, make_problems
from src.tasks.rewards import Rewards
from src.tasks.task import (
    GENERATED_EVAL_SIZE,
    SPLITS,
    Task,
    in_user_code,
    is_text,
    load_eval_rows,
    load_train_rows,
    own_tasks,
    split_of_text,
    text_of,
)
from src.tasks.turns import Conversation

__all__ = [
    "GENERATED_EVAL_SIZE",
    "GYM_PREFIX",
    "MAX_DIGITS",
    "SPLITS",
    "Conversation",
    "ExpressionError",
    "ReasoningGym",
    "Rewards",
    "Task",
    "answers_of",
    "check_chat",
    "confidence",
    "evaluate_expression",
    "expression_is_correct",
    "final_answer",
    "given_groups",
    "graded",
    "gsm8k_reference",
    "has_think_answer_format",
    "in_user_code",
    "is_text",
    "last_answer",
    "load_eval_rows",
    "load_train_rows",
    "make_problems",
    "math_is_correct",
    "math_reference",
    "mean",
    "number_is_correct",
    "own_tasks",
    "parse_number",
    "pass_at_k",
    "plain_expression",
    "ranking_metrics",
    "solved",
    "split_of_text",
    "summarize",
    "text_of",
]
