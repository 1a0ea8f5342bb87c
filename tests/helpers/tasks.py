"""Small documents in the columns of every harness task."""

from __future__ import annotations

from typing import Any

ANIMALS, CITIES = ["dog", "cat", "bird", "fish", "wolf"], ["paris", "berlin", "rome", "madrid", "tokyo", "beijing"]


def documents(task: str, i: int) -> dict[str, Any]:
    """A small document in the columns of a task."""
    a, b, c, d = (ANIMALS[(i + k) % 5] for k in range(4))
    city = CITIES[i % 6]
    choices = {"text": [f"a {a} and a {b}", f"the {b}", c, f"{d} in {city}"], "label": ["A", "B", "C", "D"]}
    known: dict[str, dict[str, Any]] = {
        "boolq": {
            "question": f"is the {a} a {b}",
            "passage": f"the {a} was in {city} . " * (1 + i % 4),
            "label": i % 2,
        },
        "piqa": {"goal": f"the {a} is", "sol1": f"a {b} in {city}", "sol2": f"not a {c}", "label": i % 2},
        "winogrande": {
            "sentence": f"the {a} wrote to the {b} and _ is in {city} .",
            "option1": a,
            "option2": b,
            "answer": "12"[i % 2],
        },
        "arc_easy": {"question": f"the capital is {city}", "choices": choices, "answerKey": "ABCD"[i % 4]},
        "arc_challenge": {"question": f"the animal is {a}", "choices": choices, "answerKey": "ABCD"[-i % 4]},
        "webqs": {"url": "", "question": f"{city} is", "answers": [a, f"{b} and {c}"][: 1 + i % 2]},
        "triviaqa": {
            "question": f"the {a} of {city}",
            "question_id": str(i),
            "answer": {"value": b, "aliases": [b, c]},
        },
        "hellaswag": {
            "activity_label": city,
            "ctx_a": f"the {a} is",
            "ctx_b": "",
            "ctx": "",
            "endings": [b, c, d, f"a {a}"],
            "label": str(i % 4),
        },
        "lambada_openai": {"text": f"the {a} and the {b} in {city} was {c}"},
        "sciq": {
            "question": city,
            "support": f"the {a}",
            "correct_answer": a,
            "distractor1": b,
            "distractor2": c,
            "distractor3": d,
        },
    }
    return known[task.removesuffix("_greedy")]
