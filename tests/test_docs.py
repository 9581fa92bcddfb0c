"""Every command and snippet of the README and of docs/ runs as a reader would run it; every link leads somewhere."""

import builtins
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import power_kernels
import power_kernels.api
from power_kernels.api import PowerResult
from tests.commands import markov_model, save

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
BLOCKS = [
    (page, kind, text)
    for page, content in PAGES.items()
    for kind, text in re.findall(r"^```(\w+)\n(.*?)^```", content, re.M | re.S)
]
# Blocks that share a variable run as a whole; elsewhere each line is a command.
COMMANDS = {
    line.split("#")[0].strip()
    for _, kind, text in BLOCKS
    if kind == "bash" and "MODEL" not in text
    for line in text.splitlines()
}


def run(command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.run(["bash", "-ec", command], cwd=ROOT, env=environment, capture_output=True, text=True)


# What names the demo's model, which is big for a test, and the folder of one of 32 words in its place.
PACKAGED = "$(python -m power_kernels.api.commands.packaged_model)"
TINY = "build/tests-tiny-model"

VLLM_COMMAND = (
    "power-kernels generate --engine vllm --model Qwen/Qwen3-0.6B --engine-arg max_model_len=4096 "
    '--prompt "The capital of France is"'
)

SGLANG_COMMAND = (
    "power-kernels generate --engine sglang --model Qwen/Qwen3-0.6B --engine-arg context_length=4096 "
    '--prompt "The capital of France is"'
)

SERVE_COMMAND = "power-kernels serve Qwen/Qwen3-0.6B --max-model-len 4096 --enable-prompt-tokens-details"
CURL_COMMAND = next(command for command in COMMANDS if command.startswith("curl "))

PARTICLES_COMMAND = next(command for command in COMMANDS if "--kernel particles" in command)

# Each command as it is tested: as it stands, or with what keeps the test short and the machine unchanged; and what it
# then prints.
TESTED = {
    "make demo": (
        "make demo",
        ("plain sampling", "low temperature", "power sampling", "nats", "acceptance rate", "tokens forwarded"),
    ),
    "make test": ("make --dry-run test", ("-m pytest", " tests")),  # the command that is running now
    "make test-vllm": ("make --dry-run test-vllm", ("tests/vllm/run.sh",)),
    "pip install '.[vllm]'": ("pip install --dry-run --no-deps --no-build-isolation '.[vllm]'", ()),
    "make test-sglang": ("make --dry-run test-sglang", ("tests/sglang/run.sh",)),
    "pip install '.[sglang]'": ("pip install --dry-run --no-deps --no-build-isolation '.[sglang]'", ()),
    # tests/sglang/commands.py runs it where there is an SGLang, and the snippet of its page.
    SGLANG_COMMAND: ("power-kernels generate --help", ("--engine", "--engine-arg KEY=VALUE")),
    # tests/vllm/commands.py runs it where there is a vLLM, and the snippet of its page.
    VLLM_COMMAND: ("power-kernels generate --help", ("--engine", "--engine-arg KEY=VALUE")),
    # tests/vllm/server.py runs these two, and the snippet of their page.
    SERVE_COMMAND: ("power-kernels serve --help", ("vllm_xargs", "--help=all")),
    CURL_COMMAND: ("curl --version", ("curl",)),
    "power-kernels doctor": (
        "power-kernels doctor",
        ("backend of each op", "sample_tokens", "programs that a model wrote", "missing"),
    ),
    "pip install torch setuptools wheel": ("pip install --dry-run torch setuptools wheel", ()),
    "pip install --no-build-isolation '.[gguf]'": ("pip install --dry-run --no-build-isolation '.[gguf]'", ()),
    "pip install --no-build-isolation '.[eval]' && power-kernels eval --help": (
        "pip install --dry-run --quiet --no-deps --no-build-isolation '.[eval]' && power-kernels eval --help",
        ("--official-harness",),
    ),
    PARTICLES_COMMAND: (
        f'power-kernels generate --model {TINY} --prompt "The capital of France is" --kernel particles --particles 8 '
        "--sweeps 1 --max-new-tokens 16",
        ("log Zhat", "at the start", "in the sweeps"),
    ),
    "make bench": ("make --dry-run bench", ("bench/ops.py", "bench/end_to_end.py")),
    "power-kernels bench": ("power-kernels bench --quick --ops mh_accept", ("decisions/s", "eager")),
    "python bench/ops.py": ("python bench/ops.py --quick", ("decisions/s", "logsumexp", "compile", "eager", "limits")),
    "python bench/end_to_end.py": (
        "python bench/end_to_end.py --quick --only ours-1",
        ("plain generate", "power_kernels, 1 chain"),
    ),
    "python bench/end_to_end.py latency": (
        "python bench/end_to_end.py latency --quick --model tiny --lanes 1,default",
        ("plain", "default lanes over 1 lane"),
    ),
    "python bench/end_to_end.py throughput": (
        "python bench/end_to_end.py throughput --quick --model tiny",
        ("answers", "useful"),
    ),
    'power-kernels doctor --model "$(python -m power_kernels.api.commands.packaged_model)"': (
        f"power-kernels doctor --threads 1 --model {TINY}",
        ("attention", "lanes"),
    ),
    "python -m power_kernels.api.commands.paged_demo": (
        "python -m power_kernels.api.commands.paged_demo --tiny",
        ("shared", "copied"),
    ),
    "python -m power_kernels.api.commands.paged_demo --particles 32 --max-new-tokens 48 --kv-block 4": (
        "python -m power_kernels.api.commands.paged_demo --tiny --particles 4 --max-new-tokens 8 --kv-block 4",
        ("blocks of 4 positions", "shared", "copied"),
    ),
    "python -m power_kernels.api.commands.hub build/hub": (
        "rm -rf build/tests-hub; python -m power_kernels.api.commands.hub build/tests-hub",  # it overwrites nothing
        ("build/torch-cpu", "build/torch-cuda", "build/torch-rocm"),
    ),
    "power-kernels eval --demo": (
        # Records of an older model or other arms would be refused.
        "rm -rf build/tests-eval-demo; power-kernels eval --demo --out build/tests-eval-demo --pilot 2",
        ("| demo | plain |", "| demo | power |", "against"),
    ),
    "power-kernels eval bench/experiments/humaneval.yaml --out build/humaneval --dry-run": (
        "power-kernels eval bench/experiments/humaneval.yaml --out build/humaneval --dry-run",
        ("power-text", "low-temperature", "in all"),
    ),
    "make experiment": (
        "make --dry-run experiment",
        ("packaged_model qwen2.5-coder-0.5b-instruct", "humaneval.yaml", '--out "build/humaneval"', "--allow-code"),
    ),
    "make experiment OUT=results": ("make --dry-run experiment OUT=results", ('--out "results"',)),
    "python -m power_kernels.api.experiments.lm_eval_model ls tasks": (
        "python -m power_kernels.api.experiments.lm_eval_model --help",
        ("lm-eval", "run"),
    ),
    "make kernels-report": (
        "python -m power_kernels.triton --quick mh_accept",
        ("sm_80", "sm_90", "sm_100", "gfx942", "regs"),
    ),
    "make ptx": ("make --dry-run ptx", ("tests.ptx",)),
    "make gpu-check OUT=results": ("make --dry-run gpu-check OUT=results", ("bench/gpu_check.py --out",)),
    "make gpu-check OUT=results PLAN=smoke": (
        "make --dry-run gpu-check OUT=results PLAN=smoke",
        ("bench/gpu_check.py --out", "--plan smoke"),
    ),
    "make gpu-check OUT=results-decode PLAN=decode": (
        "make --dry-run gpu-check OUT=results-decode PLAN=decode",
        ("--plan decode",),
    ),
}


def test_every_command_is_tested():
    assert sorted(COMMANDS) == sorted(TESTED)
    assert {kind for _, kind, _ in BLOCKS} <= {"bash", "python", "yaml"}  # test_experiments.py reads the last


@pytest.fixture(scope="module")
def _tiny_model():
    save(markov_model(), ROOT / TINY)


@pytest.mark.usefixtures("_tiny_model")
@pytest.mark.parametrize("command", TESTED)
def test_the_command_runs(command):
    tested_as, printed = TESTED[command]
    done = run(tested_as)
    assert done.returncode == 0, done.stdout + done.stderr
    for needed in printed:
        assert needed in done.stdout, done.stdout


@pytest.mark.usefixtures("_tiny_model")
def test_the_generate_blocks_run():
    blocks = [text for _, kind, text in BLOCKS if kind == "bash" and "MODEL" in text]
    chat = '--chat --prompt "Name three colours."'
    assert all(PACKAGED in text and chat in text for text in blocks)
    one, diagnosed, several = [text.replace(PACKAGED, TINY).replace(chat, '--prompt "w5 w6"') for text in blocks]
    done = run(one)
    assert done.returncode == 0, done.stderr
    assert "tokens forwarded" in done.stdout
    out = ROOT / "build" / "colours.jsonl"
    out.unlink(missing_ok=True)
    done = run(several)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["chain_id"] for line in out.read_text().splitlines()] == [0, 1]
    (ROOT / "build" / "chains.jsonl").unlink(missing_ok=True)
    done = run(diagnosed)
    assert done.returncode == 0, done.stderr
    assert "verdict: 1 " in done.stdout
    assert "traces.png" in done.stderr


