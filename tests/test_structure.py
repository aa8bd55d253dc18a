"""How the house is built: each wing imports only wings before it, each file only files before it, and each kind of knowledge has
one room. `faults(...)` take sources by path, so that each rule can be shown to find what it forbids."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

from evoprune.config import ENGINES
from evoprune.evolution.starts import STARTS
from evoprune.masks.saliency import SALIENCIES
from evoprune.results.written import CHECKPOINT, FILES, GONE, LOCK, MODELS, REPLACED, STAGE_VALUES, TRAINED
from evoprune.rules import NEEDS, SCORES

BELOW = ["interrupts", "errors", "files", "objectives", "rules", "chance", "config"]
WINGS = {
    "inputs": ["models", "weights", "zoo", "named", "nested", "datasets", "scores", "tasks", "splits", "images", "sources"],
    "engines": ["worker", "team", "processes", "scoop_pool", "dask_pool", "engine", "scoop_launch", "scoop_worker"],
    "masks": ["units", "layout", "layers", "genome", "tensors", "saliency", "channels", "paths", "packed"],
    "values": ["fast", "optimizer", "training", "attention", "least_squares", "sensitivity", "norms", "repair", "inherited",
               "spaces", "slim", "sparse"],
    "evaluation": ["accuracy", "graph", "usage", "prepared", "evaluator"],
    "evolution": ["selection", "operators", "starts", "history", "generations", "budget", "tuned", "toolbox", "checkpoint"],
    "results": ["points", "record", "machine", "written", "tables", "plots", "folder", "reload", "export", "front"],
    "views": ["page", "report", "pictures", "compare", "pick"],
    "run": ["settings", "run", "progress", "dense", "plan", "prepare", "rebuild", "jobs", "search", "layerwise",
            "refine", "finish"]}
ABOVE = ["pruning", "commands", "main", "__main__"]
ORDER = [*BELOW, *(f"{wing}.{name}" for wing, names in WINGS.items() for name in names), *ABOVE]
FORBIDDEN = {**{wing: {"evaluation", "evolution", "run"} for wing in ("results", "views")}, "masks": {"values"},
             "evaluation": {"evolution"}, "evolution": {"evaluation"},
             "engines": set(WINGS) - {"engines"}}  # beside what comes later
GIVEN_CONFIG = {"inputs.named", "inputs.images", "inputs.sources", "engines.engine", "evolution.generations", "evolution.budget",
                "evolution.tuned", "evolution.toolbox", "config", "pruning"}  # may take a `Config`, as may all of run
ATTRIBUTES = {"evaluation.graph": {"output"}, "engines.scoop_launch": {"self.socket"}, "engines.scoop_worker": {"future"},
              "run.settings": {"config"}}  # objects that are asked by name what they have: none is an evaluator
SOURCES = {".".join(p.relative_to(ROOT / "evoprune").with_suffix("").parts): p.read_text()
           for p in (ROOT / "evoprune").rglob("*.py")}
MODULES = {name: text for name, text in SOURCES.items() if name.rpartition(".")[2] != "__init__"}


def imported(name, tree):
    """The modules of the package that a module imports at any depth, by their place in `ORDER`."""
    wing, found = name.rpartition(".")[0], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = [wing] if node.level == 1 and wing else []
            base = ".".join([*parts, *filter(None, [node.module])])
            found |= {base} if base in ORDER else {f"{base}.{a.name}".strip(".") for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("evoprune."):
            found.add(node.module.removeprefix("evoprune."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("evoprune.") for a in node.names if a.name.startswith("evoprune.")}
    return found


def out_of_order(sources):
    wrong = []
    for name, text in sources.items():
        used = imported(name, ast.parse(text))
        wrong += [f"{name} imports {other}" for other in used - set(ORDER[:ORDER.index(name)])]
        wrong += [f"{name} imports {other}" for other in used
                  if other.split(".")[0] in FORBIDDEN.get(name.split(".")[0], ())]
    return wrong


def asked_by_name(sources):
    """hasattr and getattr where evaluators are."""
    return [f"{name}: {ast.unparse(node)}" for name, text in sources.items()
            if name.split(".")[0] in ("engines", "evaluation", "evolution", "run", "pruning", "main")
            for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("hasattr", "getattr")
            and ast.unparse(node.args[0]) not in ATTRIBUTES.get(name, ())]


def method_readers(sources):
    """Where the text of --method goes, but to `read_method`, to what hands it there, or into a message."""
    wrong = []
    for name, text in sources.items():
        tree = ast.parse(text)
        allowed = {id(n) for node in ast.walk(tree) for n in ast.walk(node)
                   if isinstance(node, ast.FormattedValue) or (isinstance(node, ast.Call) and ast.unparse(node.func) in (
                       "read_method", "check_rules", "at_targets", "log.info"))
                   or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith(".origin"))}
        wrong += [f"{name}: line {node.lineno}" for node in ast.walk(tree)
                  if isinstance(node, ast.Attribute) and node.attr == "method" and id(node) not in allowed]
        wrong += [f"{name}: {ast.unparse(node)}" for node in ast.walk(tree)
                  if isinstance(node, (ast.Compare, ast.Subscript, ast.Attribute)) and id(node) not in allowed
                  and re.match(r"method\b(?!\.(kind|rule)\b)", ast.unparse(node))]
    return wrong


FOLDERS = (MODELS, CHECKPOINT, TRAINED, STAGE_VALUES, LOCK, REPLACED, GONE)


def docstrings(tree):
    return {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
            and isinstance(node.body[0], ast.Expr)}


def files_named(sources):
    """Names of a run's files in strings, but for docstrings and the help of a setting."""
    names = re.compile(rf"(?<![\w.])({'|'.join(re.escape(f) for f in FILES if '.' in f)}|models/)")
    wrong = []
    for name, text in sources.items():
        if name == "results.written":
            continue
        tree = ast.parse(text)
        helps = {id(n) for call in ast.walk(tree) if isinstance(call, ast.Call) and ast.unparse(call.func) == "option"
                 for n in ast.walk(call)}
        wrong += [f"{name}: {node.value!r}" for node in ast.walk(tree)
                  if isinstance(node, ast.Constant) and isinstance(node.value, str)
                  and (names.search(node.value) or node.value in FOLDERS)
                  and id(node) not in docstrings(tree) | helps]
    return wrong


