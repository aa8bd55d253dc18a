import ast

from conftest import ROOT

ORDER = ["config", "models", "named", "splits", "sources", "layers", "saliency", "genome", "paths", "starts", "operators",
         "fast", "prepared", "least_squares", "repair", "evaluation", "tuning", "worker", "team", "processes", "engines",
         "evolution", "tuned", "checkpoint", "front", "export", "settings", "run", "jobs", "search", "layerwise", "pruning",
         "scoop_launch", "main", "scoop_worker"]


def test_modules_import_only_earlier_ones():
    for i, name in enumerate(ORDER):
        used = set()
        for node in ast.walk(ast.parse((ROOT / "evoprune" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("evoprune")):
                stem = (node.module or "").removeprefix("evoprune").lstrip(".")
                used |= {stem.split(".")[0]} if stem else {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                used |= {a.name.split(".")[1] for a in node.names if a.name.startswith("evoprune.")}
        if name == "main":
            used -= {"EvopruneError", "Front", "prune"}  # the public names of the package
        assert used <= set(ORDER[:i]), f"{name} imports {used - set(ORDER[:i])}"


def test_every_module_has_a_place_in_the_order():
    assert {p.stem for p in (ROOT / "evoprune").glob("*.py")} == {*ORDER, "__init__"}


def test_nothing_is_unpickled():
    for path in (ROOT / "evoprune").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert not called.startswith(("pickle.load", "pickle.Unpickler")), path
            if called == "torch.load":
                assert keywords["weights_only"] == "True", path
            if called == "np.load":
                assert keywords["allow_pickle"] == "False", path