def test_python_snippets_run_in_order():
    """Page by page, each page as one program: a later snippet uses what an earlier one made."""
    programs = {page: "\n".join(t for p, kind, t in BLOCKS if kind == "python" and p == page) for page in PAGES}
    for page in ("docs/vllm.md", "docs/sglang.md"):  # tests/vllm/commands.py and tests/sglang/commands.py run them
        assert sum(line != "" for line in programs.pop(page).splitlines()) <= 10
    del programs["docs/serve.md"]  # tests/vllm/server.py runs it
    programs = {page: text for page, text in programs.items() if text}
    assert {"README.md", "docs/python.md", "docs/engines.md"} <= set(programs)
    code = (
        "import json, sys, torch\ntorch.set_num_threads(1)\n"
        "for page, text in json.load(sys.stdin).items():\n"
        "    print('page', page)\n    exec(compile(text, page, 'exec'), {'__name__': '__main__'})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"},
        input=json.dumps(programs), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = dict(zip(programs, done.stdout.split("page ")[1:], strict=True))
    for page in ("README.md", "docs/python.md"):
        assert len(re.findall(r"nats, \d+ of \d+ steps accepted", printed[page])) == 2
    assert "tensor([" in printed["README.md"]
    assert "The capital of France is" in printed["docs/python.md"]