def carries_everything(sources):
    """Parameters that are a whole `Config` or `Run`."""
    wrong = []
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            given = [n for n in node.body if isinstance(n, ast.AnnAssign)] if isinstance(node, ast.ClassDef) else []
            for argument in [*every_argument(node), *given]:
                kind = ast.unparse(argument.annotation) if argument.annotation else ""
                if (re.search(r"\bConfig\b", kind) and name not in GIVEN_CONFIG and not name.startswith("run.")) or (
                        re.search(r"\bRun\b", kind) and name != "pruning" and not name.startswith("run.")):
                    wrong.append(f"{name}: {ast.unparse(argument)}")
    return wrong


def every_argument(node):
    if not isinstance(node, ast.FunctionDef):
        return []
    return [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]


def unpickled(sources):
    wrong = []
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                if called.startswith(("pickle.load", "pickle.Unpickler")) or \
                        (called == "torch.load" and keywords.get("weights_only") != "True") or \
                        (called in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False"):
                    wrong.append(f"{name}: {called}")
            if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "cloudpickle", "numpy", "torch"):
                wrong += [f"{name}: {a.name}" for a in node.names if a.name in ("load", "loads", "Unpickler")]
    return wrong


def too_large(sources):
    """Functions of over 40 lines or 5 arguments without a reason beside them, and files of over 300 lines."""
    wrong = [f"{name}: {text.count(chr(10))} lines" for name, text in sources.items() if text.count("\n") > 300]
    for name, text in sources.items():
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                beside = "\n".join(lines[node.lineno - 1:node.body[0].end_lineno + 1])
                if len(every_argument(node)) > 5 and not re.search(r"# \d+ arguments: \w", beside):
                    wrong.append(f"{name}.{node.name}: {len(every_argument(node))} arguments")
                if node.end_lineno - node.lineno + 1 > 40 and not re.search(r"#.* \d+ lines: \w", beside):
                    wrong.append(f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
    return wrong


def stop_words(sources):
    """Functions that tell by a string beside their result that they stopped."""
    return [f"{name}.{node.name}" for name, text in sources.items() if name.startswith(("run.", "pruning"))
            for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and node.returns is not None
            and re.fullmatch(r"tuple\[.*, str( \| None)?\]", ast.unparse(node.returns))]


def records_read(sources):
    """What reads config.json by hand: by JSON outside the modules that have files of their own, or of others."""
    own = {"inputs.weights", "inputs.zoo", "files", "results.record", "evolution.checkpoint", "run.layerwise", "masks.packed"}
    return [f"{name}: {ast.unparse(node)}" for name, text in sources.items() if name not in own
            for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)
            and ast.unparse(node.func).startswith("json.load")]


