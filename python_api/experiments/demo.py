"""The experiment of `power-kernels eval --demo`: short questions that a model of 135M parameters answers now and then.

Three answered questions stand before each, so that a continuation is an answer, and the end of its line ends it.
"""

from __future__ import annotations

import json
from pathlib import Path

from power_kernels.api.experiments.records import write_whole
from power_kernels.errors import ArgumentError

BEFORE = [
    ("What is the capital of France?", "Paris"),
    ("What is 2 + 3?", "5"),
    ("What is the opposite of hot?", "cold"),
]
QUESTIONS = [
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Canada?", "Ottawa"),
    ("What is the capital of Portugal?", "Lisbon"),
    ("What is the opposite of early?", "late"),
    ("What is the opposite of empty?", "full"),
    ("What is the opposite of loud?", "quiet"),
    ("What is the opposite of north?", "south"),
    ("What is 3 + 4?", "7"),
    ("What is 6 + 7?", "13"),
    ("What is 9 - 5?", "4"),
    ("What is 2 times 8?", "16"),
    ("What is 20 + 15?", "35"),
    ("Which planet is closest to the sun?", "Mercury"),
    ("Which planet has rings?", "Saturn"),
    ("What do bees make?", "honey"),
    ("How many legs has a spider?", "8"),
    ("How many days are in a week?", "7"),
    ("What is the plural of mouse?", "mice"),
    ("What is the plural of leaf?", "leaves"),
    ("Which animal says meow?", "cat"),
    ("What is frozen water called?", "ice"),
]


def write_questions(folder: Path) -> Path:
    """The questions as a file of one's own. Raises ArgumentError."""
    before = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in BEFORE)
    lines = [{"prompt": f"{before}Q: {question}\nA:", "answer": answer} for question, answer in QUESTIONS]
    path = folder / "questions.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise ArgumentError(f"--out {folder} cannot be written: {error}") from None
    return path


def experiment(model: str, questions: Path) -> dict:
    power = {"kind": "power", "alpha": 4, "block_size": 4, "mcmc_steps": 4}
    return {
        "model": model,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,  # two on a machine that is busy otherwise can be several times slower
        "tasks": [
            {
                "kind": "file",
                "name": "demo",
                "data": str(questions),
                "grader": "exact",
                "stop": ["\n"],
                "max_new_tokens": 8,
            }
        ],
        "arms": [
            "plain",
            "low-temperature",
            power,
            {**power, "name": "power-text", "stop": "text"},
            {"kind": "best-of-n", "of": "plain", "n": 4},
            {"kind": "majority", "of": "plain", "n": 4},
        ],
        "seeds": [0, 1],
    }