def test_links_lead_to_files_and_headings():
    def anchor(heading: str) -> str:
        return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

    for page, content in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", content):
            path, _, heading = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), f"{page}: {target}"
            if heading:
                assert heading in map(anchor, re.findall(r"^#+ (.*)$", file.read_text(), re.M)), f"{page}: {target}"


@pytest.mark.parametrize("page", ["docs/python.md", "docs/engines.md"])
def test_the_names_of_a_page_can_be_imported(page):
    """What begins like a class, in code."""
    names = set(re.findall(r"`(?:power_kernels\.api\.)?([A-Z][a-z]\w*)", PAGES[page]))
    names -= set(vars(builtins))
    assert len(names) >= 9
    assert not [n for n in names if not hasattr(power_kernels.api, n) and not hasattr(power_kernels, n)]


def test_the_ways_in_which_an_answer_finishes_are_all_told():
    told = re.findall(r'^\| `"(\w+)"` \|', PAGES["docs/python.md"], re.M)
    assert tuple(told) == get_args(get_type_hints(PowerResult)["finish"])


@pytest.mark.parametrize("page", PAGES)
def test_no_page_has_a_paragraph_that_is_still_to_be_written(page):
    """A paragraph of capitals only holds the place of one."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    assert not re.findall(r"(?:\A|\n\n)([A-Z][A-Z0-9 _.:-]*)(?=\n\n|\n?\Z)", text)


def test_the_readme_is_read_in_five_minutes():
    assert len(PAGES["README.md"].splitlines()) <= 150