def module_attributes_set(sources):
    wrong = []
    for name, text in sources.items():
        tree = ast.parse(text)
        modules = {a.asname or a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (
            node.module or "").startswith("evoprune") for a in node.names if a.name.islower()} | {"evoprune"}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if (isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr") or any(
                    isinstance(t, ast.Attribute) and ast.unparse(t.value).split(".")[0] in modules for t in targets):
                wrong.append(f"{name}: {ast.unparse(node)}")
    return wrong


def absolute(sources):
    """Imports of the package by its name, which only the files that are run as programs may have."""
    return [f"{name}: {ast.unparse(node)}" for name, text in sources.items() if name not in ("main", "__main__")
            for node in ast.walk(ast.parse(text))
            if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "evoprune")
            or (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "evoprune" for a in node.names))]


def objectives_named(sources):
    """The names of what is optimised, or its place in an individual's values, outside `objectives`."""
    names = re.compile(r"(?!accuracy_floor$)(\w*_)?(accuracy|sparsity)(_\w*)?")
    values = re.compile(r"\b(w?values|objectives)(\(.*\))?$")
    wrong = []
    for name, text in sources.items():
        tree = ast.parse(text)
        own = docstrings(tree) | {id(n) for node in tree.body if isinstance(node, ast.Assign)
                                  and ast.unparse(node.targets[0]) == "LAYER_COLUMNS" for n in ast.walk(node)}
        for node in ast.walk(tree) if name != "objectives" else ():
            said = node.value if isinstance(node, ast.Constant) else node.attr if isinstance(node, ast.Attribute) else \
                node.arg if isinstance(node, (ast.keyword, ast.arg)) else ""
            places = node.slice.elts if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) else \
                [node.slice] if isinstance(node, ast.Subscript) else []
            if (isinstance(said, str) and names.fullmatch(said) and id(node) not in own) or (
                    places and values.search(ast.unparse(node.value)) and any(isinstance(n, ast.Constant) for n in places)) or (
                    isinstance(node, ast.Tuple) and {"accuracy", "sparsity"} <= {ast.unparse(n) for n in node.elts}):
                wrong.append(f"{name}: {ast.unparse(node)}")
    return wrong


def units_known(sources):
    """What asks which weights a gene stands for, outside the modules that know."""
    return [f"{name}: {ast.unparse(node)}" for name, text in sources.items()
            if name not in ("masks.units", "masks.layout", "masks.layers") for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Attribute) and node.attr in ("unit", "collapsed", "output")
            and ast.unparse(node) not in ("config.unit", "self.unit", "before.output")]


RULES = {  # a rule, and a module with a source that it must find fault with
    out_of_order: ("masks.layers", "from ..values.repair import IMAGES"),
    asked_by_name: ("evolution.toolbox", "weights = getattr(evaluate, 'weights', None)"),
    method_readers: ("run.jobs", "kind, _, rule = config.method.partition(':')"),
    files_named: ("run.finish", "folder.remove('front.csv')"),
    carries_everything: ("values.repair", "def default(model: int, config: Config) -> str:\n    return ''"),
    unpickled: ("inputs.sources", "np.load(path)"),
    objectives_named: ("results.front", "best = point.accuracy"),
    units_known: ("values.inherited", "coarse = layer.unit"),
    too_large: ("run.run", "def f(a, b, c, d, e, f):\n    pass"),
    stop_words: ("run.search", "def search(run) -> tuple[State, str]:\n    pass"),
    records_read: ("run.rebuild", "about = json.loads(text)"),
    module_attributes_set: ("scripts.x", "setattr(search, 'rule_jobs', paced)"),
    absolute: ("run.run", "from evoprune.config import Config")}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_each_rule_and_each_rule_can_be_broken(rule):
    assert rule(MODULES) == []
    name, source = RULES[rule]
    assert len(set(rule({name: source}))) == 1


@pytest.mark.parametrize(("name", "source"), [
    ("results.front", "from ..evaluation.accuracy import correct"), ("evolution.starts", "from ..evaluation import evaluator"),
    ("engines.engine", "from ..inputs.models import MODELS"), ("run.prepare", "from .rebuild import here"),
    ("inputs.named", "import evoprune.run.run"), ("errors", "from .config import Config")])
def test_each_kind_of_import_that_climbs_is_found(name, source):
    assert out_of_order({name: source})


