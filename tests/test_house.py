"""The house: which file may import which, that an import does nothing, and how long a file, a function, a line may be."""
import ast
import io
import os
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"meta_train", "personalize", "sample", "eval_rfacesim"}
MOST_TOKENS = 67_150                                                             # outside baby/
SIX = ("flux_model", "metalora", "meta_train", "personalize", "sample", "eval_rfacesim")
FOLDERS = {"support", "paper", "baby", "bench"}
FILES = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))))
BABY = {path.stem for path in FILES if path.parts[0] == "baby"}
OURS = FOLDERS | SCRIPTS | BABY | {"flux_model", "metalora"}
# who may be imported by whom: flux_model, support/names <- support <- metalora <- the scripts <- paper, baby, bench
MAY = {"flux_model": set(), "support": {"flux_model", "support"}, "metalora": {"flux_model", "support"}}
MAY |= {script: {"flux_model", "support", "metalora"} for script in SCRIPTS}
MAY |= {folder: {"flux_model", "support", "metalora", folder} | SCRIPTS for folder in ("paper", "bench")}
MAY["baby"] = {"flux_model", "support", "metalora"} | SCRIPTS | BABY
MAY["paper"] |= {"faces", "baby"}                                                 # the people of its miniature


def imports(path: Path) -> set[str]:
    """First words of what a file imports of ours, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {name.split(".")[0] for name in names}
    return found & OURS


@pytest.mark.parametrize("path", FILES, ids=str)
def test_arrows_run_one_way(path):
    room = path.parts[0] if len(path.parts) > 1 else path.stem
    assert imports(path) <= MAY[room], f"{path} imports {sorted(imports(path) - MAY[room])}"


def test_names_is_the_ground_floor():
    assert imports(Path("support/names.py")) == set()


def in_fork(server, code, folder):
    """What code prints in a process that has imported what is not ours, and none of ours."""
    process = server.Process(target=run_code, args=(code, folder))
    process.start()
    process.join()
    assert process.exitcode == 0, (folder / "stderr").read_text()[-2000:]
    return (folder / "stdout").read_text()


def run_code(code, folder):
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name in list(sys.modules):
        if name.split(".")[0] in OURS:
            del sys.modules[name]
    sys.dont_write_bytecode = True
    exec(code, {})


def test_metalora_stands_on_little(server, tmp_path):
    """What a reader of metalora.py has to open of ours besides the model: under 500 lines."""
    code = "import sys, metalora; print(*(module.__file__ for module in sys.modules.values() if getattr(module, '__file__', None)))"
    ours = {Path(path) for path in in_fork(server, code, tmp_path).split()} & {ROOT / path for path in FILES}   # no .venv
    assert ROOT / "support/names.py" in ours
    below = ours - {ROOT / "metalora.py", ROOT / "flux_model.py"}
    assert sum(len(path.read_text("utf-8").splitlines()) for path in below) < 500, below


def test_every_file_is_of_the_house():
    assert {path.stem for path in FILES if len(path.parts) == 1} == set(SIX)
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))} >= {
        "support", "paper", "baby", "bench", "docs", "tests"}


IMPORT_ALL = """
import builtins, importlib.util, os, socket, sys
sys.path[:0] = [{root!r}, {root!r} + "/baby"]
import torch, transformers, facenet_pytorch, matplotlib.figure, cv2                   # what others do is not ours
def no(what):
    def refuse(*args, **options):
        raise AssertionError(f"importing {{name}} {{what}} {{args[:1]}}")
    return refuse
real = builtins.open
builtins.open = lambda file, mode="r", *a, **k: real(file, mode, *a, **k) if not set("wax+") & set(mode) else no("opens")(file)
os.mkdir, os.makedirs, socket.socket.connect, torch.cuda._lazy_init = map(no, ("makes", "makes", "connects to", "asks the card"))
for name in {files!r}:
    spec = importlib.util.spec_from_file_location("imported_" + name.replace("/", "_")[:-3], {root!r} + "/" + name)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
assert not torch.cuda.is_initialized()
"""


def test_importing_does_nothing(server, tmp_path):
    """No download, no CUDA call, no file, no folder."""
    code = IMPORT_ALL.format(root=str(ROOT), files=[path.as_posix() for path in FILES if path.name != "__init__.py"])
    assert not in_fork(server, code, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stderr", "stdout"]


def test_support_comes_before_torch():
    """How threads wait is read when torch is loaded: every script imports support first."""
    for path in FILES:
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        if any(isinstance(node, ast.If) and "__main__" in ast.dump(node.test) for node in tree.body):
            heavy = [a.name.split(".")[0] for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))
                     for a in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])]
            first = next((name for name in heavy if name in OURS | {"torch", "transformers", "safetensors"}), "support")
            assert first == "support", f"{path} imports {first} before support"


def tokens_of(path: Path) -> tuple[int, int]:
    """Tokens and lines of code, without comments and docstrings."""
    source = (ROOT / path).read_text("utf-8")
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {node.body[0].lineno for node in ast.walk(ast.parse(source)) if isinstance(node, scopes) and ast.get_docstring(node)}
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline)
              if token.type not in layout and not (token.type == tokenize.STRING and token.start[0] in docs)]
    lines = set().union(*(range(token.start[0], token.end[0] + 1) for token in tokens))
    return len(tokens), len(lines)


@pytest.mark.parametrize("name", SIX)
def test_a_reader_takes_in_little_at_once(name):
    """At most 11.5 tokens a line of code, as the models of this field have; a file is kept small by what it leaves out."""
    tokens, lines = tokens_of(Path(f"{name}.py"))
    assert tokens / lines < 11.55, f"{tokens / lines:.2f}"


def test_sizes():
    """The whole stays within its budget; functions and lines stay short."""
    files = [path for path in FILES if path.parts[0] != "baby"]
    assert sum(tokens_of(path)[0] for path in files) <= MOST_TOKENS
    text = {path: (ROOT / path).read_text("utf-8").splitlines() for path in files}
    wide = [f"{path}:{i}" for path in text for i, line in enumerate(text[path], 1) if len(line) > 110]
    assert not wide, wide
    long = [f"{path}: {node.name}" for path, lines in text.items() for node in ast.walk(ast.parse("\n".join(lines)))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 64]
    assert not long, long


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "baby"], ids=str)
def test_public_functions_have_types(path):
    for node in ast.parse((ROOT / path).read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("device", "add", "axes", "size", "judges")]
            assert not bare, f"{node.name}: {bare}"
