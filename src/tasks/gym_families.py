"""How the answers of each family of reasoning-gym are graded, and why; `benchmarks.audit_reasoning_gym` tests it.

Its own scorers read a model's text, so they are asked only where several answers are right and the scorer pays no wrong
one. A family that is not named here has not been audited, and is refused.
"""

from dataclasses import dataclass

VERSION = "0.1.25"

SCORER = "own scorer"  # in the worker process; right is a score of exactly 1
EXACT = "exact"  # the text of the only right answer, or of one of a list; white space that parts nothing does not count
CASELESS = "exact but for case"
NUMBER = "number"  # the value, as of GSM8K
EXPRESSION = "expression"  # our evaluator of Countdown: each number once, and the value
REFUSED = "refused"


@dataclass(frozen=True)
class Family:
    """How a family is graded and why; only an answer that is of its `shape`, a pattern, reaches the scorer."""

    how: str
    why: str
    shape: str = r"(?s:.+)"


PADDED = "its scorer pays 1 for the answer with more text"
EXECUTES = "its scorer executes the answer"
ONE_TEXT = "one text is right"
ONE_WORD = "one word is right, and the question does not say in which case"
ONE_NUMBER = "one number is right"
ONE_GRID = "one grid is right"
NO_ANSWER = "it gives no right answer, so that nothing shows that its scorer pays one"
UNSTABLE = "its questions differ from one process to the next"
MANY = "several answers are right"