def test_functions_that_are_too_long_or_compare_the_method_are_found():
    assert too_large({"run.run": "def f():\n" + "    x = 1\n" * 40}) and too_large({"run.run": "x = 1\n" * 301})
    assert not too_large({"run.run": "def f(a, b, c, d, e, f):  # 6 arguments: they are six\n    pass"})
    for source in ("config.method == 'evolve'", "'evolve' == config.method", "'gradual' in config.method", "method == 'evolve'",
                   "re.match('x', config.method)", "how = config.method", "method.startswith('gradual')", "method[:3]"):
        assert method_readers({"run.run": source}), source
    assert not method_readers({"run.run": "method = read_method(config.method)\nmethod.kind == 'evolve'"})
    for source in ("def f(run: Run):\n    pass", "class A:\n    config: Config | None"):
        assert carries_everything({"results.front": source}), source
    for source in ("from pickle import loads", "numpy.load(file, allow_pickle=True)", "torch.load(file)"):
        assert unpickled({"results.front": source}), source
    for source in ("folder / 'models'", "checkpoint / 'trained'", "f'{path}/layers.csv'"):
        assert files_named({"results.front": source}), source
    for source in ("p.fitness.values[1]", "values[:, 0]", "state.archive[0].fitness.wvalues[0]", "result.objectives[0]",
                   "row['max_sparsity']", "point.note(accuracy=1.0)", "accuracy, sparsity = found", "def f(accuracy):\n    pass",
                   "found = p.test_accuracy"):
        assert objectives_named({"run.finish": source}), source
    assert not objectives_named({"run.finish": "values[:, objectives.score], config.accuracy_floor, values[i], f'{accuracy}'"})
    for source in ("from evoprune import main\nmain.prune = f", "import evoprune\nevoprune.run.search.search = f"):
        assert module_attributes_set({"scripts.x": source}), source
    assert absolute({"run.run": "import evoprune.config"}) and absolute({"run.run": "from evoprune import evolution"})
    assert stop_words({"run.search": "def f() -> tuple[State, str | None]:\n    pass"})


def test_scripts_set_no_attribute_of_a_module():
    scripts = {f"scripts.{p.stem}": p.read_text() for p in (ROOT / "scripts").glob("*.py")}
    assert len(scripts) > 5 and module_attributes_set(scripts) == []


def test_every_module_has_a_place_in_the_order_and_says_what_it_is():
    assert set(MODULES) == set(ORDER)
    for name, text in SOURCES.items():
        assert ast.get_docstring(ast.parse(text)), name
    for wing, names in WINGS.items():
        assert len(names) <= 12 and len(ast.parse(SOURCES[f"{wing}.__init__"]).body) == (3 if wing == "evolution" else 1)


def test_choices_have_what_they_name():
    assert list(STARTS) == list(NEEDS) and set(SALIENCIES) == set(SCORES)
    cases = re.findall(r'case "(\w+)"', SOURCES["engines.engine"])
    assert {*cases, "local"} == set(ENGINES)


def test_modules_named_in_strings_can_be_imported():
    texts = [*SOURCES.values(), *(p.read_text() for folder in ("scripts", "tests") for p in (ROOT / folder).rglob("*.py"))]
    found = {match for text in texts for match in re.findall(r"""["' ](evoprune(?:\.[a-z_]\w*)+)""", text)}
    assert {"evoprune.engines.scoop_worker", "evoprune.engines.scoop_launch", "evoprune.engines.worker", "evoprune.main"} <= found
    for name in found - {"evoprune.main.py"}:
        module, rest = name, []
        while not resolves(module):
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
            assert module, name
        value = import_module(module)
        for attribute in rest:
            value = getattr(value, attribute)


def resolves(module):
    path = Path(ROOT, *module.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


LIGHT = """
import sys
{program}
heavy = {{"torch", "matplotlib", "moocore"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""


@pytest.mark.parametrize("program", [
    "from evoprune.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass",
    "from evoprune.main import main\ntry:\n    main(['--no-such-flag'])\nexcept SystemExit:\n    pass",
    "from evoprune.main import main\nassert main(['--population', '7']) == 2",
    "from evoprune.main import main\nassert main(['--start', 'luck']) == 2",
    "from evoprune.main import main\nassert main(['--method', 'gradual:fisher']) == 2",
    "import evoprune\nfront = evoprune.load_front('results/lenet5_mnist')\nprint(front, front.best(accuracy=0.98))"])
def test_what_needs_no_torch_imports_none(program):
    done = subprocess.run([sys.executable, "-c", LIGHT.format(program=program)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_light_program_that_imports_torch_is_found():
    done = subprocess.run([sys.executable, "-c", LIGHT.format(program="import evoprune\nevoprune.accuracy")], cwd=ROOT)
    assert done.returncode == 1
