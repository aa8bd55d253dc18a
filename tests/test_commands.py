"""pick, compare and report as a user types them."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, hashes

import evoprune
from evoprune.commands import COMMANDS, parser_of
from evoprune.main import main
from evoprune.objectives import USUAL
from evoprune.results.written import DONE
from evoprune.views.pick import Wish, bytes_of, first_within, next_step, packed_bytes, seconds_of

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def named(weights_file, tmp_path_factory):
    """A finished run of a model that its folder names."""
    out = tmp_path_factory.mktemp("named") / "run"
    return evoprune.prune("lenet", "digits", weights=weights_file, out=str(out), population=12, generations=3, threads=1)


@pytest.fixture
def copied(named, tmp_path):
    """A copy without hashes, whose files may be changed."""
    run = shutil.copytree(named.path, tmp_path / "run")
    done = json.loads((run / DONE).read_text())
    (run / DONE).write_text(json.dumps({**done, "files": None}))
    return run


def command(capsys, *arguments):
    """Return what a command line prints to standard output; it must have no errors."""
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """Return the one line that a command line ends with."""
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    assert status == 2 and err.startswith("evoprune: ") and err.count("\n") == 1 and "point " not in out
    return err.removeprefix("evoprune: ").rstrip("\n")


def test_pick_says_that_bytes_are_divided_by_255(lenet, digits, tmp_path, capsys):
    data = evoprune.Data(search=replace(digits.search, mean=None, std=None))
    evoprune.prune(lenet, data, out=tmp_path / "run", generations=0, population=4)
    assert "  the model takes images in 0..1\n" in command(capsys, "pick", tmp_path / "run", "--knee")


@pytest.mark.parametrize(("wish", "expected"), [
    (["--drop", "0.05"], lambda front: front.best(drop=0.05)), (["--accuracy", "0.5"], lambda front: front.best(accuracy=0.5)),
    (["--score", "0.5"], lambda front: front.best(accuracy=0.5)), (["--knee"], lambda front: front.knee()),
    (["--sparsity", "0.8"], lambda front: front.best(sparsity=0.8)), (["--id", "001"], lambda front: front["001"])])
def test_pick_takes_what_a_front_takes_and_says_what_it_is(wish, expected, named, capsys):
    point, said = expected(named), command(capsys, "pick", named.path, *wish)
    assert said.startswith(f"point {point.id} of {named.path}: lenet on digits\n")
    for text in (f"accuracy: {100 * point.accuracy:.2f} % on 287 search images",
                 f", {100 * point.test_accuracy:.2f} % on 359 test images",
                 f"sparsity: {100 * point.sparsity:.2f} %", f"weights: {point.kept:,} of 11,208",
                 "the model takes images in 0..1, less a mean of 0.3053, over a standard deviation of 0.3762",
                 f"before pruning: {100 * named.record.measured.score:.2f} %", f"pick {named.path} --id {point.id} --export "):
        assert text in said
    line = said[said.index("in Python: ") + 11:].splitlines()[0]
    space = {}
    exec(line, space)
    assert int(sum((p != 0).sum() for name, p in space["model"].named_parameters() if name in point.masks())) <= point.kept


@pytest.mark.parametrize(("arguments", "said"), [
    (["--accuracy", "0.99999"], r"front: no point has accuracy >= 0\.99999; the front reaches accuracy 0\.\d{4}"),
    (["--sparsity", "0.99999"], r"front: no point has sparsity >= 0\.99999; the front reaches sparsity 0\.\d{4}"),
    (["--sparsity", "50"], r"best: found --sparsity 50\.0, expected a number from 0 to 1"),
    (["--drop", "-1"], r"best: found --drop -1\.0, expected a number from 0 to 1"),
    (["--drop", "2"], r"best: found --drop 2\.0, expected a number from 0 to 1"),
    (["--knee", "--bits", "8"], r"--bits: does nothing without --export; leave it out, or give that too"),
    (["--knee", "--slim", "--overwrite"], r"--overwrite, --slim: does nothing without --export; .*"),
    (["--knee", "--export", "a.foo"], r"export: found 'a\.foo', expected a name that ends in \.packed\.safetensors, .*"),
    (["--knee", "--export", "nowhere/a.pt"], r"nowhere/a\.pt: no folder nowhere, expected one that is there"),
    (["--knee", "--export", "a.pt", "--bits", "8"], r"export: found --bits 8, expected 32, or in \.packed\.safetensors 16 or 8"),
    (["--knee", "--export", "README.md"], r"export: found 'README\.md', expected a name that ends in .*"),
    (["--knee", "--export", ""], r"export: found '', expected the name of a file that ends in .*"),
    (["--id", "x\x1b[2J"], r"pick: no point 'x\\\\?x1b\[2J', expected one of 000 to \d{3}, as in front\.csv"),
    (["--bytes", "10"], r"pick: no point has bytes at 32 bits a value <= 10; the smallest has [\d,]+"),
    (["--latency", "1us"], r"pick: no point has latency <= 0\.001 ms, one example on one thread here; the fastest takes "
     r"[\d.]+ ms; with --slim the dead channels are cut out first"),
    (["--drop", "much"], r"argument --drop: found 'much', expected a number; see --help"),
    (["--bytes", "20 apples"], r"argument --bytes: found '20 apples', expected bytes like 20k or 1\.5M; see --help"),
    (["--latency", "5"], r"argument --latency: found '5', expected a time like 5ms, 300us or 0\.1s; see --help"),
    ([], r"one of the arguments --drop --accuracy/--score --sparsity --bytes --latency --knee --id is required; see --help"),
    (["--knee", "--id", "000"], r"argument --id: not allowed with argument --knee; see --help"),
    (["--knee", "--bits", "7"], r"argument --bits: found '7', expected 32, 16 or 8; see --help"),
    (["--drop", "nan"], r"best: found --drop nan, expected a number from 0 to 1")])
def test_what_cannot_be_picked_is_one_line_that_says_how_near_the_front_comes(arguments, said, named, capsys):
    assert re.fullmatch(said, refused(capsys, "pick", named.path, *arguments))


def test_a_folder_that_is_none_is_refused_by_each_command(tmp_path, capsys):
    for words in (["pick", tmp_path, "--knee"], ["compare", tmp_path], ["report", tmp_path]):
        assert refused(capsys, *words) == f"{tmp_path}: no run there (no config.json in it), expected a folder with config.json"


def test_a_picked_point_is_taken_away_and_counted_as_the_file_has_it(named, tmp_path, capsys):
    file = tmp_path / "small.packed.safetensors"
    said = command(capsys, "pick", named.path, "--knee", "--export", file, "--bits", "8")
    assert re.search(r"small\.packed\.safetensors: [\d,]+ bytes, point \d+, .* accuracy of the file, opened in a fresh process, "
                     r"\d+\.\d\d \([\d.-]+\) on 359 examples", said)
    assert torch.equal(evoprune.load_packed(file, named.structure()).conv1.weight != 0, named.knee().masks()["conv1.weight"])
    assert refused(capsys, "pick", named.path, "--knee", "--export", file) == (
        f"{file}: is there already; expected another name, or --overwrite for a file")
    found = json.loads(command(capsys, "pick", named.path, "--id", "000", "--export", file, "--overwrite", "--json"))
    assert found["export"] == {"path": str(file), "bytes": file.stat().st_size} and found["id"] == "000"
    assert found["accuracy"] == named["000"].accuracy and found["dense"]["id"] == "dense" and found["calls"] is None


def test_what_a_refusal_says_can_be_had_can_be_had(named, capsys):
    said = refused(capsys, "pick", named.path, "--sparsity", "0.99999")
    sparsest = max(point.sparsity for point in named)
    nearest = said.split()[-1]
    assert sparsest - 1e-4 < float(nearest) <= sparsest
    assert json.loads(command(capsys, "pick", named.path, "--sparsity", nearest, "--json"))["sparsity"] == sparsest


@pytest.mark.parametrize("bits", [32, 8])
def test_a_packed_file_has_no_more_bytes_than_were_wished_for(bits, named, tmp_path, capsys):
    most = packed_bytes(named.knee(), bits)
    file = named.knee().export(tmp_path / "a.packed.safetensors", bits=bits)
    assert most - 100 < file.stat().st_size <= most
    said = command(capsys, "pick", named.path, "--bytes", most, "--bits", bits)
    assert said.rstrip().endswith(f"--export small.packed.safetensors{' --bits 8' * (bits == 8)}")


def test_what_takes_a_point_away_is_what_was_wished_for(named):
    point = named[0]
    assert next_step(point, Wish(latency=1.0), 32, True).endswith(f"--id {point.id} --export small.pt2 --slim")
    assert next_step(point, Wish(drop=0.1), 32, False).endswith(f"--id {point.id} --export small.safetensors")


def test_ids_are_numbers(named, capsys):
    assert json.loads(command(capsys, "pick", named.path, "--id", "0", "--json"))["id"] == "000"


def test_the_knee_is_better_than_a_guess_and_what_is_not_is_said_to_be_no_better(named, capsys, monkeypatch):
    chance = sorted(point.accuracy for point in named)[len(named) // 2]
    monkeypatch.setattr("evoprune.results.record.Record.chance", chance)
    assert named.knee().accuracy > chance
    worst = min(named, key=lambda point: point.accuracy)
    line = f"no better than one answer for all examples, which has {100 * chance:.2f} %"
    assert line in command(capsys, "pick", named.path, "--id", worst.id)
    assert line not in command(capsys, "pick", named.path, "--knee")


@pytest.mark.parametrize("words", [["report", "--out", "x.html"], ["compare", "--csv", "x.csv"], ["compare", "--plot", "x.png"],
                                   ["pick", "--knee", "--export", "x.pt"]])
def test_a_file_that_cannot_be_written_is_one_line(words, named, tmp_path, capsys, monkeypatch):
    def full(path, *given):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evoprune.results.written.write_atomic", full)
    name, *rest = words
    assert main([name, str(named.path), *rest]) == 2
    assert re.fullmatch(r"evoprune: x\.\w+: No space left on device; .*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_flags_and_files_that_cannot_be_are_refused(named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(named.path, tmp_path / "run")
    before = hashes(run)
    for words, line in ((["report", run, "--overwrite"], "--overwrite: does nothing without --out"),
                        (["compare", run, "--overwrite"], "--overwrite: does nothing without --csv or --plot"),
                        (["report", run, "--out", "a.pdf"], "out: found 'a.pdf', expected a name that ends in .html"),
                        (["compare", run, "--plot", "a.svg"], "plot: found 'a.svg', expected a name that ends in .png"),
                        (["compare", run, "--csv", run / "front.csv", "--overwrite"], "is one of a run's own files"),
                        (["report", run, "--out", run / "report.html", "--overwrite"], "is one of a run's own files")):
        assert line in refused(capsys, *words)
    (tmp_path / "y.html.part").write_text("precious")
    command(capsys, "report", run, "--out", "y.html")
    assert (tmp_path / "y.html.part").read_text() == "precious" and hashes(run) == before


def test_bytes_are_those_of_the_packed_file_and_the_densest_that_fits_is_taken(named, capsys):
    sizes = {point.id: packed_bytes(point, 16) for point in named}
    limit = sorted(sizes.values())[len(sizes) // 2]
    found = json.loads(command(capsys, "pick", named.path, "--bytes", limit, "--bits", "16", "--json"))
    assert found["id"] == next(point.id for point in named if sizes[point.id] <= limit)


def test_no_more_is_looked_at_than_must_be_and_what_comes_nearest_is_said():
    costs, looked = [10, 9, 7, 8, 6], []

    def cost(point):
        looked.append(point.at)
        return costs[point.at]

    points = [SimpleNamespace(at=i, ranked=(1 - i / 10, i / 5), objectives=USUAL) for i in range(5)]
    assert first_within(points, cost, 8, str).at == 2 and looked == [0, 1, 2]
    with pytest.raises(evoprune.EvopruneError, match="^pick: no point has at most: 6$"):
        first_within(points, cost, 5, lambda least: f"at most: {least}")
    points[4].ranked = (0.85, 0.8)  # with more objectives scores rise again
    assert first_within(points, cost, 8, str).at == 4


def test_sizes_and_times_are_read_as_people_write_them():
    assert [bytes_of(text) for text in ("20k", "1.5M", "300000", "2 kB".replace(" ", ""), "1g")] == [2e4, 1.5e6, 3e5, 2e3, 1e9]
    assert [seconds_of(text) for text in ("5ms", "300us", "0.1 s")] == pytest.approx([5e-3, 3e-4, 0.1])
    for read, text in ((bytes_of, "-3"), (bytes_of, "k"), (seconds_of, "5"), (seconds_of, "5min"), (seconds_of, "nan s")):
        with pytest.raises(ValueError):
            read(text)


def test_where_search_and_test_differ_beyond_their_intervals_it_is_said(named, copied, capsys):
    point = named[0]
    assert "beyond" not in command(capsys, "pick", named.path, "--id", "000")
    table = (copied / "front.csv").read_text()
    low = point.test_accuracy - 0.3
    (copied / "front.csv").write_text(table.replace(
        f"{point.test_accuracy},{point.test_low},{point.test_high}", f"{low},{low - 0.01},{low + 0.01}", 1))
    said = command(capsys, "pick", copied, "--id", "000")
    assert re.search(r"search and test differ beyond their 95 % intervals \([\d.]+-[\d.]+ on search images\): go by", said)
    assert json.loads(command(capsys, "pick", copied, "--id", "000", "--json"))["differ"] is True


def test_it_says_which_function_building_the_model_calls_and_calls_none(copied, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("raise SystemExit('called')")
    text = (copied / "config.json").read_text()
    (copied / "config.json").write_text(text.replace('"model": "lenet"', '"model": "net.py:make"'))
    said = command(capsys, "pick", copied, "--knee")
    assert f"building the model calls the function make of the file {tmp_path}/net.py, as the run's folder says" in said
    (copied / "config.json").write_text(text.replace('"rebuildable": true', '"rebuildable": false'))
    assert f"load_front({str(copied)!r}, model=yours)" in command(capsys, "pick", copied, "--knee")


def test_report_says_where_it_is_and_makes_one_where_there_is_none(named, copied, tmp_path, capsys):
    assert command(capsys, "report", named.path).startswith(f"{named.path}/report.html    open it in a browser")
    (copied / "report.html").unlink()
    found = json.loads(command(capsys, "report", copied, "--json"))
    assert found == {"run": str(copied), "report": f"{copied}/report.html", "bytes": (copied / "report.html").stat().st_size}
    command(capsys, "report", copied, "--out", tmp_path / "other.html")
    assert (tmp_path / "other.html").read_bytes() == (copied / "report.html").read_bytes()
    assert refused(capsys, "report", copied, "--out", tmp_path / "other.html").endswith("--overwrite for a file")
    (named.path / "report.html").write_text(before := (named.path / "report.html").read_text() + " ")
    assert "damaged or changed since the run wrote it" in refused(capsys, "report", named.path)
    (named.path / "report.html").write_text(before[:-1])


def test_compare_prints_a_table_and_keeps_it_as_csv_and_picture(named, run_folder, tmp_path, capsys):
    files = tmp_path / "table.csv", tmp_path / "fronts.png"
    said = command(capsys, "compare", named.path, named.path, "--at", "0.5,0.8", "--csv", files[0], "--plot", files[1])
    assert "test accuracy at sparsity, %" in said and "so it is" in said and said.count(str(named.path)) == 2
    assert len(files[0].read_text().splitlines()) == 5 and files[1].read_bytes().startswith(b"\x89PNG")
    assert refused(capsys, "compare", named.path, "--csv", files[0]) == (
        f"{files[0]}: is there already; expected another name, or --overwrite for a file")
    found = json.loads(command(capsys, "compare", named.path, named.path, "--json"))
    assert len(found["runs"]) == 2 and {row["verdict"] for row in found["rows"]} == {None, "tie"}
    assert "expected sparsities like 0.9,0.95" in refused(capsys, "compare", named.path, "--at", "95")
    assert "found a test split of 359 images of data handed in" in refused(capsys, "compare", named.path, run_folder)


PROGRAMS = [["pick", "RUN", "--knee", "--json"], ["pick", "RUN", "--drop", "0.1"], ["compare", "RUN", "RUN", "--plot", "p.png"],
            ["report", "RUN", "--out", "r.html"], *([name, "--help"] for name in COMMANDS)]


@pytest.mark.parametrize("words", PROGRAMS, ids=" ".join)
def test_what_only_looks_imports_no_torch(words, named, tmp_path):
    words = [str(named.path) if word == "RUN" else word for word in words]
    program = f"""
import sys
from evoprune.main import main
try:
    status = main({words!r})
except SystemExit as stopped:
    status = stopped.code
sys.exit(status or 3 * ('torch' in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_examples_and_docs(name):
    text = parser_of(name).format_help()
    examples = re.findall(rf"^  python -m evoprune\.main ({name} .*)$", text, re.MULTILINE)
    shown = re.findall(rf"^python -m evoprune\.main ({name} .*)$", README, re.MULTILINE)
    assert examples and shown and "--json" in text
    for line in (*examples, *shown):
        parser_of(name).parse_args(line.split("#")[0].split()[1:])