FAMILIES = {
    "ab": Family(EXACT, ONE_TEXT),
    "acre": Family(EXACT, ONE_TEXT),
    "advanced_geometry": Family(REFUSED, f"{PADDED}; it asks for 3 decimals and gives angles with 2"),
    "aiw": Family(NUMBER, ONE_NUMBER),
    "arc_1d": Family(EXACT, ONE_GRID),
    "arc_agi": Family(EXACT, ONE_GRID),
    "base_conversion": Family(EXACT, ONE_TEXT),
    "basic_arithmetic": Family(NUMBER, ONE_NUMBER),
    "bf": Family(EXACT, ONE_TEXT),
    "binary_alternation": Family(NUMBER, ONE_NUMBER),
    "binary_matrix": Family(EXACT, f"{EXECUTES}; {ONE_GRID}"),
    "bitwise_arithmetic": Family(CASELESS, "one hexadecimal number is right"),
    "boxnet": Family(REFUSED, NO_ANSWER),
    "caesar_cipher": Family(EXACT, ONE_TEXT),
    "calendar_arithmetic": Family(EXACT, ONE_TEXT),
    "chain_sum": Family(NUMBER, ONE_NUMBER),
    "circuit_logic": Family(EXACT, ONE_TEXT),
    "codeio": Family(REFUSED, UNSTABLE),
    "coin_flip": Family(REFUSED, "its scorer pays 0 for a probability below 0.0001, and its answers are rounded"),
    "color_cube_rotation": Family(CASELESS, ONE_WORD),
    "complex_arithmetic": Family(EXACT, "its scorer pays NaN; right is the notation of the question, as 4.0 - 7.0i"),
    "count_bits": Family(NUMBER, ONE_NUMBER),
    "count_primes": Family(NUMBER, ONE_NUMBER),
    "countdown": Family(EXPRESSION, f"{EXECUTES}, and hangs on a tower of powers"),
    "course_schedule": Family(EXACT, ONE_TEXT),
    "cryptarithm": Family(SCORER, MANY),
    "decimal_arithmetic": Family(NUMBER, "its scorer pays neighbours of the answer"),
    "decimal_chain_sum": Family(NUMBER, ONE_NUMBER),
    "dice": Family(EXACT, "one reduced fraction is right"),
    "emoji_mystery": Family(EXACT, ONE_TEXT),
    "family_relationships": Family(CASELESS, ONE_WORD),
    "figlet_font": Family(CASELESS, "its scorer pays ten right letters of a longer word"),
    "fraction_simplification": Family(EXACT, f"{PADDED}; right is the reduced fraction in the question's notation"),
    "futoshiki": Family(EXACT, ONE_GRID),
    "game_of_life": Family(EXACT, "its scorer pays 1 for a larger grid"),
    "game_of_life_halting": Family(EXACT, "its scorer pays any text"),
    "gcd": Family(NUMBER, ONE_NUMBER),
    "graph_color": Family(SCORER, MANY),
    "group_anagrams": Family(SCORER, "the groups may be in any order"),
    "gsm_symbolic": Family(NUMBER, f"{PADDED}; {ONE_NUMBER}"),
    "intermediate_integration": Family(REFUSED, f"{EXECUTES}, and several expressions are right"),
    "isomorphic_strings": Family(REFUSED, UNSTABLE),
    "jugs": Family(SCORER, MANY),
    "kakurasu": Family(SCORER, MANY, r"[01\s]+"),
    "knight_swap": Family(SCORER, MANY),
    "knights_knaves": Family(
        SCORER,
        "a or an, in any order",
        r"\w+ is an? \w+(?:(?:,|,? and) \w+ is an? \w+)*\.?",
    ),
    "largest_island": Family(NUMBER, ONE_NUMBER),
    "lcm": Family(NUMBER, ONE_NUMBER),
    "leg_counting": Family(NUMBER, ONE_NUMBER),
    "letter_counting": Family(NUMBER, ONE_NUMBER),
    "letter_jumble": Family(EXACT, f"{PADDED}; {ONE_TEXT}"),
    "list_functions": Family(REFUSED, UNSTABLE),
    "mahjong_puzzle": Family(EXACT, ONE_TEXT),
    "manipulate_matrix": Family(EXACT, ONE_GRID),
    "maze": Family(NUMBER, ONE_NUMBER),
    "mini_sudoku": Family(EXACT, ONE_GRID),
    "modulo_grid": Family(EXACT, ONE_GRID),
    "n_queens": Family(EXACT, f"{EXECUTES}; right are the boards that it lists"),
    "needle_haystack": Family(CASELESS, ONE_WORD),
    "number_filtering": Family(EXACT, "one list is right, in the question's notation"),
    "number_format": Family(SCORER, "its answer is the number before rounding to the one that the question shows"),
    "number_sequence": Family(NUMBER, ONE_NUMBER),
    "number_sorting": Family(EXACT, "its scorer pays numbers that differ by 1; one list is right"),
    "palindrome_generation": Family(SCORER, MANY),
    "palindrome_partitioning": Family(SCORER, "the lists may be in any order"),
    "path_star": Family(EXACT, ONE_TEXT),
    "polynomial_equations": Family(REFUSED, f"{PADDED}; a right answer may be empty, or 0.0 or 0.0000"),
    "polynomial_multiplication": Family(REFUSED, f"{EXECUTES}; {UNSTABLE}"),
    "pool_matrix": Family(REFUSED, "its scorer pays 1% off and text after #; it asks for 2 decimals and gives 1"),
    "power_function": Family(SCORER, "right are 3 significant figures, in any notation"),
    "prime_factorization": Family(SCORER, "the factors may be in any order"),
    "products": Family(NUMBER, ONE_NUMBER),
    "propositional_logic": Family(
        REFUSED, "its scorer pays a conclusion of one premise, and answers of other problems"
    ),
    "puzzle24": Family(EXPRESSION, f"{EXECUTES}, and need not use the numbers"),
    "quantum_lock": Family(SCORER, MANY, r"[ABC](?: ?→ ?[ABC])*"),
    "ransom_note": Family(REFUSED, UNSTABLE),
    "rearc": Family(EXACT, ONE_GRID),
    "rectangle_count": Family(NUMBER, ONE_NUMBER),
    "rotate_matrix": Family(EXACT, ONE_GRID),
    "rotten_oranges": Family(NUMBER, ONE_NUMBER),
    "rubiks_cube": Family(SCORER, MANY),
    "rush_hour": Family(REFUSED, NO_ANSWER),
    "self_reference": Family(NUMBER, ONE_NUMBER),
    "sentence_reordering": Family(EXACT, ONE_TEXT),
    "shortest_path": Family(SCORER, MANY),
    "simple_equations": Family(NUMBER, ONE_NUMBER),
    "simple_geometry": Family(NUMBER, ONE_NUMBER),
    "simple_integration": Family(REFUSED, f"{EXECUTES}, and several expressions are right"),
    "sokoban": Family(SCORER, MANY, r"[LRUD]+"),
    "spell_backward": Family(EXACT, f"{PADDED}; {ONE_TEXT}"),
    "spiral_matrix": Family(EXACT, f"{EXECUTES}; one list is right"),
    "string_insertion": Family(EXACT, f"{EXECUTES}; {ONE_TEXT}"),
    "string_manipulation": Family(EXACT, ONE_TEXT),
    "string_splitting": Family(EXACT, "one list of counts is right"),
    "string_synthesis": Family(EXACT, "one list of counts is right"),
    "sudoku": Family(EXACT, ONE_GRID),
    "survo": Family(EXACT, f"{PADDED}; {ONE_GRID}"),
    "syllogism": Family(EXACT, ONE_TEXT),
    "time_intervals": Family(EXACT, f"{PADDED}; one text of the form that the question asks for is right"),
    "tower_of_hanoi": Family(SCORER, MANY),
    "tsumego": Family(EXACT, "one move is right"),
    "word_ladder": Family(SCORER, MANY),
    "word_sequence_reversal": Family(EXACT, "one list is right"),
    "word_sorting": Family(EXACT, f"{PADDED}; one list is right"),
    "zebra_puzzles": Family(CASELESS, "one name is right; the question has capitals, the answer has none"),
}
