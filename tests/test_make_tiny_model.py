"""The program that made the embedded model can still measure one."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from src.make_tiny_model import accuracy

FOLDER = Path(__file__).parent.parent / "models" / "countdown-tiny"


def test_the_embedded_model_is_in_the_format_and_right_as_often_as_the_readme_says():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    found = accuracy(model, tokenizer, "validation", problems=64, samples=1)
    assert found["greedy_format"] > 0.9 and 0.25 < found["greedy"] < 0.6, "42% on the held-out problems"
