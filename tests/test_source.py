"""What the source never does, read from the source itself: nothing that is read is run as code.

`EXCEPTIONS` has all that stays, each with its reason; one that is not needed is an error, too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("jaxgrpo", "models", "rewards", "scripts")

# Modules that run what they read, and modules that reach other machines.
MODULES = {
    "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch",
    "yaml", "multiprocessing", "code", "codeop", "runpy", "imp", "socket", "socketserver", "ssl",
    "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "websockets", "xmlrpc", "ftplib",
    "smtplib", "telnetlib", "paramiko", "huggingface_hub", "httpx2", "openai",
    "uvicorn", "starlette",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    "import_module", "exec_module", "load_module", "spec_from_file_location", "read_pickle",
    "to_pickle", "system", "popen", "getoutput", "getstatusoutput", "mktemp", "Environment",
    "NativeEnvironment", "SandboxedEnvironment",
}  # fmt: skip
# Keyword arguments, and the only values that they may have.
KEYWORDS = {"allow_pickle": False, "trust_remote_code": False, "shell": False}

_CONFIGURED = "a reward that the configuration names is code, and trusted"
_OWN = "a module of this package, named in this file"
_PROCESSES = "the processes of one run speak to each other, in JSON"
_SERVES = "serves the model that its command line names, where it says"
EXCEPTIONS = {
    ("jaxgrpo/cluster.py", "socket"): _PROCESSES,
    ("jaxgrpo/chat_app.py", "starlette"): _SERVES,
    ("jaxgrpo/endpoint.py", "httpx2"): "asks the server that the command line names",
    ("jaxgrpo/link.py", "socket"): _PROCESSES,
    ("jaxgrpo/run_dir.py", "socket"): "the name of this machine, for the lock's file",
    ("jaxgrpo/serve.py", "socket"): _SERVES,
    ("jaxgrpo/serve.py", "uvicorn"): _SERVES,
    ("rewards/base.py", "import_module"): _CONFIGURED,
    ("rewards/base.py", "spec_from_file_location"): _CONFIGURED,
    ("rewards/base.py", "exec_module"): _CONFIGURED,
    ("scripts/inject/base.py", "import_module"): _OWN,
    ("scripts/inject/driver.py", "shell"): "what a fault campaign does to its own run",
    ("scripts/reference.py", "import_module"): "the commands of this package",
    ("scripts/inject/store.py", "socket"): "a free port for the processes of a run",
}


def findings(source: str) -> set[str]:
    """The names, of those above, that a source uses."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                found |= {alias.name.split(".")[0] for alias in aliases} & MODULES
            case ast.ImportFrom(module=str(module), names=aliases, level=0):
                found |= {module.split(".")[0]} & MODULES
                found |= {alias.name for alias in aliases} & (ATTRIBUTES | BUILTINS)
            case ast.Name(id=name, ctx=ast.Load()):
                found |= {name} & BUILTINS
            case ast.Attribute(value=ast.Name(id="builtins"), attr=name):
                found |= {name} & BUILTINS
            case ast.Attribute(value=ast.Name(id="os"), attr=name):
                found |= {name} & ATTRIBUTES
            case ast.Call(func=ast.Attribute(attr="system")):
                found.add("system")
            case ast.Attribute(attr=name):
                found |= {name} & ATTRIBUTES - {"system"}  # a setting is called that, too
            case ast.keyword(arg=str(name), value=value) if name in KEYWORDS:
                if not (isinstance(value, ast.Constant) and value.value is KEYWORDS[name]):
                    found.add(name)
    return found


def test_nothing_that_is_read_is_run():
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    found = {
        (file.relative_to(ROOT).as_posix(), name)
        for file in files
        for name in findings(file.read_text("utf-8"))
    }
    assert found == EXCEPTIONS.keys()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle", "pickle"),
        ("import os, torch.nn as nn", "torch"),
        ("def f():\n    from multiprocessing import Pool", "multiprocessing"),
        ("from urllib.request import urlopen", "urllib"),
        ("from os import system", "system"),
        ("f = os.system", "system"),
        ("import os as o\no.system(x)", "system"),
        ("eval(x)", "eval"),
        ("f = exec", "exec"),
        ("import builtins\nbuiltins.compile(x, '', 'exec')", "compile"),
        ("from builtins import eval as e", "eval"),
        ("[__import__(name) for name in names]", "__import__"),
        ("importlib.import_module(name)", "import_module"),
        ("np.load(file, allow_pickle=True)", "allow_pickle"),
        ("np.load(file, allow_pickle=x)", "allow_pickle"),
        ("AutoTokenizer.from_pretrained(x, trust_remote_code=1)", "trust_remote_code"),
        ("subprocess.run(x, shell=True)", "shell"),
        ("jinja2.Environment()", "Environment"),
    ],
)
def test_it_would_be_found(source, name):
    assert findings(source) == {name}


def test_what_only_looks_like_it_is_not():
    source = "import re\nre.compile(x)\nstep.lower().compile()\nnp.load(x, allow_pickle=False)\n"
    source += "config.data.system\n"
    assert findings(source + "subprocess.run(x, shell=False)\n'eval(x)'  # import pickle") == set()
